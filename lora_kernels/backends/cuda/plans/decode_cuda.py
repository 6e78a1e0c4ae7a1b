"""Forward in one launch of compiled CUDA, for a few rows; the rest is ATen's, so that the plan
works without Triton.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from lora_kernels.backends.cuda.plan import Call, Fields, Launch, Pass, Tiles
from lora_kernels.backends.cuda.plans import aten
from lora_kernels.backends.device import Target, target
from lora_kernels.backends.native import decode
from lora_kernels.backends.native.decode import DecodeTile
from lora_kernels.backends.scaling import split
from lora_kernels.branch import Branch, Dense


def analytic(target: Target, N: int, r: int) -> DecodeTile:
    """Blocks of 32 rows read x and A half as often as those of 16; there must be enough of them.
    Before sm_90 there are no clusters and, on some devices, half the shared memory."""
    if target.arch < 90:
        return DecodeTile(16, 4, 1)
    rows = 32 if 2 * target.sms <= -(N // -32) else 16
    return DecodeTile(rows, 8, 8 if r > 16 else 4)


def _forward(
    base: Dense, x: Tensor, branch: Branch, save_s: bool, tiles: Tiles
) -> tuple[Tensor, Tensor | None]:
    base = base._replace(weight=base.weight.to(x.dtype))
    pair = branch.lora_a, branch.lora_b
    tile = analytic(target(x.device), pair[1].shape[0], pair[0].shape[0])
    fields = tiles.get("decode_cuda")
    if fields:
        tile = tile._replace(**fields)
    scale = split(branch.scaling, x.dtype)
    y, s = decode.decode(x, base, pair, scale, save_s, tile)
    return y, s if save_s else None


def _tiles(target: Target) -> Iterator[DecodeTile]:
    for rows in (16, 32):
        if target.arch < 90:
            yield DecodeTile(rows, 4, 1)
        else:
            yield from (DecodeTile(rows, 8, cluster) for cluster in (1, 2, 4, 8))
            yield DecodeTile(rows, 4, 4)


def _variants(call: Call, target: Target) -> Iterator[Fields]:
    return (tile._asdict() for tile in _tiles(target))


def _needs(call: Call) -> str | None:
    if call.K % 8 or not call.readable:
        return (
            "the plan serves x, weight and lora_a with contiguous rows of a multiple of 8 elements"
            f" that start at multiples of 16 bytes, got others (K = {call.K})"
        )
    return decode.why_absent()


PLAN = replace(
    aten.PLAN,
    name="decode_cuda",
    summary="forward in one launch, compiled CUDA, for M <= 16 in 16 bits; no dropout",
    cooperates=True,
    forward=Pass(
        _forward,
        (Launch("decode_cuda", DecodeTile, _variants),),
        dtypes=("float16", "bfloat16"),
        most_rows=decode.MAX_ROWS,
        dropout=False,
        needs=_needs,
    ),
)
