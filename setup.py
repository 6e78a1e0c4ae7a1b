"""Builds what this machine can build of csrc/ and says so, one line a part.

LORA_KERNELS_BUILD_CPU, LORA_KERNELS_BUILD_CUDA: auto (default) builds the part where it can be
built and used, 0 leaves it out, 1 demands it and fails without. CUDA can be used where torch has
CUDA; 1 needs nvcc alone, no GPU. TORCH_CUDA_ARCH_LIST: architectures; CUDA_HOME: where nvcc is;
CXX: the host compiler; MAX_JOBS: how many files or architectures are compiled at a time.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup

CPU = "lora_kernels._native_cpu"
CUDA = "lora_kernels._native_cuda"
CPU_SOURCES = [f"csrc/cpu/{stem}.cpp" for stem in ("ops", "base", "avx2", "avx512")]
CUDA_SOURCES = ["csrc/cuda/decode.cu"]
CUDA_HEADERS = ["csrc/cuda/decode.cuh", "csrc/cuda/device.cuh"]
CUDA_ARCHS = "8.0;8.9;9.0+PTX"
# torch 2.11: the oldest whose stable ABI the binaries may use.
TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
FLAGS = ["-O3", "-std=c++20", TARGET]
ROOT = Path(__file__).resolve().parent


class Part(NamedTuple):
    name: str
    wanted: str
    extension: Extension
    built: str  # with what


def demand(part: str) -> str:
    name = f"LORA_KERNELS_BUILD_{part}"
    value = os.environ.get(name, "").strip().lower() or "auto"
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"{name}: got {value!r}, legal values are auto, 0, 1")
    return value


def say(part: str, what: str) -> None:
    print(f"lora_kernels: {part} kernels: {what}", file=sys.stderr, flush=True)


def compiler() -> str | None:
    """The C++ compiler that torch's build will call, if it is there."""
    return shutil.which((os.environ.get("CXX") or "c++").split()[0])


