"""Adapters on the experts of Transformers' mixtures: 3-D parameters that no nn.Linear holds.

The modules are those that Transformers' `use_experts_implementation` decorates: parameters
`gate_up_proj` (or `up_proj`) and `down_proj`, [E, N, K] or transposed, flags for their layout, and
`_apply_gate`. Each of their two products is one grouped op on the rows of all experts.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, ClassVar, SupportsIndex

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lora_kernels._contract import DTYPES
from lora_kernels.bases import odd_type
from lora_kernels.grouped import Groups, lora_linear_grouped
from lora_kernels.nn.layer import AdapterOptions, LoRALayer
from lora_kernels.nn.pissa import reset_factors
from lora_kernels.nn.tensors import MERGED, thaw
from lora_kernels.offloading import OFFLOADED

_FLAGS = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "_is_expert_parallel")
_PLAIN = (Tensor, nn.Parameter)
_INITS = ("kaiming", "random")
# What stands after the name of a parameter in that of its adapter's module.
SUFFIX = "_lora"
Product = Callable[[str, Tensor, Groups], Tensor]


def products(experts: Any) -> tuple[str, str]:
    """The parameters of the first and the last product."""
    return ("gate_up_proj" if experts.has_gate else "up_proj"), "down_proj"


def layout_objection(experts: Any) -> str | None:
    """Why a module is not one of experts that these products serve; None if it is."""
    absent = [flag for flag in _FLAGS if not hasattr(experts, flag)]
    if absent or not hasattr(experts, "num_experts"):
        return f"{type(experts).__name__} is not one of Transformers' modules of experts"
    if is_parametrized(experts):
        return "its parameters are parametrized"
    for name in products(experts):
        weight: Any = getattr(experts, name, None)
        if type(weight) not in _PLAIN or weight.dim() != 3 or len(weight) != experts.num_experts:
            return f"{name} is not a plain parameter of {experts.num_experts} experts"
        if weight.dtype not in DTYPES:
            return f"{name} is {weight.dtype}"
    return None


def forward(
    experts: nn.Module, x: Tensor, routing: tuple[Tensor, Tensor], product: Product
) -> Tensor:
    """Transformers' forward of experts on tokens [T, K], (top_k_index, top_k_weights) [T, k], with
    these products: of ids from the number of experts on nothing is computed."""
    index, weights = routing
    own: Any = experts
    count, top = own.num_experts, index.shape[-1]
    ids, order = index.reshape(-1).sort(stable=True)
    edges = torch.searchsorted(ids, torch.arange(count + 1, device=ids.device))
    groups = Groups.from_segments(edges.diff())
    first, last = products(experts)
    rows = product(first, x[order // top], groups)
    rows = own._apply_gate(rows) if own.has_gate else own.act_fn(rows)
    rows = product(last, rows, groups)
    if own.has_post_expert_norm:
        rows = own.post_expert_norm(rows)
    rows = rows * weights.reshape(-1)[order, None]
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return rows[back].view(len(x), top, -1).sum(1).to(x.dtype)


def matrices(experts: Any, name: str) -> tuple[Tensor, Tensor | None]:
    """(weight [E, N, K], a view, and bias [E, N]) of a product."""
    weight: Tensor = getattr(experts, name)
    weight = weight.transpose(1, 2) if experts.is_transposed else weight
    return weight, getattr(experts, f"{name}_bias") if experts.has_bias else None


def frozen(weight: Tensor, bias: Tensor | None, rows: Tensor, groups: Groups) -> Tensor:
    """A product of `matrices` without an adapter."""
    E, N, K = weight.shape
    a, b = weight.new_zeros(E, 1, K), weight.new_zeros(E, N, 1)
    return lora_linear_grouped(rows.to(weight.dtype), weight, a, b, groups, bias)


def to_peft(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a [E, r, K] and b [E, N, r] as PEFT has them: A [E r, K] with the expert slowest, B [N, r E]
    with the expert fastest."""
    return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)


