"""Quantised weights in compiled CPU kernels: a layer of few rows that multiplies the codes as they
lie, and the decoder of a part of the weight for many rows.

Up to how many rows is measured, `python -m benchmarks.quantized --few`, by instruction set and
layout: beyond, decoding strips of the weight for torch's product is faster.
"""

from typing import Any

import torch
from torch import Tensor

from lora_kernels.backends import forced
from lora_kernels.backends.dropout import keep_scale, threshold
from lora_kernels.backends.native import extension
from lora_kernels.backends.native.few_rows import readable
from lora_kernels.backends.scaling import split
from lora_kernels.branch import Branch
from lora_kernels.weights import FourBit, Int8, QuantizedWeight

# By index of extension.ISA_NAMES: measured with AVX-512 BF16, and on that processor with the
# kernels of AVX2 and AVX-512; with tiles not, where torch's products of bf16 are faster.
MOST_ROWS: dict[tuple[str, torch.dtype], tuple[int, ...]] = {
    ("4bit", torch.float32): (0, 16, 128, 128, 128),
    ("4bit", torch.bfloat16): (0, 16, 8, 16, 8),
    ("4bit", torch.float16): (0, 16, 128, 128, 128),
    ("int8", torch.float32): (0, 64, 128, 128, 128),
    ("int8", torch.bfloat16): (0, 64, 8, 16, 8),
    ("int8", torch.float16): (0, 64, 128, 128, 128),
}
_WHOLE = 64  # columns that the kernels take at a time


def _knows(weight: QuantizedWeight, dtype: torch.dtype) -> bool:
    """Whether the kernels can read it as it lies."""
    if weight.device.type != "cpu" or dtype not in extension.DTYPES:
        return False
    if forced.now is not None and forced.now.backend != "native":
        return False
    if isinstance(weight, FourBit):
        N, K = weight.shape
        if weight.block % _WHOLE or K % weight.block or (N * K) % 2:
            return False
        floats = [weight.zero] if weight.outer_table is not None else [weight.scale, weight.zero]
    elif isinstance(weight, Int8):
        floats = [weight.scale, weight.zero]
    else:
        return False
    if any(one is not None and one.dtype != torch.float32 for one in floats):
        return False
    starts = ((part.data_ptr(), part.element_size()) for part in weight.parts)
    return extension.available() and all(start % size == 0 for start, size in starts)


def takes(x: Tensor, weight: QuantizedWeight) -> bool:
    """Whether one call computes the layer for these rows."""
    most = MOST_ROWS.get((weight.kind, x.dtype))
    if most is None or not x.is_cpu or x.numel() == 0 or not _knows(weight, x.dtype):
        return False
    if isinstance(weight, Int8) and weight.zero is not None:
        return False
    return x.shape[0] <= most[extension.best_isa()]


def decodes(weight: QuantizedWeight, columns: slice, dtype: torch.dtype) -> bool:
    """Whether `decode` makes these columns of it."""
    if not _knows(weight, dtype):
        return False
    first, last, step = int(columns.start), int(columns.stop), weight.step
    return first % step == 0 and last % step == 0


def forward(
    x: Tensor, weight: QuantizedWeight, bias: Tensor | None, branch: Branch | None, save_s: bool
) -> tuple[Tensor, Tensor | None]:
    """(y, s) of few rows x [M,K]; without a branch the frozen layer."""
    isa = extension.best_isa()
    bias = None if bias is None else readable(bias.to(x.dtype))
    given = _given(weight)
    call = torch.ops.lora_kernels._linear_coded_cpu
    y: Tensor
    if branch is None:
        y = call(readable(x), *given, None, None, bias, 1.0, 1.0, 0, None, isa, None)
        return y, None
    p, seed = branch.dropout_p, branch.seed if branch.dropout_p else None
    low, high = split(branch.scaling, x.dtype)
    s = x.new_empty(x.shape[0], branch.lora_a.shape[0]) if save_s else None
    y = call(
        readable(x), *given, readable(branch.lora_a), readable(branch.lora_b), bias,
        low * keep_scale(p) if p else low, high, threshold(p) if p else 0, seed, isa, s,
    )  # fmt: skip
    return y, s


def decode(weight: QuantizedWeight, rows: slice, columns: slice, out: Tensor) -> Tensor:
    """Rows and columns of the weight into `out`, bit for bit as its own `decode`."""
    torch.ops.lora_kernels._decode_cpu(
        *_given(weight), rows.start, columns.start, extension.best_isa(), out
    )
    return out


def _given(weight: QuantizedWeight) -> tuple[Any, ...]:
    """The weight as the kernels take it."""
    N, K = weight.shape
    if isinstance(weight, Int8):
        nothing = (None,) * 4
        return weight.codes, weight.scale, weight.zero, *nothing, weight.factor, [N, K, K, 1]
    assert isinstance(weight, FourBit)
    return (
        weight.codes, weight.scale, weight.zero, weight.table, weight.outer_table,
        weight.outer_scale, weight.offset, 1.0, [N, K, weight.block, weight.outer_block],
    )  # fmt: skip
