"""DoRA (Liu et al., 2024, arXiv:2402.09353): the rows of base plus adapter have lengths that are
trained beside their directions."""

import torch
from torch import Tensor, nn

from lora_kernels.functional import scaled_linear
from lora_kernels.nn.conv1d import FusedLoRAConv1D
from lora_kernels.nn.layer import LoRALayer
from lora_kernels.nn.linear import FusedLoRALinear
from lora_kernels.nn.tensors import FACTORS, MAGNITUDE
from lora_kernels.norms import HELD, norms_in_evaluation, weight_norms
from lora_kernels.sharding import copy_whole, whole


class _DoRA(LoRALayer):
    """Mixed in before a layer's class.

    `lora_magnitude` [out_features] starts as the norms of the rows, with which the layer computes
    what its base does. The norms are constants to the gradients. In training they are computed in
    every call; in evaluation again when weight, lora_A or lora_B is another tensor or was changed
    in place, of which torch keeps count (writing to `.data` it does not see: call `eval()` again).
    """

    adapter_parameters = {**FACTORS, MAGNITUDE: "N"}  # noqa: RUF012  # a ClassVar of the base
    lora_magnitude: nn.Parameter

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        plain = cls.__bases__[1:]
        if plain:  # not a class of a user's own derived from one of these
            plain[0]._of_dora = cls  # type: ignore[attr-defined]  # a LoRALayer

    @classmethod
    def with_magnitude(cls) -> "type[_DoRA]":
        return cls

    @torch.no_grad()
    def _settle_start(self) -> None:
        weight, A, B = map(whole, (self.matrix, self.lora_A, self.lora_B))
        norms = weight_norms(weight, A, B, self.scaling)
        copy_whole(self.lora_magnitude, norms.to(self.lora_magnitude.dtype))

    def train(self, mode: bool = True) -> "_DoRA":
        self.__dict__.pop(HELD, None)
        super().train(mode)
        return self

    def _directly(self, x: Tensor) -> Tensor | None:
        acts = self._active and not self._disabled and not self._merged
        return None if acts else super()._directly(x)

    def projection(self, x: Tensor) -> None:
        """None: it is more than that."""

    def _acting_forward(self, x: Tensor) -> Tensor:
        (name,) = self._active
        A, B, scaling, p = self._in_forward(name)
        if self.training:
            norms = weight_norms(self.matrix, A, B, scaling)
        else:
            norms = norms_in_evaluation(self.__dict__, self.matrix, A, B, scaling)
        factor = self.lora_magnitude.to(norms.dtype) / norms
        return scaled_linear(x, self.matrix, (A, B), self.bias, (scaling, p, None), factor)

    def _total(self, base: Tensor) -> Tensor:
        total = super()._total(base)
        if self._active:
            length = torch.linalg.vector_norm(total, dim=1)
            magnitude = self.factor(MAGNITUDE).to(total.dtype)
            total *= (magnitude / length.clamp_min(torch.finfo(total.dtype).tiny))[:, None]
        return total

    def _absorb(self) -> None:
        super()._absorb()
        if self._active:
            self._settle_start()


class FusedDoRALinear(_DoRA, FusedLoRALinear):  # type: ignore[misc]  # its bias may be None too
    """`FusedLoRALinear` with `use_dora=True`: what that and its `from_linear` make then.

    y = x W^T + bias + (g - 1) drop(x) W^T + g scaling (drop(x) A^T) B^T, with W and bias frozen; g
    is `lora_magnitude` over the norms of the rows of W + scaling B A.
    """


class FusedDoRAConv1D(_DoRA, FusedLoRAConv1D):
    """`FusedDoRALinear` on a Transformers Conv1D (GPT-2)."""
