"""The GEMM whose columns are scaled before they are rounded: y = factor * (x @ mat + low @ low_mat)
+ bias, so that what is scaled is never written.

Backward takes what it needs of that, z, from y, and forms z again in those columns alone in which y
has lost it: where the factor is 0, or so small that bias or the dtype's range swallows the product.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.backends.device import target
from lora_kernels.backends.triton import tiles
from lora_kernels.backends.triton.blocks import (
    Mask,
    Matrix,
    Place,
    Ranks,
    Term,
    add_low_rank,
    column_halves,
    load_tile,
    store_tile,
    tile_order,
    tile_pointers,
)
from lora_kernels.backends.triton.gemm import (
    gemm_layout,
    pointer_loop,
    right_descriptor,
    tma_loop,
)
from lora_kernels.backends.triton.launch import fp32_precision, launch
from lora_kernels.backends.triton.low_rank import LowRank

_ROWS, _COLS = 16, 256
# Tiles of rows that a program of `unscale_kernel` takes one after the other.
_TILES = 16


class Columns(NamedTuple):
    """What each column is multiplied by, in fp32, and what is added to it, or None."""

    factor: Any
    bias: Any


@triton.jit
def product_tile(x, mat, term, place, BK: tl.constexpr):
    """A tile of x @ mat + the term, by pointers."""
    PRECISION: tl.constexpr = term.ranks.PRECISION
    acc = pointer_loop(x, mat, place, BK, PRECISION)
    return add_low_rank(acc, term, 0, place)


@triton.jit
def scale_strips(acc, out, out_desc, columns, place, STRIPS: tl.constexpr):
    """Stores a tile with its columns scaled, in strips, through the descriptor if there is one: in
    some layouts a thread holds factor and bias of every column of a strip."""
    BM: tl.constexpr = place.BM
    BN: tl.constexpr = place.BN
    if STRIPS > 1:
        HALF: tl.constexpr = BN // 2
        left, right = column_halves(acc, BM, BN)
        row, col = place.row, place.col
        scale_strips(left, out, out_desc, columns, Place(row, col, BM, HALF), STRIPS // 2)
        col += HALF
        scale_strips(right, out, out_desc, columns, Place(row, col, BM, HALF), STRIPS // 2)
    else:
        rows, cols = place.row + tl.arange(0, BM), place.col + tl.arange(0, BN)
        acc *= tl.load(columns.factor + cols, mask=cols < out.cols, other=0.0)[None, :]
        if columns.bias is not None:
            added = tl.load(columns.bias + cols, mask=cols < out.cols, other=0.0)
            acc += added.to(tl.float32)[None, :]
        if out_desc is None:
            store_tile(out, acc, rows, cols)
        else:
            out_desc.store([place.row, place.col], acc.to(out.ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["M"])
def scaled_gemm_kernel(
    x, mat, low, low_mat, factor, bias, out, M, N, K, r,
    stride_xm, stride_xk, stride_wk, stride_wn, stride_lr, stride_ln,
    R: tl.constexpr, RANKS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, STRIPS: tl.constexpr, HIGH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Pointer version, one tile per program: any strides, any alignment."""
    pm, pn = tile_order(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP)
    row, col = pm * BM, pn * BN
    acc = product_tile(
        Matrix(x, stride_xm, stride_xk, M, K),
        Matrix(mat, stride_wk, stride_wn, K, N),
        Term(
            Matrix(low, r, 1, M, r),
            Matrix(low_mat, stride_lr, stride_ln, r, N),
            Mask(out, 0, 1.0, 0),
            Ranks(R, RANKS, HIGH, PRECISION),
        ),
        Place(row, col, BM, BN),
        BK,
    )
    whole = Matrix(out, N, 1, M, N)
    scale_strips(acc, whole, None, Columns(factor, bias), Place(row, col, BM, BN), STRIPS)


