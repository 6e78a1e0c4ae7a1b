"""Several layers of one x in one launch: their outputs, x W^T + s B^T + bias each, and what their
gradients give x, the sum of dy W + ds A.

A tile of outputs belongs to one layer, which gives its matrices by address; which layer it is, is
found from how many tiles come before it. A step of the sum belongs to one likewise; there an
address that has to be loaded first would cost the loop its overlap.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
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
    add_low_rank,
    load_tile,
    loop_steps,
    multiply_add,
    store_tile,
)
from lora_kernels.backends.triton.launch import fp32_precision, launch

_WORDS: tl.constexpr = tl.constexpr(9)
# Layers whose gradients one launch sums.
MOST = 4


class Layer(NamedTuple):
    """weight [N,K] and lora_b [N,r] contiguous, as is y [M,N]; lora_b None for no branch, whose
    product is multiplied by high."""

    weight: Tensor
    lora_b: Tensor | None
    bias: Tensor | None
    y: Tensor
    high: float


@triton.jit
def word_of(table, layer, index: tl.constexpr, like):
    """An address in a layer's row of the table, as a pointer like this one."""
    pointer = tl.load(table + layer * _WORDS + index).to(like.dtype)
    return tl.multiple_of(pointer, 16)


@triton.jit
def columns_of(table, layer, ALIGNED: tl.constexpr):
    """N of a layer."""
    N = tl.load(table + layer * _WORDS + 4).to(tl.int32)
    if ALIGNED:
        N = tl.multiple_of(N, 16)
    return N


