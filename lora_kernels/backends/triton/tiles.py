"""Tile sizes by device, dtype and shape: analytic defaults, which a tuned table may replace."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from triton import cdiv, next_power_of_2

from lora_kernels.backends.plans import Call, refusal
from lora_kernels.backends.triton.launch import Target

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


Tile = TypeVar("Tile", LowRankTile, ExpandTile, GemmTile)


def replaced(tile: Tile, fields: Fields) -> Tile:
    """The tile with some fields changed; ValueError names a field that it does not have."""
    return tile._replace(**fields) if fields else tile


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
    between rows (or columns), the other being 1, and in the extent that its loads are masked by."""
    strides = sorted(matrix.stride())
    unit = matrix.stride().index(1) if 1 in strides else 0
    return strides[0] == 1 and strides[1] % 16 == 0 and matrix.shape[unit] % 16 == 0


def _row_block(M: int, most: int) -> int:
    return min(most, max(16, next_power_of_2(M)))


def _split(programs: int, sms: int, steps: int) -> int:
    """Shares of a reduction of `steps` steps: two programs per SM, at least four steps each."""
    return max(1, min(cdiv(2 * sms, programs), steps // 4, 32))


def _is_wide(dtype: torch.dtype) -> bool:
    return dtype == torch.float32


def shrink(
    target: Target, dtype: torch.dtype, M: int, K: int, r: int, aligned: bool
) -> LowRankTile:
    R, bm = rank_block(dtype, r), _row_block(M, 64)
    bk = 32 if _is_wide(dtype) else 128 if R <= 64 and aligned else 64
    split = _split(cdiv(M, bm) * cdiv(r, R), target.sms, cdiv(K, bk))
    return LowRankTile(bm, bk, R, split, 8 if R == 128 else 4, 4)


def expand(target: Target, dtype: torch.dtype, M: int, r: int) -> ExpandTile:
    bn = 64 if _is_wide(dtype) else 128
    return ExpandTile(_row_block(M, 64), bn, rank_block(dtype, r, 64), 4, 1)


def fuses_ds_db(dtype: torch.dtype, r: int) -> bool:
    """Whether one pass over dy gives ds and dB: one block holds the rank, and the partial sums cost
    less than a second read of dy."""
    return r < 64 and r <= rank_block(dtype, r)


def ds_db(target: Target, dtype: torch.dtype, M: int, N: int, r: int) -> LowRankTile:
    bm = _row_block(M, 32 if _is_wide(dtype) else 128)
    bn = 32 if _is_wide(dtype) else 64
    split = _split(cdiv(M, bm), target.sms, cdiv(N, bn))
    return LowRankTile(bm, bn, rank_block(dtype, r), split, 4, 4)


def tall(target: Target, dtype: torch.dtype, M: int, C: int, r: int) -> LowRankTile:
    R = rank_block(dtype, r)
    bm, bc = (32, 64) if _is_wide(dtype) else (64, 128)
    split = _split(cdiv(C, bc) * cdiv(r, R), target.sms, cdiv(M, bm))
    warps = 8 if (64 if target.arch >= 100 else 128) <= R else 4
    return LowRankTile(bm, bc, R, split, warps, 3 if R >= 64 else 4)


def gemm_rank(target: Target, dtype: torch.dtype, r: int, drop: bool) -> int:
    """Ranks of one step after the GEMM: in one step up to 128 where registers allow it."""
    if r <= 128:
        return rank_block(dtype, r, 64 if drop else 128)
    return rank_block(dtype, r, 32 if drop or target.arch < 90 else 64)


def gemm(
    target: Target,
    dtype: torch.dtype,
    M: int,
    N: int,
    r: int,
    drop: bool,
    aligned: bool,
    tma: bool,
) -> GemmTile:
    """The first configuration for the device; smaller where tiles would be padding or too few."""
    if _is_wide(dtype):
        tile = GemmTile(_row_block(M, 64), 64, 16, 3, 8)
    elif not aligned:
        tile = GemmTile(_row_block(M, 64), 64, 32, 3, 4)
    elif M <= 64 or cdiv(M, 128) * cdiv(N, 128) <= target.sms:
        tile = GemmTile(_row_block(M, 64), 128, 64, 4, 4)
    elif tma:
        tile = GemmTile(128, 256, 64, 3, 8, strips=2)
    elif target.arch >= 90:
        tile = GemmTile(128, 128, 64, 3, 8)
    else:
        tile = GemmTile(128, 64 if drop and r > 128 else 128, 32, 4, 8)
    return tile._replace(strips=tile.bn // 64) if drop else tile


def dual_rank(r: int) -> int:
    """Ranks of the one block that the dual kernel keeps s in."""
    return max(16, next_power_of_2(r))


def dual(target: Target, dtype: torch.dtype, M: int, N: int, r: int, aligned: bool) -> GemmTile:
    """For few rows, column tiles that give every SM one; else square tiles."""
    R = dual_rank(r)
    if _is_wide(dtype):
        return GemmTile(_row_block(M, 32), 32, 16, 3, 4)
    if not aligned:
        return GemmTile(_row_block(M, 64), 32, 64 if R <= 64 else 32, 2, 4)
    if M <= 64:
        bn = 64 if cdiv(N, 64) >= target.sms else 32
        return GemmTile(_row_block(M, 64), bn, 8192 // max(R, 64), 3, 4)
    if target.arch >= 90 and R <= 64:
        return GemmTile(128, 128, 64, 3, 8)
    return GemmTile(64, 64, 64 if R <= 64 else 32, 3, 4)


def _gemm_tiles(target: Target, M: int, drop: bool) -> tuple[GemmTile, ...]:
    """Configurations worth timing of an aligned 16-bit GEMM."""
    if M <= 64:
        tiles = (GemmTile(_row_block(M, 64), bn, 64, 4, 4) for bn in (64, 128))
    elif target.arch < 90:
        tiles = (GemmTile(128, 128, 32, 4, 8), GemmTile(128, 64, 32, 4, 8))
    else:
        wide = (GemmTile(128, 256, 64, 3, 8, 2), GemmTile(128, 128, 64, 3, 8))
        tiles = (*wide, GemmTile(128, 128, 64, 4, 8), GemmTile(64, 128, 64, 4, 4))
    return tuple(tile._replace(strips=tile.bn // 64) if drop else tile for tile in tiles)


def candidates(call: Call, target: Target) -> list[tuple[str, dict[str, dict[str, int]]]]:
    """(plan, tiles) of everything that may serve a call, to be timed `with plans.using(...)`.

    The first of a plan has the analytic tiles; every other one changes one launch, so that a tuner
    may join the best of each. Only fields that do not depend on the rank are listed.
    """
    dtype = getattr(torch, call.dtype)
    legal = ("aten", "cublas", "shrink_gemm", "decode", "dual")
    if call.op == "backward":  # the other plans share the backward of shrink_gemm
        legal = legal[:3]
    found = [(plan, {}) for plan in legal if refusal(plan, call) is None]
    if _is_wide(dtype) or not call.aligned:
        return found
    if call.r <= 128:  # larger ranks leave the GEMM few registers; its default alone is checked
        launch = "gemm" if call.op == "forward" else "dx"
        for tile in _gemm_tiles(target, call.M, call.dropout):
            found.append(("shrink_gemm", {launch: tile._asdict()}))
    low, extent = ("shrink", call.K) if call.op == "forward" else ("da", call.M)
    for plan in ("cublas", "shrink_gemm"):
        for split in (1, 2, 4, 8):
            if extent >= 512 * split:
                found.append((plan, {low: {"split": split}}))
    return found
