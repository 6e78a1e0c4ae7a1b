"""A step that copies of optimizer and scheduler make without gradient, to see how it ends."""

import copy
import math
import warnings
from typing import Any

import torch

from lora_kernels.recipes.stepping import is_plateau, needs_closure


def state_after_a_step(
    optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]]
) -> dict[int, Any]:
    """What the optimizer holds for each parameter once it has made its first step with the options
    of `groups`; nothing where a copy cannot."""
    if needs_closure(optimizer):
        return {}
    try:
        twin = copy.deepcopy(optimizer)
        twin.load_state_dict({"state": {}, "param_groups": groups})
        _step(twin)
        state: dict[int, Any] = twin.state_dict()["state"]
        return state
    except Exception:  # of an optimizer that is not torch's, with needs of its own
        return {}


def step_problem(optimizer: torch.optim.Optimizer, scheduler: Any) -> str | None:
    """Why optimizer and scheduler, as they are, cannot make a step and begin another; None where
    they can, or where the optimizer evaluates the loss itself."""
    if needs_closure(optimizer):
        return None
    try:
        twin, follower = copy.deepcopy((optimizer, scheduler))
        _step(twin)
        if follower is not None:
            with warnings.catch_warnings():
                # The copy's step is not the method that the scheduler counts the calls of.
                warnings.simplefilter("ignore")
                follower.step(*([0.0] if is_plateau(follower) else []))
        _step(twin)
        rates = [float(group["lr"]) for group in twin.param_groups]
    except Exception as error:
        return f"optimizer and scheduler cannot make a step ({type(error).__name__}: {error})"
    if not all(map(math.isfinite, rates)):
        return f"scheduler: makes the learning rates {rates}"
    if not all(p.isfinite().all() for group in twin.param_groups for p in group["params"]):
        return "optimizer: its state makes parameters inf or nan"
    return None


@torch.no_grad()
def _step(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
