"""The branches of many groups in one native call, forward or backward, each of its own rows; where
products are packed, whole layers of them.

Tensors are matrices, lora_a and lora_b sequences, one of each group; order and bounds are those of
the rows, as in `lora_kernels.grouped`.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from lora_kernels.backends import forced
from lora_kernels.backends.dropout import keep_scale, threshold
from lora_kernels.backends.native import extension, few_rows
from lora_kernels.backends.native.few_rows import readable
from lora_kernels.backends.scaling import split
from lora_kernels.branch import Branches, Dense, Needs, only

# A group of more rows is better served by a call of its own: by all threads, and without dropout by
# torch's own products. Asked of each group alone, so that its bits do not follow from others.
_MOST_ROWS = 256


def serves(rows: Tensor, branches: Branches) -> bool:
    """Whether one call computes the small groups of these rows, x or dy."""
    if not rows.is_cpu or rows.dtype not in extension.DTYPES or not extension.available():
        return False
    if forced.now is not None and forced.now.backend != "native":
        return False
    return any(begin < end and takes(end - begin) for begin, end in pairwise(branches.bounds[:-1]))


def takes(rows: int) -> bool:
    """Whether a group of so many rows is computed with others."""
    return rows <= _MOST_ROWS


def packs(rows: int, columns: int) -> bool:
    """Whether products of so many rows and columns of a result are packed."""
    least, beyond = extension.packed_from(extension.best_isa())
    return 0 < least <= rows and columns > beyond


def serves_layer(base: Dense, rows: Tensor, branches: Branches, backward: bool = False) -> bool:
    """Whether one call computes the whole layer for these rows, x or dy: as one adapter's, where
    the branches are parts of what is packed. How many rows there are counts, whose they are does
    not."""
    weight = base.weight
    if not rows.is_cpu or rows.dtype not in extension.DTYPES or not extension.available():
        return False
    if branches.dropout_p or (forced.now is not None and forced.now.backend != "native"):
        return False
    if not packs(len(rows), weight.shape[1 if backward else 0]):
        return False
    if base.bias is not None and not backward and weight.stride(1) != 1:
        return False
    few = few_rows.are_few(len(rows), weight, extension.best_isa(), backward, rows.dtype)
    return few and few_rows.fits(weight)


def layer(base: Dense, x: Tensor, branches: Branches, s: Tensor | None) -> Tensor:
    """y [M,N] of `serves_layer`, zeros past the served rows; fills s [M, the largest rank]."""
    splits = [split(scaling, x.dtype) for scaling in branches.scaling]
    y: Tensor = torch.ops.lora_kernels._linear_packed_cpu(
        readable(x), base.weight, *_given(branches), branches.order, list(branches.bounds),
        None if base.bias is None else readable(base.bias.to(x.dtype)), [low for low, _ in splits],
        [high for _, high in splits], extension.best_isa(), s,
    )  # fmt: skip
    return y


def layer_backward(
    base: Dense, rows: tuple[Tensor, Tensor, Tensor], branches: Branches, needs: Needs
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """(dx, dA of each, dB of each) of rows (dy, x, s), None where not needed."""
    dy, x, s = rows
    highs = [split(scaling, dy.dtype)[1] for scaling in branches.scaling]
    dx, d_a, d_b = torch.ops.lora_kernels._linear_packed_backward_cpu(
        readable(dy), readable(x) if any(needs.a) else None, base.weight, *_given(branches),
        s if any(needs.b) else None, branches.order, list(branches.bounds),
        list(branches.scaling), highs, extension.best_isa(), needs.x, list(needs.a), list(needs.b),
    )  # fmt: skip
    return dx if needs.x else None, only(needs.a, d_a), only(needs.b, d_b)


def add_(y: Tensor, x: Tensor, branches: Branches, s: Tensor | None) -> None:
    """Adds the branches that it takes to y [M,N], whose columns are contiguous; fills their rows of
    s [M, the largest rank]."""
    splits = [split(scaling, x.dtype) for scaling in branches.scaling]
    drops, seeds, isa = _mask(branches)
    keep = keep_scale(branches.dropout_p)
    torch.ops.lora_kernels._add_grouped_cpu(
        y, readable(x), *_given(branches), branches.order, list(branches.bounds),
        _MOST_ROWS, [low * keep for low, _ in splits], [high for _, high in splits], drops, seeds,
        isa, s,
    )  # fmt: skip


def backward(
    dx: Tensor | None,
    rows: tuple[Tensor, Tensor, Tensor],
    branches: Branches,
    gradients: tuple[list[Tensor | None], list[Tensor | None]],
) -> None:
    """Of rows (dy, x, s) fills the gradients of A and B that are not None, but those of groups
    without rows or not taken, and adds to dx [M,K]."""
    dy, x, s = rows
    highs = [split(scaling, dy.dtype)[1] for scaling in branches.scaling]
    d_a, d_b = gradients
    drops, seeds, isa = _mask(branches)
    nothing = dy.new_empty(0)
    torch.ops.lora_kernels._backward_grouped_cpu(
        dx, readable(dy), readable(x) if any(t is not None for t in d_a) else None,
        *_given(branches), s if any(t is not None for t in d_b) else None,
        branches.order, list(branches.bounds), _MOST_ROWS,
        list(branches.scaling), highs, keep_scale(branches.dropout_p), drops, seeds, isa,
        [nothing if t is None else t for t in d_a], [nothing if t is None else t for t in d_b],
    )  # fmt: skip


def _given(branches: Branches) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """The adapters where the kernels can read them."""
    return _readable(branches.lora_a), _readable(branches.lora_b)


def _readable(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """`readable` of each, at one look where all lie as they nearly always do."""
    if all(map(Tensor.is_contiguous, tensors)) and not any(
        t.data_ptr() % t.element_size() for t in tensors
    ):
        return tensors
    return [readable(t) for t in tensors]


def _mask(branches: Branches) -> tuple[int, Tensor | None, int]:
    p = branches.dropout_p
    return threshold(p), branches.seeds if p else None, extension.best_isa()
