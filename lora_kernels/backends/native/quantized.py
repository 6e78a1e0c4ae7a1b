"""Quantised weights in compiled CPU kernels: a layer of few rows that multiplies the codes as they
lie, and the decoder of a part of the weight for many rows.

Up to how many rows `choice` says: beyond, decoding strips of the weight for torch's product is
faster.
"""

from typing import Any

import torch
from torch import Tensor

from lora_kernels.backends import forced
from lora_kernels.backends.dropout import keep_scale, threshold
from lora_kernels.backends.native import choice, extension
from lora_kernels.backends.native.few_rows import readable
from lora_kernels.backends.scaling import split
from lora_kernels.branch import Branch
from lora_kernels.weights import FourBit, Int8, QuantizedWeight

_KINDS = "4bit", "int8"
_WHOLE = 64  # columns that the kernels take at a time


_Given = tuple[Any, ...]
_HELD = "_native_given"  # the attribute of a weight that holds the answer


def given(weight: QuantizedWeight) -> _Given | None:
    """The weight as the kernels take it, where they can read it as it lies; asked once of each."""
    held = weight.__dict__
    if _HELD not in held:
        held[_HELD] = _given(weight)
    answer: _Given | None = held[_HELD]
    return answer


def _given(weight: QuantizedWeight) -> _Given | None:
    if weight.device.type != "cpu" or not extension.available():
        return None
    N, K = weight.shape
    if isinstance(weight, FourBit):
        if weight.block % _WHOLE or K % weight.block:
            return None
        plain = (weight.zero,) if weight.outer_table is not None else (weight.scale, weight.zero)
        found: _Given = (
            weight.codes, weight.scale, weight.zero, weight.table, weight.outer_table,
            weight.outer_scale, weight.offset, 1.0, [N, K, weight.block, weight.outer_block],
        )  # fmt: skip
    elif isinstance(weight, Int8):
        plain, nothing = (weight.scale, weight.zero), (None,) * 4
        found = (weight.codes, weight.scale, weight.zero, *nothing, weight.factor, [N, K, K, 1])
    else:
        return None
    if any(one is not None and one.dtype != torch.float32 for one in plain):
        return None
    starts = ((part.data_ptr(), part.element_size()) for part in weight.parts)
    return found if all(start % size == 0 for start, size in starts) else None


def _is_left() -> bool:
    """Whether another backend is forced."""
    return forced.now is not None and forced.now.backend != "native"


def most_rows(weight: QuantizedWeight, dtype: torch.dtype) -> int:
    """Up to how many rows in a dtype one call computes the layer; 0 where it does not."""
    if dtype not in extension.DTYPES or weight.kind not in _KINDS or given(weight) is None:
        return 0
    if isinstance(weight, Int8) and weight.zero is not None:
        return 0
    return most_coded(weight.kind, dtype)


def most_coded(kind: str, dtype: torch.dtype) -> int:
    """The same of a kind of weight and a dtype that the kernels take."""
    few = choice.few(dtype, extension.best_isa())
    return few.four_bit if kind == "4bit" else few.int8


def takes(x: Tensor, weight: QuantizedWeight) -> bool:
    """Whether one call computes the layer for these rows [M,K]."""
    return x.is_cpu and not _is_left() and 0 < x.shape[0] <= most_rows(weight, x.dtype)


def decodes(weight: QuantizedWeight, columns: slice, dtype: torch.dtype) -> bool:
    """Whether `decode` makes these columns of it."""
    if dtype not in extension.DTYPES or _is_left() or given(weight) is None:
        return False
    first, last, step = int(columns.start), int(columns.stop), weight.step
    return first % step == 0 and last % step == 0


def call(x: Tensor, weight: QuantizedWeight, bias: Tensor | None, branch: Any) -> Tensor:
    """y [..., N] of few rows x [..., K], of what is as the kernels take it; RuntimeError where it
    is not. branch: lora_a, lora_b, or None for both, and scaling; nothing is dropped."""
    a, b, scaling = branch
    high = 1.0
    if x.dtype == torch.float16:
        scaling, high = split(scaling, x.dtype)
    y: Tensor = torch.ops.lora_kernels._linear_coded_cpu.default(
        x, *_asked(weight), a, b, bias, scaling, high, 0, None, extension.best_isa(), None
    )
    return y


def forward(
    x: Tensor, weight: QuantizedWeight, bias: Tensor | None, branch: Branch | None, save_s: bool
) -> tuple[Tensor, Tensor | None]:
    """(y, s) of few rows x [M,K]; without a branch the frozen layer."""
    bias = None if bias is None else readable(bias.to(x.dtype))
    if branch is None:
        return call(readable(x), weight, bias, (None, None, 1.0)), None
    p, seed = branch.dropout_p, branch.seed if branch.dropout_p else None
    low, high = split(branch.scaling, x.dtype)
    isa = extension.best_isa()
    s = x.new_empty(x.shape[0], branch.lora_a.shape[0]) if save_s else None
    y: Tensor = torch.ops.lora_kernels._linear_coded_cpu(
        readable(x), *_asked(weight), readable(branch.lora_a), readable(branch.lora_b), bias,
        low * keep_scale(p), high, threshold(p), seed, isa, s,
    )  # fmt: skip
    return y, s


def decode(weight: QuantizedWeight, rows: slice, columns: slice, out: Tensor) -> Tensor:
    """Rows and columns of the weight into `out`, bit for bit as its own `decode`."""
    torch.ops.lora_kernels._decode_cpu(
        *_asked(weight), rows.start, columns.start, extension.best_isa(), out
    )
    return out


def _asked(weight: QuantizedWeight) -> _Given:
    found = given(weight)
    assert found is not None  # of a weight that was asked for
    return found


def describe() -> list[str]:
    """A line for each layout: up to how many rows one call computes a layer on this CPU."""
    if not extension.available():
        return []
    return [
        f"{kind} weights: up to "
        + ", ".join(
            f"{most_coded(kind, dtype)} of {str(dtype).removeprefix('torch.')}"
            for dtype in extension.DTYPES
        )
        + " rows in one call"
        for kind in _KINDS
    ]
