"""One forward of the model, from the same state each time; the model is afterwards as before."""

import contextlib
import copy
import dataclasses
import random
import sys
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.adapters import Before
from lora_kernels.check.found import Adapter, Call

_FUNCTION = torch.autograd.function.__file__


def run(
    model: nn.Module,
    inputs: tuple[Any, ...],
    kwargs: dict[str, Any],
    rewind: Callable[..., Any],
    adapters: list[Adapter],
    evaluate: bool = False,
    change: Callable[..., Any] | None = None,
) -> Any:
    rewind()
    if evaluate:
        model.eval()
    if change is not None:
        change()
    _count_calls(adapters)
    return model(*_containers(inputs), **_containers(kwargs))


def _containers(value: Any) -> Any:
    """New lists and dictionaries of the same contents, for a forward that takes things out."""
    if isinstance(value, MutableMapping):
        value = copy.copy(value)
        for key in list(value):
            value[key] = _containers(value[key])
    elif type(value) in (list, tuple):
        value = type(value)(map(_containers, value))
    return value


@contextlib.contextmanager
def unchanged(model: nn.Module, *inputs: Any) -> Iterator[Callable[[], None]]:
    """Restores attributes, buffers, inputs, gradients and random states; gives what rewinds all
    but the gradients, so that every forward starts from the same."""
    before = Before(model)
    given = (tensor for tensor in _tensors(inputs) if not tensor.requires_grad)
    values = [(t, t.detach().clone()) for t in dict.fromkeys((*model.buffers(), *given))]
    leaves = dict.fromkeys((*model.parameters(), *(t for t in _tensors(inputs) if t.is_leaf)))
    gradients = [(leaf, leaf.grad) for leaf in leaves]
    hooks = [leaf._post_accumulate_grad_hooks or {} for leaf in leaves]
    stepping = [(hook, dict(hook)) for hook in hooks]  # optimizers that step within the backward
    generators = random.getstate(), torch.get_rng_state()
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        drawn = numpy.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None

    @torch.no_grad()
    def rewind() -> None:
        before.restore()
        for tensor, value in values:
            if tensor.shape != value.shape:  # observers of torch.ao resize their buffers
                tensor.resize_(value.shape)
            if not torch.equal(tensor, value):
                tensor.copy_(value)
        random.setstate(generators[0])
        torch.set_rng_state(generators[1])
        if numpy is not None:
            numpy.random.set_state(drawn)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)

    for leaf, _ in gradients:
        leaf.grad = None
    for now, _ in stepping:
        now.clear()
    try:
        yield rewind
    finally:
        rewind()
        for leaf, gradient in gradients:
            leaf.grad = gradient
        for now, held in stepping:
            now.update(held)


def _count_calls(adapters: list[Adapter]) -> None:
    """Notes the calls of every layer. The forward is wrapped, since a hook would change the way of
    modules that look for hooks (torch's encoder layers). `rewind` takes it off."""
    for layer in dict.fromkeys(adapter.layer for adapter in adapters):
        mine = [adapter for adapter in adapters if adapter.layer is layer]
        for adapter in mine:
            adapter.calls.clear()
        vars(layer)["forward"] = partial(_count, layer.forward, mine)


def _count(forward: Callable[..., Any], adapters: list[Adapter], *args: Any, **kwargs: Any) -> Any:
    rows = sum(t.numel() for t in _tensors((args, kwargs)))
    call = Call(rows, torch.is_grad_enabled(), not torch.is_grad_enabled() and _in_function())
    for adapter in adapters:
        adapter.calls.append(call)
    return forward(*args, **kwargs)


def _in_function() -> bool:
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename == _FUNCTION:
            return True
        frame = frame.f_back
    return False


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in an output or input: mappings, sequences, dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _tensors(one)
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from _tensors(one)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for one in dataclasses.fields(value):
            yield from _tensors(getattr(value, one.name))


def floating(output: Any) -> list[Tensor]:
    tensors = (torch.view_as_real(t) if t.is_complex() else t for t in _tensors(output))
    return [tensor for tensor in tensors if tensor.is_floating_point()]
