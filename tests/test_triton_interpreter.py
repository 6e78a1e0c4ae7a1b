"""Runs the cases of triton_interpreter_cases.py where Triton's interpreter is switched on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent


def test_kernels_in_the_interpreter():
    cases = Path(__file__).with_name("triton_interpreter_cases.py")
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "LORA_KERNELS_BACKEND": "triton",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    }
    environment.pop("LORA_KERNELS_PLAN", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)]
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
