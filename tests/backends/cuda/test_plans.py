"""Plans as declarations: the registry, what tables may say of them, and what forces one."""

import json
import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from lora_kernels import backends, lora_add, lora_add_, lora_linear
from lora_kernels.backends import blocked, cuda, forced, native, reference, use_backend
from lora_kernels.backends.cuda import choice, needs, plans, tables
from lora_kernels.backends.cuda.choice import candidates, use_plan
from lora_kernels.backends.cuda.plan import OPS, Call, Launch, Pass
from lora_kernels.backends.cuda.plans import PLANS
from lora_kernels.backends.device import CARDS
from lora_kernels.backends.native import extension

ROOT = Path(__file__).parents[3]
CALL = Call("forward", "bfloat16", 8192, 4096, 4096, 16, False)
FEW = CALL._replace(op="coded", M=16, weight="nf4")
GPU = torch.device("cuda", 0)


def table(*buckets: dict, proven=("aten", "cublas", "shrink_gemm")) -> dict:
    entries = [tables.proof(plan, "bfloat16", False) for plan in proven]
    return {"gpu": "G", "proven": entries, "buckets": list(buckets)}


def bucket(plan: str, **changes) -> dict:
    return CALL._asdict() | {"plan": plan} | changes


@pytest.fixture
def compiled(monkeypatch):
    """As where Triton compiles and the CUDA kernels are there."""
    monkeypatch.setattr(needs, "why_no_triton", lambda: None)
    monkeypatch.setattr(needs, "interpreted", lambda: False)
    monkeypatch.setattr(extension, "cuda_available", lambda: True)


@pytest.fixture
def tabled(monkeypatch, compiled):
    """Makes a table that of every GPU."""

    def use(content: dict) -> None:
        monkeypatch.setattr(choice, "tuned", lambda index: content)
        choice._choose.cache_clear()

    yield use
    choice._choose.cache_clear()


# ------------------------------------------------------------------------------------ the registry


def test_the_documentation_lists_the_plans():
    page = (ROOT / "docs" / "configuration.md").read_text()
    row = re.search(r"^\| `LORA_KERNELS_PLAN` \| (.*?) \|", page, re.M)
    assert re.findall(r"`(\w+)`", row.group(1)) == list(PLANS)


@pytest.mark.parametrize("name", PLANS)
def test_a_declaration(name):
    plan = PLANS[name]
    assert plan.name == name
    assert plan.summary
    assert "\n" not in plan.summary
    assert plan.bases == (("quantised",) if name == "decode_coded" else ("dense", "given"))
    module = Path(plans.__file__).with_name(f"{name}.py")
    assert module.exists(), "a plan has a file of its own"
    for launch in plan.launches().values():
        for op in OPS:
            for card in CARDS.values():
                for fields in launch.variants(CALL._replace(op=op), card):
                    launch.check(fields, "variant")


def test_a_pass_that_plans_share_is_timed_once(compiled):
    timed = {
        op: {plan for plan, _ in candidates(CALL._replace(op=op, M=16), CARDS["90"])} for op in OPS
    }
    timed["coded"] = [plan for plan, _ in candidates(FEW, CARDS["90"])]
    assert timed == {
        "forward": PLANS.keys() - {"grouped", "decode_coded"},
        "backward": {"aten", "cublas", "shrink_gemm", "grouped", "gluon"},
        "add": {"aten", "cublas"},
        "add_backward": {"aten", "cublas"},
        "coded": ["aten", "decode_coded"],
    }


class OneTile(NamedTuple):
    bm: int


@pytest.fixture
def new_plan():
    """One that somebody else adds: it doubles y."""
    seen = []

    def run(base, x, branch, save_s, tiles):
        seen.append(dict(tiles))
        y, s = reference.forward(base, x, branch, save_s)
        return 2 * y, s

    launch = Launch("one", OneTile, lambda call, target: iter([{"bm": 64}]))
    plan = replace(
        PLANS["aten"], name="twice", forward=Pass(run, (launch,), most_rows=4), add=None,
        add_backward=None,
    )  # fmt: skip
    plans.register(plan)
    yield seen
    del PLANS["twice"]


