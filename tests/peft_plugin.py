"""A pytest plugin that runs PEFT's own tests on fused layers.

With PEFT's source distribution unpacked (its tests are in it) and its test requirements installed:

    cd peft-0.21.2 && touch tests/__init__.py && export PYTHONPATH=.../tests
    python -m pytest -p peft_plugin -c /dev/null --rootdir=. tests/test_custom_models.py -k LoraC
"""

import pytest
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.model import LoraModel

from lora_kernels.integrations import peft as integration

_FUSED = [0, 0]


def pytest_configure(config):
    integration._SMALL = -1  # their models are so small that the op would hardly be called
    build = LoraModel._create_new_module

    def create(*args, **kwargs):
        layer = build(*args, **kwargs)
        if isinstance(layer, LoraLayer):
            _FUSED[integration._fuse(layer, exact=False) is not None] += 1
        return layer

    LoraModel._create_new_module = staticmethod(create)


@pytest.hookimpl
def pytest_terminal_summary(terminalreporter):
    fused, left = _FUSED
    terminalreporter.write_line(f"PEFT's LoRA layers: {fused} fused, {left} left to PEFT")
