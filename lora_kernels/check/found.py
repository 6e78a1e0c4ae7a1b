"""The adapters of a model, this library's and PEFT's, as the check looks at them."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from lora_kernels import names
from lora_kernels.check.report import AdapterState
from lora_kernels.nn import LoRALayer


@dataclass(eq=False)
class Adapter:
    """One adapter of one layer; each that is in use is one."""

    layer: nn.Module
    base: nn.Module
    # lora_A and lora_B, or the parameters that a parametrization computes them from.
    A: list[nn.Parameter]
    B: list[nn.Parameter]
    scaling: float
    state: AdapterState
    # Merges all adapters of the layer; None where no comparison is made.
    merge: Callable[[], None] | None
    off: str | None  # "merged", "disabled" or "unused"
    freeze_a: bool = False
    calls: list["Call"] = field(default_factory=list)

    @property
    def weight(self) -> Tensor:
        """The base's, of an adapter that is merged."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight


@dataclass
class Call:
    rows: int
    grad: bool
    function: bool  # in the forward of an autograd function, which has a backward of its own


def find_adapters(model: nn.Module) -> Iterator[Adapter]:
    peft = sys.modules.get("peft.tuners.lora.layer")
    for name, layer in names.named_modules(model):
        if isinstance(layer, LoRALayer):
            name = name.removesuffix(layer.suffix)
            off = "merged" if layer.merged else "disabled" if layer._disabled else None
            several = len(layer.names) > 1  # others than those in use need the base
            fixed = layer.why_fixed() or layer.why_unmergeable(keep_base=several)
            merge = None if fixed else partial(layer.merge, several)
            for adapter in layer.active or layer.names[:1]:
                one = layer.adapter(adapter)
                state = AdapterState(f"{name} ({adapter})" if several else name)
                A, B = (one.factor_parameters(half) for half in ("lora_A", "lora_B"))
                unused = None if layer.active else "unused"
                off_now = off or unused
                scaling, fixed_A = float(one.scaling), one.freeze_a
                yield Adapter(layer, layer, A, B, scaling, state, merge, off_now, fixed_A)
        elif peft is not None and isinstance(layer, peft.LoraLayer):
            yield from _peft_adapters(name, layer)


def _peft_adapters(name: str, layer: Any) -> Iterator[Adapter]:
    base = layer.get_base_layer()
    weight = getattr(base, "weight", None)
    dense = isinstance(weight, Tensor) and weight.is_floating_point()
    # On quantised bases merging rounds the sum, and PEFT cannot merge all of its variants.
    dense = dense and type(base) in (nn.Linear, nn.Embedding)
    for adapter in layer.active_adapters:
        bias = layer.lora_bias.get(adapter) and base.bias is None
        dense = dense and adapter not in layer.lora_variant and not bias
    for adapter in layer.active_adapters:
        if adapter in layer.lora_A:
            A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        elif adapter in layer.lora_embedding_A:
            A, B = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
        else:
            continue
        off = "merged" if layer.merged else "disabled" if layer.disable_adapters else None
        merge = layer.merge if dense else None
        state = AdapterState(f"{name}.{adapter}")
        yield Adapter(layer, base, [A], [B], float(layer.scaling[adapter]), state, merge, off)


def nonzero(parameters: list[nn.Parameter]) -> bool:
    return any(bool(p.any()) for p in parameters)
