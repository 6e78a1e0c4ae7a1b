"""PEFT models on the fused op: in place, without a renamed parameter or a replaced module.

A fused layer is the same object under a subclass of its own PEFT class that overrides `forward`
alone. Whatever the fused op does not cover at the moment of the call goes to PEFT's own forward.

Works with PEFT 0.20 to 0.21.
"""

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache, partial
from typing import TYPE_CHECKING, Any, SupportsIndex

import torch
from peft import LoraConfig
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.tuners.lora.model import LoraModel
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils.parametrize import is_parametrized
from transformers.pytorch_utils import Conv1D

from lora_kernels import backends, direct, targets
from lora_kernels._contract import DTYPES
from lora_kernels.blocks import BlockReport, fuse_blocks, unfuse_blocks
from lora_kernels.functional import linear_quantized, lora_add, lora_linear, scaled_linear
from lora_kernels.grouped import Groups, lora_add_grouped, lora_linear_grouped
from lora_kernels.integrations import peft_bases, peft_experts
from lora_kernels.integrations.peft_experts import FusedExperts
from lora_kernels.nn import OfRows, Rows
from lora_kernels.norms import HELD, norms_in_evaluation, weight_norms
from lora_kernels.packed import Projection
from lora_kernels.packs import Packable
from lora_kernels.several import adapter_rows
from lora_kernels.weights import QuantizedWeight

if TYPE_CHECKING:
    from peft.tuners.lora.layer import Linear as _Layer  # whose attributes all of them have
else:
    _Layer = object

# PEFT's layers that compute base_layer(x) plus the branch; on all but the first the base is
# quantised and keeps its own GEMM.
_DENSE = "Linear"
_QUANTISED = (
    "Linear4bit", "Linear8bitLt", "GPTQLoraLinear", "AwqLoraLinear", "AqlmLoraLinear",
    "EetqLoraLinear", "HqqLoraLinear", "IncLoraLinear", "TorchaoLoraLinear",
)  # fmt: skip
_BASES = (nn.Linear, Conv1D)
_HALF = (torch.float16, torch.bfloat16)
# Tensors that the op reads as PEFT's products do; to another subclass a product may be anything.
_PLAIN = (Tensor, nn.Parameter, FakeTensor, FunctionalTensor)
# On the CPU an x of no more elements costs less than the work of the host that the op is for it.
_SMALL = 1 << 14
_LINEAR, _DROPOUTS = (nn.Linear,), (nn.Dropout, nn.Identity)
_PASSING = ("_rows", peft_bases.HELD, HELD)  # what is of the forwards of this process alone
_WARNING = "_lost_gradient"  # the attribute that holds what a layer has to say once


@dataclass
class PeftReport:
    """What `fuse_peft` found: names of the layers that run fused, the others with the reason.

    `rounded` are the fused layers whose fp32 adapters are rounded to the base's 16 bits at use,
    `read` those whose quantised weight the op reads itself.
    `no_gradient` are the layers whose base does not pass the gradient on to its input, with what
    was found: fused or left to PEFT, whatever lies before them trains wrongly.
    """

    fused: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    rounded: list[str] = field(default_factory=list)
    read: list[str] = field(default_factory=list)
    no_gradient: dict[str, str] = field(default_factory=dict)
    gpu: str = ""
    blocks: BlockReport | None = None

    def __str__(self) -> str:
        lines = [f"fused {len(self.fused)} layers: {targets.summary(self.fused)}"]
        if self.rounded:
            lines.append(
                f"fp32 adapters rounded to the base's dtype at use, as autocast does, in"
                f" {len(self.rounded)} layers (exact=True leaves them to PEFT)"
            )
        if self.read:
            lines.append(f"quantised weights are read as they lie in {len(self.read)} layers")
        lines += [self.gpu] if self.gpu else []
        lines += [] if self.blocks is None else [str(self.blocks)]
        lines += [f"left to PEFT {name}: {reason}" for name, reason in self.left.items()]
        lines += [f"no gradient through {name}: {why}" for name, why in self.no_gradient.items()]
        return "\n".join(lines)