def test_a_new_plan_is_known_to_all(new_plan, monkeypatch, tmp_path, tabled):
    assert ("twice", {"one": {"bm": 64}}) in candidates(CALL._replace(M=4), CARDS["90"])
    path = tmp_path / "t.json"
    entry = bucket("twice", M=4, tiles={"one": {"bm": 32}})
    path.write_text(json.dumps(table(entry, proven=("twice",))))
    tabled(tables.read_table(path))
    assert choice.choose(CALL._replace(M=3), GPU) == ("twice", {"one": {"bm": 32}})
    assert choice.choose(CALL._replace(M=5), GPU).plan == "aten"
    monkeypatch.setattr(backends, "_forced", lambda *args: backends.Choice("cuda", cuda, "", "d"))
    x = torch.randn(3, 8)
    with use_plan("twice", {"one": {"bm": 16}}):
        y = lora_linear(x, x, x[:1], x[:, :1])
        with pytest.raises(RuntimeError, match=r"use_plan\('twice'\): the plan serves M <= 4"):
            lora_linear(x.repeat(2, 1), x, x[:1], x[:, :1])
        with pytest.raises(RuntimeError, match="serves no base output that is given"):
            lora_add(x @ x.t(), x, x[:1], x[:, :1])
    torch.testing.assert_close(y, 2 * lora_linear(x, x, x[:1], x[:, :1]))
    assert new_plan == [{"one": {"bm": 16}}]
    with pytest.raises(ValueError, match="the name 'twice' is taken"):
        plans.register(replace(PLANS["aten"], name="twice"))


# -------------------------------------------------------------------------------------- the tables


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (table() | {"proven": ["aten"]}, r"proven: got \['aten'\].*tune again"),
        (table(proven=("quick",)), "proven: got 'quick', legal values are aten, cublas"),
        (table() | {"proven": [{"plan": "aten"}]}, "an entry of proven lacks dropout, dtype"),
        (table() | {"proven": [tables.proof("aten", "int8", True)]}, "proven: dtype: got 'int8'"),
        (table() | {"proven": [tables.proof("aten", "float16", 1)]}, "proven: dropout: got 1, exp"),
        (table({"op": "forward"}), "a bucket lacks K, M, N, dropout, dtype, plan, r"),
        (table(bucket("aten", op="sideways")), "op: got 'sideways', legal are forward"),
        (table(bucket("aten", K=0)), "K: got 0, expected at least 1"),
        (table(bucket("quick")), "plan: got 'quick', legal values are aten"),
        (
            table(bucket("cublas", tiles={"gemm": {"bm": 64}})),
            "tiles: got 'gemm', launches of the plan cublas are shrink, expand",
        ),
        (
            table(bucket("shrink_gemm", tiles={"dx": {"bm": 64}})),
            "tiles: got 'dx', launches of the plan shrink_gemm are shrink, gemm",
        ),
        (
            table(bucket("shrink_gemm", tiles={"gemm": {"warp": 4}})),
            "tiles: gemm: got the field 'warp', legal ones are bm, bn, bk, stages, warps",
        ),
        (
            table(bucket("shrink_gemm", tiles={"gemm": {"bm": 96}})),
            "tiles: gemm: bm: expected a power of two, got 96",
        ),
        (
            table(bucket("cublas", tiles={"shrink": {"split": 2.0}})),
            "tiles: shrink: split: expected a positive integer, got 2.0",
        ),
    ],
)
def test_what_a_table_may_not_say(tmp_path, content, message):
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"gpu\.json: {message}"):
        tables.read_table(path)


def test_what_a_table_may_say(tmp_path):
    content = table(bucket("shrink_gemm", tiles={"gemm": {"bm": 64, "stages": 3, "pdl": 1}}))
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(content))
    assert tables.read_table(path) == content


@pytest.mark.parametrize(
    ("changes", "plan"),
    [
        ({}, "shrink_gemm"),
        ({"dtype": "float16"}, "aten"),
        ({"dropout": True}, "aten"),
    ],
)
def test_a_plan_is_proven_for_a_dtype_and_dropout(tabled, changes, plan):
    """Its buckets of other kinds make it no default there."""
    tabled(table(bucket("shrink_gemm"), bucket("shrink_gemm", **changes)))
    assert choice.choose(CALL._replace(**changes), GPU).plan == plan


@pytest.mark.parametrize("op", ["add", "add_backward"])
def test_a_given_base_output_asks_the_table(tabled, op):
    call = CALL._replace(op=op)
    tabled(table(bucket("cublas"), bucket("cublas", op="backward")))
    assert choice.choose(call, GPU).plan == "aten"
    launch = "expand" if op == "add" else "expand_dx"
    tabled(table(bucket("cublas", op=op, tiles={launch: {"bn": 64}})))
    assert choice.choose(call, GPU) == ("cublas", {launch: {"bn": 64}})
    tabled(table(bucket("cublas", op=op), proven=("aten",)))
    assert choice.choose(call, GPU).plan == "aten"


