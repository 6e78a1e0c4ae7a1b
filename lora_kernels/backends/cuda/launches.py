"""The rank-sized launches, which several plans share."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from lora_kernels.backends.cuda.plan import Call, Fields, Launch
from lora_kernels.backends.device import Target
from lora_kernels.backends.triton.tiles import ExpandTile, LowRankTile, fuses_ds_db

Variants = Callable[[Call, Target], Iterator[Fields]]


def _low_rank(extent: str, *others: Fields) -> Variants:
    """Shares of a reduction over M, N or K, and other fields."""

    def variants(call: Call, target: Target) -> Iterator[Fields]:
        length = getattr(call, extent)
        yield from ({"split": split} for split in (1, 2, 4, 8) if length >= 512 * split)
        yield from others

    return variants


def _ds_db(call: Call, target: Target) -> Iterator[Fields]:
    """Also shares between powers of two: of a number of row tiles one of these fills most of one
    wave of programs, where the analytic share may begin a second for a few."""
    yield from ({"split": split} for split in (1, 2, 3, 4, 5, 6, 8) if 512 * split <= call.N)
    yield {"bm": 64}


def _expand(call: Call, target: Target) -> Iterator[Fields]:
    yield from ({"bn": 64}, {"bm": 32}, {"bm": 128, "warps": 8})


def _fused(call: Call) -> bool:
    return fuses_ds_db(getattr(torch, call.dtype), call.r)


def _unfused(call: Call) -> bool:
    return not _fused(call)


_TALL = {"bm": 128, "bk": 64}
SHRINK = Launch("shrink", LowRankTile, _low_rank("K", {"bm": 32}, {"bk": 64}))
EXPAND = Launch("expand", ExpandTile, _expand)
EXPAND_DX = Launch("expand_dx", ExpandTile, _expand)
DA = Launch("da", LowRankTile, _low_rank("M", _TALL))
# ds and dB from one pass over dy where the rank allows it, else by a launch each.
GRADIENTS = (
    Launch("ds_db", LowRankTile, _ds_db, _fused),
    Launch("ds", LowRankTile, _low_rank("N", {"bm": 32}, {"bk": 64}), _unfused),
    Launch("db", LowRankTile, _low_rank("M", _TALL), _unfused),
    DA,
)
