"""The whole GPU day, in Triton's interpreter at tiny sizes: every step ends well and leaves what
the next one reads."""

import json

import pytest

pytest.importorskip("triton")
pytest.importorskip("peft")
pytest.importorskip("matplotlib")
from benchmarks import gpu_day


def test_the_whole_day(tmp_path, capsys):
    state = tmp_path / "day.tar.gz"
    command = ["--minutes", "10", "--out", str(tmp_path / "day"), "--state", str(state)]
    status = gpu_day.main(command)
    said = capsys.readouterr().out
    assert status == 0, said + (tmp_path / "day" / "log.txt").read_text()[-4000:]
    steps = json.loads((tmp_path / "day" / "day.json").read_text())
    assert all(step["status"] == 0 for step in steps.values())
    names = {"tune bf16", "tune fp16", "tune fp32", "layer", "grouped", "model", "report"}
    assert names < steps.keys()
    table = json.loads((tmp_path / "day" / "tuned.json").read_text())
    assert {bucket["dtype"] for bucket in table["buckets"]} == {"bfloat16", "float16", "float32"}
    assert "frozen" in (tmp_path / "day" / "report.md").read_text()
    assert state.stat().st_size > 0
