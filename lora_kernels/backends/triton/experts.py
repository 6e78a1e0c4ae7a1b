"""The products of experts: rows of many groups, each with a weight and an adapter, in one launch.

    out = rows @ mat_g + factor_g * low @ low_mat_g + bias_g

Forward: x W_g^T + s B_g^T + bias_g. Backward: dy W_g + drop'(ds A_g). A tile of rows belongs to one
group, found on the device as in `many`; the group picks the expert and the adapter, which need not
be each other's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.backends.device import target
from lora_kernels.backends.triton import tiles
from lora_kernels.backends.triton.blocks import (
    Matrix,
    keep_tile,
    load_tile,
    loop_steps,
    multiply_add,
    tile_order,
)
from lora_kernels.backends.triton.launch import launch
from lora_kernels.backends.triton.many import (
    Many,
    Rows,
    Side,
    common,
    find_tile,
    matrix_of,
    places_of,
    row_tiles,
)

# Most ranks of a step: with 128 an RTX 30 spills.
_RANKS = 64


class Bases(NamedTuple):
    """mat [E,C,D] of the experts, any strides, with a bias [E,D]; expert weight_of[g] is group
    g's."""

    mat: Tensor
    bias: Tensor | None
    weight_of: Sequence[int]


@triton.jit
def rows_loop(rows, stride_k, mat, cols, BK: tl.constexpr, PRECISION: tl.constexpr):
    """Rows, given by pointers, times columns of a matrix [C,D]. All lie inside: only the reduction
    needs a mask."""
    ks = tl.arange(0, BK).to(tl.int64)
    left = rows[:, None] + ks[None, :] * stride_k
    right = mat.ptr + ks[:, None] * mat.stride_r + cols.to(tl.int64)[None, :] * mat.stride_c
    step = tl.full((), BK, tl.int64)
    acc = tl.zeros((rows.shape[0], cols.shape[0]), tl.float32)
    for i in range(loop_steps(mat.rows, BK)):
        inside = ks < mat.rows - i * BK
        left_tile = tl.load(left, mask=inside[None, :], other=0.0)
        right_tile = tl.load(right, mask=inside[:, None], other=0.0)
        acc = multiply_add(left_tile, right_tile, acc, PRECISION)
        left += step * stride_k
        right += step * mat.stride_r
    return acc


@triton.jit(do_not_specialize=["count", "threshold"])
def experts_kernel(
    x, mat, low, bias, out, order, offsets, table, factors, seeds, groups, weight_of,
    count, C, D, width, threshold,
    stride_xm, stride_xc, stride_e, stride_c, stride_d, stride_be, stride_bd,
    GROUPS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, R: tl.constexpr, RANKS: tl.constexpr, IS_B: tl.constexpr,
    TYPE: tl.constexpr, ALIGNED: tl.constexpr, ORDERED: tl.constexpr, DROP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (one of `count` tiles of rows, tile of columns): out [M,D] = x [M,C] @ mat of the
    group's expert + bias + factor * low @ A [r,D], or B^T where B is [D,r] (IS_B); with DROP the
    last masked as x is. The factor is a power of two without DROP, so the sum takes it exactly."""
    rows = Rows(order, offsets, table, factors, groups)
    tile, strip = tile_order(tl.program_id(0), count, tl.cdiv(D, BN), GROUP)
    group, first, begin, end = find_tile(rows, tile, GROUPS, BM)
    if group < groups:
        expert = tl.load(weight_of + group)
        place, cols = first + tl.arange(0, BM), strip * BN + tl.arange(0, BN)
        # Places past the group's end stand for its last, columns past the end for the first.
        row = places_of(rows, tl.minimum(place, end - 1), end, ORDERED).to(tl.int64)
        acc = rows_loop(
            x + row * stride_xm, stride_xc,
            Matrix(mat + expert * stride_e, stride_c, stride_d, C, D), cols % D,
            BK, PRECISION,
        )  # fmt: skip
        low_mat, r = matrix_of(rows, group, TYPE, ALIGNED)
        stride_lr, stride_ln = (D, 1) if not IS_B else (1, r)
        factor = tl.load(factors + group)
        total = tl.zeros((BM, BN), tl.float32) if DROP else acc * (1.0 / factor)
        for block in tl.range(RANKS, num_stages=1):
            rank = block * R + tl.arange(0, R)
            left = load_tile(Matrix(low, width, 1, end, r), place, rank)
            right = load_tile(Matrix(low_mat, stride_lr, stride_ln, r, D), rank, cols)
            total = tl.dot(left, right.to(left.dtype), total, input_precision=PRECISION)
        total *= factor
        if DROP:
            seed = tl.load(seeds + group), 0, 0
            total = acc + tl.where(
                keep_tile(seed, place - begin, strip * BN, threshold, BN), total, 0.0
            )
        if bias is not None:
            values = tl.load(bias + expert * stride_be + cols * stride_bd, mask=cols < D, other=0.0)
            total += values.to(out.dtype.element_ty).to(tl.float32)[None, :]
        inside = (place < end)[:, None] & (cols < D)[None, :]
        pointers = out + row[:, None] * D + cols[None, :]
        tl.store(pointers, total.to(out.dtype.element_ty), mask=inside)


def _tile(rows: Tensor, mat: Tensor, rank: int, drop: bool) -> tiles.GemmTile:
    """As of one product of all rows. No wider than 64 where registers would not do: masked, for the
    low-rank term has an accumulator of its own, and of more ranks than one block has."""
    aligned = tiles.vectorises(rows) and tiles.vectorises(mat[0]) and mat.stride(0) % 16 == 0
    shape = tiles.Product(rows.dtype, len(rows), mat.shape[2], rank, drop, aligned, False)
    tile = tiles.gemm(target(rows.device), shape)
    narrow = drop or rank > _RANKS
    return tile._replace(bn=min(tile.bn, 64)) if narrow else tile


def product(
    rows: Tensor, bases: Bases, low: Tensor, side: Side, many: Many, dropped: bool, out: Tensor
) -> None:
    """Fills the rows of groups in out [M,D] contiguous, of rows [M,C] and low [places,width]."""
    mat, bias, weight_of = bases
    given, options = common(many, side, dropped)
    drop, groups = options["DROP"], many.groups
    tile = _tile(rows, mat, side.rank, drop)
    block, count = row_tiles(len(rows), groups, tile.bm)
    R = min(tiles.gemm_rank(target(rows.device), rows.dtype, side.rank, drop), _RANKS)
    experts = torch.tensor(weight_of, dtype=torch.int64).to(rows.device, non_blocking=True)
    launch(
        experts_kernel, (count * tiles.cdiv(mat.shape[2], tile.bn),),
        rows, mat, low, bias, out, *given, experts,
        count, *mat.shape[1:], low.shape[1], many.threshold,
        *rows.stride(), *mat.stride(), *((0, 0) if bias is None else bias.stride()),
        GROUPS=tiles.next_power_of_2(groups), BM=block, BN=tile.bn, BK=tile.bk, GROUP=tile.group,
        R=R, RANKS=tiles.cdiv(side.rank, R), **options,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
