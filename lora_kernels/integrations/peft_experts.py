"""PEFT's `target_parameters` on the experts of Transformers' mixtures: one grouped op for each of
their products, instead of a weight of all experts with the adapters added.

The modules are those that Transformers' `use_experts_implementation` decorates: 3-D parameters
`gate_up_proj` (or `up_proj`) and `down_proj`, flags for their layout, and `_apply_gate`.
"""

from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, SupportsIndex

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils.parametrize import is_parametrized

from lora_kernels._contract import DTYPES
from lora_kernels.grouped import Groups, lora_linear_grouped

if TYPE_CHECKING:
    from peft.tuners.lora.layer import ParamWrapper as _Wrapper
else:
    _Wrapper = object

_FLAGS = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "_is_expert_parallel")
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
                return forward(experts, x, routing, adapters)
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
        if (reason := _layout_objection(experts)) is not None:
            return reason
        names = [wrapper.parameter_name for wrapper in wrappers]
        odd = [name for name in names if names.count(name) > 1 or name not in _products(experts)]
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


def forward(
    experts: nn.Module, x: Tensor, routing: tuple[Tensor, Tensor], adapters: dict[str, Adapter]
) -> Tensor:
    """Transformers' forward of experts on tokens [T, K], (top_k_index, top_k_weights) [T, k]: of
    ids from the number of experts on nothing is computed."""
    index, weights = routing
    own: Any = experts
    count, top = own.num_experts, index.shape[-1]
    ids, order = index.reshape(-1).sort(stable=True)
    edges = torch.searchsorted(ids, torch.arange(count + 1, device=ids.device))
    groups = Groups.from_segments(edges.diff())
    first, last = _products(experts)
    rows = _product(own, first, x[order // top], groups, adapters)
    rows = own._apply_gate(rows) if own.has_gate else own.act_fn(rows)
    rows = _product(own, last, rows, groups, adapters)
    if own.has_post_expert_norm:
        rows = own.post_expert_norm(rows)
    rows = rows * weights.reshape(-1)[order, None]
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return rows[back].view(len(x), top, -1).sum(1).to(x.dtype)


def _product(
    experts: Any, name: str, rows: Tensor, groups: Groups, adapters: dict[str, Adapter]
) -> Tensor:
    weight = getattr(experts, name)
    weight = weight.transpose(1, 2) if experts.is_transposed else weight
    bias = getattr(experts, f"{name}_bias") if experts.has_bias else None
    adapter = adapters.get(name)
    if adapter is None:
        E, N, K = weight.shape
        adapter = Adapter(weight.new_zeros(E, 1, K), weight.new_zeros(E, N, 1), 1.0)
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


def _products(experts: Any) -> tuple[str, str]:
    """The parameters of the first and the last product."""
    return ("gate_up_proj" if experts.has_gate else "up_proj"), "down_proj"


def _layout_objection(experts: Any) -> str | None:
    absent = [flag for flag in _FLAGS if not hasattr(experts, flag)]
    if absent or not hasattr(experts, "num_experts"):
        return f"{type(experts).__name__} is not one of Transformers' modules of experts"
    if is_parametrized(experts):
        return "its parameters are parametrized"
    for name in _products(experts):
        weight: Any = getattr(experts, name, None)
        if type(weight) not in _PLAIN or weight.dim() != 3 or len(weight) != experts.num_experts:
            return f"{name} is not a plain parameter of {experts.num_experts} experts"
        if weight.dtype not in DTYPES:
            return f"{name} is {weight.dtype}"
    return None


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
