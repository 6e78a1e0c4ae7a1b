"""The compiled extension: where its parts are, whether they load, and the private ops in them.

Nothing is loaded at import, and the CUDA part only where there is a CUDA device. `status` and
`cuda_status` say why a part is not there.
"""

from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

_CODED = (  # a weight of few bits
    "Tensor codes, Tensor scale, Tensor? zero, Tensor? table, Tensor? outer_table,"
    " Tensor? outer_scale, Tensor? offset, float factor, int[] sizes"
)
_CPU_SCHEMAS = (
    "_cpu_isa() -> int",
    "_cpu_is_amd() -> bool",
    "_shrink_cpu(Tensor rows, Tensor? matrix, Tensor? low, float scale, float gradient_scale,"
    " int threshold, Tensor? seed, int isa, Tensor(a!)? shrunk, Tensor(b!)? gradient) -> ()",
    "_expand_cpu(Tensor low, Tensor matrix, Tensor? bias, float scale, int threshold,"
    " Tensor? seed, bool accumulate, int isa, Tensor(a!) out) -> ()",
    "_drop_cpu(Tensor rows, float scale, int threshold, Tensor? seed, int isa, Tensor(a!) out)"
    " -> ()",
    "_gate_cpu(Tensor g, Tensor u, Tensor? dh, int act, int isa, Tensor(a!)? h, Tensor(b!)? dg,"
    " Tensor(c!)? du) -> ()",
    "_linear_cpu(Tensor x, Tensor weight, Tensor? lora_a, Tensor? lora_b, Tensor? bias,"
    " float scale, float high, int threshold, Tensor? seed, int isa, Tensor(a!)? s,"
    " Tensor(b!)? into=None) -> Tensor",
    f"_linear_coded_cpu(Tensor x, {_CODED}, Tensor? lora_a, Tensor? lora_b, Tensor? bias,"
    " float scale, float high, int threshold, Tensor? seed, int isa, Tensor(a!)? s) -> Tensor",
    f"_decode_cpu({_CODED}, int row, int column, int isa, Tensor(a!) out) -> ()",
    "_linear_backward_cpu(Tensor dy, Tensor? x, Tensor weight, Tensor lora_a, Tensor lora_b,"
    " Tensor? s, float scaling, float high, float keep, int threshold, Tensor? seed, int isa,"
    " bool need_x, bool need_a, bool need_b, Tensor(a!)? into=None,"
    " bool adds=False) -> (Tensor, Tensor, Tensor)",
    "_linear_grouped_cpu(Tensor x, Tensor weight, Tensor[] lora_a, Tensor[] lora_b, Tensor? order,"
    " int[] bounds, Tensor? bias, float[] scaling, int isa) -> Tensor",
    "_cpu_packed(int isa) -> (int, int)",
    "_linear_packed_cpu(Tensor x, Tensor weight, Tensor[] lora_a, Tensor[] lora_b, Tensor? order,"
    " int[] bounds, Tensor? bias, float[] scale, float[] high, int isa, Tensor(a!)? s) -> Tensor",
    "_linear_packed_backward_cpu(Tensor dy, Tensor? x, Tensor weight, Tensor[] lora_a,"
    " Tensor[] lora_b, Tensor? s, Tensor? order, int[] bounds, float[] scaling, float[] high,"
    " int isa, bool need_x, bool[] need_a, bool[] need_b) -> (Tensor, Tensor[], Tensor[])",
    "_add_grouped_cpu(Tensor(a!) y, Tensor x, Tensor[] lora_a, Tensor[] lora_b, Tensor? order,"
    " int[] bounds, int most_rows, float[] scale, float[] high, int threshold, Tensor? seeds,"
    " int isa, Tensor(b!)? s) -> ()",
    "_backward_grouped_cpu(Tensor(a!)? dx, Tensor dy, Tensor? x, Tensor[] lora_a, Tensor[] lora_b,"
    " Tensor? s, Tensor? order, int[] bounds, int most_rows, float[] scaling, float[] high,"
    " float keep, int threshold, Tensor? seeds, int isa, Tensor(b!)[] d_a, Tensor(c!)[] d_b) -> ()",
)
_CUDA_SCHEMAS = (
    "_decode_cuda(Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor? bias,"
    " float scale, float high, int rows, int warps, int cluster, Tensor(a!)? s, Tensor(b!) y)"
    " -> ()",
)
ISA_NAMES = ("plain C++", "AVX2", "AVX-512", "AVX-512 BF16", "AMX", "NEON", "NEON BF16")
NEVER = (0, 0)  # are products packed
ACTIVATIONS = ("silu", "gelu_tanh", "relu", "relu2")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of rows, on the CPU


def _file(name: str) -> Path | None:
    package = Path(__file__).parents[2]
    names = (package / f"{name}{suffix}" for suffix in EXTENSION_SUFFIXES)
    return next((path for path in names if path.exists()), None)


def _load(
    name: str, schemas: tuple[str, ...], missing: str
) -> tuple[torch.library.Library | None, str]:
    """(what keeps the schemas registered, None where the part is not there; why)."""
    path = _file(name)
    if path is None:
        return None, f"not built ({missing} at install?)"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return None, f"{path.name} does not load: {error}"
    library = torch.library.Library("lora_kernels", "FRAGMENT")
    for schema in schemas:
        library.define(schema)
    return library, ""


@cache
def _cpu() -> tuple[torch.library.Library | None, str]:
    library, why = _load("_native_cpu", _CPU_SCHEMAS, "no C++ compiler")
    if library is None:
        return None, why
    return library, f"CPU kernels, {ISA_NAMES[torch.ops.lora_kernels._cpu_isa()]}"


@cache
def _cuda() -> tuple[torch.library.Library | None, str]:
    if _file("_native_cuda") is not None and not torch.cuda.is_available():
        return None, "built, not loaded: no CUDA device here"
    library, why = _load("_native_cuda", _CUDA_SCHEMAS, "no nvcc, or torch without CUDA,")
    return library, why or "CUDA kernels"


def available() -> bool:
    return _cpu()[0] is not None


def status() -> str:
    """What was built for the CPU and will run here, or why it is not there."""
    return _cpu()[1]


def cuda_available() -> bool:
    return _cuda()[0] is not None


def cuda_status() -> str:
    """What was built for CUDA and will run here, or why it is not there."""
    return _cuda()[1]


@cache
def best_isa() -> int:
    """Index in ISA_NAMES of the newest instruction set of both the extension and this CPU."""
    isa: int = torch.ops.lora_kernels._cpu_isa()
    return isa


@cache
def packed_from(isa: int) -> tuple[int, int]:
    """From how many rows on, and beyond how many columns, products are packed; or NEVER."""
    least: tuple[int, int] = torch.ops.lora_kernels._cpu_packed(isa) if available() else NEVER
    return least


@cache
def is_amd() -> bool:
    """Whether AMD made this CPU."""
    return available() and bool(torch.ops.lora_kernels._cpu_is_amd())
