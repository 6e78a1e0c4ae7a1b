"""The layers with an adapter: `FusedLoRALinear` for nn.Linear, `FusedLoRAConv1D` for Transformers'
Conv1D, `FusedLoRAEmbedding` for nn.Embedding."""

from torch import nn

from lora_kernels.bases import is_conv1d
from lora_kernels.nn.conv1d import FusedLoRAConv1D
from lora_kernels.nn.dora import FusedDoRAConv1D, FusedDoRALinear
from lora_kernels.nn.embedding import FusedLoRAEmbedding
from lora_kernels.nn.experts import LoRAExpertProduct, LoRAExperts
from lora_kernels.nn.layer import AdapterOptions, LoRALayer
from lora_kernels.nn.linear import FusedLoRALinear
from lora_kernels.nn.named import DEFAULT, NamedAdapter, OfRows, Rows, check_name
from lora_kernels.nn.tokens import TrainableTokens

__all__ = [
    "DEFAULT",
    "AdapterOptions",
    "FusedDoRAConv1D",
    "FusedDoRALinear",
    "FusedLoRAConv1D",
    "FusedLoRAEmbedding",
    "FusedLoRALinear",
    "LoRAExpertProduct",
    "LoRAExperts",
    "LoRALayer",
    "NamedAdapter",
    "OfRows",
    "Rows",
    "TrainableTokens",
    "check_name",
    "layer_class",
]

# What pickles name, and users import them from.
for _kind in (
    FusedLoRALinear, FusedLoRAConv1D, FusedLoRAEmbedding, FusedDoRALinear, FusedDoRAConv1D,
):  # fmt: skip
    _kind.__module__ = __name__


def layer_class(base: nn.Module, use_dora: bool = False) -> type[LoRALayer]:
    """The layer with an adapter for a base that `targets.objection` has nothing against."""
    kind: type[LoRALayer] = FusedLoRAConv1D if is_conv1d(base) else FusedLoRALinear
    if isinstance(base, nn.Embedding):
        kind = FusedLoRAEmbedding
    return kind.with_magnitude() if use_dora else kind
