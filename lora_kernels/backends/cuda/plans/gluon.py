"""As shrink_gemm, but the GEMM has warps that only load, for Hopper; written in Gluon."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from lora_kernels.backends.cuda import needs
from lora_kernels.backends.cuda.launches import GRADIENTS, SHRINK
from lora_kernels.backends.cuda.plan import Call, Fields, Launch, Pass, Tiles
from lora_kernels.backends.cuda.plans import shrink_gemm
from lora_kernels.backends.device import Target
from lora_kernels.backends.reference import Gradients
from lora_kernels.backends.scaling import split
from lora_kernels.backends.triton.tiles import GemmTile, fields_of
from lora_kernels.branch import Base, Branch, Dense, Need

_SHARED_BYTES = 232_448  # what a block may have on Hopper


def _forward(
    base: Dense, x: Tensor, branch: Branch, save_s: bool, tiles: Tiles
) -> tuple[Tensor, Tensor | None]:
    from lora_kernels.backends.triton import dropout
    from lora_kernels.backends.triton.branch import adapters, unpadded
    from lora_kernels.backends.triton.low_rank import LowRank, shrink
    from lora_kernels.backends.triton.specialised import multiply

    a, b = adapters(x, branch)
    low, _ = split(branch.scaling, x.dtype)
    s = shrink(x, a, low, dropout.of(branch.dropout_p, branch.seed), tiles.get("shrink"))
    weight, term = base.weight.to(x.dtype).t(), LowRank(s, b.t())
    y = multiply(x, weight, term, base.bias, tiles.get("gemm"))
    return y, unpadded(s, branch) if save_s else None


def _backward(
    base: Base, dy: Tensor, x: Tensor, s: Tensor, branch: Branch, need: Need, tiles: Tiles
) -> Gradients:
    if branch.dropout_p:  # its low-rank term is masked, which this GEMM cannot
        return shrink_gemm.PLAN.backward.run(base, dy, x, s, branch, need, tiles)
    from lora_kernels.backends.triton.branch import gradients, weight_gradient
    from lora_kernels.backends.triton.low_rank import LowRank
    from lora_kernels.backends.triton.specialised import multiply

    assert isinstance(base, Dense)
    weight = base.weight

    def product(ds: Tensor, a: Tensor) -> tuple[Tensor, None]:
        return multiply(dy, weight.to(dy.dtype), LowRank(ds, a), fields=tiles.get("dx")), None

    dx, d_a, d_b = gradients(dy, x, s, branch, need, product, tiles)
    return dx, weight_gradient(base, dy, x, need), d_a, d_b


def _fits(tile: GemmTile) -> bool:
    """At every rank: up to 16 its factors have a buffer beside the ring."""
    ring = (tile.bm + tile.bn) * (tile.stages * tile.bk + 16)
    return 2 * (ring + tile.bm * tile.bn // tile.strips) + 512 <= _SHARED_BYTES


def _variants(call: Call, target: Target) -> Iterator[Fields]:
    if not target.is_hopper or call.M <= 128:
        return
    listed = (
        *(GemmTile(128, 256, 64, stages, 8, strips) for stages in (3, 4) for strips in (1, 2, 4)),
        *(GemmTile(128, 128, 64, stages, 8) for stages in (4, 5)),
    )
    yield from (fields_of(tile) for tile in listed if _fits(tile))
    if call.M > 512 and needs.has_clusters():
        for stages, strips in ((3, 1), (4, 4)):
            yield fields_of(GemmTile(128, 256, 64, stages, 8, strips, cluster=2))


def _variants_dx(call: Call, target: Target) -> Iterator[Fields]:
    return iter(()) if call.dropout else _variants(call, target)


PLAN = replace(
    shrink_gemm.PLAN,
    name="gluon",
    summary="as shrink_gemm, but the GEMM has warps that only load, for Hopper; written in Gluon",
    forward=Pass(
        _forward,
        (SHRINK, Launch("gemm", GemmTile, _variants)),
        dtypes=("bfloat16",),
        needs=needs.gluon,
    ),
    backward=Pass(
        _backward,
        (*GRADIENTS, Launch("dx", GemmTile, _variants_dx)),
        dtypes=("bfloat16",),
        needs=needs.gluon,
    ),
)
