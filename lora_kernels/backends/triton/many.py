"""The branches of many groups, each of its own rows, in one launch for each of a branch's products.

A tile of rows belongs to one group, which picks the adapter by its address. Which group a tile is
of is found on the device from the offsets of the groups: nothing is known of them on the host, and
more programs start than there are tiles. What a group computes depends on its rows and tensors
alone, in an order that follows from their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.backends.triton import tiles
from lora_kernels.backends.triton.blocks import (
    Matrix,
    keep_tile,
    load_tile,
    loop_steps,
    multiply_add,
    store_tile,
)
from lora_kernels.backends.triton.launch import fp32_precision, launch

_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
# Most rows and ranks of a tile: with more some cards spill.
_ROWS, _RANKS = 64, 64


class Rows(NamedTuple):
    """Whose rows are whose: of `Groups`, on the device; and of each group the address of a matrix,
    its rank and a factor."""

    order: Any
    offsets: Any
    table: Any
    factors: Any
    groups: Any


@triton.jit
def find_tile(rows, tile, GROUPS: tl.constexpr, BM: tl.constexpr):
    """(group, the tile's first place in the order, where the group begins and ends there); the
    group is at least `groups` past the last tile."""
    lane = tl.arange(0, GROUPS)
    inside = lane < rows.groups
    begin = tl.load(rows.offsets + lane, mask=inside, other=0).to(tl.int32)
    end = tl.load(rows.offsets + lane + 1, mask=inside, other=0).to(tl.int32)
    own = (end - begin + BM - 1) // BM
    last = tl.cumsum(own, 0)
    group = tl.sum((last <= tile).to(tl.int32), 0)
    here = lane == group
    first = tl.sum(tl.where(here, begin + (tile - last + own) * BM, 0), 0)
    return group, first, tl.sum(tl.where(here, begin, 0), 0), tl.sum(tl.where(here, end, 0), 0)


@triton.jit
def places_of(rows, place, end, ORDERED: tl.constexpr):
    """The rows of a batch at these places of the order; past the end none is read."""
    if ORDERED:
        return place
    else:
        return tl.load(rows.order + place, mask=place < end, other=0).to(tl.int32)


@triton.jit
def matrix_of(rows, group, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """(pointer to a group's matrix, its rank)."""
    words = rows.table + group * 2
    pointer = tl.load(words).to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer, tl.load(words + 1).to(tl.int32)


@triton.jit(do_not_specialize=["threshold"])
def many_shrink_kernel(
    x, low, order, offsets, table, factors, seeds, groups, C, width, threshold,
    stride_xm, stride_xc,
    GROUPS: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, R: tl.constexpr, IS_B: tl.constexpr,
    TYPE: tl.constexpr, ALIGNED: tl.constexpr, ORDERED: tl.constexpr, DROP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (tile of rows, block of ranks): factor * drop(x) @ mat^T of the tile's group to low
    [places,width], mat being A [r,C], or B^T where B is [C,r] (IS_B). Formed transposed, as in
    `shrink_kernel`."""
    rows = Rows(order, offsets, table, factors, groups)
    group, first, begin, end = find_tile(rows, tl.program_id(0), GROUPS, BM)
    if group < groups:
        mat, r = matrix_of(rows, group, TYPE, ALIGNED)
        place, rank = first + tl.arange(0, BM), tl.program_id(1) * R + tl.arange(0, R)
        row = places_of(rows, place, end, ORDERED).to(tl.int64)
        stride_r, stride_c = (C, 1) if not IS_B else (1, r)
        if DROP:
            seed = tl.load(seeds + group), 0, 0
        acc = tl.zeros((R, BM), tl.float32)
        for i in range(loop_steps(C, BC)):
            cols = i * BC + tl.arange(0, BC)
            inside = (place < end)[:, None] & (cols < C)[None, :]
            x_tile = tl.load(
                x + row[:, None] * stride_xm + cols[None, :] * stride_xc, mask=inside, other=0.0
            )
            if DROP:
                keep = keep_tile(seed, place - begin, i * BC, threshold, BC)
                x_tile = tl.where(keep, x_tile, 0.0).to(x.dtype.element_ty)
            mat_tile = load_tile(Matrix(mat, stride_r, stride_c, r, C), rank, cols)
            acc = multiply_add(mat_tile.to(x.dtype.element_ty), x_tile.T, acc, PRECISION)
        factor = tl.load(factors + group)
        # Past a group's rank nothing is written: zeros are there.
        store_tile(Matrix(low, 1, width, r, end), acc * factor, rank, place)


@triton.jit(do_not_specialize=["threshold"])
def many_expand_kernel(
    low, out, order, offsets, table, factors, seeds, groups, C, width, threshold,
    stride_ym, stride_yc,
    GROUPS: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, R: tl.constexpr, RANKS: tl.constexpr,
    IS_B: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr, ORDERED: tl.constexpr,
    DROP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (tile of rows, tile of columns): out += factor * low @ mat of the tile's group, mat
    being A [r,C], or B^T where B is [C,r]; with DROP masked as x is."""
    rows = Rows(order, offsets, table, factors, groups)
    group, first, begin, end = find_tile(rows, tl.program_id(0), GROUPS, BM)
    if group < groups:
        mat, r = matrix_of(rows, group, TYPE, ALIGNED)
        col = tl.program_id(1) * BC
        place, cols = first + tl.arange(0, BM), col + tl.arange(0, BC)
        row = places_of(rows, place, end, ORDERED).to(tl.int64)
        stride_r, stride_c = (C, 1) if not IS_B else (1, r)
        acc = tl.zeros((BM, BC), tl.float32)
        for block in tl.range(RANKS, num_stages=1):
            rank = block * R + tl.arange(0, R)
            left = load_tile(Matrix(low, width, 1, end, r), place, rank)
            right = load_tile(Matrix(mat, stride_r, stride_c, r, C), rank, cols)
            acc = tl.dot(left, right.to(left.dtype), acc, input_precision=PRECISION)
        acc *= tl.load(factors + group)
        if DROP:
            seed = tl.load(seeds + group), 0, 0
            acc = tl.where(keep_tile(seed, place - begin, col, threshold, BC), acc, 0.0)
        inside = (place < end)[:, None] & (cols < C)[None, :]
        pointers = out + row[:, None] * stride_ym + cols[None, :] * stride_yc
        acc += tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
        tl.store(pointers, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["threshold"])
def many_tall_kernel(
    low, x, order, offsets, table, factors, seeds, groups, C, width, threshold,
    stride_xm, stride_xc,
    BM: tl.constexpr, BC: tl.constexpr, R: tl.constexpr, IS_B: tl.constexpr,
    TYPE: tl.constexpr, ALIGNED: tl.constexpr, ORDERED: tl.constexpr, DROP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (tile of columns, block of ranks, group): factor * low^T @ drop(x) over the group's
    rows, to its gradient: of A [r,C], or of B [C,r]. One whose address is 0 is not asked for."""
    rows, group = Rows(order, offsets, table, factors, groups), tl.program_id(2)
    begin = tl.load(offsets + group).to(tl.int32)
    end = tl.load(offsets + group + 1).to(tl.int32)
    wanted = tl.load(table + group * 2) != 0
    if wanted & (begin < end):
        out, r = matrix_of(rows, group, TYPE, ALIGNED)
        col = tl.program_id(0) * BC
        cols, rank = col + tl.arange(0, BC), tl.program_id(1) * R + tl.arange(0, R)
        if DROP:
            seed = tl.load(seeds + group), 0, 0
        acc = tl.zeros((R, BC), tl.float32)
        for i in range(loop_steps(end - begin, BM)):
            place = begin + i * BM + tl.arange(0, BM)
            row = places_of(rows, place, end, ORDERED).to(tl.int64)
            low_tile = load_tile(Matrix(low, 1, width, r, end), rank, place)
            inside = (place < end)[:, None] & (cols < C)[None, :]
            x_tile = tl.load(
                x + row[:, None] * stride_xm + cols[None, :] * stride_xc, mask=inside, other=0.0
            )
            if DROP:
                keep = keep_tile(seed, place - begin, col, threshold, BC)
                x_tile = tl.where(keep, x_tile, 0.0).to(x.dtype.element_ty)
            acc = multiply_add(low_tile, x_tile, acc, PRECISION)
        stride_r, stride_c = (C, 1) if not IS_B else (1, r)
        total = acc * tl.load(factors + group)
        store_tile(Matrix(out, stride_r, stride_c, r, C), total, rank, cols)


class Many(NamedTuple):
    """The rows of a call by groups, in `Groups`' order, and their dropout."""

    order: Tensor | None
    offsets: Tensor
    groups: int
    threshold: int = 0
    seeds: Tensor | None = None


class Side(NamedTuple):
    """Of each group A [r,C] or B [C,r] contiguous, and a factor. None stands for a gradient that is
    not asked for; rank is the largest."""

    matrices: Sequence[Tensor | None]
    ranks: Sequence[int]
    is_b: bool
    factors: Sequence[float]

    @property
    def rank(self) -> int:
        return max(self.ranks)

    def given(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(addresses and ranks [G,2], factors [G]) on the device."""
        words = [
            [0 if matrix is None else matrix.data_ptr(), rank]
            for matrix, rank in zip(self.matrices, self.ranks, strict=True)
        ]
        table = torch.tensor(words, dtype=torch.int64)
        factors = torch.tensor(self.factors, dtype=torch.float32)
        return table.to(device, non_blocking=True), factors.to(device, non_blocking=True)

    def meta(self) -> dict[str, Any]:
        there = [matrix for matrix in self.matrices if matrix is not None]
        wide = all(m.data_ptr() % 16 == m.shape[1] % 16 == 0 for m in there)
        return {"IS_B": self.is_b, "TYPE": _TYPES[there[0].dtype], "ALIGNED": wide}


def common(many: Many, side: Side, dropped: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(order, offsets, table, factors, seeds, groups; options) of a launch."""
    table, factors = side.given(many.offsets.device)
    seeds = many.seeds if dropped else None
    options = {
        "ORDERED": many.order is None, "DROP": seeds is not None, "PRECISION": fp32_precision(),
        **side.meta(),
    }  # fmt: skip
    return (many.order, many.offsets, table, factors, seeds, many.groups), options


def row_tiles(rows: int, groups: int, most: int = _ROWS) -> tuple[int, int]:
    """(rows of a tile, as many tiles as so many rows can make)."""
    block = tiles.row_block(tiles.cdiv(rows, groups), most)
    return block, min(rows, tiles.cdiv(rows, block) + groups)


def _columns(rows: Tensor) -> int:
    """Of a tile."""
    return 32 if rows.dtype == torch.float32 else 64


def many_shrink(x: Tensor, side: Side, many: Many, dropped: bool, low: Tensor) -> None:
    """low [places,width] = factor * drop(x) A^T, or x B, of each group's rows; zero elsewhere."""
    given, options = common(many, side, dropped)
    block, count = row_tiles(x.shape[0], many.groups)
    R = tiles.rank_block(x.dtype, side.rank, _RANKS)
    launch(
        many_shrink_kernel, (count, tiles.cdiv(side.rank, R)),
        x, low, *given, x.shape[1], low.shape[1], many.threshold, *x.stride(),
        GROUPS=tiles.next_power_of_2(many.groups), BM=block, BC=_columns(x), R=R, **options,
        num_warps=4, num_stages=3,
    )  # fmt: skip


def many_expand(low: Tensor, side: Side, many: Many, dropped: bool, out: Tensor) -> None:
    """out += factor * low B^T, or drop(low A), of each group's rows."""
    given, options = common(many, side, dropped)
    block, count = row_tiles(out.shape[0], many.groups)
    R = tiles.rank_block(low.dtype, side.rank, _RANKS)
    launch(
        many_expand_kernel, (count, tiles.cdiv(out.shape[1], _columns(low))),
        low, out, *given, out.shape[1], low.shape[1], many.threshold, *out.stride(),
        GROUPS=tiles.next_power_of_2(many.groups), BM=block, BC=_columns(low), R=R,
        RANKS=tiles.cdiv(side.rank, R), **options, num_warps=4, num_stages=2,
    )  # fmt: skip


def many_tall(low: Tensor, x: Tensor, side: Side, many: Many, dropped: bool) -> None:
    """The gradients of a side, factor * low^T drop(x), or its transpose, over each group's rows."""
    given, options = common(many, side, dropped)
    R = tiles.rank_block(low.dtype, side.rank, _RANKS)
    launch(
        many_tall_kernel,
        (tiles.cdiv(x.shape[1], _columns(x)), tiles.cdiv(side.rank, R), many.groups),
        low, x, *given, x.shape[1], low.shape[1], many.threshold, *x.stride(),
        BM=32, BC=_columns(x), R=R, **options, num_warps=4, num_stages=3,
    )  # fmt: skip