def test_plans_of_triton_are_passed_over_where_it_is_not(tabled, monkeypatch):
    content = table(
        bucket("shrink_gemm"), bucket("decode_cuda", M=16), proven=("shrink_gemm", "decode_cuda")
    )
    monkeypatch.setattr(needs, "why_no_triton", lambda: "triton does not import: gone")
    tabled(content)
    assert choice.choose(CALL._replace(M=8), GPU).plan == "decode_cuda"
    assert choice.choose(CALL, GPU).plan == "aten"
    with use_plan("shrink_gemm"), pytest.raises(RuntimeError, match="triton does not import: gone"):
        choice.choose(CALL, GPU)
    with use_backend("triton"), pytest.raises(RuntimeError, match="triton does not import: gone"):
        choice.choose(CALL, GPU)


# ------------------------------------------------------------------------------- what is forced


def test_contexts_force_a_backend_and_a_plan():
    x = torch.randn(3, 8)
    with use_backend("native"):
        with use_backend("reference"):
            assert backends.choose("cpu").module is reference
        if extension.available():
            assert backends.choose("cpu").module is native
        with pytest.raises(RuntimeError, match=r"use_backend\('native'\): it has no kernels"):
            backends.choose("cuda")
        with use_backend(None):
            assert forced.now is None
            assert backends.choose("cuda").module is reference
        with use_plan("aten"):
            assert backends.choose("cuda").module is cuda
            # The plain plan of a forced backend is another.
            assert choice.choose(CALL, torch.device("cpu")).plan == "aten"
    with (
        use_backend("triton"),
        pytest.raises(RuntimeError, match=r"use_backend\('triton'\): .*run on CUDA tensors"),
    ):
        lora_linear(x, x, x[:1], x[:, :1])
    with pytest.raises(ValueError, match="name: got 'fast', legal values are reference, native"):
        use_backend("fast")
    with pytest.raises(ZeroDivisionError), use_backend("reference"):
        raise ZeroDivisionError
    assert forced.now is None


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_the_plan_of_a_call_is_said_once(monkeypatch, caplog, p):
    """And nothing where nobody listens; every op goes by the plan that is forced."""
    cuda._say.cache_clear()
    backend = backends.Choice("cuda", cuda, "for this test")
    monkeypatch.setattr(backends, "_forced", lambda *args: backend)
    x = torch.randn(3, 8)
    a, b = torch.randn(2, 8, requires_grad=True), torch.randn(8, 2, requires_grad=True)
    seed = torch.tensor([7])
    kwargs = {"dropout_p": p, "seed": seed if p else None}

    def run() -> list[torch.Tensor]:
        y = lora_linear(x, x.new_ones(8, 8), a, b, **kwargs)
        added = lora_add(x.new_ones(3, 8), x, a, b, **kwargs)
        in_place = x.new_ones(3, 8)
        with torch.no_grad():
            lora_add_(in_place, x, a, b, **kwargs)
        assert torch.equal(in_place, added)
        return [y.detach(), added.detach(), *torch.autograd.grad((y + added).sum(), (a, b))]

    with use_plan("aten"):
        with caplog.at_level(logging.WARNING, logger="lora_kernels"):
            run()
        assert not caplog.records
        with caplog.at_level(logging.INFO, logger="lora_kernels"):
            outputs = run()
            run()
    with use_backend("reference"):
        monkeypatch.undo()
        assert all(map(torch.equal, outputs, run()))
    kind = "float32 with dropout" if p else "float32"
    said = [m for r in caplog.records if "plan" in (m := r.getMessage())]
    assert sorted(said) == sorted(
        f"cpu {op} in {kind}: plan aten (ATen calls throughout)" for op in OPS if op != "coded"
    )


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_torch_says_whether_a_cpu_has_fast_products(name):
    """By a private op; one without it would move such calls to fp32."""
    assert isinstance(getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported")(), bool)


def test_a_torch_that_does_not_say_it_is_told_of(monkeypatch, caplog):
    blocked._multiplies.cache_clear()
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    rows = torch.ones(64, 8, dtype=torch.bfloat16)
    try:
        with caplog.at_level(logging.WARNING, "lora_kernels"):
            assert blocked.is_wide(rows)
            assert blocked.is_wide(rows)
        (message,) = caplog.messages
        assert "fast bf16 products: they are formed in fp32" in message
        assert not blocked.is_wide(rows.float())
    finally:
        blocked._multiplies.cache_clear()
