"""As shrink_gemm, but backward makes dx and dA in one launch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from lora_kernels.backends.cuda import needs
from lora_kernels.backends.cuda.launches import GRADIENTS
from lora_kernels.backends.cuda.plan import Call, Fields, Launch, Pass, Tiles
from lora_kernels.backends.cuda.plans import shrink_gemm
from lora_kernels.backends.device import Target
from lora_kernels.backends.reference import Gradients
from lora_kernels.backends.triton.tiles import GemmTile, fields_of
from lora_kernels.branch import Base, Branch, Dense, Need


def _backward(
    base: Base, dy: Tensor, x: Tensor, s: Tensor, branch: Branch, need: Need, tiles: Tiles
) -> Gradients:
    if not need.a:
        return shrink_gemm.PLAN.backward.run(base, dy, x, s, branch, need, tiles)
    from lora_kernels.backends.triton import dropout
    from lora_kernels.backends.triton.branch import gradients, weight_gradient
    from lora_kernels.backends.triton.grouped import dx_da
    from lora_kernels.backends.triton.low_rank import LowRank

    assert isinstance(base, Dense)
    weight = base.weight

    def product(ds: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        term = LowRank(ds, a, dropout=dropout.of(branch.dropout_p, branch.seed))
        fields = tiles.get("dx_da"), tiles.get("da")
        return dx_da(dy, weight.to(dy.dtype), term, x, branch.lora_a.dtype, *fields)

    dx, d_a, d_b = gradients(dy, x, s, branch, need, product, tiles)
    return dx, weight_gradient(base, dy, x, need), d_a, d_b


def _tiles(target: Target, M: int, r: int, masked: bool) -> tuple[GemmTile, ...]:
    if M <= 512:
        return ()
    if not target.has_wide_tiles:
        return (GemmTile(128, 128, 64, 3, 8),)
    tiles: tuple[GemmTile, ...] = (GemmTile(128, 128, 64, 3, 8), GemmTile(128, 128, 64, 4, 8))
    if not masked:
        tiles += (GemmTile(256, 128, 64, 3, 8, 2),)
        tiles += (GemmTile(128, 256, 64, 3, 8, 2),) if r <= 64 else ()
    return tiles


def _variants(call: Call, target: Target) -> Iterator[Fields]:
    for tile in _tiles(target, call.M, call.r, call.dropout):
        yield fields_of(tile._replace(strips=tile.bn // 64) if call.dropout else tile)


PLAN = replace(
    shrink_gemm.PLAN,
    name="grouped",
    summary="as shrink_gemm, but backward makes dx and dA in one launch",
    cooperates=True,
    backward=Pass(
        _backward, (*GRADIENTS, Launch("dx_da", GemmTile, _variants)), needs=needs.triton
    ),
)
