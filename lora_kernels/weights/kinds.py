"""The kinds of quantised weights for which the kernels that decode in their product are other code:
what a tuned table tells apart, and a weight of each to tune with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lora_kernels.weights.layouts import Float8, FourBit, Int8
from lora_kernels.weights.quantize import quantize
from lora_kernels.weights.record import QuantizedWeight

FOUR_BIT = ("nf4", "4bit", "int4")
_SIDE = 128  # of the square blocks of FP8 checkpoints


def kind_of(weight: QuantizedWeight) -> str | None:
    """One of `CODED`, whatever its blocks and the dtype of its scales; None for other layouts."""
    if isinstance(weight, FourBit):
        if weight.zero is not None:
            return "int4" if weight.outer_table is None else None
        return "4bit" if weight.outer_table is None else "nf4"
    if isinstance(weight, Int8):
        return "int8" if weight.zero is None else "int8_zero"
    if isinstance(weight, Float8):
        if weight.block:
            return "fp8_block"
        return "fp8_tensor" if weight.scale.numel() == 1 else "fp8"
    return None


def sample(dense: Tensor, kind: str) -> QuantizedWeight:
    """A weight [N, K] as one of a kind."""
    return _MAKERS[kind](dense.detach())


def _plain(dense: Tensor) -> QuantizedWeight:
    """As "nf4", with scales in fp32."""
    weight = quantize(dense, "nf4")
    assert isinstance(weight, FourBit)
    scale = weight.block_scales(0, len(weight.scale))
    return replace(weight, scale=scale, outer_table=None, outer_scale=None, offset=None)


def _shifted(dense: Tensor) -> QuantizedWeight:
    """As "int8", of rows with zeros of their own."""
    weight = quantize(dense, "int8")
    assert isinstance(weight, Int8)
    zero = torch.arange(len(dense), device=dense.device) % 5 - 2
    return replace(weight, zero=zero.float())


def _of_one_scale(dense: Tensor) -> QuantizedWeight:
    largest = dense.float().abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
    scale = (largest / torch.finfo(torch.float8_e4m3fn).max).view(1, 1)
    codes = (dense.float() / scale).to(torch.float8_e4m3fn)
    return Float8((dense.shape[0], dense.shape[1]), codes, scale)


_MAKERS: dict[str, Callable[[Tensor], QuantizedWeight]] = {
    "int8": lambda dense: quantize(dense, "int8"),
    "int8_zero": _shifted,
    "nf4": lambda dense: quantize(dense, "nf4"),
    "4bit": _plain,
    "int4": lambda dense: quantize(dense, "int4", block=_dividing(dense.shape[1])),
    "fp8": lambda dense: quantize(dense, "fp8"),
    "fp8_tensor": _of_one_scale,
    "fp8_block": lambda dense: quantize(dense, "fp8", block=_SIDE),
}
CODED = tuple(_MAKERS)


def _dividing(K: int) -> int:
    """The largest block of int4, of up to 128 columns, of which a row is a whole number."""
    return next((block for block in (128, 64, 32, 16, 8, 4) if K % block == 0), 2)
