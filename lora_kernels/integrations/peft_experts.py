"""PEFT's `target_parameters` on the experts of Transformers' mixtures: one grouped op for each of
their products, instead of a weight of all experts with the adapters added."""

from functools import cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple, SupportsIndex

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from lora_kernels.grouped import Groups, lora_linear_grouped
from lora_kernels.nn.experts import forward, frozen, layout_objection, matrices, products

if TYPE_CHECKING:
    from peft.tuners.lora.layer import ParamWrapper as _Wrapper
else:
    _Wrapper = object

_PLAIN = (Tensor, nn.Parameter)


class Adapter(NamedTuple):
    """a [E, r, K] and b [E, N, r] of every expert."""

    a: Tensor
    b: Tensor
    scaling: float


class FusedExperts(_Wrapper):
    """Mixed in before `ParamWrapper`, of the outermost of the wrappers of one module."""

    peft_class: type[ParamWrapper]

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        return _empty, (self.peft_class,), self.__getstate__()  # type: ignore[no-untyped-call]  # of whatever PEFT has

    def _get_name(self) -> str:
        return self.peft_class.__name__

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("adapter_names") is not None:  # which PEFT refuses
            y: Tensor = super().forward(x, *args, **kwargs)
            return y
        routing = _routing(*args, **{k: v for k, v in kwargs.items() if k != "adapter_names"})
        if routing is not None and self.objection() is None:
            experts = self.get_base_layer()
            adapters = {w.parameter_name: _adapter(w) for w in _wrappers(self)}
            if _takes(experts, x, adapters):
                return forward(experts, x, routing, partial(_product, experts, adapters))
        y = super().forward(x, *args, **kwargs)
        return y

    def objection(self) -> str | None:
        """Why PEFT computes these experts as they are now; None where the op does."""
        wrappers = _wrappers(self)
        experts = wrappers[-1].base_layer
        if _has_any_global_hook():
            return "global hooks"
        for module in (*wrappers[1:], experts):
            if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
                return "a module within it carries hooks"
        if (reason := layout_objection(experts)) is not None:
            return reason
        names = [wrapper.parameter_name for wrapper in wrappers]
        odd = [name for name in names if names.count(name) > 1 or name not in products(experts)]
        if odd:
            return f"{odd[0]} is no product of its experts, or wrapped twice"
        for wrapper in wrappers:
            if wrapper.disable_adapters or wrapper.merged:
                return "its adapters are disabled or merged"
            active = [name for name in wrapper.active_adapters if name in wrapper.lora_A]
            if len(active) != 1:
                return f"{len(active)} of its adapters are active, not one"
            if wrapper.lora_B[active[0]].bias is not None:
                return f"adapter {active[0]!r} has a bias"
            halves = wrapper.lora_A[active[0]], wrapper.lora_B[active[0]]
            if any(type(half) is not nn.Linear or half._forward_hooks for half in halves):
                return f"adapter {active[0]!r} is not of two plain layers"
        return None


def fuse(wrapper: ParamWrapper) -> str | None:
    """Changes the class of an outermost wrapper; the reason where PEFT goes on computing."""
    if "forward" in vars(wrapper):
        return "has its forward overridden on the instance"
    if not isinstance(wrapper, FusedExperts):
        wrapper.__class__ = _fused_class(type(wrapper))
    assert isinstance(wrapper, FusedExperts)
    return wrapper.objection()


def _product(
    experts: nn.Module, adapters: dict[str, Adapter], name: str, rows: Tensor, groups: Groups
) -> Tensor:
    adapter = adapters.get(name)
    if adapter is None:
        return frozen(*matrices(experts, name), rows, groups)
    weight, bias = matrices(experts, name)
    a, b, scaling = adapter
    return lora_linear_grouped(rows.to(weight.dtype), weight, a, b, groups, bias, scaling=scaling)


def _adapter(wrapper: Any) -> Adapter:
    """PEFT has A of all experts with the expert slowest, B with the expert fastest."""
    (name,) = (name for name in wrapper.active_adapters if name in wrapper.lora_A)
    A, B, E = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight, wrapper.num_experts
    a = A.view(E, -1, A.shape[1])
    b = B.view(B.shape[0], -1, E).permute(2, 0, 1)
    transposed = wrapper.get_base_layer().is_transposed
    if not transposed and not getattr(wrapper, "_did_swap_in_out_features", True):
        a, b = b.transpose(1, 2), a.transpose(1, 2)  # as PEFT took them for [E, K, N]
    return Adapter(a, b, wrapper.scaling[name])


def _wrappers(outermost: Any) -> list[Any]:
    """The wrappers of one module, from the outermost in."""
    found = [outermost]
    while isinstance(found[-1].base_layer, ParamWrapper):
        found.append(found[-1].base_layer)
    return found


def _routing(
    top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None, **others: object
) -> tuple[Tensor, Tensor] | None:
    if others or not isinstance(top_k_index, Tensor) or not isinstance(top_k_weights, Tensor):
        return None
    return top_k_index, top_k_weights


def _takes(experts: nn.Module, x: Tensor, adapters: dict[str, Adapter]) -> bool:
    """Whether the op takes x with these weights and adapters, which are rounded to the weight's
    dtype, as PEFT does."""
    for name, adapter in adapters.items():
        dtype = getattr(experts, name).dtype
        if any(half.dtype not in (dtype, torch.float32) for half in adapter[:2]):
            return False
    plain = type(x) in _PLAIN and x.dim() == 2 and x.layout is torch.strided
    autocast = torch.is_autocast_enabled(x.device.type)
    return plain and not autocast and x.is_floating_point()


@cache
def _fused_class(cls: type[ParamWrapper]) -> type[ParamWrapper]:
    members = {"peft_class": cls, "__doc__": FusedExperts.__doc__, "__module__": __name__}
    return type(f"Fused{cls.__name__}", (FusedExperts, cls), members)


def _empty(cls: type[ParamWrapper]) -> ParamWrapper:
    """What unpickling and copying fill."""
    fused = _fused_class(cls)
    return fused.__new__(fused)
