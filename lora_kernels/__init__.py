"""LoRA linear layers at the price of the frozen layer: fused kernels behind a drop-in nn.Linear."""

from lora_kernels.adapters import lora_parameters, lora_state_dict
from lora_kernels.checkpoint import load_adapter, save_adapter
from lora_kernels.convert import (
    LoraReport,
    apply_lora,
    disable_adapters,
    merge_lora,
    remove_lora,
    unmerge_lora,
)
from lora_kernels.functional import lora_add, lora_add_, lora_linear
from lora_kernels.nn import FusedLoRALinear

__version__ = "0.1.0"

__all__ = [
    "FusedLoRALinear",
    "LoraReport",
    "apply_lora",
    "disable_adapters",
    "load_adapter",
    "lora_add",
    "lora_add_",
    "lora_linear",
    "lora_parameters",
    "lora_state_dict",
    "merge_lora",
    "remove_lora",
    "save_adapter",
    "unmerge_lora",
]
