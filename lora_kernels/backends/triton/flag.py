"""Forward in one launch without computing s twice: the tiles of column 0 make it beside their own
product and raise a flag; the others, when their reduction is over, wait for the flag of their rows.

Programs take tiles by ticket, and the tiles of column 0 have the lowest tickets of their group:
whoever waits, waits for a tile that a running program holds and that waits for nobody.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
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
    load_tile,
    loop_steps,
    multiply_add,
    store_tile,
    tile_order,
)
from lora_kernels.backends.triton.gemm import finish_tile, has_tma_rows
from lora_kernels.backends.triton.launch import fp32_precision, launch
from lora_kernels.branch import Dense


class Source(NamedTuple):
    """A matrix [rows, K] of which tiles are read, through a TMA descriptor if there is one."""

    matrix: Matrix
    desc: Any  # last: Triton 3.6 loses a field that follows a None


class Loop(NamedTuple):
    """How a product is summed up: BK of the reduction at a time; with LOW also that of x and a, of
    R ranks."""

    BK: tl.constexpr
    R: tl.constexpr
    LOW: tl.constexpr
    PRECISION: tl.constexpr


@triton.jit
def descriptor(
    ptr, n_rows, n_cols, stride, ROWS: tl.constexpr, COLS: tl.constexpr, TMA: tl.constexpr
):  # fmt: skip
    """A TMA descriptor of tiles of a matrix, or None."""
    if TMA:
        desc = tl.make_tensor_descriptor(ptr, [n_rows, n_cols], [stride, 1], [ROWS, COLS])
    else:
        desc = None
    return desc


@triton.jit
def read_tile(source, row, col, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The tile at (row, col), zero outside the matrix."""
    if source.desc is None:
        rows, cols = row + tl.arange(0, ROWS), col + tl.arange(0, COLS)
        tile = load_tile(source.matrix, rows, cols)
    else:
        tile = source.desc.load([row, col])
    return tile


@triton.jit
def flag_loop(x, weight, a, place, loop):
    """A tile of x @ weight^T, and with LOW of x @ a^T."""
    BK: tl.constexpr = loop.BK
    acc = tl.zeros((place.BM, place.BN), tl.float32)
    low = tl.zeros((place.BM, loop.R), tl.float32)
    for i in range(loop_steps(x.matrix.cols, BK)):
        k = i * BK
        x_tile = read_tile(x, place.row, k, place.BM, BK)
        w_tile = read_tile(weight, place.col, k, place.BN, BK)
        acc = multiply_add(x_tile, w_tile.T, acc, loop.PRECISION)
        if loop.LOW:
            a_tile = read_tile(a, 0, k, loop.R, BK)
            low = multiply_add(x_tile, a_tile.T, low, loop.PRECISION)
    return acc, low


@triton.jit(do_not_specialize=["M"])
def flag_kernel(
    x, weight, a, b, bias, s, y, flags, M, N, K, r, scale,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_ar, stride_ak, stride_br, stride_bn,
    R: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, STRIPS: tl.constexpr, TMA: tl.constexpr, HIGH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """flags [row tiles + 1] start as 0; the last is the ticket counter. s [M,r] is contiguous."""
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    x_desc = descriptor(x, M, K, stride_xm, BM, BK, TMA)
    w_desc = descriptor(weight, N, K, stride_wn, BN, BK, TMA)
    a_desc = descriptor(a, r, K, stride_ar, R, BK, TMA)
    y_desc = descriptor(y, M, N, N, BM, BN // STRIPS, TMA)
    tile = tl.atomic_add(flags + tiles_m, 1, sem="relaxed")
    while tile < tiles_m * tiles_n:
        pm, pn = tile_order(tile, tiles_m, tiles_n, GROUP)
        row, col = pm * BM, pn * BN
        if pn == 0:
            acc, low = flag_loop(
                Source(Matrix(x, stride_xm, stride_xk, M, K), x_desc),
                Source(Matrix(weight, stride_wn, stride_wk, N, K), w_desc),
                Source(Matrix(a, stride_ar, stride_ak, r, K), a_desc),
                Place(row, col, BM, BN),
                Loop(BK, R, True, PRECISION),
            )
            store_tile(Matrix(s, r, 1, M, r), low * scale, row + tl.arange(0, BM), tl.arange(0, R))
            tl.debug_barrier()
            tl.atomic_xchg(flags + pm, 1, sem="release")
        else:
            acc, _ = flag_loop(
                Source(Matrix(x, stride_xm, stride_xk, M, K), x_desc),
                Source(Matrix(weight, stride_wn, stride_wk, N, K), w_desc),
                Source(Matrix(a, stride_ar, stride_ak, r, K), a_desc),
                Place(row, col, BM, BN),
                Loop(BK, R, False, PRECISION),
            )
            while tl.atomic_cas(flags + pm, 1, 1, sem="acquire") == 0:
                pass
        finish_tile(
            acc,
            Matrix(y, N, 1, M, N),
            y_desc,
            Term(
                Matrix(s, r, 1, M, r),
                Matrix(b, stride_br, stride_bn, r, N),
                Mask(None, 0, 1.0, 0),
                Ranks(R, 1, HIGH, PRECISION),
            ),
            bias,
            Place(row, col, BM, BN),
            STRIPS,
        )
        tile = tl.atomic_add(flags + tiles_m, 1, sem="relaxed")


def flag(
    x: Tensor,
    base: Dense,
    pair: tuple[Tensor, Tensor],
    scale: tuple[float, float],
    fields: tiles.Fields = None,
) -> tuple[Tensor, Tensor]:
    """(y, s): x [M,K], base.weight [N,K], and of the pair A [r,K] and B [N,r], all in x's dtype;
    scale as `scaling.split` gives it."""
    (weight, bias, _), (a, b) = base, pair
    (M, K), N, r = x.shape, weight.shape[0], a.shape[0]
    y, s = x.new_empty(M, N), x.new_empty(M, r)
    device = target(x.device)
    tma = (
        device.has_wide_tiles
        and x.element_size() == 2
        and all(has_tma_rows(matrix) for matrix in (x, weight, a, y))
    )
    tile = tiles.flag(device, x.dtype, M, N, r, tma)
    if tma:
        tile = tiles.replaced(tile, fields)
    rows, columns = tiles.cdiv(M, tile.bm), tiles.cdiv(N, tile.bn)
    # Cleared by a kernel of its own in this stream, so that a graph replay finds zeros too.
    flags = torch.zeros(rows + 1, dtype=torch.int32, device=x.device)
    launch(
        flag_kernel, (min(rows * columns, device.sms),),
        x, weight, a, b, None if bias is None else bias.contiguous(), s, y, flags,
        M, N, K, r, scale[0], *x.stride(), *weight.stride(), *a.stride(), *b.t().stride(),
        R=tiles.dual_rank(r), BM=tile.bm, BN=tile.bn, BK=tile.bk, GROUP=tile.group,
        STRIPS=tile.strips, TMA=tma, HIGH=scale[1], PRECISION=fp32_precision(),
        num_warps=tile.warps, num_stages=tile.stages, descriptors=tma,
    )  # fmt: skip
    return y, s
