"""What a layer with an adapter holds: the one list of its tensors, and how they are asked for and
exchanged."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lora_kernels.bases import computed, odd_type, sources
from lora_kernels.offloading import OFFLOADED, is_offloaded
from lora_kernels.sharding import is_sharded
from lora_kernels.weights import QuantizedTensor

# By name their dimensions: N, K are the layer's out_features and in_features, r the rank, E the
# number of experts.
BASE = {"weight": "NK", "bias": "N"}
FACTORS = {"lora_A": "rK", "lora_B": "Nr"}
# Of DoRA: the length that each row of the sum has.
MAGNITUDE = "lora_magnitude"
# What PiSSA or OLoRA took out of the weight, as buffers.
PISSA = {"pissa_A": "rK", "pissa_B": "Nr"}
# The base of a merged layer, a buffer.
MERGED = "merged_base"

_FROZEN = "_lora_frozen"


def note_frozen(module: nn.Module, names: set[str]) -> None:
    """Notes which of a module's parameters an adapter freezes, beside those noted before."""
    if names:
        vars(module)[_FROZEN] = vars(module).get(_FROZEN, set()) | names


def frozen_by_adapter(module: nn.Module) -> set[str]:
    """The parameters that were noted."""
    return set(vars(module).get(_FROZEN, ()))


def thaw(module: nn.Module) -> None:
    """Lets the parameters that were noted train again, but for those that were quantised since."""
    for name in vars(module).pop(_FROZEN, ()):
        parameter = module._parameters.get(name)
        if parameter is not None and not isinstance(parameter, QuantizedTensor):
            parameter.requires_grad_(True)


def shape_of(layer: "LayerTensors", name: str, rank: int) -> tuple[int, ...]:
    """The shape that a tensor of an adapter has where its rank is this one."""
    sizes = layer.sizes(rank)
    return tuple(sizes[letter] for letter in layer.dimensions()[name])


