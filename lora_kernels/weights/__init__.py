"""Weights in fewer bits: records of the tensors that hold them, and how they are decoded."""

from lora_kernels.weights.kinds import CODED, FOUR_BIT, kind_of, sample
from lora_kernels.weights.layouts import Awq, Float8, FourBit, Gptq, Int8
from lora_kernels.weights.owners import (
    from_awq,
    from_bitsandbytes,
    from_fp8,
    from_gptq,
    from_torchao,
)
from lora_kernels.weights.quantize import KINDS, like, quantize
from lora_kernels.weights.record import QuantizedWeight, assemble, shape_of
from lora_kernels.weights.tensor import QuantizedTensor

__all__ = [
    "CODED",
    "FOUR_BIT",
    "KINDS",
    "Awq",
    "Float8",
    "FourBit",
    "Gptq",
    "Int8",
    "QuantizedTensor",
    "QuantizedWeight",
    "assemble",
    "from_awq",
    "from_bitsandbytes",
    "from_fp8",
    "from_gptq",
    "from_torchao",
    "kind_of",
    "like",
    "quantize",
    "sample",
    "shape_of",
]
