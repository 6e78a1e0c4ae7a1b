"""Fixed seeds everywhere: hypothesis is derandomized, each test starts from one torch seed."""

import pytest
import torch
from hypothesis import HealthCheck, settings

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