class Factors(nn.Module):
    """One adapter: lora_A, lora_B, and what their product is multiplied by."""

    # What is trained, with its dimensions: lora_A and lora_B first.
    adapter_parameters: ClassVar[Mapping[str, str]] = FACTORS
    # Which dimension of lora_A is the rank; those behind it are what a row of A reads.
    rank_dim: int = -2
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    alpha: float | None
    dropout: float
    use_rslora: bool
    # LoRA-FA: whether lora_A stays what it starts as.
    freeze_a = False

    @property
    def rank(self) -> int:
        return self.lora_A.shape[self.rank_dim]

    @property
    def scaling(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self._divisor(self.rank)

    def _divisor(self, rank: int) -> float:
        """What alpha is divided by, for an adapter of this rank."""
        return math.sqrt(rank) if self.use_rslora else rank

    def low_rank(self, lora_A: Tensor, lora_B: Tensor, **others: Tensor) -> tuple[Tensor, Tensor]:
        """(A, B) of the product that acts. others are the adapter's other parameters by name,
        where they are not the layer's own."""
        return lora_A, lora_B

    def factor(self, name: str) -> Tensor:
        """lora_A, lora_B or another of the adapter's parameters as the next forward has it: where
        pruning or weight norm compute it in a hook, the attribute is that of the last one."""
        hook: Any
        tensor: Tensor
        for hook in self._forward_pre_hooks.values():
            if getattr(hook, "_tensor_name", None) == name:
                tensor = hook.apply_mask(self)
                break
            if getattr(hook, "name", None) == name and hasattr(hook, "compute_weight"):
                without_update = (False,) if hasattr(hook, "n_power_iterations") else ()
                tensor = hook.compute_weight(self, *without_update)
                break
        else:
            tensor = getattr(self, name)
        return tensor

    def factors(self) -> tuple[Tensor, Tensor]:
        """`low_rank` as the next forward has it."""
        return self.low_rank(**{name: self.factor(name) for name in self.adapter_parameters})

    def magnitude(self) -> Tensor | None:
        """What DoRA trains beside them, as the next forward has it; None of an adapter without."""
        return self.factor(MAGNITUDE) if MAGNITUDE in self.adapter_parameters else None

    def factor_parameters(self, *names: str) -> list[nn.Parameter]:
        """These of the adapter's parameters, or what they are computed from; all by default."""
        keys = [k for name in names or self.adapter_parameters for k in sources(self, name)]
        return [self.get_parameter(key) for key in keys]

    def trained_parameters(self) -> list[nn.Parameter]:
        """Those of `factor_parameters` that are to train."""
        trained = [n for n in self.adapter_parameters if not (self.freeze_a and n == "lora_A")]
        return self.factor_parameters(*trained)


class LayerTensors(Factors):
    """The tensors and numbers of `LoRALayer`, which makes them.

    A class of another kind of adapter names what it trains in `adapter_parameters`, starts it in
    `reset_lora_parameters` and says in `low_rank` what it does to A and B.
    """

    # What the plain layer holds, with its dimensions.
    base_tensors: ClassVar[Mapping[str, str]] = BASE
    # Whether `weight` is [in_features, out_features].
    fan_in_fan_out = False
    # What its name in a model has after that of its weight's module or parameter.
    suffix: ClassVar[str] = ""
    in_features: int
    out_features: int
    weight: Tensor
    bias: Tensor | None
    pissa_A: Tensor | None
    pissa_B: Tensor | None
    merged_base: Tensor | None
    _base_weight_cpu: Tensor | None
    _merged: Literal[False, "kept", "final"]
    _disabled: bool

    @property
    def matrix(self) -> Tensor:
        """`weight` as [out_features, in_features], a view."""
        return self._oriented(self.weight)

    def _oriented(self, weight: Tensor) -> Tensor:
        return weight

    def sizes(self, rank: int) -> dict[str, int]:
        """The dimensions by their letters, for an adapter of this rank."""
        experts = self.weight.shape[0]
        return {"N": self.out_features, "K": self.in_features, "r": rank, "E": experts}

    @classmethod
    def dimensions(cls) -> dict[str, str]:
        """The dimensions of all tensors, by name."""
        return {**cls.base_tensors, **cls.adapter_parameters, **PISSA}

    @classmethod
    def adapter_names(cls) -> tuple[str, ...]:
        """The adapter's tensors, in the layer and its state dict."""
        return (*cls.adapter_parameters, *PISSA)

    @property
    def merged(self) -> bool:
        """Whether the weight holds base plus adapter."""
        return bool(self._merged)

    @torch.no_grad()
    def set_factors(self, A: Tensor, B: Tensor) -> None:
        """Replaces lora_A, lora_B by new parameters of any rank; `scaling` stays the same number.

        A [r, in_features] and B [out_features, r] are copied, in the adapter's own dtype and
        device. What PiSSA or OLoRA took out of the weight keeps its rank. An optimizer goes on
        holding the old parameters: `adjust_rank` exchanges them there.

        Raises:
            ValueError: shapes that do not fit, a layer that is sharded or offloaded, lora_A or
                lora_B pruned or parametrized. RuntimeError: the layer is merged.
        """
        self._require_unmerged("set_factors")
        self._refuse("set_factors", self.why_fixed() or self.why_not_two())
        if is_sharded(self.lora_A):
            raise ValueError(
                f"lora_A: is sharded, {self.lora_A.placements}; change the rank before"
                " parallelize_module or fully_shard"
            )
        rank = A.shape[0] if A.dim() == 2 else 0
        values = dict(zip(FACTORS, (A, B), strict=True))
        for name, value in values.items():
            if value.shape != shape_of(self, name, rank) or rank == 0:
                raise ValueError(
                    f"{name.removeprefix('lora_')}: expected A [r, {self.in_features}] and"
                    f" B [{self.out_features}, r] with r >= 1, got {tuple(value.shape)}"
                )
        scaling = self.scaling
        for name, value in values.items():
            old = getattr(self, name)
            value = value.detach().to(old, copy=True).contiguous()
            setattr(self, name, nn.Parameter(value, requires_grad=old.requires_grad))
        if self.alpha is not None:
            divisor = self._divisor(rank)
            alpha = scaling * divisor
            # The product is rounded; a neighbour may give the quotient back exactly.
            nearby = (alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
            self.alpha = min(nearby, key=lambda value: abs(value / divisor - scaling))

    @staticmethod
    def _refuse(what: str, reason: str | None) -> None:
        if reason is not None:
            raise ValueError(f"{what}: {reason}")

    def why_valueless(self, *names: str) -> str | None:
        """Why these tensors cannot be computed with and changed; None if they can."""
        reason = computed(self, names)
        if reason is not None:
            return reason
        for name in names:
            tensor = getattr(self, name)
            if tensor.is_meta:
                return f"its {name} is on the meta device, without values, or {OFFLOADED}"
            if (odd := odd_type(tensor)) is not None:
                return f"its {name} is {odd}"
        return None

    def why_fixed(self, *names: str) -> str | None:
        """Why values written to these tensors (the adapter's parameters) would be lost; None if
        not."""
        reason = computed(self, names or self.adapter_parameters)
        if reason is None and is_offloaded(self):
            reason = f"is {OFFLOADED}"
        return reason

    def why_not_two(self) -> str | None:
        """Why other values of lora_A and lora_B alone are not the adapter; None if they are."""
        others = self._modules.get("adapters")
        if others is not None:
            return f"carries other adapters too, {', '.join(map(repr, others._modules))}"
        return self.why_more_than_factors()

    def why_more_than_factors(self) -> str | None:
        """Why the layer's adapter is more than lora_A and lora_B; None if it is those."""
        others = [name for name in self.adapter_parameters if name not in FACTORS]
        return f"a {type(self).__name__} trains {', '.join(others)} too" if others else None

    def _require_unmerged(self, what: str) -> None:
        if self._merged:
            raise RuntimeError(f"{what}: the layer is merged; call unmerge() first")
