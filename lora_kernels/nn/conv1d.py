"""`FusedLoRAConv1D`, Transformers' Conv1D with an adapter."""

from typing import TYPE_CHECKING

from torch import Tensor, nn

from lora_kernels.bases import is_conv1d
from lora_kernels.nn.layer import LoRALayer

if TYPE_CHECKING:
    from transformers.pytorch_utils import Conv1D


class FusedLoRAConv1D(LoRALayer):
    """`FusedLoRALinear` on a Transformers Conv1D (GPT-2), made by `from_linear` or `apply_lora`.

    It shares the Conv1D's `weight` [in_features, out_features] as it lies, and is no `nn.Linear`,
    whose weight others would read the other way round.
    """

    fan_in_fan_out = True
    nx: int
    nf: int

    def __init__(self, *args: object, **kwargs: object) -> None:
        raise TypeError("FusedLoRAConv1D: is made from a Conv1D, by from_linear or apply_lora")

    @staticmethod
    def _require_base(linear: nn.Module) -> "Conv1D":
        if not is_conv1d(linear):
            raise TypeError(
                f"linear: expected Transformers' Conv1D itself, got {type(linear).__name__}"
            )
        return linear

    def _reset_base(self) -> None:
        nn.init.normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def _oriented(self, weight: Tensor) -> Tensor:
        return weight.t()

    @property
    def base_class(self) -> type[nn.Module]:  # type: ignore[override]  # asked of layers alone
        from transformers.pytorch_utils import Conv1D

        return Conv1D

    @property
    def in_features(self) -> int:  # type: ignore[override]  # never set
        return self.nx

    @property
    def out_features(self) -> int:  # type: ignore[override]  # never set
        return self.nf
