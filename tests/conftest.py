"""Fixed seeds everywhere: hypothesis is derandomized, each test starts from one torch seed."""

import contextlib
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from elsewhere import pytest_configure, pytest_runtest_protocol
from hypothesis import HealthCheck, settings

from lora_kernels import backends
from lora_kernels.branch import Dense

# Of the benchmarks; last, as a package that mutants have changed must come before this folder's.
sys.path.append(str(Path(__file__).parents[1]))
__all__ = ["pytest_configure", "pytest_runtest_protocol"]  # hooks of interpreted tests
if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_interpreted_*.py"]

settings.register_profile(
    "lora_kernels",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("lora_kernels")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, this machine has none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def kernel_calls(monkeypatch):
    """(op, rows) of every call that reaches a backend; none goes past the op."""
    monkeypatch.setattr(backends, "_few_rows", lambda: None)
    calls, serving = [], backends.serving

    def counted(function, name):
        def run(*args):
            calls.append((name, args[1].shape[0]))
            return function(*args)

        return run

    def counting(base, rows, branch):
        backend = serving(base, rows, branch)
        kind = "lora_linear" if isinstance(base, Dense) else "lora_add"
        return SimpleNamespace(
            forward=counted(backend.forward, kind),
            add_=counted(backend.add_, f"{kind}_"),
            backward=counted(backend.backward, f"{kind}_backward"),
        )

    monkeypatch.setattr(backends, "serving", counting)
    return calls


@pytest.fixture
def entering():
    """Enters a context until the test ends, and returns what the context gives."""
    with contextlib.ExitStack() as stack:
        yield stack.enter_context
