"""The layer whose columns are scaled, DoRA's, by Triton's kernels: one product, rounded once.

Where they are forced: they have been interpreted and compiled, not yet run on a card.
"""

from __future__ import annotations

from torch import Tensor

from lora_kernels.backends import columns
from lora_kernels.backends.cuda import needs
from lora_kernels.backends.scaling import split
from lora_kernels.branch import Branch, Dense


def serves(rows: Tensor) -> bool:
    """Whether the kernels compute the layer of rows, x or dy."""
    return needs.is_forced_on(rows) and len(rows) > 0


def forward(base: Dense, x: Tensor, branch: Branch, factor: Tensor) -> tuple[Tensor, Tensor]:
    """(y, s): y = factor * (x W^T + s B^T) + bias of x [M,K] and factor [N] in fp32, all else in
    x's dtype but adapters, which may be in fp32; a branch without dropout."""
    from lora_kernels.backends.triton import scaled
    from lora_kernels.backends.triton.branch import adapters, unpadded
    from lora_kernels.backends.triton.low_rank import LowRank, shrink

    a, b = adapters(x, branch)
    low, high = split(branch.scaling, x.dtype)
    bias = None if base.bias is None else base.bias.contiguous()
    with needs.device_of(x):
        s = shrink(x, a, low)
        y = scaled.forward(x, base.weight.t(), LowRank(s, b.t(), high), factor.contiguous(), bias)
    return y, unpadded(s, branch)


def backward(
    base: Dense, rows: tuple[Tensor, Tensor, Tensor, Tensor | None], branch: Branch,
    factor: Tensor, need_z: bool,
) -> tuple[Tensor | None, Tensor]:  # fmt: skip
    """(dz, dfactor) of rows (dy, x, s, y): dz = dy * factor, dfactor = the sum of dy * z, which y
    tells as far as it can; y is None where it is no longer what `forward` returned."""
    from lora_kernels.backends.triton import scaled
    from lora_kernels.backends.triton.branch import adapters, pad
    from lora_kernels.backends.triton.low_rank import LowRank

    dy, x, s, y = rows
    _, b = adapters(x, branch)
    _, high = split(branch.scaling, x.dtype)
    term, factor = LowRank(pad(s, len(x), b.shape[1]), b.t(), high), factor.contiguous()
    bias = None if base.bias is None else base.bias.contiguous()
    with needs.device_of(dy):
        if y is None:
            dz, sums = columns.backward(dy, None, factor, need_z)
        else:
            dz, sums = scaled.unscaled(dy, y, factor, bias, need_z)
        return dz, scaled.of_factor(dy, x, base.weight.t(), term, factor, sums)
