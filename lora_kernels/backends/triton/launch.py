"""The one place that launches.

Every launch goes through `launch`, so that the code-generation check can compile exactly what a
call would launch, and a test can count which kernels touch which array.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from lora_kernels.backends.device import Target

Kernel = Any  # Triton's kernels, compiled or interpreted, have no type of their own
Arguments = tuple[Any, ...]
Intercept = Callable[[Kernel, tuple[int, ...], Arguments, dict[str, Any], Callable[[], None]], None]
_intercept: Intercept | None = None


@triton.jit
def _probe() -> None:
    pass


INTERPRETED = not isinstance(_probe, triton.JITFunction)


@contextmanager
def intercept(function: Intercept) -> Iterator[None]:
    """Call function(kernel, grid, args, meta, run) in place of every launch; run() launches."""
    global _intercept
    before, _intercept = _intercept, function
    try:
        yield
    finally:
        _intercept = before


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


@cache
def _unspecialised(kernel: Kernel) -> frozenset[int]:
    return frozenset(i for i, p in enumerate(kernel.params) if p.do_not_specialize)


def _key(kernel: Kernel, args: Arguments, meta: dict[str, Any]) -> tuple[Any, ...]:
    """Everything that the compiled code depends on: what Triton specialises on, and for integers
    more than that, their values. Alignment counts in 16 bytes, width in 31 bits."""
    key = [kernel]
    free = _unspecialised(kernel)
    for index, arg in enumerate(args):
        kind = type(arg)
        if kind is int:
            key.append(arg.bit_length() > 31 if index in free else arg)
        elif arg is None or kind is float:
            key.append(kind)
        else:
            key.append(arg.dtype)
            key.append(arg.data_ptr() % 16)
    return (*key, *meta.items())


_hooks = triton.knobs.runtime


def _is_watched(kernel: Kernel) -> bool:
    """Whether somebody, a profiler say, wants to be told of launches."""
    enter, leave = _hooks.launch_enter_hook, _hooks.launch_exit_hook
    calls = getattr(enter, "calls", enter), getattr(leave, "calls", leave)  # chains, None, or one
    return bool(calls[0] or calls[1] or kernel.pre_run_hooks)


# By device and key: the compiled kernel, and the constants that end its list of arguments.
_compiled: dict[tuple[Any, ...], tuple[Any, ...]] = {}
_MOST_COMPILED = 4096


def _start(kernel: Kernel, grid: tuple[int, ...], args: Arguments, meta: dict[str, Any]) -> None:
    """kernel[grid](*args, **meta), without the several microseconds that Triton takes to find the
    compiled kernel, from the second time on."""
    if _is_watched(kernel):
        kernel[grid](*args, **meta)
        return
    driver = triton.runtime.driver.active
    device = driver.get_current_device()
    key = (device, _key(kernel, args, meta))
    found = _compiled.get(key)
    if found is None:
        constants = tuple(meta[name] for name in kernel.arg_names[len(args) :])
        if len(_compiled) >= _MOST_COMPILED:
            _compiled.clear()
        _compiled[key] = kernel[grid](*args, **meta), constants
        return
    compiled, constants = found
    x, y, z = (*grid, 1, 1)[:3]
    stream = driver.get_current_stream(device)
    compiled.run(
        x, y, z, stream, compiled.function, compiled.packed_metadata, None, None, None,
        *args, *constants,
    )  # fmt: skip


def _with_scratch(
    kernel: Kernel, grid: tuple[int, ...], args: Arguments, meta: dict[str, Any]
) -> None:
    triton.set_allocator(_scratch)
    _start(kernel, grid, args, meta)


def launch(
    kernel: Kernel, grid: tuple[int, ...], *args: Any, descriptors: bool = False, **meta: Any
) -> None:
    """kernel[grid](*args, **meta). `descriptors`: the kernel builds TMA descriptors in scratch.

    Triton takes that scratch from an allocator in a context variable, which autograd's threads do
    not inherit. It is set here for the duration of the launch, in a copied context, and comes from
    torch's allocator: a CUDA graph keeps it, and an allocator set by the user is left alone.
    """

    def run() -> None:
        if INTERPRETED:
            kernel[grid](*args, **meta)
        elif descriptors:
            copy_context().run(_with_scratch, kernel, grid, args, meta)
        else:
            _start(kernel, grid, args, meta)

    if _intercept is None:
        run()
    else:
        _intercept(kernel, grid, args, meta, run)


def overlaps(device: Target) -> bool:
    """Whether a kernel can be launched while the one before it runs (programmatic dependence)."""
    return device.has_wide_tiles and not INTERPRETED


def fp32_precision() -> str:
    """Input precision of fp32 products: tf32 only where torch itself may use it."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
