"""A whole layer in one native call, forward or backward, which reads the weight once: for few rows.

Up to how many is measured, `python -m benchmarks.native --few`: beyond, torch's product reuses what
it has in registers for more rows than these kernels do. Where a CPU has no instructions for
products of 16 bits (of fp16 nearly none has), torch forms them in fp32 too, and slower.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lora_kernels.backends.native import extension

# By index of extension.ISA_NAMES. Without vector instructions torch's own loops are as good.
MOST_ROWS = {
    torch.float32: (0, 64, 32, 32),
    torch.bfloat16: (0, 64, 16, 16),
    torch.float16: (0, 64, 64, 64),
}
MOST_ROWS_BACKWARD = {
    torch.float32: (0, 64, 32, 32),
    torch.bfloat16: (0, 64, 8, 8),
    torch.float16: (0, 64, 64, 64),
}

# (x [..., K], weight [N, K], lora_a, lora_b, bias, scaling) -> y [..., N], as `lora_linear`'s.
Direct = Callable[
    [Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, float], Tensor | None
]


def most_rows(dtype: torch.dtype, isa: int, backward: bool = False) -> int:
    """How many rows are few; 0 for a dtype without kernels."""
    table = MOST_ROWS_BACKWARD if backward else MOST_ROWS
    return table[dtype][isa] if dtype in table else 0


def readable(tensor: Tensor) -> Tensor:
    """The tensor, or a copy that the kernels can read: with contiguous rows that start at a
    multiple of their elements' size."""
    if not _is_aligned(tensor):
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def fits(weight: Tensor) -> bool:
    """Whether the kernels read a weight as it lies: by rows or by columns. A copy of it would cost
    more than they gain."""
    return 1 in weight.stride() and _is_aligned(weight)


def _is_aligned(tensor: Tensor) -> bool:
    return tensor.data_ptr() % tensor.element_size() == 0


@cache
def direct() -> Direct:
    """The call by which layers and `lora_linear` pass everything over where no gradient is asked
    for: the arguments are not checked before, RuntimeError says that they are not such as the
    kernel takes. None for more than a few rows."""
    isa, overload = extension.best_isa(), torch.ops.lora_kernels._linear_cpu.default
    linear = getattr(overload, "_op", overload)  # what the overload calls, if it still has it
    most = {dtype: most_rows(dtype, isa) for dtype in MOST_ROWS}

    def call(x: Tensor, weight: Tensor, *others: Any) -> Tensor | None:
        if x.numel() > most.get(x.dtype, 0) * weight.shape[-1]:
            return None
        y: Tensor = linear(x, weight, *others, 1.0, 0, None, isa, None)
        return y

    return call
