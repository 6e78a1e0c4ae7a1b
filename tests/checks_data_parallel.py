"""On two ranks: FSDP2, DDP and sharded checkpoints against one process that sees every rank's
rows."""

import contextlib
import os

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from parallel_problem import (
    STEPS,
    Part,
    batch,
    build,
    by_rank,
    loss_of,
    optimizer_of,
    require_as_reference,
    require_close,
    set_training_state,
    shard,
    shared_folder,
    train,
    training_state,
)
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.nn.parallel import DistributedDataParallel

from lora_kernels import (
    load_adapter,
    lora_parameters,
    lora_state_dict,
    merge_lora,
    remove_lora,
    save_adapter,
    unmerge_lora,
)


def check_ddp_with_a_static_graph():
    require_as_reference(DistributedDataParallel(build(), static_graph=True), build())


def check_ddp_with_activation_checkpoints():
    model = DistributedDataParallel(build(checkpointed=True), static_graph=True)
    require_as_reference(model, build())


def check_ddp_accumulates():
    model, single = DistributedDataParallel(build()), build()
    for step, context in enumerate((model.no_sync, contextlib.nullcontext)):
        with context():
            loss_of(model, batch(), step, by_rank()).backward()
        for rank in range(dist.get_world_size()):
            part = Part(rank, dist.get_world_size())
            (loss_of(single, batch(), step, part) / part.count).backward()
    for one, two in zip(lora_parameters(model), lora_parameters(single), strict=True):
        assert torch.allclose(one.grad, two.grad, rtol=1e-12, atol=1e-15)


def check_fsdp():
    model = shard(build())
    weight = model[0].up.weight
    assert weight.to_local().shape == (16, 16)
    require_as_reference(model, build())
    assert model[0].up.weight.to_local().shape == (16, 16)


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
        set_training_state(model, optimizer, state)
        assert train(model, range(1, STEPS), optimizer=optimizer) == losses[1:]
        for one, two in zip(model.parameters(), straight.parameters(), strict=True):
            assert torch.equal(one.to_local(), two.to_local())


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
        layer.set_adapter(torch.ones(2, 16), torch.ones(32, 2))
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
