"""The op on CUDA tensors, whoever computes: the functions of `lora_kernels.branch`, each of which
asks which plan (`plans`, one file each) serves the call (`choice`) and runs that.

In Triton's interpreter the plans that are made of Triton's kernels serve CPU tensors too.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from lora_kernels.backends.cuda import background, needs, tables
from lora_kernels.backends.cuda.choice import choose
from lora_kernels.backends.cuda.plan import Call, Plan, Tiles
from lora_kernels.backends.cuda.plans import PLANS
from lora_kernels.backends.native import decode
from lora_kernels.backends.reference import Gradients
from lora_kernels.backends.triton.tiles import vectorises
from lora_kernels.branch import Base, Branch, Dense, Given, Need

_logger = logging.getLogger("lora_kernels")
_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_First = TypeVar("_First")
_Rest = ParamSpec("_Rest")
_Result = TypeVar("_Result")
_OnRows = Callable[Concatenate[_First, Tensor, _Rest], _Result]


def lacks(device: torch.device) -> str | None:
    """Why plans can serve no call on a device. On CUDA tensors each says for itself what it
    lacks."""
    if device.type == "cuda":
        return None
    absent = needs.why_no_triton()
    if absent is None and (device.type != "cpu" or not needs.interpreted()):
        return (
            "Triton kernels run on CUDA tensors, or on CPU tensors with TRITON_INTERPRET=1 set"
            f" before triton is imported; got {device.type} tensors"
        )
    return absent


def default(device: torch.device) -> tuple[bool, str]:
    """Where a table lists the plans that ran on this GPU."""
    if device.type != "cuda":
        return False, ""  # Triton's interpreter is for who forces it
    if not torch.cuda.is_available():
        return False, "no CUDA device here"
    absent = tables.why_none(tables.index_of(device))
    if absent is not None:
        background.begin()
        return False, absent
    absent = needs.why_no_triton()
    return True, "tuned table of this GPU" + (f"; {absent}" if absent else "")


def refusal(rows: Tensor) -> str | None:
    """Why no plan serves a call with such rows, x or dy."""
    if rows.dtype not in _NAMES:
        return f"its kernels compute in fp32, fp16 and bf16, got {rows.dtype}"
    return None


def leaves(base: Base, rows: Tensor, branch: Branch) -> str | None:
    """Why ATen's calls are the better ones for a call with these rows, x or dy."""
    return None if rows.shape[0] else "no rows"


def _on_device(function: _OnRows[_First, _Rest, _Result]) -> _OnRows[_First, _Rest, _Result]:
    """Makes the device of the second argument, x or dy, current: Triton launches on that one."""

    @functools.wraps(function)
    def run(first: _First, rows: Tensor, /, *args: _Rest.args, **kwargs: _Rest.kwargs) -> _Result:
        if rows.is_cuda and rows.device.index != torch.cuda.current_device():
            with torch.cuda.device(rows.device):
                return function(first, rows, *args, **kwargs)
        return function(first, rows, *args, **kwargs)

    return run


def _planned(op: str, base: Base, rows: Tensor, branch: Branch) -> tuple[Plan, Tiles]:
    """The plan of a call with these rows, and its tiles."""
    (r, K), N, M = branch.lora_a.shape, branch.lora_b.shape[0], rows.shape[0]
    aligned, readable = vectorises(rows), False
    if isinstance(base, Dense):
        aligned = aligned and vectorises(base.weight)
        few = op == "forward" and M <= decode.MAX_ROWS
        readable = few and not decode.unreadable(rows, base.weight, branch.lora_a)
    dropout = branch.dropout_p > 0
    call = Call(op, _NAMES[rows.dtype], M, N, K, r, dropout, aligned, readable)
    name, tiles = choose(call, rows.device)
    if _logger.isEnabledFor(logging.INFO):
        _say(rows.device.type, op, call.dtype, dropout, name)
    return PLANS[name], tiles


@functools.cache
def _say(device: str, op: str, dtype: str, dropout: bool, plan: str) -> None:
    kind = f"{device} {op} in {dtype}{' with dropout' * dropout}"
    _logger.info("%s: plan %s (%s)", kind, plan, PLANS[plan].summary)


@_on_device
def forward(base: Base, x: Tensor, branch: Branch, save_s: bool) -> tuple[Tensor, Tensor | None]:
    """(y, s)."""
    if isinstance(base, Dense):
        plan, tiles = _planned("forward", base, x, branch)
        return plan.forward.run(base, x, branch, save_s, tiles)
    assert base.out is not None  # of a forward
    y = torch.empty_like(base.out, memory_format=torch.contiguous_format)
    s = _add(base.out, x, branch, y)
    return y, s[:, : branch.lora_a.shape[0]].contiguous() if save_s else None


@_on_device
def add_(base_out: Tensor, x: Tensor, branch: Branch) -> Tensor:
    """Adds the low-rank branch to base_out in place; returns s."""
    return _add(base_out, x, branch, base_out)


def _add(base_out: Tensor, x: Tensor, branch: Branch, out: Tensor) -> Tensor:
    plan, tiles = _planned("add", Given(base_out), x, branch)
    assert plan.add is not None  # or `choose` had not taken it
    return plan.add.run(base_out, x, branch, out, tiles)


@_on_device
def backward(base: Base, dy: Tensor, x: Tensor, s: Tensor, branch: Branch, need: Need) -> Gradients:
    """(dx, dweight, dA, dB), None where not needed; without a weight dx is the branch's alone."""
    if isinstance(base, Dense):
        plan, tiles = _planned("backward", base, dy, branch)
        return plan.backward.run(base, dy, x, s, branch, need, tiles)
    plan, tiles = _planned("add_backward", base, dy, branch)
    assert plan.add_backward is not None
    return plan.add_backward.run(base, dy, x, s, branch, need, tiles)
