"""Several layers of one x by Triton's kernels, one launch for all outputs and one for dx.

Where they are forced: they have been interpreted and compiled, not yet run on a card.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_kernels.backends.cuda import needs
from lora_kernels.branch import Dense


def serves(rows: Tensor, bases: Sequence[Dense]) -> bool:
    """Whether the kernels compute these layers of rows, x or dy."""
    if not needs.takes_addresses(rows) or len(rows) == 0:
        return False
    from lora_kernels.backends.triton.packed import MOST, is_aligned

    if len(bases) > MOST:
        return False
    held = [t for base in bases for t in (base.weight, base.bias) if t is not None]
    return all(t.dtype == rows.dtype and is_aligned(t) for t in held)


def forward(
    x: Tensor,
    s: Tensor,
    bases: Sequence[Dense],
    lora_bs: Sequence[Tensor | None],
    highs: Sequence[float],
) -> list[Tensor]:
    """y of each layer, of what s B^T is multiplied by; s [M, all ranks] of those that have a
    branch, in their order."""
    from lora_kernels.backends.triton.packed import Layer, packed_forward

    layers = [
        Layer(
            base.weight,
            None if b is None else _laid(b.to(x.dtype)),
            base.bias,
            x.new_empty(len(x), base.weight.shape[0]),
            high,
        )
        for base, b, high in zip(bases, lora_bs, highs, strict=True)
    ]
    with needs.device_of(x):
        packed_forward(x, s, layers)
    return [layer.y for layer in layers]


def dx(dys: Sequence[Tensor], bases: Sequence[Dense], ds: Tensor, lora_a: Tensor) -> Tensor:
    """The sum of dy W of each layer, and ds A of all ranks."""
    from lora_kernels.backends.triton.packed import packed_dx

    out = ds.new_empty(len(ds), lora_a.shape[1])
    with needs.device_of(ds):
        packed_dx(
            [_laid(dy) for dy in dys],
            [base.weight for base in bases],
            ds,
            _laid(lora_a.to(ds.dtype)),
            out,
        )
    return out


def _laid(matrix: Tensor) -> Tensor:
    """As the kernels read a matrix."""
    from lora_kernels.backends.triton.packed import is_aligned

    return matrix if is_aligned(matrix) else matrix.clone(memory_format=torch.contiguous_format)
