"""What this machine has, which backend every op will use and why, and a self-check against fp64."""

import importlib.util
import os
import platform
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor
from torch.nn.functional import linear

from lora_kernels import __version__, _env, backends
from lora_kernels._contract import OPS
from lora_kernels.backends.cuda import tables
from lora_kernels.functional import lora_linear

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
    for name in ("peft", "transformers", "safetensors"):
        yield f"{name:13} {_package(name)}"
    yield f"LORA_KERNELS_BACKEND = {_env.BACKEND or 'not set'}"
    yield f"LORA_KERNELS_TUNED = {_env.TUNED or 'not set'}"
    if torch.cuda.is_available():
        for line in tables.describe(torch.cuda.current_device()):
            yield f"tuned table   {line}"
    for device in _devices():
        choice = backends.choose(device)
        for op in OPS:
            yield f"{device}: {op:21} -> {choice.name} ({choice.reason})"


def _devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _tensors(device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)

    M, K, N, r = 65, 136, 72, 8
    return (
        normal(M, K),
        normal(N, K, scale=K**-0.5),
        normal(r, K, scale=K**-0.5),
        normal(N, r),
        normal(N),
        normal(M, N),
    )


def _run(function: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> list[Tensor]:
    *inputs, dy = tensors
    inputs = [t.detach().requires_grad_() for t in inputs]
    y = function(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, dy)]


def _unfused(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
    return linear(x, weight, bias) + 2.0 * linear(linear(x, a), b)


def self_check() -> Iterator[tuple[str, bool, str]]:
    """(case, passed, detail): y and every gradient within twice unfused torch's error + eps."""
    for device in _devices():
        for dtype in _DTYPES:
            case = f"{device} {str(dtype).removeprefix('torch.')}"
            tensors = _tensors(device, dtype)
            exact = _run(_unfused, tuple(t.double() for t in tensors))
            try:
                ours = _run(lambda *t: lora_linear(*t, scaling=2.0), tensors)
            except RuntimeError as error:
                yield case, False, str(error)
                continue
            errors = [
                [float((g.double() - e).norm() / e.norm()) for g, e in zip(got, exact, strict=True)]
                for got in (ours, _run(_unfused, tensors))
            ]
            bounds = [2 * error + torch.finfo(dtype).eps for error in errors[1]]
            passed = all(e <= bound for e, bound in zip(errors[0], bounds, strict=True))
            yield case, passed, f"largest error {max(errors[0]):.1e}, unfused {max(errors[1]):.1e}"


def main() -> int:
    """Prints the report; 0 if the self-check passed."""
    try:
        for line in describe():
            print(line)
    except RuntimeError as error:
        print(f"FAILED  {error}")
        return 1
    results = list(self_check())
    for case, passed, detail in results:
        print(f"self-check {case:14} {'ok    ' if passed else 'FAILED'} {detail}")
    return 0 if all(passed for _, passed, _ in results) else 1
