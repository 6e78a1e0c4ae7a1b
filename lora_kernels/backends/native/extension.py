"""The compiled extension: where it is, whether it loads, and the private ops it implements.

Nothing is loaded at import; `status` says why the extension is not there.
"""

from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

_SCHEMAS = (
    "_cpu_isa() -> int",
    "_shrink_cpu(Tensor rows, Tensor? matrix, Tensor? low, float scale, float gradient_scale,"
    " int threshold, Tensor? seed, int isa, Tensor(a!)? shrunk, Tensor(b!)? gradient) -> ()",
    "_expand_cpu(Tensor low, Tensor matrix, Tensor? bias, float scale, int threshold,"
    " Tensor? seed, bool accumulate, int isa, Tensor(a!) out) -> ()",
)
ISA_NAMES = ("plain C++", "AVX2", "AVX-512")


def _file() -> Path | None:
    package = Path(__file__).parents[2]
    names = (package / f"_native_cpu{suffix}" for suffix in EXTENSION_SUFFIXES)
    return next((path for path in names if path.exists()), None)


@cache
def _load() -> tuple[torch.library.Library | None, str]:
    """(what keeps the schemas registered, None where there is no extension; why)."""
    path = _file()
    if path is None:
        return None, "not built (no C++ compiler at install?)"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return None, f"{path.name} does not load: {error}"
    library = torch.library.Library("lora_kernels", "FRAGMENT")
    for schema in _SCHEMAS:
        library.define(schema)
    return library, f"CPU kernels, {ISA_NAMES[torch.ops.lora_kernels._cpu_isa()]}"


def available() -> bool:
    return _load()[0] is not None


def status() -> str:
    """What was built and will run here, or why it is not there."""
    return _load()[1]


@cache
def best_isa() -> int:
    """Index in ISA_NAMES of the newest instruction set of both the extension and this CPU."""
    return torch.ops.lora_kernels._cpu_isa()
