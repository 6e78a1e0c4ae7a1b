"""What kinds of optimizers and schedulers want at a step, and which cannot be served."""

import inspect
from typing import Any

import torch


def needs_closure(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its step evaluates the loss itself, perhaps often, as LBFGS does."""
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def is_plateau(scheduler: Any) -> bool:
    """Whether its step takes a loss."""
    return isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)


def check_closure(
    optimizer: torch.optim.Optimizer,
    autocast_dtype: torch.dtype | None,
    max_grad_norm: float | None,
) -> None:
    """Refuses what an optimizer that evaluates the loss itself cannot be given."""
    if not needs_closure(optimizer):
        return
    name = type(optimizer).__name__
    if autocast_dtype == torch.float16:
        raise ValueError(
            f"autocast_dtype: torch.float16 scales losses (GradScaler), which {name} cannot use, as"
            " it evaluates them itself; take torch.bfloat16 or None"
        )
    if max_grad_norm is not None:
        raise ValueError(
            f"max_grad_norm: a clipped gradient is not the one of the loss that {name} searches"
            " along; leave it None"
        )


def check_scheduler(scheduler: Any, optimizer: torch.optim.Optimizer) -> None:
    if scheduler is None:
        return
    name = type(scheduler).__name__
    step = getattr(scheduler, "step", None)
    if not callable(step):
        raise TypeError(f"scheduler: expected one with a method step, got {name}")
    if is_plateau(scheduler):
        if scheduler.mode != "min":
            raise ValueError(
                f"scheduler: ReduceLROnPlateau is given losses, which its mode={scheduler.mode!r}"
                " would want to grow; make it with mode='min'"
            )
    else:
        try:
            inspect.signature(step).bind()
        except TypeError:
            raise TypeError(
                f"scheduler: {name}.step{inspect.signature(step)} cannot be called without"
                " arguments; legal are schedulers whose step takes none, and ReduceLROnPlateau"
            ) from None
    own = getattr(scheduler, "optimizer", optimizer)
    if own.param_groups is not optimizer.param_groups:
        raise ValueError(f"scheduler: {name} was made for another optimizer than the one given")
