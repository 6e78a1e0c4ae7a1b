"""The layers with an adapter: `FusedLoRALinear` for nn.Linear, `FusedLoRAConv1D` for Transformers'
Conv1D, `FusedLoRAEmbedding` for nn.Embedding, `FusedLoRAConv1d`, `FusedLoRAConv2d` and
`FusedLoRAConv3d` for convolutions."""

from torch import nn

from lora_kernels.bases import is_conv1d, is_convolution
from lora_kernels.nn.conv import (
    OF_CONVOLUTION,
    FusedLoRAConv1d,
    FusedLoRAConv2d,
    FusedLoRAConv3d,
)
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
    "FusedLoRAConv1d",
    "FusedLoRAConv2d",
    "FusedLoRAConv3d",
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
for _of_convolution in OF_CONVOLUTION.values():
    _of_convolution.__module__ = __name__


def layer_class(base: nn.Module, use_dora: bool = False) -> type[LoRALayer]:
    """The layer with an adapter for a base that `targets.objection` has nothing against."""
    kind: type[LoRALayer] = FusedLoRAConv1D if is_conv1d(base) else FusedLoRALinear
    if isinstance(base, nn.Embedding):
        kind = FusedLoRAEmbedding
    if is_convolution(base):
        kind = next(of for plain, of in OF_CONVOLUTION.items() if isinstance(base, plain))
    return kind.with_magnitude() if use_dora else kind
