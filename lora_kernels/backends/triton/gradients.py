"""Adapter gradients: ds and dB from one read of dy; dA, or dB alone, from one of x or dy."""

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
    keep_tile,
    load_seed,
    load_tile,
    loop_steps,
    multiply_add,
    store_tile,
)
from lora_kernels.backends.triton.dropout import WITHOUT, Dropout, words
from lora_kernels.backends.triton.launch import fp32_precision, launch
from lora_kernels.backends.triton.reduce import reduce_partials


@triton.jit(do_not_specialize=["M"])
def ds_db_kernel(
    dy, mat, s, part_ds, part_db, M, N, r, stride_dm, stride_dn, stride_bn, stride_br,
    R: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (row tile, share of the columns): its share of dy B to part_ds [SPLIT,M,r] and its
    rows' share of dy^T s to part_db [row tiles,N,r], both to be summed over the first dimension."""
    tile, share = tl.program_id(0), tl.program_id(1)
    rows, rank = tile * BM + tl.arange(0, BM), tl.arange(0, R)
    steps = loop_steps(N, BN * SPLIT)
    s_tile = load_tile(Matrix(s, r, 1, M, r), rows, rank)
    acc = tl.zeros((BM, R), tl.float32)
    part_db += tile.to(tl.int64) * N * r
    for i in range(steps):
        cols = (share * steps + i) * BN + tl.arange(0, BN)
        dy_tile = load_tile(Matrix(dy, stride_dm, stride_dn, M, N), rows, cols)
        mat_tile = load_tile(Matrix(mat, stride_bn, stride_br, N, r), cols, rank)
        acc = multiply_add(dy_tile, mat_tile, acc, PRECISION)
        db_tile = tl.dot(dy_tile.T, s_tile, input_precision=PRECISION)
        store_tile(Matrix(part_db, r, 1, N, r), db_tile, cols, rank)
    store_tile(Matrix(part_ds + share.to(tl.int64) * M * r, r, 1, M, r), acc, rows, rank)


def ds_db(
    dy: Tensor,
    mat: Tensor,
    s: Tensor,
    scaling: float,
    high: float,
    dtype: torch.dtype,
    fields: tiles.Fields = None,
) -> tuple[Tensor, Tensor]:
    """(scaling * dy @ mat, high * dy^T s in `dtype`) from one pass over dy [M,N]; mat [N,r], s
    [M,r]."""
    (M, N), r = dy.shape, mat.shape[1]
    tile = tiles.replaced(
        tiles.ds_db(target(dy.device), dy.dtype, (M, N), r, tiles.vectorises(dy)), fields
    )
    rows = tiles.cdiv(M, tile.bm)
    part_ds = dy.new_empty((tile.split, M, r), dtype=tiles.ACCUMULATOR)
    part_db = dy.new_empty((rows, N, r), dtype=tiles.ACCUMULATOR)
    launch(
        ds_db_kernel, (rows, tile.split), dy, mat, s, part_ds, part_db, M, N, r,
        *dy.stride(), *mat.stride(),
        R=tile.r, BM=tile.bm, BN=tile.bk, SPLIT=tile.split, PRECISION=fp32_precision(),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    ds, db = dy.new_empty(M, r), dy.new_empty((N, r), dtype=dtype)
    reduce_partials((part_ds, ds, scaling), (part_db, db, high))
    return ds, db


class Part(NamedTuple):
    """Of a tall product: columns from `col`, a block of R ranks, one of SPLIT shares of the rows,
    BM at a time."""

    col: Any
    rank_block: Any
    share: Any
    R: tl.constexpr
    BM: tl.constexpr
    BC: tl.constexpr
    SPLIT: tl.constexpr


@triton.jit
def tall_tile(low, x, out, mask, part, PRECISION: tl.constexpr):
    """A part of scale * low^T @ drop(x) to out [r,C], or with SPLIT > 1 what its share of the rows
    adds to it, unscaled, to fp32 partials [SPLIT, r * C], each laid out as out is. low is [r,M]
    here."""
    BM: tl.constexpr = part.BM
    SPLIT: tl.constexpr = part.SPLIT
    cols = part.col + tl.arange(0, part.BC)
    rank = part.rank_block * part.R + tl.arange(0, part.R)
    steps = loop_steps(x.rows, BM * SPLIT)
    if mask.DROP:
        seed = load_seed(mask.seed, mask.DROP)
    acc = tl.zeros((part.R, part.BC), tl.float32)
    for i in range(steps):
        rows = (part.share * steps + i) * BM + tl.arange(0, BM)
        low_tile = load_tile(low, rank, rows)
        tile = load_tile(x, rows, cols)
        if mask.DROP:
            tile = tl.where(keep_tile(seed, rows, part.col, mask.threshold, part.BC), tile, 0.0)
            tile = tile.to(x.ptr.dtype.element_ty)
        acc = multiply_add(low_tile, tile, acc, PRECISION)
    if SPLIT == 1:
        store_tile(out, acc * mask.scale, rank, cols)
    else:
        first = out.ptr + part.share.to(tl.int64) * out.rows * out.cols
        store_tile(Matrix(first, out.stride_r, out.stride_c, out.rows, out.cols), acc, rank, cols)


@triton.jit(do_not_specialize=["M", "threshold"])
def tall_kernel(
    low, rows, out, seed_ptr, M, C, r, scale, threshold,
    stride_xm, stride_xc, stride_or, stride_oc,
    R: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, SPLIT: tl.constexpr,
    DROP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (column tile, rank block, share of the rows): one tile."""
    tall_tile(
        Matrix(low, 1, r, r, M),
        Matrix(rows, stride_xm, stride_xc, M, C),
        Matrix(out, stride_or, stride_oc, r, C),
        Mask(seed_ptr, threshold, scale, DROP),
        Part(tl.program_id(0) * BC, tl.program_id(1), tl.program_id(2), R, BM, BC, SPLIT),
        PRECISION,
    )


def tall(
    low: Tensor,
    rows: Tensor,
    dtype: torch.dtype,
    transposed: bool,
    dropout: Dropout | None = None,
    fields: tiles.Fields = None,
    scale: float = 1.0,
) -> Tensor:
    """scale * low^T @ drop(rows) as [r,C] in `dtype`, or its transpose [C,r]: low [M,r], rows
    [M,C]."""
    (M, r), C = low.shape, rows.shape[1]
    tile = tiles.replaced(
        tiles.tall(target(low.device), low.dtype, M, C, r, tiles.vectorises(rows)), fields
    )
    out = low.new_empty((C, r) if transposed else (r, C), dtype=dtype)
    split = tile.split > 1
    part = low.new_empty((tile.split, *out.shape), dtype=tiles.ACCUMULATOR) if split else out
    stride_c, stride_r = out.stride() if transposed else reversed(out.stride())
    seed, threshold, kept_scale = dropout or WITHOUT
    scale = scale * kept_scale
    launch(
        tall_kernel, (tiles.cdiv(C, tile.bk), tiles.cdiv(r, tile.r), tile.split),
        low, rows, part, seed, M, C, r, scale, threshold, *rows.stride(), stride_r, stride_c,
        R=tile.r, BM=tile.bm, BC=tile.bk, SPLIT=tile.split, DROP=words(dropout),
        PRECISION=fp32_precision(), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if split:
        reduce_partials((part, out, scale))
    return out
