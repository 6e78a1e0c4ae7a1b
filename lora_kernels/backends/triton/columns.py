"""The columns of a matrix by a factor each, forward and backward, by one elementwise kernel each,
on any GPU: no product, no descriptor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.backends.triton.blocks import Matrix, tile_pointers
from lora_kernels.backends.triton.launch import launch
from lora_kernels.backends.triton.tiles import cdiv

_ROWS, _COLS = 16, 256
# Tiles of rows that a program of the backward takes one after the other: as many sums are left to
# ATen as there are programs in a column.
_TILES = 16


@triton.jit
def scale_kernel(
    z, factor, added, y, rows, cols, stride_zr, stride_zc, stride_ar, stride_ac,
    ADD: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """y = z * factor + added; y [rows, cols] contiguous, z by strides, factor [cols] contiguous,
    added likewise by strides, of which that of the rows is 0 for a vector."""
    strips = tl.cdiv(cols, COLS)
    pid = tl.program_id(0)
    row = (pid // strips) * ROWS + tl.arange(0, ROWS)
    col = (pid % strips) * COLS + tl.arange(0, COLS)
    inside = (row[:, None] < rows) & (col[None, :] < cols)
    scale = tl.load(factor + col, mask=col < cols, other=0.0)
    source = tile_pointers(Matrix(z, stride_zr, stride_zc, rows, cols), row, col)
    total = tl.load(source, mask=inside, other=0.0).to(scale.dtype) * scale[None, :]
    if ADD:
        other = tile_pointers(Matrix(added, stride_ar, stride_ac, rows, cols), row, col)
        total += tl.load(other, mask=inside, other=0.0).to(scale.dtype)
    target = tile_pointers(Matrix(y, cols, 1, rows, cols), row, col)
    tl.store(target, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def scale_backward_kernel(
    dy, z, factor, dz, sums, rows, cols, stride_yr, stride_yc, stride_zr, stride_zc,
    NEED_Z: tl.constexpr, SUM: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """dz = dy * factor, contiguous, and row p of sums [programs in a column, cols] = the sum of
    dy * z over the rows of program p, in this order."""
    strips = tl.cdiv(cols, COLS)
    pid = tl.program_id(0)
    part = pid // strips
    col = (pid % strips) * COLS + tl.arange(0, COLS)
    scale = tl.load(factor + col, mask=col < cols, other=0.0)
    total = tl.zeros((COLS,), dtype=scale.dtype)
    for i in range(TILES):
        row = (part * TILES + i) * ROWS + tl.arange(0, ROWS)
        inside = (row[:, None] < rows) & (col[None, :] < cols)
        source = tile_pointers(Matrix(dy, stride_yr, stride_yc, rows, cols), row, col)
        gradient = tl.load(source, mask=inside, other=0.0).to(scale.dtype)
        if SUM:
            other = tile_pointers(Matrix(z, stride_zr, stride_zc, rows, cols), row, col)
            total += tl.sum(gradient * tl.load(other, mask=inside, other=0.0).to(scale.dtype), 0)
        if NEED_Z:
            target = tile_pointers(Matrix(dz, cols, 1, rows, cols), row, col)
            tl.store(target, (gradient * scale[None, :]).to(dz.dtype.element_ty), mask=inside)
    if SUM:
        # 64-bit: as many sums as elements of a large matrix lie before the last.
        tl.store(sums + part.to(tl.int64) * cols + col, total, mask=col < cols)


def forward(z: Tensor, factor: Tensor, added: Tensor | None) -> Tensor:
    """z * factor + added of z [..., N], rounded once; added is [N] or as z."""
    y = torch.empty_like(z, memory_format=torch.contiguous_format)
    rows = z.reshape(-1, z.shape[-1])
    M, N = rows.shape
    if added is None:
        strides = (0, 0)
    elif added.dim() == 1:
        strides = (0, added.stride(0))
    else:
        added = added.reshape(M, N)
        strides = (added.stride(0), added.stride(1))
    launch(
        scale_kernel, (cdiv(M, _ROWS) * cdiv(N, _COLS),), rows, factor.contiguous(), added, y,
        M, N, *rows.stride(), *strides,
        ADD=added is not None, ROWS=_ROWS, COLS=_COLS, num_warps=4,
    )  # fmt: skip
    return y


def backward(
    dy: Tensor, z: Tensor | None, factor: Tensor, need_z: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(dz, dfactor) as `forward` needs them, the second where z is given."""
    rows = dy.reshape(-1, dy.shape[-1])
    M, N = rows.shape
    others = None if z is None else z.reshape(M, N)
    dz = torch.empty_like(dy, memory_format=torch.contiguous_format) if need_z else None
    parts = cdiv(M, _ROWS * _TILES)
    sums = None if others is None else factor.new_empty(parts, N)
    strides = (0, 0) if others is None else others.stride()
    launch(
        scale_backward_kernel, (parts * cdiv(N, _COLS),), rows, others, factor.contiguous(), dz,
        sums, M, N, *rows.stride(), *strides,
        NEED_Z=need_z, SUM=sums is not None, ROWS=_ROWS, COLS=_COLS, TILES=_TILES, num_warps=4,
    )  # fmt: skip
    return dz, None if sums is None else sums.sum(0)


def deviation(
    device: torch.device, plain: Callable[..., Any], plain_backward: Callable[..., Any]
) -> str | None:
    """What of a small matrix is not what the plain calls make of it on a device; None if all is."""
    M, N = 300, 270
    generator = torch.Generator().manual_seed(0)
    z, dy, added = (torch.randn(M, N, generator=generator).to(device) for _ in range(3))
    factor = torch.rand(N, generator=generator).to(device) + 0.5
    for dtype in (torch.float32, torch.bfloat16):
        a, b, c = z.to(dtype), dy.to(dtype), added.to(dtype)
        close = 1e-5 if dtype == torch.float32 else 1e-2  # of one rounding
        pairs = [
            (forward(a, factor, c), plain(a, factor, c)),
            (forward(a, factor, c[0]), plain(a, factor, c[0])),
            *zip(backward(b, a, factor, True), plain_backward(b, a, factor, True), strict=True),
        ]
        for found, right in pairs:
            assert found is not None  # all are asked for
            error = (found.double() - right.double()).norm() / right.double().norm()
            if not error <= close:
                return f"an error of {float(error):.1e} in {dtype}"
    return None
