"""The branches of many groups in one native call, forward or backward, each of its own rows.

Tensors are matrices, lora_a and lora_b sequences, one of each group; order and bounds are those of
the rows, as in `lora_kernels.grouped`.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels.backends import forced
from lora_kernels.backends.dropout import keep_scale, threshold
from lora_kernels.backends.native import extension
from lora_kernels.backends.native.few_rows import readable
from lora_kernels.backends.scaling import split

# Groups of more rows than this on average are better served one by one: by all threads, and without
# dropout by torch's own products.
_MOST_ROWS = 256


class Branches(NamedTuple):
    """What every group has, and whose the rows are."""

    lora_a: Sequence[Tensor]
    lora_b: Sequence[Tensor]
    scaling: Sequence[float]
    dropout_p: float
    seeds: Tensor | None
    order: Tensor | None
    bounds: Sequence[int]

    def given(self) -> tuple[list[Tensor], list[Tensor]]:
        """The adapters where the kernels can read them."""
        return [_aligned(t) for t in self.lora_a], [_aligned(t) for t in self.lora_b]

    def mask(self) -> tuple[int, Tensor | None, int]:
        p = self.dropout_p
        return threshold(p) if p else 0, self.seeds if p else None, extension.best_isa()

    @property
    def keep(self) -> float:
        return keep_scale(self.dropout_p) if self.dropout_p else 1.0


def serves(rows: Tensor, bounds: Sequence[int]) -> bool:
    """Whether one call is the better one for these rows, x or dy."""
    if not rows.is_cpu or rows.dtype not in extension.DTYPES or not extension.available():
        return False
    if forced.now is not None and forced.now.backend != "native":
        return False
    groups = sum(begin < end for begin, end in pairwise(bounds[:-1]))
    return groups > 1 and bounds[-2] <= _MOST_ROWS * groups


def add_(y: Tensor, x: Tensor, branches: Branches, s: Tensor | None) -> None:
    """Adds the branches to y [M,N], whose columns are contiguous; fills s [M, the largest rank]."""
    splits = [split(scaling, x.dtype) for scaling in branches.scaling]
    drops, seeds, isa = branches.mask()
    torch.ops.lora_kernels._add_grouped_cpu(
        y, readable(x), *branches.given(), branches.order, list(branches.bounds),
        [low * branches.keep for low, _ in splits], [high for _, high in splits], drops, seeds, isa,
        s,
    )  # fmt: skip


def backward(
    dx: Tensor | None,
    rows: tuple[Tensor, Tensor, Tensor],
    branches: Branches,
    gradients: tuple[list[Tensor | None], list[Tensor | None]],
) -> None:
    """Of rows (dy, x, s) fills the gradients of A and B that are not None, but those of groups
    without rows, and adds to dx [M,K]."""
    dy, x, s = rows
    highs = [split(scaling, dy.dtype)[1] for scaling in branches.scaling]
    d_a, d_b = gradients
    drops, seeds, isa = branches.mask()
    nothing = dy.new_empty(0)
    torch.ops.lora_kernels._backward_grouped_cpu(
        dx, readable(dy), readable(x) if any(t is not None for t in d_a) else None,
        *branches.given(), s if any(t is not None for t in d_b) else None,
        branches.order, list(branches.bounds),
        list(branches.scaling), highs, branches.keep, drops, seeds, isa,
        [nothing if t is None else t for t in d_a], [nothing if t is None else t for t in d_b],
    )  # fmt: skip


def _aligned(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.data_ptr() % tensor.element_size() else tensor
