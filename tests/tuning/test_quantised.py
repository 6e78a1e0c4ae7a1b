"""`tune` of quantised weights: what is proven of which kind, what becomes of kernels that are
wrong, and what a process does with the table."""

import json

import pytest
import torch
from torch import nn
from tune_command import run, tune

import lora_kernels
from lora_kernels.backends import use_backend
from lora_kernels.backends.cuda import choice, coded, needs, tables
from lora_kernels.backends.cuda.choice import use_plan
from lora_kernels.backends.cuda.plan import Call, Coded
from lora_kernels.branch import Branch
from lora_kernels.testing import Case, WrongResult, problem
from lora_kernels.tuning import search
from lora_kernels.tuning.cases import cases_of
from lora_kernels.tuning.table import Candidate, Table, entry_of, merge, missing
from lora_kernels.weights import CODED, kind_of, sample

pytest.importorskip("triton")
INFO = {"versions": {}, "commit": "x"}
CALL = Call("coded", "float16", 16, 32, 32, 8, False, weight="nf4")
GPU = torch.device("cuda", 0)
PLUGIN = """
import os
from dataclasses import replace
from lora_kernels.backends.cuda import plans
from lora_kernels.tuning import search

for name in plans.PLANS.keys() - {"aten", "decode_coded"}:
    del plans.PLANS[name]
true, runs = plans.PLANS["decode_coded"], {kind: 0 for kind in KINDS}

def timed(candidates, *_):  # the interpreter is slow
    return [[0.5 if candidate.plan == "decode_coded" else 1.0] for candidate in candidates]

def of_kind(kind):
    def faulty(base, x, branch, save_s, tiles):
        runs[kind] += 1
        y, s = true.coded.run(base, x, branch, save_s, tiles)
        if kind == "wrong":
            y *= 1.01
        elif kind == "unwritten":
            y = y.new_empty(y.shape) if runs[kind] == 1 else y
        elif kind == "beyond" and runs[kind] == 1:
            y.as_strided((1,), (1,), y.storage_offset() + y.numel())[0] = 1
        elif kind == "random":
            y[0, 0] += runs[kind] % 2 * 1e-3
        elif kind == "die":
            os._exit(77)
        return y, s
    return faulty

search.timed = timed
if KINDS:
    del plans.PLANS["decode_coded"]
for kind in KINDS:
    coded = replace(true.coded, run=of_kind(kind), dropout=False)
    plans.register(replace(true, name=kind, coded=coded))
"""
FAULTY = {
    "wrong": "WrongResult: wrong: y has error",
    "unwritten": "WrongResult: unwritten: y has error nan",
    "beyond": "WrongResult: beyond: wrote past the memory of an output or part [16, 32]",
    "random": "WrongResult: random: other bits in run 2",
    "die": "the process died",
}
OPTIONS = ("--weight", "nf4", "--no-backward")


def buckets_of(table: dict) -> dict[tuple, str]:
    return {(b["op"], b.get("weight"), b["dropout"]): b["plan"] for b in table["buckets"]}


# ---------------------------------------------------------------------------------- from end to end


def test_what_tune_made_serves_a_second_process(tmp_path):
    """Of the kind of weight that was proven, at the rows that the launch is for."""
    (tmp_path / "standin.py").write_text(f"KINDS = ()\n{PLUGIN}")
    path = tmp_path / "tuned.json"
    said = tune(path, *OPTIONS, plugins=tmp_path)
    table = tables.read_table(path)
    for dropout in (False, True):
        assert tables.proof("decode_coded", "float16", dropout, "nf4") in table["proven"]
    assert "decode_coded in float16 of nf4" in said
    assert buckets_of(table) == {
        ("coded", "nf4", False): "decode_coded", ("coded", "nf4", True): "decode_coded",
        ("add", None, False): "aten", ("add", None, True): "aten",
    }  # fmt: skip
    assert not table["failed"]

    code = (
        "import torch; torch.cuda.get_device_name = lambda index=None: 'A Card'\n"
        "from types import SimpleNamespace\n"
        "from lora_kernels.backends.cuda import coded, tables\n"
        "from lora_kernels.branch import Branch\n"
        "from lora_kernels.weights import sample\n"
        "tables.key_of = lambda index: 'k'\n"
        "class Rows(SimpleNamespace):\n"
        "    is_cuda, device = True, torch.device('cuda', 0)\n"
        "    def __len__(self): return self.shape[0]\n"
        "for kind, dtype, M in (('nf4', 'float16', 16), ('nf4', 'float16', 24),\n"
        "                       ('nf4', 'float16', 65), ('int8', 'float16', 16),\n"
        "                       ('nf4', 'float32', 16)):\n"
        "    branch = Branch(torch.ones(8, 32), torch.ones(32, 8), 1.0, 0.0, None)\n"
        "    x = Rows(shape=(M, 32), dtype=getattr(torch, dtype))\n"
        "    found = coded.chosen(x, sample(torch.randn(32, 32), kind), branch)\n"
        "    print(found and found.plan)"
    )
    given = {"LORA_KERNELS_TUNED": str(path)}
    found = run(["-c", code], folder=tmp_path, **given).split()
    assert found == ["decode_coded", "decode_coded", "None", "None", "None"]


