"""The CPU kernels without torch, `tests/host_kernels.cpp`: on this CPU, and those of Arm under an
emulator where a cross compiler and the emulator are there (`make cross` demands both)."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
FLAGS = [
    "-O2", "-std=c++20", "-DTORCH_TARGET_VERSION=0x020b000000000000",
    f"-I{Path(torch.__file__).parent / 'include'}", f"-I{ROOT / 'csrc' / 'cpu'}",
]  # fmt: skip
CROSS, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
SETS = {"base": "base.cpp", "avx2": "avx2.cpp", "neon": "neon.cpp", "neon_bf16": "neon_bf16.cpp"}


def built(compiler, sets, folder):
    sources = [ROOT / "tests" / "host_kernels.cpp"]
    sources += [ROOT / "csrc" / "cpu" / SETS[name] for name in sets]
    objects = [str(folder / f"{source.stem}.o") for source in sources]

    def compile_one(source, target):
        run([compiler, *FLAGS, "-c", str(source), "-o", target])

    with ThreadPoolExecutor() as pool:
        list(pool.map(compile_one, sources, objects))
    program = str(folder / "kernels")
    run([compiler, "-static", *objects, "-o", program])
    return program


def run(command):
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """What the plain kernels print."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("needs a C++ compiler, there is none here")
    x86 = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    sets = ["base", "avx2"] if x86 else ["base"]
    program = built(compiler, sets, tmp_path_factory.mktemp("here"))
    printed = {name: run([program, name]) for name in sets}
    assert len(set(printed.values())) == 1
    return printed["base"]


def test_here(here):
    assert here.startswith("bits ")
    assert len(here.splitlines()) == 1


@pytest.fixture(scope="module")
def cross():
    missing = [tool for tool in (CROSS, EMULATOR) if shutil.which(tool) is None]
    if missing and os.environ.get("LORA_KERNELS_CROSS") == "1":
        pytest.fail(f"{' and '.join(missing)} missing (g++-aarch64-linux-gnu, qemu-user-static)")
    if missing:
        pytest.skip(f"needs {' and '.join(missing)}, not here")
    return CROSS


def test_on_arm(here, cross, tmp_path):
    """The products as exact, decoded weights and masks of the same bits."""
    sets = ["base", "neon", "neon_bf16"]
    program = built(cross, sets, tmp_path)
    for name in sets:
        assert run([EMULATOR, "-cpu", "max", program, name]) == here


def test_the_extension_compiles_for_arm(cross, tmp_path):
    """Against torch's headers; to link it needs torch's library for Arm."""
    files = [*SETS.values(), "linear.cpp", "low_rank.cpp", "grouped.cpp"]

    def compile_one(name):
        target = str(tmp_path / f"{name}.o")
        run([cross, *FLAGS, "-fPIC", "-c", str(ROOT / "csrc" / "cpu" / name), "-o", target])

    with ThreadPoolExecutor() as pool:
        list(pool.map(compile_one, files))
