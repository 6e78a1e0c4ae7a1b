"""Quantised bases of PEFT's layers that the op reads itself, on the CPU: bitsandbytes' in 4 and 8
bits, torchao's for the weight only. What they hold is read as it lies, nothing is copied.

Where `Linear8bitLt` rounds what it is multiplied with to 8 bits, the op does not: it is the more
exact.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_kernels.weights import QuantizedWeight, from_bitsandbytes, from_torchao
from lora_kernels.weights.owners import of_llm_int8

HELD = "_base_record"  # the attribute of a layer that holds the last record


class _Held(NamedTuple):
    """What a record was made of, and the record; None where none could be made."""

    weight: Tensor
    places: tuple[int, int]
    record: QuantizedWeight | None


def record_of_base(layer: nn.Module, base: nn.Module, dtype: torch.dtype) -> QuantizedWeight | None:
    """The weight of a layer's base, to compute in a dtype with; None where the base computes
    itself."""
    weight = base._parameters.get("weight")
    if weight is None or weight.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    kind: Any = type(base).__name__
    owner: Any = base
    if kind == "Linear4bit" and owner.compute_dtype not in (None, dtype):
        return None
    places = (weight.data_ptr(), id(getattr(weight, "quant_state", None)))
    held: _Held | None = layer.__dict__.get(HELD)
    if held is None or held.weight is not weight or held.places != places:
        held = _Held(weight, places, _made(kind, owner, weight))
        layer.__dict__[HELD] = held
    return held.record


def _made(kind: str, base: Any, weight: Any) -> QuantizedWeight | None:
    try:
        if kind == "Linear4bit":
            return from_bitsandbytes(weight)
        if kind == "Linear8bitLt":
            # The scales lie in the weight, and after the first forward in the layer's state.
            return of_llm_int8(weight.data, base.state.SCB if weight.SCB is None else weight.SCB)
        if type(weight).__module__.startswith("torchao."):
            return from_torchao(weight)
    except (TypeError, ValueError, AttributeError):
        pass
    return None
