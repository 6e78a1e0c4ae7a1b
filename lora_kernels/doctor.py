"""What this machine has, which backend every op will use and why, and a self-check against fp64."""

import importlib.util
import os
import platform
import shutil
import sysconfig
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from lora_kernels import __version__, _env, backends, testing
from lora_kernels._contract import OPS
from lora_kernels.backends.cuda import tables
from lora_kernels.backends.native import few_rows, quantized
from lora_kernels.functional import lora_linear


def _package(name: str) -> str:
    if importlib.util.find_spec(name) is None:
        return "not installed"
    try:
        return version(name)
    except PackageNotFoundError:
        return "installed, version unknown"


def _ninja() -> str:
    """Where setup.py finds it."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    found = shutil.which(os.environ.get("NINJA") or "ninja", path=path)
    return found or "not found: csrc is built without, slowly (pip install ninja)"


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none"
    index = torch.cuda.current_device()
    major, minor = torch.cuda.get_device_capability(index)
    return f"{torch.cuda.get_device_name(index)} (sm_{major}{minor})"


def describe() -> Iterator[str]:
    """Lines on versions, hardware, settings, and the backend of every op."""
    yield f"lora_kernels  {__version__}"
    yield f"python        {platform.python_version()} on {platform.machine()}"
    yield f"torch         {torch.__version__}, CUDA {torch.version.cuda or 'not built in'}"
    yield f"triton        {_package('triton')}"
    yield f"ninja         {_ninja()}"
    for part, status in backends.extension_status().items():
        yield f"csrc, {part:7} {status}"
    yield f"gpu           {_gpu()}"
    capability = torch.backends.cpu.get_cpu_capability()
    yield f"cpu           {capability}, {torch.get_num_threads()} threads"
    for line in (*few_rows.describe(), *quantized.describe()):
        yield f"few rows      {line}"
    for name in ("peft", "transformers", "safetensors"):
        yield f"{name:13} {_package(name)}"
    yield f"LORA_KERNELS_BACKEND = {_env.BACKEND or 'not set'}"
    yield f"LORA_KERNELS_TUNED = {_env.TUNED or 'not set'}"
    yield f"LORA_KERNELS_TUNE = {_env.TUNE}"
    if torch.cuda.is_available():
        for line in tables.describe(torch.cuda.current_device()):
            yield f"tuned table   {line}"
    for device in _devices():
        choice = backends.choose(device)
        for op in OPS:
            yield f"{device}: {op:21} -> {choice.name} ({choice.reason})"


def _devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _run(p: testing.Problem) -> list[Tensor]:
    """y, dx, dA and dB of the op."""
    leaves = (p.x, p.a.requires_grad_(), p.b.requires_grad_())
    y = lora_linear(p.x, p.weight, p.a, p.b, scaling=testing.SCALING)
    return [y.detach(), *torch.autograd.grad(y, leaves, p.dy)]


def self_check() -> Iterator[tuple[str, bool, str]]:
    """(case, passed, detail): y and the gradients of x, A and B, by the rule of accuracy."""
    for device in _devices():
        for dtype in testing.DTYPES:
            p = testing.problem(testing.Case(65, 136, 72, 8, dtype), torch.device(device))
            case = f"{device} {str(p.x.dtype).removeprefix('torch.')}"
            try:
                found, right = _run(p), testing.expected(p)
                right.require("lora_linear", found)
            except (RuntimeError, testing.WrongResult) as error:
                yield case, False, str(error)
                continue
            ours, theirs = map(max, zip(*right.errors(found).values(), strict=True))
            yield case, True, f"largest error {ours:.1e}, unfused {theirs:.1e}"


def main() -> int:
    """Prints the report; 0 if the self-check passed."""
    try:
        for line in describe():
            print(line)
    except (RuntimeError, ValueError) as error:
        print(f"FAILED  {error}")
        return 1
    results = list(self_check())
    for case, passed, detail in results:
        print(f"self-check {case:14} {'ok    ' if passed else 'FAILED'} {detail}")
    return 0 if all(passed for _, passed, _ in results) else 1
