"""A GPU that is not there, with a cache folder and a package of its own."""

import pytest
import torch

from lora_kernels import backends
from lora_kernels.backends.cuda import tables


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU of the name "A Card"; the folder in which its tables lie."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=None: "A Card")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tables, "TUNED", tmp_path / "package")
    monkeypatch.setattr(tables, "key_of", lambda index: "0123456789ab")
    monkeypatch.setattr(tables, "_triton", lambda: "3")
    monkeypatch.setattr(tables._env, "TUNED", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    backends.forget()
    yield tmp_path
    backends.forget()
