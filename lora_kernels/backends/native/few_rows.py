"""A whole layer in one native call, forward or backward, which reads the weight once: for few rows.

Up to how many is measured, `python -m benchmarks.native --few`, by the dtype of the weight, which
may be fp32 under rows of 16 bits: beyond, torch's product reuses what it has in registers for more
rows than these kernels do. Where a CPU has no instructions for products of 16 bits (of fp16 nearly
none has), torch forms them in fp32 too, and slower.

Matrices of rows may have any number of dimensions. Nothing is checked in Python: RuntimeError says
what the kernels do not take.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels.backends.dropout import keep_scale, threshold
from lora_kernels.backends.native import extension
from lora_kernels.backends.scaling import split
from lora_kernels.branch import Need

# By index of extension.ISA_NAMES. Without vector instructions torch's own loops are as good. But by
# tiles the backward widens bf16 to fp32; torch does not where it has instructions for bf16.
# Measured on processors of AMD, where torch's products are slower (AVX2, AVX-512 BF16), and of
# Intel (AMX); AVX-512 without products of bf16 on none, and NEON on none: there the least, where
# memory is what is waited for.
MOST_ROWS: dict[torch.dtype, tuple[int, ...]] = {
    torch.float32: (0, 96, 48, 256, 48, 4, 4),
    torch.bfloat16: (0, 192, 16, 64, 192, 4, 4),
    torch.float16: (0, 192, 48, 256, 48, 4, 4),
}
MOST_ROWS_BACKWARD: dict[torch.dtype, tuple[int, ...]] = {
    torch.float32: (0, 128, 48, 256, 48, 4, 4),
    torch.bfloat16: (0, 256, 8, 96, 128, 4, 4),
    torch.float16: (0, 256, 48, 256, 48, 4, 4),
}
# A layer so small is bound by the host, which one call keeps less busy: so many times as many.
_SMALL = 1 << 20  # elements of the weight
FACTOR_OF_SMALL: dict[torch.dtype, tuple[int, ...]] = {
    torch.float32: (1, 1, 2, 1, 2, 1, 1),
    torch.bfloat16: (1, 1, 1, 1, 1, 1, 1),
    torch.float16: (1, 1, 2, 1, 2, 1, 1),
}


def most_rows(dtype: torch.dtype, isa: int, backward: bool = False) -> int:
    """How many rows are few for a weight of a dtype, not a small one; 0 without kernels."""
    table = MOST_ROWS_BACKWARD if backward else MOST_ROWS
    return table[dtype][isa] if dtype in table else 0


class FewRows:
    """The calls for one instruction set, an index of `extension.ISA_NAMES`."""

    def __init__(self, isa: int) -> None:
        self.isa = isa
        self._factor_of_small = {dtype: of_isa[isa] for dtype, of_isa in FACTOR_OF_SMALL.items()}
        self._most = {dtype: most_rows(dtype, isa) for dtype in MOST_ROWS}
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
        self.linear, self._backward, self.grouped = (
            getattr(op.default, "_op", op.default)
            for op in (ops._linear_cpu, ops._linear_backward_cpu, ops._linear_grouped_cpu)
        )

    def most(self, weight: Tensor, trains: bool) -> int:
        """How many rows a call may have, one with a gradient where it trains."""
        most = (self._most_trained if trains else self._most).get(weight.dtype, 0)
        return most * self._factor_of_small[weight.dtype] if most and is_small(weight) else most

    def forward(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, branch: tuple[Any, ...], save_s: bool
    ) -> tuple[Tensor, Tensor | None]:
        """(y, s) of a `Branch`."""
        a, b, low, p, seed = branch
        high, drops = 1.0, 0
        if x.dtype == torch.float16:
            low, high = split(low, x.dtype)
        if p:
            low, drops = low * keep_scale(p), threshold(p)
        s = x.new_empty(x.numel() // a.shape[1], a.shape[0]) if save_s else None
        return self.linear(x, weight, a, b, bias, low, high, drops, seed, self.isa, s), s

    def backward(
        self, weight: Tensor, rows: "Rows", branch: tuple[Any, ...], need: Need
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(dx, dA, dB), None where not needed."""
        (dy, x, s), (a, b, scaling, p, seed), (need_x, _, need_a, need_b) = rows, branch, need
        high = split(scaling, dy.dtype)[1] if dy.dtype == torch.float16 else 1.0
        keep, drops = (keep_scale(p), threshold(p)) if p else (1.0, 0)
        dx, d_a, d_b = self._backward(
            readable(dy), x if need_a else None, weight, a, b, s if need_b else None, scaling, high,
            keep, drops, seed, self.isa, need_x, need_a, need_b,
        )  # fmt: skip
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


def are_few(rows: int, weight: Tensor, isa: int, backward: bool = False) -> bool:
    """Whether so many rows are few for a weight."""
    most = most_rows(weight.dtype, isa, backward)
    if most and is_small(weight):
        most *= FACTOR_OF_SMALL[weight.dtype][isa]
    return rows <= most


def is_small(weight: Tensor) -> bool:
    return weight.numel() <= _SMALL


def fits(weight: Tensor) -> bool:
    """Whether the kernels read a weight as it lies: by rows or by columns. A copy of it would cost
    more than they gain."""
    return 1 in weight.stride() and weight.data_ptr() % weight.element_size() == 0


def of_this_machine() -> FewRows:
    return FewRows(extension.best_isa())


def describe() -> list[str]:
    """A line for each dtype: up to how many rows one call computes a layer on this CPU."""
    if not extension.available():
        return []
    isa = extension.best_isa()
    return [
        f"{str(dtype).removeprefix('torch.')}: up to {most_rows(dtype, isa)} in one call, backward"
        f" up to {most_rows(dtype, isa, backward=True)}"
        for dtype in MOST_ROWS
    ]
