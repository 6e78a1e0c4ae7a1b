"""Who computes. A backend is a module, or any object, with the three functions of
`lora_kernels.branch` and four words of its own, as `Backend` lists them.

`choose` names the backend of a device and the reason, which `python -m lora_kernels doctor` prints;
`serving` the one of a call. The logger "lora_kernels" says both once, at INFO; that a GPU has no
tuned table, as a warning.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import AbstractContextManager
from functools import cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lora_kernels import _env
from lora_kernels.backends import cuda, forced, native, reference
from lora_kernels.backends.cuda import background, choice
from lora_kernels.backends.native import extension
from lora_kernels.backends.native.few_rows import FewRows
from lora_kernels.backends.reference import Gradients
from lora_kernels.branch import Base, Branch, Need

_logger = logging.getLogger("lora_kernels")


class Backend(Protocol):
    """What a module is that computes the op. rows are a call's x, or its dy.

    `refusal` and `leaves` send a call to the reference: the first what cannot be served, which
    raises where the backend is forced, the second what is better left to ATen.
    """

    def lacks(self, device: torch.device) -> str | None:
        """Why it can serve no call on a device; None if it can."""

    def default(self, device: torch.device) -> tuple[bool, str]:
        """Whether it is the default of a device where it lacks nothing, and why, or why not if
        that is worth a word."""

    def refusal(self, rows: Tensor) -> str | None: ...

    def leaves(self, base: Base, rows: Tensor, branch: Branch) -> str | None: ...

    def forward(
        self, base: Base, x: Tensor, branch: Branch, save_s: bool
    ) -> tuple[Tensor, Tensor | None]: ...

    def add_(self, base_out: Tensor, x: Tensor, branch: Branch) -> Tensor: ...

    def backward(
        self, base: Base, dy: Tensor, x: Tensor, s: Tensor, branch: Branch, need: Need
    ) -> Gradients: ...


class Choice(NamedTuple):
    """demand is how it is forced, None where it is not."""

    name: str
    module: Backend
    reason: str
    demand: str | None = None


BACKENDS: dict[str, Backend] = {}
# A name of a backend's kernels for the backend, of LORA_KERNELS_BACKEND and `use_backend`.
_ALIASES = {"triton": "cuda"}


def register(name: str, backend: Backend) -> None:
    """Makes a backend known: by name for `use_backend`, and where it says so as a device's default,
    before those registered earlier. Raises ValueError if the name is taken."""
    if name in _ALIASES or BACKENDS.setdefault(name, backend) is not backend:
        raise ValueError(f"name: {name!r} is taken")
    _forget_choices()


def known(name: str, where: str) -> str:
    """The name of a registered backend; ValueError lists the legal ones."""
    if name not in BACKENDS and name not in _ALIASES:
        raise ValueError(f"{where}: got {name!r}, legal values are {', '.join(names())}")
    return _ALIASES.get(name, name)


def names() -> list[str]:
    """By which backends can be forced."""
    return [*BACKENDS, *_ALIASES]


def extension_status() -> dict[str, str]:
    """Whether the parts of the compiled extension are there."""
    return {"CPU": extension.status(), "CUDA": extension.cuda_status()}


def serving(base: Base, rows: Tensor, branch: Branch) -> Backend:
    """The backend of a call with these rows, x or dy: the chosen one, or the reference where that
    refuses the call or leaves it. Raises RuntimeError where one is forced that cannot serve it."""
    choice = choose(rows.device)
    backend, reason = choice.module, None
    if backend is reference:
        if rows.is_cuda and choice.demand is None:
            background.hint(rows.device)
    else:
        reason = backend.refusal(rows)
        if reason is not None and choice.demand is not None:
            raise RuntimeError(f"{choice.demand}: {reason}")
        reason = reason or backend.leaves(base, rows, branch)
    if _logger.isEnabledFor(logging.INFO):
        _say(choice.name, choice.reason, rows.device.type, rows.dtype, reason)
    return backend if reason is None else reference


def few_rows() -> FewRows | None:
    """The calls for few rows on the CPU, where its default backend has such; None where one is
    forced, or the log wants to know who serves."""
    if forced.now is not None or _logger.isEnabledFor(logging.INFO):
        return None
    return _few_rows()


@cache
def _few_rows() -> FewRows | None:
    chosen = _default(torch.device("cpu")).module
    return native.few_rows.of_this_machine() if chosen is native else None


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
    return forced.held(forced.Force(f"use_backend({name!r})", known(name, "name")))


def choose(device: torch.device | str) -> Choice:
    """The backend of the calls on a device. Raises RuntimeError if the forced one is not there."""
    device = torch.device(device) if isinstance(device, str) else device
    force = forced.now
    if force is not None:
        return _forced(device, force.backend, force.demand)
    if device.type == "cuda":
        choice.watch()
    return _default(device)


def on_gpu(tensors: Iterable[Tensor]) -> str:
    """One line on what serves the calls of the first tensor on a GPU, and why; "" without one."""
    device = next((tensor.device for tensor in tensors if tensor.is_cuda), None)
    if device is None:
        return ""
    chosen = choose(device)
    return f"calls on the GPU: {chosen.name} ({chosen.reason})"


def forget() -> bool:
    """Has all choices made anew, of tables that have changed; what has been compiled keeps its
    plans. False once a CUDA graph was captured: then this process keeps what serves it."""
    if choice.is_frozen():
        return False
    choice.forget()
    _forget_choices()
    return True


def _forget_choices() -> None:
    _default.cache_clear()
    _few_rows.cache_clear()
    _forced.cache_clear()


@cache
def _default(device: torch.device) -> Choice:
    passed: list[str] = []
    for name, backend in reversed(BACKENDS.items()):
        chosen, reason = backend.default(device)
        if chosen and backend.lacks(device) is None:
            return Choice(name, backend, "; ".join([reason, *passed]))
        if not chosen and reason:
            passed.append(reason)
    raise AssertionError("the reference serves every device")


@cache
def _forced(device: torch.device, name: str, demand: str) -> Choice:
    name = known(name, demand)
    lacking = BACKENDS[name].lacks(device)
    if lacking is not None:
        raise RuntimeError(f"{demand}: {lacking}; force none or the reference")
    return Choice(name, BACKENDS[name], f"forced by {demand}", demand)


for _name, _backend in (("reference", reference), ("native", native), ("cuda", cuda)):
    register(_name, _backend)
if _env.BACKEND is not None:
    known(_env.BACKEND, "LORA_KERNELS_BACKEND")