def fuse_peft(peft_model: nn.Module, *, exact: bool = False, blocks: bool = False) -> PeftReport:
    """Moves the LoRA linear layers of a PEFT model onto the fused op, in place.

    Parameters, their names and the modules stay the same objects, so optimizers, checkpoints
    and `get_peft_model_state_dict` go on working. Several, disabled and merged adapters,
    dropout, rsLoRA, `lora_bias`, autocast and `adapter_names` mean what they mean in PEFT; so does
    DoRA, of one active adapter on a dense base, which is computed without the sum of the weights.
    Quantised bases keep their own GEMM, but for those of bitsandbytes and torchao on the CPU,
    which the op reads itself, base and branch in one call and with the right gradient
    (`integrations.peft_bases`). What the op does not cover when a layer is called (other
    variants, hooks, parametrizations, sharded weights, submodules and tensors of other
    types, layouts and dtypes, `torch.jit.trace`) is computed by PEFT. Calls of few rows on the
    CPU are one native call where that serves them; else the layer makes PEFT's own torch calls
    for a small x. Call it again for layers that PEFT makes later. Experts of Transformers'
    mixtures with `target_parameters` run as grouped ops, where one adapter is active.

    A base that is not a plain dense layer is tried with two rows, on a copy: where the gradient of
    its input is lost, the report names the layer, and the first call that needs it warns.

    Args:
        peft_model: a PeftModel or any module that holds PEFT's LoRA layers.
        exact: leave fp32 adapters on a 16-bit base to PEFT outside autocast; otherwise they are
            rounded to the base's dtype at use.
        blocks: `fuse_blocks` too: gated MLPs and projections of one tensor as one, in training.

    Returns:
        What is fused now, and what PEFT goes on computing and why; empty without LoRA layers.

    Raises:
        TypeError: not a module, or `exact` or `blocks` not a bool.
    """
    _require_module(peft_model)
    for name, flag in (("exact", exact), ("blocks", blocks)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name}: expected a bool, got {type(flag).__name__}")
    report = PeftReport()
    inner: dict[int, str | None] = {}  # wrappers within others, which compute for them
    for name, layer in peft_model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if isinstance(layer, ParamWrapper):
            reason = inner.pop(id(layer)) if id(layer) in inner else peft_experts.fuse(layer)
            if isinstance(layer.base_layer, ParamWrapper):
                inner[id(layer.base_layer)] = reason
            if reason is None:
                report.fused.append(name)
            else:
                report.left[name] = reason
            continue
        reason = _fuse(layer, exact)
        reads = isinstance(layer, _Fused) and _reads_itself(layer)
        lost = _lost_gradient(layer) if isinstance(layer, _Fused) and not reads else None
        if lost is not None:
            report.no_gradient[name] = lost
            layer.__dict__[_WARNING] = f"{name}: {lost}"
        if reason is not None:
            report.left[name] = reason
            continue
        report.fused.append(name)
        if reads:
            report.read.append(name)
        assert isinstance(layer, _Fused)
        if any(_mixes(layer, adapter) for adapter in _active(layer)):
            report.rounded.append(name)
    for model in peft_model.modules():
        if isinstance(model, LoraModel):
            # A partial is copied and pickled with the model, and then holds the copy.
            model._enable_peft_forward_hooks = partial(_with_rows, model)  # type: ignore[method-assign]
    report.gpu = backends.on_gpu(peft_model.parameters()) if report.fused else ""
    if blocks:
        report.blocks = fuse_blocks(peft_model)
    return report


