"""dx and dA in one launch: the tiles of dA, which are bound by memory, fill the programs that the
last round of dx tiles leaves idle.

Programs take tiles by ticket, those of dx first. What a tile computes depends on its number alone,
so the result does not depend on who took it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.backends.device import target
from lora_kernels.backends.triton import tiles
from lora_kernels.backends.triton.blocks import Mask, Matrix, Place, Ranks, Term, tile_order
from lora_kernels.backends.triton.dropout import WITHOUT, words
from lora_kernels.backends.triton.gemm import (
    finish_tile,
    gemm_layout,
    pointer_loop,
    right_descriptor,
    tma_loop,
)
from lora_kernels.backends.triton.gradients import Part, tall_tile
from lora_kernels.backends.triton.launch import fp32_precision, launch
from lora_kernels.backends.triton.low_rank import LowRank
from lora_kernels.backends.triton.reduce import reduce_partials


@triton.jit(do_not_specialize=["M", "threshold"])
def dx_da_kernel(
    dy, weight, ds, a, x, dx, part, counter, seed_ptr, M, N, K, r, scale, threshold,
    stride_dm, stride_dn, stride_wn, stride_wk, stride_ar, stride_ak, stride_xm, stride_xk,
    R: tl.constexpr, RANKS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, STRIPS: tl.constexpr, DROP: tl.constexpr, TMA: tl.constexpr,
    NT: tl.constexpr, TALL_R: tl.constexpr, TALL_M: tl.constexpr, TALL_K: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx [M,K] = dy @ weight + drop'(ds @ a), and dA as SPLIT fp32 partials [r,K], or with SPLIT 1
    dA itself. counter [1] starts as 0."""
    tiles_m, tiles_k = tl.cdiv(M, BM), tl.cdiv(K, BN)
    columns, ranks = tl.cdiv(K, TALL_K), tl.cdiv(r, TALL_R)
    dx_tiles = tiles_m * tiles_k
    if TMA:
        dy_desc = tl.make_tensor_descriptor(dy, [M, N], [stride_dm, 1], [BM, BK])
        stride_w = stride_wk if NT else stride_wn
        w_desc = right_descriptor(weight, N, K, stride_w, BK, BN, NT)
        dx_desc = tl.make_tensor_descriptor(dx, [M, K], [K, 1], [BM, BN // STRIPS])
    else:
        dx_desc = None
    tile = tl.atomic_add(counter, 1, sem="relaxed")
    while tile < dx_tiles + columns * ranks * SPLIT:
        if tile < dx_tiles:
            pm, pn = tile_order(tile, tiles_m, tiles_k, GROUP)
            row, col = pm * BM, pn * BN
            if TMA:
                acc = tma_loop(dy_desc, w_desc, Place(row, col, BM, BN), N, BK, NT)
            else:
                acc = pointer_loop(
                    Matrix(dy, stride_dm, stride_dn, M, N),
                    Matrix(weight, stride_wn, stride_wk, N, K),
                    Place(row, col, BM, BN),
                    BK,
                    PRECISION,
                )
            finish_tile(
                acc,
                Matrix(dx, K, 1, M, K),
                dx_desc,
                Term(
                    Matrix(ds, r, 1, M, r),
                    Matrix(a, stride_ar, stride_ak, r, K),
                    Mask(seed_ptr, threshold, scale, DROP),
                    Ranks(R, RANKS, 1.0, PRECISION),
                ),
                None,
                Place(row, col, BM, BN),
                STRIPS,
            )
        else:
            item = tile - dx_tiles
            col, item = item % columns * TALL_K, item // columns
            tall_tile(
                Matrix(ds, 1, r, r, M),
                Matrix(x, stride_xm, stride_xk, M, K),
                Matrix(part, K, 1, r, K),
                Mask(seed_ptr, threshold, scale, DROP),
                Part(col, item % ranks, item // ranks, TALL_R, TALL_M, TALL_K, SPLIT),
                PRECISION,
            )
        tile = tl.atomic_add(counter, 1, sem="relaxed")


def dx_da(
    dy: Tensor,
    weight: Tensor,
    term: LowRank,
    x: Tensor,
    dtype: torch.dtype,
    dx_fields: tiles.Fields = None,
    da_fields: tiles.Fields = None,
) -> tuple[Tensor, Tensor]:
    """(dy @ weight + the term, which is drop'(ds @ a), and ds^T @ drop(x) in `dtype`): dy [M,N],
    weight [N,K], ds [M,r], a [r,K], x [M,K]."""
    ds, a, _, dropout = term
    (M, N), (r, K) = dy.shape, a.shape
    device, drop = target(dy.device), dropout is not None
    dx, counter = dy.new_empty(M, K), torch.zeros(1, dtype=torch.int32, device=dy.device)
    tma, stored, aligned = gemm_layout(dy, weight, dx, device)
    tile = tiles.dx_da(device, tiles.Product(dy.dtype, M, K, r, drop, aligned, tma))
    if tma or not device.has_wide_tiles:
        tile = tiles.replaced(tile, dx_fields)
    tall = tiles.replaced(tiles.tall(device, dy.dtype, M, K, r, aligned), da_fields)
    R = tiles.gemm_rank(device, dy.dtype, r, drop)
    out = dy.new_empty((r, K), dtype=dtype)
    split = tall.split > 1
    part = dy.new_empty((tall.split, r, K), dtype=tiles.ACCUMULATOR) if split else out
    seed, threshold, scale = dropout or WITHOUT
    work = tiles.cdiv(M, tile.bm) * tiles.cdiv(K, tile.bn)
    work += tiles.cdiv(K, tall.bk) * tiles.cdiv(r, tall.r) * tall.split
    launch(
        dx_da_kernel, (min(work, device.sms),), dy, weight, ds, a, x, dx, part, counter,
        seed, M, N, K, r, scale, threshold,
        *dy.stride(), *weight.stride(), *a.stride(), *x.stride(),
        R=R, RANKS=tiles.cdiv(r, R), BM=tile.bm, BN=tile.bn, BK=tile.bk, GROUP=tile.group,
        STRIPS=tile.strips, DROP=words(dropout), TMA=tma, NT=stored is not weight,
        TALL_R=tall.r, TALL_M=tall.bm, TALL_K=tall.bk, SPLIT=tall.split,
        PRECISION=fp32_precision(), num_warps=tile.warps, num_stages=tile.stages,
        descriptors=tma,
    )  # fmt: skip
    if split:
        reduce_partials((part, out, scale))
    return dx, out