@pytest.fixture(scope="module")
def of_faulty_kernels(tmp_path_factory):
    """The table of all of them at once."""
    folder = tmp_path_factory.mktemp("faulty")
    (folder / "standin.py").write_text(f"KINDS = {tuple(FAULTY)!r}\n{PLUGIN}")
    path = folder / "tuned.json"
    tune(path, *OPTIONS, plugins=folder)
    return json.loads(path.read_text())


@pytest.mark.parametrize("kind", FAULTY)
def test_a_faulty_kernel_is_struck_out(of_faulty_kernels, kind):
    (failed,) = [entry for entry in of_faulty_kernels["failed"] if entry["plan"] == kind]
    assert FAULTY[kind] in failed["why"]
    assert failed["call"] == entry_of(CALL)


def test_among_faulty_kernels_all_ends_in_strips(of_faulty_kernels):
    assert set(buckets_of(of_faulty_kernels).values()) == {"aten"}
    assert {entry["plan"] for entry in of_faulty_kernels["proven"]} == {"aten"}
    assert len(of_faulty_kernels["failed"]) == len(FAULTY)


# ------------------------------------------------------------------------------------ what is asked


@pytest.mark.interpreted
@pytest.mark.parametrize("kind", CODED)
def test_every_kind_is_proven(kind):
    """By the rule, on the weight that it decodes to, the launch and the strips."""
    case = Case(5, 64, 48, 3, "fp32", 0.1)
    (work,) = search.works(problem(case, torch.device("cpu")), kind)
    assert (work.call.op, work.call.weight) == ("coded", kind)
    found = search.listed(work.call, torch.device("cpu"), True)
    assert [candidate.plan for candidate in found] == ["aten", "decode_coded"]
    for candidate in found:
        search.qualify(candidate, work)
    dense = search.works(problem(case, torch.device("cpu")), "dense")[0].right
    with pytest.raises(WrongResult), use_plan("aten"):
        dense.require("another weight", work.run(), ("y",))


def test_what_is_allocated_is_guarded(monkeypatch):
    """By a plan that reads codes, and by strips."""
    seen = []
    monkeypatch.setattr(coded, "forward", lambda *_: seen.append(torch.empty(4)))
    monkeypatch.setattr(search.quantized.dequantized, "product", coded.forward)
    with search.guarded("c"):
        coded.forward(None)
        search.quantized.dequantized.product(None)
    assert all(one.isnan().all() for one in seen)
    assert len(seen) == 2


def test_kinds():
    dense = torch.randn(12, 64)
    assert [kind_of(sample(dense, kind)) for kind in CODED] == list(CODED)
    for kind in CODED:
        near = sample(dense, kind).dequantize(torch.float32)
        assert (near - dense).norm() < 0.2 * dense.norm(), kind


def test_the_cases_of_a_quantised_model():
    model = nn.Sequential(nn.Linear(64, 16), nn.Linear(16, 32), nn.Linear(32, 16))
    for name, kind in (("0", "nf4"), ("1", "fp8")):
        lora_kernels.quantize_base(model.bfloat16(), kind, target_modules=[name])
    lora_kernels.apply_lora(model, 4)
    assert cases_of(model, (1,), None, None) == [
        ("nf4", Case(1, 64, 16, 4)), ("fp8", Case(1, 16, 32, 4)), ("dense", Case(1, 32, 16, 4)),
    ]  # fmt: skip
    assert cases_of(None, (1,), [(8, 4, 2)], None, "int8") == [
        ("int8", Case(1, 4, 8, 2, dropout=p)) for p in (0.0, 0.1)
    ]
    with pytest.raises(ValueError, match=r"weight: got 'int3', legal values are dense, int8, "):
        cases_of(None, (1,), None, None, "int3")
    with pytest.raises(ValueError, match=r"shapes: expected an even K of nf4, got \(8, 5, 2\)"):
        cases_of(None, (1,), [(8, 5, 2)], None, "nf4")


# --------------------------------------------------------------------------------------- the tables


