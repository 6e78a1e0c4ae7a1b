"""Forward in one launch: the tiles of column 0 compute s for the others. No dropout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from lora_kernels.backends.cuda import needs
from lora_kernels.backends.cuda.plan import Call, Fields, Launch, Pass, Tiles
from lora_kernels.backends.cuda.plans import shrink_gemm
from lora_kernels.backends.cuda.plans.dual import one_block
from lora_kernels.backends.device import Target
from lora_kernels.backends.scaling import split
from lora_kernels.backends.triton.tiles import GemmTile, fields_of
from lora_kernels.branch import Branch, Dense


def _forward(
    base: Dense, x: Tensor, branch: Branch, save_s: bool, tiles: Tiles
) -> tuple[Tensor, Tensor | None]:
    from lora_kernels.backends.triton.branch import adapters, unpadded
    from lora_kernels.backends.triton.flag import flag

    base = base._replace(weight=base.weight.to(x.dtype))
    scale = split(branch.scaling, x.dtype)
    y, s = flag(x, base, adapters(x, branch), scale, tiles.get("flag"))
    return y, unpadded(s, branch) if save_s else None


def _tiles(target: Target, M: int, r: int) -> tuple[GemmTile, ...]:
    if not target.has_wide_tiles or M <= 64:
        return ()
    wide = () if r > 64 else (GemmTile(128, 256, 64, 3, 8, 2),)
    return (*wide, GemmTile(128, 128, 64, 4, 8, 2), GemmTile(64, 128, 64, 3, 4, 2))


def _variants(call: Call, target: Target) -> Iterator[Fields]:
    return map(fields_of, _tiles(target, call.M, call.r))


PLAN = replace(
    shrink_gemm.PLAN,
    name="flag",
    summary="forward in one launch, the tiles of column 0 compute s for the others; no dropout",
    cooperates=True,
    forward=Pass(
        _forward,
        (Launch("flag", GemmTile, _variants),),
        most_rank=one_block,
        dropout=False,
        needs=needs.triton,
    ),
)
