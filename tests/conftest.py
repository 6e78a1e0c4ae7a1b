"""Fixed seeds everywhere: hypothesis is derandomized, each test starts from one torch seed."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, settings

from lora_kernels import _ops, backends

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
    """(op, rows) of every call that reaches a backend."""
    calls, module = [], backends.choose("cpu").module

    def counted(name):
        def run(*args):
            calls.append((name, args[0].shape[0]))
            return getattr(module, name)(*args)

        return run

    counting = SimpleNamespace(**{name: counted(name) for name in _ops.OPS})
    choice = backends.Choice("counting", counting, "counted by a test")
    monkeypatch.setattr(backends, "choose", lambda device: choice)
    return calls
