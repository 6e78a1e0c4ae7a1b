"""PEFT models on the fused op: in place, without a renamed parameter or a replaced module.

A fused layer is the same object under a subclass of its own PEFT class that overrides `forward`
alone. Whatever the fused op does not cover at the moment of the call goes to PEFT's own forward.

Works with PEFT 0.20 to 0.21.
"""

import copy
from dataclasses import dataclass, field
from functools import cache, partial

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.model import LoraModel
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.pytorch_utils import Conv1D

from lora_kernels import targets
from lora_kernels.functional import lora_add, lora_linear

# PEFT's layers that compute base_layer(x) plus the branch; on all but the first the base is
# quantised and keeps its own GEMM.
_DENSE = "Linear"
_QUANTISED = (
    "Linear4bit", "Linear8bitLt", "GPTQLoraLinear", "AwqLoraLinear", "AqlmLoraLinear",
    "EetqLoraLinear", "HqqLoraLinear", "IncLoraLinear", "TorchaoLoraLinear",
)  # fmt: skip
_HALF = (torch.float16, torch.bfloat16)


@dataclass
class PeftReport:
    """What `fuse_peft` found: names of the layers that run fused, the others with the reason.

    `rounded` are the fused layers whose fp32 adapters are rounded to the base's 16 bits at use.
    """

    fused: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    rounded: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"fused {len(self.fused)} layers: {targets.summary(self.fused)}"]
        if self.rounded:
            lines.append(
                f"fp32 adapters rounded to the base's dtype at use, as autocast does, in"
                f" {len(self.rounded)} layers (exact=True leaves them to PEFT)"
            )
        lines += [f"left to PEFT {name}: {reason}" for name, reason in self.left.items()]
        return "\n".join(lines)


def fuse_peft(peft_model: nn.Module, *, exact: bool = False) -> PeftReport:
    """Moves the LoRA linear layers of a PEFT model onto the fused op, in place.

    Parameters, their names and the modules stay the same objects, so optimizers, checkpoints and
    `get_peft_model_state_dict` go on working. Several, disabled and merged adapters, dropout,
    rsLoRA, `lora_bias`, autocast and `adapter_names` mean what they mean in PEFT. Quantised bases
    keep their own GEMM. What the op does not cover when a layer is called (DoRA and other variants,
    hooks, parametrizations, sharded weights, submodules of other types) is computed by PEFT. Call
    it again for layers that PEFT makes later.

    Args:
        peft_model: a PeftModel or any module that holds PEFT's LoRA layers.
        exact: leave fp32 adapters on a 16-bit base to PEFT outside autocast; otherwise they are
            rounded to the base's dtype at use.

    Returns:
        What is fused now, and what PEFT goes on computing and why; empty without LoRA layers.

    Raises:
        TypeError: not a module, or `exact` not a bool.
    """
    _require_module(peft_model)
    if not isinstance(exact, bool):
        raise TypeError(f"exact: expected a bool, got {type(exact).__name__}")
    report = PeftReport()
    for name, layer in peft_model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        reason = _fuse(layer, exact)
        if reason is not None:
            report.left[name] = reason
            continue
        report.fused.append(name)
        if any(_mixes(layer, adapter) for adapter in _active(layer)):
            report.rounded.append(name)
    return report


def unfuse_peft(peft_model: nn.Module) -> None:
    """Gives every layer that `fuse_peft` moved back to PEFT. TypeError: not a module."""
    _require_module(peft_model)
    for layer in peft_model.modules():
        if isinstance(layer, _Fused):
            layer.__class__ = layer.peft_class


def register_fused_lora(config: LoraConfig, *, exact: bool = False) -> LoraConfig:
    """Lets `get_peft_model(model, config)` build fused layers from the start; returns `config`.

    It uses PEFT's registration of custom modules, which is not saved with the config: a model
    loaded by `PeftModel.from_pretrained` is fused by `fuse_peft`. TypeError: not a LoraConfig.
    """
    if not isinstance(config, LoraConfig):
        raise TypeError(f"config: expected a peft.LoraConfig, got {type(config).__name__}")
    config._register_custom_module({nn.Module: partial(_build, exact=exact)})
    return config


def _build(target: nn.Module, adapter_name: str, *, config: LoraConfig, exact: bool, **kwargs):
    """The layer that PEFT itself makes for `target`, fused where it can be."""
    plain = copy.copy(config)
    plain._custom_modules = {k: v for k, v in config._custom_modules.items() if k is not nn.Module}
    layer = LoraModel._create_new_module(plain, adapter_name, target, **kwargs)
    config.fan_in_fan_out = plain.fan_in_fan_out  # which PEFT sets by the target's type
    _fuse(layer, exact)
    return layer


def _require_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"peft_model: expected a torch.nn.Module, got {type(model).__name__}")


def _fuse(layer: LoraLayer, exact: bool) -> str | None:
    """Changes the layer's class; the reason where PEFT goes on computing it as it is now."""
    cls = layer.peft_class if isinstance(layer, _Fused) else type(layer)
    known = cls.__module__.startswith("peft.tuners.lora.")
    if not known or cls.__name__ not in (_DENSE, *_QUANTISED):
        return f"{cls.__name__} is not one of PEFT's LoRA linear layers"
    if "forward" in vars(layer):
        return "has its forward overridden on the instance"
    layer.__class__ = _fused_class(cls, exact)
    return layer.objection()


