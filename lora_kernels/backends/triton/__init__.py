"""The op in Triton kernels: the functions of `lora_kernels.branch`, in fp32, fp16 and bf16 on CUDA.

With TRITON_INTERPRET=1, set before triton is imported, they run on CPU tensors. Which of the plans
of `backends/plans.py` serves a call is decided per call; `lora_add` has no GEMM and so only one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from lora_kernels.backends import plans, reference
from lora_kernels.backends.native import decode
from lora_kernels.backends.scaling import split
from lora_kernels.backends.triton import dropout, tiles
from lora_kernels.backends.triton.dual import dual
from lora_kernels.backends.triton.flag import flag
from lora_kernels.backends.triton.gemm import gemm
from lora_kernels.backends.triton.gradients import ds_db, tall
from lora_kernels.backends.triton.grouped import dx_da
from lora_kernels.backends.triton.launch import INTERPRETED, target
from lora_kernels.backends.triton.low_rank import expand, shrink
from lora_kernels.branch import Base, Branch, Dense, Need

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def refusal(rows: Tensor) -> str | None:
    """Why the kernels cannot serve a call with such rows, x or dy."""
    if rows.dtype not in _DTYPES:
        return f"its kernels compute in fp32, fp16 and bf16, got {rows.dtype}"
    if INTERPRETED and rows.dtype == torch.bfloat16:
        return (
            "Triton's interpreter computes bf16 products wrongly; use fp32 or fp16 with"
            " TRITON_INTERPRET=1"
        )
    return None


def leaves(base: Base, rows: Tensor, branch: Branch) -> str | None:
    """Why ATen's calls are the better ones for a call with these rows, x or dy."""
    return None if rows.shape[0] else "no rows"


def _on_device(function: Callable) -> Callable:
    """Makes the device of the second argument, x or dy, current: Triton launches on that one."""

    @functools.wraps(function)
    def run(base, rows, *args):
        if rows.is_cuda and rows.device.index != torch.cuda.current_device():
            with torch.cuda.device(rows.device):
                return function(base, rows, *args)
        return function(base, rows, *args)

    return run


def _choice(op: str, rows: Tensor, base: Dense, branch: Branch) -> plans.Choice:
    (N, K), dtype = base.weight.shape, str(rows.dtype).removeprefix("torch.")
    M, r = rows.shape[0], branch.lora_a.shape[0]
    aligned = tiles.vectorises(rows) and tiles.vectorises(base.weight)
    few = op == "forward" and decode.MAX_ROWS >= M
    readable = few and not decode.unreadable(rows, base.weight, branch.lora_a)
    call = plans.Call(op, dtype, M, N, K, r, branch.dropout_p > 0, aligned, readable)
    return plans.choose(call, rows.device)


