"""Who computes. A backend is a module with the functions of `reference`; it knows nothing of
autograd.

`choose` names the backend of a call and the reason, which `python -m lora_kernels doctor` prints.
"""

from functools import cache
from importlib import import_module
from types import ModuleType
from typing import NamedTuple

import torch

from lora_kernels import _env
from lora_kernels.backends import native, plans, reference
from lora_kernels.backends.native import extension


class Choice(NamedTuple):
    name: str
    module: ModuleType
    reason: str


_REFERENCE = Choice("reference", reference, "ATen composite, the default of every device")
_FORCED_REFERENCE = Choice("reference", reference, "forced by LORA_KERNELS_BACKEND")


def extension_status() -> dict[str, str]:
    """Whether the parts of the compiled extension are there."""
    return {"CPU": extension.status(), "CUDA": extension.cuda_status()}


def choose(device_type: str) -> Choice:
    """The backend of the calls on a device. Raises RuntimeError if the forced one is not there."""
    demand = plans.forced()
    if _env.BACKEND is None and demand is None:
        if device_type == "cuda" and plans.has_tables():
            return _tuned(torch.cuda.current_device())
        return _cpu() if device_type == "cpu" else _REFERENCE
    if demand is not None:
        return _forced_triton(device_type, demand[0])
    if _env.BACKEND == "reference":
        return _FORCED_REFERENCE
    if _env.BACKEND == "triton":
        return _forced_triton(device_type, "LORA_KERNELS_BACKEND=triton")
    return _forced_native(device_type)


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
        return Choice("native", native, "forced by LORA_KERNELS_BACKEND")
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
    return Choice("triton", module, f"forced by {demand}")
