"""The lines of `doctor` on tables."""

import json
from datetime import date, timedelta

import pytest
import torch

from lora_kernels import backends, doctor
from lora_kernels.backends.cuda import tables

FAILED = {"plan": "flag", "tiles": {"gemm": {"bm": 64}}, "call": {}, "why": "it hung: no result"}


@pytest.fixture
def on_gpu(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (9, 0))
    return gpu


def day(ago: int) -> date:
    return date.today() - timedelta(days=ago)


def lines(what: str) -> list[str]:
    return [line for line in doctor.describe() if line.startswith(what)]


def write(path, **more):
    bucket = {"op": "forward", "dtype": "bfloat16", "M": 8, "N": 8, "K": 8, "r": 8,
              "dropout": False, "plan": "aten"}  # fmt: skip
    kinds = (("aten", "bfloat16", False), ("dual", "bfloat16", False), ("aten", "float16", True))
    content = {"gpu": "A Card", "date": str(day(12)),
               "versions": {"triton": "3"}, "failed": [FAILED],
               "proven": [tables.proof(*kind) for kind in kinds],
               "buckets": [bucket] * 3}  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content | more))


def test_all_of_a_table(on_gpu):
    path = tables.cache_path(0)
    write(path)
    backends.forget()
    assert lines("tuned table") == [
        f"tuned table   {path}, 12 days old ({day(12)})",
        "tuned table   3 kinds of calls",
        "tuned table   proven in bfloat16, no dropout: aten, dual",
        "tuned table   proven in float16, dropout: aten",
        "tuned table   struck out: flag {'gemm': {'bm': 64}}: it hung: no result",
    ]


@pytest.mark.parametrize(("ago", "age"), [(1, "1 day old"), (0, "0 days old"), (None, "of an")])
def test_its_age(on_gpu, ago, age):
    write(tables.cache_path(0), date=None if ago is None else str(day(ago)))
    backends.forget()
    assert f", {age}" in lines("tuned table")[0]


def test_without_one(on_gpu):
    (line,) = lines("tuned table")
    assert line.startswith("tuned table   no tuned table for this GPU (python -m lora_kernels tune")
    write(tables.cache_path(0), versions={"triton": "2"})
    backends.forget()
    (line,) = lines("tuned table")
    assert line.startswith("tuned table   no tuned table for this GPU")
    write(on_gpu / "package" / "a_card.json", versions={"triton": "2"})
    backends.forget()
    (line,) = lines("tuned table")
    assert "is of Triton 2, this is 3" in line


@pytest.mark.parametrize("setting", ["off", "hint", "check"])
def test_the_settings(monkeypatch, setting):
    monkeypatch.setattr(doctor._env, "TUNE", setting)
    assert lines("LORA_KERNELS_TUNE ") == [f"LORA_KERNELS_TUNE = {setting}"]
    monkeypatch.setattr(doctor._env, "TUNED", None)
    assert lines("LORA_KERNELS_TUNED") == ["LORA_KERNELS_TUNED = not set"]
