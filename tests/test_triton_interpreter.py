"""Runs the case files that need Triton's interpreter where it is switched on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

TESTS = Path(__file__).parent


@pytest.mark.parametrize("name", ["interpreter", "passes"])
def test_kernels_in_the_interpreter(name):
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "LORA_KERNELS_BACKEND": "triton",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(
            filter(None, (os.environ.get("PYTHONPATH"), str(TESTS.parent)))
        ),
    }
    environment.pop("LORA_KERNELS_PLAN", None)
    cases = TESTS / f"triton_{name}_cases.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)]
    # Not from the repository's root, which -m would put before PYTHONPATH.
    run = subprocess.run(command, env=environment, cwd=TESTS, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
