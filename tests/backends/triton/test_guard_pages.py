"""The short form of `make guard`: every kernel between protected pages, once faults are found."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
TESTS = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pages are protected by mprotect")


def python(*options: str) -> subprocess.CompletedProcess:
    paths = [os.environ.get("PYTHONPATH"), str(TESTS.parent), str(TESTS)]
    path = os.pathsep.join(filter(None, paths))
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_no_kernel_leaves_its_tensors():
    done = python(str(TESTS / "guard_pages.py"), "--short")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "none out of bounds" in done.stdout.splitlines()[-1]


def test_a_dead_case_names_its_kernel_and_line():
    program = """
from functools import partial
import sys, guard_pages

guard_pages.named_cases = lambda plans, short: [
    (kind, partial(guard_pages.fault, kind)) for kind in ("none", "past the end", "gap")
]
sys.exit(guard_pages.main())
"""
    done = python("-c", program)
    assert done.returncode == 1
    first, second, last = done.stdout.splitlines()
    assert first.startswith("past the end: copy_kernel: signal 11 in copy_kernel line ")
    assert second == "gap: copy_kernel: AssertionError: other bits between guards"
    assert last == "1 launches between guards, 2 out of bounds"


def test_a_blind_check_says_nothing():
    """Without protected pages."""
    program = """
import sys, guard_pages

guard_pages.protect = lambda *where: None
guard_pages.named_cases = None  # not to be reached
sys.exit(guard_pages.main())
"""
    done = python("-c", program)
    assert done.returncode == 2
    assert "input written: None" in done.stdout
    assert "launches between guards" not in done.stdout
