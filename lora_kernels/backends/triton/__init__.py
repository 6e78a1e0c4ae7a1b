"""The op in Triton kernels: the functions of `backends.reference`, for fp32, fp16 and bf16 on CUDA.

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

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in _DTYPES:
        raise RuntimeError(
            f"lora_kernels: the triton backend serves fp32, fp16 and bf16, got {dtype}"
        )
    if INTERPRETED and dtype == torch.bfloat16:
        raise RuntimeError(
            "lora_kernels: Triton's interpreter computes bf16 products wrongly; use fp32 or fp16"
            " with TRITON_INTERPRET=1"
        )


def _on_device(function: Callable) -> Callable:
    """Checks the dtype and makes the first tensor's device current: Triton launches on that one."""

    @functools.wraps(function)
    def run(first: Tensor, *args):
        _check_dtype(first.dtype)
        if first.is_cuda and first.device.index != torch.cuda.current_device():
            with torch.cuda.device(first.device):
                return function(first, *args)
        return function(first, *args)

    return run


def _choice(
    op: str, rows: Tensor, weight: Tensor, lora_a: Tensor, dropout_p: float
) -> plans.Choice:
    (N, K), dtype = weight.shape, str(rows.dtype).removeprefix("torch.")
    M, r = rows.shape[0], lora_a.shape[0]
    aligned = tiles.vectorises(rows) and tiles.vectorises(weight)
    few = op == "forward" and decode.MAX_ROWS >= M
    readable = few and not decode.unreadable(rows, weight, lora_a)
    call = plans.Call(op, dtype, M, N, K, r, dropout_p > 0, aligned, readable)
    return plans.choose(call, rows.device)


def _pad(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """The rank-sized matrix with zeros around it up to [rows, columns]; itself if it needs none."""
    if matrix.shape == (rows, columns):
        return matrix
    return torch.nn.functional.pad(
        matrix, (0, columns - matrix.shape[1], 0, rows - matrix.shape[0])
    )


def _adapters(x: Tensor, lora_a: Tensor, lora_b: Tensor) -> tuple[Tensor, Tensor]:
    """Both adapters in x's dtype and of a rank that suits the kernels, in rank-sized copies."""
    rank = tiles.padded_rank(lora_a.shape[0])
    a = _pad(lora_a.to(x.dtype), rank, lora_a.shape[1])
    return a, _pad(lora_b.to(x.dtype), lora_b.shape[0], rank)


def _saved(s: Tensor, r: int, save_s: bool) -> tuple[Tensor, Tensor]:
    """(s, mask) as the op returns them: backward regenerates the mask from the seed."""
    return s[:, :r].contiguous() if save_s else _none(s), _none(s)


def _none(like: Tensor) -> Tensor:
    return like.new_empty(0)


@_on_device
def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    save_s: bool,
    save_mask: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, s, mask), the mask of size 0."""
    M, N, r = x.shape[0], weight.shape[0], lora_a.shape[0]
    if M == 0:
        return x.new_empty(0, N), *_saved(x.new_empty(0, r), r, save_s)
    plan, tile = _choice("forward", x, weight, lora_a, dropout_p)
    if plan == "aten":
        return reference.lora_linear(
            x, weight, lora_a, lora_b, bias, scaling, dropout_p, seed, save_s, save_mask
        )
    drop = dropout.of(dropout_p, seed)
    scale = split(scaling, x.dtype)
    weight = weight.to(x.dtype)  # a copy under autocast alone
    if plan == "decode_cuda":
        fields = tile.get("decode_cuda")
        config = tiles.replaced(tiles.decode_cuda(target(x.device), M, N, r), fields)
        y, s = decode.decode(x, weight, lora_a, lora_b, bias, scale, save_s, *config)
        return y, s, _none(x)
    a, b = _adapters(x, lora_a, lora_b)
    if plan in ("decode", "dual"):
        y, s = dual(x, weight, a, b, bias, scale, save_s, drop, tile.get("dual"))
        return y, *_saved(s, r, save_s)
    if plan == "flag":
        y, s = flag(x, weight, a, b, bias, scale, tile.get("flag"))
        return y, *_saved(s, r, save_s)
    held = [] if tile.get("gemm", {}).get("pdl") else None
    s = shrink(x, a, scale[0], drop, tile.get("shrink"), held)
    if plan == "cublas":
        y = torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
        expand(y, s, b.t(), y, None, tile.get("expand"), scale[1])
    else:
        y = gemm(x, weight.t(), s, b.t(), bias, None, tile.get("gemm"), scale[1])
    return y, *_saved(s, r, save_s)


@_on_device
def lora_add(
    base_out: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    save_s: bool,
    save_mask: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, s, mask) as `lora_linear`, on top of a base output [M,N] computed elsewhere."""
    y = torch.empty_like(base_out, memory_format=torch.contiguous_format)
    s = _add_branch(base_out, x, lora_a, lora_b, scaling, dropout_p, seed, y)
    return y, *_saved(s, lora_a.shape[0], save_s)


