"""What a layer with an adapter holds: the one list of its tensors, and how they are asked for and
exchanged."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lora_kernels.bases import computed, odd_type, sources
from lora_kernels.offloading import OFFLOADED, is_offloaded
from lora_kernels.sharding import is_sharded

Factor = Literal["lora_A", "lora_B"]
# What is trained, as the parameters.
FACTORS: tuple[Factor, ...] = get_args(Factor)
# What PiSSA took out of the weight, as buffers.
PISSA = ("pissa_A", "pissa_B")
ADAPTER = (*FACTORS, *PISSA)
# The base of a merged layer, a buffer.
MERGED = "merged_base"
# By name the tensors' dimensions: N, K are the layer's out_features and in_features, r the rank.
DIMENSIONS = {
    "weight": "NK", "bias": "N", "lora_A": "rK", "lora_B": "Nr", "pissa_A": "rK", "pissa_B": "Nr",
}  # fmt: skip

_FROZEN = "_lora_frozen"


def note_frozen(module: nn.Module, names: set[str]) -> None:
    """Notes which of a module's parameters an adapter freezes, beside those noted before."""
    if names:
        vars(module)[_FROZEN] = vars(module).get(_FROZEN, set()) | names


def thaw(module: nn.Module) -> None:
    """Lets the parameters that were noted train again."""
    for name in vars(module).pop(_FROZEN, ()):
        parameter = module._parameters.get(name)
        if parameter is not None:
            parameter.requires_grad_(True)


def shape_of(layer: "LayerTensors", name: str, rank: int) -> tuple[int, ...]:
    """The shape that a tensor of an adapter has where its rank is this one."""
    sizes = {"N": layer.out_features, "K": layer.in_features, "r": rank}
    return tuple(sizes[letter] for letter in DIMENSIONS[name])


class LayerTensors(nn.Module):
    """The tensors and numbers of `LoRALayer`, which makes them."""

    # Whether `weight` is [in_features, out_features].
    fan_in_fan_out = False
    in_features: int
    out_features: int
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    pissa_A: Tensor | None
    pissa_B: Tensor | None
    merged_base: Tensor | None
    _base_weight_cpu: Tensor | None
    alpha: float | None
    dropout: float
    use_rslora: bool
    _merged: Literal[False, "kept", "final"]
    _disabled: bool

    @property
    def matrix(self) -> Tensor:
        """`weight` as [out_features, in_features], a view."""
        return self._oriented(self.weight)

    def _oriented(self, weight: Tensor) -> Tensor:
        return weight

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    @property
    def scaling(self) -> float:
        if self.alpha is None:
            return 1.0
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    @property
    def merged(self) -> bool:
        """Whether the weight holds base plus adapter."""
        return bool(self._merged)

    def factor(self, name: Factor) -> Tensor:
        """lora_A or lora_B as the next forward has it: where pruning or weight norm compute it in a
        hook, the attribute is that of the last one."""
        for hook in self._forward_pre_hooks.values():
            if getattr(hook, "_tensor_name", None) == name:
                return hook.apply_mask(self)
            if getattr(hook, "name", None) == name and hasattr(hook, "compute_weight"):
                without_update = (False,) if hasattr(hook, "n_power_iterations") else ()
                return hook.compute_weight(self, *without_update)
        return getattr(self, name)

    def factor_parameters(self, *names: Factor) -> list[nn.Parameter]:
        """These (lora_A, lora_B), or the parameters that they are computed from."""
        keys = [key for name in names or FACTORS for key in sources(self, name)]
        return [self.get_parameter(key) for key in keys]

    @torch.no_grad()
    def set_adapter(self, A: Tensor, B: Tensor) -> None:
        """Replaces lora_A, lora_B by new parameters of any rank; `scaling` stays the same number.

        A [r, in_features] and B [out_features, r] are copied, in the adapter's own dtype and
        device. What PiSSA took out of the weight keeps its rank. An optimizer goes on holding the
        old parameters: `adjust_rank` exchanges them there.

        Raises:
            ValueError: shapes that do not fit, a layer that is sharded or offloaded, lora_A or
                lora_B pruned or parametrized. RuntimeError: the layer is merged.
        """
        self._require_unmerged("set_adapter")
        self._refuse("set_adapter", self.why_fixed())
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
            divisor = math.sqrt(rank) if self.use_rslora else rank
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
        """Why values written to these tensors (lora_A, lora_B) would be lost; None if not."""
        reason = computed(self, names or FACTORS)
        if reason is None and is_offloaded(self):
            reason = f"is {OFFLOADED}"
        return reason

    def _require_unmerged(self, what: str) -> None:
        if self._merged:
            raise RuntimeError(f"{what}: the layer is merged; call unmerge() first")