def unfuse_peft(peft_model: nn.Module) -> None:
    """Gives every layer that `fuse_peft` moved back to PEFT. TypeError: not a module."""
    _require_module(peft_model)
    unfuse_blocks(peft_model)
    for layer in peft_model.modules():
        if isinstance(layer, (_Fused, FusedExperts)):
            layer.__class__ = layer.peft_class  # type: ignore[assignment]  # PEFT's again
            layer.__dict__.pop(_WARNING, None)
        elif isinstance(layer, LoraModel):
            layer.__dict__.pop("_enable_peft_forward_hooks", None)


@contextlib.contextmanager
def _with_rows(model: LoraModel, *args: Any, **kwargs: Any) -> Iterator[None]:
    """What PEFT's models enter around a forward. It refuses `adapter_names` in training, where its
    hooks would be gone when a forward is computed again."""
    given = kwargs.get("adapter_names")
    if given is None or not model.training:
        with type(model)._enable_peft_forward_hooks(model, *args, **kwargs):
            yield
        return
    with adapter_rows(model, [None if name == "__base__" else name for name in given]):
        yield


def register_fused_lora(config: LoraConfig, *, exact: bool = False) -> LoraConfig:
    """Lets `get_peft_model(model, config)` build fused layers from the start; returns `config`.

    It uses PEFT's registration of custom modules, which is not saved with the config: a model
    loaded by `PeftModel.from_pretrained` is fused by `fuse_peft`. TypeError: not a LoraConfig.
    """
    if not isinstance(config, LoraConfig):
        raise TypeError(f"config: expected a peft.LoraConfig, got {type(config).__name__}")
    build: Any = partial(_build, exact=exact)  # in place of a class
    config._register_custom_module({nn.Module: build})
    return config


def _build(
    target: nn.Module, adapter_name: str, *, config: LoraConfig, exact: bool, **kwargs: Any
) -> nn.Module:
    """The layer that PEFT itself makes for `target`, fused where it can be."""
    plain = copy.copy(config)
    custom = config._custom_modules or {}
    plain._custom_modules = {k: v for k, v in custom.items() if k is not nn.Module}
    layer: _Layer = LoraModel._create_new_module(plain, adapter_name, target, **kwargs)
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
    assert isinstance(layer, _Fused)
    return layer.objection()


