"""Forward in one launch: every program computes s for its rows beside its tile of y.

It serves two plans. With few rows (decode) the weight is streamed once and the adapter comes from
L2; with few columns (dual) recomputing s costs less than a second launch and a second read of x.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.backends.triton import tiles
from lora_kernels.backends.triton.blocks import (
    keep_tile,
    load_seed,
    load_tile,
    load_tile_hinted,
    loop_steps,
    store_tile,
)
from lora_kernels.backends.triton.dropout import Dropout, words
from lora_kernels.backends.triton.launch import fp32_precision, launch, target


@triton.jit(do_not_specialize=["M", "threshold"])
def dual_kernel(
    x, weight, a, b, bias, s, y, seed_ptr, M, N, K, r, scale, threshold,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br,
    R: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    DROP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (column tile, row tile). All products are formed transposed: the weight is the left
    operand, and s, which lies in registers, a right one, which wgmma takes from shared memory only.
    s is stored if it is not None, by the programs of column 0."""
    col, row = tl.program_id(0) * BN, tl.program_id(1) * BM
    rows, cols, rank = row + tl.arange(0, BM), col + tl.arange(0, BN), tl.arange(0, R)
    if DROP:
        seed = load_seed(seed_ptr, DROP)
    acc = tl.zeros((BN, BM), tl.float32)
    low = tl.zeros((R, BM), tl.float32)
    for i in range(loop_steps(K, BK)):
        ks = i * BK + tl.arange(0, BK)
        w_tile = load_tile_hinted(weight, cols, ks, stride_wn, stride_wk, N, K, "evict_first", "")
        x_tile = load_tile_hinted(x, rows, ks, stride_xm, stride_xk, M, K, "evict_last", "")
        a_tile = load_tile_hinted(a, rank, ks, stride_ar, stride_ak, r, K, "evict_last", "")
        acc = tl.dot(w_tile, x_tile.T, acc, input_precision=PRECISION)
        if DROP:
            x_tile = tl.where(keep_tile(seed, rows, i * BK, threshold, BK), x_tile, 0.0)
            x_tile = x_tile.to(x.dtype.element_ty)
        low = tl.dot(a_tile, x_tile.T, low, input_precision=PRECISION)
    s_tile = (low * scale).to(x.dtype.element_ty)
    if s is not None and col == 0:
        store_tile(s, s_tile, rank, rows, 1, r, r, M)
    b_tile = load_tile(b, cols, rank, stride_bn, stride_br, N, r)
    acc = tl.dot(b_tile, s_tile, acc, input_precision=PRECISION)
    if bias is not None:
        values = tl.load(bias + cols, mask=cols < N, other=0.0)
        acc += values.to(y.dtype.element_ty).to(tl.float32)[:, None]
    store_tile(y, acc, cols, rows, 1, N, N, M)


def dual(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    scale: float,
    save_s: bool,
    dropout: Dropout | None = None,
    fields: tiles.Fields = None,
) -> tuple[Tensor, Tensor]:
    """(y, s), s of size 0 if it is not to be saved: x [M,K], weight [N,K], a [r,K], b [N,r]."""
    (M, K), N, r = x.shape, weight.shape[0], a.shape[0]
    aligned = tiles.vectorises(x) and tiles.vectorises(weight)
    tile = tiles.dual(target(x.device), x.dtype, M, N, r, aligned)
    tile = tiles.replaced(tile, fields)
    y, s = x.new_empty(M, N), x.new_empty((M, r) if save_s else 0)
    drop = dropout is not None
    launch(
        dual_kernel, (tiles.cdiv(N, tile.bn), tiles.cdiv(M, tile.bm)),
        x, weight, a, b, None if bias is None else bias.contiguous(), s if save_s else None, y,
        dropout.seed if drop else None, M, N, K, r, scale * dropout.scale if drop else scale,
        dropout.threshold if drop else 0,
        *x.stride(), *weight.stride(), *a.stride(), *b.stride(),
        R=tiles.dual_rank(r), BM=tile.bm, BN=tile.bn, BK=tile.bk, DROP=words(dropout),
        PRECISION=fp32_precision(), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y, s
