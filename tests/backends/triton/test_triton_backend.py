"""Choosing the Triton backend and its plans, where there is neither a GPU nor the interpreter."""

import json
import os
import subprocess
import sys
import weakref
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from lora_kernels import backends
from lora_kernels.backends import cuda, forced, use_backend
from lora_kernels.backends.cuda import choice, tables
from lora_kernels.backends.cuda.choice import candidates, use_plan
from lora_kernels.backends.cuda.plan import Call
from lora_kernels.backends.cuda.plans import PLANS
from lora_kernels.backends.device import CARDS, assume
from lora_kernels.branch import Branch, Dense

ROOT = Path(__file__).parents[3]
CALL = """
import torch, lora_kernels
x = torch.ones(2, 3)
torch.ops.lora_kernels.lora_linear(x, x, x[:1], x[:, :1], None, 1.0, 0.0, None, False)
"""


def run(code: str, **variables: str) -> subprocess.CompletedProcess:
    names = ("TRITON_INTERPRET", "LORA_KERNELS_BACKEND", "LORA_KERNELS_PLAN")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment |= {"PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_kernels_are_imported_when_chosen():
    code = "import sys; assert 'lora_kernels.backends.triton.launch' not in sys.modules"
    assert run(CALL + code).returncode == 0


def test_without_triton():
    absent = "import sys; sys.modules['triton'] = None\n"
    assert run(absent + CALL).returncode == 0
    forced = run(absent + CALL, LORA_KERNELS_BACKEND="triton")
    assert "RuntimeError: LORA_KERNELS_BACKEND=triton: triton does not import" in forced.stderr


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"LORA_KERNELS_BACKEND": "triton"},
            "RuntimeError: LORA_KERNELS_BACKEND=triton: Triton kernels run on CUDA tensors",
        ),
        (
            {"LORA_KERNELS_PLAN": "cublas"},
            "RuntimeError: LORA_KERNELS_PLAN=cublas: Triton kernels run on CUDA tensors",
        ),
        ({"LORA_KERNELS_PLAN": "fast"}, "ValueError: LORA_KERNELS_PLAN: got 'fast'"),
        (
            {"LORA_KERNELS_PLAN": "cublas", "LORA_KERNELS_BACKEND": "reference"},
            "ValueError: LORA_KERNELS_PLAN=cublas forces a plan of the cuda backend",
        ),
    ],
)
def test_forced_choices_that_cannot_serve(variables, message):
    pytest.importorskip("triton")
    forced = run(CALL, **variables)
    assert forced.returncode == 1
    assert message in forced.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without a GPU")
def test_without_a_gpu_the_default_of_every_accelerator_is_the_reference():
    for device in ("cuda", "mps"):
        assert backends.choose(device).name == "reference"


def test_the_tables_that_ship_can_be_read():
    for path in tables.TUNED.glob("*.json"):
        table = tables.read_table(path)
        assert path.name == tables.file_name(table["gpu"])
        assert table["buckets"]


TABLE = {
    "gpu": "NVIDIA Test 9",
    "versions": {"triton": version("triton")},
    "proven": [tables.proof(plan, "bfloat16", dropout)
               for plan in ("aten", "cublas", "shrink_gemm") for dropout in (False, True)],
    "buckets": [
        {"op": "forward", "dtype": "bfloat16", "M": M, "N": 4096, "K": 4096, "r": 16,
         "dropout": dropout, "plan": plan}
        for M, dropout, plan in (
            (16, False, "decode"), (64, False, "cublas"), (4096, False, "shrink_gemm"),
            (4096, True, "aten"),
        )
    ],
}  # fmt: skip


@pytest.fixture
def tuned(monkeypatch, tmp_path):
    (tmp_path / "nvidia_test_9.json").write_text(json.dumps(TABLE))
    monkeypatch.setattr(tables, "TUNED", tmp_path)
    monkeypatch.setattr(tables, "cache_path", lambda index: tmp_path / "none of the user's")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: TABLE["gpu"])
    backends.forget()
    yield
    backends.forget()


def call(**changes) -> Call:
    values = {"op": "forward", "dtype": "bfloat16", "M": 8192, "N": 4096, "K": 4096, "r": 16}
    return Call(**{**values, "dropout": False, **changes})


def test_nearest_proven_bucket(tuned):
    device = torch.device("cuda", 0)
    assert tables.why_none(0) is None
    assert choice.choose(call(), device).plan == "shrink_gemm"
    assert choice.choose(call(dropout=True), device).plan == "aten"
    # decode is nearer, but not proven.
    assert choice.choose(call(M=8), device).plan == "cublas"
    # No bucket of this kind: nothing that was not proven for it becomes a default.
    assert choice.choose(call(dtype="float16"), device).plan == "aten"
    assert choice.choose(call(op="backward"), device).plan == "aten"
    assert choice.choose(call(), torch.device("cuda", 1)).plan == "shrink_gemm"


