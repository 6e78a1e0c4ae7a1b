"""Who computes. A backend is a module with the functions of `reference`; it knows nothing of
autograd.

`choose` names the backend of a call and the reason, which `python -m lora_kernels doctor` prints.
"""

from types import ModuleType
from typing import NamedTuple

from lora_kernels import _env
from lora_kernels.backends import reference


class Choice(NamedTuple):
    name: str
    module: ModuleType
    reason: str


_REFERENCE = Choice("reference", reference, "ATen composite, the default of every device")
_FORCED_REFERENCE = Choice("reference", reference, "forced by LORA_KERNELS_BACKEND")


def extension_status() -> str:
    """Whether the compiled extension is there."""
    return "not part of this version"


def choose(device_type: str) -> Choice:
    """The backend of the calls on a device. Raises RuntimeError if the forced one is not there."""
    if _env.BACKEND is None:
        return _REFERENCE
    if _env.BACKEND == "reference":
        return _FORCED_REFERENCE
    raise RuntimeError(
        f"LORA_KERNELS_BACKEND={_env.BACKEND}: this version has no {_env.BACKEND} kernels for"
        f" {device_type}; unset the variable or set it to reference"
    )
