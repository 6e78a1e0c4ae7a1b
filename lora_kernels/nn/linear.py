"""`FusedLoRALinear`, an nn.Linear with an adapter."""

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from lora_kernels import options
from lora_kernels.nn.layer import AdapterOptions, LoRALayer


class FusedLoRALinear(LoRALayer, nn.Linear):  # type: ignore[misc]  # its bias may be None too
    """y = x W^T + bias + scaling (drop(x) A^T) B^T, with W and bias frozen.

    A subclass of `nn.Linear`: `weight` [out_features, in_features] and `bias` keep their names, so
    base checkpoints load (a state dict without this layer's lora keys leaves the adapter alone). It
    adds the parameters `lora_A` [rank, in_features] and `lora_B` [out_features, rank].

    Args:
        rank: of the adapter, at least 1.
        alpha: scaling is alpha / rank, with `use_rslora` alpha / sqrt(rank); None means scaling 1.
        dropout: probability in [0, 1) of dropping an input element of the adapter, in training
            only.
        use_rslora: rank-stabilised scaling (Kalajdzievski, 2023, arXiv:2312.03732).
        adapter_dtype: of lora_A and lora_B: the base weight's or torch.float32. None means fp32
            for a base of 16 bits, in which most steps of an optimizer would round away, and else
            the weight's.
        use_dora: DoRA: what is made is a `FusedDoRALinear`, which trains `lora_magnitude`
            [out_features] too.

    Raises:
        ValueError: rank, alpha or dropout out of range.  TypeError: an unusable dtype.
    """

    base_class = nn.Linear

    def __new__(cls, *args: object, use_dora: bool = False, **others: object) -> "FusedLoRALinear":
        return super().__new__(cls.with_magnitude() if use_dora is True else cls)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        alpha: float | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        use_rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        use_dora: bool = False,
        freeze_a: bool = False,
    ) -> None:
        options.check_flag(use_dora, "use_dora")
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        adapter = AdapterOptions(rank, alpha, dropout, use_rslora, adapter_dtype, freeze_a=freeze_a)
        self._add_adapter(adapter)
        self.reset_lora_parameters()

    @staticmethod
    def _require_base(linear: nn.Module) -> nn.Linear:
        plain = type(linear) is nn.Linear or is_parametrized(linear)
        if not (plain and isinstance(linear, nn.Linear)):
            raise TypeError(f"linear: expected torch.nn.Linear itself, got {type(linear).__name__}")
        return linear

    def _reset_base(self) -> None:
        nn.Linear.reset_parameters(self)
