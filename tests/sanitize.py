"""Runs tests of the compiled CPU kernels with those kernels under AddressSanitizer and UBSan.

    python tests/sanitize.py [arguments of pytest]    # default: all files of native tests

The kernels are compiled into a copy of the package in a temporary folder.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
FILES = [f"backends/native/test_{name}.py" for name in ("native", "native_safety", "few_rows")]
FILES += [f"grouped/test_{name}.py" for name in ("native_grouped", "native_packed", "grouped")]
FILES += ["quantized/test_native_quantized.py", "blocks/test_mlp.py", "blocks/test_packed.py"]
SOURCES = (
    "low_rank", "products", "arguments", "linear", "coded", "grouped", "grouped_packed", "gating",
    "base", "avx2", "avx512", "avx512_bf16",
)  # fmt: skip
FLAGS = (
    "-std=c++20", "-g1", "-fPIC", "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined", "-DTORCH_TARGET_VERSION=0x020b000000000000",
)  # fmt: skip


def compiler() -> str | None:
    return shutil.which((os.environ.get("CXX") or "c++").split()[0])


def build(folder: Path, optimise: str) -> None:
    """The package with sanitized kernels in `folder`."""
    shutil.copytree(
        ROOT / "lora_kernels",
        folder / "lora_kernels",
        ignore=shutil.ignore_patterns("*.so", "__pycache__"),
    )
    torch_folder = Path(torch.__file__).parent

    def run(*arguments: str) -> None:
        subprocess.run([compiler(), *FLAGS, optimise, *arguments], check=True)

    def compile_one(stem: str) -> str:
        to = str(folder / f"{stem}.o")
        include = f"-I{torch_folder / 'include'}"
        run(include, "-c", str(ROOT / "csrc" / "cpu" / f"{stem}.cpp"), "-o", to)
        return to

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        objects = list(pool.map(compile_one, SOURCES))
    library = str(folder / "lora_kernels" / "_native_cpu.abi3.so")
    run("-shared", *objects, f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-o", library)


def environment(folder: Path) -> dict[str, str]:
    """In which python imports the package of `folder`, with the sanitizers' runtimes loaded."""

    def runtime(name: str) -> str:
        command = [compiler(), f"-print-file-name={name}"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    return os.environ | {
        "PYTHONPATH": str(folder),
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libubsan.so')}",
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
    }


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """From the tests' folder: in the root, python would find the package that is there."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT / "tests",
        env=environment(folder),
        capture_output=True,
        text=True,
    )


def run_tests(folder: Path, arguments: list[str]) -> subprocess.CompletedProcess:
    return python(folder, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments)


def main() -> int:
    if compiler() is None:
        print("no C++ compiler found (CXX, or c++ on the PATH)")
        return 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(folder, "-O1")
        run = run_tests(folder, sys.argv[1:] or FILES)
    print(run.stdout + run.stderr)
    return run.returncode


if __name__ == "__main__":
    sys.exit(main())
