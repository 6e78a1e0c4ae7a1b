"""What serves a process stays what it is: after a capture, and on a second GPU."""

import json
from pathlib import Path

import pytest
import torch

import lora_kernels
from lora_kernels import backends, tuning
from lora_kernels.backends import device
from lora_kernels.backends.cuda import choice, needs, tables
from lora_kernels.backends.cuda.plan import Call

CALL = Call("forward", "bfloat16", 16, 8, 8, 8, False)


def write(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    bucket = {**CALL._asdict(), "plan": "cublas"}
    content = {"gpu": "A Card", "versions": {"triton": "3"}, "buckets": [bucket],
               "proven": [tables.proof("cublas", "bfloat16", False)]}  # fmt: skip
    path.write_text(json.dumps(content))


@pytest.fixture
def capturing(gpu, monkeypatch):
    """Sets whether a graph is being captured."""
    state = [False]
    monkeypatch.setattr(choice, "_captured", False)
    monkeypatch.setattr(device, "_properties", lambda index: device.CARDS["90"])
    monkeypatch.setattr(needs, "why_no_triton", lambda: None)
    monkeypatch.setattr(needs, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state[0])

    def supervise(path, *_):
        write(path)
        return True

    monkeypatch.setattr(tuning, "supervise", supervise)
    yield lambda now: state.__setitem__(0, now)
    choice._captured = False
    backends.forget()


def serving(of: str = "cuda:0") -> tuple[str, str]:
    plan = choice.choose(CALL, torch.device(of)).plan
    return backends.choose(of).name, plan


@pytest.mark.parametrize("captured", [False, True])
def test_tune_after_a_capture_is_for_the_next_process(capturing, monkeypatch, captured):
    assert serving() == ("reference", "aten")
    capturing(captured)
    serving()
    capturing(False)
    report = lora_kernels.tune(shapes=[(8, 8, 8)], rows=[16])
    assert report.adopted is not captured
    assert ("a CUDA graph was captured before" in str(report)) is captured
    assert serving() == (("reference", "aten") if captured else ("cuda", "cublas"))
    assert serving("cuda:1") == serving("cuda:0")
    monkeypatch.setattr(choice, "_captured", False)  # the next process
    backends.forget()
    assert serving() == ("cuda", "cublas")


def test_a_captured_plan_is_not_lost_to_a_table_that_goes(capturing):
    write(tables.cache_path(0))
    capturing(True)
    assert serving() == ("cuda", "cublas")
    capturing(False)
    tables.cache_path(0).unlink()
    assert backends.forget() is False
    assert serving() == ("cuda", "cublas")


def test_a_table_that_appears_is_not_taken_on_a_second_gpu(capturing):
    assert serving("cuda:0") == ("reference", "aten")
    write(tables.cache_path(0))
    assert serving("cuda:1") == ("reference", "aten")
    assert backends.forget() is True
    assert serving("cuda:1") == ("cuda", "cublas")
