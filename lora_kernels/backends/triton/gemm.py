"""The GEMM that ends in a low-rank step: out = rows @ mat + low @ low_mat + bias.

Forward: x W^T + s B^T + bias. Backward: dy W + drop'(ds A). The low-rank step follows the reduction
loop: before it, it would cost the loop its overlap and its shared memory.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.backends.device import Target, target
from lora_kernels.backends.triton import tiles
from lora_kernels.backends.triton.blocks import (
    Mask,
    Matrix,
    Place,
    Ranks,
    Term,
    add_low_rank,
    column_halves,
    load_seed,
    load_tile,
    load_tile_hinted,
    loop_steps,
    multiply_add,
    store_tile,
    tile_order,
    tile_pointers,
)
from lora_kernels.backends.triton.dropout import WITHOUT, words
from lora_kernels.backends.triton.launch import fp32_precision, launch, overlaps
from lora_kernels.backends.triton.low_rank import LowRank


@triton.jit
def store_strips(acc, out, out_desc, term, seed, place, STRIPS: tl.constexpr):
    """Stores a tile in strips of columns, through the descriptor if there is one. With dropout a
    strip first gets its masked low-rank term, which needs an accumulator of its own."""
    BM: tl.constexpr = place.BM
    BN: tl.constexpr = place.BN
    if STRIPS > 1:
        HALF: tl.constexpr = BN // 2
        left, right = column_halves(acc, BM, BN)
        row, col = place.row, place.col
        store_strips(left, out, out_desc, term, seed, Place(row, col, BM, HALF), STRIPS // 2)
        col += HALF
        store_strips(right, out, out_desc, term, seed, Place(row, col, BM, HALF), STRIPS // 2)
    else:
        if term.mask.DROP:
            acc = add_low_rank(acc, term, seed, place)
        if out_desc is None:
            rows, cols = place.row + tl.arange(0, BM), place.col + tl.arange(0, BN)
            store_tile(out, acc, rows, cols)
        else:
            out_desc.store([place.row, place.col], acc.to(out.ptr.dtype.element_ty))


@triton.jit
def finish_tile(acc, out, out_desc, term, bias, place, STRIPS: tl.constexpr):
    """What follows the reduction loop: low-rank step, bias (rounded to out's dtype), store."""
    seed = 0
    if term.mask.DROP:
        seed = load_seed(term.mask.seed, term.mask.DROP)
    else:
        acc = add_low_rank(acc, term, 0, place)
    if bias is not None:
        cols = place.col + tl.arange(0, place.BN)
        values = tl.load(bias + cols, mask=cols < out.cols, other=0.0)
        acc += values.to(out.ptr.dtype.element_ty).to(tl.float32)[None, :]
    store_strips(acc, out, out_desc, term, seed, place, STRIPS)


@triton.jit
def load_ahead(term, bias, place):
    """What `finish_tile` reads of a term of one block, without dropout: (low, mat, bias)."""
    rows, cols = place.row + tl.arange(0, place.BM), place.col + tl.arange(0, place.BN)
    rank = tl.arange(0, term.ranks.R)
    low, mat = load_tile_hinted(term.low, rows, rank, "", ".cg"), load_tile(term.mat, rank, cols)
    if bias is None:
        values = tl.zeros((place.BN,), tl.float32)
    else:
        values = tl.load(bias + cols, mask=cols < term.mat.cols, other=0.0)
    return low, mat, values


@triton.jit
def pointer_loop(x, mat, place, BK: tl.constexpr, PRECISION: tl.constexpr):
    """A tile of x @ mat. Rows and columns past the end wrap around, as nobody stores them; only the
    reduction needs a mask."""
    rows, cols = place.row + tl.arange(0, place.BM), place.col + tl.arange(0, place.BN)
    ks = tl.arange(0, BK).to(tl.int64)
    x_tile = tile_pointers(x, rows % x.rows, ks)
    mat_tile = tile_pointers(mat, ks, cols % mat.cols)
    step = tl.full((), BK, tl.int64)
    acc = tl.zeros((place.BM, place.BN), tl.float32)
    for i in range(loop_steps(x.cols, BK)):
        left = x.cols - i * BK
        x_values = tl.load(x_tile, mask=ks[None, :] < left, other=0.0)
        mat_values = tl.load(mat_tile, mask=ks[:, None] < left, other=0.0)
        acc = multiply_add(x_values, mat_values, acc, PRECISION)
        x_tile += step * x.stride_c
        mat_tile += step * mat.stride_r
    return acc


@triton.jit(do_not_specialize=["M", "threshold"])
def gemm_kernel(
    x, mat, low, low_mat, bias, out, seed_ptr, M, N, K, r, scale, threshold,
    stride_xm, stride_xk, stride_wk, stride_wn, stride_lr, stride_ln,
    R: tl.constexpr, RANKS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, STRIPS: tl.constexpr, DROP: tl.constexpr, HIGH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Pointer version, one tile per program: any strides, any alignment."""
    pm, pn = tile_order(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP)
    row, col = pm * BM, pn * BN
    acc = pointer_loop(
        Matrix(x, stride_xm, stride_xk, M, K),
        Matrix(mat, stride_wk, stride_wn, K, N),
        Place(row, col, BM, BN),
        BK,
        PRECISION,
    )
    finish_tile(
        acc,
        Matrix(out, N, 1, M, N),
        None,
        Term(
            Matrix(low, r, 1, M, r),
            Matrix(low_mat, stride_lr, stride_ln, r, N),
            Mask(seed_ptr, threshold, scale, DROP),
            Ranks(R, RANKS, HIGH, PRECISION),
        ),
        bias,
        Place(row, col, BM, BN),
        STRIPS,
    )


@triton.jit
def right_descriptor(
    mat, K, N, stride, BK: tl.constexpr, BN: tl.constexpr, NT: tl.constexpr
):  # fmt: skip
    """The descriptor of a [K,N] operand stored [N,K] (NT) or [K,N]."""
    if NT:
        desc = tl.make_tensor_descriptor(mat, [N, K], [stride, 1], [BN, BK])
    else:
        desc = tl.make_tensor_descriptor(mat, [K, N], [stride, 1], [BK, BN])
    return desc


@triton.jit
def tma_loop(x_desc, mat_desc, place, K, BK: tl.constexpr, NT: tl.constexpr):
    """A tile of x @ mat through descriptors, which read zeros past the end."""
    acc = tl.zeros((place.BM, place.BN), tl.float32)
    for i in range(loop_steps(K, BK)):
        k = i * BK
        mat_tile = mat_desc.load([place.col, k]).T if NT else mat_desc.load([k, place.col])
        acc = tl.dot(x_desc.load([place.row, k]), mat_tile, acc)
    return acc


@triton.jit(do_not_specialize=["M", "threshold"])
def gemm_tma_kernel(
    x, mat, low, low_mat, bias, out, seed_ptr, M, N, K, r, scale, threshold,
    stride_xm, stride_w, stride_lr, stride_ln,
    R: tl.constexpr, RANKS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, NT: tl.constexpr, STRIPS: tl.constexpr, DROP: tl.constexpr,
    HIGH: tl.constexpr, SMS: tl.constexpr, PDL: tl.constexpr, FLATTEN: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Persistent version on TMA descriptors: 16-bit operands, aligned rows of unit stride. With PDL
    the kernel that writes low may still run: its end is awaited where low is first read, and
    nothing but descriptors is written before. FLATTEN and EARLY as the fields of `GemmTile`."""
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    x_desc = tl.make_tensor_descriptor(x, [M, K], [stride_xm, 1], [BM, BK])
    mat_desc = right_descriptor(mat, K, N, stride_w, BK, BN, NT)
    out_desc = tl.make_tensor_descriptor(out, [M, N], [N, 1], [BM, BN // STRIPS])
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, SMS, flatten=FLATTEN):
        pm, pn = tile_order(tile, tiles_m, tiles_n, GROUP)
        row, col = pm * BM, pn * BN
        if EARLY:
            low_tile, low_mat_tile, values = load_ahead(
                Term(
                    Matrix(low, r, 1, M, r),
                    Matrix(low_mat, stride_lr, stride_ln, r, N),
                    Mask(seed_ptr, threshold, scale, DROP),
                    Ranks(R, RANKS, HIGH, "ieee"),
                ),
                bias,
                Place(row, col, BM, BN),
            )
        acc = tma_loop(x_desc, mat_desc, Place(row, col, BM, BN), K, BK, NT)
        if EARLY:
            acc = tl.dot(low_tile, low_mat_tile, acc)
            if bias is not None:
                acc += values.to(out.dtype.element_ty).to(tl.float32)[None, :]
            store_strips(
                acc, Matrix(out, N, 1, M, N), out_desc,
                Term(
                    Matrix(low, r, 1, M, r),
                    Matrix(low_mat, stride_lr, stride_ln, r, N),
                    Mask(seed_ptr, threshold, scale, DROP),
                    Ranks(R, RANKS, HIGH, "ieee"),
                ),
                0, Place(row, col, BM, BN), STRIPS,
            )  # fmt: skip
        else:
            if PDL:
                tl.extra.cuda.gdc_wait()
            finish_tile(
                acc,
                Matrix(out, N, 1, M, N),
                out_desc,
                Term(
                    Matrix(low, r, 1, M, r),
                    Matrix(low_mat, stride_lr, stride_ln, r, N),
                    Mask(seed_ptr, threshold, scale, DROP),
                    Ranks(R, RANKS, HIGH, "ieee"),
                ),
                bias,
                Place(row, col, BM, BN),
                STRIPS,
            )


def has_tma_rows(matrix: Tensor) -> bool:
    """Whether a TMA descriptor may describe the matrix: unit stride, rows and base on 16 bytes."""
    unit = 16 // matrix.element_size()
    return (
        matrix.stride(1) == 1
        and matrix.stride(0) % unit == 0
        and matrix.stride(0) >= matrix.shape[1]
        and matrix.data_ptr() % 16 == 0
    )


def gemm_layout(x: Tensor, mat: Tensor, out: Tensor, device: Target) -> tuple[bool, Tensor, bool]:
    """(whether TMA may serve x @ mat, mat as it lies in memory, whether loads are wide)."""
    stored = mat.t() if mat.stride(0) == 1 and mat.shape[0] > 1 else mat
    tma = (
        device.has_wide_tiles
        and x.element_size() == 2
        and has_tma_rows(x)
        and has_tma_rows(stored)
        and has_tma_rows(out)
    )
    return tma, stored, tma or (tiles.vectorises(x) and tiles.vectorises(mat))


def gemm(
    x: Tensor,
    mat: Tensor,
    term: LowRank,
    bias: Tensor | None = None,
    fields: tiles.Fields = None,
) -> Tensor:
    """x @ mat + the term + bias: x [M,K], mat [K,N]; no bias with dropout."""
    low, low_mat, high, dropout = term
    (M, K), N, r = x.shape, mat.shape[1], low.shape[1]
    out = x.new_empty(M, N)
    device, drop = target(x.device), dropout is not None
    seed, threshold, kept_scale = dropout or WITHOUT
    tma, stored, aligned = gemm_layout(x, mat, out, device)
    tile = tiles.gemm(device, tiles.Product(x.dtype, M, N, r, drop, aligned, tma))
    if tma or not device.has_wide_tiles:  # elsewhere the pointer version has to stand in
        tile = tiles.replaced(tile, fields)
    R = tiles.gemm_rank(device, x.dtype, r, drop)
    shape: dict[str, Any] = {
        "R": R,
        "RANKS": tiles.cdiv(r, R),
        "BM": tile.bm,
        "BN": tile.bn,
        "BK": tile.bk,
        "GROUP": tile.group,
        "STRIPS": tile.strips,
        "DROP": words(dropout),
        "HIGH": high,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
    pdl = tma and bool(tile.pdl) and overlaps(device)
    plain = not drop and not pdl
    flatten = plain and bool(tile.flatten) and device.is_hopper
    early = plain and bool(tile.early) and shape["RANKS"] == 1 and high == 1
    programs = tiles.cdiv(M, tile.bm) * tiles.cdiv(N, tile.bn)
    values = (
        x, mat, low, low_mat, None if bias is None else bias.contiguous(), out,
        seed, M, N, K, r, kept_scale, threshold,
    )  # fmt: skip
    if tma:
        meta: dict[str, Any] = {"launch_pdl": True} if pdl else {}
        launch(
            gemm_tma_kernel, (min(programs, device.sms),), *values,
            x.stride(0), stored.stride(0), *low_mat.stride(), **shape,
            NT=stored is not mat, SMS=device.sms, PDL=pdl, FLATTEN=flatten, EARLY=early,
            descriptors=True,
            **meta,
        )  # fmt: skip
    else:
        launch(
            gemm_kernel, (programs,), *values, *x.stride(), *mat.stride(), *low_mat.stride(),
            **shape, PRECISION=fp32_precision(),
        )  # fmt: skip
    return out
