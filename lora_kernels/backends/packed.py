"""Several layers on the same rows: x is read once for all shrinks and once for all dA, and dx is
one sum.

Where the branches go together (a device on which ATen's products or the CPU kernels compute, no
dropout, which gives every layer rows of its own, one scaling) their lora_a are one matrix of all
ranks; elsewhere the layers are computed one after the other by the backend of each. Results are
those of separate layers up to the order of sums.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from lora_kernels.backends import blocked, native, reference, serving
from lora_kernels.backends.cuda import packed as launches
from lora_kernels.backends.scaling import split
from lora_kernels.branch import Branch, Dense, Need


class Layer(NamedTuple):
    """A frozen layer, with a branch or without."""

    base: Dense
    branch: Branch | None


class Wanted(NamedTuple):
    """Which gradients of a layer's branch are asked for."""

    a: bool
    b: bool


class Asked(NamedTuple):
    """Which gradients are asked for, of each layer and x."""

    of: Sequence[Wanted]
    x: bool


class Rows(NamedTuple):
    """What has the rows of a backward: dy of each layer, None where nothing comes back through it;
    x, read for dA; s of each, read for dB."""

    dys: Sequence[Tensor | None]
    x: Tensor | None
    kept: Sequence[Tensor | None]

    def only(self, indices: Sequence[int]) -> "Rows":
        """Those of some layers."""
        return Rows([self.dys[i] for i in indices], self.x, [self.kept[i] for i in indices])

    @property
    def first(self) -> Tensor:
        """The first dy; all are there."""
        (dy, *_) = self.given
        return dy

    @property
    def given(self) -> list[Tensor]:
        return [dy for dy in self.dys if dy is not None]


Pairs = list[tuple[Tensor | None, Tensor | None]]


def forward(
    x: Tensor, layers: Sequence[Layer], saves: Sequence[bool]
) -> tuple[list[Tensor], list[Tensor | None]]:
    """(y, s) of each layer, s where it is to be saved; x [M,K]."""
    together = _together(x, layers)
    if together is None:
        return _one_by_one(x, layers, saves)
    low, high = split(together.scaling, x.dtype)
    shrunk = together.shrink(x, low)
    parts = together.parts(shrunk)
    if together.one_launch:
        bs = [None if layer.branch is None else layer.branch.lora_b for layer in layers]
        ys = launches.forward(x, shrunk, [layer.base for layer in layers], bs, high)
        of_each = [None if b is None else next(parts) for b in bs]
        return ys, [s if save else None for s, save in zip(of_each, saves, strict=True)]
    ys = []
    kept: list[Tensor | None] = []
    for layer, save in zip(layers, saves, strict=True):
        base, branch = layer
        if branch is None:
            ys.append(_frozen(x, base))
            kept.append(None)
            continue
        s = next(parts)
        if together.native:
            y = x.new_empty(len(x), base.weight.shape[0])
            native.expand(s, branch.lora_b.t(), y, high, _as(base.bias, x))
            y.addmm_(x, base.weight.t().to(x.dtype))
        else:
            y = _frozen(x, base).addmm_(s, branch.lora_b.to(x.dtype).t(), alpha=high)
        ys.append(y)
        kept.append(s if save else None)
    return ys, kept


def backward(rows: Rows, layers: Sequence[Layer], asked: Asked) -> tuple[Tensor | None, Pairs]:
    """(dx, (dA, dB) of each layer)."""
    found: Pairs = [(None, None)] * len(layers)
    active = [i for i, dy in enumerate(rows.dys) if dy is not None]
    if not active:
        return None, found
    some = rows.only(active)
    here = [layers[i] for i in active]
    asked = Asked([asked.of[i] for i in active], asked.x)
    together = _together(some.first, here)
    if together is None:
        dx, pairs = _backward_one_by_one(some, here, asked)
    else:
        dx, pairs = _backward_together(together, some, here, asked)
    for i, pair in zip(active, pairs, strict=True):
        found[i] = pair
    return dx, found


class _Together(NamedTuple):
    """The branches of layers as one, whose rank is the sum of theirs."""

    lora_a: Tensor
    ranks: list[int]
    scaling: float
    native: bool
    # Of all outputs, and of dx, on a GPU.
    one_launch: bool

    def shrink(self, x: Tensor, scale: float) -> Tensor:
        if self.native:
            return native.shrink(x, self.lora_a, scale)
        return reference.scaled_product(x, self.lora_a.to(x.dtype).t(), scale)

    def parts(self, matrix: Tensor, dim: int = 1) -> Iterator[Tensor]:
        """What of a matrix of all ranks is each branch's."""
        return iter(matrix.split(self.ranks, dim))


