"""Every plan and its tiles in Triton's interpreter, on CPU tensors, against fp64."""

import pytest
import torch
from interpreted import (
    AMPERE,
    CASES,
    HOPPER,
    NAMES,
    Case,
    Problem,
    geometric_means,
    ops,
    poisoned_memory,
    ratios,
    serves,
)  # fmt: skip

from lora_kernels.backends import choose
from lora_kernels.backends import cuda as backend
from lora_kernels.backends.cuda.choice import candidates, use_plan
from lora_kernels.backends.cuda.plan import Call
from lora_kernels.backends.device import CARDS, assume
from lora_kernels.backends.triton.launch import intercept

__all__ = ["poisoned_memory"]  # a fixture of every test
pytestmark = pytest.mark.interpreted


@pytest.mark.parametrize(
    ("plan", "target"),
    [
        ("cublas", HOPPER),
        ("shrink_gemm", AMPERE),
        ("shrink_gemm", HOPPER),
        ("grouped", AMPERE),
        ("grouped", HOPPER),
        ("dual", AMPERE),
        ("decode", HOPPER),
        ("flag", AMPERE),
        ("flag", HOPPER),
    ],
)
def test_linear_and_gradients(entering, plan, target):
    entering(use_plan(plan))
    assert choose("cpu").module is backend
    found = []
    with assume(target):
        for case in filter(lambda case: serves(plan, case), CASES):
            problem = Problem(case)
            outputs = problem.linear()
            assert outputs["da"].dtype == problem.a.dtype
            assert outputs["db"].dtype == problem.b.dtype
            assert all(out.is_contiguous() for out in outputs.values())
            found.append(ratios(problem, outputs))
    means = geometric_means(found)
    assert all(mean <= 1.02 for mean in means.values()), means
    if plan != "cublas":
        assert means["y"] < 1
        assert means["dx"] < 1


@pytest.mark.parametrize(
    ("plan", "r", "p"),
    [("cublas", 8, 0.25), ("cublas", 64, 0.0), ("grouped", 8, 0.25)],
)
def test_sums_over_as_many_rows_as_a_batch_has(plan, r, p):
    """On a device of 132 SMs: dA in 17 shares, dB in 35 or 17, masks past row 4096."""
    partials = []

    def record(kernel, grid, args, meta, launch) -> None:
        if kernel.fn.__name__ == "reduce_kernel":
            partials.extend(args[i] for i in (2, 7) if args[i])
        launch()

    problem = Problem(Case(4400, 16, 16, r, p=p))
    with assume(CARDS["80"]._replace(sms=132)), use_plan(plan), intercept(record):
        ratios(problem, problem.linear())
    assert sum(count > 16 for count in partials) == 2, partials


# What a launch of a backward writes or what shows it, so that the others need not run.
READ_FROM = {
    "ds_db": ("da", "db"),
    "da": ("da",),
    "dx": ("dx",),
    "expand_dx": ("dx",),
    "dx_da": ("dx", "da"),
}


@pytest.mark.parametrize(
    ("op", "case"),
    [
        ("forward", Case(40, 48, 1024, 16, bias=True)),
        ("forward", Case(513, 272, 64, 16, bias=True)),
        ("backward", Case(513, 48, 80, 16, p=0.2)),
    ],
)
def test_candidates_of_a_tuner(op, case):
    """Whatever tiles a tuned table may name compute the same."""
    problem = Problem(case)
    call = Call(op, "float16", *case[:4], case.p > 0)
    listed = candidates(call, HOPPER)
    saved = problem.linear()["s"]

    def compute(launch: str) -> dict[str, torch.Tensor]:
        tensors = (problem.x, problem.weight, problem.a, problem.b)
        if op == "forward":
            y, _ = ops.lora_linear(*tensors, problem.bias, *problem.branch, True)
            return {"y": y}
        wanted = READ_FROM[launch]
        dx, _, da, db = ops.lora_linear_backward(
            problem.dy, *tensors, saved, *problem.branch,
            "dx" in wanted, False, "da" in wanted, "db" in wanted,
        )  # fmt: skip
        return {n: out for n, out in {"dx": dx, "da": da, "db": db}.items() if n in wanted}

    with assume(HOPPER):
        for plan, fields in listed:
            for launch in fields:
                with use_plan(plan, fields):
                    ratios(problem, compute(launch))
    varied = {launch for _, fields in listed for launch in fields}
    assert varied >= ({"shrink", "gemm", "expand"} if op == "forward" else {"da", "dx", "dx_da"})


@pytest.mark.parametrize("case", [CASES[4], CASES[11]], ids=str)
def test_loads_ahead_change_no_bit(case):
    """Of a tile that the loop takes in another order, or whose low-rank step is loaded early."""
    problem, options = Problem(case._replace(p=0.0)), []
    problem.branch = (0.5, *problem.branch[1:])  # over 1 a part of it follows the low-rank step

    def watch(kernel, grid, args, meta, run):
        if kernel.fn.__name__ == "gemm_tma_kernel":
            options.append((meta["FLATTEN"], meta["EARLY"]))
        run()

    found = []
    with assume(HOPPER), intercept(watch):
        for fields in ({"bm": 32}, {"bm": 32, "flatten": 1}, {"bm": 32, "early": 1}):
            with use_plan("shrink_gemm", {"gemm": fields, "dx": fields}):
                found.append(problem.linear())
    assert options == [(False, False)] * 2 + [(True, False)] * 2 + [(False, True)] * 2
    for other in found[1:]:
        assert all(torch.equal(other[name], found[0][name]) for name in NAMES)


@pytest.mark.parametrize("split", [3, 5])
def test_any_number_of_shares(split):
    """Of ds and dB, the last of which may have no columns."""
    problem = Problem(Case(129, 335, 49, 13))
    with assume(HOPPER), use_plan("cublas", {"ds_db": {"split": split}}):
        ratios(problem, problem.linear())
