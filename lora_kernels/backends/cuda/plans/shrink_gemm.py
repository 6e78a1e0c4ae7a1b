"""The GEMM in Triton, the low-rank term one more step into its accumulator."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from lora_kernels.backends.cuda import needs
from lora_kernels.backends.cuda.launches import GRADIENTS, SHRINK
from lora_kernels.backends.cuda.plan import Call, Fields, Launch, Pass, Tiles
from lora_kernels.backends.cuda.plans import cublas
from lora_kernels.backends.device import Target
from lora_kernels.backends.reference import Gradients
from lora_kernels.backends.scaling import split
from lora_kernels.backends.triton.tiles import GemmTile, fields_of, row_block
from lora_kernels.branch import Base, Branch, Dense, Need


def _forward(
    base: Dense, x: Tensor, branch: Branch, save_s: bool, tiles: Tiles
) -> tuple[Tensor, Tensor | None]:
    from lora_kernels.backends.triton import dropout
    from lora_kernels.backends.triton.branch import adapters, unpadded
    from lora_kernels.backends.triton.gemm import gemm
    from lora_kernels.backends.triton.low_rank import LowRank, shrink

    a, b = adapters(x, branch)
    low, high = split(branch.scaling, x.dtype)
    fields = tiles.get("gemm")
    held: list[Tensor] | None = [] if fields and fields.get("pdl") else None
    drop = dropout.of(branch.dropout_p, branch.seed)
    s = shrink(x, a, low, drop, tiles.get("shrink"), held)
    weight, term = base.weight.to(x.dtype).t(), LowRank(s, b.t(), high)
    y = gemm(x, weight, term, base.bias, fields)
    return y, unpadded(s, branch) if save_s else None


def _backward(
    base: Base, dy: Tensor, x: Tensor, s: Tensor, branch: Branch, need: Need, tiles: Tiles
) -> Gradients:
    from lora_kernels.backends.triton import dropout
    from lora_kernels.backends.triton.branch import gradients, weight_gradient
    from lora_kernels.backends.triton.gemm import gemm
    from lora_kernels.backends.triton.low_rank import LowRank

    assert isinstance(base, Dense)
    weight = base.weight

    def product(ds: Tensor, a: Tensor) -> tuple[Tensor, None]:
        term = LowRank(ds, a, dropout=dropout.of(branch.dropout_p, branch.seed))
        return gemm(dy, weight.to(dy.dtype), term, fields=tiles.get("dx")), None

    dx, d_a, d_b = gradients(dy, x, s, branch, need, product, tiles)
    return dx, weight_gradient(base, dy, x, need), d_a, d_b


def _tiles(target: Target, M: int, r: int, masked: bool) -> tuple[GemmTile, ...]:
    """Configurations of an aligned 16-bit GEMM, widest first. A masked term needs registers of its
    own and leaves room for fewer of them."""
    if M <= 64:
        tiles = tuple(GemmTile(row_block(M, 64), bn, 64, 4, 4) for bn in (64, 128))
        return tiles[:1] if masked else tiles
    few: tuple[GemmTile, ...]
    wide: tuple[GemmTile, ...]
    if not target.has_wide_tiles:
        few = (GemmTile(64, 128, 64, 4, 4), GemmTile(128, 64, 32, 4, 8))
        return (
            few if M <= 512 else (GemmTile(128, 128, 32, 4, 8), GemmTile(128, 128, 64, 3, 8), *few)
        )
    few = (GemmTile(128, 128, 64, 3, 8), GemmTile(128, 128, 64, 4, 8))
    wide = (GemmTile(128, 256, 64, 3, 8, 2), GemmTile(128, 256, 64, 4, 8, 4))
    if not masked:
        few += (GemmTile(64, 128, 64, 4, 4), GemmTile(64, 128, 64, 5, 4))
        few += (GemmTile(64, 256, 64, 4, 4, 4),) if r <= 64 else ()
        wide += (GemmTile(256, 128, 64, 3, 8, 2), GemmTile(128, 128, 64, 5, 4, 2))
    return few if M <= 512 else wide + few


def _ahead(target: Target, call: Call, masked: bool) -> Iterator[GemmTile]:
    """The widest tile with loads that begin earlier, for which ranks of one block leave room."""
    if not target.has_wide_tiles or masked or call.M <= 512 or call.r > 64:
        return
    wide = GemmTile(128, 256, 64, 3, 8, 2)
    yield wide._replace(early=1)
    if target.is_hopper:
        yield wide._replace(flatten=1)


def _variants(call: Call, target: Target) -> Iterator[Fields]:
    yield from map(fields_of, _tiles(target, call.M, call.r, masked=False))
    yield from map(fields_of, _ahead(target, call, masked=False))
    if target.has_wide_tiles:
        yield {"pdl": 1}


def _variants_dx(call: Call, target: Target) -> Iterator[Fields]:
    for tile in _tiles(target, call.M, call.r, call.dropout):
        yield fields_of(tile._replace(strips=tile.bn // 64) if call.dropout else tile)
    yield from map(fields_of, _ahead(target, call, call.dropout))


PLAN = replace(  # on a given base output there is no GEMM
    cublas.PLAN,
    name="shrink_gemm",
    summary="the GEMM in Triton, the low-rank term one more step into its accumulator",
    forward=Pass(_forward, (SHRINK, Launch("gemm", GemmTile, _variants)), needs=needs.triton),
    backward=Pass(
        _backward, (*GRADIENTS, Launch("dx", GemmTile, _variants_dx)), needs=needs.triton
    ),
)