@triton.jit(do_not_specialize=["M"])
def packed_kernel(
    x, low, table, M, K, width, layers, stride_xm, stride_xk,
    LAYERS: tl.constexpr, R: tl.constexpr, RANKS: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (tile of columns of all layers, tile of rows). A row of the table is a layer's:
    weight, lora_b, bias, y, N, r, its first column of low, how many tiles end with its last, high
    as the bits of an fp32."""
    tile, row = tl.program_id(0), tl.program_id(1) * BM
    lane = tl.arange(0, LAYERS)
    ends = tl.load(table + lane * _WORDS + 7, mask=lane < layers, other=2147483647)
    layer = tl.sum((ends <= tile).to(tl.int32), 0)
    begin = tl.max(tl.where(lane < layer, ends, 0), 0)
    col = (tile - begin).to(tl.int32) * BN
    N = columns_of(table, layer, ALIGNED)
    r = tl.load(table + layer * _WORDS + 5).to(tl.int32)
    first = tl.load(table + layer * _WORDS + 6)
    weight, lora_b = word_of(table, layer, 0, x), word_of(table, layer, 1, x)
    bias, y = word_of(table, layer, 2, x), word_of(table, layer, 3, x)
    high = tl.load(table + layer * _WORDS + 8).to(tl.int32).to(tl.float32, bitcast=True)
    rows, cols = row + tl.arange(0, BM), col + tl.arange(0, BN)
    # First, so that what it is multiplied by reaches nothing else.
    acc = high * add_low_rank(
        tl.zeros((BM, BN), tl.float32),
        Term(
            Matrix(low + first, width, 1, M, r),
            Matrix(lora_b, 1, r, r, N),
            Mask(x, 0, 1.0, 0),
            Ranks(R, RANKS, 1.0, PRECISION),
        ),
        0,
        Place(row, col, BM, BN),
    )
    for i in range(loop_steps(K, BK)):
        ks = i * BK + tl.arange(0, BK)
        x_tile = load_tile(Matrix(x, stride_xm, stride_xk, M, K), rows, ks)
        weight_tile = load_tile(Matrix(weight, 1, K, K, N), ks, cols)
        acc = multiply_add(x_tile, weight_tile, acc, PRECISION)
    has_bias = tl.load(table + layer * _WORDS + 2) != 0
    acc += tl.load(bias + cols, mask=(cols < N) & has_bias, other=0.0).to(tl.float32)[None, :]
    store_tile(Matrix(y, N, 1, M, N), acc, rows, cols)


@triton.jit
def of_step(step, ends, one, two, three, four):
    """Of four values the one whose layer a step is of."""
    first, second, third = ends
    later = tl.where(step < third, three, four)
    return tl.where(step < first, one, tl.where(step < second, two, later))


@triton.jit(do_not_specialize=["M"])
def packed_dx_kernel(
    low, mat, dx, dy_1, dy_2, dy_3, dy_4, weight_1, weight_2, weight_3, weight_4,
    N_1, N_2, N_3, N_4, M, K, r,
    R: tl.constexpr, RANKS: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (tile of columns of dx, tile of rows): the sum over layers of dy W, in one loop, and
    low @ mat, [M,r] and [r,K] of all ranks. N is 0 where there is no layer."""
    col, row = tl.program_id(0) * BK, tl.program_id(1) * BM
    rows, cols = row + tl.arange(0, BM), col + tl.arange(0, BK)
    end_1 = tl.cdiv(N_1, BN)
    end_2 = end_1 + tl.cdiv(N_2, BN)
    end_3 = end_2 + tl.cdiv(N_3, BN)
    steps = end_3 + tl.cdiv(N_4, BN)
    acc = tl.zeros((BM, BK), tl.float32)
    for i in range(tl.maximum(steps, 1)):
        ends = end_1, end_2, end_3
        dy = of_step(i, ends, dy_1, dy_2, dy_3, dy_4)
        weight = of_step(i, ends, weight_1, weight_2, weight_3, weight_4)
        N = of_step(i, ends, N_1, N_2, N_3, N_4)
        ns = (i - of_step(i, ends, 0, end_1, end_2, end_3)) * BN + tl.arange(0, BN)
        dy_tile = load_tile(Matrix(dy, N, 1, M, N), rows, ns)
        weight_tile = load_tile(Matrix(weight, K, 1, N, K), ns, cols)
        acc = multiply_add(dy_tile, weight_tile, acc, PRECISION)
    acc = add_low_rank(
        acc,
        Term(
            Matrix(low, r, 1, M, r),
            Matrix(mat, K, 1, r, K),
            Mask(dx, 0, 1.0, 0),
            Ranks(R, RANKS, 1.0, PRECISION),
        ),
        0,
        Place(row, col, BM, BK),
    )
    store_tile(Matrix(dx, K, 1, M, K), acc, rows, cols)


def is_aligned(tensor: Tensor) -> bool:
    """Whether a matrix lies as the kernels read it: its rows one after the other, from a multiple
    of 16 bytes on."""
    return tensor.is_contiguous() and tensor.data_ptr() % 16 == 0


def _sizes(rows: Tensor, columns: int, aligned: bool) -> dict[str, Any]:
    """Tiles, warps and stages of a product of [M,·] rows with as many columns; aligned says whether
    loads are wide."""
    M, device = rows.shape[0], target(rows.device)
    if rows.dtype == torch.float32:
        return {"BM": tiles.row_block(M, 64), "BN": 64, "BK": 16, "num_warps": 8, "num_stages": 3}
    if not aligned:
        return {"BM": tiles.row_block(M, 64), "BN": 64, "BK": 32, "num_warps": 4, "num_stages": 3}
    wide = tiles.cdiv(M, 128) * tiles.cdiv(columns, 128) > device.sms
    bm, step = 128 if wide else tiles.row_block(M, 64), 64 if device.has_wide_tiles else 32
    return {"BM": bm, "BN": 128, "BK": step, "num_warps": 8 if wide else 4, "num_stages": 3}


def _ranks(rows: Tensor, r: int) -> int:
    """Of one step of the low-rank term."""
    return tiles.rank_block(rows.dtype, r, 64 if target(rows.device).has_wide_tiles else 32)


def _table(words: list[list[int]], device: torch.device) -> Tensor:
    return torch.tensor(words, dtype=torch.int64).to(device, non_blocking=True)


def _bits(value: float) -> int:
    """Of an fp32."""
    (bits,) = struct.unpack("<i", struct.pack("<f", value))
    return int(bits)


def packed_forward(x: Tensor, low: Tensor, layers: Sequence[Layer]) -> None:
    """y = x W^T + high * s B^T + bias of each layer, whose s are columns of low [M, all ranks]."""
    (M, K), columns = x.shape, sum(layer.weight.shape[0] for layer in layers)
    aligned = all(map(tiles.vectorises, (x, *(layer.weight for layer in layers))))
    sizes = _sizes(x, columns, aligned)
    words, first, tiles_before, most = [], 0, 0, 1
    for weight, lora_b, bias, y, high in layers:
        N, r = weight.shape[0], 0 if lora_b is None else lora_b.shape[1]
        tiles_before += tiles.cdiv(N, sizes["BN"])
        pointers = [0 if each is None else each.data_ptr() for each in (weight, lora_b, bias, y)]
        words.append([*pointers, N, r, first, tiles_before, _bits(high)])
        first, most = first + r, max(most, r)
    R = _ranks(x, most)
    meta: dict[str, Any] = {
        "LAYERS": tiles.next_power_of_2(len(layers)), "R": R, "RANKS": tiles.cdiv(most, R),
        "PRECISION": fp32_precision(), **sizes,
        "ALIGNED": all(len(layer.weight) % 16 == 0 for layer in layers),
    }  # fmt: skip
    launch(
        packed_kernel, (tiles_before, tiles.cdiv(M, sizes["BM"])),
        x, low, _table(words, x.device), M, K, low.shape[1], len(layers), *x.stride(), **meta,
    )  # fmt: skip


def packed_dx(
    dys: Sequence[Tensor], weights: Sequence[Tensor], low: Tensor, mat: Tensor, dx: Tensor
) -> None:
    """dx [M,K] = the sum of dy W, and low @ mat: low [M, all ranks], mat [all ranks, K]."""
    (M, K), aligned = dx.shape, all(map(tiles.vectorises, (*dys, *weights)))
    sizes = _sizes(dx, K, aligned)
    sizes["BN"], sizes["BK"] = sizes["BK"], sizes["BN"]
    r = low.shape[1]
    R = _ranks(dx, r)
    fill = [dys[0]] * (MOST - len(dys))
    widths = [len(weight) for weight in weights] + [0] * len(fill)
    launch(
        packed_dx_kernel, (tiles.cdiv(K, sizes["BK"]), tiles.cdiv(M, sizes["BM"])),
        low, mat, dx, *dys, *fill, *weights, *fill, *widths, M, K, r,
        R=R, RANKS=tiles.cdiv(r, R), PRECISION=fp32_precision(), **sizes,
    )  # fmt: skip
