"""Forward in one launch, every program recomputes s beside its tile of y."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from lora_kernels.backends.cuda import needs
from lora_kernels.backends.cuda.plan import Call, Fields, Launch, Pass, Tiles
from lora_kernels.backends.cuda.plans import shrink_gemm
from lora_kernels.backends.device import Target
from lora_kernels.backends.scaling import split
from lora_kernels.backends.triton.tiles import DualTile, fields_of
from lora_kernels.branch import Branch, Dense


def _forward(
    base: Dense, x: Tensor, branch: Branch, save_s: bool, tiles: Tiles
) -> tuple[Tensor, Tensor | None]:
    from lora_kernels.backends.triton import dropout
    from lora_kernels.backends.triton.branch import adapters, unpadded
    from lora_kernels.backends.triton.dual import dual

    base = base._replace(weight=base.weight.to(x.dtype))
    pair, scale = adapters(x, branch), split(branch.scaling, x.dtype)
    drop, fields = dropout.of(branch.dropout_p, branch.seed), tiles.get("dual")
    y, s = dual(x, base, pair, scale, save_s, drop, fields)
    return y, unpadded(s, branch) if save_s else None


def one_block(call: Call) -> int:
    """One block holds s; a masked x on its way to two products would stall the one by the
    weight."""
    return 32 if call.dropout or call.dtype == "float32" else 128


def _tiles(target: Target, M: int, r: int, masked: bool) -> tuple[DualTile, ...]:
    if M <= 16:
        deep = (DualTile(16, 32, 256, 4, 4),) if r <= 32 else ()
        fits = r <= 32 or target.shared >= 151_552
        narrow = (DualTile(16, 32, 128, 5, 4),) if fits else ()
        return (*deep, DualTile(16, 64, 128, 5, 4), *narrow) if r <= 64 else ()
    if M <= 64:
        return () if masked or r > 64 else (DualTile(64, 64, 128, 4, 4),)
    if not target.has_wide_tiles:
        return ()
    return (DualTile(128, 128, 64, 4, 8), DualTile(128, 256, 64, 3, 8))


def _variants(call: Call, target: Target) -> Iterator[Fields]:
    yield from map(fields_of, _tiles(target, call.M, call.r, call.dropout))
    if call.M <= 16 or (call.M <= 64 and not call.dropout):
        yield from ({"split": split} for split in (2, 4) if 512 * split <= call.K)


PLAN = replace(
    shrink_gemm.PLAN,
    name="dual",
    summary="the kernel of decode with larger tiles, for small N",
    forward=Pass(
        _forward,
        (Launch("dual", DualTile, _variants),),
        most_rank=one_block,
        needs=needs.triton,
    ),
)
