"""LORA_KERNELS_TUNE=auto: what is proven before the first call of a kind, and when nothing is."""

import json
import subprocess
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from lora_kernels import __main__ as command_line
from lora_kernels import backends
from lora_kernels.backends.cuda import choice, needs, tables, unseen
from lora_kernels.backends.cuda.plan import Call
from lora_kernels.tuning.table import KEY

GPU = torch.device("cuda", 0)
CALL = Call("forward", "float32", 24, 48, 32, 8, False)
WHERE = "lora_kernels/v1/a_card-0123456789ab.json"


@pytest.fixture
def commands(gpu, monkeypatch):
    """What is run in place of the command, which finds `dual` the best of everything."""
    found = []

    def run(arguments, env, timeout, **options):
        assert env["LORA_KERNELS_TUNE"] == "off", "it would run another one"
        found.append((arguments[1:], env, timeout))
        args = dict(pairwise(arguments))
        N, K, r = map(int, args["--shapes"].split(","))
        made = gpu / "cache" / WHERE
        table = json.loads(made.read_text()) if made.exists() else {"buckets": [], "proven": []}
        values = ("forward", "float32", int(args["--rows"]), N, K, r, False)
        table["buckets"].append(dict(zip(KEY, values, strict=True)) | {"plan": "dual"})
        table["proven"] = [tables.proof("dual", "float32", False)]
        made.parent.mkdir(parents=True, exist_ok=True)
        made.write_text(json.dumps({"gpu": "A Card", "versions": {"triton": "3"}} | table))
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda index: None)
    monkeypatch.setattr(needs, "why_no_triton", lambda: None)
    monkeypatch.setattr(unseen._env, "TUNE", "auto")
    monkeypatch.setattr(unseen, "_tried", set())
    monkeypatch.setattr(unseen, "_spent", 0.0)
    monkeypatch.setattr(unseen.subprocess, "run", run)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    # The plan is asked for by name alone: it is not run.
    monkeypatch.setattr(type(choice.PLANS["dual"]), "refusal", lambda self, call: None)
    return found


def plan_of(call: Call) -> str:
    return choice.choose(call, GPU).plan


def test_a_kind_is_proven_once(commands, caplog):
    assert plan_of(CALL) == "dual"
    ((arguments, env, timeout),) = commands
    assert arguments[:3] == ["-m", "lora_kernels", "tune"]
    assert " ".join(arguments[3:]) == (
        "--quick --no-progress --minutes 1.0 --rows 32 --shapes 48,32,8 --dtype fp32 --weight dense"
    )
    assert env["CUDA_VISIBLE_DEVICES"] == "0"
    assert 60 < timeout <= 120
    (said,) = caplog.messages
    what = "x [32,32] in float32, dense weight [48,32], rank 8"
    assert f"proving and timing the fused kernels for {what}" in said
    # Of the same kind, or chosen before.
    for more in ({"M": 17}, {"M": 32}, {"M": 24}, {"dropout": True}, {"op": "backward"}):
        plan_of(CALL._replace(**more))
    assert len(commands) == 1
    for more in ({"M": 33}, {"M": 16}, {"N": 64}, {"r": 16}, {"dtype": "float16"}):
        plan_of(CALL._replace(**more))
    assert len(commands) == 6
    plan_of(CALL._replace(op="coded", weight="nf4"))
    assert commands[-1][0][-2:] == ["--weight", "nf4"]
    assert len(commands) == 7


def test_what_a_table_knows_is_not_proven_again(commands):
    plan_of(CALL)
    unseen._tried.clear()
    backends.forget()  # as the next process
    assert plan_of(CALL._replace(M=20)) == "dual"
    assert len(commands) == 1


def test_what_was_chosen_stays(commands, monkeypatch):
    """A table that appears later says nothing of calls that have been."""
    monkeypatch.setattr(unseen._env, "TUNE", "hint")
    assert plan_of(CALL) == "aten"
    monkeypatch.setattr(unseen._env, "TUNE", "auto")
    assert plan_of(CALL._replace(M=64)) == "dual"
    assert plan_of(CALL) == "aten"


@pytest.mark.parametrize("which", ["hint", "a rank", "a table", "a capture", "a captured graph"])
def test_where_nothing_is_proven(commands, gpu, monkeypatch, which):
    if which == "hint":
        monkeypatch.setattr(unseen._env, "TUNE", "hint")
    elif which == "a rank":
        monkeypatch.setenv("LOCAL_RANK", "0")
    elif which == "a table":
        (gpu / "given").mkdir()
        monkeypatch.setattr(tables._env, "TUNED", str(gpu / "given"))
    elif which == "a capture":
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    else:
        monkeypatch.setattr(choice, "_captured", True)
    assert plan_of(CALL) == "aten"
    assert commands == []


def test_a_process_stops_when_its_time_is_over(commands, monkeypatch, caplog):
    monkeypatch.setattr(unseen, "_spent", 60 * unseen._MINUTES - 30)
    plan_of(CALL)
    ((arguments, *_),) = commands
    assert arguments[arguments.index("--minutes") + 1] == "0.5"
    monkeypatch.setattr(unseen, "_spent", 60 * unseen._MINUTES)
    assert plan_of(CALL._replace(r=4)) == "dual"  # by the nearest
    assert len(commands) == 1
    assert "is not proven, this process has spent its 5 minutes" in caplog.messages[-1]


@pytest.mark.parametrize("failure", ["status", "time", "system"])
def test_the_call_goes_on_where_nothing_could_be_proven(commands, monkeypatch, caplog, failure):
    def run(arguments, **options):
        commands.append(arguments)
        if failure == "time":
            raise subprocess.TimeoutExpired(arguments[0], 120)
        if failure == "system":
            raise OSError("no more processes")
        return SimpleNamespace(returncode=1, stderr="process 7 makes this table\n")

    monkeypatch.setattr(unseen.subprocess, "run", run)
    for _ in range(2):
        assert plan_of(CALL) == "aten"
        assert plan_of(CALL._replace(M=32)) == "aten"
    assert len(commands) == 1
    words = {"status": "process 7", "time": "timed out", "system": "no more processes"}[failure]
    assert "could not be proven" in caplog.messages[-1]
    assert words in caplog.messages[-1]


def test_without_a_table_the_plans_are_asked(commands):
    chosen = backends.choose(GPU)
    assert chosen.name == "cuda"
    assert "LORA_KERNELS_TUNE=auto proves a kind of call" in chosen.reason
    assert commands == []


def test_the_device_that_asks_is_the_one_that_is_seen(monkeypatch):
    for variable, index, expected in ((None, 2, "2"), ("4,7", 1, "7"), ("GPU-a,GPU-b", 0, "GPU-a")):
        if variable is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
        assert unseen._visible(index) == {"CUDA_VISIBLE_DEVICES": expected}


def test_the_command_is_one(capsys):
    """There is no GPU for it here, which it says."""
    if torch.cuda.is_available():
        pytest.skip("it would tune")
    assert command_line.main(list(unseen.command(CALL, 1.0)[2:])) == 1
    assert "there is no GPU here" in capsys.readouterr().err
