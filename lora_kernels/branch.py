"""What travels together: the low-rank branch of a call, the base it stands on, the gradients asked
for.

An op is a base times a branch. A backend is three functions of these:

    forward(base, x, branch, save_s) -> (y, s)
    add_(base_out, x, branch) -> s, whose columns past the rank, if any, mean nothing
    backward(base, dy, x, s, branch, need) -> (dx, dweight, dA, dB)

of matrices x [M,K], dy and y [M,N], s [M,r]. s is None where it is not saved, a gradient where it
is not needed; x is read for dweight and dA alone, s for dB alone, and either may be of size 0 else.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Branch(NamedTuple):
    """scaling * (drop(x) A^T) B^T: lora_a [r,K] and lora_b [N,r] in x's dtype or fp32. seed is an
    int64 tensor of one element, or of three with the row and the column of x's first element in a
    larger matrix; None without dropout."""

    lora_a: Tensor
    lora_b: Tensor
    scaling: float
    dropout_p: float
    seed: Tensor | None


class Branches(NamedTuple):
    """The branches of groups: `Branch` of each, in sequences, seed g of group g; and whose the rows
    are: `order`, `bounds` and `offsets` of `Groups`, all known."""

    lora_a: Sequence[Tensor]
    lora_b: Sequence[Tensor]
    scaling: Sequence[float]
    dropout_p: float
    seeds: Tensor | None
    order: Tensor | None
    bounds: Sequence[int]
    offsets: Tensor

    @property
    def rank(self) -> int:
        """The largest."""
        return max(a.shape[0] for a in self.lora_a)


class Dense(NamedTuple):
    """x W^T + bias: weight [N,K] and bias [N], rounded to x's dtype at use where they have another
    (autocast). into, rows that lie one after the other, is where y, or in a backward dx, may go; a
    backend may leave it and return others."""

    weight: Tensor
    bias: Tensor | None = None
    into: Tensor | None = None


class Experts(NamedTuple):
    """The bases of the groups: weight [E,N,K] and bias [E,N], expert weight_of[g] of group g."""

    weight: Tensor
    bias: Tensor | None
    weight_of: Sequence[int]

    def base(self, group: int) -> Dense:
        expert = self.weight_of[group]
        return Dense(self.weight[expert], None if self.bias is None else self.bias[expert])


class Given(NamedTuple):
    """A base output [M,N] that something else computed; backward needs nothing of it."""

    out: Tensor | None = None


Base = Dense | Given


class Need(NamedTuple):
    """Which gradients a backward computes."""

    x: bool
    weight: bool
    a: bool
    b: bool


class Needs(NamedTuple):
    """The gradients that are asked for: of x, the weight, the bias, and of each group's pair."""

    x: bool
    weight: bool
    bias: bool
    a: Sequence[bool]
    b: Sequence[bool]

    def of(self, group: int, weight: bool) -> Need:
        return Need(self.x, weight and self.weight, self.a[group], self.b[group])


def only(needed: Sequence[bool], results: Sequence[Tensor]) -> list[Tensor | None]:
    """The results that are needed, None for others."""
    return [result if need else None for need, result in zip(needed, results, strict=True)]


# Of several layers of the same rows.


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


# (dA, dB) of each layer.
Pairs = list[tuple[Tensor | None, Tensor | None]]
