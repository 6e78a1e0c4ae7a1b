"""setup.py builds what the machine can build, says so, and fails only for what was demanded."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def build(folder, **variables):
    command = [
        sys.executable, "setup.py", "build_ext", "--build-lib", str(folder / "lib"),
        "--build-temp", str(folder / "temp"),
    ]  # fmt: skip
    env = {k: v for k, v in os.environ.items() if k != "CXX" and not k.startswith("LORA_KERNELS")}
    result = subprocess.run(
        command, cwd=ROOT, env=env | variables, capture_output=True, text=True, timeout=600
    )
    lines = [line for line in result.stderr.splitlines() if line.startswith("lora_kernels: ")]
    return result, lines


def test_without_a_compiler_the_part_is_skipped(tmp_path):
    result, lines = build(tmp_path, PATH=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert lines == [
        "lora_kernels: CPU kernels: skipped, no C++ compiler found (CXX, or c++ on the PATH)"
    ]
    assert not list(tmp_path.rglob("*.so"))


def test_left_out_on_demand(tmp_path):
    result, lines = build(tmp_path, LORA_KERNELS_BUILD_CPU="0")
    assert result.returncode == 0, result.stderr
    assert lines == ["lora_kernels: CPU kernels: skipped, LORA_KERNELS_BUILD_CPU=0"]


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"CXX": "no-such-compiler"}, "LORA_KERNELS_BUILD_CPU=1, but: no C++ compiler found"),
        ({"LORA_KERNELS_BUILD_CPU": "yes"}, "got 'yes', legal values are auto, 0, 1"),
    ],
)
def test_what_was_demanded_and_cannot_be_built_fails(tmp_path, variables, words):
    result, _ = build(tmp_path, **{"LORA_KERNELS_BUILD_CPU": "1"} | variables)
    assert result.returncode != 0
    assert words in result.stderr


def test_a_compiler_that_fails_skips_the_part(tmp_path):
    broken = tmp_path / "broken-c++"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    result, lines = build(tmp_path, CXX=str(broken))
    assert result.returncode == 0, result.stderr
    assert len(lines) == 1
    assert lines[0].startswith("lora_kernels: CPU kernels: skipped, the build failed")
    result, _ = build(tmp_path, CXX=str(broken), LORA_KERNELS_BUILD_CPU="1")
    assert result.returncode != 0


@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler here")
def test_built_and_loaded_by_one_name(tmp_path):
    result, lines = build(tmp_path, LORA_KERNELS_BUILD_CPU="1", MAX_JOBS="2")
    assert result.returncode == 0, result.stderr[-2000:]
    assert lines == [f"lora_kernels: CPU kernels: built with {shutil.which('c++')}"]
    (library,) = tmp_path.glob("lib/lora_kernels/*.so")
    assert library.name == "_native_cpu.abi3.so"
