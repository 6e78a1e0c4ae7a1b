"""The rank-sized products: shrink (s = scale * drop(x) A^T) and expand (y = base + s B^T)."""

from __future__ import annotations

from typing import NamedTuple

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
    keep_tile,
    load_seed,
    load_tile,
    loop_steps,
    multiply_add,
    store_tile,
)
from lora_kernels.backends.triton.dropout import WITHOUT, Dropout, words
from lora_kernels.backends.triton.launch import fp32_precision, launch, overlaps
from lora_kernels.backends.triton.reduce import reduce_partials


@triton.jit(do_not_specialize=["M", "threshold"])
def shrink_kernel(
    x, mat, out, seed_ptr, M, K, r, scale, threshold,
    stride_xm, stride_xk, stride_ar, stride_ak,
    R: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr,
    DROP: tl.constexpr, PRECISION: tl.constexpr, FREE: tl.constexpr,
):  # fmt: skip
    """Program (row tile, rank block, share of K): scale * drop(x) @ mat^T to out [M,r], or with
    SPLIT > 1 the unscaled share to fp32 partials [SPLIT,M,r].

    The product is formed transposed, mat @ x^T: a masked x then is the right operand, which wgmma
    takes from shared memory only. With FREE the next kernel may begin already.
    """
    if FREE:
        tl.extra.cuda.gdc_launch_dependents()
    row, share = tl.program_id(0) * BM, tl.program_id(2)
    rows = row + tl.arange(0, BM)
    rank = tl.program_id(1) * R + tl.arange(0, R)
    steps = loop_steps(K, BK * SPLIT)
    if DROP:
        seed = load_seed(seed_ptr, DROP)
    acc = tl.zeros((R, BM), tl.float32)
    for i in range(steps):
        first = (share * steps + i) * BK
        cols = first + tl.arange(0, BK)
        x_tile = load_tile(Matrix(x, stride_xm, stride_xk, M, K), rows, cols)
        if DROP:
            x_tile = tl.where(keep_tile(seed, rows, first, threshold, BK), x_tile, 0.0)
            x_tile = x_tile.to(x.dtype.element_ty)
        mat_tile = load_tile(Matrix(mat, stride_ar, stride_ak, r, K), rank, cols)
        acc = multiply_add(mat_tile, x_tile.T, acc, PRECISION)
    if SPLIT == 1:
        store_tile(Matrix(out, 1, r, r, M), acc * scale, rank, rows)
    else:
        store_tile(Matrix(out + share.to(tl.int64) * M * r, 1, r, r, M), acc, rank, rows)


def shrink(
    x: Tensor,
    mat: Tensor,
    scale: float,
    dropout: Dropout | None = None,
    fields: tiles.Fields = None,
    held: list[Tensor] | None = None,
) -> Tensor:
    """scale * drop(x) @ mat^T [M,r] in x's dtype, rounded once: x [M,K], mat [r,K].

    With `held` the next kernel in the stream may begin before this is done, if it is launched so.
    What is still read then is put there: memory that the next launch must not be given.
    """
    (M, K), r = x.shape, mat.shape[0]
    device = target(x.device)
    free = held is not None and overlaps(device)
    tile = tiles.shrink(device, x.dtype, M, K, r, tiles.vectorises(x))
    tile = tiles.replaced(tile, fields)
    out = x.new_empty(M, r)
    split = tile.split > 1
    part = x.new_empty((tile.split, M, r), dtype=tiles.ACCUMULATOR) if split else out
    seed, threshold, kept_scale = dropout or WITHOUT
    scale = scale * kept_scale
    launch(
        shrink_kernel, (tiles.cdiv(M, tile.bm), tiles.cdiv(r, tile.r), tile.split),
        x, mat, part, seed, M, K, r, scale, threshold, *x.stride(), *mat.stride(),
        R=tile.r, BM=tile.bm, BK=tile.bk, SPLIT=tile.split, DROP=words(dropout),
        PRECISION=fp32_precision(), FREE=free and not split,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if split:
        reduce_partials((part, out, scale), free=free)
        if held is not None:
            held.append(part)
    return out


@triton.jit(do_not_specialize=["M", "threshold"])
def expand_kernel(
    base, low, mat, out, seed_ptr, M, N, r, scale, threshold,
    stride_bm, stride_bn, stride_mr, stride_mc, stride_ym, stride_yn,
    R: tl.constexpr, RANKS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    DROP: tl.constexpr, HIGH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = base + HIGH * (low @ mat), the term masked and scaled with DROP; base may be None."""
    row, col = tl.program_id(0) * BM, tl.program_id(1) * BN
    rows, cols = row + tl.arange(0, BM), col + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    seed = load_seed(seed_ptr, DROP) if DROP else 0
    acc = add_low_rank(
        acc,
        Term(
            Matrix(low, r, 1, M, r),
            Matrix(mat, stride_mr, stride_mc, r, N),
            Mask(seed_ptr, threshold, scale, DROP),
            Ranks(R, RANKS, HIGH, PRECISION),
        ),
        seed,
        Place(row, col, BM, BN),
    )
    if base is not None:
        acc += load_tile(Matrix(base, stride_bm, stride_bn, M, N), rows, cols).to(tl.float32)
    store_tile(Matrix(out, stride_ym, stride_yn, M, N), acc, rows, cols)


class LowRank(NamedTuple):
    """high * low @ mat: low [M,r] contiguous, mat [r,N], `high` a power of two.

    With dropout, and then high = 1, it is masked and scaled by 1 / (1 - p), as the gradient of a
    dropped x is.
    """

    low: Tensor
    mat: Tensor
    high: float = 1.0
    dropout: Dropout | None = None


def expand(base: Tensor | None, term: LowRank, out: Tensor, fields: tiles.Fields = None) -> None:
    """out = base + the term; base and out [M,N] may be the same tensor."""
    low, mat, high, dropout = term
    (M, r), N = low.shape, mat.shape[1]
    tile = tiles.replaced(tiles.expand(target(low.device), low.dtype, M, r), fields)
    seed, threshold, kept_scale = dropout or WITHOUT
    launch(
        expand_kernel, (tiles.cdiv(M, tile.bm), tiles.cdiv(N, tile.bn)),
        base, low, mat, out, seed, M, N, r, kept_scale, threshold,
        *(out if base is None else base).stride(), *mat.stride(), *out.stride(),
        R=tile.r, RANKS=tiles.cdiv(r, tile.r), BM=tile.bm, BN=tile.bn, DROP=words(dropout),
        HIGH=high, PRECISION=fp32_precision(), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
