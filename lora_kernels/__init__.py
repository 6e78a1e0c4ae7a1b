"""LoRA linear layers as one op: fused kernels behind a drop-in nn.Linear."""

from lora_kernels import adapters
from lora_kernels._version import __version__ as __version__
from lora_kernels.adapters import adapter_names, lora_parameters, lora_state_dict
from lora_kernels.ahead import warmup
from lora_kernels.blocks import BlockReport, fuse_blocks, unfuse_blocks
from lora_kernels.check import AdapterReport, check_adapters
from lora_kernels.checkpoint import load_adapter, save_adapter
from lora_kernels.convert import (
    LoraReport,
    add_adapter,
    apply_lora,
    disable_adapters,
    merge_lora,
    remove_lora,
    unmerge_lora,
)
from lora_kernels.embedding import lora_embedding
from lora_kernels.eva import EvaReport, initialize_eva
from lora_kernels.functional import lora_add, lora_add_, lora_linear
from lora_kernels.grouped import Groups, lora_add_grouped, lora_linear_grouped
from lora_kernels.integrations import transformers as _transformers
from lora_kernels.integrations.transformers import register_experts
from lora_kernels.merged import merged_state_dict
from lora_kernels.mlp import lora_swiglu_mlp
from lora_kernels.nn import FusedLoRAConv1D, FusedLoRAEmbedding, FusedLoRALinear
from lora_kernels.packed import Projection, lora_linear_packed
from lora_kernels.quantizing import (
    QuantizationReport,
    load_quantized,
    quantize_base,
    save_quantized,
)
from lora_kernels.rank import low_rank_approximation
from lora_kernels.recipes import add_adaptor_layer, adjust_rank, evaluate_model, train_model
from lora_kernels.reference_model import reference_model
from lora_kernels.several import adapter_rows, delete_adapter, set_adapter
from lora_kernels.tuning import TuningReport, tune
from lora_kernels.weights import QuantizedWeight, quantize

__all__ = [
    "AdapterReport",
    "BlockReport",
    "EvaReport",
    "FusedLoRAConv1D",
    "FusedLoRAEmbedding",
    "FusedLoRALinear",
    "Groups",
    "LoraReport",
    "Projection",
    "QuantizationReport",
    "QuantizedWeight",
    "TuningReport",
    "adapter_names",
    "adapter_rows",
    "add_adapter",
    "add_adaptor_layer",
    "adjust_rank",
    "apply_lora",
    "check_adapters",
    "delete_adapter",
    "disable_adapters",
    "evaluate_model",
    "fuse_blocks",
    "fuse_peft",
    "initialize_eva",
    "load_adapter",
    "load_quantized",
    "lora_add",
    "lora_add_",
    "lora_add_grouped",
    "lora_embedding",
    "lora_linear",
    "lora_linear_grouped",
    "lora_linear_packed",
    "lora_parameters",
    "lora_state_dict",
    "lora_swiglu_mlp",
    "low_rank_approximation",
    "merge_lora",
    "merged_state_dict",
    "quantize",
    "quantize_base",
    "reference_model",
    "register_experts",
    "register_fused_lora",
    "remove_lora",
    "save_adapter",
    "save_quantized",
    "set_adapter",
    "train_model",
    "tune",
    "unfuse_blocks",
    "unfuse_peft",
    "unmerge_lora",
    "warmup",
]

adapters.guards.append(adapters.Guard(_transformers.guard, _transformers.release))

_NEEDS_PEFT = ("fuse_peft", "register_fused_lora", "unfuse_peft")


def __getattr__(name: str) -> object:
    if name in _NEEDS_PEFT:
        from lora_kernels.integrations import peft

        return getattr(peft, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
