"""On two ranks: FSDP2, DDP and sharded checkpoints against one process that sees every rank's rows.

The reference takes the ranks' parts of a batch one after the other, each with its rank's seed, and
averages their gradients.
"""

import contextlib
import copy
import os
import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from lora_kernels import (
    apply_lora,
    load_adapter,
    lora_parameters,
    lora_state_dict,
    merge_lora,
    remove_lora,
    save_adapter,
    unmerge_lora,
)

STEPS = 3


class Block(nn.Module):
    def __init__(self, checkpointed):
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)
        self.checkpointed = checkpointed

    def compute(self, x):
        return x + self.down(nn.functional.silu(self.up(x)))

    def forward(self, x):
        if self.checkpointed:
            return checkpoint(self.compute, x, use_reentrant=False)
        return self.compute(x)


def build(dtype=torch.float64, checkpointed=False, **options):
    torch.manual_seed(3)
    model = nn.Sequential(Block(checkpointed), Block(checkpointed)).to(dtype)
    apply_lora(model, 4, **{"alpha": 8, "dropout": 0.25} | options)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not name.endswith("lora_A"):
            nn.init.normal_(parameter, std=0.2)
    return model


def batch(dtype=torch.float64):
    return torch.randn(6, 5, 16, generator=torch.Generator().manual_seed(4), dtype=dtype)


def loss_of(model, x, step, rank):
    torch.manual_seed(100 * step + rank)
    return model(x.chunk(dist.get_world_size())[rank]).float().square().mean()


def optimizer_of(model):
    return torch.optim.AdamW(lora_parameters(model), lr=1e-2)


