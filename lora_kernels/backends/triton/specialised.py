"""The GEMM with a low-rank step for Hopper, its warps specialised: one loads, eight multiply.

The loading warp runs ahead by a ring of tiles, across the tiles of the output too, so that the
tensor cores wait neither for memory nor for the end of a tile. Up to rank 16 the low-rank factors
have a buffer of their own and the last step multiplies 16 columns; above they pass through the ring
as one more step of the reduction.

Written in Gluon, Triton's language of layouts and barriers; after Triton's own tutorials on warp
specialisation and persistence. Nothing here runs in the interpreter.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from lora_kernels.backends.device import Target, target
from lora_kernels.backends.triton import gemm, tiles
from lora_kernels.backends.triton.launch import INTERPRETED, launch
from lora_kernels.backends.triton.low_rank import LowRank

SEPARATE_RANK = 16  # up to here low and its matrix have buffers of their own


@gluon.jit
def _order(tile, tiles_m, tiles_n, GROUP: gl.constexpr):
    """As `blocks.tile_order`."""
    per_group = GROUP * tiles_n
    first = (tile // per_group) * GROUP
    rows = gl.minimum(tiles_m - first, GROUP)
    inside = tile % per_group
    return first + inside % rows, inside // rows


@gluon.jit
def _copy_right(desc, step, col, bar, buffer, BLOCK: gl.constexpr, NT: gl.constexpr):
    """The tile of a right operand, stored [columns, reduction] (NT) or [reduction, columns]."""
    if NT:
        tma.async_copy_global_to_shared(desc, [col, step * BLOCK], bar, buffer)
    else:
        tma.async_copy_global_to_shared(desc, [step * BLOCK, col], bar, buffer)


@gluon.jit
def _right(buffer, NT: gl.constexpr):
    return buffer.permute((1, 0)) if NT else buffer


@gluon.jit
def _load_pair(
    x_desc, mat_desc, row, col, step, slot, xs, mats, full, NT: gl.constexpr, BYTES: gl.constexpr,
    BK: gl.constexpr,
):  # fmt: skip
    bar = full.index(slot)
    mbarrier.expect(bar, BYTES)
    tma.async_copy_global_to_shared(x_desc, [row, step * BK], bar, xs.index(slot))
    _copy_right(mat_desc, step, col, bar, mats.index(slot), BK, NT)


@gluon.jit
def _loader(
    x_desc, mat_desc, low_desc, low_mat_desc, xs, mats, low, low_mat, bars, tiles_m, tiles_n, steps,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, R: gl.constexpr, RANKS: gl.constexpr,
    STAGES: gl.constexpr, GROUP: gl.constexpr, NT: gl.constexpr, SMS: gl.constexpr,
):  # fmt: skip
    empty, full, low_empty, low_full = bars
    BYTES: gl.constexpr = (BM + BN) * BK * 2
    i, done = 0, 0
    for tile in range(gl.program_id(0), tiles_m * tiles_n, SMS):
        pm, pn = _order(tile, tiles_m, tiles_n, GROUP)
        row, col = pm * BM, pn * BN
        if R < BK:
            mbarrier.wait(low_empty, (done & 1) ^ 1)
            mbarrier.expect(low_full, (BM + BN) * R * 2)
            tma.async_copy_global_to_shared(low_desc, [row, 0], low_full, low)
            _copy_right(low_mat_desc, 0, col, low_full, low_mat, R, NT)
            done += 1
        for step in range(steps):
            slot = i % STAGES
            mbarrier.wait(empty.index(slot), ((i // STAGES) & 1) ^ 1)
            _load_pair(x_desc, mat_desc, row, col, step, slot, xs, mats, full, NT, BYTES, BK)
            i += 1
        if R == BK:
            for step in gl.static_range(RANKS):
                slot = i % STAGES
                mbarrier.wait(empty.index(slot), ((i // STAGES) & 1) ^ 1)
                _load_pair(
                    low_desc, low_mat_desc, row, col, step, slot, xs, mats, full, NT, BYTES, BK
                )
                i += 1


@gluon.jit
def _store(acc, out_desc, row, col, staged, BM: gl.constexpr, BN: gl.constexpr,
           STRIPS: gl.constexpr):  # fmt: skip
    """The tile through one buffer, in strips of columns one after the other."""
    if STRIPS > 1:
        left, right = acc.reshape([BM, 2, BN // 2]).permute([0, 2, 1]).split()
        _store(left, out_desc, row, col, staged, BM, BN // 2, STRIPS // 2)
        _store(right, out_desc, row, col + BN // 2, staged, BM, BN // 2, STRIPS // 2)
    else:
        tma.store_wait(0)
        staged.store(acc.to(staged.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(out_desc, [row, col], staged)


@gluon.jit
def _multiplier(
    out_desc, bias, xs, mats, low, low_mat, staged, bars, N, tiles_m, tiles_n, steps,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, R: gl.constexpr, RANKS: gl.constexpr,
    STAGES: gl.constexpr, GROUP: gl.constexpr, NT: gl.constexpr, SMS: gl.constexpr,
    STRIPS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    empty, full, low_empty, low_full = bars
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BN, 16])
    total = steps + (RANKS if R == BK else 0)
    i, done = 0, 0
    for tile in range(gl.program_id(0), tiles_m * tiles_n, SMS):
        pm, pn = _order(tile, tiles_m, tiles_n, GROUP)
        acc = gl.zeros((BM, BN), gl.float32, layout)
        slot = i % STAGES
        mbarrier.wait(full.index(slot), (i // STAGES) & 1)
        token = warpgroup_mma(xs.index(slot), _right(mats.index(slot), NT), acc, is_async=True)
        i += 1
        for _ in range(1, total):
            slot = i % STAGES
            mbarrier.wait(full.index(slot), (i // STAGES) & 1)
            token = warpgroup_mma(
                xs.index(slot), _right(mats.index(slot), NT), token, is_async=True
            )
            token = warpgroup_mma_init(warpgroup_mma_wait(1, deps=(token,)))
            mbarrier.arrive(empty.index((i - 1) % STAGES), count=1)
            i += 1
        if R < BK:
            mbarrier.wait(low_full, done & 1)
            token = warpgroup_mma(low, _right(low_mat, NT), token, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(token,))
            mbarrier.arrive(low_empty, count=1)
            done += 1
        else:
            acc = warpgroup_mma_wait(0, deps=(token,))
        mbarrier.arrive(empty.index((i - 1) % STAGES), count=1)
        if bias is not None:
            cols = pn * BN + gl.arange(0, BN, layout=gl.SliceLayout(0, layout))
            values = gl.load(bias + cols, mask=cols < N, other=0.0)
            acc += gl.expand_dims(values.to(staged.dtype).to(gl.float32), 0)
        _store(acc, out_desc, pm * BM, pn * BN, staged, BM, BN, STRIPS)
    tma.store_wait(0)


@gluon.jit
def _right_descriptor(
    mat, red, cols, stride, RED: gl.constexpr, COLS: gl.constexpr, NT: gl.constexpr
):  # fmt: skip
    if NT:
        layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([COLS, RED], gl.bfloat16)
        desc = tma.make_tensor_descriptor(mat, [cols, red], [stride, 1], [COLS, RED], layout)
    else:
        layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([RED, COLS], gl.bfloat16)
        desc = tma.make_tensor_descriptor(mat, [red, cols], [stride, 1], [RED, COLS], layout)
    return desc


@gluon.jit
def _right_buffers(
    COUNT: gl.constexpr, RED: gl.constexpr, COLS: gl.constexpr, NT: gl.constexpr
):  # fmt: skip
    if NT:
        layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([COLS, RED], gl.bfloat16)
        found = gl.allocate_shared_memory(gl.bfloat16, [COUNT, COLS, RED], layout)
    else:
        layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([RED, COLS], gl.bfloat16)
        found = gl.allocate_shared_memory(gl.bfloat16, [COUNT, RED, COLS], layout)
    return found


@gluon.jit(do_not_specialize=["M"])
def specialised_gemm_kernel(
    x, mat, low, low_mat, bias, out, M, N, K, r, stride_xm, stride_w, stride_lm,
    R: gl.constexpr, RANKS: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
    STAGES: gl.constexpr, GROUP: gl.constexpr, NT: gl.constexpr, STRIPS: gl.constexpr,
    SMS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """out = x @ mat + low @ low_mat + bias, all in bf16; descriptors read zeros past the ends."""
    x_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, BK], gl.bfloat16)
    low_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, R], gl.bfloat16)
    STRIP: gl.constexpr = BN // STRIPS
    out_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, STRIP], gl.bfloat16)
    x_desc = tma.make_tensor_descriptor(x, [M, K], [stride_xm, 1], [BM, BK], x_layout)
    mat_desc = _right_descriptor(mat, K, N, stride_w, BK, BN, NT)
    low_desc = tma.make_tensor_descriptor(low, [M, r], [r, 1], [BM, R], low_layout)
    low_mat_desc = _right_descriptor(low_mat, r, N, stride_lm, R, BN, NT)
    out_desc = tma.make_tensor_descriptor(out, [M, N], [N, 1], [BM, STRIP], out_layout)

    xs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BM, BK], x_layout)
    mats = _right_buffers(STAGES, BK, BN, NT)
    staged = gl.allocate_shared_memory(gl.bfloat16, [BM, STRIP], out_layout)
    if R < BK:
        low_tile = gl.allocate_shared_memory(gl.bfloat16, [BM, R], low_layout)
        low_mat_tile = _right_buffers(1, R, BN, NT).index(0)
    else:  # through the ring
        low_tile, low_mat_tile = xs.index(0), mats.index(0)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    lows = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(empty.index(slot), count=1)
        mbarrier.init(full.index(slot), count=1)
    for slot in gl.static_range(2):
        mbarrier.init(lows.index(slot), count=1)
    fence_async_shared()
    bars = empty, full, lows.index(0), lows.index(1)
    tiles_m, tiles_n = gl.cdiv(M, BM), gl.cdiv(N, BN)
    steps = gl.maximum(gl.cdiv(K, BK), 1)
    gl.warp_specialize([
        (_multiplier, (
            out_desc, bias, xs, mats, low_tile, low_mat_tile, staged, bars, N, tiles_m, tiles_n,
            steps, BM, BN, BK, R, RANKS, STAGES, GROUP, NT, SMS, STRIPS, num_warps,
        )),
        (_loader, (
            x_desc, mat_desc, low_desc, low_mat_desc, xs, mats, low_tile, low_mat_tile, bars,
            tiles_m, tiles_n, steps, BM, BN, BK, R, RANKS, STAGES, GROUP, NT, SMS,
        )),
    ], [1], [24])  # fmt: skip


def serves(x: Tensor, mat: Tensor, term: LowRank, device: Target) -> bool:
    """Whether a product is for this kernel: bf16 on Hopper, everything as TMA wants it."""
    low, low_mat, high, dropout = term
    if INTERPRETED or not device.is_hopper or x.dtype != torch.bfloat16:
        return False
    if high != 1 or dropout is not None:
        return False
    right = (each.t() if each.stride(0) == 1 else each for each in (mat, low_mat))
    turned = (mat.stride(0) == 1) == (low_mat.stride(0) == 1)
    return turned and all(map(gemm.has_tma_rows, (x, low, *right)))


def multiply(
    x: Tensor,
    mat: Tensor,
    term: LowRank,
    bias: Tensor | None = None,
    fields: tiles.Fields = None,
) -> Tensor:
    """x @ mat + the term + bias as `gemm.gemm`, which serves what this kernel does not."""
    low, low_mat = term[:2]
    (M, K), N, r = x.shape, mat.shape[1], low.shape[1]
    device = target(x.device)
    out = x.new_empty(M, N)
    if not serves(x, mat, term, device) or not gemm.has_tma_rows(out):
        return gemm.gemm(x, mat, term, bias)
    tile = tiles.replaced(tiles.specialised(M, N, device), fields)
    nt = mat.stride(0) == 1
    R = SEPARATE_RANK if r <= SEPARATE_RANK else tile.bk
    programs = tiles.cdiv(M, tile.bm) * tiles.cdiv(N, tile.bn)
    launch(
        specialised_gemm_kernel, (min(programs, device.sms),),
        x, mat, low, low_mat, None if bias is None else bias.contiguous(), out, M, N, K, r,
        x.stride(0), mat.stride(1 if nt else 0), low_mat.stride(1 if nt else 0),
        R=R, RANKS=tiles.cdiv(r, R), BM=tile.bm, BN=tile.bn, BK=tile.bk, STAGES=tile.stages,
        GROUP=tile.group, NT=nt, STRIPS=tile.strips, SMS=device.sms, num_warps=tile.warps,
        descriptors=True,
    )  # fmt: skip
    return out