def nvcc() -> str | None:
    """Of CUDA_HOME or CUDA_PATH, on the PATH, or in the usual place."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return shutil.which(str(Path(home, "bin", "nvcc")))
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def archs() -> list[str]:
    """Those of TORCH_CUDA_ARCH_LIST that the kernels can be compiled for, as 9.0 or 9.0+PTX."""
    listed = re.split(r"[;\s,]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip())
    listed = [arch for arch in listed if arch] or CUDA_ARCHS.split(";")
    for arch in listed:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", arch):
            raise SystemExit(
                f"TORCH_CUDA_ARCH_LIST: got {arch!r}, expected numbers like {CUDA_ARCHS}"
            )
    return [arch for arch in listed if int(arch.split(".")[0]) >= 8]


def gencode(arch: str) -> list[str]:
    number = arch.removesuffix("+PTX").replace(".", "")
    codes = [f"sm_{number}"] + [f"compute_{number}"] * arch.endswith("+PTX")
    return [f"-gencode=arch=compute_{number},code={code}" for code in codes]


def without_paths() -> list[str]:
    """Options of the host compiler that keep this machine's folders out of binaries and messages;
    of two that match, the last counts."""
    import torch

    folders = {ROOT: ".", Path(torch.__file__).parent: "torch"}
    return [f"-ffile-prefix-map={folder}={name}" for folder, name in folders.items()]


def missing(demanded: bool) -> str | None:
    """Why nothing can be built here."""
    if sys.platform != "linux":
        return f"built on Linux only, this is {sys.platform}"
    try:
        import torch.utils.cpp_extension  # noqa: F401
    except ImportError as error:
        return f"torch does not import: {error} (install with --no-build-isolation)"
    return None


def missing_for_cpu(demanded: bool) -> str | None:
    return missing(demanded) or (
        None if compiler() else "no C++ compiler found (CXX, or c++ on the PATH)"
    )


def missing_for_cuda(demanded: bool) -> str | None:
    if reason := missing(demanded):
        return reason
    if nvcc() is None:
        return "no nvcc found (CUDA_HOME, the PATH, /usr/local/cuda)"
    if not archs():
        return "no architecture from 8.0 on in TORCH_CUDA_ARCH_LIST"
    import torch

    if torch.version.cuda is None and not demanded:
        return "torch has no CUDA (LORA_KERNELS_BUILD_CUDA=1 builds them all the same)"
    return None


def cpu_part(wanted: str) -> Part:
    from torch.utils.cpp_extension import CppExtension

    flags = [*FLAGS, "-fvisibility=hidden", *without_paths()]
    extension = CppExtension(CPU, CPU_SOURCES, extra_compile_args=flags, py_limited_api=True)
    return Part("CPU", wanted, extension, f"built with {compiler()}")


def cuda_part(wanted: str) -> Part:
    extension = Extension(CUDA, CUDA_SOURCES, depends=CUDA_HEADERS, py_limited_api=True)
    return Part("CUDA", wanted, extension, f"built with {nvcc()} for {', '.join(archs())}")


def run_nvcc(to: Path) -> None:
    """One library from one call. torch's own CUDA build needs a torch with CUDA; this one needs its
    headers: the CUDA half of the ABI is found at load, through libtorch. The CUDA runtime is linked
    in, whichever torch brings along."""
    from torch.utils.cpp_extension import include_paths, library_paths

    host_flags = ",".join(["-fPIC", "-fvisibility=hidden", *without_paths()])
    jobs = os.environ.get("MAX_JOBS") or str(min(len(archs()), os.cpu_count() or 1))
    host = [f"-ccbin={shutil.which(os.environ['CXX'].split()[0])}"] if os.environ.get("CXX") else []
    to.parent.mkdir(parents=True, exist_ok=True)
    command = [
        nvcc(), "-shared", "-cudart=static", *FLAGS, *host, "-DUSE_CUDA", "--threads", jobs,
        f"-Xcompiler={host_flags}", *(f"-I{path}" for path in include_paths()),
        *(flag for arch in archs() for flag in gencode(arch)), *CUDA_SOURCES, "-o", str(to),
        *(f"-L{path}" for path in library_paths()), "-Xlinker=--no-as-needed", "-ltorch",
        "-ltorch_cpu",
    ]  # fmt: skip
    status = subprocess.run(command, check=False).returncode
    if status:
        raise RuntimeError(f"nvcc: exit status {status}")


PARTS: dict[str, tuple[Callable[[bool], str | None], Callable[[str], Part]]] = {
    "CPU": (missing_for_cpu, cpu_part),
    "CUDA": (missing_for_cuda, cuda_part),
}


def parts() -> list[Part]:
    """What is to be built; fails for what is demanded and cannot be."""
    found = []
    for name, (reason_against, make) in PARTS.items():
        wanted = demand(name)
        if wanted == "0":
            say(name, f"skipped, LORA_KERNELS_BUILD_{name}=0")
        elif reason := reason_against(wanted == "1"):
            if wanted == "1":
                raise SystemExit(f"LORA_KERNELS_BUILD_{name}=1, but: {reason}")
            say(name, f"skipped, {reason}")
        else:
            found.append(make(wanted))
    return found


def extensions() -> dict:
    planned = parts()
    if not planned:
        return {}
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        """Each part by itself: one that fails leaves the others alone."""

        def build_extensions(self) -> None:
            done = []
            for part in planned:
                self.extensions = [part.extension]
                try:
                    if part.name == "CUDA":
                        run_nvcc(Path(self.get_ext_fullpath(CUDA)))
                    else:
                        super().build_extensions()
                except Exception as error:
                    if part.wanted == "1":
                        raise
                    say(part.name, f"skipped, the build failed: {error}")
                else:
                    say(part.name, part.built)
                    done.append(part.extension)
            self.extensions = done

    return {"ext_modules": [part.extension for part in planned], "cmdclass": {"build_ext": Build}}


setup(**extensions())
