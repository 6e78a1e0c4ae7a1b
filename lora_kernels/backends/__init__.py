"""Who computes. A backend is a module with the three functions of `lora_kernels.branch` and two
words of its own: `refusal`, why it cannot serve a call, and `leaves`, why ATen's calls are better.

`choose` names the backend of a device and the reason, which `python -m lora_kernels doctor` prints;
`serving` the one of a call. The logger "lora_kernels" says both once, at INFO.
"""

import logging
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels import _env
from lora_kernels.backends import native, plans, reference
from lora_kernels.backends.native import extension
from lora_kernels.branch import Base, Branch

_logger = logging.getLogger("lora_kernels")


class Choice(NamedTuple):
    """demand is how it is forced, None where it is not."""

    name: str
    module: ModuleType
    reason: str
    demand: str | None = None


_REFERENCE = Choice("reference", reference, "ATen composite, the default of every device")
_FORCED_REFERENCE = Choice(
    "reference", reference, "forced by LORA_KERNELS_BACKEND", "LORA_KERNELS_BACKEND=reference"
)


def extension_status() -> dict[str, str]:
    """Whether the parts of the compiled extension are there."""
    return {"CPU": extension.status(), "CUDA": extension.cuda_status()}


def serving(base: Base, rows: Tensor, branch: Branch) -> ModuleType:
    """The backend of a call with these rows, x or dy: the chosen one, or the reference where that
    refuses the call or leaves it. Raises RuntimeError where one is forced that cannot serve it."""
    choice = choose(rows.device)
    module, reason = choice.module, None
    if module is not reference:
        reason = module.refusal(rows)
        if reason is not None and choice.demand is not None:
            raise RuntimeError(f"{choice.demand}: {reason}")
        reason = reason or module.leaves(base, rows, branch)
    if _logger.isEnabledFor(logging.INFO):
        _say(choice.name, choice.reason, rows.device.type, rows.dtype, reason)
    return module if reason is None else reference


@cache
def _say(name: str, why: str, device: str, dtype: torch.dtype, reason: str | None) -> None:
    served = name if reason is None else f"reference, left by {name}: {reason}"
    _logger.info("%s calls in %s: %s (%s)", device, dtype, served, why)


def choose(device: torch.device | str) -> Choice:
    """The backend of the calls on a device. Raises RuntimeError if the forced one is not there."""
    device = torch.device(device) if isinstance(device, str) else device
    kind = device.type
    demand = plans.forced()
    if _env.BACKEND is None and demand is None:
        if kind == "cuda" and plans.has_tables():
            return _tuned(torch.cuda.current_device() if device.index is None else device.index)
        return _cpu() if kind == "cpu" else _REFERENCE
    if demand is not None:
        return _forced_triton(kind, demand[0])
    if _env.BACKEND == "reference":
        return _FORCED_REFERENCE
    if _env.BACKEND == "triton":
        return _forced_triton(kind, "LORA_KERNELS_BACKEND=triton")
    return _forced_native(kind)


@cache
def _cpu() -> Choice:
    """The compiled kernels where they are there."""
    if not extension.available():
        return _REFERENCE
    return Choice("native", native, extension.status())


@cache
def _forced_native(device_type: str) -> Choice:
    if device_type != "cpu":
        why = f"it has no kernels for {device_type} tensors"
    elif not extension.available():
        why = f"the compiled extension is not there: {extension.status()}"
    else:
        demand = "LORA_KERNELS_BACKEND=native"
        return Choice("native", native, "forced by LORA_KERNELS_BACKEND", demand)
    raise RuntimeError(
        f"LORA_KERNELS_BACKEND=native: {why}; unset the variable or set it to reference"
    )


@cache
def _tuned(index: int) -> Choice:
    """Triton where a table lists plans that ran on this GPU, the reference everywhere else."""
    if plans.tuned(index) is None:
        return Choice("reference", reference, "no tuned table for this GPU")
    try:
        module = import_module("lora_kernels.backends.triton")
    except ImportError as error:
        return Choice("reference", reference, f"a tuned table, but triton does not import: {error}")
    return Choice("triton", module, "tuned table of this GPU")


@cache
def _forced_triton(device_type: str, demand: str) -> Choice:
    try:
        module = import_module("lora_kernels.backends.triton")
    except ImportError as error:
        raise RuntimeError(f"{demand}: triton does not import: {error}") from error
    if device_type != "cuda" and not (device_type == "cpu" and module.INTERPRETED):
        raise RuntimeError(
            f"{demand}: Triton kernels run on CUDA tensors, or on CPU tensors with"
            f" TRITON_INTERPRET=1 set before triton is imported; got {device_type} tensors"
        )
    return Choice("triton", module, f"forced by {demand}", demand)