def test_what_a_table_tells_apart(tmp_path):
    """A proof, a strike and a bucket are of one kind of weight; of a dense one nothing is said."""
    table = Table(tmp_path / "t.json", "G", INFO)
    plan = Candidate("decode_coded", {})
    nf4, int8 = entry_of(CALL), entry_of(CALL._replace(weight="int8"))
    dense = entry_of(CALL._replace(op="forward", weight="dense"))
    assert "weight" not in dense
    for call in (nf4, int8):
        table.worked(plan, call)
        table.add(call | {"plan": "decode_coded"})
    table.failed(plan, nf4, "wrong")
    assert table.refuses(plan, nf4)
    assert not table.refuses(plan, int8)
    assert table.content["proven"] == [tables.proof("decode_coded", "float16", False, "int8")]
    assert len(table.content["buckets"]) == 2
    case = Case(16, 32, 32, 8, "fp16")
    assert missing(table.content["buckets"], "nf4", case) == []
    assert missing(table.content["buckets"], "fp8", case) == ["coded"]
    assert missing(table.content["buckets"], "dense", case) == ["forward", "backward"]
    both = merge(table.content, table.content)
    assert (both["buckets"], both["proven"]) == (table.content["buckets"], table.content["proven"])
    read = tables.read_table(tmp_path / "t.json")
    assert read["buckets"] == table.content["buckets"]
    text = (tmp_path / "t.json").read_text().replace('"weight": "nf4"', '"weight": "nf3"')
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(ValueError, match=r"a bucket: weight: got 'nf3', legal are dense, int8, "):
        tables.read_table(tmp_path / "t.json")


def table_of(plan: str, *proven: str, **changes) -> dict:
    call = CALL._replace(**changes)
    kind = (call.dtype, call.dropout, call.weight)
    return {
        "gpu": "A Card", "versions": {"triton": "3"},
        "proven": [tables.proof(name, *kind) for name in proven],
        "buckets": [entry_of(call) | {"plan": plan}],
    }  # fmt: skip


@pytest.fixture
def rows(gpu, monkeypatch):
    """Rows on a GPU that is not there."""

    class Rows:
        is_cuda, device, dtype, shape = True, GPU, torch.float16, torch.Size([16, 32])

        def __len__(self):
            return 16

    monkeypatch.setattr(needs, "why_no_triton", lambda: None)
    return Rows()


def test_what_the_table_says_is_done(gpu, rows):
    """The plan, where it is proven of this kind; what is forced is stronger."""
    weight = sample(torch.randn(32, 32), "nf4")
    branch = Branch(torch.ones(8, 32), torch.ones(32, 8), 1.0, 0.0, None)

    def plan(table: dict) -> str | None:
        path = gpu / "package" / "a_card.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(table))
        choice.forget()
        found = coded.chosen(rows, weight, branch)
        return found and found.plan

    both = ("aten", "decode_coded")
    assert plan(table_of("decode_coded", *both)) == "decode_coded"
    assert plan(table_of("decode_coded", "aten")) is None
    assert plan(table_of("decode_coded", *both, weight="int8")) is None
    assert plan(table_of("decode_coded", *both, dtype="bfloat16")) is None
    # One that says "aten" is nearer than another, though no plan is there that it names.
    table = table_of("decode_coded", *both)
    table["buckets"].append(entry_of(CALL) | {"plan": "aten"})
    table["buckets"][0]["M"] = 1
    assert plan(table) is None
    proven = table_of("decode_coded", *both)
    for forced, found in ((use_plan("aten"), None), (use_plan("dual"), None),
                          (use_backend("reference"), None)):  # fmt: skip
        with forced:
            assert plan(proven) is found
    with use_plan("decode_coded"):
        assert plan(table) == "decode_coded"
        rows.shape = torch.Size([65, 32])
        with pytest.raises(RuntimeError, match=r"decode_coded'\): the plan serves M <= 64, got"):
            plan(table)
    rows.shape = torch.Size([16, 32])
    lines = tables.describe(0)
    assert "proven in float16, no dropout, nf4: aten, decode_coded" in lines


@pytest.mark.interpreted
def test_a_chosen_plan_computes_what_strips_do():
    """Also where it is asked for s, which its program of column 0 stores."""
    p = problem(Case(5, 64, 48, 3, "fp32"), torch.device("cpu"))
    weight, x = sample(p.weight, "nf4"), p.x.detach()
    branch = Branch(p.a, p.b, 2.0, 0.0, None)
    y, s = coded.forward(choice.Choice("decode_coded", {}), Coded(weight, None), x, branch, True)
    right = x @ weight.dequantize(x.dtype).t() + 2.0 * (x @ p.a.t()) @ p.b.t()
    torch.testing.assert_close(y, right)
    torch.testing.assert_close(s, 2.0 * x @ p.a.t())
