"""A model's base as a module of its own, for trainers that ask for a reference model."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lora_kernels import adapters
from lora_kernels.convert import disable_adapters


class _Reference(nn.Module):
    """What is put before the model's class: its calls compute the base, its parts are the model's,
    whose mode and flags it leaves alone."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad(), disable_adapters(self), _evaluating(self):
            return super().__call__(*args, **kwargs)

    def train(self, mode: bool = True) -> "_Reference":
        return self

    def requires_grad_(self, requires_grad: bool = True) -> "_Reference":
        return self


def reference_model(model: nn.Module) -> nn.Module:
    """The base of a model with adapters, in no memory of its own.

        DPOTrainer(model, ref_model=reference_model(model), ...)

    The result is an instance of the model's class that holds the model's own parts. A call of it
    computes, without gradients and in evaluation mode, what `disable_adapters` does, at the time of
    the call: adapters and `modules_to_save` may have been trained since. It cannot be pickled, and
    a trainer that shards it shards the model.

    Raises:
        ValueError: the model has no adapters.
    """
    adapters.require_layers(model)
    reference = copy.copy(model)
    kind = type(model)
    reference.__class__ = type(kind.__name__, (_Reference, kind), {"__module__": kind.__module__})
    return reference


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
