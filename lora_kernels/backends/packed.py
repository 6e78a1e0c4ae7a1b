"""Several layers on the same rows: x is read once for all shrinks and once for all dA, and dx is
one sum.

Their lora_a are one matrix of all ranks. With dropout, which gives every layer rows of its own, and
where 16-bit products are formed in fp32, a block of rows is read for one layer after the other
while a cache holds it. What a GPU's own kernels serve, and few rows on the CPU, is computed layer
by layer. Results are those of separate layers up to the order of sums, masks to the bit.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from lora_kernels.backends import blocked, native, reference, serving
from lora_kernels.backends.cuda import packed as launches
from lora_kernels.backends.scaling import split
from lora_kernels.branch import Asked, Branch, Dense, Layer, Need, Pairs, Rows, Wanted

# Of rows that are read, or written, for one layer after the other: what a last cache holds, and so
# many that every thread has some.
_BLOCK_BYTES = 32 << 20


def forward(
    x: Tensor, layers: Sequence[Layer], saves: Sequence[bool]
) -> tuple[list[Tensor], list[Tensor | None]]:
    """(y, s) of each layer, s where it is to be saved; x [M,K]."""
    together = _together(x, layers)
    if together is None:
        return _one_by_one(x, layers, saves)
    if together.by_blocks:
        ys, kept = blocked.forward_all(x, layers)
        return ys, [s if save else None for s, save in zip(kept, saves, strict=True)]
    shrunk = together.shrink(x)
    parts = iter(together.parts(shrunk))
    highs = [1.0 if b is None else split(b.scaling, x.dtype)[1] for _, b in layers]
    if together.one_launch:
        bs = [None if layer.branch is None else layer.branch.lora_b for layer in layers]
        ys = launches.forward(x, shrunk, [layer.base for layer in layers], bs, highs)
        of_each = [None if b is None else next(parts) for b in bs]
        return ys, [s if save else None for s, save in zip(of_each, saves, strict=True)]
    ys = []
    kept = []
    for (base, branch), high, save in zip(layers, highs, saves, strict=True):
        if branch is None:
            ys.append(_frozen(x, base))
            kept.append(None)
            continue
        s = next(parts)
        if together.native:
            y = native.on_base(base, x, s, branch.lora_b.t(), high)
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
    elif together.by_blocks:
        dx, pairs = blocked.backward_all(some, here, asked)
    else:
        dx, pairs = _backward_together(together, some, here, asked)
    for i, pair in zip(active, pairs, strict=True):
        found[i] = pair
    return dx, found


class _Together(NamedTuple):
    """How branches go together: by the CPU kernels; by one launch of all outputs, and of dx, on a
    GPU; by ATen's calls, whole or in blocks of rows."""

    branches: list[Branch]
    native: bool = False
    one_launch: bool = False
    by_blocks: bool = False

    @property
    def ranks(self) -> list[int]:
        return [b.lora_a.shape[0] for b in self.branches]

    @property
    def lora_a(self) -> Tensor:
        """Of all ranks; made here."""
        return torch.cat([b.lora_a for b in self.branches])

    @property
    def dropped(self) -> bool:
        return any(b.dropout_p for b in self.branches)

    def parts(self, matrix: Tensor, dim: int = 1) -> tuple[Tensor, ...]:
        """What of a matrix of all ranks is each branch's."""
        parts: tuple[Tensor, ...] = matrix.split(self.ranks, dim)
        return parts

    def shrink(self, x: Tensor) -> Tensor:
        """s [M, all ranks]."""
        lows = [split(b.scaling, x.dtype)[0] for b in self.branches]
        alike = len(set(lows)) == 1
        if self.dropped or not (alike or blocked.forms_sums(x)):
            return self._shrink_in_blocks(x, lows)
        if alike and self.native:
            return native.shrink(x, self.lora_a, lows[0])
        lora_a = self.lora_a.to(x.dtype).t()
        if alike:
            return reference.scaled_product(x, lora_a, lows[0])
        shrunk = (
            native.shrink(x, self.lora_a, 1.0)
            if self.native
            else blocked.precise_product(x, lora_a)
        )
        for part, low in zip(self.parts(shrunk), lows, strict=True):
            part.mul_(low)
        return shrunk.to(x.dtype)

    def _shrink_in_blocks(self, x: Tensor, lows: Sequence[float]) -> Tensor:
        s = x.new_empty(len(x), sum(self.ranks))
        for block in _blocks(x):
            for branch, low, part in zip(self.branches, lows, self.parts(s), strict=True):
                if self.native:
                    drop = native.dropped(branch).after(block.start)
                    native.shrink(x[block], branch.lora_a, low, drop, out=part[block])
                else:
                    a = branch.lora_a.to(x.dtype).t()
                    part[block] = reference.scaled_product(x[block], a, low)
        return s

    def expand(self, ds: Tensor) -> Tensor:
        """What ds [M, all ranks] gives dx [M,K]."""
        if not self.native:
            return torch.mm(ds, self.lora_a.to(ds.dtype))
        dx = ds.new_empty(len(ds), self.branches[0].lora_a.shape[1])
        if not self.dropped:
            native.expand(ds, self.lora_a, dx)
            return dx
        for block in _blocks(dx):
            for i, (branch, part) in enumerate(zip(self.branches, self.parts(ds), strict=True)):
                drop = native.dropped(branch).after(block.start)
                native.expand(part[block], branch.lora_a, dx[block], drop=drop, accumulate=i > 0)
        return dx

    def outer(self, x: Tensor, ds: Tensor) -> list[Tensor]:
        """dA of each branch."""
        if not self.native:
            return [*self.parts(torch.mm(ds.t(), x).to(self.branches[0].lora_a.dtype), 0)]
        if not self.dropped:
            d_a = torch.empty_like(self.lora_a)
            native.outer(x, ds, d_a)
            return [*self.parts(d_a, 0)]
        sums = [torch.zeros_like(b.lora_a, dtype=torch.float32) for b in self.branches]
        for block in _blocks(x):
            for branch, part, total in zip(self.branches, self.parts(ds), sums, strict=True):
                share = torch.empty_like(total)
                drop = native.dropped(branch).after(block.start)
                native.outer(x[block], part[block], share, drop)
                total += share
        return [d_a.to(b.lora_a.dtype) for b, d_a in zip(self.branches, sums, strict=True)]


