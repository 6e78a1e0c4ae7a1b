"""What a table's machine code is made of: whose change takes which plans out of use."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from lora_kernels import backends
from lora_kernels.backends.cuda import sources, tables
from lora_kernels.backends.cuda.plan import Call
from lora_kernels.backends.cuda.plans import PLANS

ROOT = Path(__file__).parents[2]
CACHES = (sources._parsed, sources.of_plan, sources.csrc, sources.files, sources.ptxas)
OF_TRITON = set(PLANS) - {"aten", "decode_cuda"}


def forget() -> None:
    for cached in (*CACHES, tables.key_of):
        cached.cache_clear()


@pytest.fixture
def copied(monkeypatch, tmp_path):
    """Has the sources read from a copy, which is returned."""
    for folder in ("lora_kernels/backends", "csrc/cuda"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    monkeypatch.setattr(sources, "_PACKAGE", tmp_path / "lora_kernels")
    monkeypatch.setattr(tables, "target", lambda device: (90, 132, 232_448, ""))
    forget()
    yield tmp_path
    forget()


def change(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    forget()


BACKENDS = "lora_kernels/backends"


@pytest.mark.parametrize(
    ("file", "old", "new", "plans"),
    [
        (f"{BACKENDS}/triton/gemm.py", "\n@triton.jit", "\n# Why.\n\n@triton.jit", set()),
        (f"{BACKENDS}/triton/gemm.py", '    """', '    """Another word. ', set()),
        (f"{BACKENDS}/triton/many.py", "tl.float32", "tl.float64", set()),
        (f"{BACKENDS}/triton/tiles.py", "\nclass ", "\ndef unused(): ...\n\n\nclass ", set()),
        (f"{BACKENDS}/triton/specialised.py", "SEPARATE_RANK = 16", "SEPARATE_RANK = 8", {"gluon"}),
        (
            f"{BACKENDS}/triton/reduce.py",
            "_LANES = 8",
            "_LANES = 16",
            OF_TRITON - {"decode_coded"},
        ),
        (
            f"{BACKENDS}/triton/decoding.py",
            "_STAGES = 64, 32, 3",
            "_STAGES = 64, 32, 2",
            {"decode_coded"},
        ),
        (
            f"{BACKENDS}/dropout.py",
            "def threshold(p: float",
            "def threshold(p: float, q=0",
            OF_TRITON,
        ),
        (
            f"{BACKENDS}/scaling.py",
            "dtype: torch.dtype)",
            "dtype: torch.dtype, q=0)",
            OF_TRITON | {"decode_cuda"},
        ),
        (f"{BACKENDS}/cuda/plans/aten.py", "if out is not", "if out is", {"aten", "decode_cuda"}),
        ("csrc/cuda/decode.cuh", "\n", "\n\n", {"decode_cuda"}),
    ],
)
def test_a_change_takes_the_plans_out_that_it_reaches(copied, file, old, new, plans):
    before, key = sources.of_plans(), tables.key_of(0)
    assert sources.changed(PLANS, before) == ()
    change(copied / file, old, new)
    assert set(sources.changed(PLANS, before)) == plans
    # A user's table costs three minutes: its key is of the files as they are.
    assert tables.key_of(0) != key


@pytest.mark.parametrize("file", ["cuda/launches.py", "scaling.py", "dropout.py"])
def test_the_key_is_of_files_beside_the_kernels(copied, file):
    key = tables.key_of(0)
    change(copied / BACKENDS / file, "\n", "\n# more\n")
    assert tables.key_of(0) != key


def test_where_csrc_did_not_come_along(copied):
    """In a wheel the library stands for it in the key, and its tables were checked before."""
    before = sources.of_plans()
    shutil.rmtree(copied / "csrc")
    forget()
    key = tables.key_of(0)
    assert sources.csrc() is None
    assert sources.changed(PLANS, before) == ()
    (copied / "lora_kernels" / "_native_cuda.abi3.so").write_bytes(b"built")
    forget()
    assert tables.key_of(0) != key


def test_the_assembler_that_triton_finds(copied, monkeypatch):
    for name in ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH"):
        monkeypatch.delenv(name, raising=False)
    assert sources.ptxas() == sources.PTXAS
    key = tables.key_of(0)
    tool = copied / "ptxas"
    tool.write_text("#!/bin/sh\necho ptxas: assembler\necho Build cuda_12.9.r12.9/compiler.1\n")
    os.chmod(tool, 0o755)
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(tool))
    forget()
    assert sources.ptxas() == "Build cuda_12.9.r12.9/compiler.1"
    assert tables.key_of(0) != key
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(copied / "none"))
    forget()
    assert sources.ptxas() == sources.PTXAS  # which Triton falls back to


def test_the_tables_that_ship_are_of_these_kernels():
    """A kernel of theirs that has changed is tuned again, or shown to be the same machine code:
    `python -m lora_kernels.tuning.stamp` says how."""
    paths = sorted(tables.TUNED.glob("*.json"))
    assert paths
    for path in paths:
        table = tables.read_table(path)
        plans = {entry["plan"] for entry in table["proven"]}
        assert plans <= set(table["kernels"]), path.name
        assert sources.changed(sorted(plans), table["kernels"] | {"files": ""}) == (), path.name


@pytest.fixture
def packaged(gpu):
    """A table of the package with all that it is made of, one proof of which is out of date."""
    content = {
        "gpu": "A Card",
        "versions": {"triton": "3"},
        "kernels": sources.of_plans() | {"files": "", "dual": "before"},
        "proven": [tables.proof(plan, "bfloat16", False) for plan in ("aten", "dual", "flag")],
        "buckets": [],
    }
    path = gpu / "package" / "a_card.json"
    path.parent.mkdir()
    path.write_text(json.dumps(content))
    return path


def test_what_has_changed_since_is_passed_over(packaged):
    assert [entry["plan"] for entry in tables.tuned(0)["proven"]] == ["aten", "flag"]
    (line,) = (line for line in tables.describe(0) if line.startswith("passed over"))
    assert line.startswith("passed over: dual: its kernels have changed since")
    # A table that does not say what it was made of is taken at its word.
    content = json.loads(packaged.read_text())
    del content["kernels"]
    packaged.write_text(json.dumps(content))
    backends.forget()
    assert len(tables.tuned(0)["proven"]) == 3


def test_a_table_of_another_assembler(packaged):
    packaged.write_text(json.dumps(json.loads(packaged.read_text()) | {"ptxas": "Build x"}))
    assert tables.tuned(0) is None
    assert f"is of ptxas Build x, this is {sources.PTXAS}" in tables.why_none(0)


def test_the_stamp_of_equal_code(packaged, monkeypatch, capsys):
    stamp = pytest.importorskip("lora_kernels.tuning.stamp")
    monkeypatch.setattr(stamp, "INTERPRETED", False)
    monkeypatch.setattr(stamp.triton, "__version__", "3")
    monkeypatch.setattr(stamp, "digests", lambda asked, tree: {"dual": "now"})
    before, text = {"dual": "then"}, packaged.read_text()
    monkeypatch.setattr(stamp, "_digests_at", lambda commit, asked: before)
    command = ["--before", "a-commit", str(packaged)]
    assert stamp.main(command) == 1
    assert "other code: dual" in capsys.readouterr().out
    assert tables.changed_plans(tables.read_table(packaged)) == ("dual",)
    before["dual"] = "now"
    assert stamp.main(command) == 0
    kernels = tables.read_table(packaged)["kernels"]
    assert kernels == sources.of_plans()
    assert tables.read_table(packaged)["proven"] == json.loads(text)["proven"]


def test_the_stamp_asks_for_the_table_s_triton(packaged, monkeypatch, capsys):
    stamp = pytest.importorskip("lora_kernels.tuning.stamp")
    monkeypatch.setattr(stamp, "INTERPRETED", False)
    monkeypatch.setattr(stamp.triton, "__version__", "4")
    with pytest.raises(SystemExit):
        stamp.main(["--before", "a-commit", str(packaged)])
    assert "the table is of Triton 3, this is 4" in capsys.readouterr().err


def test_calls_that_are_compiled():
    stamp = pytest.importorskip("lora_kernels.tuning.stamp")
    path = tables.TUNED / "nvidia_h200.json"
    table = tables.read_table(path)
    found = list(stamp.calls(table, "shrink_gemm"))
    taken = [b for b in table["buckets"] if b["plan"] == "shrink_gemm" and "tiles" in b]
    assert [tiles for _, tiles in found if tiles] == [bucket["tiles"] for bucket in taken]
    assert not torch.cuda.is_initialized()
    assert list(stamp.calls(table, "decode_cuda")) == []


def test_what_plans_launch_is_told_without_a_gpu(tmp_path):
    """Of two trees: where a kernel stands is nothing, what it computes is."""
    stamp = pytest.importorskip("lora_kernels.tuning.stamp")
    shutil.copytree(ROOT / "lora_kernels", tmp_path / "lora_kernels")
    change(tmp_path / BACKENDS / "triton/low_rank.py", "\n@triton.jit", "\n# Why.\n\n@triton.jit")
    change(tmp_path / BACKENDS / "triton/dual.py", "x_tile.T, low,", "x_tile.T, low + low,")
    call = Call("forward", "bfloat16", 2, 64, 64, 16, False)
    asked = [("cublas", call, {}), ("decode", call, {})]
    here, there = (stamp.digests(asked, tree) for tree in (ROOT, tmp_path))
    assert here["cublas"] == there["cublas"]
    assert here["decode"] != there["decode"]
