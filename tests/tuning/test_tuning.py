"""`tune`: the worker in Triton's interpreter, what becomes of plans that are wrong, slow, hang, die
or do not fit, and where tables are looked for."""

import importlib.metadata
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tune_command import tune

import lora_kernels
from lora_kernels import __main__ as command_line
from lora_kernels import backends
from lora_kernels.backends.cuda import background, choice, tables, unseen
from lora_kernels.backends.cuda.plan import Call
from lora_kernels.backends.cuda.plans import PLANS
from lora_kernels.testing import Case, Expected
from lora_kernels.tuning import clock, search
from lora_kernels.tuning.cases import cases_of
from lora_kernels.tuning.table import BASES, Candidate, Table, locked, merge

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
# gluon is compiled for Hopper and bf16 alone; the last is of quantised weights.
APART = ("decode_cuda", "gluon", "decode_coded")
INTERPRETED = [plan for plan in PLANS if plan not in APART]
INFO = {"versions": {}, "commit": "x"}


def proven_of(table: dict) -> set[tuple[str, bool]]:
    return {(entry["plan"], entry["dropout"]) for entry in table["proven"]}


def proofs(*plans: str, dtype: str = "bfloat16") -> list[dict]:
    return [tables.proof(plan, dtype, False) for plan in plans]


def bucket(M: int, plan: str, **more: object) -> dict:
    call = {"op": "forward", "dtype": "bfloat16", "M": M, "N": 8, "K": 8, "r": 8, "dropout": False}
    return call | {"plan": plan, **more}


def test_in_the_interpreter(tmp_path):
    """Each plan's analytic tiles: test_interpreted_plans.py runs every other one."""
    path = tmp_path / "tuned.json"
    said = tune(path, "--quick")
    found = tables.read_table(path)
    # The flag kernel serves no dropout forward, but its backward is that of others.
    proven = {(plan, p) for plan in INTERPRETED for p in (False, True)} - {("flag", True)}
    assert proven_of(found) == proven
    assert [(b["op"], b["dropout"]) for b in found["buckets"]] == [
        ("forward", False), ("backward", False), ("forward", True), ("backward", True),
        ("add", False), ("add_backward", False), ("add", True), ("add_backward", True),
    ]  # fmt: skip
    assert "trying" not in found
    assert set(found) >= {"date", "versions", "commit"}
    assert "8 kinds of calls, 8 of them new" in said

    # The process died in a candidate: it is not tried again, and its plan is not proven.
    last = found["buckets"].pop()
    call = {name: last[name] for name in ("op", "dtype", "M", "N", "K", "r", "dropout")}
    path.write_text(json.dumps(found | {"trying": {"plan": "cublas", "tiles": {}, "call": call}}))
    assert "8 kinds of calls, 1 of them new" in tune(path, "--quick")
    again = tables.read_table(path)
    assert again["buckets"][:-1] == found["buckets"]
    assert again["buckets"][-1]["plan"] != "cublas"
    assert proven_of(again) == proven - {("cublas", True)}
    assert again["failed"][0]["why"] == "the process died"


