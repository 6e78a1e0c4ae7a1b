"""Quantised weights decoded tile by tile: by an elementwise kernel, on any GPU, with the bits of
`weights`, whose ATen calls read and write what they make many times over; and within the product of
a few rows, which reads the codes once."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.backends.triton.blocks import (
    Matrix,
    keep_tile,
    load_seed,
    load_tile,
    load_tile_hinted,
    loop_steps,
    multiply_add,
    store_tile,
)
from lora_kernels.backends.triton.dropout import WITHOUT, Dropout, words
from lora_kernels.backends.triton.launch import INTERPRETED, fp32_precision, launch
from lora_kernels.backends.triton.tiles import cdiv, dual_rank
from lora_kernels.weights import Float8, FourBit, Int8, QuantizedWeight, quantize

_ROWS, _COLS = 8, 256
_FOUR, _INT8, _FP8 = 4, 8, 9
_FEW, _BN, _STAGES = 64, 32, 3


class Coded(NamedTuple):
    """A weight [N,K] as `lora_kernels.weights` has it, by FORMAT: 4 bits in blocks of BLOCK, their
    scales in blocks of OUTER; 8 for int8; 9 for e4m3, whose BLOCK is the side of a square one, 0
    for a scale of each row, -1 for one scale."""

    codes: Any
    scale: Any
    zero: Any
    table: Any
    outer_table: Any
    outer_scale: Any
    offset: Any
    factor: Any
    K: Any
    FORMAT: tl.constexpr
    BLOCK: tl.constexpr
    OUTER: tl.constexpr


@triton.jit
def decoded_e4m3(codes):
    """The numbers that bytes are in e4m3, without the type, which older cards do not have."""
    bits = codes.to(tl.int32)
    size = bits & 0x7F
    # Exponents are biased by 7 and by 127; below the first there are multiples of 2^-9.
    normal = ((size << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    value = tl.where(size < 8, size.to(tl.float32) * 0.001953125, normal)
    value = tl.where(size == 0x7F, float("nan"), value)
    return tl.where(bits > 0x7F, -value, value)


@triton.jit
def coded_tile(w, rows, first, N, last, COLS: tl.constexpr):
    """Rows x [first, first + COLS) of a weight in fp32, zero from row N and column `last` on; first
    and K are even where codes have 4 bits."""
    row = rows.to(tl.int64)[:, None]
    there = (rows < N)[:, None]
    if w.FORMAT == 4:
        pair = first + 2 * tl.arange(0, COLS // 2)
        inside = there & (pair < last)[None, :]
        place = row * w.K + pair[None, :]
        both = tl.load(w.codes + place // 2, mask=inside, other=0, eviction_policy="evict_first")
        block = place // w.BLOCK
        if w.outer_table is None:
            factors = tl.load(w.scale + block, mask=inside, other=0.0).to(tl.float32)
        else:
            index = tl.load(w.scale + block, mask=inside, other=0).to(tl.int32)
            factors = tl.load(w.outer_table + index) * tl.load(
                w.outer_scale + block // w.OUTER, mask=inside, other=0.0
            )
            factors += tl.load(w.offset)
            factors = tl.where(inside, factors, 0.0)
        high = tl.load(w.table + (both >> 4).to(tl.int32))
        low = tl.load(w.table + (both & 15).to(tl.int32))
        if w.zero is not None:
            zeros = tl.load(w.zero + block, mask=inside, other=0.0).to(tl.float32)
            high -= zeros
            low -= zeros
        return tl.reshape(tl.join(high * factors, low * factors), (rows.shape[0], COLS))
    else:
        col = first + tl.arange(0, COLS)
        inside = there & (col < last)[None, :]
        pointers = w.codes + row * w.K + col[None, :]
        codes = tl.load(pointers, mask=inside, other=0, eviction_policy="evict_first")
        if w.FORMAT == 8:
            values = codes.to(tl.float32)
            if w.zero is not None:
                values -= tl.load(w.zero + row, mask=there, other=0.0).to(tl.float32)
            values = values * tl.load(w.scale + row, mask=there, other=0.0).to(tl.float32)
            values = tl.where(inside, values * w.factor, 0.0)
        else:
            if w.BLOCK > 0:
                at = row // w.BLOCK * tl.cdiv(w.K, w.BLOCK) + (col // w.BLOCK)[None, :]
                factors = tl.load(w.scale + at, mask=inside, other=0.0).to(tl.float32)
            elif w.BLOCK == 0:
                factors = tl.load(w.scale + row, mask=there, other=0.0).to(tl.float32)
            else:
                factors = tl.load(w.scale).to(tl.float32)
            values = decoded_e4m3(codes) * factors
        return values


@triton.jit(do_not_specialize=["first_row", "first_col", "rows", "cols"])
def decode_kernel(
    out, codes, scale, zero, table, outer_table, outer_scale, offset, factor, K,
    first_row, first_col, rows, cols, stride_or,
    FORMAT: tl.constexpr, BLOCK: tl.constexpr, OUTER: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """out [rows, cols] = the weight from (first_row, first_col) on."""
    strips = tl.cdiv(cols, COLS)
    pid = tl.program_id(0)
    row = (pid // strips) * ROWS + tl.arange(0, ROWS)
    col = (pid % strips) * COLS
    values = coded_tile(
        Coded(
            codes, scale, zero, table, outer_table, outer_scale, offset, factor, K,
            FORMAT, BLOCK, OUTER,
        ),
        first_row + row, first_col + col, first_row + rows, first_col + cols, COLS,
    )  # fmt: skip
    store_tile(Matrix(out, stride_or, 1, rows, cols), values, row, col + tl.arange(0, COLS))


@triton.jit(do_not_specialize=["M", "threshold"])
def coded_kernel(
    x, y, s, a, b, bias, seed_ptr, M, N, r, scale_low, threshold,
    stride_xm, stride_xk, stride_ar, stride_ak, stride_bn, stride_br,
    codes, scale, zero, table, outer_table, outer_scale, offset, factor, K,
    FORMAT: tl.constexpr, BLOCK: tl.constexpr, OUTER: tl.constexpr,
    R: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, DROP: tl.constexpr,
    HIGH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (column tile, row tile): as `dual_kernel`, of a weight that is decoded as it is
    multiplied, rounded to x's dtype. s is stored, if it is not None, by the programs of column
    0."""
    col, row = tl.program_id(0) * BN, tl.program_id(1) * BM
    rows, cols, rank = row + tl.arange(0, BM), col + tl.arange(0, BN), tl.arange(0, R)
    if DROP:
        seed = load_seed(seed_ptr, DROP)
    acc = tl.zeros((BN, BM), tl.float32)
    low = tl.zeros((R, BM), tl.float32)
    for i in range(loop_steps(K, BK)):
        first = i * BK
        ks = first + tl.arange(0, BK)
        w_tile = coded_tile(
            Coded(
                codes, scale, zero, table, outer_table, outer_scale, offset, factor, K,
                FORMAT, BLOCK, OUTER,
            ),
            cols, first, N, K, BK,
        ).to(x.dtype.element_ty)  # fmt: skip
        x_tile = load_tile_hinted(Matrix(x, stride_xm, stride_xk, M, K), rows, ks, "evict_last", "")
        a_tile = load_tile_hinted(Matrix(a, stride_ar, stride_ak, r, K), rank, ks, "evict_last", "")
        acc = multiply_add(w_tile, x_tile.T, acc, PRECISION)
        if R >= 64 and not DROP:  # as `tiles.dual_loads_twice` has it, with another hint
            x_tile = load_tile_hinted(Matrix(x, stride_xm, stride_xk, M, K), rows, ks, "", "")
        if DROP:
            x_tile = tl.where(keep_tile(seed, rows, first, threshold, BK), x_tile, 0.0)
            x_tile = x_tile.to(x.dtype.element_ty)
        low = multiply_add(a_tile, x_tile.T, low, PRECISION)
    low *= scale_low
    if s is not None and col == 0:
        store_tile(Matrix(s, 1, r, r, M), low, rank, rows)
    b_tile = load_tile(Matrix(b, stride_bn, stride_br, N, r), cols, rank)
    if HIGH != 1.0:
        acc *= 1.0 / HIGH
    acc = tl.dot(b_tile, low.to(x.dtype.element_ty), acc, input_precision=PRECISION)
    if HIGH != 1.0:
        acc *= HIGH
    if bias is not None:
        values = tl.load(bias + cols, mask=cols < N, other=0.0)
        acc += values.to(x.dtype.element_ty).to(tl.float32)[:, None]
    store_tile(Matrix(y, 1, N, N, M), acc, cols, rows)


