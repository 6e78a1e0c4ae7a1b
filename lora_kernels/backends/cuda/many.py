"""The branches of many groups by Triton's kernels, one launch for each product of them all; of
experts with their bases.

Where they are forced: they have been interpreted and compiled for every target, not yet run on a
card.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lora_kernels.backends.cuda import needs
from lora_kernels.backends.dropout import keep_scale, threshold
from lora_kernels.backends.scaling import split
from lora_kernels.branch import Branches, Experts

if TYPE_CHECKING:
    from lora_kernels.backends.triton.many import Many, Side

# Offsets are read as one vector.
_MOST_GROUPS = 1024


def serves(rows: Tensor, branches: Branches) -> bool:
    """Whether the kernels compute these branches of rows, x or dy."""
    if not needs.takes_addresses(rows):
        return False
    alike = len({t.dtype for t in (*branches.lora_a, *branches.lora_b)}) == 1
    return alike and len(rows) > 0 and len(branches.lora_a) <= _MOST_GROUPS


def takes(rows: int) -> bool:
    """Whether a group of so many rows is computed with others: every one is."""
    return True


def serves_experts(rows: Tensor, base: Experts, branches: Branches) -> bool:
    """Whether the kernels compute these experts of rows, x or dy."""
    weight = base.weight
    return weight.dtype == rows.dtype and weight.numel() > 0 and serves(rows, branches)


def add_(y: Tensor, x: Tensor, branches: Branches, s: Tensor | None) -> None:
    """Adds the branches to y [M,N]; fills s [M, the largest rank]."""
    from lora_kernels.backends.triton import many

    with needs.device_of(x):
        low, up = _down(x, branches, s)
        many.many_expand(low, up, _many(branches), False, y)


def experts(y: Tensor, x: Tensor, base: Experts, branches: Branches, s: Tensor | None) -> None:
    """Fills the rows of groups in y [M,N]; fills s [M, the largest rank]."""
    from lora_kernels.backends.triton import experts

    weight, bias, weight_of = base
    with needs.device_of(x):
        low, up = _down(x, branches, s)
        bases = experts.Bases(weight.transpose(1, 2), bias, _known(weight_of, weight))
        experts.product(x, bases, low, up, _many(branches), False, y)


def _down(x: Tensor, branches: Branches, s: Tensor | None) -> tuple[Tensor, Side]:
    """(s, what is to be multiplied by it)."""
    from lora_kernels.backends.triton import many

    splits = [split(scaling, x.dtype) for scaling in branches.scaling]
    low = torch.zeros(len(x), branches.rank, dtype=x.dtype, device=x.device) if s is None else s
    keep = keep_scale(branches.dropout_p)
    down = _side(branches.lora_a, branches, False, [first * keep for first, _ in splits])
    many.many_shrink(x, down, _many(branches), True, low)
    return low, _side(branches.lora_b, branches, True, [high for _, high in splits])


def _known(weight_of: Sequence[int], weight: Tensor) -> list[int]:
    """Kernels read what they are told to."""
    if not all(0 <= expert < len(weight) for expert in weight_of):
        raise ValueError(f"weight_of: expected experts of 0 to {len(weight) - 1}, got {weight_of}")
    return [*weight_of]


def backward(
    dx: Tensor | None,
    rows: tuple[Tensor, Tensor, Tensor],
    branches: Branches,
    gradients: tuple[list[Tensor | None], list[Tensor | None]],
    base: Experts | None = None,
) -> None:
    """Of rows (dy, x, s) fills the gradients of A and B that are not None, but those of groups
    without rows, and adds to dx [M,K]; of experts fills its rows of groups."""
    from lora_kernels.backends.triton import experts, many

    dy, x, s = rows
    d_a, d_b = gradients
    needs_a, needs_b = (any(one is not None for one in each) for each in gradients)
    keeps, of_rows = [keep_scale(branches.dropout_p)] * len(d_a), _many(branches)
    with needs.device_of(dy):
        if dx is not None or needs_a:
            ds = torch.zeros(len(dy), branches.rank, dtype=dy.dtype, device=dy.device)
            up = _side(branches.lora_b, branches, True, branches.scaling)
            many.many_shrink(dy, up, of_rows, False, ds)
        if dx is not None:
            down = _side(branches.lora_a, branches, False, keeps)
            if base is None:
                many.many_expand(ds, down, of_rows, True, dx)
            else:
                bases = experts.Bases(base.weight, None, _known(base.weight_of, base.weight))
                experts.product(dy, bases, ds, down, of_rows, True, dx)
        if needs_a:
            many.many_tall(ds, x, _side(d_a, branches, False, keeps), of_rows, True)
        if needs_b:
            highs = [split(scaling, dy.dtype)[1] for scaling in branches.scaling]
            many.many_tall(s, dy, _side(d_b, branches, True, highs), of_rows, False)


def _many(branches: Branches) -> Many:
    from lora_kernels.backends.triton.many import Many

    p = branches.dropout_p
    seeds = branches.seeds if p else None
    return Many(branches.order, branches.offsets, len(branches.lora_a), threshold(p), seeds)


def _side(
    matrices: Sequence[Tensor | None], branches: Branches, is_b: bool, factors: Sequence[float]
) -> Side:
    from lora_kernels.backends.triton.many import Side

    ranks = [a.shape[0] for a in branches.lora_a]
    whole = [None if matrix is None else matrix.contiguous() for matrix in matrices]
    return Side(whole, ranks, is_b, factors)
