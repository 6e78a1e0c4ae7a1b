"""The GEMM with a low-rank step for Hopper, its warps specialised: one loads, eight multiply.

The loading warp runs ahead by a ring of tiles, across the tiles of the output too, so that the
tensor cores wait neither for memory nor for the end of a tile. Up to rank 16 the low-rank factors
have a buffer of their own and the last step multiplies 16 columns; above they pass through the ring
as one more step of the reduction.

Two CTAs, of neighbouring rows, may form a cluster, for both of which one copy of the right operand
is loaded. A slot of the ring is filled again when both have read it: each has barriers of its own,
and of those that they share Gluon waits in the first CTA, which issues the common copies.

Written in Gluon, Triton's language of layouts and barriers; after Triton's own tutorials on warp
specialisation and persistence. Nothing here runs in the interpreter.
"""

from __future__ import annotations

import torch
import triton
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
CLUSTER = 2
_RENAMED = hasattr(tma, "async_load")  # from Triton 3.8 on; 3.9 has no other names
_load = tma.async_load if _RENAMED else tma.async_copy_global_to_shared
_write = tma.async_store if _RENAMED else tma.async_copy_shared_to_global


def why_no_cluster() -> str | None:
    """What this Triton's Gluon lacks for a cluster. That of 3.7 compiles one, but an arrival at a
    shared barrier stays in the CTA it is of: the other's slots would be filled while they are
    read."""
    if _RENAMED:
        return None
    return f"an arrival reaches the other CTA from Triton 3.8 on, this is {triton.__version__}"


@gluon.constexpr_function
def _tile_layout(block, ctas, split):
    """Of a tile in shared memory, whose rows the CTAs divide, or of which each has a copy."""
    cga = None if ctas == 1 else [[1, 0]] if split else [[0, 0]]
    return gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16, cga_layout=cga)


@gluon.constexpr_function
def _barrier_layout(ctas, shared):
    """Of barriers of which each CTA has one, or which the CTAs share."""
    return mbarrier.MBarrierLayout([] if ctas == 1 else [[0 if shared else 1]])


@gluon.constexpr_function
def _sum_layout(columns, warps, ctas):
    cga = [] if ctas == 1 else [[1, 0]]
    return gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, columns, 16], cga)