STAND_IN = """
import os, time
from dataclasses import replace
import torch
from lora_kernels.backends import reference
from lora_kernels.backends.cuda import plans
from lora_kernels.backends.cuda.plan import Pass

runs = {kind: 0 for kind in KINDS}
lost = False

def aten(*args):
    if lost:  # as every call in a process whose context is
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    return reference.forward(*args[:-1])

def of_kind(kind):
    def forward(base, x, branch, save_s, tiles):
        global lost
        runs[kind] += 1
        first = runs[kind] == 1
        y, s = reference.forward(base, x, branch, save_s)
        if kind == "wrong":
            y = y * 1.01
        elif kind == "unwritten":
            y = torch.empty_like(y) if first else y
        elif kind == "beyond" and first:
            y = torch.empty_like(y).copy_(y)
            y.as_strided((1,), (1,), y.storage_offset() + y.numel())[0] = 1
        elif kind == "before" and first:
            y = torch.empty_like(y).copy_(y)
            y.as_strided((1,), (1,), y.storage_offset() - 1)[0] = 1
        elif kind == "illegal":
            lost = True
            aten()
        elif kind == "random":
            y[0, 0] = torch.nextafter(y[0, 0], y[0, 0] + runs[kind] % 2)
        elif kind == "hang" and first:
            time.sleep(60)
        elif kind == "die":
            os._exit(77)
        elif kind == "crash":
            os.abort()
        elif kind == "large":
            from triton.runtime.errors import OutOfResources
            raise OutOfResources(300_000, 101_376, "shared memory")
        elif kind == "slow":
            time.sleep(0.3)
        elif kind == "fast":
            pass
        return y, s
    return forward

for name in [n for n in plans.PLANS if n != "aten"]:
    del plans.PLANS[name]
plans.PLANS["aten"] = replace(plans.PLANS["aten"], forward=Pass(aten))
for kind in KINDS:
    plans.register(replace(plans.PLANS["aten"], name=kind, summary="for a test",
                           forward=Pass(of_kind(kind), dropout=False)))
"""
FAULTY = {
    "wrong": "WrongResult: wrong: y has error",
    "unwritten": "WrongResult: unwritten: y has error nan",
    "random": "WrongResult: random: other bits in run 2",
    "beyond": "WrongResult: beyond: wrote past the memory of an output or part [16, 32]",
    "before": "WrongResult: before: wrote before the memory of an output or part [16, 32]",
    "illegal": "RuntimeError: CUDA error: an illegal memory access was encountered",
    "hang": "it hung: no result in 8 s",
    "die": "the process died",
    "crash": "the process died",
    "large": "OutOfResources",
}


def stand_in(folder: Path, *kinds: str) -> Path:
    """The plugin, with a plan of each kind."""
    plugin = folder / "standin.py"
    plugin.write_text(f"KINDS = {kinds!r}\n{STAND_IN}")
    return plugin


@pytest.fixture(scope="module")
def of_faulty_plans(tmp_path_factory):
    """The table of all of them at once, in which a worker dies and the next goes on; what was
    printed."""
    folder = tmp_path_factory.mktemp("faulty")
    stand_in(folder, *FAULTY)
    path = folder / "tuned.json"
    said = tune(path, "--dtype", "fp32", "--limit", "8", "--no-backward", plugins=folder)
    return json.loads(path.read_text()), said


@pytest.mark.parametrize("kind", FAULTY)
def test_a_faulty_plan_is_struck_out(of_faulty_plans, kind):
    table, said = of_faulty_plans
    # Its other passes are ATen's: right with dropout, which its forward does not serve.
    assert (kind, False) not in proven_of(table)
    (failed,) = [entry for entry in table["failed"] if entry["plan"] == kind]
    assert FAULTY[kind] in failed["why"]
    assert f"struck out: {kind} for {failed['call']}: {failed['why']}" in said


def test_among_faulty_plans_all_ends_in_aten(of_faulty_plans):
    table, _ = of_faulty_plans
    assert len(table["failed"]) == len(FAULTY)
    assert {b["plan"] for b in table["buckets"] if b["op"] == "forward"} == {"aten"}
    assert ("aten", False) in proven_of(table)


def test_a_slow_plan_is_proven_and_not_taken(tmp_path):
    stand_in(tmp_path, "slow")
    path = tmp_path / "tuned.json"
    tune(path, "--dtype", "fp32", "--no-backward", plugins=tmp_path)
    table = json.loads(path.read_text())
    assert ("slow", False) in proven_of(table)
    assert {bucket["plan"] for bucket in table["buckets"]} == {"aten"}


def test_nothing_is_taken_without_aten_beside_it(tmp_path, monkeypatch):
    table, call = Table(tmp_path / "t.json", "G", INFO), bucket(16, "")
    listed = [("aten", {}), ("dual", {})]
    monkeypatch.setattr(search, "candidates", lambda call, target: listed)
    monkeypatch.setattr(search, "works_right", lambda candidate, *_: candidate.plan == "dual")
    monkeypatch.setattr(Table, "proves", lambda *_: True)
    monkeypatch.setattr(search, "timed", lambda found, *_: [[1.0] for _ in found])
    del call["plan"]
    work = search.Work(Call(**call), list, Expected(torch.ones(1), [], []), ("y",))
    assert search.bucket_of(work, table, 0.0, (1, 1)) is None
    monkeypatch.setattr(search, "works_right", lambda *_: True)
    assert search.bucket_of(work, table, 0.0, (1, 1))["plan"] == "aten"


