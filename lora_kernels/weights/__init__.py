"""Weights in fewer bits: records of the tensors that hold them, and how they are decoded."""

from lora_kernels.weights.layouts import Awq, Float8, FourBit, Gptq, Int8
from lora_kernels.weights.owners import (
    from_awq,
    from_bitsandbytes,
    from_fp8,
    from_gptq,
    from_torchao,
)
from lora_kernels.weights.quantize import KINDS, quantize
from lora_kernels.weights.record import QuantizedWeight, assemble, shape_of

__all__ = [
    "KINDS",
    "Awq",
    "Float8",
    "FourBit",
    "Gptq",
    "Int8",
    "QuantizedWeight",
    "assemble",
    "from_awq",
    "from_bitsandbytes",
    "from_fp8",
    "from_gptq",
    "from_torchao",
    "quantize",
    "shape_of",
]