@_on_device
def lora_add_(
    base_out: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
) -> None:
    """Adds the low-rank branch to base_out in place."""
    _add_branch(base_out, x, lora_a, lora_b, scaling, dropout_p, seed, base_out)


def _add_branch(base_out, x, lora_a, lora_b, scaling, dropout_p, seed, out) -> Tensor:
    """out = base_out + the branch; returns s."""
    if x.shape[0] == 0:
        return x.new_empty(0, lora_a.shape[0])
    a, b = _adapters(x, lora_a, lora_b)
    low, high = split(scaling, x.dtype)
    s = shrink(x, a, low, dropout.of(dropout_p, seed))
    expand(base_out, s, b.t(), out, high=high)
    return s


@_on_device
def lora_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    s: Tensor,
    mask: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    need_x: bool,
    need_weight: bool,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dweight, dA, dB), each of size 0 where not needed; x is read for dweight and dA only."""
    plan, tile = "aten", {}
    if dy.shape[0]:
        plan, tile = _choice("backward", dy, weight, lora_a, dropout_p)
    if plan == "aten":
        return reference.lora_linear_backward(
            dy, x, weight, lora_a, lora_b, s, mask, scaling, dropout_p, seed,
            need_x, need_weight, need_a, need_b,
        )  # fmt: skip
    drop = dropout.of(dropout_p, seed)

    def product(ds: Tensor, a: Tensor) -> tuple[Tensor, Tensor | None]:
        w = weight.to(dy.dtype)
        if plan == "grouped" and need_a:
            fields = tile.get("dx_da"), tile.get("da")
            return dx_da(dy, w, ds, a, x, lora_a.dtype, drop, *fields)
        if plan != "cublas":
            return gemm(dy, w, ds, a, None, drop, tile.get("dx")), None
        dx = torch.mm(dy, w)
        expand(dx, ds, a, dx, drop, tile.get("expand_dx"))
        return dx, None

    dweight = torch.mm(dy.t(), x).to(weight.dtype) if need_weight else _none(weight)
    dx, d_a, d_b = _backward(
        dy, x, lora_a, lora_b, s, scaling, drop, product if need_x else None, need_a, need_b, tile
    )
    return dx, dweight, d_a, d_b


@_on_device
def lora_add_backward(
    dy: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    s: Tensor,
    mask: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    need_x: bool,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dA, dB) of the branch alone, each of size 0 where not needed; x is read for dA only."""
    if dy.shape[0] == 0:
        return reference.lora_add_backward(
            dy, x, lora_a, lora_b, s, mask, scaling, dropout_p, seed, need_x, need_a, need_b
        )
    drop = dropout.of(dropout_p, seed)

    def product(ds: Tensor, a: Tensor) -> tuple[Tensor, None]:
        dx = dy.new_empty(dy.shape[0], a.shape[1])
        expand(None, ds, a, dx, drop)
        return dx, None

    return _backward(
        dy, x, lora_a, lora_b, s, scaling, drop, product if need_x else None, need_a, need_b, {}
    )


def _backward(
    dy: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    s: Tensor,
    scaling: float,
    drop: dropout.Dropout | None,
    product: Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]] | None,
    need_a: bool,
    need_b: bool,
    tile: plans.Tiles,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dA, dB). `product` makes dx of ds and A, and may make dA with it."""
    r = lora_a.shape[0]
    a, b = _adapters(dy, lora_a, lora_b)
    _, high = split(scaling, dy.dtype)
    need_ds = product is not None or need_a
    dx, d_a, d_b = _none(dy), None, _none(lora_b)
    if need_b:
        s = _pad(s, dy.shape[0], a.shape[0])
    if need_ds and need_b and tiles.fuses_ds_db(b.dtype, b.shape[1]):
        ds, d_b = ds_db(dy, b, s, scaling, high, lora_b.dtype, tile.get("ds_db"))
    else:
        if need_ds:
            ds = shrink(dy, b.t(), scaling, None, tile.get("ds"))
        if need_b:
            d_b = tall(s, dy, lora_b.dtype, True, None, tile.get("db"), high)
    if product is not None:
        dx, d_a = product(ds, a)
    if d_a is None:
        fields = tile.get("da")
        d_a = tall(ds, x, lora_a.dtype, False, drop, fields) if need_a else _none(lora_a)
    return dx, d_a[:r], d_b[:, :r].contiguous() if need_b else d_b
