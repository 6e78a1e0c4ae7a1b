"""Several layers on the same rows: x is read once for all shrinks and once for all dA, and dx is one
sum.

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

from lora_kernels.backends import blocked, choose, native, reference, serving
from lora_kernels.backends.scaling import split
from lora_kernels.branch import Branch, Dense, Need


class Layer(NamedTuple):
    """A frozen layer, with a branch or without."""

    base: Dense
    branch: Branch | None


class Wanted(NamedTuple):
    """Of a layer's gradients which are asked for."""

    a: bool
    b: bool


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
    ys, kept = [], []
    parts = together.parts(shrunk)
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


def backward(
    dys: Sequence[Tensor | None],
    x: Tensor | None,
    kept: Sequence[Tensor | None],
    layers: Sequence[Layer],
    wanted: Sequence[Wanted],
    need_x: bool,
) -> tuple[Tensor | None, Pairs]:
    """(dx, (dA, dB) of each layer). A dy is None where nothing comes back through that layer; x is
    read for dA, s for dB."""
    found: Pairs = [(None, None)] * len(layers)
    active = [i for i, dy in enumerate(dys) if dy is not None]
    if not active:
        return None, found
    some: list[Tensor] = [dy for dy in dys if dy is not None]
    here = [layers[i] for i in active]
    needs = [wanted[i] for i in active]
    together = _together(some[0], here)
    if together is None:
        dx, pairs = _backward_one_by_one(some, x, [kept[i] for i in active], here, needs, need_x)
    else:
        dx, pairs = _backward_together(
            together, some, x, [kept[i] for i in active], here, needs, need_x
        )
    for i, pair in zip(active, pairs, strict=True):
        found[i] = pair
    return dx, found


class _Together(NamedTuple):
    """The branches of layers as one, whose rank is the sum of theirs."""

    lora_a: Tensor
    ranks: list[int]
    scaling: float
    native: bool

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
    if len(branches) < 2 or blocked.is_wide(rows) or rows.numel() == 0:
        return None
    first = branches[0]
    if any(b.dropout_p or b.scaling != first.scaling for b in branches):
        return None
    if any(b.lora_a.dtype != first.lora_a.dtype for b in branches):
        return None
    backends = {serving(layer.base, rows, layer.branch) for layer in layers if layer.branch}
    if not backends <= {reference, native}:
        return None
    by_kernels = backends == {native}
    if by_kernels and not all(native.has_many_rows(layer.base, rows) for layer in layers):
        return None
    lora_a = torch.cat([b.lora_a for b in branches])
    return _Together(lora_a, [len(b.lora_a) for b in branches], first.scaling, by_kernels)


def _frozen(x: Tensor, base: Dense) -> Tensor:
    return linear(x, base.weight.to(x.dtype), _as(base.bias, x))


def _as(bias: Tensor | None, x: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(x.dtype)


def _one_by_one(
    x: Tensor, layers: Sequence[Layer], saves: Sequence[bool]
) -> tuple[list[Tensor], list[Tensor | None]]:
    ys, kept = [], []
    for (base, branch), save in zip(layers, saves, strict=True):
        if branch is None:
            y, s = _frozen(x, base), None
        else:
            y, s = serving(base, x, branch).forward(base, x, branch, save)
        ys.append(y)
        kept.append(s)
    return ys, kept


def _backward_one_by_one(
    dys: Sequence[Tensor],
    x: Tensor | None,
    kept: Sequence[Tensor | None],
    layers: Sequence[Layer],
    wanted: Sequence[Wanted],
    need_x: bool,
) -> tuple[Tensor | None, Pairs]:
    dx, pairs = None, []
    for dy, s, (base, branch), (a, b) in zip(dys, kept, layers, wanted, strict=True):
        part = d_a = d_b = None
        if branch is None:
            part = dy @ base.weight.to(dy.dtype) if need_x else None
        elif need_x or a or b:
            empty = dy.new_empty(0)
            part, _, d_a, d_b = serving(base, dy, branch).backward(
                base, dy, empty if x is None else x, empty if s is None else s, branch,
                Need(need_x, False, a, b),
            )  # fmt: skip
        if part is not None:
            dx = part if dx is None else dx.add_(part)
        pairs.append((d_a, d_b))
    return dx, pairs


def _backward_together(
    together: _Together,
    dys: Sequence[Tensor],
    x: Tensor | None,
    kept: Sequence[Tensor | None],
    layers: Sequence[Layer],
    wanted: Sequence[Wanted],
    need_x: bool,
) -> tuple[Tensor | None, Pairs]:
    M, K = len(dys[0]), together.lora_a.shape[1]
    like = dys[0]
    need_a = any(a for a, _ in wanted)
    ds = like.new_empty(M, sum(together.ranks))
    parts, high = together.parts(ds), split(together.scaling, like.dtype)[1]
    d_bs: list[Tensor | None] = []
    for dy, s, (_, branch), (_, b) in zip(dys, kept, layers, wanted, strict=True):
        if branch is None:
            d_bs.append(None)
            continue
        part, lora_b = next(parts), branch.lora_b
        of_b = b and s is not None
        d_b = lora_b.new_empty(lora_b.shape) if of_b else None
        if together.native:
            gradient = None if s is None or d_b is None else (s, d_b.t(), high)
            native.shrink(dy, lora_b.t(), together.scaling, gradient, out=part)
        else:
            part.copy_(reference.scaled_product(dy, lora_b.to(dy.dtype), together.scaling))
            if d_b is not None and s is not None:
                d_b.copy_(reference.scaled_product(dy.t(), s, high))
        d_bs.append(d_b)
    dx = d_as = None
    if need_x:
        if together.native:
            dx = like.new_empty(M, K)
            native.expand(ds, together.lora_a, dx)
        else:
            dx = torch.mm(ds, together.lora_a.to(like.dtype))
        for dy, (base, _) in zip(dys, layers, strict=True):
            dx.addmm_(dy, base.weight.to(dy.dtype))
    if need_a and x is not None:
        if together.native:
            d_as = torch.empty_like(together.lora_a)
            native.outer(x, ds, d_as)
        else:
            d_as = torch.mm(ds.t(), x).to(together.lora_a.dtype)
    of_a = iter(()) if d_as is None else together.parts(d_as, 0)
    pairs: Pairs = []
    for (_, branch), (a, _), d_b in zip(layers, wanted, d_bs, strict=True):
        d_a = None if branch is None or d_as is None else next(of_a)
        pairs.append((d_a if a else None, d_b))
    return dx, pairs
