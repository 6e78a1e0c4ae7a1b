"""The short form of `make guard`: every plan between protected pages, and faults that are found."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
TESTS = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pages are protected by mprotect")


def guard(*options: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(TESTS.parent)]))
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TESTS / "guard_pages.py"), *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("fault", "status"),
    [
        ("none", 0),
        ("past the end", -11),
        ("before the start", 1),
        ("written past the end", -11),
        ("input written", -11),
        ("gap", 1),
    ],
)
def test_a_fault_is_found(fault, status):
    done = guard("--fault", fault)
    assert done.returncode == status, done.stderr[-2000:]
    assert done.stdout.rstrip().endswith(f"_kernel in the fault {fault}")
    assert ("other bits between guards" in done.stderr) == (status == 1)


def test_no_plan_leaves_its_tensors():
    done = guard("--short")
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-2000:]
    assert "none out of bounds" in done.stdout.splitlines()[-1]
