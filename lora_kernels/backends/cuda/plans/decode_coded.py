"""Forward of a few rows on a quantised weight in one launch, which decodes as it multiplies."""

from __future__ import annotations

from torch import Tensor

from lora_kernels.backends.cuda import needs
from lora_kernels.backends.cuda.plan import Call, Coded, Pass, Plan, Tiles
from lora_kernels.backends.scaling import split
from lora_kernels.branch import Branch
from lora_kernels.weights import FOUR_BIT

_MOST_RANKS = 64  # each program recomputes s, of all ranks at once


def _coded(
    base: Coded, x: Tensor, branch: Branch, save_s: bool, tiles: Tiles
) -> tuple[Tensor, Tensor | None]:
    from lora_kernels.backends.triton import decoding, dropout

    pair = branch.lora_a.to(x.dtype), branch.lora_b.to(x.dtype)
    scale = split(branch.scaling, x.dtype)
    dropped = dropout.of(branch.dropout_p, branch.seed)
    y, s = decoding.multiply(x, base.weight, base.bias, pair, scale, save_s, dropped)
    return y, s if save_s else None


def _needs(call: Call) -> str | None:
    if call.weight in FOUR_BIT and call.K % 2:
        return f"the plan serves 4 bits in an even number of columns, got K = {call.K}"
    return needs.triton(call)


PLAN = Plan(
    name="decode_coded",
    summary="quantised weights: forward in one launch for M <= 64, which decodes as it multiplies",
    forward=None,  # type: ignore[arg-type]  # of dense weights, as the next: see `Plan`
    backward=None,  # type: ignore[arg-type]
    coded=Pass(_coded, most_rows=64, most_rank=lambda call: _MOST_RANKS, needs=_needs),
)