def from_peft(A: Tensor, B: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse, for a weight [E, N, K]; also of files in which PEFT took a weight for
    [E, K, N]. ValueError: other shapes."""
    E, N, K = weight.shape
    r = A.shape[0] // E
    if r and A.shape[0] == B.shape[1] == r * E:
        if (B.shape[0], A.shape[1]) == (N, K):
            return A.view(E, r, K), B.view(N, r, E).permute(2, 0, 1)
        if (B.shape[0], A.shape[1]) == (K, N):
            return B.view(K, r, E).permute(2, 1, 0), A.view(E, r, N).transpose(1, 2)
    raise ValueError(
        f"has shapes {tuple(A.shape)} and {tuple(B.shape)}, expected [{E} r, {K}] and [{N}, r {E}]"
    )


def frozen_forward(
    experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Of experts without adapters. ValueError: `layout_objection`."""
    if (reason := layout_objection(experts)) is not None:
        raise ValueError(f"experts: {reason}")

    def product(name: str, rows: Tensor, groups: Groups) -> Tensor:
        return frozen(*matrices(experts, name), rows, groups)

    return forward(experts, hidden_states, (top_k_index, top_k_weights), product)


class LoRAExperts(nn.Module):
    """Mixed in before a class of experts, some of whose parameters have adapters, in
    `gate_up_proj_lora`, `down_proj_lora`."""

    base_class: ClassVar[type[nn.Module]]

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        return _empty, (self.base_class,), self.__getstate__()  # type: ignore[no-untyped-call]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return forward(self, hidden_states, (top_k_index, top_k_weights), self._product)

    def _product(self, name: str, rows: Tensor, groups: Groups) -> Tensor:
        adapted = self._modules.get(name + SUFFIX)
        if adapted is None:
            return frozen(*matrices(self, name), rows, groups)
        y: Tensor = adapted(rows, groups)
        return y

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        for adapted in self.adapted():
            adapted.new_weight = prefix + adapted.parameter in state_dict
        super()._load_from_state_dict(state_dict, prefix, *others)

    def adapted(self) -> Iterator["LoRAExpertProduct"]:
        for module in self._modules.values():
            if isinstance(module, LoRAExpertProduct):
                yield module


@cache
def _experts_class(cls: Any) -> type[LoRAExperts]:
    members = {"base_class": cls, "__doc__": LoRAExperts.__doc__, "__module__": __name__}
    return type(f"LoRA{cls.__name__}", (LoRAExperts, cls), members)


def _empty(cls: type[nn.Module]) -> LoRAExperts:
    """What unpickling and copying fill."""
    kind = _experts_class(cls)  # type: ignore[arg-type]  # mypy takes no class for hashable
    return kind.__new__(kind)


class LoRAExpertProduct(LoRALayer):
    """One parameter of experts with an adapter of each: `lora_A` [E, rank, K] and `lora_B`
    [E, N, rank]; the weight is the experts' own."""

    adapter_parameters: ClassVar[dict[str, str]] = {"lora_A": "ErK", "lora_B": "ENr"}
    suffix = SUFFIX
    # Whether the experts' parameter was loaded just now: a new base, or with `merged_base` a sum.
    new_weight = False
    _of: tuple[nn.Module, str]

    def __init__(self, *args: object, **kwargs: object) -> None:
        raise TypeError("LoRAExpertProduct: is made from experts, by apply_lora")

    @classmethod
    def prepare(cls, experts: nn.Module, name: str, adapter: AdapterOptions) -> "LoRAExpertProduct":
        """For experts that `layout_objection` has nothing against, and a parameter of them."""
        if adapter.init not in _INITS:
            raise ValueError(
                f"init: got {adapter.init!r}, legal values for experts are {', '.join(_INITS)}"
            )
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        vars(layer)["_of"] = (experts, name)  # no submodule of its own part
        layer.train(experts.training)
        layer._add_adapter(adapter)
        reset_factors(layer, adapter.init)
        return layer

    @property
    def holder(self) -> nn.Module:
        return self._of[0]

    @property
    def parameter(self) -> str:
        """The name of the weight in the experts."""
        return self._of[1]

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # the experts'
        experts, name = self._of
        weight: Tensor = getattr(experts, name)
        return weight

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]  # the experts'
        return matrices(*self._of)[1]

    @property
    def in_features(self) -> int:  # type: ignore[override]  # never set
        return self.matrix.shape[2]

    @property
    def out_features(self) -> int:  # type: ignore[override]  # never set
        return self.matrix.shape[1]

    def _oriented(self, weight: Tensor) -> Tensor:
        experts: Any = self._of[0]
        return weight.transpose(1, 2) if experts.is_transposed else weight

    def forward(self, rows: Tensor, groups: Groups) -> Tensor:  # type: ignore[override]
        """The product of rows that are the experts' by these groups."""
        weight, bias = matrices(*self._of)
        if self._disabled and self._merged:
            weight = self._oriented(self._required_base())
        if self._disabled or self._merged or not self._active:
            return frozen(weight, bias, rows, groups)
        return lora_linear_grouped(
            rows.to(weight.dtype),
            weight,
            self.lora_A,
            self.lora_B,
            groups,
            bias,
            scaling=self.scaling,
            dropout_p=self.dropout if self.training else 0.0,
        )

    def move_into(self, linear: nn.Module) -> None:
        """Makes the experts ones with this adapter; they stay the same object."""
        experts, name = self._of
        if not isinstance(experts, LoRAExperts):
            kind: Any = type(experts)  # which mypy does not take for hashable
            experts.__class__ = _experts_class(kind)
        experts.add_module(name + SUFFIX, self)

    @torch.no_grad()
    def move_out(self) -> None:
        self._refuse("remove", self.why_stuck())
        self._settle()
        experts, name = self._of
        assert isinstance(experts, LoRAExperts)  # since move_into
        del experts._modules[name + SUFFIX]
        if not any(experts.adapted()):
            experts.__class__ = experts.base_class  # type: ignore[assignment]  # as it was
            thaw(experts)

    def to_linear(self) -> nn.Module:
        raise TypeError("to_linear: experts are no linear layer; remove_lora takes adapters out")

    def why_valueless(self, *names: str) -> str | None:
        experts, name = self._of
        if is_parametrized(experts):
            return f"its {name} is parametrized"
        if self.weight.is_meta:
            return f"its {name} is on the meta device, without values, or {OFFLOADED}"
        odd = odd_type(self.weight)
        return None if odd is None else f"its {name} is {odd}"

    def why_stuck(self) -> str | None:
        return self.why_valueless() if self._merged == "kept" else None

    def why_not_two(self) -> str | None:
        return "its adapters are those of experts"

    def why_no_rows(self) -> str | None:
        return "its rows are those of experts, which carry one adapter each"

    def why_no_other(self, name: str) -> str | None:
        return "carries adapters of experts, one of each"

    def is_beside_the_base(self, key: str) -> bool:
        return True

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *others: Any
    ) -> None:
        base = state_dict.get(prefix + MERGED)
        given = any(prefix + name in state_dict for name in self.adapter_parameters)
        again = base is None and self._merged == "kept" and (given or self.new_weight)
        on_host = self._base_weight_cpu is not None
        if again and not self.new_weight:
            self.unmerge()
        elif base is not None or self.new_weight:
            self.merged_base = self._base_weight_cpu = None
            self._merged = False
        if given:
            state = {key: value for key, value in state_dict.items() if key != prefix + MERGED}
            nn.Module._load_from_state_dict(self, state, prefix, local_metadata, *others)
        if base is not None:
            assigns = local_metadata.get("assign_to_params_buffers", False)
            self._restore_merged(base, on_host, copy=not assigns)
        elif again:
            self.merge("cpu" if on_host else True)
        self.new_weight = False

    def extra_repr(self) -> str:
        experts = self.weight.shape[0]
        sizes = f"experts={experts}, in_features={self.in_features}"
        parts = [f"{sizes}, out_features={self.out_features}, rank={self.rank}"]
        parts += [f"scaling={self.scaling:g}"]
        if self.dropout:
            parts.append(f"dropout={self.dropout:g}")
        if self.merged:
            parts.append("merged=True")
        return ", ".join(parts)