# ------------------------------------------------------------------------------------------- tables


def test_merging(tmp_path):
    one = {"gpu": "G", "versions": {"triton": "3"}, "proven": proofs("aten", "cublas", "dual"),
           "failed": [], "buckets": [bucket(1, "dual"), bucket(2, "aten")]}  # fmt: skip
    wrong = {"plan": "dual", "tiles": {}, "call": bucket(1, "dual"), "why": "", "wrong": True}
    other = one | {
        "proven": proofs("shrink_gemm") + proofs("dual", dtype="float16"),
        "failed": [wrong],
        "buckets": [bucket(2, "cublas")],
    }
    paths = []
    for name, table in (("a", one), ("b", other)):
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps(table))
    out = tmp_path / "c.json"
    assert command_line.main(["tune", "--merge", *map(str, paths), "--out", str(out)]) == 0
    merged = tables.read_table(out)
    kept = proofs("aten", "cublas", "shrink_gemm") + proofs("dual", dtype="float16")
    assert merged["proven"] == kept
    assert [(b["M"], b["plan"]) for b in merged["buckets"]] == [(1, "dual"), (2, "cublas")]
    with pytest.raises(ValueError, match="gpu: cannot merge G with H"):
        merge(one, other | {"gpu": "H"})


def test_a_wrong_plan_is_struck_out(tmp_path):
    table = Table(tmp_path / "t.json", "G", INFO)
    tiled = Candidate("dual", {"dual": {"bm": 64}})
    one, two, three = (bucket(M, "dual") for M in (1, 2, 3))
    half = three | {"dtype": "float16"}
    table.worked(tiled, one)
    table.worked(tiled, half)
    table.failed(tiled, one, "too large", wrong=False)
    assert table.content["proven"] == proofs("dual") + proofs("dual", dtype="float16")
    assert table.refuses(tiled, one)
    assert not table.refuses(tiled, two)
    table.failed(tiled, two, "wrong")
    table.worked(tiled, two)
    assert table.content["proven"] == proofs("dual", dtype="float16")
    assert table.refuses(Candidate("dual", {}), three)
    assert not table.refuses(Candidate("dual", {}), half)


def test_who_is_told_to_end_blames_no_plan(tmp_path):
    path = tmp_path / "t.json"
    candidate, call = Candidate("dual", {}), bucket(1, "dual")
    table = Table(path, "G", INFO)
    table.trying(candidate, call)
    table.interrupted()
    assert not Table(path, "G", INFO).refuses(candidate, call)
    table.trying(candidate, call)  # and one that hung, or took the process along, is to blame
    assert Table(path, "G", INFO).refuses(candidate, call)


def test_only_what_a_table_lacks_is_compiled(tmp_path):
    path = tmp_path / "t.json"
    cases = [Case(16, 32, 32, 8), Case(16, 32, 32, 8, dropout=0.1)]
    todo = [(base, case) for base in BASES for case in cases]
    assert search.left(todo, path) == todo
    table = Table(path, "G", INFO)
    for op in ("forward", "backward", "add"):
        table.add({**search.key_of(cases[0], op), "plan": "aten"})
    assert search.left(todo, path) == [todo[1], *todo[2:]]
    table.add({**search.key_of(cases[0], "add_backward"), "plan": "aten"})
    assert search.left(todo, path) == [todo[1], todo[3]]


def test_a_lock_is_held_and_goes_stale(tmp_path):
    path = tmp_path / "new" / "t.json"
    with locked(path):
        held = rf"t.json: process {os.getpid()} makes this table"
        with pytest.raises(RuntimeError, match=held), locked(path):
            pass
        lock = path.with_name("t.json.lock")
        old = time.time() - 601
        os.utime(lock, (old, old))
        with locked(path):
            assert lock.read_text() == str(os.getpid())
    assert not lock.exists()


