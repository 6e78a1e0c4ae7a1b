"""Few rows on a quantised weight by one Triton launch that decodes as it multiplies.

Where it is forced: it has been interpreted and compiled for every target, not yet run on a card.
"""

from __future__ import annotations

from torch import Tensor

from lora_kernels.backends.cuda import needs
from lora_kernels.backends.scaling import split
from lora_kernels.branch import Branch
from lora_kernels.weights import QuantizedWeight

# Each program recomputes s, of all ranks at once.
_MOST_ROWS, _MOST_RANKS = 64, 64


def serves(x: Tensor, weight: QuantizedWeight, branch: Branch) -> bool:
    """Whether the kernel computes these rows x [M,K]."""
    few = 0 < x.shape[0] <= _MOST_ROWS and branch.lora_a.shape[0] <= _MOST_RANKS
    if not few or not needs.is_forced_on(x):
        return False
    from lora_kernels.backends.triton import decoding

    return decoding.decodes(weight, slice(0, weight.shape[1]), x.dtype)


def forward(
    x: Tensor, weight: QuantizedWeight, bias: Tensor | None, branch: Branch, save_s: bool
) -> tuple[Tensor, Tensor | None]:
    """(y, s)."""
    from lora_kernels.backends.triton import decoding, dropout

    pair = branch.lora_a.to(x.dtype), branch.lora_b.to(x.dtype)
    scale = split(branch.scaling, x.dtype)
    dropped = dropout.of(branch.dropout_p, branch.seed)
    with needs.device_of(x):
        y, s = decoding.multiply(x, weight, bias, pair, scale, save_s, dropped)
    return y, s if save_s else None
