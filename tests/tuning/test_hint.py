"""What the first call on a GPU without a table says, and when it is silent."""

import logging
from types import SimpleNamespace

import pytest
import torch

from lora_kernels import backends
from lora_kernels.backends import reference
from lora_kernels.backends.cuda import background, needs, tables

COMMAND = "`python -m lora_kernels tune` proves and times them on this card, once"


@pytest.fixture
def said(gpu, monkeypatch, caplog):
    """Two calls' rows on each of two GPUs of a kind; what the log says of them to people, who
    configured nothing."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(needs, "why_no_triton", lambda: None)
    monkeypatch.setattr(background, "begin", lambda: None)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    background.hint.cache_clear()

    def calls() -> list[str]:
        backends.forget()
        rows = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0), dtype=torch.float32)
        for _ in range(2):
            assert backends.serving(None, rows, None) is reference
        return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]

    yield calls
    background.hint.cache_clear()


def test_the_first_call_says_it_once(said, monkeypatch):
    monkeypatch.setattr(tables._env, "TUNE", "hint")
    (line,) = said()
    assert line == (
        "A Card: LoRA calls run as plain ATen calls, without the fused kernels (no tuned table for"
        f" this GPU): {COMMAND}. LORA_KERNELS_TUNE=off says nothing."
    )
    assert said() == [line]
    assert tables.describe(0) == [
        "no tuned table for this GPU (python -m lora_kernels tune makes one)"
    ]


def test_off_says_nothing(said, monkeypatch):
    monkeypatch.setattr(tables._env, "TUNE", "off")
    assert said() == []
    assert tables.describe(0) == ["no tuned table for this GPU"]


def test_check_says_what_was_begun(said, monkeypatch):
    monkeypatch.setattr(tables._env, "TUNE", "check")
    (line,) = said()
    assert "they are being proven in the background now, for later processes" in line


def test_without_triton_no_command_helps(said, monkeypatch):
    monkeypatch.setattr(tables._env, "TUNE", "hint")
    monkeypatch.setattr(needs, "why_no_triton", lambda: "triton does not import: no such module")
    (line,) = said()
    assert "(no tuned table for this GPU): triton does not import: no such module." in line
    assert "lora_kernels tune" not in line


def test_one_process_of_a_node_says_it(said, monkeypatch):
    monkeypatch.setattr(tables._env, "TUNE", "hint")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert said() == []


def test_who_forces_a_backend_knows(said, monkeypatch):
    monkeypatch.setattr(tables._env, "TUNE", "hint")
    with backends.use_backend("reference"):
        assert said() == []