class _Fused:
    """Mixed in before a PEFT layer class."""

    peft_class: type[LoraLayer]
    exact: bool

    def __reduce_ex__(self, protocol: int):
        return _empty, (self.peft_class, self.exact), self.__getstate__()

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        adapters = _active(self)
        if (
            args
            or any(value is not None for value in kwargs.values())
            or self.disable_adapters
            or self.merged
            or not adapters
            or _global_hooks()
            or not isinstance(x, Tensor)
            or self._structure() is not None
            or (y := self._fused_forward(x, adapters)) is None
        ):
            return super().forward(x, *args, **kwargs)
        return y

    def _fused_forward(self, x: Tensor, adapters: list[str]) -> Tensor | None:
        """None where the dtypes at hand are not the op's."""
        if is_traceable_wrapper_subclass(x):
            return None
        base, dense = self.base_layer, self.peft_class.__name__ == _DENSE
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
        if autocast and x.dtype == torch.float64:
            return None
        if dense and base.weight.dtype != x.dtype and not autocast:
            return None
        for name in adapters:
            low = self.lora_A[name].weight.dtype
            rounded = low == torch.float32 and dtype in _HALF
            if not (low == dtype or autocast or (rounded and not self.exact)):
                return None
        y = None
        if not dense:
            y = base(x)
            if y.dtype != dtype or y.shape[:-1] != x.shape[:-1]:
                return None
        for name in adapters:
            A, B, scaling = self.lora_A[name].weight, self.lora_B[name], self.scaling[name]
            dropout = self.lora_dropout[name]
            p = dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0
            bias = None if B.bias is None else B.bias * scaling
            options = {"scaling": scaling, "dropout_p": p}
            if y is None:
                weight = base.weight.t() if type(base) is Conv1D else base.weight
                if bias is None:
                    bias = base.bias
                else:
                    bias = (bias if base.bias is None else base.bias + bias).to(x.dtype)
                y = lora_linear(x, weight, A, B.weight, bias, **options)
            else:
                y = lora_add(y, x, A, B.weight, **options)
                y = y if bias is None else y + bias.to(y.dtype)
        return y

    def objection(self) -> str | None:
        """Why PEFT computes this layer as it is now; None where the op does."""
        reason = self._structure()
        if reason is None and self.exact and any(_mixes(self, name) for name in _active(self)):
            return "fp32 adapters on a 16-bit base with exact=True (fused under autocast only)"
        return reason

    def _structure(self) -> str | None:
        """What stands against the op in the modules and parameters that are active."""
        types = (nn.Linear, Conv1D) if self.peft_class.__name__ == _DENSE else None
        reason = _module_objection(self.base_layer, "base_layer", types)
        if reason is None and not self.cast_input_dtype_enabled:
            return "casting of inputs is disabled (disable_input_dtype_casting)"
        for name in _active(self):
            if reason is not None:
                break
            if name in self.lora_variant:
                return f"adapter {name!r} is a {type(self.lora_variant[name]).__name__}"
            A, B, dropout = self.lora_A[name], self.lora_B[name], self.lora_dropout[name]
            reason = (
                _module_objection(A, f"lora_A.{name}", (nn.Linear,))
                or _module_objection(B, f"lora_B.{name}", (nn.Linear,))
                or _module_objection(dropout, f"lora_dropout.{name}", (nn.Dropout, nn.Identity))
            )
            if reason is None and type(dropout) is nn.Dropout and dropout.p >= 1:
                return f"lora_dropout.{name} drops everything"
            if reason is None and (A.bias is not None or A.weight.dtype != B.weight.dtype):
                return f"adapter {name!r} has a bias on lora_A or halves of two dtypes"
        return reason


@cache
def _fused_class(cls: type[LoraLayer], exact: bool) -> type[LoraLayer]:
    members = {"peft_class": cls, "exact": exact, "__doc__": _Fused.__doc__}
    return type(f"Fused{cls.__name__}", (_Fused, cls), members)


def _empty(cls: type[LoraLayer], exact: bool) -> LoraLayer:
    """What unpickling and copying fill."""
    fused = _fused_class(cls, exact)
    return fused.__new__(fused)


def _active(layer: LoraLayer) -> list[str]:
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _mixes(layer: LoraLayer, adapter: str) -> bool:
    """fp32 adapter on a 16-bit base; a quantised base shows no dtype of its own here."""
    weight = getattr(layer.base_layer, "weight", None)
    low = layer.lora_A[adapter].weight.dtype
    return low == torch.float32 and isinstance(weight, Tensor) and weight.dtype in _HALF


def _module_objection(
    module: nn.Module, name: str, types: tuple[type[nn.Module], ...] | None
) -> str | None:
    """What a call of this submodule would do beside its computation; None for `types` is any."""
    if types is not None and type(module) not in types:
        kind = "parametrized" if is_parametrized(module) else type(module).__name__
        return f"{name} is {kind}, not exactly {' or '.join(t.__name__ for t in types)}"
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "_hf_hook" in module.__dict__
        or "forward" in module.__dict__
    ):
        return f"{name} carries hooks"
    for parameter in module._parameters.values():
        if parameter is None:
            continue
        if hasattr(parameter, "ds_id"):
            return f"{name} is sharded by DeepSpeed (ds_id)"
        if types is not None and is_traceable_wrapper_subclass(parameter):
            return f"{name} holds a {type(parameter).__name__}"
    return None


def _global_hooks() -> bool:
    """Hooks on every module's call, which the fused layer's submodules would miss."""
    hooks = torch.nn.modules.module
    return bool(hooks._global_forward_hooks or hooks._global_forward_pre_hooks)
