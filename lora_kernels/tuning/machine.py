"""The line that every result file carries: machine, versions, commit."""

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from lora_kernels._version import __version__


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str:
    """LORA_KERNELS_COMMIT where the sources travelled without their repository, or without git."""
    given, root = os.environ.get("LORA_KERNELS_COMMIT"), Path(__file__).parents[2]
    if given or shutil.which("git") is None or not (root / ".git").exists():
        return given or "unknown"
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    done = subprocess.run(describe, cwd=root, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def machine(gpu: bool) -> dict[str, Any]:
    """What a number taken on the GPU, or on the CPU, cannot be understood without."""
    versions = {name: _version(name) for name in ("torch", "triton", "peft", "transformers")}
    versions["lora_kernels"] = __version__  # the sources may not be installed
    return {
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "python": platform.python_version(),
        "versions": versions,
        "commit": _commit(),
    }


def machine_line(info: dict[str, Any]) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in info["versions"].items() if v)
    device = info["gpu"] or f"{info['cpu']} ({info['cpu_capability']}, {info['threads']} threads)"
    return f"{device} · Python {info['python']}, {versions} · commit {info['commit']}"