def _blocks(rows: Tensor, itemsize: int = 0) -> Iterator[slice]:
    """Of rows that are read or written for several layers, in elements of another size if given."""
    row = rows.shape[1] * (itemsize or rows.itemsize)
    return blocked.blocks(len(rows), max(1, _BLOCK_BYTES // row))


def _together(rows: Tensor, layers: Sequence[Layer]) -> _Together | None:
    """None where the layers are better computed one after the other."""
    branches = [layer.branch for layer in layers if layer.branch is not None]
    if len(branches) < 2 or rows.numel() == 0:
        return None
    if any(b.lora_a.dtype != branches[0].lora_a.dtype for b in branches):
        return None
    dropped = any(b.dropout_p for b in branches)
    # The kernels of one launch take no masks: dx would have one for each of their layers' terms.
    if not dropped and launches.serves(rows, [layer.base for layer in layers]):
        return _Together(branches, one_launch=True)
    backends = [serving(layer.base, rows, layer.branch) for layer in layers if layer.branch]
    if any(backend not in (reference, native) for backend in backends):
        return None
    some: Callable[[Iterator[bool]], bool] = any if dropped else all
    if some(backend is native for backend in backends):
        many = all(native.has_many_rows(layer.base, rows) for layer in layers)
        return _Together(branches, native=True) if many else None
    wide = blocked.is_wide(rows)
    if wide and not blocked.is_wide(rows, forward=True):
        return None
    return _Together(branches, by_blocks=dropped or wide)


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
            y, s = native.frozen(base, x), None
            y = _frozen(x, base) if y is None else y
        else:
            y, s = serving(base, x, branch).forward(base, x, branch, save)
        ys.append(y)
        kept.append(s)
    return ys, kept


def _backward_one_by_one(
    rows: Rows, layers: Sequence[Layer], asked: Asked
) -> tuple[Tensor | None, Pairs]:
    if not (asked.x and len(layers) > 1 and _leaves_sums(rows, layers)):
        return _each(rows, layers, asked, None)
    # A sum in fp32, of some rows at a time, rounded once.
    like, K = rows.first, layers[0].base.weight.shape[1]
    dx = like.new_empty(len(like), K)
    blocks = [*_blocks(dx, torch.float32.itemsize)]
    pairs: Pairs = []
    for block in blocks:
        total = torch.zeros_like(dx[block], dtype=torch.float32)
        if len(blocks) == 1:
            _, pairs = _each(rows, layers, asked, total)
        else:
            nothing = [Wanted(False, False)] * len(layers)
            some = Rows([dy[block] for dy in rows.given], None, [None] * len(layers))
            _each(
                some, [_after(layer, block.start) for layer in layers], Asked(nothing, True), total
            )
        dx[block] = total
    if len(blocks) > 1:
        _, pairs = _each(rows, layers, Asked(asked.of, False), None)
    return dx, pairs


def _each(
    rows: Rows, layers: Sequence[Layer], asked: Asked, onto: Tensor | None
) -> tuple[Tensor | None, Pairs]:
    """One after the other; dx is added to `onto` [M,K] in fp32, where that is given."""
    dx, pairs, empty = onto, [], rows.first.new_empty(0)
    x = empty if rows.x is None else rows.x
    for dy, s, (base, branch), (a, b) in zip(rows.given, rows.kept, layers, asked.of, strict=True):
        part = d_a = d_b = None
        if branch is None:
            if asked.x:
                part = _through_frozen(dy, base, dx)
        elif asked.x or a or b:
            backend = serving(base, dy, branch)
            given = base, dy, x, empty if s is None else s, branch, Need(asked.x, False, a, b)
            if backend is native:
                part, _, d_a, d_b = native.backward(*given, onto=dx)
            else:
                part, _, d_a, d_b = backend.backward(*given)
        if part is not None and part is not dx:
            dx = part if dx is None else dx.add_(part)
        pairs.append((d_a, d_b))
    return dx, pairs


def _through_frozen(dy: Tensor, base: Dense, onto: Tensor | None) -> Tensor:
    """dy W, on top of what is there or to be added to it."""
    if onto is not None and onto.dtype != dy.dtype:
        found = native.frozen(Dense(base.weight.t(), into=torch.empty_like(onto)), dy)
        return dy @ base.weight.to(dy.dtype) if found is None else found
    weight = base.weight.to(dy.dtype)
    return dy @ weight if onto is None else onto.addmm_(dy, weight)


def _leaves_sums(rows: Rows, layers: Sequence[Layer]) -> bool:
    """Whether there are native calls whose parts of dx would be rounded to 16 bits."""
    if rows.first.dtype not in (torch.bfloat16, torch.float16):
        return False
    return any(
        serving(base, dy, branch) is native and not native.has_many_rows(base, dy)
        for dy, (base, branch) in zip(rows.given, layers, strict=True)
        if branch is not None
    )


def _after(layer: Layer, rows: int) -> Layer:
    """The layer for what follows so many rows: its mask is theirs."""
    branch = layer.branch
    if branch is None:
        return layer
    return layer._replace(branch=branch._replace(seed=native.dropped(branch).after(rows).seed))


def _backward_together(
    together: _Together, rows: Rows, layers: Sequence[Layer], asked: Asked
) -> tuple[Tensor | None, Pairs]:
    like = rows.first
    ds = like.new_empty(len(like), sum(together.ranks))
    parts = iter(together.parts(ds))
    d_bs: list[Tensor | None] = []
    for dy, s, (_, branch), (_, b) in zip(rows.given, rows.kept, layers, asked.of, strict=True):
        if branch is None:
            d_bs.append(None)
            continue
        part, lora_b, scaling = next(parts), branch.lora_b, branch.scaling
        high = split(scaling, like.dtype)[1]
        d_b = torch.empty_like(lora_b) if b and s is not None else None
        if together.native:
            gradient = None if s is None or d_b is None else (s, d_b.t(), high)
            native.shrink(dy, lora_b.t(), scaling, gradient=gradient, out=part)
        else:
            part.copy_(reference.scaled_product(dy, lora_b.to(dy.dtype), scaling))
            if d_b is not None and s is not None:
                d_b.copy_(reference.scaled_product(dy.t(), s, high))
        d_bs.append(d_b)
    dx = None
    if asked.x and together.one_launch:
        bases = [layer.base for layer in layers]
        dx = launches.dx(rows.given, bases, ds, together.lora_a)
    elif asked.x:
        dx = together.expand(ds)
        weights = [layer.base.weight for layer in layers]
        # The widest last: in 16 bits a small sum's rounding is small.
        for dy, weight in sorted(zip(rows.given, weights, strict=True), key=lambda of: len(of[1])):
            dx.addmm_(dy, weight.to(dy.dtype))
    d_as = None
    if rows.x is not None and any(a for a, _ in asked.of):
        d_as = iter(together.outer(rows.x, ds))
    pairs: Pairs = []
    for (_, branch), (a, _), d_b in zip(layers, asked.of, d_bs, strict=True):
        d_a = None if branch is None or d_as is None else next(d_as)
        pairs.append((d_a if a else None, d_b))
    return dx, pairs
