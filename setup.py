"""Builds what this machine can build of csrc/ and says so, one line a part.

LORA_KERNELS_BUILD_CPU: auto (default) builds where there is a C++ compiler, 0 leaves it out, 1
demands it and fails without. MAX_JOBS: how many files are compiled at a time.
"""

import os
import shutil
import sys

from setuptools import setup

NAME = "lora_kernels._native_cpu"
SOURCES = [f"csrc/cpu/{stem}.cpp" for stem in ("ops", "base", "avx2", "avx512")]
# torch 2.11: the oldest whose stable ABI the binary may use.
TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"


def demand(part: str) -> str:
    name = f"LORA_KERNELS_BUILD_{part}"
    value = os.environ.get(name, "").strip().lower() or "auto"
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"{name}: got {value!r}, legal values are auto, 0, 1")
    return value


def compiler() -> str | None:
    """The C++ compiler that torch's build will call, if it is there."""
    return shutil.which((os.environ.get("CXX") or "c++").split()[0])


def missing_for_cpu() -> str | None:
    """Why the CPU part cannot be built here."""
    if sys.platform != "linux":
        return f"built on Linux only, this is {sys.platform}"
    try:
        import torch.utils.cpp_extension  # noqa: F401
    except ImportError as error:
        return f"torch does not import: {error} (install with --no-build-isolation)"
    return None if compiler() else "no C++ compiler found (CXX, or c++ on the PATH)"


def say(part: str, what: str) -> None:
    print(f"lora_kernels: {part} kernels: {what}", file=sys.stderr, flush=True)


def extensions() -> dict:
    wanted = demand("CPU")
    reason = "LORA_KERNELS_BUILD_CPU=0" if wanted == "0" else missing_for_cpu()
    if reason:
        if wanted == "1":
            raise SystemExit(f"LORA_KERNELS_BUILD_CPU=1, but: {reason}")
        say("CPU", f"skipped, {reason}")
        return {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class Build(BuildExtension):
        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                if wanted == "1":
                    raise
                self.extensions = []
                say("CPU", f"skipped, the build failed: {error}")
            else:
                say("CPU", f"built with {compiler()}")

    extension = CppExtension(
        NAME,
        SOURCES,
        extra_compile_args=["-O3", "-std=c++20", "-fvisibility=hidden", TARGET],
        py_limited_api=True,
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build}}


setup(**extensions())