@gluon.jit
def _order(tile, tiles_m, tiles_n, GROUP: gl.constexpr):
    """As `blocks.tile_order`."""
    per_group = GROUP * tiles_n
    first = (tile // per_group) * GROUP
    rows = gl.minimum(tiles_m - first, GROUP)
    inside = tile % per_group
    return first + inside % rows, inside // rows


@gluon.jit
def _copy_right(
    desc, step, col, bar, buffer, BLOCK: gl.constexpr, NT: gl.constexpr, CTAS: gl.constexpr
):  # fmt: skip
    """The tile of a right operand, stored [columns, reduction] (NT) or [reduction, columns]."""
    place = [col, step * BLOCK] if NT else [step * BLOCK, col]
    if CTAS > 1:
        _load(desc, place, bar, buffer, multicast=True)
    else:
        _load(desc, place, bar, buffer)


@gluon.jit
def _wait_for_free(own, shared, phase, CTAS: gl.constexpr):
    mbarrier.wait(own, phase)
    if CTAS > 1:
        mbarrier.wait(shared, phase)


@gluon.jit
def _free(own, shared, CTAS: gl.constexpr):
    mbarrier.arrive(own, count=1)
    if CTAS > 1:
        mbarrier.arrive(shared, count=1)


@gluon.jit
def _right(buffer, NT: gl.constexpr):
    return buffer.permute((1, 0)) if NT else buffer


@gluon.jit
def _load_pair(
    x_desc, mat_desc, row, col, step, slot, xs, mats, full, NT: gl.constexpr, BYTES: gl.constexpr,
    BK: gl.constexpr, CTAS: gl.constexpr,
):  # fmt: skip
    bar = full.index(slot)
    mbarrier.expect(bar, BYTES)
    _load(x_desc, [row, step * BK], bar, xs.index(slot))
    _copy_right(mat_desc, step, col, bar, mats.index(slot), BK, NT, CTAS)


@gluon.jit
def _loader(
    x_desc, mat_desc, low_desc, low_mat_desc, xs, mats, low, low_mat, bars, tiles_m, tiles_n, steps,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, R: gl.constexpr, RANKS: gl.constexpr,
    STAGES: gl.constexpr, GROUP: gl.constexpr, NT: gl.constexpr, SMS: gl.constexpr,
    CTAS: gl.constexpr,
):  # fmt: skip
    empty, full, shared, low_empty, low_full, low_shared = bars
    BYTES: gl.constexpr = (BM + BN) * BK * 2
    i, done = 0, 0
    for tile in range(gl.program_id(0), tiles_m * tiles_n, SMS):
        pm, pn = _order(tile, tiles_m, tiles_n, GROUP)
        row, col = pm * BM * CTAS, pn * BN
        if R < BK:
            _wait_for_free(low_empty, low_shared, (done & 1) ^ 1, CTAS)
            mbarrier.expect(low_full, (BM + BN) * R * 2)
            _load(low_desc, [row, 0], low_full, low)
            _copy_right(low_mat_desc, 0, col, low_full, low_mat, R, NT, CTAS)
            done += 1
        for step in range(steps):
            slot = i % STAGES
            _wait_for_free(empty.index(slot), shared.index(slot), ((i // STAGES) & 1) ^ 1, CTAS)
            _load_pair(x_desc, mat_desc, row, col, step, slot, xs, mats, full, NT, BYTES, BK, CTAS)
            i += 1
        if R == BK:
            for step in gl.static_range(RANKS):
                slot = i % STAGES
                _wait_for_free(empty.index(slot), shared.index(slot), ((i // STAGES) & 1) ^ 1, CTAS)
                _load_pair(
                    low_desc, low_mat_desc, row, col, step, slot, xs, mats, full, NT, BYTES, BK,
                    CTAS,
                )  # fmt: skip
                i += 1


@gluon.jit
def _store(acc, out_desc, row, col, staged, BN: gl.constexpr, STRIPS: gl.constexpr):
    """The tile through one buffer, in strips of columns one after the other."""
    if STRIPS > 1:
        left, right = acc.reshape([acc.shape[0], 2, BN // 2]).permute([0, 2, 1]).split()
        _store(left, out_desc, row, col, staged, BN // 2, STRIPS // 2)
        _store(right, out_desc, row, col + BN // 2, staged, BN // 2, STRIPS // 2)
    else:
        tma.store_wait(0)
        staged.store(acc.to(staged.dtype))
        fence_async_shared()
        _write(out_desc, [row, col], staged)


@gluon.jit
def _multiplier(
    out_desc, bias, xs, mats, low, low_mat, staged, bars, N, tiles_m, tiles_n, steps,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, R: gl.constexpr, RANKS: gl.constexpr,
    STAGES: gl.constexpr, GROUP: gl.constexpr, NT: gl.constexpr, SMS: gl.constexpr,
    STRIPS: gl.constexpr, WARPS: gl.constexpr, CTAS: gl.constexpr,
):  # fmt: skip
    empty, full, shared, low_empty, low_full, low_shared = bars
    layout: gl.constexpr = _sum_layout(BN, WARPS, CTAS)
    total = steps + (RANKS if R == BK else 0)
    i, done = 0, 0
    for tile in range(gl.program_id(0), tiles_m * tiles_n, SMS):
        pm, pn = _order(tile, tiles_m, tiles_n, GROUP)
        acc = gl.zeros((CTAS * BM, BN), gl.float32, layout)
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
            before = (i - 1) % STAGES
            _free(empty.index(before), shared.index(before), CTAS)
            i += 1
        if R < BK:
            mbarrier.wait(low_full, done & 1)
            token = warpgroup_mma(low, _right(low_mat, NT), token, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(token,))
            _free(low_empty, low_shared, CTAS)
            done += 1
        else:
            acc = warpgroup_mma_wait(0, deps=(token,))
        last = (i - 1) % STAGES
        _free(empty.index(last), shared.index(last), CTAS)
        if bias is not None:
            cols = pn * BN + gl.arange(0, BN, layout=gl.SliceLayout(0, layout))
            values = gl.load(bias + cols, mask=cols < N, other=0.0)
            acc += gl.expand_dims(values.to(staged.dtype).to(gl.float32), 0)
        _store(acc, out_desc, pm * BM * CTAS, pn * BN, staged, BN, STRIPS)
    tma.store_wait(0)


@gluon.jit
def _right_descriptor(
    mat, red, cols, stride, RED: gl.constexpr, COLS: gl.constexpr, NT: gl.constexpr,
    CTAS: gl.constexpr,
):  # fmt: skip
    if NT:
        layout: gl.constexpr = _tile_layout([COLS, RED], CTAS, False)
        desc = tma.make_tensor_descriptor(mat, [cols, red], [stride, 1], [COLS, RED], layout)
    else:
        layout: gl.constexpr = _tile_layout([RED, COLS], CTAS, False)
        desc = tma.make_tensor_descriptor(mat, [red, cols], [stride, 1], [RED, COLS], layout)
    return desc


@gluon.jit
def _right_buffers(
    COUNT: gl.constexpr, RED: gl.constexpr, COLS: gl.constexpr, NT: gl.constexpr,
    CTAS: gl.constexpr,
):  # fmt: skip
    if NT:
        layout: gl.constexpr = _tile_layout([COLS, RED], CTAS, False)
        found = gl.allocate_shared_memory(gl.bfloat16, [COUNT, COLS, RED], layout)
    else:
        layout: gl.constexpr = _tile_layout([RED, COLS], CTAS, False)
        found = gl.allocate_shared_memory(gl.bfloat16, [COUNT, RED, COLS], layout)
    return found


@gluon.jit(do_not_specialize=["M"])
def specialised_gemm_kernel(
    x, mat, low, low_mat, bias, out, M, N, K, r, stride_xm, stride_w, stride_lm,
    R: gl.constexpr, RANKS: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
    STAGES: gl.constexpr, GROUP: gl.constexpr, NT: gl.constexpr, STRIPS: gl.constexpr,
    SMS: gl.constexpr, num_warps: gl.constexpr, num_ctas: gl.constexpr,
):  # fmt: skip
    """out = x @ mat + low @ low_mat + bias, all in bf16; descriptors read zeros past the ends."""
    ROWS: gl.constexpr = num_ctas * BM
    x_layout: gl.constexpr = _tile_layout([ROWS, BK], num_ctas, True)
    low_layout: gl.constexpr = _tile_layout([ROWS, R], num_ctas, True)
    STRIP: gl.constexpr = BN // STRIPS
    out_layout: gl.constexpr = _tile_layout([ROWS, STRIP], num_ctas, True)
    x_desc = tma.make_tensor_descriptor(x, [M, K], [stride_xm, 1], [ROWS, BK], x_layout)
    mat_desc = _right_descriptor(mat, K, N, stride_w, BK, BN, NT, num_ctas)
    low_desc = tma.make_tensor_descriptor(low, [M, r], [r, 1], [ROWS, R], low_layout)
    low_mat_desc = _right_descriptor(low_mat, r, N, stride_lm, R, BN, NT, num_ctas)
    out_desc = tma.make_tensor_descriptor(out, [M, N], [N, 1], [ROWS, STRIP], out_layout)

    xs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, ROWS, BK], x_layout)
    mats = _right_buffers(STAGES, BK, BN, NT, num_ctas)
    staged = gl.allocate_shared_memory(gl.bfloat16, [ROWS, STRIP], out_layout)
    if R < BK:
        low_tile = gl.allocate_shared_memory(gl.bfloat16, [ROWS, R], low_layout)
        low_mat_tile = _right_buffers(1, R, BN, NT, num_ctas).index(0)
    else:  # through the ring
        low_tile, low_mat_tile = xs.index(0), mats.index(0)
    own: gl.constexpr = _barrier_layout(num_ctas, False)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, num_ctas], own)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, num_ctas], own)
    lows = gl.allocate_shared_memory(gl.int64, [2, num_ctas], own)
    for slot in gl.static_range(STAGES):
        mbarrier.init(empty.index(slot), count=1)
        mbarrier.init(full.index(slot), count=1)
    for slot in gl.static_range(2):
        mbarrier.init(lows.index(slot), count=1)
    if num_ctas > 1:
        both: gl.constexpr = _barrier_layout(num_ctas, True)
        shared = gl.allocate_shared_memory(gl.int64, [STAGES, 1], both)
        low_shared = gl.allocate_shared_memory(gl.int64, [1, 1], both).index(0)
        for slot in gl.static_range(STAGES):
            mbarrier.init(shared.index(slot), count=1)
        mbarrier.init(low_shared, count=1)
    else:
        shared, low_shared = empty, lows.index(0)
    fence_async_shared()
    bars = empty, full, shared, lows.index(0), lows.index(1), low_shared
    tiles_m, tiles_n = gl.cdiv(M, ROWS), gl.cdiv(N, BN)
    steps = gl.maximum(gl.cdiv(K, BK), 1)
    gl.warp_specialize([
        (_multiplier, (
            out_desc, bias, xs, mats, low_tile, low_mat_tile, staged, bars, N, tiles_m, tiles_n,
            steps, BM, BN, BK, R, RANKS, STAGES, GROUP, NT, SMS, STRIPS, num_warps,
            num_ctas,
        )),
        (_loader, (
            x_desc, mat_desc, low_desc, low_mat_desc, xs, mats, low_tile, low_mat_tile, bars,
            tiles_m, tiles_n, steps, BM, BN, BK, R, RANKS, STAGES, GROUP, NT, SMS, num_ctas,
        )),
    ], [1], [24])  # fmt: skip
    if num_ctas > 1:  # the other may still free a slot of this one's
        gl.barrier(cluster=True)


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


def _ctas(tile: tiles.GemmTile) -> int:
    """Of a program. ValueError where the tile's cluster cannot be formed."""
    if tile.cluster in (0, 1):
        return 1
    if tile.cluster != CLUSTER:
        raise ValueError(f"cluster: got {tile.cluster}, legal are 1 and {CLUSTER}")
    absent = why_no_cluster()
    if absent is not None:
        raise ValueError(f"cluster: got {CLUSTER}, legal is 1: {absent}")
    return CLUSTER


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
    ctas = _ctas(tile)
    clusters = device.sms // ctas
    programs = tiles.cdiv(M, ctas * tile.bm) * tiles.cdiv(N, tile.bn)
    launch(
        specialised_gemm_kernel, (min(programs, clusters),),
        x, mat, low, low_mat, None if bias is None else bias.contiguous(), out, M, N, K, r,
        x.stride(0), mat.stride(1 if nt else 0), low_mat.stride(1 if nt else 0),
        R=R, RANKS=tiles.cdiv(r, R), BM=tile.bm, BN=tile.bn, BK=tile.bk, STAGES=tile.stages,
        GROUP=tile.group, NT=nt, STRIPS=tile.strips, SMS=clusters, num_warps=tile.warps,
        num_ctas=ctas, descriptors=True,
    )  # fmt: skip
    return out
