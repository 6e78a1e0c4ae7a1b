"""Fused kernels for the LoRA linear layer, as a kernel of the Hugging Face Hub."""

from . import layers
from .functional import lora_add, lora_add_, lora_linear
from .grouped import Groups, lora_add_grouped, lora_linear_grouped
from .mlp import lora_swiglu_mlp
from .packed import Projection, lora_linear_packed
from .weights import QuantizedWeight, quantize

__all__ = [
    "Groups",
    "Projection",
    "QuantizedWeight",
    "layers",
    "lora_add",
    "lora_add_",
    "lora_add_grouped",
    "lora_linear",
    "lora_linear_grouped",
    "lora_linear_packed",
    "lora_swiglu_mlp",
    "quantize",
]