def write(path: Path, M: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"gpu": "A Card", "versions": {"triton": "3"}, "proven": proofs("aten"),
               "buckets": [bucket(M, "aten")]}  # fmt: skip
    path.write_text(json.dumps(content))
    return path


def found_rows() -> int | None:
    backends.forget()
    table = tables.tuned(0)
    return None if table is None else table["buckets"][0]["M"]


def test_the_order_of_tables(gpu, monkeypatch, caplog):
    assert found_rows() is None
    assert "python -m lora_kernels tune" in tables.why_none(0)
    write(gpu / "package" / "a_card.json", 1)
    assert found_rows() == 1
    cached = write(gpu / "cache" / "lora_kernels" / "v1" / "a_card-0123456789ab.json", 2)
    assert tables.cache_path(0) == cached
    assert found_rows() == 2
    given = write(gpu / "given" / "a_card.json", 3)
    monkeypatch.setattr(tables._env, "TUNED", str(given.parent))
    assert found_rows() == 3
    monkeypatch.setattr(tables._env, "TUNED", str(write(gpu / "other.json", 4)))
    assert found_rows() == 4
    monkeypatch.setattr(tables._env, "TUNED", str(gpu / "nowhere"))
    with pytest.raises(ValueError, match=r"LORA_KERNELS_TUNED: no file or folder .*nowhere"):
        found_rows()
    monkeypatch.setattr(tables._env, "TUNED", None)
    cached.write_text("{}")
    assert found_rows() == 1
    (message,) = caplog.messages
    assert str(cached) in message
    assert "tune --force makes it anew" in message


def test_the_key_of_a_table(monkeypatch):
    monkeypatch.setattr(tables, "target", lambda device: (90, 132, 232_448, ""))
    key = tables.key_of.__wrapped__
    first = key(0)
    assert first == key(0)
    assert len(first) == 12
    monkeypatch.setattr(tables, "target", lambda device: (90, 114, 232_448, ""))
    assert key(0) != first
    monkeypatch.undo()
    monkeypatch.setattr(tables, "target", lambda device: (90, 132, 232_448, ""))
    monkeypatch.setattr(tables, "_triton", lambda: "9.9")
    assert key(0) != first


# ------------------------------------------------------------------------------------- tune itself


def test_the_cases_of_a_model():
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 16))
    lora_kernels.apply_lora(model.bfloat16(), 4, dropout=0.1)
    found = cases_of(model, (1, 64), None, None)
    assert found == [
        ("dense", Case(M, K, 16, 4, "bf16", p))
        for M in (1, 64)
        for K in (8, 16)
        for p in (0.1, 0.0)
    ]


def test_the_cases_of_a_peft_model():
    peft = pytest.importorskip("peft")
    model = torch.nn.Sequential(torch.nn.Linear(8, 16))
    config = peft.LoraConfig(r=4, lora_dropout=0.25, target_modules=["0"])
    model = peft.get_peft_model(model, config)
    lora_kernels.fuse_peft(model)
    for given, dtype in ((None, "fp32"), ("fp16", "fp16")):  # its own, or that of autocast
        found = cases_of(model, (64,), None, given)
        assert found == [("dense", Case(64, 8, 16, 4, dtype, p)) for p in (0.25, 0.0)]


def test_bad_arguments(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="there is no GPU here"):
            lora_kernels.tune()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    out = tmp_path / "t.json"
    with pytest.raises(ValueError, match="dtype: got 'int8', legal values are fp32, bf16, fp16"):
        lora_kernels.tune(shapes=[(8, 8, 2)], dtype="int8", out=out)
    with pytest.raises(ValueError, match="rows, shapes: expected sizes of at least 1"):
        lora_kernels.tune(shapes=[(8, 8, 0)], out=out)
    with pytest.raises(ValueError, match="has no LoRA layer; call apply_lora first"):
        lora_kernels.tune(torch.nn.Linear(8, 8), out=out)
    assert not out.exists()