def decodes(weight: QuantizedWeight, columns: slice, dtype: torch.dtype) -> bool:
    """Whether the kernels make these columns of a weight."""
    if dtype == torch.float64:
        return False
    if isinstance(weight, FourBit):
        return not any(int(place) % 2 for place in (weight.shape[1], columns.start, columns.stop))
    return isinstance(weight, (Int8, Float8))


def _given(weight: QuantizedWeight) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A weight that is decoded, as a kernel takes it: from `codes` to K, and what is constant."""
    K = weight.shape[1]
    if isinstance(weight, FourBit):
        tensors = (
            weight.codes, weight.scale, weight.zero, weight.table, weight.outer_table,
            weight.outer_scale, weight.offset,
        )  # fmt: skip
        sizes = {"FORMAT": _FOUR, "BLOCK": weight.block, "OUTER": weight.outer_block}
        return (*tensors, 1.0, K), sizes
    nothing = (None,) * 4
    if isinstance(weight, Int8):
        tensors8 = (weight.codes, weight.scale, weight.zero, *nothing, weight.factor, K)
        return tensors8, {"FORMAT": _INT8, "BLOCK": 0, "OUTER": 1}
    assert isinstance(weight, Float8)
    block = weight.block or (-1 if weight.scale.numel() == 1 else 0)
    codes = weight.codes.view(torch.uint8)
    sizes = {"FORMAT": _FP8, "BLOCK": block, "OUTER": 1}
    return (codes, weight.scale, None, *nothing, 1.0, K), sizes


def decode(weight: QuantizedWeight, rows: slice, columns: slice, out: Tensor) -> Tensor:
    """Fills `out`, whose rows are contiguous, with a part of the weight, as its own `decode`."""
    (count, width), (given, sizes) = out.shape, _given(weight)
    launch(
        decode_kernel, (cdiv(count, _ROWS) * cdiv(width, _COLS),), out, *given,
        rows.start, columns.start, count, width, out.stride(0),
        **sizes, ROWS=_ROWS, COLS=_COLS, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def multiply(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None,
    pair: tuple[Tensor, Tensor],
    scale: tuple[float, float],
    save_s: bool,
    dropout: Dropout | None = None,
) -> tuple[Tensor, Tensor]:
    """(y, s) of few rows x [M,K], s of size 0 if it is not to be saved; of the pair A [r,K] and B
    [N,r], both in x's dtype; scale as `scaling.split` gives it."""
    (a, b), M, N = pair, x.shape[0], weight.shape[0]
    r = a.shape[0]
    R = dual_rank(r)
    y, s = x.new_empty(M, N), x.new_empty((M, r) if save_s else 0)
    bm = 16 if M <= 16 else 32 if M <= 32 else _FEW
    bk = 32 if x.dtype == torch.float32 or R * bm > 2048 else 64
    seed, threshold, kept_scale = dropout or WITHOUT
    given, sizes = _given(weight)
    launch(
        coded_kernel, (cdiv(N, _BN), cdiv(M, bm)), x, y, s if save_s else None, a, b,
        None if bias is None else bias.contiguous(), seed, M, N, r,
        scale[0] * kept_scale, threshold, *x.stride(), *a.stride(), *b.stride(), *given, **sizes,
        R=R, BM=bm, BN=_BN, BK=bk, DROP=words(dropout),
        HIGH=scale[1], PRECISION=fp32_precision(), num_warps=4, num_stages=_STAGES,
    )  # fmt: skip
    return y, s


def deviation(device: torch.device) -> str | None:
    """What of small weights it decodes otherwise than they do themselves; None if nothing."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(20, 384, generator=generator)
    dense[4, 64:200] *= 2.0**-9  # which e4m3 has below its first exponent
    half = (torch.float16,) if INTERPRETED else (torch.float16, torch.bfloat16)
    dtypes = (torch.float32, *half)  # interpreted, bf16 is cut off in place of rounded
    for kind, block in (("nf4", None), ("int4", None), ("int8", None), ("fp8", None), ("fp8", 32)):
        weight = quantize(dense, kind, block=block).to(device)
        for dtype in dtypes:
            rows, columns = slice(3, 20), slice(64, 384)
            right, mine = (torch.empty(17, 320, dtype=dtype, device=device) for _ in range(2))
            weight.decode(rows, columns, right)
            if not torch.equal(decode(weight, rows, columns, mine), right):
                return f"it decodes {kind} to other numbers in {dtype}"
    return None
