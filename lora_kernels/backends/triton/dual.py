"""Forward in one launch: every program computes s for its rows beside its tile of y.

It serves two plans. With few rows (decode) the weight is streamed once and the adapter comes from
L2; with few columns (dual) recomputing s costs less than a second launch and a second read of x.
Where even so there are too few programs, they share out K, and a second launch adds up.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.backends.device import target
from lora_kernels.backends.triton import tiles
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
from lora_kernels.backends.triton.launch import fp32_precision, launch
from lora_kernels.backends.triton.reduce import reduce_partials
from lora_kernels.branch import Dense


@triton.jit(do_not_specialize=["M", "threshold"])
def dual_kernel(
    x, weight, a, b, bias, s, y, seed_ptr, M, N, K, r, scale, threshold,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br,
    R: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr,
    TWICE: tl.constexpr, DROP: tl.constexpr, HIGH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (column tile, row tile, share of K). All products are formed transposed: the weight
    is the left operand, and s, which lies in registers, a right one, which wgmma takes from shared
    memory only. s is stored if it is not None, by the programs of column 0. With SPLIT > 1 y and s
    are shares, [SPLIT,M,N] and [SPLIT,M,r] in fp32: s B^T is the sum of its shares like the rest.
    With TWICE each product loads x for itself, see `tiles.dual_loads_twice`.
    """
    col, row, share = tl.program_id(0) * BN, tl.program_id(1) * BM, tl.program_id(2)
    rows, cols, rank = row + tl.arange(0, BM), col + tl.arange(0, BN), tl.arange(0, R)
    if DROP:
        seed = load_seed(seed_ptr, DROP)
    acc = tl.zeros((BN, BM), tl.float32)
    low = tl.zeros((R, BM), tl.float32)
    steps = loop_steps(K, BK * SPLIT)
    for i in range(steps):
        first = (share * steps + i) * BK
        ks = first + tl.arange(0, BK)
        w_tile = load_tile_hinted(
            Matrix(weight, stride_wn, stride_wk, N, K), cols, ks, "evict_first", ""
        )
        x_tile = load_tile_hinted(Matrix(x, stride_xm, stride_xk, M, K), rows, ks, "evict_last", "")
        a_tile = load_tile_hinted(Matrix(a, stride_ar, stride_ak, r, K), rank, ks, "evict_last", "")
        acc = multiply_add(w_tile, x_tile.T, acc, PRECISION)
        if TWICE:  # with another hint, or the two become one again
            x_tile = load_tile_hinted(Matrix(x, stride_xm, stride_xk, M, K), rows, ks, "", "")
        if DROP:
            x_tile = tl.where(keep_tile(seed, rows, first, threshold, BK), x_tile, 0.0)
            x_tile = x_tile.to(x.dtype.element_ty)
        low = multiply_add(a_tile, x_tile.T, low, PRECISION)
    low *= scale
    if s is not None and col == 0:
        store_tile(Matrix(s + share.to(tl.int64) * M * r, 1, r, r, M), low, rank, rows)
    b_tile = load_tile(Matrix(b, stride_bn, stride_br, N, r), cols, rank)
    if HIGH != 1.0:
        acc *= 1.0 / HIGH
    acc = tl.dot(b_tile, low.to(x.dtype.element_ty), acc, input_precision=PRECISION)
    if HIGH != 1.0:
        acc *= HIGH
    if bias is not None:
        values = tl.load(bias + cols, mask=(cols < N) & (share == 0), other=0.0)
        acc += values.to(x.dtype.element_ty).to(tl.float32)[:, None]
    store_tile(Matrix(y + share.to(tl.int64) * M * N, 1, N, N, M), acc, cols, rows)


def dual(
    x: Tensor,
    base: Dense,
    pair: tuple[Tensor, Tensor],
    scale: tuple[float, float],
    save_s: bool,
    dropout: Dropout | None = None,
    fields: tiles.Fields = None,
) -> tuple[Tensor, Tensor]:
    """(y, s), s of size 0 if it is not to be saved: x [M,K], base.weight [N,K], and of the pair A
    [r,K] and B [N,r], all in x's dtype; scale as `scaling.split` gives it."""
    (weight, bias, _), (a, b) = base, pair
    (M, K), N, r = x.shape, weight.shape[0], a.shape[0]
    aligned = tiles.vectorises(x) and tiles.vectorises(weight)
    tile = tiles.dual(target(x.device), x.dtype, M, N, r, aligned)
    tile = tiles.replaced(tile, fields)
    y, s = x.new_empty(M, N), x.new_empty((M, r) if save_s else 0)
    split = tile.split > 1
    part_y, part_s = (
        out.new_empty((tile.split, *out.shape), dtype=tiles.ACCUMULATOR) if split else out
        for out in (y, s)
    )
    seed, threshold, kept_scale = dropout or WITHOUT
    launch(
        dual_kernel, (tiles.cdiv(N, tile.bn), tiles.cdiv(M, tile.bm), tile.split),
        x, weight, a, b, None if bias is None else bias.contiguous(),
        part_s if save_s else None, part_y,
        seed, M, N, K, r, scale[0] * kept_scale, threshold,
        *x.stride(), *weight.stride(), *a.stride(), *b.stride(),
        R=tiles.dual_rank(r), BM=tile.bm, BN=tile.bn, BK=tile.bk, SPLIT=tile.split,
        TWICE=tiles.dual_loads_twice(target(x.device), tile, r, dropout is not None),
        DROP=words(dropout), HIGH=scale[1], PRECISION=fp32_precision(),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if split:
        reduce_partials((part_y, y, 1.0), (part_s, s, 1.0) if save_s else None)
    return y, s
