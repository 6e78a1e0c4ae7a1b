"""Several adapters of a model: which are in use, and which rows of a batch have which."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from typing import Any

import torch.utils.checkpoint
from torch import nn

from lora_kernels import adapters, names
from lora_kernels._dispatch import in_backward
from lora_kernels.bypass import update_fast_paths
from lora_kernels.convert import refuse, remove_lora
from lora_kernels.grouped import Groups
from lora_kernels.nn import OfRows, Rows
from lora_kernels.nn.tensors import frozen_by_adapter, note_frozen


def set_adapter(model: nn.Module, name: str | Sequence[str] | None) -> None:
    """Puts one adapter of a model to use, or several, which add up, or by None none: the model then
    computes what its base does.

    Which parameters require a gradient stays as it is; those of adapters that are not in use get
    none.

    Raises:
        ValueError: a name that no adapter has; it lists those that there are.
        RuntimeError: a layer is merged. The model is unchanged then.
    """
    wanted = [name] if isinstance(name, str) else [] if name is None else [*name]
    for one in wanted:
        adapters.require_name(model, one)
    if len(set(wanted)) != len(wanted):
        raise ValueError(f"name: got {wanted}, each adapter can be in use once")
    layers = [layer for _, layer in adapters.require_layers(model)]
    before = [layer.active for layer in layers]
    try:
        for layer in layers:
            layer.activate(wanted)
    except BaseException:
        for layer, active in zip(layers, before, strict=True):
            layer.activate(active)
        raise


def delete_adapter(model: nn.Module, name: str) -> None:
    """Takes an adapter out of a model. Layers that have no other become plain ones, frozen until
    `remove_lora`; with the last adapter of the model that is done too.

    Where it was a layer's first, whose parameters are `lora_A` and `lora_B`, the next becomes that:
    parameters stay the same objects, their names in a state dict change.

    Raises:
        ValueError: no adapter has this name; a layer is merged; a batch within `adapter_rows` has
            rows of the adapter. The model is unchanged then.
    """
    adapters.require_name(model, name)
    having = {n: layer for n, (layer, _) in adapters.adapters_of(model, name).items()}
    refuse("delete_adapter", {n: layer.why_undeletable(name) for n, layer in having.items()})
    if adapters.adapter_names(model) == (name,):
        return remove_lora(model)
    alone = {n: layer for n, layer in having.items() if layer.names == (name,)}
    refuse("delete_adapter", {n: layer.why_stuck() for n, layer in alone.items()})
    for n, layer in having.items():
        if n in alone:
            holder = layer.holder  # the layer, which is a plain one then, or its experts
            frozen = frozen_by_adapter(holder)
            layer.move_out()
            for parameter in frozen:  # while other layers have adapters
                holder.get_parameter(parameter).requires_grad_(False)
            note_frozen(holder, frozen)
        else:
            layer.delete(name)
    update_fast_paths(model)


@contextlib.contextmanager
def adapter_rows(
    model: nn.Module, rows: Sequence[str | None] | Groups, table: Sequence[str] | None = None
) -> Iterator[nn.Module]:
    """Within it the rows of a batch have adapters of their own, whichever are in use otherwise.

        with adapter_rows(model, ["ann", None, "bob"]):
            model(batch_of_three)

    In inference, generation and training: each layer is one call of `lora_linear_grouped`, to which
    the rows are arguments. Backwards may come in any order and after the context has ended;
    `torch.utils.checkpoint` computes a forward again with the rows it first had.

    The layers are this library's, or PEFT's after `fuse_peft`, whose adapters train if their
    parameters require a gradient (`set_requires_grad` of PEFT).

    Args:
        rows: the adapter of each sample, None for none; a layer's x is [samples, ..., K] or has the
            rows of each sample one after the other. Samples that generation repeats (beams) keep
            their adapter. Or `Groups` of the rows of every layer in any order: tokens that are
            routed or sorted.
        table: the names of adapters in the order of the numbers of `Groups`; by default those of
            the model in the order of `adapter_names`.

    Raises:
        ValueError: a name that no adapter has; a layer that is merged, or was started with PiSSA
            or OLoRA, whose weight is not the base; in a forward, rows that do not fit, or adapters
            of one batch with different dropout. TypeError: `rows` is neither.
    """
    layers = _layers(model)
    known = tuple(dict.fromkeys(name for layer in layers.values() for name in layer.names))
    if isinstance(rows, str) or not isinstance(rows, (Sequence, Groups)):
        raise TypeError(
            f"rows: expected the name of each sample's adapter or Groups, got {type(rows).__name__}"
        )
    if table is not None and not isinstance(rows, Groups):
        raise ValueError("table: is of Groups; names say themselves which adapters they mean")
    for name in table or ():
        if name not in known:
            there = ", ".join(map(repr, known)) or "none"
            raise ValueError(f"table: got {name!r}, the model's adapters are {there}")
    if not isinstance(rows, Groups) and not rows:
        raise ValueError("rows: got no name, expected one of each sample")
    refuse("adapter_rows", {name: layer.why_no_rows() for name, layer in layers.items()})
    parameters = (p for layer in layers.values() for p in layer.parameters())
    device = next(parameters, torch.empty(0)).device
    acting = Rows(rows, known if table is None else table, device)
    with _acting(dict.fromkeys(layers.values(), acting)):
        yield model


def _layers(model: nn.Module) -> dict[str, "_Layer"]:
    """Those that compute rows of several adapters. ValueError for parts of PEFT that do not."""
    found: dict[str, _Layer] = {}
    inside: set[nn.Module] = set()
    for name, module in names.named_modules(model):
        if isinstance(module, OfRows):
            found[name] = module  # type: ignore[assignment]  # mixed into a module
            inside.update(module.modules())
        elif module not in inside and any(hasattr(module, held) for held in _HOLDING):
            kinds = [kind.__module__ for kind in type(module).__mro__]
            if any(kind.startswith("peft.") for kind in kinds):
                raise ValueError(
                    f"model: {name} is {type(module).__name__} of PEFT, which cannot have rows of"
                    " several adapters; fuse_peft(model) takes over linear layers"
                )
    return found


# Where PEFT's layers have what they stand for.
_HOLDING = ("base_layer", "original_module")


class _Layer(OfRows, nn.Module):
    """What `OfRows` is mixed into."""


_Held = dict[_Layer, Rows | None]


@contextlib.contextmanager
def _acting(held: _Held) -> Iterator[None]:
    """Layers have these rows. What torch.utils.checkpoint is given has them again, in a backward
    that may come later."""
    with _lock:
        if not _contexts:
            _patch()
        _contexts.append(held)
    before = [(layer, layer._rows) for layer in held]
    for layer, rows in held.items():
        layer._rows = rows
    try:
        yield
    finally:
        for layer, former in before:
            layer._rows = former
            if former is None:
                del layer._rows  # as the class has it
        with _lock:
            _contexts[:] = [other for other in _contexts if other is not held]
            if not _contexts:
                _unpatch()


# The contexts that last, of all threads: as long as there are any, checkpointing is changed.
_contexts: list[_Held] = []
_lock = threading.Lock()


def _bound(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, computed again with the rows that its layers have now."""
    layers = dict.fromkeys(layer for held in _contexts for layer in held)
    held: _Held = {layer: layer.rows_now() for layer in layers}

    @wraps(function, updated=())
    def bound(*args: Any, **kwargs: Any) -> Any:
        if not in_backward():  # the forward itself
            return function(*args, **kwargs)
        again = {layer: None if rows is None else rows.recomputed() for layer, rows in held.items()}
        with _acting(again):
            return function(*args, **kwargs)

    return bound


# Where both kinds of checkpointing, by whatever name `checkpoint` was imported, get the function.
_PLACES = ("CheckpointFunction", "_checkpoint_without_reentrant_generator")
_originals: dict[str, Any] = {}


def _patch() -> None:
    module = torch.utils.checkpoint
    _originals.update({name: getattr(module, name) for name in _PLACES})
    reentrant, other = _originals.values()

    def apply(function: Callable[..., Any], *args: Any) -> Any:
        return reentrant.apply(_bound(function), *args)

    def generator(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return other(_bound(function), *args, **kwargs)

    kind = type(reentrant.__name__, (reentrant,), {"apply": staticmethod(apply)})
    for name, changed in zip(_PLACES, (kind, generator), strict=True):
        setattr(module, name, changed)


def _unpatch() -> None:
    for name, original in _originals.items():
        setattr(torch.utils.checkpoint, name, original)
    _originals.clear()
