"""What every quantised weight is: tensors that their owner keeps, their meaning, and a decoder of
any part of them, so that nobody needs the whole."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

_CHUNK = 1 << 18  # values that are decoded at a time, in fp32
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_Weight = TypeVar("_Weight", bound="QuantizedWeight")
_KINDS: dict[str, type[QuantizedWeight]] = {}


@dataclass(frozen=True, eq=False)
class QuantizedWeight(ABC):
    """The weight [N, K] of a linear layer in fewer bits, as an immutable record of tensors that it
    does not copy. Its classes are the layouts; `quantize` makes one of a weight, `from_torchao` and
    the others of what another library holds.

    Its values are those of `dequantize(torch.float32)`; other dtypes round them once. Shapes and
    dtypes of its tensors are checked where it is made, their contents are not, which a device would
    have to wait for: `from_torchao` and the others raise ValueError for scales that are not finite,
    a record made by hand decodes to what they say.
    """

    kind: ClassVar[str]
    """Of the layout, a word."""

    shape: tuple[int, int]

    def __init_subclass__(cls) -> None:
        _KINDS[cls.kind] = cls

    def __post_init__(self) -> None:
        N, K = self.shape
        if N < 1 or K < 1:
            raise ValueError(f"shape: expected (N, K) of at least 1 each, got {self.shape}")
        self._check()
        devices = {tensor.device for tensor in self.parts}
        if len(devices) > 1:
            raise ValueError(f"{self.kind}: expected tensors of one device, got {devices}")

    @abstractmethod
    def _check(self) -> None:
        """Raises ValueError or TypeError, naming the tensor, where they do not fit the shape."""

    @abstractmethod
    def _values(self, rows: slice, columns: slice) -> Tensor:
        """Rows and columns that start and end at multiples of `step`, in fp32."""

    @property
    @abstractmethod
    def scales(self) -> Sequence[Tensor]:
        """What its codes are multiplied with, all of it finite."""

    @property
    def step(self) -> int:
        """Columns that begin at a multiple of it can be decoded without those before."""
        return 1

    @property
    def parts(self) -> list[Tensor]:
        """Its tensors."""
        return list(self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by the names of their fields."""
        return {name: value for name, value in self._all() if isinstance(value, Tensor)}

    @property
    def form(self) -> str:
        """All but its tensors, in words: `assemble` makes the weight of both."""
        numbers = [
            f"{name}={value!r}"
            for name, value in self._all()
            if name != "shape" and not isinstance(value, Tensor) and value is not None
        ]
        N, K = self.shape
        return " ".join([self.kind, f"{N}x{K}", ",".join(self.tensors()), *numbers])

    def _all(self) -> Iterator[tuple[str, Any]]:
        return ((field.name, getattr(self, field.name)) for field in fields(self))

    @property
    def device(self) -> torch.device:
        return self.parts[0].device

    @property
    def nbytes(self) -> int:
        """Of its tensors in memory."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.parts)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The whole weight [N, K] in a floating dtype: the bits that its owner's own method gives,
        where there is one."""
        if dtype not in FLOATS:
            raise TypeError(f"dtype: expected a floating one, got {dtype}")
        N, K = self.shape
        out = torch.empty(self.shape, dtype=dtype, device=self.device)
        return self.decode(slice(0, N), slice(0, K), out)

    def decode(self, rows: slice, columns: slice, out: Tensor) -> Tensor:
        """Fills `out` with a part of the weight [N, K], of slices with a start and a stop and no
        step, and returns it. Beside it a MiB of memory is needed, or of a few whole rows if these
        are longer."""
        K, step = self.shape[1], self.step
        first = columns.start // step * step
        read = slice(first, min(K, -(-columns.stop // step) * step))
        wanted = slice(columns.start - first, columns.stop - first)
        count = max(1, _CHUNK // (read.stop - read.start))
        for start in range(rows.start, rows.stop, count):
            some = slice(start, min(start + count, rows.stop))
            values = self._values(some, read)
            out[start - rows.start : some.stop - rows.start] = values[:, wanted]
        return out

    def to(self: _Weight, device: torch.device | str) -> _Weight:
        """The same weight on another device."""
        kind: Any = type(self)
        moved = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        weight: _Weight = kind(**{**dict(self._all()), **moved})
        return weight

    def __repr__(self) -> str:
        N, K = self.shape
        bits = 8 * self.nbytes / (N * K)
        return f"QuantizedWeight({self.kind}, {N} x {K}, {bits:.2f} bits, {self.device})"


def assemble(form: str, parts: Sequence[Tensor]) -> QuantizedWeight:
    """The weight of its `form` and its `parts`. Raises ValueError where they are none."""
    kind, names, given = _parsed(form)
    if len(names) != len(parts):
        raise ValueError(
            f"parts: expected {len(names)} tensors ({', '.join(names)}), got {len(parts)}"
        )
    weight: QuantizedWeight = kind(**given, **dict(zip(names, parts, strict=True)))
    return weight


def shape_of(form: str) -> tuple[int, int]:
    """(N, K) of the weight that has a `form`."""
    shape: tuple[int, int] = _parsed(form)[2]["shape"]
    return shape


@cache
def _parsed(form: str) -> tuple[Any, list[str], dict[str, Any]]:
    try:
        kind, shape, names, *numbers = form.split(" ")
        N, K = map(int, shape.split("x"))
        given: dict[str, Any] = {"shape": (N, K)}
        for number in numbers:
            name, value = number.split("=")
            given[name] = float(value) if "." in value or "e" in value else int(value)
        return _KINDS[kind], names.split(","), given
    except (ValueError, KeyError):
        raise ValueError(f"form: expected that of a QuantizedWeight, got {form!r}") from None


def check_finite(weight: _Weight) -> _Weight:
    """The weight. Raises ValueError where one of its scales is not finite."""
    for tensor in weight.scales:
        if not tensor.is_meta and not bool(torch.isfinite(tensor.float()).all()):
            name = next(name for name, one in weight.tensors().items() if one is tensor)
            raise ValueError(f"{name}: expected finite numbers, got some that are not")
    return weight


def expect(name: str, tensor: Tensor, shape: Sequence[int], *dtypes: torch.dtype) -> None:
    """Raises ValueError or TypeError unless a tensor has a shape and one of the dtypes, and is
    frozen."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}")
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor.dtype not in dtypes:
        legal = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name}: expected {legal}, got {tensor.dtype}")
    if tensor.layout is not torch.strided or not tensor.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")
    if tensor.requires_grad:
        raise ValueError(
            f"{name}: expected a tensor that does not require grad, a quantised weight has no"
            " gradient; detach it"
        )
