"""A quantised weight where a module expects a tensor: a parameter of the shape and the dtype that
the weight had, which holds a `QuantizedWeight`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_kernels._namespace import ops
from lora_kernels.weights.record import QuantizedWeight, assemble

_aten = torch.ops.aten
_PART = "_part_"
_Handler = Callable[..., Any]
# By the method, by the attribute; `nn.Parameter` and `Module.requires_grad_` come to the first.
_TRAINS = (Tensor.requires_grad_, Tensor.requires_grad.__set__)  # type: ignore[attr-defined]


class QuantizedTensor(Tensor):
    """Stands for `record.dequantize(dtype)`, [N, K], or for its transpose.

    It is frozen and can be moved, copied, transposed, saved and multiplied with (`F.linear`,
    `lora_linear`); other operations raise NotImplementedError, and to require a gradient, by itself
    or with the whole model, raises ValueError. A change of its dtype is one of what it is decoded
    to: the codes and scales stay.
    """

    record: QuantizedWeight
    transposed: bool

    @staticmethod
    def __new__(
        cls, record: QuantizedWeight, dtype: torch.dtype, transposed: bool = False
    ) -> QuantizedTensor:
        N, K = record.shape
        shape = (K, N) if transposed else (N, K)
        tensor: QuantizedTensor = Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=record.device, requires_grad=False
        )
        tensor.record, tensor.transposed = record, transposed
        for name, part in record.tensors().items():
            setattr(tensor, _PART + name, part)
        return tensor

    def __init__(
        self, record: QuantizedWeight, dtype: torch.dtype, transposed: bool = False
    ) -> None:
        pass

    def dequantize(self) -> Tensor:
        """The tensor that it stands for."""
        whole = self.record.dequantize(self.dtype)
        return whole.t() if self.transposed else whole

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]  # of no contents
        return f"QuantizedTensor({self.record!r}, shape={tuple(self.shape)}, dtype={self.dtype})"

    def __tensor_flatten__(self) -> tuple[list[str], tuple[str, torch.dtype, bool]]:
        names = [_PART + name for name in self.record.tensors()]
        return names, (self.record.form, self.dtype, self.transposed)

    @staticmethod
    def __tensor_unflatten__(
        inner: Mapping[str, Tensor], given: Any, outer_size: Any, outer_stride: Any
    ) -> QuantizedTensor:
        form, dtype, transposed = given
        return QuantizedTensor(assemble(form, list(inner.values())), dtype, transposed)

    def __reduce_ex__(self, protocol: Any) -> Any:
        record = self.record
        is_parameter = isinstance(self, torch.nn.Parameter)
        given = (record.form, record.parts, self.dtype, self.transposed, is_parameter)
        return _rebuild, given

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            return _linear(*args, **(kwargs or {}))
        if func in _TRAINS:
            _refuse_training(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # it is called on the class
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        handler = _HANDLERS.get(func)
        if handler is None:
            raise NotImplementedError(
                f"{func} of a QuantizedTensor; its dequantize() gives an ordinary tensor"
            )
        return handler(*args, **(kwargs or {}))

    def _with(self, record: QuantizedWeight, dtype: torch.dtype | None = None) -> QuantizedTensor:
        return QuantizedTensor(record, dtype or self.dtype, self.transposed)


def _rebuild(
    form: str, parts: list[Tensor], dtype: torch.dtype, transposed: bool, is_parameter: bool
) -> Tensor:
    tensor = QuantizedTensor(assemble(form, parts), dtype, transposed)
    return torch.nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor


torch.serialization.add_safe_globals([_rebuild, QuantizedTensor])


# ------------------------------------------------------------------------------------------ handled


def _refuse_training(tensor: Tensor, requires_grad: bool = True) -> None:
    if requires_grad and isinstance(tensor, QuantizedTensor):
        raise ValueError(
            f"requires_grad: expected False of a quantised weight, got True: {tensor.record!r} has"
            " no gradient; train adapters (lora_parameters(model)), or replace the weight by its"
            " dequantize()"
        )


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not isinstance(weight, QuantizedTensor) or weight.transposed:
        raise NotImplementedError("linear: of quantised tensors the weight [N, K] can be one")
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = None if bias is None else bias.to(x.dtype)
    elif x.dtype != weight.dtype:
        raise RuntimeError(f"linear: expected x in {weight.dtype}, the weight's, got {x.dtype}")
    rows, (N, K) = x.reshape(-1, x.shape[-1]), weight.record.shape
    if x.shape[-1] != K:
        raise RuntimeError(f"linear: expected x [..., {K}], got {tuple(x.shape)}")
    y: Tensor = ops.lora_linear_quantized(
        rows, weight.record.parts, weight.record.form, None, None, bias, 1.0, 0.0, None, False
    )[0]
    return y.view(*x.shape[:-1], N)


def _same(tensor: QuantizedTensor, *_: Any, **__: Any) -> QuantizedTensor:
    return tensor._with(tensor.record)


def _clone(tensor: QuantizedTensor, *_: Any, **__: Any) -> QuantizedTensor:
    record = tensor.record
    return tensor._with(assemble(record.form, [part.clone() for part in record.parts]))


def _empty_like(tensor: QuantizedTensor, *_: Any, **options: Any) -> Any:
    if options.get("dtype") or options.get("device"):
        tensor = _to_copy(tensor, **options)
    record = tensor.record
    return tensor._with(assemble(record.form, [torch.empty_like(part) for part in record.parts]))


def _to_copy(
    tensor: QuantizedTensor, *, dtype: Any = None, device: Any = None, **_: Any
) -> QuantizedTensor:
    if dtype is not None and not dtype.is_floating_point:
        raise NotImplementedError(f"a QuantizedTensor in {dtype}: expected a floating dtype")
    moved = _clone(tensor) if device is None else tensor._with(tensor.record.to(device))
    return moved._with(moved.record, dtype)


def _t(tensor: QuantizedTensor) -> QuantizedTensor:
    return QuantizedTensor(tensor.record, tensor.dtype, not tensor.transposed)


def _copy_(tensor: QuantizedTensor, other: Any, non_blocking: bool = False) -> QuantizedTensor:
    """From one of the same form."""
    form = tensor.record.form
    if not isinstance(other, QuantizedTensor) or other.record.form != form:
        got = other.record.form if isinstance(other, QuantizedTensor) else type(other).__name__
        raise NotImplementedError(f"copying into a QuantizedTensor {form!r}: got {got!r}")
    for mine, theirs in zip(tensor.record.parts, other.record.parts, strict=True):
        mine.copy_(theirs)
    return tensor


_HANDLERS: dict[Any, _Handler] = {
    _aten.detach.default: _same,
    _aten.alias.default: _same,
    _aten.clone.default: _clone,
    _aten.empty_like.default: _empty_like,
    _aten._to_copy.default: _to_copy,
    _aten.t.default: _t,
    _aten.copy_.default: _copy_,
}
