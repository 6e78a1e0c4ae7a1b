"""What `kernels.kernelize` puts in the place of a layer's forward. No state: all that is read is
the adopting layer's own."""

from typing import Any

import torch
from torch import Tensor, nn

from ._contract import DTYPES
from .functional import lora_linear


class LoRALinear(nn.Module):
    """The forward of PEFT's `tuners.lora.Linear`, base product and adapter in one op.

    x [..., K] -> [..., N]. One active adapter on an nn.Linear, with dropout or without, in x's
    dtype or under autocast. Every other call is computed by the adopting layer's own class, as if
    nothing had been replaced: adapters that are disabled, merged, several or of a variant (DoRA),
    `lora_bias`, `adapter_names`, hooks on the layers inside, other bases, other dtypes.
    """

    has_backward: bool = True
    can_torch_compile: bool = True

    base_layer: nn.Module
    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict
    lora_dropout: nn.ModuleDict
    scaling: dict[str, float]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = None if args or kwargs else _adapter(self, x)
        if name is None:
            y: Tensor = type(self).forward(self, x, *args, **kwargs)
            return y
        base, dropout = self.base_layer, self.lora_dropout[name]
        return lora_linear(
            x, base.weight, self.lora_A[name].weight, self.lora_B[name].weight, base.bias,
            scaling=self.scaling[name],
            dropout_p=dropout.p if dropout.training and type(dropout) is nn.Dropout else 0.0,
        )  # fmt: skip


def _adapter(layer: Any, x: Tensor) -> str | None:
    """The name of the adapter that one op computes with the base; None where it would not be what
    the layer's own forward computes."""
    if layer.disable_adapters or layer.merged or torch.jit.is_tracing():
        return None
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(names) != 1 or names[0] in getattr(layer, "lora_variant", ()):
        return None
    inside = [layer.base_layer, *(half[names[0]] for half in (layer.lora_A, layer.lora_B))]
    if any(type(each) is not nn.Linear for each in inside) or inside[2].bias is not None:
        return None
    dropout = layer.lora_dropout[names[0]]
    if type(dropout) not in (nn.Dropout, nn.Identity) or getattr(dropout, "p", 0.0) >= 1:
        return None
    if any(each._forward_hooks or each._forward_pre_hooks for each in (*inside, dropout)):
        return None
    if any(each._backward_hooks or each._backward_pre_hooks for each in (*inside, dropout)):
        return None
    if torch.is_autocast_enabled(x.device.type):
        takes = torch.float64 not in (x.dtype, *(each.weight.dtype for each in inside))
    else:
        takes = all(each.weight.dtype == x.dtype for each in inside)
    return names[0] if takes and x.dtype in DTYPES else None
