"""The whole GPU day, in Triton's interpreter at tiny sizes: every step ends well and leaves what
the next one reads."""

import json
from pathlib import Path

import pytest
import torch

from lora_kernels.backends.cuda import tables

pytest.importorskip("triton")
pytest.importorskip("peft")
pytest.importorskip("matplotlib")
from benchmarks import gpu_day


def test_the_whole_day(tmp_path, capsys, monkeypatch):
    # The others are run by the suite itself.
    monkeypatch.setattr(gpu_day, "gpu_tests", lambda: ["tests/dora/test_gpu_dora.py"])
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


def test_a_step_without_its_packages_is_skipped(tmp_path, capsys):
    step = gpu_day.Step({"a": ["no command"]}, 1.0, needs=("json", "no_such_package"))
    day = gpu_day.Day(tmp_path, 1.0)
    day.run(step)
    assert capsys.readouterr().out == "a: skipped, no_such_package: not installed\n"
    assert not gpu_day.Day(tmp_path, 1.0).failed("a")
    assert day.failed("another")


def test_the_long_file_has_a_process_for_each_test():
    found = gpu_day.parts(gpu_day._LONG)
    assert f"{gpu_day._LONG}::test_accuracy" in found
    assert len(found) > 4
    assert gpu_day._LONG in gpu_day.gpu_tests()
    assert gpu_day.parts("tests/backends/cuda/test_gpu_ecosystem.py") == [
        "tests/backends/cuda/test_gpu_ecosystem.py"
    ]


def test_the_day_of_a_gpu(tmp_path, monkeypatch, capsys):
    """A fake one, on which every command ends well at once: what runs, in which order and under
    which environment, and that the table is installed after it is made."""
    ran = []

    class Child:
        def __init__(self, command, env, **_):
            ran.append((command, env))
            if "tune" in command:
                Path(command[command.index("--out") + 1]).write_text("{}")

        def wait(self, timeout):
            return 0

    monkeypatch.setattr(gpu_day.subprocess, "Popen", Child)
    monkeypatch.setattr(gpu_day, "has_gpu", lambda: True)
    monkeypatch.setattr(gpu_day, "lacks_kernels", lambda: True)
    monkeypatch.setattr(gpu_day.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(gpu_day.Step, "lacks", lambda self: "")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=None: "A Card")
    monkeypatch.setattr(tables, "TUNED", tmp_path / "package")
    monkeypatch.delenv("LORA_KERNELS_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert gpu_day.main(["--out", str(tmp_path / "day")]) == 0
    said = [line.split(": ")[0] for line in capsys.readouterr().out.splitlines()[:-1]]
    rest = [name for name in said if not name.startswith("test ")]
    assert rest == [
        "build", "ecosystem, forced", "tune bf16", "tune fp16", "tune fp32", "layer", "grouped",
        "model", "report", "sanitizer", "ecosystem, with the table",
    ]  # fmt: skip
    assert (tmp_path / "package" / "a_card.json").read_text() == "{}"
    (checked,) = [command for command, _ in ran if command[0] == "compute-sanitizer"]
    assert (gpu_day.ROOT / checked[-1]).exists()
    ecosystem = [env.get("LORA_KERNELS_BACKEND") for command, env in ran
                 if command[-1].endswith("test_gpu_ecosystem.py")]  # fmt: skip
    assert ecosystem[-2:] == ["cuda", None]
    assert ran[0][1]["LORA_KERNELS_BUILD_CUDA"] == "1"
    tuned = [command for command, _ in ran if "tune" in command]
    assert all("--jobs" in command and "TRITON_INTERPRET" not in env
               for (command, env) in ran if "tune" in command)  # fmt: skip
    assert [command[-1] for command in tuned] == ["bf16", "fp16", "fp32"]