def _pad(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """The rank-sized matrix with zeros around it up to [rows, columns]; itself if it needs none."""
    if matrix.shape == (rows, columns):
        return matrix
    return torch.nn.functional.pad(
        matrix, (0, columns - matrix.shape[1], 0, rows - matrix.shape[0])
    )


def _adapters(x: Tensor, branch: Branch) -> tuple[Tensor, Tensor]:
    """Both adapters in x's dtype and of a rank that suits the kernels, in rank-sized copies."""
    lora_a, lora_b = branch.lora_a, branch.lora_b
    rank = tiles.padded_rank(lora_a.shape[0])
    a = _pad(lora_a.to(x.dtype), rank, lora_a.shape[1])
    return a, _pad(lora_b.to(x.dtype), lora_b.shape[0], rank)


@_on_device
def forward(base: Base, x: Tensor, branch: Branch, save_s: bool) -> tuple[Tensor, Tensor | None]:
    """(y, s)."""
    if isinstance(base, Dense):
        plan, tile = _choice("forward", x, base, branch)
        if plan == "aten":
            return reference.forward(base, x, branch, save_s)
        base = Dense(base.weight.to(x.dtype), base.bias)  # a copy under autocast alone
        y, s = _linear(base, x, branch, save_s, plan, tile)
    else:
        y = torch.empty_like(base.out, memory_format=torch.contiguous_format)
        s = _add_branch(base.out, x, branch, y)
    return y, s[:, : branch.lora_a.shape[0]].contiguous() if save_s else None


def _linear(
    base: Dense, x: Tensor, branch: Branch, save_s: bool, plan: str, tile: plans.Tiles
) -> tuple[Tensor, Tensor]:
    """(y, s), s of the padded rank or of none where a kernel did not save it."""
    weight, bias = base
    drop = dropout.of(branch.dropout_p, branch.seed)
    scale = split(branch.scaling, x.dtype)
    if plan == "decode_cuda":
        shape = x.shape[0], weight.shape[0], branch.lora_a.shape[0]
        fields = tile.get("decode_cuda")
        config = tiles.replaced(tiles.decode_cuda(target(x.device), *shape), fields)
        return decode.decode(x, weight, branch.lora_a, branch.lora_b, bias, scale, save_s, *config)
    a, b = _adapters(x, branch)
    if plan in ("decode", "dual"):
        return dual(x, weight, a, b, bias, scale, save_s, drop, tile.get("dual"))
    if plan == "flag":
        return flag(x, weight, a, b, bias, scale, tile.get("flag"))
    held = [] if tile.get("gemm", {}).get("pdl") else None
    s = shrink(x, a, scale[0], drop, tile.get("shrink"), held)
    if plan == "cublas":
        y = torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
        expand(y, s, b.t(), y, None, tile.get("expand"), scale[1])
    else:
        y = gemm(x, weight.t(), s, b.t(), bias, None, tile.get("gemm"), scale[1])
    return y, s


@_on_device
def add_(base_out: Tensor, x: Tensor, branch: Branch) -> None:
    """Adds the low-rank branch to base_out in place."""
    _add_branch(base_out, x, branch, base_out)


def _add_branch(base_out: Tensor, x: Tensor, branch: Branch, out: Tensor) -> Tensor:
    """out = base_out + the branch; returns s."""
    a, b = _adapters(x, branch)
    low, high = split(branch.scaling, x.dtype)
    s = shrink(x, a, low, dropout.of(branch.dropout_p, branch.seed))
    expand(base_out, s, b.t(), out, high=high)
    return s


@_on_device
def backward(
    base: Base, dy: Tensor, x: Tensor, s: Tensor, branch: Branch, need: Need
) -> reference.Gradients:
    """(dx, dweight, dA, dB), None where not needed; without a weight dx is the branch's alone."""
    drop = dropout.of(branch.dropout_p, branch.seed)
    if not isinstance(base, Dense):

        def of_branch(ds: Tensor, a: Tensor) -> tuple[Tensor, None]:
            dx = dy.new_empty(dy.shape[0], a.shape[1])
            expand(None, ds, a, dx, drop)
            return dx, None

        dx, d_a, d_b = _backward(dy, x, s, branch, need, of_branch, {})
        return dx, None, d_a, d_b
    plan, tile = _choice("backward", dy, base, branch)
    if plan == "aten":
        return reference.backward(base, dy, x, s, branch, need)
    weight = base.weight

    def product(ds: Tensor, a: Tensor) -> tuple[Tensor, Tensor | None]:
        w = weight.to(dy.dtype)
        if plan == "grouped" and need.a:
            fields = tile.get("dx_da"), tile.get("da")
            return dx_da(dy, w, ds, a, x, branch.lora_a.dtype, drop, *fields)
        if plan != "cublas":
            return gemm(dy, w, ds, a, None, drop, tile.get("dx")), None
        dx = torch.mm(dy, w)
        expand(dx, ds, a, dx, drop, tile.get("expand_dx"))
        return dx, None

    dweight = torch.mm(dy.t(), x).to(weight.dtype) if need.weight else None
    dx, d_a, d_b = _backward(dy, x, s, branch, need, product, tile)
    return dx, dweight, d_a, d_b


def _backward(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    branch: Branch,
    need: Need,
    product: Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]],
    tile: plans.Tiles,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dA, dB). `product` makes dx of ds and A, and may make dA with it."""
    r = branch.lora_a.shape[0]
    a, b = _adapters(dy, branch)
    _, high = split(branch.scaling, dy.dtype)
    need_ds = need.x or need.a
    dx = d_a = d_b = None
    if need.b:
        s = _pad(s, dy.shape[0], a.shape[0])
    if need_ds and need.b and tiles.fuses_ds_db(b.dtype, b.shape[1]):
        fields = tile.get("ds_db")
        ds, d_b = ds_db(dy, b, s, branch.scaling, high, branch.lora_b.dtype, fields)
    else:
        if need_ds:
            ds = shrink(dy, b.t(), branch.scaling, None, tile.get("ds"))
        if need.b:
            d_b = tall(s, dy, branch.lora_b.dtype, True, None, tile.get("db"), high)
    if need.x:
        dx, d_a = product(ds, a)
    if d_a is None and need.a:
        d_a = tall(ds, x, branch.lora_a.dtype, False, dropout.of(*branch[3:]), tile.get("da"))
    return (
        dx,
        None if d_a is None else d_a[:r],
        None if d_b is None else d_b[:, :r].contiguous(),
    )
