"""Taking back what was done to a model in training, with its optimizer and scheduler."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.adapters import lora_layers


def moving_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What training changes in a model: trained parameters and persistent buffers, by name."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    persistent = model.state_dict(keep_vars=True)
    buffers = {name: b for name, b in model.named_buffers() if name in persistent}
    return trained | buffers


class Undo:
    """Makes model, optimizer and scheduler again what they were when it was made.

    A context manager: any exception undoes what was done within. Called, it does so without one.
    Undoing takes no memory on the device. `weights` are tensors to keep besides those that training
    changes.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: Any = None,
        weights: Iterable[Tensor] = (),
    ) -> None:
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.adapters = [
            (layer, {name: getattr(layer, name) for name in (*layer.adapter_names(), "alpha")})
            for _, layer in lora_layers(model)
        ]
        self.grads = [(parameter, parameter.grad) for parameter in model.parameters()]
        self.modes = [(module, module.training) for module in model.modules()]
        self.groups = [dict(group, params=group["params"][:]) for group in optimizer.param_groups]
        moving = {p for group in self.groups for p in group["params"] if p.requires_grad}
        moving.update(moving_tensors(model).values(), weights)
        self.values = [(tensor.detach(), tensor.detach().clone()) for tensor in moving]
        self.state = {p: copy.deepcopy(state) for p, state in optimizer.state.items()}
        self.scheduler_state = None if scheduler is None else copy.deepcopy(scheduler.state_dict())

    def __enter__(self) -> "Undo":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self()

    @torch.no_grad()
    def __call__(self) -> None:
        for layer, held in self.adapters:
            for name, value in held.items():
                setattr(layer, name, value)
        for tensor, value in self.values:
            tensor.copy_(value)
        for module, training in self.modes:
            module.training = training
        for group, before in zip(self.optimizer.param_groups, self.groups, strict=True):
            group.clear()
            group.update(before)
        self.optimizer.state.clear()
        self.optimizer.state.update(self.state)
        if self.scheduler is not None:
            self.scheduler.load_state_dict(copy.deepcopy(self.scheduler_state))
        for parameter, grad in self.grads:
            parameter.grad = grad