def test_a_worker_that_cannot_begin(tmp_path):
    out = tmp_path / "t.json"
    Table(out, "another card", INFO).write()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        with pytest.raises(RuntimeError, match="the worker ended with 1 twice"):
            lora_kernels.tune(shapes=[(8, 8, 2)], rows=[1], out=out)
    assert not out.with_name("t.json.lock").exists()


def test_reads_that_hide_the_host(monkeypatch):
    """As long as the slowest turn takes to launch, and half as long again."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    seconds = [0.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: seconds[0])

    def turn_of(spent):
        def turn(mark):
            seconds[0] += spent

        return turn

    read = clock._READ_SECONDS
    assert clock._reads_to_hide([turn_of(0.0)]) == 1
    assert clock._reads_to_hide([turn_of(2 * read), turn_of(read)]) == 4
    assert clock._reads_to_hide([turn_of(1.0)]) == clock._MOST_READS


# ----------------------------------------------------------------------------- what users are told


def test_reports_say_what_serves_a_gpu(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    class OnGpu:
        is_cuda, device = True, torch.device("cuda", 0)

    try:
        assert backends.on_gpu([torch.ones(1)]) == ""
        line = backends.on_gpu([torch.ones(1), OnGpu()])
        assert line.startswith("calls on the GPU: reference (ATen")
        assert line.endswith("no tuned table for this GPU (python -m lora_kernels tune makes one))")
        path = write(gpu / "cache" / "lora_kernels" / "v1" / "a_card-0123456789ab.json", 2)
        backends.forget()
        assert backends.on_gpu([OnGpu()]) == "calls on the GPU: cuda (tuned table of this GPU)"
        assert str(path) in tables.describe(0)[0]
    finally:
        backends._default.cache_clear()
    report = lora_kernels.apply_lora(torch.nn.Sequential(torch.nn.Linear(8, 8)), 2)
    assert "calls on the GPU" not in str(report)
    report.gpu = "calls on the GPU: x"
    assert "calls on the GPU: x" in str(report).splitlines()


@pytest.mark.parametrize(
    ("setting", "rank", "spawned"), [("check", None, 1), ("check", "0", 0), ("hint", None, 0)]
)
def test_a_check_runs_beside_the_first_process(gpu, monkeypatch, setting, rank, spawned):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(tables._env, "TUNE", setting)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    commands = []

    def popen(command, env, **options):
        assert env["LORA_KERNELS_TUNE"] == "off", "it would spawn another one"
        assert options["start_new_session"], "it outlives this process"
        commands.append(command)

    monkeypatch.setattr(background.subprocess, "Popen", popen)
    backends._default.cache_clear()
    try:
        for _ in range(2):
            assert backends.choose("cuda:0").name == "reference"
    finally:
        backends._default.cache_clear()
    assert len(commands) == spawned
    for command in commands:
        assert command[-len(background.COMMAND) :] == list(background.COMMAND)


def test_the_command_that_is_spawned_is_one(capsys):
    """There is no GPU for it here, which it says."""
    if torch.cuda.is_available():
        pytest.skip("it would tune")
    assert command_line.main(list(background.COMMAND[2:])) == 1
    assert "there is no GPU here" in capsys.readouterr().err


def test_a_second_process_uses_the_table(tmp_path):
    """Found by the variable, and by the cache folder: the plan of a call of a "GPU"."""
    name = "a_card.json"
    path = write(tmp_path / "given" / name, 16)
    table = json.loads(path.read_text())
    table["proven"] = proofs("dual", dtype="float32")
    table["buckets"] = [bucket(16, "dual", dtype="float32")]
    path.write_text(json.dumps(table))
    code = (
        "import torch; torch.cuda.get_device_name = lambda index=None: 'A Card'\n"
        "from lora_kernels.backends.cuda import choice, tables\n"
        "from lora_kernels.backends.cuda.plan import Call\n"
        "tables._triton = lambda: '3'; tables.key_of = lambda index: 'k'\n"
        "call = Call('forward', 'float32', 16, 8, 8, 8, False)\n"
        "print(choice.choose(call, torch.device('cuda', 0)).plan)"
    )

    def plan(**variables: str) -> str:
        path = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT)])
        environment = os.environ | {"PYTHONPATH": path, "TRITON_INTERPRET": "1", **variables}
        command = [sys.executable, "-c", code]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    empty = str(tmp_path / "empty")
    assert plan(XDG_CACHE_HOME=empty) == "aten"
    assert plan(XDG_CACHE_HOME=empty, LORA_KERNELS_TUNED=str(path)) == "dual"
    assert plan(XDG_CACHE_HOME=empty, LORA_KERNELS_TUNED=str(path.parent)) == "dual"
    cached = tmp_path / "cache" / "lora_kernels" / "v1" / "a_card-k.json"
    cached.parent.mkdir(parents=True)
    cached.write_text(path.read_text())
    assert plan(XDG_CACHE_HOME=str(tmp_path / "cache")) == "dual"


FAST = """
def slow(*args):
    time.sleep(0.05)
    return reference.forward(*args[:-1])

