"""Tile sizes by device, dtype and shape: analytic defaults, which a tuned table may replace."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from lora_kernels.backends.device import Target

_remembered = lru_cache(maxsize=4096)
ACCUMULATOR = torch.float32
Fields = Mapping[str, int] | None


class LowRankTile(NamedTuple):
    """bm rows by bk columns of the big operand, r ranks (padded), shares of the reduction."""

    bm: int
    bk: int
    r: int
    split: int
    warps: int
    stages: int


class ExpandTile(NamedTuple):
    bm: int
    bn: int
    r: int
    warps: int
    stages: int


class GemmTile(NamedTuple):
    bm: int
    bn: int
    bk: int
    stages: int
    warps: int
    strips: int = 1  # of columns, stored one after the other: less staging memory and registers
    group: int = 8
    pdl: int = 0  # whether the launch may begin before the one that makes its low-rank rows ends
    flatten: int = 0  # whether the first loads of a tile are issued in the last steps of the other
    early: int = 0  # whether the low-rank step and the bias are loaded before the reduction loop
    cluster: int = 0  # CTAs, of neighbouring rows, that share their loads of the columns, if any do


class Product(NamedTuple):
    """What the tile of a GEMM depends on beside the device: [M,N] with a term of rank r, masked or
    not; whether its operands allow loads in wide words, and TMA."""

    dtype: torch.dtype
    M: int
    N: int
    r: int
    drop: bool
    aligned: bool
    tma: bool


class DualTile(NamedTuple):
    bm: int
    bn: int
    bk: int
    stages: int
    warps: int
    split: int = 1


Tile = TypeVar("Tile", LowRankTile, ExpandTile, GemmTile, DualTile)


# Triton's own of these two take microseconds from Python, and every launch needs several.


def cdiv(extent: int, block: int) -> int:
    return -(extent // -block)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def replaced(tile: Tile, fields: Fields) -> Tile:
    """The tile with some fields changed."""
    return tile._replace(**fields) if fields else tile


def fitted(tile: Tile, target: Target, step: int, kept: int = 0) -> Tile:
    """The tile with no more stages than the target's shared memory holds, at least two: of `step`
    bytes each, the last in registers, beside what is kept."""
    stages = tile.stages
    while stages > 2 and (stages - 1) * step + kept > target.shared:
        stages -= 1
    return tile._replace(stages=stages)


def rank_block(dtype: torch.dtype, r: int, most: int = 128) -> int:
    """Ranks of one block: a power of two, at least the 16 that tl.dot needs to reduce over. No more
    in fp32, where every thread holds its operands of a whole dot."""
    return 16 if _is_wide(dtype) else min(most, max(16, next_power_of_2(r)))


def padded_rank(r: int) -> int:
    """The rank that the kernels get to see. Above 16 one that is no multiple of 16 would make the
    loads of the low-rank tiles narrow, and so many that they spill."""
    return r if r <= 16 else cdiv(r, 16) * 16


def vectorises(matrix: Tensor) -> bool:
    """Whether Triton may load the matrix in wide words: it looks for multiples of 16 in the stride
    between rows (or columns), the other being 1, in the extent that its loads are masked by and in
    its address."""
    strides = sorted(matrix.stride())
    unit = matrix.stride().index(1) if 1 in strides else 0
    wide = strides[1] % 16 == matrix.shape[unit] % 16 == matrix.data_ptr() % 16 == 0
    return strides[0] == 1 and wide


def row_block(M: int, most: int) -> int:
    return min(most, max(16, next_power_of_2(M)))


def _split(programs: int, sms: int, steps: int) -> int:
    """Shares of a reduction of `steps` steps: two programs per SM, at least four steps each."""
    return max(1, min(cdiv(2 * sms, programs), steps // 4, 32))


def _warps(target: Target, R: int, aligned: bool) -> int:
    """Of a product whose result has R rows. It lies in their registers, and where tensor cores read
    registers too, so do its operands, of which narrow loads need many."""
    narrow = not (aligned or target.has_wide_tiles or target.gfx)
    return 8 if narrow or (64 if target.has_narrow_waves else 128) <= R else 4


def _is_wide(dtype: torch.dtype) -> bool:
    return dtype == torch.float32


@_remembered
def shrink(
    target: Target, dtype: torch.dtype, M: int, K: int, r: int, aligned: bool
) -> LowRankTile:
    R, bm = rank_block(dtype, r), row_block(M, 64)
    bk = 32 if _is_wide(dtype) else 128 if R <= 64 and aligned else 64
    split = _split(cdiv(M, bm) * cdiv(r, R), target.sms, cdiv(K, bk))
    tile = LowRankTile(bm, bk, R, split, _warps(target, R, aligned), 4)
    size = dtype.itemsize
    return fitted(tile, target, (bm + R) * bk * size, kept=bm * bk * size)  # x with its mask


@_remembered
def expand(target: Target, dtype: torch.dtype, M: int, r: int) -> ExpandTile:
    bn = 64 if _is_wide(dtype) else 128
    return ExpandTile(row_block(M, 64), bn, rank_block(dtype, r, 64), 4, 1)


def fuses_ds_db(dtype: torch.dtype, r: int) -> bool:
    """Whether one pass over dy gives ds and dB: one block holds the rank, and the partial sums cost
    less than a second read of dy."""
    return r < 64 and r <= rank_block(dtype, r)


@_remembered
def ds_db(
    target: Target, dtype: torch.dtype, shape: tuple[int, int], r: int, aligned: bool
) -> LowRankTile:
    """Of dy [M,N]. Narrow loads take many registers: more warps share them."""
    M, N = shape
    bm = row_block(M, 32 if _is_wide(dtype) else 128)
    bn = 32 if _is_wide(dtype) else 64
    split = _split(cdiv(M, bm), target.sms, cdiv(N, bn))
    R = rank_block(dtype, r)
    tile = LowRankTile(bm, bn, R, split, 4 if aligned else 8, 4)
    return fitted(tile, target, (bm + R) * bn * dtype.itemsize)


@_remembered
def tall(target: Target, dtype: torch.dtype, M: int, C: int, r: int, aligned: bool) -> LowRankTile:
    R = rank_block(dtype, r)
    bm, bc = (32, 64) if _is_wide(dtype) else (64, 128)
    split = _split(cdiv(C, bc) * cdiv(r, R), target.sms, cdiv(M, bm))
    warps = 8 if target.is_blackwell and R >= 64 else _warps(target, R, aligned)
    tile = LowRankTile(bm, bc, R, split, warps, 3 if R >= 64 else 4)
    size = dtype.itemsize
    return fitted(tile, target, bm * (R + bc) * size, kept=bm * bc * size)


def gemm_rank(target: Target, dtype: torch.dtype, r: int, drop: bool) -> int:
    """Ranks of one step after the GEMM: in one step up to 128 where registers allow it."""
    if r <= 128:
        masked = 64 if target.has_wide_tiles else 32
        return rank_block(dtype, r, masked if drop else 64 if target.is_blackwell else 128)
    return rank_block(dtype, r, 32 if drop or not target.has_wide_tiles else 64)


@_remembered
def gemm(target: Target, product: Product) -> GemmTile:
    """The first configuration for the device; smaller where tiles would be padding or too few."""
    dtype, M, N, r, drop, aligned, tma = product
    if _is_wide(dtype):
        tile = GemmTile(row_block(M, 64), 64, 16, 3, 8)
    elif not aligned:
        tile = GemmTile(row_block(M, 64), 64, 32, 3, 4)
    elif M <= 64 or cdiv(M, 128) * cdiv(N, 128) <= target.sms:
        narrow = target.is_blackwell and drop
        tile = GemmTile(row_block(M, 64), 64 if narrow else 128, 64, 4, 4)
    elif tma:
        tile = GemmTile(128, 256, 64, 3, 8, strips=2)
    elif target.has_wide_tiles:
        tile = GemmTile(128, 128, 64, 3, 8)
    else:
        tile = GemmTile(128, 64 if drop and r > 128 else 128, 32, 4, 8)
    tile = fitted(tile, target, (tile.bm + tile.bn) * tile.bk * dtype.itemsize)
    return tile._replace(strips=tile.bn // 64) if drop else tile


@_remembered
def specialised(M: int, N: int, target: Target) -> GemmTile:
    """Of the warp-specialised GEMM."""
    if cdiv(M, 128) * cdiv(N, 256) < target.sms:
        return GemmTile(128, 128, 64, 4, 8)
    return GemmTile(128, 256, 64, 3, 8)


@_remembered
def dx_da(target: Target, product: Product) -> GemmTile:
    """As `gemm`, but eight warps, and narrower where dA does not fit beside dx."""
    dtype, M, K, r, *_ = product
    of_da, size = tall(target, dtype, M, K, r, product.aligned), dtype.itemsize
    tile = _dx_da(target, product)
    step, kept = of_da.bm * (of_da.r + of_da.bk) * size, of_da.bm * of_da.bk * size
    return fitted(tile, target, step, kept)


def _dx_da(target: Target, product: Product) -> GemmTile:
    tile, r, drop = gemm(target, product), product.r, product.drop
    if _is_wide(product.dtype) or not product.aligned:
        return tile._replace(warps=8)
    if not target.has_wide_tiles:
        tile = tile._replace(bm=128, bk=32, warps=8)
        return tile._replace(bn=64, strips=1) if drop and r > 64 else tile
    if tile.bn == 256 and r <= 64 and not drop:
        return tile
    if target.is_blackwell:
        return GemmTile(128, 128, 64, 4 if drop else 3, 8, strips=2)
    return GemmTile(128, 128, 64, 4, 8, strips=2 if drop else 1)


def dual_rank(r: int) -> int:
    """Ranks of the one block that the dual kernel keeps s in."""
    return max(16, next_power_of_2(r))


def dual_loads_twice(target: Target, tile: DualTile, r: int, drop: bool) -> bool:
    """Whether the dual kernel must load x once for each of its products.

    Triton 3.6 and 3.7 give a load with two different uses, by a product that reads shared memory
    and by one that reads registers, one buffer too few for the former, which runs on while the
    buffer is filled again: seen on an H200 as other bits in one of many runs.
    """
    by_weight, by_a = tile.bn >= 64, dual_rank(r) >= 64 and not drop
    return target.has_wide_tiles and by_weight != by_a


@_remembered
def dual(target: Target, dtype: torch.dtype, M: int, N: int, r: int, aligned: bool) -> DualTile:
    """For few rows, column tiles that give every SM one; else square tiles."""
    R = dual_rank(r)
    if _is_wide(dtype):
        tile = DualTile(row_block(M, 32), 32, 16, 3, 4)
    elif not aligned:
        tile = DualTile(row_block(M, 64), 32, 64 if R <= 64 else 32, 2, 4)
    elif M <= 64:
        bn = 64 if cdiv(N, 64) >= target.sms else 32
        tile = DualTile(row_block(M, 64), bn, 8192 // max(R, 64), 3, 4)
    elif target.has_wide_tiles and R <= 64:
        tile = DualTile(128, 128, 64, 3, 8)
    else:
        tile = DualTile(64, 64, 64 if R <= 64 else 32, 3, 4)
    size = tile.bk * dtype.itemsize
    return fitted(tile, target, (2 * tile.bm + tile.bn + R) * size, kept=tile.bm * size)


@_remembered
def flag(target: Target, dtype: torch.dtype, M: int, N: int, r: int, tma: bool) -> GemmTile:
    """Room for the second accumulator, which the tiles of column 0 need."""
    if _is_wide(dtype):
        return GemmTile(row_block(M, 32), 32, 16, 3, 8)
    if not tma:
        return GemmTile(row_block(M, 64), 64, 32, 3, 8)
    if M <= 64:
        return GemmTile(row_block(M, 64), 64, 64, 3, 4)
    if r > 64 or cdiv(M, 128) * cdiv(N, 128) <= target.sms:
        return GemmTile(128, 128, 64, 4, 8, strips=2)
    return GemmTile(128, 256, 64, 3, 8, strips=2)


def fields_of(tile: GemmTile | DualTile) -> dict[str, int]:
    """As a table names them."""
    return {name: value for name, value in tile._asdict().items() if value}
