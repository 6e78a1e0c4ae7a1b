"""The kinds of calls that are asked for: of shapes, or of a model."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from lora_kernels.backends.cuda.plan import WEIGHTS
from lora_kernels.nn import LoRALayer
from lora_kernels.testing import DTYPES, Case
from lora_kernels.weights import FOUR_BIT, QuantizedTensor, kind_of

SHAPES = ((4096, 4096, 16), (14336, 4096, 16), (4096, 14336, 16))


def cases_of(
    model: nn.Module | None,
    rows: Sequence[int],
    shapes: Iterable[tuple[int, int, int]] | None,
    dtype: str | None,
    weight: str = "dense",
) -> list[tuple[str, Case]]:
    """(base, case) of every call: the base is one of WEIGHTS, that of shapes is `weight`; or
    "given" of a layer whose weight no plan multiplies with."""
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype: got {dtype!r}, legal values are {', '.join(DTYPES)}")
    if weight not in WEIGHTS:
        raise ValueError(f"weight: got {weight!r}, legal values are {', '.join(WEIGHTS)}")
    found: dict[tuple[Any, ...], None] = {}
    if model is None:
        for N, K, r in SHAPES if shapes is None else shapes:
            if weight in FOUR_BIT and K % 2:
                raise ValueError(f"shapes: expected an even K of {weight}, got {(N, K, r)}")
            found |= dict.fromkeys((weight, K, N, r, dtype or "bf16", p) for p in (0.0, 0.1))
    else:
        for base, *sizes, own, p in (each for layer in model.modules() for each in _sizes(layer)):
            found[(base, *sizes, dtype or own, p)] = None
        if not found:
            raise ValueError("model: has no LoRA layer; call apply_lora first, or give shapes")
    cases = [(base, Case(M, *sizes)) for M in rows for base, *sizes in found]
    for _, case in cases:
        if min(case[:4]) < 1:
            raise ValueError(f"rows, shapes: expected sizes of at least 1, got {case}")
    return cases


def _sizes(layer: nn.Module) -> Iterator[tuple[str, int, int, int, str, float]]:
    """Base, K, N, r, dtype and dropout of the calls of a LoRA layer, PEFT's too; in eval mode none
    drops."""
    names = {value: name for name, value in DTYPES.items()}
    found: list[tuple[Tensor, Tensor, Tensor, float]] = []
    if isinstance(layer, LoRALayer) and layer.weight.dim() == 2:
        for one in map(layer.adapter, layer.names):
            found.append((one.lora_A, one.lora_B, layer.weight, one.dropout))
    elif isinstance(getattr(layer, "lora_A", None), nn.ModuleDict):
        of_peft: Any = layer
        for name, down in of_peft.lora_A.items():
            p = getattr(of_peft.lora_dropout[name], "p", 0.0)
            found.append((down.weight, of_peft.lora_B[name].weight, of_peft.base_layer.weight, p))
    for a, b, weight, dropout in found:
        if weight.dtype in names:
            for p in dict.fromkeys((dropout, 0.0)):
                sizes = a.shape[1], b.shape[0], a.shape[0]
                yield _base(weight), *sizes, names[weight.dtype], p


def _base(weight: Tensor) -> str:
    if not isinstance(weight, QuantizedTensor):
        return "dense"
    kind = kind_of(weight.record)
    if kind is None or (kind in FOUR_BIT and weight.record.shape[1] % 2):
        return "given"
    return kind