def _together(rows: Tensor, layers: Sequence[Layer]) -> _Together | None:
    """None where the layers are better computed one after the other."""
    branches = [layer.branch for layer in layers if layer.branch is not None]
    if len(branches) < 2 or rows.numel() == 0:
        return None
    first = branches[0]
    if any(b.dropout_p or b.scaling != first.scaling for b in branches):
        return None
    if any(b.lora_a.dtype != first.lora_a.dtype for b in branches):
        return None
    one_launch, by_kernels = launches.serves(rows, [layer.base for layer in layers]), False
    if not one_launch:
        backends = {serving(layer.base, rows, layer.branch) for layer in layers if layer.branch}
        by_kernels = backends == {native}
        if not backends <= {reference, native} or blocked.is_wide(rows):
            return None
        if by_kernels and not all(native.has_many_rows(layer.base, rows) for layer in layers):
            return None
    lora_a, ranks = torch.cat([b.lora_a for b in branches]), [len(b.lora_a) for b in branches]
    return _Together(lora_a, ranks, first.scaling, by_kernels, one_launch)


def _frozen(x: Tensor, base: Dense) -> Tensor:
    return linear(x, base.weight.to(x.dtype), _as(base.bias, x))


def _as(bias: Tensor | None, x: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(x.dtype)


def _one_by_one(
    x: Tensor, layers: Sequence[Layer], saves: Sequence[bool]
) -> tuple[list[Tensor], list[Tensor | None]]:
    ys: list[Tensor] = []
    kept: list[Tensor | None] = []
    for (base, branch), save in zip(layers, saves, strict=True):
        if branch is None:
            y, s = _frozen(x, base), None
        else:
            y, s = serving(base, x, branch).forward(base, x, branch, save)
        ys.append(y)
        kept.append(s)
    return ys, kept


def _backward_one_by_one(
    rows: Rows, layers: Sequence[Layer], asked: Asked
) -> tuple[Tensor | None, Pairs]:
    dx, pairs, empty = None, [], rows.first.new_empty(0)
    x = empty if rows.x is None else rows.x
    for dy, s, (base, branch), (a, b) in zip(rows.given, rows.kept, layers, asked.of, strict=True):
        part = d_a = d_b = None
        if branch is None:
            part = dy @ base.weight.to(dy.dtype) if asked.x else None
        elif asked.x or a or b:
            part, _, d_a, d_b = serving(base, dy, branch).backward(
                base, dy, x, empty if s is None else s, branch, Need(asked.x, False, a, b)
            )
        if part is not None:
            dx = part if dx is None else dx.add_(part)
        pairs.append((d_a, d_b))
    return dx, pairs


def _backward_together(
    together: _Together, rows: Rows, layers: Sequence[Layer], asked: Asked
) -> tuple[Tensor | None, Pairs]:
    like, scaling = rows.first, together.scaling
    ds = like.new_empty(len(like), sum(together.ranks))
    parts, high = together.parts(ds), split(scaling, like.dtype)[1]
    d_bs: list[Tensor | None] = []
    for dy, s, (_, branch), (_, b) in zip(rows.given, rows.kept, layers, asked.of, strict=True):
        if branch is None:
            d_bs.append(None)
            continue
        part, lora_b = next(parts), branch.lora_b
        d_b = torch.empty_like(lora_b) if b and s is not None else None
        if together.native:
            gradient = None if s is None or d_b is None else (s, d_b.t(), high)
            native.shrink(dy, lora_b.t(), scaling, gradient, out=part)
        else:
            part.copy_(reference.scaled_product(dy, lora_b.to(dy.dtype), scaling))
            if d_b is not None and s is not None:
                d_b.copy_(reference.scaled_product(dy.t(), s, high))
        d_bs.append(d_b)
    dx = d_as = None
    if asked.x and together.one_launch:
        dx = launches.dx(rows.given, [layer.base for layer in layers], ds, together.lora_a)
    elif asked.x:
        if together.native:
            dx = like.new_empty(len(like), together.lora_a.shape[1])
            native.expand(ds, together.lora_a, dx)
        else:
            dx = torch.mm(ds, together.lora_a.to(like.dtype))
        for dy, (base, _) in zip(rows.given, layers, strict=True):
            dx.addmm_(dy, base.weight.to(dy.dtype))
    if rows.x is not None and any(a for a, _ in asked.of):
        if together.native:
            d_as = torch.empty_like(together.lora_a)
            native.outer(rows.x, ds, d_as)
        else:
            d_as = torch.mm(ds.t(), rows.x).to(together.lora_a.dtype)
    of_a = iter(()) if d_as is None else together.parts(d_as, 0)
    pairs: Pairs = []
    for (_, branch), (a, _), d_b in zip(layers, asked.of, d_bs, strict=True):
        d_a = None if branch is None or d_as is None else next(of_a)
        pairs.append((d_a if a else None, d_b))
    return dx, pairs