def train(model, steps=range(STEPS), dtype=torch.float64, optimizer=None):
    """This rank's losses."""
    optimizer = optimizer or optimizer_of(model)
    losses = []
    for step in steps:
        loss = loss_of(model, batch(dtype), step, dist.get_rank())
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def reference(model, compute_dtype=None, dtype=torch.float64):
    """`train` in one process; products in `compute_dtype`, as mixed precision has them."""
    optimizer, losses = optimizer_of(model), []
    world = dist.get_world_size()
    for step in range(STEPS):
        gradients = [0.0 for _ in lora_parameters(model)]
        for rank in range(world):
            copied = copy.deepcopy(model).to(compute_dtype) if compute_dtype else model
            loss = loss_of(copied, batch(compute_dtype or dtype), step, rank)
            if rank == dist.get_rank():
                losses.append(loss.item())
            parts = torch.autograd.grad(loss, list(lora_parameters(copied)))
            gradients = [
                total + part.to(dtype) / world for total, part in zip(gradients, parts, strict=True)
            ]
        for parameter, gradient in zip(lora_parameters(model), gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        optimizer.zero_grad()
    return losses


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def require_close(model, single, rtol):
    """A step of AdamW is lr x sign-like: rounding in small gradients grows in it."""
    pairs = zip(model.named_parameters(), single.named_parameters(), strict=True)
    for (name, one), (_, two) in pairs:
        error = (whole(one) - two).norm() / two.norm()
        assert error <= (rtol if one.requires_grad else 0), (name, error)


def shard(model, **options):
    for part in model:
        fully_shard(part, **options)
    return fully_shard(model, **options)


def require_as_reference(parallel, single, rtol=1e-10, dtype=torch.float64, compute_dtype=None):
    losses = train(parallel, dtype=dtype)
    expected = reference(single, compute_dtype, dtype)
    assert losses[0] != losses[-1]
    for one, two in zip(losses, expected, strict=True):
        assert abs(one - two) <= rtol * two, (losses, expected)
    inner = parallel.module if isinstance(parallel, DistributedDataParallel) else parallel
    require_close(inner, single, rtol)


def check_ddp_with_a_static_graph():
    require_as_reference(DistributedDataParallel(build(), static_graph=True), build())


def check_ddp_with_activation_checkpoints():
    model = DistributedDataParallel(build(checkpointed=True), static_graph=True)
    require_as_reference(model, build())


def check_ddp_accumulates():
    model, single = DistributedDataParallel(build()), build()
    for step, context in enumerate((model.no_sync, contextlib.nullcontext)):
        with context():
            loss_of(model, batch(), step, dist.get_rank()).backward()
        for rank in range(dist.get_world_size()):
            (loss_of(single, batch(), step, rank) / dist.get_world_size()).backward()
    for one, two in zip(lora_parameters(model), lora_parameters(single), strict=True):
        assert torch.allclose(one.grad, two.grad, rtol=1e-12, atol=1e-15)


def check_fsdp():
    model = shard(build())
    weight = model[0].up.weight
    assert weight.to_local().shape == (12, 16)
    require_as_reference(model, build())
    assert model[0].up.weight.to_local().shape == (12, 16)


def check_fsdp_with_activation_checkpoints():
    require_as_reference(shard(build(checkpointed=True)), build())


def check_fsdp_kept_after_forward_and_full_training_beside():
    model = shard(build(modules_to_save=["1.down"]), reshard_after_forward=False)
    require_as_reference(model, build(modules_to_save=["1.down"]))


def check_fsdp_with_mixed_precision():
    """Master copies and reductions in fp32, everything else in bf16: the very same roundings."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model, single = (build(torch.float32) for _ in range(2))
    model = shard(model, mp_policy=policy)
    assert model(batch(torch.float32)).dtype == torch.bfloat16
    require_as_reference(model, single, 1e-6, torch.float32, torch.bfloat16)
    assert model[0].up.lora_A.dtype == torch.float32


def check_fsdp_with_cpu_offload():
    model = shard(build(), offload_policy=CPUOffloadPolicy(pin_memory=False))
    require_as_reference(model, build())


def check_fsdp_checkpoint_resumes():
    """A sharded checkpoint of adapters and optimizer; the base comes from where it came from."""
    with shared_folder() as folder:
        straight = shard(build())
        losses = train(straight)
        model = shard(build())
        optimizer = optimizer_of(model)
        assert train(model, range(1), optimizer=optimizer) == losses[:1]
        dcp.save(training_state(model, optimizer), checkpoint_id=folder)

        model = shard(build())
        with torch.no_grad():
            for parameter in lora_parameters(model):
                parameter.zero_()
        optimizer = optimizer_of(model)
        state = training_state(model, optimizer)
        assert not any("weight" in key or "bias" in key for key in state["model"])
        dcp.load(state, checkpoint_id=folder)
        options = StateDictOptions(strict=False)
        set_model_state_dict(model, state["model"], options=options)
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
        assert train(model, range(1, STEPS), optimizer=optimizer) == losses[1:]
        for one, two in zip(model.parameters(), straight.parameters(), strict=True):
            assert torch.equal(one.to_local(), two.to_local())


def training_state(model, optimizer):
    trainable = StateDictOptions(ignore_frozen_params=True)
    return {
        "model": get_model_state_dict(model, options=trainable),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }


@contextlib.contextmanager
def shared_folder():
    """One temporary folder for all ranks."""
    names = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(names)
    yield names[0]
    dist.barrier()


def check_sharded_checkpoint_loads_into_one_process():
    with shared_folder() as folder:
        model = shard(build())
        train(model)
        dcp.save(lora_state_dict(model), checkpoint_id=folder)
        single = build()
        state = lora_state_dict(single)
        dcp.load(state, checkpoint_id=folder)
        single.load_state_dict(state, strict=False)
        require_close(model, single, 0)


def check_adapter_files_of_a_sharded_model():
    """Saved by all ranks together; loaded into one process and into a sharded model again."""
    for options in ({}, {"init": "pissa"}, {"modules_to_save": ["1.down"]}):
        with shared_folder() as folder:
            model = shard(build(**options))
            train(model)
            save_adapter(model, folder)
            dist.barrier()
            files = sorted(os.listdir(folder))
            assert files == ["adapter_config.json", "adapter_model.safetensors"]
            single = build(**options | {"init": "kaiming"})
            remove_lora(single)
            load_adapter(single, folder)
            model.eval(), single.eval()
            expected = model(batch())
            assert (single(batch()) - expected).norm() <= 1e-13 * expected.norm()
            if "init" in options:
                continue
            again = shard(build(**options))
            load_adapter(again, folder)
            require_close(again, single, 0)


def check_a_sharded_model_keeps_its_rank():
    model = shard(build())
    layer, before = model[0].up, list(model.parameters())
    try:
        layer.set_adapter(torch.ones(2, 16), torch.ones(24, 2))
    except ValueError as error:
        assert "before" in str(error), error  # noqa: PT017
    else:
        raise AssertionError("a rank was changed")
    assert all(one is two for one, two in zip(model.parameters(), before, strict=True))


def check_merge_of_a_sharded_model():
    model, single = shard(build().eval()), build().eval()
    before = [p.to_local().clone() for p in model.parameters()]
    expected = single(batch())
    merge_lora(model)
    assert (model(batch()) - expected).norm() <= 1e-13 * expected.norm()
    unmerge_lora(model)
    assert all(map(torch.equal, before, (p.to_local() for p in model.parameters())))
