"""Tile sizes by device, dtype and shape: analytic defaults."""

from __future__ import annotations

from typing import NamedTuple

import torch
from triton import cdiv, next_power_of_2

from lora_kernels.backends.triton.launch import Target

ACCUMULATOR = torch.float32


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


def rank_block(r: int, most: int = 128) -> int:
    """Ranks of one block: a power of two, at least the 16 that tl.dot needs to reduce over."""
    return min(most, max(16, next_power_of_2(r)))


def _row_block(M: int, most: int) -> int:
    return min(most, max(16, next_power_of_2(M)))


def _split(programs: int, sms: int, steps: int) -> int:
    """Shares of a reduction of `steps` steps: two programs per SM, at least four steps each."""
    return max(1, min(cdiv(2 * sms, programs), steps // 4, 32))


def _is_wide(dtype: torch.dtype) -> bool:
    return dtype == torch.float32


def shrink(target: Target, dtype: torch.dtype, M: int, K: int, r: int) -> LowRankTile:
    R, bm = rank_block(r), _row_block(M, 64)
    bk = 32 if _is_wide(dtype) else 128 if R <= 64 else 64
    split = _split(cdiv(M, bm) * cdiv(r, R), target.sms, cdiv(K, bk))
    return LowRankTile(bm, bk, R, split, 4, _stages(target, 4))


def expand(target: Target, dtype: torch.dtype, M: int, r: int) -> ExpandTile:
    bn = 64 if _is_wide(dtype) else 128
    return ExpandTile(_row_block(M, 64), bn, rank_block(r, 64), 4, 1)


def fuses_ds_db(r: int) -> bool:
    """Whether one pass over dy gives ds and dB; above, dB's partial sums outgrow a second read."""
    return r < 64


def ds_db(target: Target, dtype: torch.dtype, M: int, N: int, r: int) -> LowRankTile:
    bm = _row_block(M, 64 if _is_wide(dtype) else 128)
    bn = 32 if _is_wide(dtype) else 64
    split = _split(cdiv(M, bm), target.sms, cdiv(N, bn))
    return LowRankTile(bm, bn, rank_block(r), split, 4, _stages(target, 4))


def tall(target: Target, dtype: torch.dtype, M: int, C: int, r: int) -> LowRankTile:
    R = rank_block(r, 64 if _is_wide(dtype) else 128)
    bm, bc = (32, 64) if _is_wide(dtype) else (64, 128)
    split = _split(cdiv(C, bc) * cdiv(r, R), target.sms, cdiv(M, bm))
    return LowRankTile(bm, bc, R, split, 4, _stages(target, 4 if R < 128 else 3))


def _stages(target: Target, most: int) -> int:
    return most if target.arch >= 80 else 2


GEMM_RANKS = 128


def gemm(target: Target, dtype: torch.dtype, M: int, N: int, drop: bool, tma: bool) -> GemmTile:
    """The first configuration for the device; smaller where tiles would be padding or too few."""
    if _is_wide(dtype):
        tile = GemmTile(_row_block(M, 64), 64, 32, 3, 4)
    elif M <= 64 or cdiv(M, 128) * cdiv(N, 128) <= target.sms:
        tile = GemmTile(_row_block(M, 64), 128, 64, 4, 4)
    elif target.arch >= 90 and tma:
        tile = GemmTile(128, 256, 64, 3, 8, strips=2)
    elif target.arch >= 90:
        tile = GemmTile(128, 128, 64, 3, 8)
    else:
        tile = GemmTile(128, 128, 32, 4, 8)
    return tile._replace(strips=tile.bn // 64) if drop else tile
