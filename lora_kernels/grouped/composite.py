"""The grouped ops, made of the calls of one group that every backend has.

A shared base is one product of all rows; then each group's branch is added to its rows, on the CPU
those of all small groups by one native call. Experts are one whole call each, or Triton's of them
all. What a group computes depends on its own rows and tensors alone, and so does by which kernels:
others, whether they have rows or not, change no bit of it. Beside the outputs there is a copy of
one group's rows at a time, and none where a group's rows lie together.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_kernels import backends, direct
from lora_kernels.backends import blocked
from lora_kernels.backends.cuda import many as triton
from lora_kernels.backends.native import grouped as native
from lora_kernels.branch import Branch, Branches, Dense, Experts, Given, Needs


class Members(NamedTuple):
    """The rows of every group: `order`, `bounds` and `offsets` of `Groups`."""

    order: Tensor | None
    bounds: Sequence[int]
    offsets: Tensor

    @property
    def served(self) -> int:
        """How many rows of a batch, the first, are anybody's or explicitly nobody's."""
        return self.bounds[-1]

    def are_all(self, rows: Tensor) -> bool:
        """Whether each of these rows has a group."""
        return self.bounds[-2] == rows.shape[0]

    def of_groups(self, besides: Any = None) -> Iterator[tuple[int, slice]]:
        """(group, its place in the order) of the groups that have rows, but for those that
        `besides`, what computes many at once, takes."""
        for group in range(len(self.bounds) - 2):
            begin, end = self.bounds[group], self.bounds[group + 1]
            if begin < end and (besides is None or not besides.takes(end - begin)):
                yield group, slice(begin, end)

    def of_nobody(self) -> slice:
        """The place of the rows that have no group."""
        return slice(self.bounds[-2], self.bounds[-1])

    def take(self, rows: Tensor, place: slice) -> Tensor:
        return rows[place] if self.order is None else rows[self.order[place]]

    def into(self, rows: Tensor, place: slice) -> Tensor | None:
        """The rows of a group where they lie together."""
        return rows[place] if self.order is None else None

    def put(self, rows: Tensor, place: slice, values: Tensor) -> None:
        if self.order is None:
            there = rows[place]
            if values.data_ptr() != there.data_ptr():  # else computed in place
                there.copy_(values)
        else:
            rows.index_copy_(0, self.order[place], values)

    def add(self, rows: Tensor, place: slice, values: Tensor) -> None:
        if self.order is None:
            rows[place] += values
        else:
            rows.index_add_(0, self.order[place], values)


class Adapters(NamedTuple):
    """What `Branch` is, of every group: seed g is of group g."""

    lora_a: Sequence[Tensor]
    lora_b: Sequence[Tensor]
    scaling: Sequence[float]
    dropout_p: float
    seeds: Tensor | None

    def branch(self, group: int) -> Branch:
        seed = None if self.seeds is None else self.seeds[group]
        a, b = self.lora_a[group], self.lora_b[group]
        return Branch(a, b, self.scaling[group], self.dropout_p, seed)


Gradients = tuple[
    Tensor | None, Tensor | None, Tensor | None, list[Tensor | None], list[Tensor | None]
]


def _rows_of_s(adapters: Adapters, x: Tensor, members: Members) -> Tensor:
    """s [M, the largest rank], whose first rows are those that have groups, in their order; what is
    not written is zero."""
    ranks = {a.shape[0] for a in adapters.lora_a}
    return _to_fill(x, max(ranks), len(ranks) == 1 and members.are_all(x))


def forward(
    base: Dense | Experts | Given,
    x: Tensor,
    adapters: Adapters,
    members: Members,
    save_s: bool,
) -> tuple[Tensor, Tensor | None]:
    """(y [M,N], s)."""
    s = _rows_of_s(adapters, x, members) if save_s else None
    branches = Branches(*adapters, *members)
    if isinstance(base, Dense) and native.serves_layer(base, x, branches):
        return frozen_for_nobody(native.layer(base, x, branches, s), base, x, members), s
    y = _base(base, x, members)
    if isinstance(base, Experts) and triton.serves_experts(x, base, branches):
        triton.experts(y, x, base, branches, s)
        return y, s
    together = None if isinstance(base, Experts) else _together(x, branches)
    if together is not None:
        together.add_(y, x, branches, s)
    for group, place in members.of_groups(together):
        some, branch = members.take(x, place), adapters.branch(group)
        rank = branch.lora_a.shape[0]
        if isinstance(base, Experts):
            own = base.base(group)._replace(into=members.into(y, place))
            out, low = backends.serving(own, some, branch).forward(own, some, branch, save_s)
            members.put(y, place, out)
        else:
            out = members.take(y, place)
            low = backends.serving(Given(out), some, branch).add_(out, some, branch)
            if members.order is not None:
                members.put(y, place, out)
        if s is not None and low is not None:
            s[place, :rank] = low[:, :rank]
    return y, s


def backward(
    base: Dense | Experts | Given,
    rows: tuple[Tensor, Tensor, Tensor],
    adapters: Adapters,
    members: Members,
    needs: Needs,
) -> Gradients:
    """(dx, dweight, dbias, dA of each, dB of each) of rows (dy, x, s), None where not needed."""
    dy, x, s = rows
    K = adapters.lora_a[0].shape[1]
    served = members.served
    dx = dweight = dbias = None
    branches = Branches(*adapters, *members)
    if isinstance(base, Dense):
        if needs.weight:
            dweight = _weight_gradient(dy[:served], x[:served], base.weight)
        if needs.bias and base.bias is not None:
            dbias = dy[:served].sum(0).to(base.bias.dtype)
        if native.serves_layer(base, dy, branches, backward=True):
            dx, d_as, d_bs = native.layer_backward(base, rows, branches, needs)
            return dx, dweight, dbias, d_as, d_bs
        if needs.x:
            dx = _without_strangers(_product(dy, base.weight.t(), None), members)
    elif needs.x:
        dx = _to_fill(dy, K, isinstance(base, Experts) and members.are_all(dy))
    if isinstance(base, Experts):
        dweight = torch.zeros_like(base.weight) if needs.weight else None
        if needs.bias and base.bias is not None:
            dbias = torch.zeros_like(base.bias)
    d_as = _to_fill_of_groups(adapters.lora_a, needs.a, members)
    d_bs = _to_fill_of_groups(adapters.lora_b, needs.b, members)
    if isinstance(base, Experts) and triton.serves_experts(dy, base, branches):
        triton.backward(dx, rows, branches, (d_as, d_bs), base)
        if dweight is None and dbias is None:
            return dx, dweight, dbias, d_as, d_bs
        nothing = [False] * len(d_as)
        needs = Needs(False, needs.weight, needs.bias, nothing, nothing)
    together = None if isinstance(base, Experts) else _together(dy, branches)
    if together is not None:
        together.backward(dx, rows, branches, (d_as, d_bs))
    for group, place in members.of_groups(together):
        branch, need = adapters.branch(group), needs.of(group, isinstance(base, Experts))
        own: Dense | Given = Given(None)
        if isinstance(base, Experts):
            own = base.base(group)
            own = own if dx is None else own._replace(into=members.into(dx, place))
        some = members.take(dy, place)
        of_x = members.take(x, place) if need.a or need.weight else x
        low = s[place, : branch.lora_a.shape[0]] if need.b else s
        if any(need):
            backend = backends.serving(own, some, branch)
            d_x, d_weight, d_a, d_b = backend.backward(own, some, of_x, low, branch, need)
            if dx is not None and d_x is not None:
                (members.put if isinstance(base, Experts) else members.add)(dx, place, d_x)
            if d_a is not None:
                d_as[group] = d_a
            if d_b is not None:
                d_bs[group] = d_b
            if dweight is not None and d_weight is not None and isinstance(base, Experts):
                dweight[base.weight_of[group]] += d_weight
        if dbias is not None and isinstance(base, Experts):
            dbias[base.weight_of[group]] += some.sum(0)
    return dx, dweight, dbias, d_as, d_bs


def _together(rows: Tensor, branches: Branches) -> Any:
    """What computes the branches of the groups that it takes at once, for rows x or dy; None where
    each is a call of its own."""
    return next((each for each in (native, triton) if each.serves(rows, branches)), None)


def _base(base: Dense | Experts | Given, x: Tensor, members: Members) -> Tensor:
    """y of the base alone, where it is one product; zeros else, and past the served rows."""
    if isinstance(base, Given):
        assert base.out is not None  # of a forward
        return base.out.clone(memory_format=torch.contiguous_format)
    if isinstance(base, Experts):
        return _to_fill(x, base.weight.shape[1], members.are_all(x))
    y = _fast_product(x, base.weight, base.bias)
    if y is None:
        y = _torch_product(x, base.weight, base.bias)
    else:
        frozen_for_nobody(y, base, x, members)
    return _without_strangers(y, members)


def frozen_for_nobody(y: Tensor, base: Dense, x: Tensor, members: Members) -> Tensor:
    """Gives rows of no group of y [M,N] the bits of torch's own layer of x [M,K]; those of groups
    keep what they have without such neighbours."""
    if members.bounds[-2] < members.bounds[-1]:
        frozen, nobody = _torch_product(x, base.weight, base.bias), members.of_nobody()
        members.put(y, nobody, members.take(frozen, nobody))
    return y


def _to_fill(rows: Tensor, columns: int, whole: bool) -> Tensor:
    """As many rows, which the groups will fill as a whole; else of zeros."""
    return (rows.new_empty if whole else rows.new_zeros)(rows.shape[0], columns)


def _fast_product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """rows W^T + bias, None where torch's own is the fastest. All rows count, whose they are does
    not: a product of fewer may add up in another order."""
    with torch.no_grad():
        y = direct.linear(rows, weight, bias, direct.FROZEN)
    if y is None and blocked.is_wide(rows):
        return blocked.product(rows, weight, bias)
    return y


def _torch_product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(rows, weight.to(rows.dtype), None if bias is None else bias.to(rows.dtype))


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """rows W^T + bias by the fastest kernel."""
    y = _fast_product(rows, weight, bias)
    return _torch_product(rows, weight, bias) if y is None else y


def _without_strangers(rows: Tensor, members: Members) -> Tensor:
    """The rows, with zeros past the served ones."""
    if members.served < len(rows):
        rows[members.served :] = 0
    return rows


def _weight_gradient(dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    if blocked.is_wide(dy):
        return blocked.weight_gradient(dy, x, weight)
    return torch.mm(dy.t(), x).to(weight.dtype)


def _to_fill_of_groups(
    tensors: Sequence[Tensor], needed: Sequence[bool], members: Members
) -> list[Tensor | None]:
    """Gradients where they are asked for: zeros of a group without rows, of others to be filled."""
    lengths = (end - begin for begin, end in pairwise(members.bounds[:-1]))
    return [
        (tensor.new_empty if length else tensor.new_zeros)(tensor.shape) if need else None
        for tensor, need, length in zip(tensors, needed, lengths, strict=True)
    ]
