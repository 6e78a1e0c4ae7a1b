"""Quantised weights decoded by one elementwise kernel, on any GPU: no product, no descriptor, and
the bits of `weights`, whose ATen calls read and write what they make many times over."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.backends.triton.launch import INTERPRETED, launch
from lora_kernels.backends.triton.tiles import cdiv
from lora_kernels.weights import Float8, FourBit, Int8, QuantizedWeight, quantize

_ROWS, _COLS = 8, 256
_FOUR, _INT8, _FP8 = 4, 8, 9


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


@triton.jit(do_not_specialize=["first_row", "first_col", "rows", "cols"])
def decode_kernel(
    out, codes, scale, zero, table, outer_table, outer_scale, offset, factor,
    first_row, first_col, rows, cols, K, stride_or,
    FORMAT: tl.constexpr, BLOCK: tl.constexpr, OUTER: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """out [rows, cols] = the weight [., K] from (first_row, first_col) on; first_col and K are even
    where codes have 4 bits."""
    strips = tl.cdiv(cols, COLS)
    pid = tl.program_id(0)
    down = (pid // strips) * ROWS + tl.arange(0, ROWS)
    row = (first_row + down).to(tl.int64)[:, None]
    below = (down < rows)[:, None]
    left = (pid % strips) * COLS
    if FORMAT == 4:
        pair = left + 2 * tl.arange(0, COLS // 2)
        inside = below & (pair < cols)[None, :]
        place = row * K + (first_col + pair)[None, :]
        both = tl.load(codes + place // 2, mask=inside, other=0)
        block = place // BLOCK
        if outer_table is None:
            factors = tl.load(scale + block, mask=inside, other=0.0).to(tl.float32)
        else:
            index = tl.load(scale + block, mask=inside, other=0).to(tl.int32)
            factors = tl.load(outer_table + index) * tl.load(
                outer_scale + block // OUTER, mask=inside, other=0.0
            )
            factors += tl.load(offset)
        high = tl.load(table + (both >> 4).to(tl.int32))
        low = tl.load(table + (both & 15).to(tl.int32))
        if zero is not None:
            zeros = tl.load(zero + block, mask=inside, other=0.0).to(tl.float32)
            high -= zeros
            low -= zeros
        values = tl.reshape(tl.join(high * factors, low * factors), (ROWS, COLS))
    else:
        col = left + tl.arange(0, COLS)
        inside = below & (col < cols)[None, :]
        there = tl.load(codes + row * K + (first_col + col)[None, :], mask=inside, other=0)
        if FORMAT == 8:
            values = there.to(tl.float32)
            if zero is not None:
                values -= tl.load(zero + row, mask=below, other=0.0).to(tl.float32)
            values = values * tl.load(scale + row, mask=below, other=0.0).to(tl.float32)
            values = values * factor
        else:
            # BLOCK is the side of a square one, 0 for rows, -1 for one scale.
            if BLOCK > 0:
                at = row // BLOCK * tl.cdiv(K, BLOCK) + ((first_col + col) // BLOCK)[None, :]
                factors = tl.load(scale + at, mask=inside, other=0.0).to(tl.float32)
            elif BLOCK == 0:
                factors = tl.load(scale + row, mask=below, other=0.0).to(tl.float32)
            else:
                factors = tl.load(scale).to(tl.float32)
            values = decoded_e4m3(there) * factors
    cols_here = left + tl.arange(0, COLS)
    pointers = out + down.to(tl.int64)[:, None] * stride_or + cols_here[None, :]
    tl.store(pointers, values.to(out.dtype.element_ty), mask=below & (cols_here < cols)[None, :])


def decodes(weight: QuantizedWeight, columns: slice, dtype: torch.dtype) -> bool:
    """Whether the kernel makes these columns of a weight."""
    if dtype == torch.float64:
        return False
    if isinstance(weight, FourBit):
        return not any(int(place) % 2 for place in (weight.shape[1], columns.start, columns.stop))
    return isinstance(weight, (Int8, Float8))


def decode(weight: QuantizedWeight, rows: slice, columns: slice, out: Tensor) -> Tensor:
    """Fills `out`, whose rows are contiguous, with a part of the weight, as its own `decode`."""
    (_, K), (count, width) = weight.shape, out.shape
    given: tuple[Tensor | float | None, ...]
    if isinstance(weight, FourBit):
        form, block, outer = _FOUR, weight.block, weight.outer_block
        given = (
            weight.codes, weight.scale, weight.zero, weight.table, weight.outer_table,
            weight.outer_scale, weight.offset, 1.0,
        )  # fmt: skip
    elif isinstance(weight, Int8):
        form, block, outer = _INT8, 0, 1
        given = (weight.codes, weight.scale, weight.zero, None, None, None, None, weight.factor)
    else:
        assert isinstance(weight, Float8)
        whole = -1 if weight.scale.numel() == 1 else 0
        form, block, outer = _FP8, weight.block or whole, 1
        codes = weight.codes.view(torch.uint8)
        given = (codes, weight.scale, None, None, None, None, None, 1.0)
    launch(
        decode_kernel, (cdiv(count, _ROWS) * cdiv(width, _COLS),), out, *given,
        rows.start, columns.start, count, width, K, out.stride(0),
        FORMAT=form, BLOCK=block, OUTER=outer, ROWS=_ROWS, COLS=_COLS,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out


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