def test_a_table_of_another_triton_holds_for_nothing(tuned, monkeypatch):
    """Its kernels would be other machine code than what was proven."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert backends.choose(torch.device("cuda", 0)).name == "cuda"
    backends.forget()
    monkeypatch.setattr(tables, "version", lambda package: "2.1.0")
    chosen = backends.choose(torch.device("cuda", 0))
    assert chosen.name == "reference"
    assert "is of Triton" in chosen.reason
    assert "this is 2.1.0" in chosen.reason
    assert choice.choose(call(), torch.device("cuda", 0)).plan == "aten"


def test_a_struck_out_plan_is_no_default(tuned, monkeypatch):
    table = TABLE | {"proven": [tables.proof("aten", "bfloat16", False)]}
    monkeypatch.setattr(choice, "tuned", lambda index: table)
    assert choice.choose(call(), torch.device("cuda", 0)).plan == "aten"


def test_a_forced_backend_without_a_table_runs_its_kernels(entering):
    entering(use_backend("triton"))
    assert choice.choose(call(), torch.device("cpu")).plan == "cublas"


def test_forced_plan_overrides_the_table(tuned, entering):
    entering(use_plan("decode"))
    assert choice.choose(call(M=8), torch.device("cuda", 0)).plan == "decode"
    with pytest.raises(RuntimeError, match=r"use_plan\('decode'\): the plan serves M <= 64"):
        choice.choose(call(M=65), torch.device("cuda", 0))


@pytest.mark.parametrize("change", [{"proven": ["quick"]}, {"buckets": [{"op": "forward"}]}])
def test_broken_tables_name_their_fault(tmp_path, change):
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(TABLE | change))
    with pytest.raises(ValueError, match=r"gpu\.json: (proven|a bucket lacks)"):
        tables.read_table(path)


def test_candidates_are_legal_and_forced_inside_use_plan():
    pytest.importorskip("triton")

    for op in ("forward", "backward"):
        wanted = call(op=op, M=64, dropout=True)
        listed = candidates(wanted, CARDS["90"])
        assert {plan for plan, _ in listed} >= {"aten", "cublas", "shrink_gemm"}
        for plan, fields in listed:
            assert fields.keys() <= PLANS[plan].launches((op,)).keys()
            with use_plan(plan, fields):
                assert choice.choose(wanted, torch.device("cpu")) == (plan, fields)
    assert forced.now is None


@pytest.mark.parametrize("card", [name for name, card in CARDS.items() if card.has_tensor_cores])
def test_candidates_of_a_rank_serve_every_smaller_one(card):
    """A bucket's tiles serve the calls of smaller rank, and all of them have been compiled."""
    pytest.importorskip("triton")
    from lora_kernels.backends.codegen.cases import cases

    compiled = {(case.plan, repr(dict(case.tiles)), case.r) for case in cases(CARDS[card])}
    for M in (1, 16, 64, 500, 5000):
        for op in ("forward", "backward"):
            for dropout in (False, True):
                smaller = None
                for r in (1, 8, 16, 32, 64, 128, 200):
                    wanted = call(op=op, M=M, r=r, dropout=dropout)
                    listed = candidates(wanted, CARDS[card])
                    assert r > 128 or all(
                        (plan, repr(fields), r) in compiled
                        for plan, fields in listed
                        if fields and plan != "decode_cuda"
                    )
                    if smaller is not None and r != 64:  # from there on ds and dB are two launches
                        assert all(candidate in smaller for candidate in listed)
                    smaller = listed


@pytest.mark.parametrize("split", [1, 4])
def test_an_overlapped_launch_keeps_what_is_still_read(split):
    """The GEMM may begin before s is made: partial sums must not become its scratch."""
    pytest.importorskip("triton")
    from lora_kernels.backends.triton import launch

    launched, partials = [], []

    def record(kernel, grid, args, meta, run) -> None:
        launched.append((kernel.fn.__name__, meta))
        if kernel.fn.__name__ == "reduce_kernel":
            partials.append(weakref.ref(args[0]))
        elif kernel.fn.__name__ == "gemm_tma_kernel":
            assert all(partial() is not None for partial in partials)

    x = torch.empty(128, 4096, dtype=torch.bfloat16, device="meta")
    weight, a, b = x.new_empty(256, 4096), x.new_empty(16, 4096), x.new_empty(256, 16)
    tiles = {"shrink": {"split": split}, "gemm": {"pdl": 1}}
    with (
        assume(CARDS["90"]),
        launch.intercept(record),
        use_plan("shrink_gemm", tiles),
    ):
        cuda.forward(Dense(weight), x, Branch(a, b, 1.0, 0.0, None), True)
    *others, before, last = launched
    assert (before[0], len(partials)) == (
        ("reduce_kernel", 1) if split > 1 else ("shrink_kernel", 0)
    )
    assert before[1]["FREE"]
    assert not any(meta["FREE"] for _, meta in others)
    assert last[0] == "gemm_tma_kernel"
    assert last[1]["launch_pdl"]


def test_use_plan_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="plan: got 'fast'"), use_plan("fast"):
        pass
    with (
        pytest.raises(ValueError, match="tiles: got 'matmul', launches of the plan dual are dual"),
        use_plan("dual", {"matmul": {}}),
    ):
        pass
    with use_plan("decode"), pytest.raises(RuntimeError, match="M <= 64, got M = 65"):
        choice.choose(call(M=65), torch.device("cpu"))


def test_tiles_of_a_bucket_serve_aligned_calls_of_its_rank(tuned):
    table = json.loads(json.dumps(TABLE))
    fields = {"gemm": {"bm": 64}}
    table["buckets"][2]["tiles"] = fields
    assert tables.nearest(table, call()) == ("shrink_gemm", fields)
    assert tables.nearest(table, call(r=17)) == ("shrink_gemm", {})
    assert tables.nearest(table, call(aligned=False)) == ("shrink_gemm", {})
