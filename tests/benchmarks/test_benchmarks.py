"""The benchmark scripts at tiny sizes: their files, their arithmetic of flops, bytes, ratios."""

import copy
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("peft")
pytest.importorskip("matplotlib")
from benchmarks import (
    dora,
    gpu_day,
    grouped,
    layer,
    native,
    peers,
    quantized,
    report,
    shapes,
    store,
)
from benchmarks.peers import ADDMM, FROZEN, OURS, PEFT, PEFT_COMPILED, UNFUSED
from lora_kernels.backends.native import extension
from lora_kernels.testing import NAMES, Case, WrongResult, expected, problem
from lora_kernels.tuning import clock

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
CASE = Case(24, 40, 56, 8, "fp32")


def python(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", **variables}
    environment["PYTHONSAFEPATH"] = "1"  # the folder that it runs in comes not before the path
    environment.pop("PYTEST_XDIST_WORKER", None)  # pytest-benchmark measures nothing beside it
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


# --------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize(("name", "adapter"), [(UNFUSED, True), (FROZEN, False)])
def test_flops_are_those_that_torch_counts(name, adapter):
    p = problem(CASE, CPU)
    peer = peers.build(name, p)
    with FlopCounterMode(display=False) as counter:
        y = peer.layer(p.x)
        forward = counter.get_total_flops()
        y.backward(p.dy)
    both = counter.get_total_flops()
    assert shapes.flops(CASE, "forward", adapter) == forward
    assert shapes.flops(CASE, "backward", adapter) == both - forward
    assert shapes.flops(CASE, "both", adapter) == both


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_bytes_are_those_of_the_tensors(dtype):
    case = CASE._replace(dtype=dtype)
    p = problem(case, CPU)
    y, dx, d_a, d_b = peers.build(OURS, p).results(p)
    s = p.x @ p.a.t()
    frozen = (p.x, p.weight, y)
    forward = (*frozen, p.a, p.b, s)
    backward = (p.dy, p.weight, p.a, p.b, s, p.x, dx, d_a, d_b)
    for which, adapter, tensors in (
        ("forward", False, frozen),
        ("forward", True, forward),
        ("backward", False, (p.dy, p.weight, dx)),
        ("backward", True, backward),
        ("both", True, (*forward, *backward)),
    ):
        assert shapes.least_bytes(case, which, adapter) == sum(t.nbytes for t in tensors), which


def test_ratios_are_medians_of_pairs():
    # Medians 4 and 2, but paired ratios 2, 2 and 9.
    assert clock.summary([2.0, 4.0, 9.0], [1.0, 2.0, 1.0]) == {
        "ms": 4000.0, "ratio": 2.0, "p20": 2.0, "p80": 6.2,
    }  # fmt: skip


def test_turns_are_interleaved_and_timed_by_part():
    calls = []

    def turn_of(name):
        def turn(mark):
            calls.append(name)
            mark()
            mark()

        return turn

    times = clock.interleaved({n: turn_of(n) for n in "ab"}, CPU, 0.0, (3, 9))
    assert calls == ["a", "b"] * 4  # once to warm up
    assert {name: [len(part) for part in parts] for name, parts in times.items()} == {
        "a": [2, 2, 2],
        "b": [2, 2, 2],
    }


def test_the_cells():
    grid = shapes.grid()
    assert len(set(grid)) == len(grid) == len(shapes.weights()) * 6 * 4 * 2
    headline = [shapes.is_headline(case) for case in grid]
    assert headline == sorted(headline, reverse=True)
    assert sum(headline) == 2 * len(shapes.weights(("Llama-3-8B", "Llama-3-70B")))
    assert len(shapes.named_cells()) == 12
    assert len(shapes.lorafusion()) == 9
    assert shapes.names(14336, 4096) == "Llama-3-8B gate, up"


# --------------------------------------------------------------------------------------------- gate


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_right_peers_pass_the_gate(dtype, dropout):
    p = problem(CASE._replace(dtype=dtype, dropout=dropout), CPU)
    for name in (FROZEN, UNFUSED, ADDMM, PEFT, peers.PEFT_FP32, OURS, peers.OURS_FP32):
        layer.is_right(name, peers.build(name, p), p)


@pytest.mark.parametrize("index", range(4))
def test_a_wrong_output_does_not(index):
    p = problem(CASE, CPU)
    outs = peers.build(OURS, p).results(p)
    outs[index] = outs[index] * 1.0001
    with pytest.raises(WrongResult, match=f"ours: {NAMES[index]} has error"):
        expected(p).require("ours", outs)


def test_another_dropout_mask_does_not():
    p = problem(CASE._replace(dropout=0.25), CPU)
    seed = layer.drawn_seed(CPU)
    with pytest.raises(WrongResult):
        expected(p, seed + 1).require(OURS, peers.build(OURS, p).results(p))


def test_a_wrong_peer_is_not_timed(monkeypatch):
    build = peers.build

    def wrong(name, p):
        peer = build(name, p)
        if name == OURS:
            peer.adapters[0].data.mul_(1.01)
        return peer

    monkeypatch.setattr(peers, "build", wrong)
    rows = layer.rows_of(layer.Job("cpu", CASE, (FROZEN, ADDMM, OURS)), 0.0, (1, 1), CPU)
    assert [row["peer"] for row in rows if "both" in row] == [FROZEN, ADDMM]
    assert rows[-1]["refused"].startswith("WrongResult: lora_kernels: y has error")


# -------------------------------------------------------------------------------- files and reports


def test_layer_benchmark_and_report(tmp_path, capsys):
    out = tmp_path / "results" / "layer-cpu.json"
    arguments = ["--scale", "64", "--seconds", "0", "--rounds", "2", "2", "--device", "cpu",
                 "--dtypes", "fp32", "--out", str(out)]  # fmt: skip
    # A compiler may be missing; then that peer is reported and not timed.
    assert layer.main(arguments) == 0
    first = json.loads(out.read_text())
    assert set(first["machine"]) >= {"cpu", "threads", "gpu", "versions", "commit"}
    rows = [row for row in first["rows"] if row["table"] == "cpu"]
    expected = [job for job in layer.cpu_jobs() if job.case.dtype == "fp32"]
    assert len(rows) == sum(len(job.peers) for job in expected)
    for row in rows:
        if row["peer"] == PEFT_COMPILED and "refused" in row:
            continue
        assert row["peak_mib"] > 0
        for which in shapes.PASSES:
            assert row[which]["p20"] <= row[which]["ratio"] <= row[which]["p80"]
            if row["peer"] == FROZEN:
                assert row[which]["ratio"] == 1
    assert layer.main([*arguments, "--minutes", "0"]) == 0
    assert json.loads(out.read_text()) == first

    page = tmp_path / "performance.md"
    page.write_text("a\n<!-- bench:cpu -->\nold\n<!-- /bench:cpu -->\nb\n"
                      "<!-- bench:gpu --><!-- /bench:gpu -->\nc\n")  # fmt: skip
    command = ["--results", str(out.parent), "--page", str(page)]
    report.main(command)
    text = page.read_text()
    assert text.startswith("a\n<!-- bench:cpu -->\n\nForward and backward")
    assert text.endswith("b\n<!-- bench:gpu -->\n\nNot measured yet.\n\n<!-- /bench:gpu -->\nc\n")
    assert "old" not in text
    assert text.count("| fp32 |") == len(expected)
    report.main(command)
    assert page.read_text() == text
    for name in ("ratio", "roofline"):
        assert (out.parent / f"layer-cpu-{name}.png").stat().st_size > 10_000
    page.write_text("no markers")
    with pytest.raises(ValueError, match="page: expected one <!-- bench:cpu -->"):
        report.main(command)
    assert page.read_text() == "no markers"


@pytest.mark.skipif(not extension.available(), reason=extension.status())
def test_native_benchmark_and_report(tmp_path, capsys):
    out = tmp_path / "native-cpu.json"
    native.main([
        "--scale", "64", "--rows", "1", "4", "--seconds", "0", "--rounds", "2", "2",
        "--dtypes", "fp32", "bf16", "--calls", "2", "--out", str(out),
    ])  # fmt: skip
    result = json.loads(out.read_text())
    cells = 2 * 2 * len(native.WIDTHS) * len(native.MODES)
    assert len(result["rows"]) == result["figures"][-1]["cells"] == cells
    assert all(row[FROZEN]["ratio"] == 1 for row in result["rows"])
    one = result["figures"][0]
    some = [r for r in result["rows"] if (r["dtype"], r["mode"]) == (one["dtype"], one["mode"])]
    ratios = [native.better(row) for row in some]
    assert one["worst"] == pytest.approx(max(ratios), abs=1e-3)
    assert min(ratios) < one["better"] < max(ratios)
    page = tmp_path / "performance.md"
    report.main(["--results", str(tmp_path), "--page", str(page)])
    text = page.read_text()
    assert f"| all | all | {cells} | " in text
    assert "| lora_kernels, one row | " in text
    assert (tmp_path / "native-cpu-grid.png").stat().st_size > 10_000


def test_grouped_benchmark_and_report(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(grouped, "WIDTHS", (24, 16))
    monkeypatch.setattr(grouped, "TOKENS", 24)
    monkeypatch.setattr(grouped, "EXPERT_WIDTHS", (16, 24))
    out = tmp_path / "grouped-cpu.json"
    arguments = ["--rows", "16", "512", "--tenants", "1", "4", "--dtypes", "fp32", "bf16"]
    arguments += ["--experts", "4", "8"]
    grouped.main([*arguments, "--seconds", "0", "--rounds", "1", "1", "--out", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 2 * (2 * 2 + 2 * 2 + 2 * 2 * 2)
    assert all(grouped.LOOP in row and grouped.GROUPED_MM in row for row in rows)
    assert all(row[grouped.ONE]["ratio"] == 1 for row in rows if row["kind"] == "tenants")
    page = tmp_path / "performance.md"
    report.main(["--results", str(tmp_path), "--page", str(page)])
    text = page.read_text()
    assert "| fp32 | 512 | 8 | 4 | both | " in text
    assert "| bf16 | 4 | 64 | " in text


def test_quantized_benchmark_and_report(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quantized, "SHAPES", ((48, 128),))
    monkeypatch.setattr(quantized, "MOST_LAYERS", 2)
    monkeypatch.setattr(quantized, "TRAINED", 20)
    out = tmp_path / "quantized-cpu.json"
    arguments = ["--seconds", "0", "--rounds", "1", "1", "--kinds", "int8", "nf4", "fp8"]
    quantized.main([*arguments, "--out", str(out)])
    rows = json.loads(out.read_text())["quantized"]
    assert len(rows) == 2 * (len(quantized.DECODED) + 1)
    assert all(row[quantized.DENSE]["ratio"] == 1 for row in rows if row["trains"])
    assert all(row[quantized.FROZEN]["ratio"] == 1 for row in rows if not row["trains"])
    assert rows[0]["layers"] == 2
    page = tmp_path / "performance.md"
    report.main(["--results", str(tmp_path), "--page", str(page)])
    text = page.read_text()
    assert "| dtype | N × K | rows | frozen | LoRA | int8 | nf4 | fp8 |" in text
    assert "| bf16 | 48 × 128 | 16 | " in text
    capsys.readouterr()
    quantized.main([*arguments[:5], "--few", "--dtypes", "fp32", "--kinds", "nf4"])
    assert "fp32 nf4 (48, 128)  1: " in capsys.readouterr().out


def test_dora_benchmark_and_report(tmp_path, monkeypatch, capsys):
    for name, value in (("N", 48), ("K", 32), ("TRAINED", 20)):
        monkeypatch.setattr(dora, name, value)
    out = tmp_path / "dora-cpu.json"
    dora.main(["--seconds", "0", "--rounds", "1", "1", "--out", str(out)])
    assert "bf16, adapter fp32, dropout 0.1, 20 rows: frozen " in capsys.readouterr().out
    rows = json.loads(out.read_text())["dora"]
    assert len(rows) == 9
    assert all(row[dora.LORA]["ratio"] == 1 for row in rows)
    page = tmp_path / "performance.md"
    report.main(["--results", str(tmp_path), "--page", str(page)])
    assert "| dtype | adapter | rows | dropout | LoRA | frozen | DoRA | PEFT's DoRA |" in (
        page.read_text()
    )


def test_time_over_leaves_cases(tmp_path, capsys):
    arguments = ["--scale", "64", "--device", "cpu", "--dtypes", "fp32", "--minutes", "0"]
    assert layer.main([*arguments, "--out", str(tmp_path / "a.json")]) == 0
    assert "time is over with 6 cases left" in capsys.readouterr().out


def test_results_of_another_machine_are_set_aside(tmp_path, capsys):
    path = tmp_path / "layer.json"
    store.Results(path, {"commit": "a"}).add([{"table": "cpu"}])
    assert store.Results(path, {"commit": "a"}).done({"table": "cpu"})
    assert not store.Results(path, {"commit": "b"}).done({"table": "cpu"})
    assert json.loads((tmp_path / "layer.1.json").read_text())["machine"] == {"commit": "a"}
    assert not path.exists()


def _row(table, case, peer, ratio, milliseconds=1.0):
    figures = {"ms": milliseconds, "ratio": ratio, "p20": ratio, "p80": ratio}
    passes = {"forward": figures, "backward": figures, "both": figures}
    return {"table": table, **case._asdict(), "peer": peer, "peak_mib": 1, **passes}


def test_gpu_tables(tmp_path):
    headline = [case for case in shapes.grid() if shapes.is_headline(case)][:2]
    published = shapes.lorafusion()[0]
    decode = shapes.decode()[0]
    rows = [
        *(_row("headline", case, peer, ratio)
          for case, ours in zip(headline, (1.0, 1.21), strict=True)
          for peer, ratio in ((FROZEN, 1.0), (ADDMM, 1.2), (OURS, ours))),
        *(_row("lorafusion", published, peer, 1.0, ms)
          for peer, ms in ((FROZEN, 1.0), (UNFUSED, 3.0), (OURS, 2.0))),
        *(_row("decode", decode, peer, ratio, 0.01)
          for peer, ratio in ((FROZEN, 1.0), (OURS, 1.1))),
    ]  # fmt: skip
    info = {"gpu": "Test", "cpu": "c", "python": "3", "versions": {}, "commit": "x"}
    (tmp_path / "layer-gpu.json").write_text(json.dumps({"machine": info, "rows": rows}))
    (tmp_path / "other.json").write_text(json.dumps({"rows": [{"peer": "x"}]}))
    page = tmp_path / "report.md"
    report.main(["--results", str(tmp_path), "--page", str(page)])
    text = page.read_text()
    assert "| 0 | both | 1.200× | 1.100× |" in text  # geometric mean of 1 and 1.21
    assert "in 1 of 2 cells" in text
    assert "an H100): mean 1.50×" in text
    assert f"| {4096 * 4096 * 2 / 1e-5 / 1e9:.0f} | 1.10× |" in text
    assert "<!-- bench:cpu -->\n\nNot measured yet.\n\n<!-- /bench:cpu -->" in text
    assert (tmp_path / "layer-gpu-decode.png").exists()


# ----------------------------------------------------------------------- the day, models, micro


def test_gpu_day_keeps_to_its_budget_and_goes_on(tmp_path, monkeypatch, capsys):
    marks = tmp_path / "marks"
    write = f"open({str(marks)!r}, 'a').write"

    def step(name, code, until, **options):
        return gpu_day.Step({name: [sys.executable, "-c", code]}, until, **options)

    # Each of these two waits until the other has begun.
    meet = (
        "import pathlib, sys, time; here, there = map(pathlib.Path, sys.argv[1:]); here.touch()\n"
        "while not there.exists(): time.sleep(0.01)"
    )
    doors = [str(tmp_path / name) for name in ("left", "right")]
    pair = {
        side: [sys.executable, "-c", meet, *doors[::turn]]
        for side, turn in (("left", 1), ("right", -1))
    }
    stopping = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: ({}, sys.exit()))"
    planned = [
        step("once", f"{write}('o')", 0.9, once=True),
        gpu_day.Step(
            {**pair, "lame": [sys.executable, "-c", "raise SystemExit(4)"]}, 0.9, once=True
        ),
        step("late", f"{write}('never')", 0.0),
        step("dies", f"{write}('d'); raise SystemExit(3)", 0.9, tries=2),
        step("slow", stopping.format(f"{write}('s')") + f"; {write}('(')\nwhile True: pass", 0.95),
        step("last", f"{write}('l')", 1.0),
    ]

    class Popen(subprocess.Popen):
        def wait(self, timeout=None):
            (until,) = [s.until for s in planned if self.args in s.commands.values()]
            if timeout is not None and timeout > gpu_day._GRACE:
                assert timeout <= 60 * until
                if "while True" in self.args[-1]:
                    while not marks.read_text().endswith("("):
                        time.sleep(0.01)
                    raise subprocess.TimeoutExpired(self.args, timeout)
            return super().wait(timeout)

    monkeypatch.setattr(subprocess, "Popen", Popen)
    monkeypatch.setattr(gpu_day, "steps", lambda out, gpu: planned)
    monkeypatch.setattr(gpu_day, "has_gpu", lambda: False)
    command = ["--minutes", "1", "--out", str(tmp_path)]
    assert gpu_day.main(command) == 1
    said = capsys.readouterr().out
    assert marks.read_text() == "odd(sl"
    assert "late: no time left" in said
    assert "left: ok" in said
    assert "right: ok" in said
    assert "lame: exit status 4" in said
    assert "slow: stopped: its time was over" in said
    assert json.loads((tmp_path / "day.json").read_text())["dies"]["status"] == 3
    assert gpu_day.main(command) == 1
    said = capsys.readouterr().out
    assert all(f"{name}: done before" in said for name in ("once", "left", "right"))
    assert "lame: exit status 4" in said
    assert marks.read_text() == "odd(sl" + "dd(sl"
    del planned[2:5]
    planned[1].commands.pop("lame")
    assert gpu_day.main(command) == 0
    planned.append(step("slow", "", 0.0))  # stopped in an earlier call
    assert gpu_day.main(command) == 1


def test_gpu_day_travels_in_one_file(tmp_path, monkeypatch, capsys):
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'a').write('x')"
    step = gpu_day.Step({"once": [sys.executable, "-c", code]}, 0.9, once=True)
    monkeypatch.setattr(gpu_day, "steps", lambda out, gpu: [step])
    monkeypatch.setattr(gpu_day, "has_gpu", lambda: False)
    state = tmp_path / "day.tar.gz"
    for folder in ("here", "there"):  # a fresh machine the second time
        out = str(tmp_path / folder)
        assert gpu_day.main(["--minutes", "1", "--out", out, "--state", str(state)]) == 0
    assert ran.read_text() == "x"
    assert "once: done before" in capsys.readouterr().out
    assert (tmp_path / "there" / "log.txt").exists()


def test_gpu_day_dry_run(tmp_path, capsys):
    assert gpu_day.main(["--minutes", "9", "--out", str(tmp_path), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    scripts = (
        "pytest -q -m gpu",
        "lora_kernels tune",
        "benchmarks.layer",
        "benchmarks.model",
        "benchmarks.report",
    )
    order = [next(i for i, line in enumerate(lines) if name in line) for name in scripts]
    assert order == sorted(order)
    assert not list(tmp_path.iterdir())
    for gpu in (True, False):
        ends = [step.until for step in gpu_day.steps(tmp_path, gpu)]
        assert ends == sorted(ends)
        assert ends[-1] == 1


def test_model_benchmark(tmp_path, capsys):
    model = pytest.importorskip("benchmarks.model")
    out = tmp_path / "model-cpu.json"
    arguments = ["--size", "smoke", "--dtype", "bf16", "--seconds", "0", "--rounds", "1", "1",
                 "--new-tokens", "2", "--out", str(out)]  # fmt: skip
    model.main(arguments)
    rows = json.loads(out.read_text())["rows"]
    names = [FROZEN, peers.PEFT_FP32, peers.OURS_FP32, PEFT, OURS, peers.BLOCKS]
    assert [row["peer"] for row in rows] == names * 2
    assert all(row["calls"] > 100 for row in rows)
    for row in rows:
        tokens = 2 if row["table"] == "generate" else 8
        # Rounded to hundredths.
        assert row["tokens_s"] == pytest.approx(1e3 * tokens / row["ms"], rel=1e-3, abs=0.006)
        assert row["peak_mib"] > 0
    model.main(arguments)
    assert len(json.loads(out.read_text())["rows"]) == len(rows)


def test_host_benchmark_and_report(tmp_path, monkeypatch):
    host = pytest.importorskip("benchmarks.host")
    monkeypatch.setattr(host, "FEW", 1)
    monkeypatch.setattr(host, "MANY", 2)
    host.main(["--seconds", "0", "--rounds", "1", "--out", str(tmp_path / "host-cpu.json")])
    rows = {
        row["peer"]: row for row in json.loads((tmp_path / "host-cpu.json").read_text())["rows"]
    }
    assert list(rows) == [FROZEN, PEFT, OURS, peers.BLOCKS]
    for what in host.PASSES:
        calls = [row[f"{what}_calls"] for row in rows.values()]
        assert calls[0] == min(calls)
        assert calls[2] < calls[1]
    page = tmp_path / "report.md"
    report.main(["--results", str(tmp_path), "--page", str(page)])
    (line,) = [one for one in page.read_text().splitlines() if one.startswith(f"| {OURS} |")]
    assert line.split(" | ")[2] == f"{rows[OURS]['forward_calls']:.0f}"


def test_model_gate_sees_a_wrong_adapter():
    model = pytest.importorskip("benchmarks.model")
    base = model.base_model("smoke", torch.float32, CPU)
    models = {PEFT: model.make_peft(base, fp32=False), OURS: model.make_ours(base, fp32=False)}
    model.equalise(list(models.values()))
    ids = torch.randint(64, (1, 8))
    for wrong in (OURS, peers.BLOCKS):
        models[peers.BLOCKS] = copy.deepcopy(models[OURS])
        model.gate(models, ids)
        changed = next(iter(model.adapters(models[wrong]).values()))
        changed.data.mul_(1.01)
        with pytest.raises(WrongResult, match=wrong):
            model.gate(models, ids)
        changed.data.div_(1.01)


def test_micro_suite(tmp_path):
    pytest.importorskip("pytest_benchmark")
    out = tmp_path / "micro.json"
    python("-m", "pytest", "-q", "benchmarks", "--benchmark-only", "-k", "host", "-p", "no:xdist",
           "--benchmark-max-time=0.02", "--benchmark-min-rounds=2",
           f"--benchmark-json={out}")  # fmt: skip
    found = json.loads(out.read_text())["benchmarks"]
    assert len({entry["group"] for entry in found}) == 2
    for entry in found:
        assert 0 < entry["stats"]["median"] < 0.1
    assert len(found) == 8
