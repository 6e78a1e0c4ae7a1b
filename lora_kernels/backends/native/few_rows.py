"""A whole layer in one native call, forward or backward, which reads the weight once: for few rows,
as many as `choice` says.

Matrices of rows may have any number of dimensions. Nothing is checked in Python: RuntimeError says
what the kernels do not take.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels.backends.dropout import keep_scale, threshold
from lora_kernels.backends.native import choice, extension
from lora_kernels.backends.scaling import split
from lora_kernels.branch import Need


def most_rows(dtype: torch.dtype, isa: int, backward: bool = False) -> int:
    """How many rows are few for a weight of a dtype, not a small one; 0 without kernels."""
    few = choice.few(dtype, isa)
    return few.backward if backward else few.forward


class FewRows:
    """The calls for one instruction set, an index of `extension.ISA_NAMES`."""

    def __init__(self, isa: int) -> None:
        self.isa = isa
        self._factor_of_small = {d: choice.few(d, isa).of_small for d in extension.DTYPES}
        self._most = {dtype: most_rows(dtype, isa) for dtype in extension.DTYPES}
        self._most_trained = {
            dtype: min(most, most_rows(dtype, isa, backward=True))
            for dtype, most in self._most.items()
        }
        ops = torch.ops.lora_kernels
        self.linear: Any
        """_linear_cpu; with no seed and no s, what infers."""
        # What the overloads call, if they still have it: their own part takes half a microsecond.
        self.grouped: Any
        """_linear_grouped_cpu, of many adapters, which infers."""
        self.packed: Any
        """_linear_packed_cpu, of so many rows of many adapters that they are packed."""
        self.linear, self._backward, self.grouped, self.packed = (
            getattr(op.default, "_op", op.default)
            for op in (
                ops._linear_cpu,
                ops._linear_backward_cpu,
                ops._linear_grouped_cpu,
                ops._linear_packed_cpu,
            )
        )

    def most(self, weight: Tensor, trains: bool) -> int:
        """How many rows a call may have, one with a gradient where it trains."""
        most = (self._most_trained if trains else self._most).get(weight.dtype, 0)
        return (
            most * self._factor_of_small[weight.dtype] if most and choice.is_small(weight) else most
        )

    def forward(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, branch: tuple[Any, ...], save_s: bool,
        into: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """(y, s) of a `Branch`; y is `into` [M,N] where that is given."""
        a, b, low, p, seed = branch
        high, drops = 1.0, 0
        if x.dtype == torch.float16:
            low, high = split(low, x.dtype)
        if p:
            low, drops = low * keep_scale(p), threshold(p)
        s = x.new_empty(x.numel() // a.shape[1], a.shape[0]) if save_s else None
        y = self.linear(x, weight, a, b, bias, low, high, drops, seed, self.isa, s, into)
        return y if into is None else into, s

    def backward(
        self, weight: Tensor, rows: "Rows", branch: tuple[Any, ...], need: Need,
        into: Tensor | None = None, adds: bool = False,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
        """(dx, dA, dB), None where not needed; dx is `into` [M,K] where that is given, and where it
        `adds` that and itself."""
        (dy, x, s), (a, b, scaling, p, seed), (need_x, _, need_a, need_b) = rows, branch, need
        high = split(scaling, dy.dtype)[1] if dy.dtype == torch.float16 else 1.0
        keep, drops = (keep_scale(p), threshold(p)) if p else (1.0, 0)
        dx, d_a, d_b = self._backward(
            readable(dy), x if need_a else None, weight, a, b, s if need_b else None, scaling, high,
            keep, drops, seed, self.isa, need_x, need_a, need_b, into if need_x else None,
            adds,
        )  # fmt: skip
        dx = dx if into is None else into
        return dx if need_x else None, d_a if need_a else None, d_b if need_b else None


class Rows(NamedTuple):
    """What has the rows of a backward; x is read for dA, s for dB."""

    dy: Tensor
    x: Tensor | None
    s: Tensor | None


def readable(tensor: Tensor) -> Tensor:
    """The tensor, or a copy that the kernels can read: with contiguous rows that start at a
    multiple of their elements' size."""
    if tensor.data_ptr() % tensor.element_size():
        return tensor.clone(memory_format=torch.contiguous_format)
    if tensor.dim() <= 2 and tensor.stride(-1) == 1:
        return tensor
    return tensor.contiguous()


def are_few(
    rows: int, weight: Tensor, isa: int, backward: bool = False, dtype: torch.dtype | None = None
) -> bool:
    """Whether so many rows are few for a weight of their dtype, or one of fp32."""
    own = weight.dtype
    if dtype is not None and dtype != own:
        found = choice.widened(rows, dtype, isa) if own == torch.float32 else None
        if found is None:
            return False
        own = found
    most = most_rows(own, isa, backward)
    if most and choice.is_small(weight):
        most *= choice.few(own, isa).of_small
    return rows <= most


def fits(weight: Tensor) -> bool:
    """Whether the kernels read a weight as it lies: by rows or by columns. A copy of it would cost
    more than they gain."""
    return 1 in weight.stride() and weight.data_ptr() % weight.element_size() == 0


def of_this_machine() -> FewRows:
    return FewRows(extension.best_isa())


def describe() -> list[str]:
    """A line for each dtype: how many rows one call computes a layer of on this CPU."""
    if not extension.available():
        return []
    found = {dtype: choice.few(dtype, extension.best_isa()) for dtype in extension.DTYPES}
    return [
        f"{str(dtype).removeprefix('torch.')}: {choice.rows(few.forward)} in one call, backward"
        f" {choice.rows(few.backward)}"
        for dtype, few in found.items()
    ]
