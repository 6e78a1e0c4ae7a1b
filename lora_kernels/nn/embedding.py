"""`FusedLoRAEmbedding`, an nn.Embedding with an adapter."""

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_kernels.bases import embedding_objection
from lora_kernels.embedding import add_branch
from lora_kernels.nn.layer import AdapterOptions, LoRALayer
from lora_kernels.nn.pissa import Init, reset_factors
from lora_kernels.nn.tensors import Factors
from lora_kernels.packed import Projection


class FusedLoRAEmbedding(LoRALayer, nn.Embedding):
    """Rows of W + scaling (B A)^T at the indices that it is given, with W frozen.

    A subclass of `nn.Embedding`: `weight` [num_embeddings, embedding_dim] keeps its name and
    object. It adds `lora_A` [rank, num_embeddings], which starts at zero, and `lora_B`
    [embedding_dim, rank], which starts normal, as PEFT's lora_embedding_A and lora_embedding_B.
    There is no x of which dropout would drop elements: `dropout` has no effect here, as in PEFT.

    Args:
        padding_idx, device, dtype: as in `nn.Embedding`.
        rank, alpha, dropout, use_rslora, adapter_dtype: as in `FusedLoRALinear`.

    Raises:
        ValueError: rank, alpha or dropout out of range.  TypeError: an unusable dtype.
    """

    base_class = nn.Embedding
    base_tensors: ClassVar[Mapping[str, str]] = {"weight": "NK"}
    # For the layer the weight is one of V inputs, of which each index picks one.
    fan_in_fan_out = True
    bias = None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        rank: int,
        *,
        padding_idx: int | None = None,
        alpha: float | None = None,
        dropout: float = 0.0,
        use_rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_idx, device=device, dtype=dtype)
        self._add_adapter(AdapterOptions(rank, alpha, dropout, use_rslora, adapter_dtype))
        self.reset_lora_parameters()

    @staticmethod
    def _require_base(linear: nn.Module) -> nn.Embedding:
        if type(linear) is not nn.Embedding:
            raise TypeError(
                f"linear: expected torch.nn.Embedding itself, got {type(linear).__name__}"
            )
        if (reason := embedding_objection(linear)) is not None:
            raise ValueError(f"linear: {reason}")
        return linear

    @property
    def in_features(self) -> int:  # type: ignore[override]  # never set
        return self.num_embeddings

    @property
    def out_features(self) -> int:  # type: ignore[override]  # never set
        return self.embedding_dim

    def _oriented(self, weight: Tensor) -> Tensor:
        return weight.t()

    def _reset_base(self) -> None:
        nn.Embedding.reset_parameters(self)

    def _fill(self, holder: Factors, adapter: AdapterOptions) -> None:
        if adapter.freeze_a:
            raise ValueError("freeze_a: an embedding's lora_A starts at zero and has to be trained")
        super()._fill(holder, adapter)

    def _start(self, adapter: Factors, init: Init) -> None:
        if init == "random":
            return reset_factors(adapter, init)
        nn.init.zeros_(adapter.lora_A)
        nn.init.normal_(adapter.lora_B)
        return None

    def _init_from_weight(self, init: Init) -> None:
        """Nothing: PEFT too starts embeddings in one way."""

    def forward(self, input: Tensor) -> Tensor:  # as nn.Embedding calls it
        """Indices [...] to [..., embedding_dim]."""
        if self._disabled or self._merged or not self._active:
            weight = self._required_base() if self._disabled and self._merged else self.weight
            return F.embedding(input, weight, self.padding_idx)
        y = F.embedding(input, self.weight, self.padding_idx)
        for A, B, scaling, _ in map(self._in_forward, self._active):
            y = add_branch(y, input, A, B, scaling, self.padding_idx)
        return y

    def projection(self, x: Tensor) -> Projection | None:
        return None

    def why_no_rows(self) -> str | None:
        return "is an embedding, whose rows have no adapters of their own"

    def _base_repr(self) -> str:
        return nn.Embedding.extra_repr(self)
