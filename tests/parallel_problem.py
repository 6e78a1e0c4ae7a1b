"""What the checks of several processes train, and one process that sees every rank's rows.

The reference takes the parts of a batch one after the other, each with its part's seed, and
averages their gradients.
"""

import contextlib
import copy
import tempfile
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from lora_kernels import apply_lora, lora_parameters

STEPS = 3


class Block(nn.Module):
    def __init__(self, checkpointed):
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
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
    return torch.randn(12, 5, 16, generator=torch.Generator().manual_seed(4), dtype=dtype)


class Part(NamedTuple):
    """Which part of each batch a process computes."""

    index: int
    count: int


def by_rank():
    return Part(dist.get_rank(), dist.get_world_size())


def loss_of(model, x, step, part):
    torch.manual_seed(100 * step + part.index)
    return model(x.chunk(part.count)[part.index]).float().square().mean()


def optimizer_of(model):
    return torch.optim.AdamW(lora_parameters(model), lr=1e-2)


def train(model, steps=range(STEPS), dtype=torch.float64, optimizer=None, part=None):
    """This process's losses."""
    optimizer, part = optimizer or optimizer_of(model), part or by_rank()
    losses = []
    for step in steps:
        loss = loss_of(model, batch(dtype), step, part)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def reference(
    model,
    compute_dtype=None,
    dtype=torch.float64,
    steps=range(STEPS),
    optimizer=None,
    part=None,
):
    """`train` in one process; products in `compute_dtype`, as mixed precision has them."""
    optimizer, part, losses = optimizer or optimizer_of(model), part or by_rank(), []
    for step in steps:
        gradients = [0.0 for _ in lora_parameters(model)]
        for index in range(part.count):
            copied = copy.deepcopy(model).to(compute_dtype) if compute_dtype else model
            x = batch(dtype).to(compute_dtype or dtype)
            loss = loss_of(copied, x, step, Part(index, part.count))
            if index == part.index:
                losses.append(loss.item())
            own = torch.autograd.grad(loss, list(lora_parameters(copied)))
            gradients = [
                total + g.to(p.dtype) / part.count
                for total, g, p in zip(gradients, own, lora_parameters(model), strict=True)
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


def require_as_reference(
    parallel, single, rtol=1e-10, dtype=torch.float64, compute_dtype=None, part=None
):
    losses = train(parallel, dtype=dtype, part=part)
    expected = reference(single, compute_dtype, dtype, part=part)
    assert losses[0] != losses[-1]
    for one, two in zip(losses, expected, strict=True):
        assert abs(one - two) <= rtol * two, (losses, expected)
    inner = parallel.module if isinstance(parallel, DistributedDataParallel) else parallel
    require_close(inner, single, rtol)


def training_state(model, optimizer):
    trainable = StateDictOptions(ignore_frozen_params=True)
    return {
        "model": get_model_state_dict(model, options=trainable),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }


def set_training_state(model, optimizer, state):
    set_model_state_dict(model, state["model"], options=StateDictOptions(strict=False))
    set_optimizer_state_dict(model, optimizer, state["optimizer"])


@contextlib.contextmanager
def shared_folder():
    """One temporary folder for all ranks."""
    names = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(names)
    yield names[0]
    dist.barrier()


def require_equal_draws(model, single):
    """Ranks with different seeds draw adapters of which all copies agree, as one process does."""
    for one, seed in ((model, 7 * dist.get_rank()), (single, 0)):
        torch.manual_seed(seed)
        for name in ("0.up", "0.down", "1.up", "1.down"):
            one.get_submodule(name).reset_lora_parameters()
    for one, two in zip(model.parameters(), single.parameters(), strict=True):
        assert torch.equal(whole(one), two)