class _Fused(OfRows, Packable, _Layer):
    """Mixed in before a PEFT layer class."""

    peft_class: type[_Layer]
    dense: bool
    exact: bool

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        held: dict[str, Any] = self.__getstate__()  # type: ignore[no-untyped-call]  # of PEFT
        state = {k: v for k, v in held.items() if k not in _PASSING}
        return _empty, (self.peft_class, self.exact), state

    def _get_name(self) -> str:
        return self.peft_class.__name__

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # What decides is read anew in every call, so nothing can change unnoticed; submodules are
        # taken from `_modules` because nn.Module's own access to them is slow.
        if self._pack is not None and not (args or kwargs):
            y = self._pack(self, x)
            if y is not None:
                return y
        if _WARNING in self.__dict__:
            self._warn(x)
        if self._rows is not None and (rows := self.rows_now()) is not None:
            return self._of_rows(x, rows, args, kwargs)
        others = args or (kwargs and any(value is not None for value in kwargs.values()))
        if self._disable_adapters and not others and not self.dense:
            return self._of_base(x)
        if (
            others
            or self._disable_adapters
            or self.merged_adapters
            or type(x) not in _PLAIN
            or x.layout is not torch.strided
            or x.is_nested
            or _has_any_global_hook()
            or not (adapters := _active(self))
            or self._structure(adapters) is not None
        ):
            return super().forward(x, *args, **kwargs)
        if adapters[0] in self.lora_variant:
            y = self._with_magnitude(x, adapters[0])
            return super().forward(x, **kwargs) if y is None else y
        if x.is_cpu and not torch.compiler.is_compiling():
            y = self._directly(x, adapters)
            if y is not None:
                return y
            if x.numel() <= _SMALL and self._record(x) is None:
                return self._small_forward(x, adapters)
        y = self._fused_forward(x, adapters)
        return super().forward(x, **kwargs) if y is None else y

    def _of_base(self, x: Tensor) -> Tensor:
        """Without an adapter. bitsandbytes lays out its 4 bits anew where it computes without
        gradients, and has none for x from then on; it is not asked where the op can read them."""
        plain = type(x) in _PLAIN and x.dtype in DTYPES and not self.merged_adapters
        record = self._record(x) if plain and self._structure(()) is None else None
        if record is None:
            whole: Tensor = super().forward(x)
            return whole
        base: Any = self._modules["base_layer"]
        bias = base.bias
        return linear_quantized(x, record, None if bias is None else bias.to(_computed_in(x)))

    def _warn(self, x: Tensor) -> None:
        """In the first call in which the lost gradient of x is one that is needed."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        if isinstance(x, Tensor) and x.requires_grad:
            warnings.warn(
                f"{self.__dict__.pop(_WARNING)}; what lies before this layer trains wrongly",
                stacklevel=5,
            )

    def _directly(self, x: Tensor, adapters: list[str]) -> Tensor | None:
        """Of one adapter on a plain base, in the dtypes that the op takes: past the op."""
        if len(adapters) != 1 or not self.dense:
            return None
        (name,) = adapters
        modules: dict[str, Any] = self._modules
        base = modules["base_layer"]
        A, B, dropout = (
            modules[key]._modules[name] for key in ("lora_A", "lora_B", "lora_dropout")
        )
        a, b = A._parameters["weight"], B._parameters["weight"]
        mixed = a.dtype != x.dtype
        if B._parameters["bias"] is not None or (
            mixed and (self.exact or a.dtype != torch.float32)
        ):
            return None
        weight = base._parameters["weight"]
        p = dropout.p if dropout.training and type(dropout) is nn.Dropout else 0.0
        pair = (a, b, self.scaling[name], p)
        oriented = weight.t() if type(base) is Conv1D else weight
        return direct.linear(x, oriented, base._parameters["bias"], pair)

    def projection(self, x: Tensor) -> Projection | None:
        adapters = _active(self)
        if (
            not self.dense
            or self._rows is not None
            or self._disable_adapters
            or self.merged_adapters
            or type(x) not in _PLAIN
            or len(adapters) != 1
            or adapters[0] in self.lora_variant
            or self._structure(adapters) is not None
            or not self._has_dtypes_of_the_op(x, adapters)
        ):
            return None
        (name,), modules = adapters, dict[str, Any](self._modules)
        base = modules["base_layer"]
        A, B = (modules[key]._modules[name] for key in ("lora_A", "lora_B"))
        if B.bias is not None:
            return None
        weight = base.weight.t() if type(base) is Conv1D else base.weight
        return Projection(
            weight, A.weight, B.weight, base.bias, self.scaling[name], self._drops(name)
        )

    def _small_forward(self, x: Tensor, adapters: list[str]) -> Tensor:
        """PEFT's own calls of torch, bit for bit, without those of nn.Module."""
        modules: dict[str, Any] = self._modules
        base = modules["base_layer"]
        if type(base) is nn.Linear and self.dense:
            own: dict[str, Any] = base._parameters
            y = F.linear(x, own["weight"], own["bias"])
        else:
            y = base(x)
        dtype = y.dtype
        for name in adapters:
            weight = modules["lora_A"]._modules[name]._parameters["weight"]
            B, dropout = (modules[key]._modules[name] for key in ("lora_B", "lora_dropout"))
            if x.dtype != weight.dtype:
                x = x.to(weight.dtype)
            dropped = x
            if dropout.training and type(dropout) is nn.Dropout:
                dropped = F.dropout(x, dropout.p, True, dropout.inplace)
            low = F.linear(dropped, weight)
            branch = F.linear(low, B._parameters["weight"], B._parameters["bias"])
            y = y + branch * self.scaling[name]
        return y if y.dtype == dtype else y.to(dtype)

    def _fused_forward(self, x: Tensor, adapters: list[str]) -> Tensor | None:
        """None where the dtypes at hand, or the scaling, are not the op's."""
        modules: dict[str, Any] = self._modules
        base, lora_A, lora_B = (modules[key] for key in ("base_layer", "lora_A", "lora_B"))
        if not self._has_dtypes_of_the_op(x, adapters):
            return None
        if not all(_takes(self.scaling[name], x) for name in adapters):
            return None
        y, record = None, self._record(x)
        if not self.dense and record is None:
            y = base(x)
            if y.dtype != _computed_in(x) or y.shape[:-1] != x.shape[:-1]:
                return None
        for name in adapters:
            A, B, scaling = lora_A[name].weight, lora_B[name], self.scaling[name]
            p = self._drops(name)
            bias = None if B.bias is None else B.bias * scaling
            options = {"scaling": scaling, "dropout_p": p}
            if y is None:
                weight = base.weight.t() if type(base) is Conv1D else base.weight
                if bias is None:
                    bias = base.bias
                else:
                    bias = (bias if base.bias is None else base.bias + bias).to(x.dtype)
                if record is not None and bias is not None:
                    bias = bias.to(_computed_in(x))
                weight = weight if record is None else record
                y = lora_linear(x, weight, A, B.weight, bias, **options)
            else:
                y = lora_add(y, x, A, B.weight, **options)
                y = y if bias is None else y + bias.to(y.dtype)
        return y

    def _with_magnitude(self, x: Tensor, name: str) -> Tensor | None:
        """With one adapter of DoRA; None where dtypes or the scaling are not the op's."""
        scaling = self.scaling[name]
        if not self._has_dtypes_of_the_op(x, [name]) or not _takes(scaling, x):
            return None
        modules: dict[str, Any] = self._modules
        base = modules["base_layer"]
        A, B, vector = (
            modules[key]._modules[name]._parameters["weight"]
            for key in ("lora_A", "lora_B", "lora_magnitude_vector")
        )
        if vector.dtype not in (A.dtype, torch.float32, _computed_in(x)):
            return None
        weight = base.weight.t() if type(base) is Conv1D else base.weight
        if self.training:
            norms = weight_norms(weight, A, B, scaling)
        else:
            norms = norms_in_evaluation(self.__dict__, weight, A, B, scaling)
        values = (scaling, self._drops(name), None)
        factor = vector.to(norms.dtype) / norms
        return scaled_linear(x, weight, (A, B), base.bias, values, factor)

    def train(self, mode: bool = True) -> Any:
        self.__dict__.pop(HELD, None)
        return super().train(mode)

    def _record(self, x: Tensor) -> QuantizedWeight | None:
        """The weight of a quantised base that the op reads itself."""
        if self.dense or not x.is_cpu:
            return None
        base: Any = self._modules["base_layer"]
        return peft_bases.record_of_base(self, base, _computed_in(x))

    def _has_dtypes_of_the_op(self, x: Tensor, adapters: Sequence[str]) -> bool:
        autocast, dtype = torch.is_autocast_enabled(x.device.type), _computed_in(x)
        if x.dtype not in DTYPES or (autocast and x.dtype == torch.float64):
            return False
        base: Any = self._modules["base_layer"]
        if self.dense and base.weight.dtype != x.dtype and not autocast:
            return False
        for name in adapters:
            halves: Any = self.lora_A
            low = halves[name].weight.dtype
            rounded = low == torch.float32 and dtype in _HALF and not self.exact
            cast = autocast and low != torch.float64
            if low != dtype and not cast and not rounded:
                return False
        return True

    def _drops(self, adapter: str) -> float:
        """The probability with which an adapter drops now."""
        dropout = self._modules["lora_dropout"]._modules[adapter]  # type: ignore[union-attr]
        return dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0

    def _mixed_batch_forward(
        self, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any
    ) -> Tensor:
        """Of `adapter_names`, which PEFT's forward has checked: one adapter of each sample."""
        others = args or any(value is not None for value in kwargs.values())
        here = tuple(name if name in self.lora_A else None for name in adapter_names)
        adapters = tuple(dict.fromkeys(name for name in here if name is not None))
        each = x.shape[1:-1].numel()
        y = None
        if not others and not torch.compiler.is_compiling() and x.dim() > 1:
            y = self._grouped(x, adapters, lambda: _groups(here, each, str(x.device)))
        if y is not None:
            return y
        mixed: Tensor = super()._mixed_batch_forward(
            x, *args, adapter_names=adapter_names, **kwargs
        )
        return mixed

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.lora_A)

    def carries(self, name: str) -> bool:
        return name in self.lora_A

    def why_no_rows(self) -> str | None:
        return "is merged; call unmerge_adapter first" if self.merged_adapters else None

    def _of_rows(
        self, x: Tensor, rows: Rows, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        """Within `adapter_rows`."""
        adapters = rows.there(self)
        if not args and not kwargs and (self._disable_adapters or not adapters) and not self.dense:
            return self._of_base(x)
        if self._disable_adapters or not adapters:
            base: nn.Module = self.base_layer
            of_base: Tensor = base(x, *args, **kwargs)
            return of_base
        y = None
        if not args and all(value is None for value in kwargs.values()):
            y = self._grouped(x, adapters, lambda: rows.groups(x, adapters))
        if y is None:
            reason = self._structure(adapters) or (
                "its adapters differ in dropout, have a lora_bias or scalings that are no numbers,"
                " or x is none that the op takes"
            )
            raise ValueError(f"adapter_rows: a layer of PEFT cannot be served: {reason}")
        return y

    def _grouped(
        self, x: Tensor, adapters: Sequence[str], groups_of: Callable[[], Groups]
    ) -> Tensor | None:
        """None where the op does not cover what is there."""
        lora_A, lora_B = self.lora_A, self.lora_B
        if (
            type(x) not in _PLAIN
            or x.layout is not torch.strided
            or not adapters
            or _has_any_global_hook()
            or any(name in self.lora_variant for name in adapters)
            or self._structure(adapters) is not None
        ):
            return None
        drops = {self._drops(name) for name in adapters}
        scaling = [self.scaling[name] for name in adapters]
        if (
            not self._has_dtypes_of_the_op(x, adapters)
            or len(drops) != 1
            or any(lora_B[name].bias is not None for name in adapters)
            or any(type(one) not in (float, int) for one in scaling)
        ):
            return None
        groups = groups_of()
        halves: tuple[Any, Any] = (lora_A, lora_B)
        a, b = ([half[name].weight for name in adapters] for half in halves)
        options: dict[str, Any] = {"scaling": scaling, "dropout_p": drops.pop()}
        base: Any = self.base_layer
        if self.dense:
            weight = base.weight.t() if type(base) is Conv1D else base.weight
            return lora_linear_grouped(x, weight, a, b, groups, base.bias, **options)
        y = base(x)
        if y.dtype != _computed_in(x) or y.shape[:-1] != x.shape[:-1]:
            return None
        return lora_add_grouped(y, x, a, b, groups, **options)

    def objection(self) -> str | None:
        """Why PEFT computes this layer as it is now; None where the op does."""
        adapters = _active(self)
        reason = self._structure(adapters)
        if reason is None and self.exact and any(_mixes(self, name) for name in adapters):
            return "fp32 adapters on a 16-bit base with exact=True (fused under autocast only)"
        return reason

    def _structure(self, adapters: Sequence[str]) -> str | None:
        """What stands against the op in the modules and parameters that are active."""
        modules: dict[str, Any] = self._modules
        base, lora_A, lora_B, dropouts = (
            modules[key] for key in ("base_layer", "lora_A", "lora_B", "lora_dropout")
        )
        if reason := _module_objection(base, _BASES if self.dense else None, "base_layer"):
            return reason
        if not self.cast_input_dtype_enabled:
            return "casting of inputs is disabled (disable_input_dtype_casting)"
        for name in adapters:
            if name in self.lora_variant and (why := self._variant_objection(name, adapters)):
                return why
            A, B = lora_A._modules[name], lora_B._modules[name]
            dropout = dropouts._modules[name]
            reason = (
                _module_objection(A, _LINEAR, "lora_A", name)
                or _module_objection(B, _LINEAR, "lora_B", name)
                or _module_objection(dropout, _DROPOUTS, "lora_dropout", name)
            )
            if reason is not None:
                return reason
            if type(dropout) is nn.Dropout and (dropout.p >= 1 or dropout.inplace):
                return f"lora_dropout.{name} drops everything, or in place"
            if (
                A._parameters["bias"] is not None
                or A._parameters["weight"].dtype != B._parameters["weight"].dtype
            ):
                return f"adapter {name!r} has a bias on lora_A or halves of two dtypes"
        return None

    def _variant_objection(self, name: str, adapters: Sequence[str]) -> str | None:
        """What stands against the op in a variant of LoRA: all but DoRA alone on a dense base."""
        kind = type(self.lora_variant[name])
        if kind is not DoraLinearVariant or not self.dense:
            on = "" if kind is not DoraLinearVariant else " on a quantised base"
            return f"adapter {name!r} is a {kind.__name__}{on}"
        if len(adapters) > 1:
            return f"adapter {name!r} is a {kind.__name__} beside other active adapters"
        modules: dict[str, Any] = self._modules
        if modules["lora_B"]._modules[name]._parameters["bias"] is not None:
            return f"adapter {name!r} is a {kind.__name__} with a lora_bias"
        vector = modules["lora_magnitude_vector"]._modules[name]
        return _module_objection(vector, (DoraLinearLayer,), "lora_magnitude_vector", name)


@cache
def _fused_class(cls: type[LoraLayer], exact: bool) -> type[_Layer]:
    members = {
        "peft_class": cls, "dense": cls.__name__ == _DENSE, "exact": exact,
        "__doc__": _Fused.__doc__, "__module__": __name__,
    }  # fmt: skip
    return type(f"Fused{cls.__name__}", (_Fused, cls), members)


@lru_cache(maxsize=8)
def _groups(names: tuple[str | None, ...], rows: int, device: str) -> Groups:
    """Of samples of so many rows, each of one adapter, in the order in which these appear; all
    layers of a model have the same."""
    table = list(dict.fromkeys(name for name in names if name is not None))
    return Groups.from_names(names, table, rows).to(device)


def _computed_in(x: Tensor) -> torch.dtype:
    autocast = torch.is_autocast_enabled(x.device.type)
    return torch.get_autocast_dtype(x.device.type) if autocast else x.dtype


def _empty(cls: type[_Layer], exact: bool) -> _Layer:
    """What unpickling and copying fill."""
    fused = _fused_class(cls, exact)
    return fused.__new__(fused)


def _active(layer: _Layer) -> list[str]:
    modules: dict[str, Any] = layer._modules
    active, there = layer._active_adapter, modules["lora_A"]._modules
    return [name for name in ((active,) if isinstance(active, str) else active) if name in there]


def _takes(scaling: object, x: Tensor) -> bool:
    """Whether the op takes this scaling; a tensor elsewhere, or one that trains, is PEFT's."""
    return not isinstance(scaling, Tensor) or (
        scaling.dim() == 0
        and scaling.is_floating_point()
        and scaling.device == x.device
        and not (scaling.requires_grad and torch.is_grad_enabled())
    )


def _mixes(layer: LoraLayer, adapter: str) -> bool:
    """fp32 adapter on a 16-bit base; a quantised base shows no dtype of its own here."""
    weight = getattr(layer.base_layer, "weight", None)
    low = layer.lora_A[adapter].weight.dtype
    return low == torch.float32 and isinstance(weight, Tensor) and weight.dtype in _HALF


def _module_objection(
    module: nn.Module, types: tuple[type[nn.Module], ...] | None, *path: str
) -> str | None:
    """What a call of this submodule would do beside its computation; None for `types` is any."""
    if types is not None and type(module) not in types:
        kind = "parametrized" if is_parametrized(module) else type(module).__name__
        legal = " or ".join(t.__name__ for t in types)
        return f"{'.'.join(path)} is {kind}, not exactly {legal}"
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "_hf_hook" in module.__dict__
        or "forward" in module.__dict__
    ):
        return f"{'.'.join(path)} carries hooks"
    for parameter in module._parameters.values():
        if parameter is None:
            continue
        if hasattr(parameter, "ds_id"):
            return f"{'.'.join(path)} is sharded by DeepSpeed (ds_id)"
        if types is not None and type(parameter) not in _PLAIN:
            return f"{'.'.join(path)} holds a {type(parameter).__name__}"
        if types is not None and parameter.layout is not torch.strided:
            return f"{'.'.join(path)} holds a tensor of layout {parameter.layout}"
    return None