plans.PLANS["aten"] = replace(plans.PLANS["aten"], forward=Pass(slow))
"""


def test_what_tune_made_serves_a_second_process(tmp_path):
    """From the command to the choice: a plan of a plugin that was faster than ATen, which here
    waits, is taken by a fresh interpreter, until the plan's source is another."""
    plugin = stand_in(tmp_path, "fast")
    plugin.write_text(plugin.read_text() + FAST)
    path = tmp_path / "tuned.json"
    tune(path, "--dtype", "fp32", "--no-backward", plugins=tmp_path)
    code = (
        "import torch; torch.cuda.get_device_name = lambda index=None: 'A Card'\n"
        "import standin\n"
        "from lora_kernels.backends.cuda import choice, tables\n"
        "from lora_kernels.backends.cuda.plan import Call\n"
        "tables.key_of = lambda index: 'k'\n"
        "for M, dropout in ((16, False), (24, False), (16, True)):\n"
        "    call = Call('forward', 'float32', M, 32, 32, 8, dropout)\n"
        "    print(choice.choose(call, torch.device('cuda', 0)).plan)"
    )
    folders = [*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders)}
    environment |= {"TRITON_INTERPRET": "1", "LORA_KERNELS_TUNED": str(path)}

    def plans_of() -> list[str]:
        command = [sys.executable, "-c", code]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        return done.stdout.split()

    assert plans_of() == ["fast", "fast", "aten"]
    plugin.write_text(plugin.read_text().replace("y * 1.01", "y * 1.02"))
    assert plans_of() == ["aten"] * 3


def test_an_unseen_kind_is_proven_by_the_command_itself(gpu, tmp_path, monkeypatch):
    """LORA_KERNELS_TUNE=auto, against the stand-in: the worker's candidates, the table, the choice
    of this process."""
    plugin = stand_in(tmp_path, "fast")
    plugin.write_text(plugin.read_text() + FAST)
    cached = gpu / "cache" / "lora_kernels" / "v1" / "a_card-0123456789ab.json"
    real = unseen.command

    def command(call, minutes):
        return (*real(call, minutes), "--out", str(cached), "--no-backward", "--rounds", "1", "2",
                "--seconds", "0", "--plugins", "standin")  # fmt: skip

    monkeypatch.setattr(unseen, "command", command)
    monkeypatch.setattr(unseen._env, "TUNE", "auto")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda index: None)
    monkeypatch.setattr(tables, "_triton", lambda: importlib.metadata.version("triton"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(tmp_path)]))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    call = Call("forward", "float32", 14, 32, 32, 8, False)
    monkeypatch.setitem(PLANS, "fast", replace(PLANS["aten"], name="fast"))
    monkeypatch.setattr(tables, "changed_plans", lambda table: ())  # it is not the plugin's file
    assert choice.choose(call, torch.device("cuda", 0)).plan == "fast"
    (found,) = [b for b in tables.tuned(0)["buckets"] if b["op"] == "forward" and not b["dropout"]]
    assert (found["M"], found["plan"], found["variants"]) == (16, "fast", False)