@triton.jit(do_not_specialize=["M"])
def scaled_gemm_tma_kernel(
    x, mat, low, low_mat, factor, bias, out, M, N, K, r,
    stride_xm, stride_w, stride_lr, stride_ln,
    R: tl.constexpr, RANKS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, STRIPS: tl.constexpr, HIGH: tl.constexpr, NT: tl.constexpr,
    SMS: tl.constexpr,
):  # fmt: skip
    """Persistent version on TMA descriptors: 16-bit operands, aligned rows of unit stride."""
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    x_desc = tl.make_tensor_descriptor(x, [M, K], [stride_xm, 1], [BM, BK])
    mat_desc = right_descriptor(mat, K, N, stride_w, BK, BN, NT)
    out_desc = tl.make_tensor_descriptor(out, [M, N], [N, 1], [BM, BN // STRIPS])
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, SMS):
        pm, pn = tile_order(tile, tiles_m, tiles_n, GROUP)
        row, col = pm * BM, pn * BN
        acc = tma_loop(x_desc, mat_desc, Place(row, col, BM, BN), K, BK, NT)
        acc = add_low_rank(
            acc,
            Term(
                Matrix(low, r, 1, M, r),
                Matrix(low_mat, stride_lr, stride_ln, r, N),
                Mask(out, 0, 1.0, 0),
                Ranks(R, RANKS, HIGH, "ieee"),
            ),
            0,
            Place(row, col, BM, BN),
        )
        whole = Matrix(out, N, 1, M, N)
        scale_strips(acc, whole, out_desc, Columns(factor, bias), Place(row, col, BM, BN), STRIPS)


@triton.jit
def unscale_kernel(
    dy, y, factor, bias, dz, sums, rows, cols, stride_yr, stride_yc,
    NEED_Z: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """dz = dy * factor, and of the rows of program p the sums [p, 3, cols] of dy * w, w^2 and y^2,
    where w = y - bias is z * factor but for y's rounding; y and dz contiguous."""
    strips = tl.cdiv(cols, COLS)
    pid = tl.program_id(0)
    part = pid // strips
    col = (pid % strips) * COLS + tl.arange(0, COLS)
    scale = tl.load(factor + col, mask=col < cols, other=0.0)
    added = tl.zeros((COLS,), tl.float32)
    if bias is not None:
        added += tl.load(bias + col, mask=col < cols, other=0.0).to(tl.float32)
    total = tl.zeros((COLS,), tl.float32)
    signal = tl.zeros((COLS,), tl.float32)
    whole = tl.zeros((COLS,), tl.float32)
    for i in range(TILES):
        row = (part * TILES + i) * ROWS + tl.arange(0, ROWS)
        inside = (row[:, None] < rows) & (col[None, :] < cols)
        source = tile_pointers(Matrix(dy, stride_yr, stride_yc, rows, cols), row, col)
        gradient = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        result = tile_pointers(Matrix(y, cols, 1, rows, cols), row, col)
        value = tl.load(result, mask=inside, other=0.0).to(tl.float32)
        left = tl.where(inside, value - added[None, :], 0.0)
        total += tl.sum(gradient * left, 0)
        signal += tl.sum(left * left, 0)
        whole += tl.sum(value * value, 0)
        if NEED_Z:
            target = tile_pointers(Matrix(dz, cols, 1, rows, cols), row, col)
            tl.store(target, (gradient * scale[None, :]).to(dz.dtype.element_ty), mask=inside)
    # 64-bit: as many sums as elements of a large matrix lie before the last.
    place = sums + part.to(tl.int64) * 3 * cols + col
    tl.store(place, total, mask=col < cols)
    tl.store(place + cols, signal, mask=col < cols)
    tl.store(place + 2 * cols, whole, mask=col < cols)


@triton.jit(do_not_specialize=["M", "parts"])
def factor_kernel(
    sums, factor, dfactor, dy, x, mat, low, low_mat, M, N, K, r, parts, floor,
    stride_ym, stride_yn, stride_xm, stride_xk, stride_wk, stride_wn, stride_lr, stride_ln,
    R: tl.constexpr, RANKS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    HIGH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dfactor [N] = the sum of dy * z over the rows: from the sums [parts, 3, N] of
    `unscale_kernel`, but of columns whose w is half of y or less, or which have no sums, from z,
    formed again."""
    col = tl.program_id(0) * BN
    cols = col + tl.arange(0, BN)
    inside = cols < N
    lost = inside
    result = tl.zeros((BN,), tl.float32)
    if sums is not None:
        signal = tl.zeros((BN,), tl.float32)
        whole = tl.zeros((BN,), tl.float32)
        place = sums + cols
        for _ in range(parts):
            result += tl.load(place, mask=inside, other=0.0)
            signal += tl.load(place + N, mask=inside, other=0.0)
            whole += tl.load(place + 2 * N, mask=inside, other=0.0)
            place += 3 * N
        # Where w is less than half of y, y's rounding is twice an own one of w or more; beneath the
        # floor, that of the dtype's normal numbers, it is absolute.
        scale = tl.load(factor + cols, mask=inside, other=1.0)
        lost = inside & (4 * signal <= whole + floor)
        result /= tl.where(lost, 1.0, scale)
    if tl.max(lost.to(tl.int32), 0) > 0:
        anew = tl.zeros((BN,), tl.float32)
        for i in range(tl.cdiv(M, BM)):
            row = i * BM
            z = product_tile(
                Matrix(x, stride_xm, stride_xk, M, K),
                Matrix(mat, stride_wk, stride_wn, K, N),
                Term(
                    Matrix(low, r, 1, M, r),
                    Matrix(low_mat, stride_lr, stride_ln, r, N),
                    Mask(dfactor, 0, 1.0, 0),
                    Ranks(R, RANKS, HIGH, PRECISION),
                ),
                Place(row, col, BM, BN),
                BK,
            )
            gradients = Matrix(dy, stride_ym, stride_yn, M, N)
            gradient = load_tile(gradients, row + tl.arange(0, BM), cols).to(tl.float32)
            anew += tl.sum(gradient * z, 0)
        result = tl.where(lost, anew, result)
    tl.store(dfactor + cols, result, mask=inside)


def forward(x: Tensor, mat: Tensor, term: LowRank, factor: Tensor, bias: Tensor | None) -> Tensor:
    """factor * (x @ mat + the term) + bias, rounded once: x [M,K], mat [K,N], factor [N] in fp32,
    bias [N] or None; a term without dropout."""
    low, low_mat, high, _ = term
    (M, K), N, r = x.shape, mat.shape[1], low.shape[1]
    out, device = x.new_empty(M, N), target(x.device)
    tma, stored, aligned = gemm_layout(x, mat, out, device)
    tile = tiles.gemm(device, tiles.Product(x.dtype, M, N, r, False, aligned, tma))
    R = tiles.gemm_rank(device, x.dtype, r, False)
    shape: dict[str, Any] = {
        "R": R,
        "RANKS": tiles.cdiv(r, R),
        "BM": tile.bm,
        "BN": tile.bn,
        "BK": tile.bk,
        "GROUP": tile.group,
        "STRIPS": tile.strips,
        "HIGH": high,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
    programs = tiles.cdiv(M, tile.bm) * tiles.cdiv(N, tile.bn)
    values = x, mat, low, low_mat, factor, bias, out, M, N, K, r
    if tma:
        launch(
            scaled_gemm_tma_kernel, (min(programs, device.sms),), *values,
            x.stride(0), stored.stride(0), *low_mat.stride(), **shape,
            NT=stored is not mat, SMS=device.sms, descriptors=True,
        )  # fmt: skip
    else:
        launch(
            scaled_gemm_kernel, (programs,), *values, *x.stride(), *mat.stride(),
            *low_mat.stride(), **shape, PRECISION=fp32_precision(),
        )  # fmt: skip
    return out


def unscaled(
    dy: Tensor, y: Tensor, factor: Tensor, bias: Tensor | None, need_z: bool
) -> tuple[Tensor | None, Tensor]:
    """(dz, what `of_factor` needs of y) of dy and y [M,N], y contiguous."""
    M, N = dy.shape
    dz = torch.empty_like(dy, memory_format=torch.contiguous_format) if need_z else None
    parts = tiles.cdiv(M, _ROWS * _TILES)
    sums = factor.new_empty(parts, 3, N)
    launch(
        unscale_kernel, (parts * tiles.cdiv(N, _COLS),), dy, y, factor, bias, dz, sums,
        M, N, *dy.stride(), NEED_Z=need_z, ROWS=_ROWS, COLS=_COLS, TILES=_TILES, num_warps=4,
    )  # fmt: skip
    return dz, sums


def of_factor(
    dy: Tensor, x: Tensor, mat: Tensor, term: LowRank, factor: Tensor, sums: Tensor | None
) -> Tensor:
    """The gradient of factor [N], of arguments as `forward` takes them and the sums of `unscaled`;
    without these all of it is of a product that is formed again."""
    low, low_mat, high, _ = term
    (M, K), N, r = x.shape, mat.shape[1], low.shape[1]
    out = torch.empty_like(factor)
    bn, bk = 32, 16 if x.dtype == torch.float32 else 32
    R = tiles.rank_block(x.dtype, r, 32)
    launch(
        factor_kernel, (tiles.cdiv(N, bn),), sums, factor, out, dy, x, mat, low, low_mat,
        M, N, K, r, 0 if sums is None else len(sums), M * torch.finfo(x.dtype).tiny ** 2,
        *dy.stride(), *x.stride(), *mat.stride(), *low_mat.stride(),
        R=R, RANKS=tiles.cdiv(r, R), BM=64, BN=bn, BK=bk, HIGH=high, PRECISION=fp32_precision(),
        num_warps=8, num_stages=3,
    )  # fmt: skip
    return out