def _reads_itself(layer: _Fused) -> bool:
    """Whether the op reads the quantised base of a layer, in one dtype at least."""
    base = layer.base_layer
    weight = base._parameters.get("weight")
    if layer.dense or weight is None or weight.device.type != "cpu":
        return False
    return any(
        peft_bases.record_of_base(layer, base, d) is not None for d in (torch.float32, *_HALF)
    )


def _lost_gradient(layer: _Fused) -> str | None:
    """What is wrong with the gradient that the base gives its input; None where nothing is, or
    where it cannot be tried."""
    base = layer.base_layer
    quantised = not layer.dense or _module_objection(base, (type(base),), "base_layer") is not None
    if type(base) in _BASES and not quantised:
        return None
    tensors = [*base.parameters(), *base.buffers()]
    if _module_objection(base, None, "base_layer") or any(t.is_meta for t in tensors):
        return None
    own = [t.dtype for t in tensors if t.is_floating_point()]
    for dtype in dict.fromkeys((*own, next(layer.lora_A.parameters()).dtype, *_HALF)):
        try:
            width: Any = layer.in_features  # which PEFT sets
            return _try_gradient(base, width, tensors[0].device, dtype, quantised)
        except Exception:  # whatever a foreign layer raises where it does not take this dtype
            continue
    return None


def _try_gradient(
    base: nn.Module, width: int, device: torch.device, dtype: torch.dtype, linear: bool
) -> str | None:
    """For a linear y = f(x), d = (f(x) - f(-x)) / 2 and dx the gradient of x for dy = d: dx x = d d
    in every row. A copy is called: quantised layers move and cast what they hold when called."""
    base = copy.deepcopy(base)
    x = torch.randn(2, width, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    devices = [] if device.type == "cpu" else [device]
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
        torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"),
    ):
        x.requires_grad_()
        y = base.forward(x)
        d = ((y - base.forward(-x)) / 2).detach()
        expected = d.double().square().sum(-1)
        if not (expected > 0).all():
            return None
        (dx,) = torch.autograd.grad(y, x, d, allow_unused=True) if y.requires_grad else (None,)
    held = {type(p).__name__ for p in base.parameters() if type(p) not in _PLAIN}
    what = f"its base ({', '.join([type(base).__name__, *sorted(held)])})"
    if dx is None or not dx.any():
        return f"{what} passes no gradient on to its input"
    share = (dx * x).detach().double().sum(-1) / expected
    if linear and not ((share > 0.5) & (share < 2)).all():
        return f"{what} passes a wrong gradient on to its input"
    return None
