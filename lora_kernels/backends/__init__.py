"""Who computes. A backend is a module with the three functions of `lora_kernels.branch` and two
words of its own: `refusal`, why it cannot serve a call, and `leaves`, why ATen's calls are better.

`choose` names the backend of a device and the reason, which `python -m lora_kernels doctor` prints;
`serving` the one of a call. The logger "lora_kernels" says both once, at INFO.
"""

import logging
from contextlib import AbstractContextManager
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels import _env
from lora_kernels.backends import cuda, forced, native, reference
from lora_kernels.backends.cuda import needs, tables
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


def use_backend(name: str | None) -> AbstractContextManager[None]:
    """A context that forces one backend for every op, as LORA_KERNELS_BACKEND names them; None
    forces nothing. A call that it cannot serve raises RuntimeError, another name ValueError.

    Stronger than the environment and a context around it. Holds for the whole process, because
    backward runs in threads of its own; not for use from several threads at a time.
    """
    if name is None:
        return forced.held(None)
    if name not in _env.BACKENDS:
        raise ValueError(f"name: got {name!r}, legal values are {', '.join(_env.BACKENDS)}")
    return forced.held(forced.Force(f"use_backend({name!r})", name))


def choose(device: torch.device | str) -> Choice:
    """The backend of the calls on a device. Raises RuntimeError if the forced one is not there."""
    device = torch.device(device) if isinstance(device, str) else device
    kind = device.type
    force = forced.now
    if force is not None:
        return _forced(kind, force.backend, force.demand)
    if kind == "cuda" and tables.has_tables():
        return _tuned(torch.cuda.current_device() if device.index is None else device.index)
    return _cpu() if kind == "cpu" else _REFERENCE


@cache
def _cpu() -> Choice:
    """The compiled kernels where they are there."""
    if not extension.available():
        return _REFERENCE
    return Choice("native", native, extension.status())


@cache
def _tuned(index: int) -> Choice:
    """Plans where a table lists those that ran on this GPU, the reference everywhere else."""
    if tables.tuned(index) is None:
        return Choice("reference", reference, "no tuned table for this GPU")
    absent = needs.why_no_triton()
    return Choice("cuda", cuda, "tuned table of this GPU" + (f"; {absent}" if absent else ""))


@cache
def _forced(kind: str, backend: str, demand: str) -> Choice:
    reason = f"forced by {demand}"
    if backend == "reference":
        return Choice("reference", reference, reason, demand)
    if backend == "native":
        why = _why_not_native(kind)
        if why is not None:
            raise RuntimeError(f"{demand}: {why}; force none or the reference")
        return Choice("native", native, reason, demand)
    why = _why_not_planned(kind)
    if why is not None:
        raise RuntimeError(f"{demand}: {why}")
    return Choice("cuda", cuda, reason, demand)


def _why_not_native(kind: str) -> str | None:
    if kind != "cpu":
        return f"it has no kernels for {kind} tensors"
    if not extension.available():
        return f"the compiled extension is not there: {extension.status()}"
    return None


def _why_not_planned(kind: str) -> str | None:
    """On CUDA tensors every plan says for itself what it lacks."""
    if kind == "cuda":
        return None
    absent = needs.why_no_triton()
    if absent is None and (kind != "cpu" or not needs.interpreted()):
        return (
            "Triton kernels run on CUDA tensors, or on CPU tensors with TRITON_INTERPRET=1 set"
            f" before triton is imported; got {kind} tensors"
        )
    return absent
