"""Whether every adapter trains: one forward and backward."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.check.found import Adapter, Call, nonzero
from lora_kernels.check.runs import floating


def check_training(adapters: list[Adapter], run: Callable[..., Any]) -> None:
    with torch.enable_grad():
        loss = _loss(run(adapters))
        if loss.requires_grad:
            loss.backward()
    finite = bool(loss.isfinite())
    for adapter in adapters:
        state, calls = adapter.state, adapter.calls
        state.calls = len(calls)
        of_A, of_B = state.grad_norm = _gradient_norm(adapter.A), _gradient_norm(adapter.B)
        if adapter.off is not None:
            state.problem = _OFF[adapter.off]
        elif not calls:
            state.problem = "never called"  # `name_uncalled` looks for the reason
        elif not any(call.rows for call in calls):
            state.problem = "received no rows in this batch (an expert?); try another batch"
        elif not all(any(p.requires_grad for p in held) for held in _to_train(adapter)):
            state.problem = "is frozen: set requires_grad of lora_A and lora_B"
        elif adapter.scaling == 0:
            state.problem = "its scaling is 0; give it another alpha"
        elif of_B is None or (of_A is None and not adapter.freeze_a):
            state.problem = _no_gradient(calls)
        elif not all(math.isfinite(norm) for norm in (of_A or 0.0, of_B)):
            what = "" if finite else ", as the loss is"
            state.problem = f"its gradient is not finite{what}; look at the batch and the dtype"
        else:
            state.problem = _zero(adapter, of_A, of_B)


def _to_train(adapter: Adapter) -> list[list[nn.Parameter]]:
    return [adapter.B] if adapter.freeze_a else [adapter.A, adapter.B]


def _gradient_norm(parameters: list[nn.Parameter]) -> float | None:
    norms = [float(p.grad.norm()) for p in parameters if p.grad is not None]
    return math.hypot(*norms) if norms else None


def _no_gradient(calls: list[Call]) -> str:
    if any(call.grad for call in calls):
        return (
            "was called, but its output does not reach the loss: unused or detached; exclude the"
            " layer (exclude_modules) or use its output"
        )
    if any(call.function for call in calls):
        return (
            "runs in an autograd function (a reentrant activation checkpoint, a reversible layer)"
            " whose inputs need no gradient; use use_reentrant=False or"
            " model.enable_input_require_grads()"
        )
    return "is called under no_grad; exclude it, or call it with gradients enabled"


def _zero(adapter: Adapter, of_A: float | None, of_B: float) -> str | None:
    """A zero gradient that the other factor's being zero does not explain. A frozen A has none."""
    zero_A, zero_B = not nonzero(adapter.A), not nonzero(adapter.B)
    if zero_A and zero_B:
        return BOTH_ZERO
    if zero_A and adapter.freeze_a:
        return "lora_A is zero and frozen, so lora_B gets no gradient; initialise lora_A"
    dead = [
        name
        for name, norm, explained in (("lora_A", of_A, zero_B), ("lora_B", of_B, zero_A))
        if norm == 0 and not explained
    ]
    if not dead:
        return None
    return (
        f"the gradient of {' and '.join(dead)} is exactly zero: its input or its gradient is zero,"
        " or too small for the dtype"
    )


BOTH_ZERO = (
    "lora_A and lora_B are both zero, so neither gets a gradient; initialise lora_A (init='eva' by"
    " initialize_eva)"
)
UNCALLED = (
    "was never called in this batch: its part of the model is unused, an expert got no rows, or"
    " code takes its weight; try another batch or exclude it"
)
_OFF = {
    "merged": "is merged, so it cannot train; unmerge it (unmerge_lora, unmerge_adapter)",
    "unused": "is not in use; set_adapter puts it to use",
    "disabled": "is disabled; leave disable_adapters, or enable the adapters",
}


def name_uncalled(adapters: list[Adapter], past: dict[nn.Module, str]) -> None:
    for adapter in adapters:
        if adapter.state.problem == "never called":
            reason = past.get(adapter.layer) or past.get(adapter.base)
            adapter.state.problem = (
                f"was never called: {reason}; exclude it (exclude_modules)" if reason else UNCALLED
            )


def _loss(output: Any) -> Tensor:
    """The output's own loss, or a projection of everything floating in it."""
    own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(own, Tensor) and own.is_floating_point():
        return own.float().sum()
    generator, parts = torch.Generator().manual_seed(0), []
    for tensor in floating(output):
        weights = torch.randn(tensor.shape, generator=generator).to(tensor.device)
        parts.append((tensor.float() * weights).sum() / max(tensor.numel(), 1) ** 0.5)
    if not parts:
        raise ValueError(
            f"model: its output, {type(output).__name__}, holds no floating tensor to take a"
            " gradient of"
        )
    return torch.stack([part.to(parts[0].device) for part in parts]).sum()
