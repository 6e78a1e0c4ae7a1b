"""How often each plan touches the full-size arrays of a call, counted from what it launches.

Counted are the kernels and ATen ops that are handed an
array's memory, whether they read or write it; that a GEMM reads tiles again is not.
"""

import pytest
import torch
from interpreted import Case, Problem, serves
from torch.utils._python_dispatch import _disable_current_modes

from lora_kernels.backends import cuda as backend
from lora_kernels.backends.cuda.choice import use_plan
from lora_kernels.backends.cuda.plans import PLANS
from lora_kernels.backends.device import CARDS, assume
from lora_kernels.backends.triton.launch import intercept
from lora_kernels.branch import Given, Need
from lora_kernels.testing import Aten

F16, F32 = torch.float16, torch.float32
pytestmark = pytest.mark.interpreted
ONE_LAUNCH = ("decode", "dual", "flag")


def kernels_touching(run) -> dict[str, list[str]]:
    """By name, the kernels and ATen ops that touch each of the arrays that `run` returns."""
    touched = []

    def report(name: str, values) -> None:
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        touched.append((name, {t.untyped_storage().data_ptr() for t in tensors}))

    def record(kernel, grid, args, meta, launch) -> None:
        report(kernel.fn.__name__, args)
        with _disable_current_modes():
            launch()

    with intercept(record), Aten(report):
        arrays = run()
    return {
        name: [kernel for kernel, seen in touched if array.untyped_storage().data_ptr() in seen]
        for name, array in arrays.items()
    }


def forward(problem: Problem) -> dict[str, torch.Tensor]:
    x, weight = problem.x, problem.weight
    y, problem.s = backend.forward(problem.base, x, problem.low_rank, True)
    return {"x": x, "weight": weight, "y": y}


def backward(problem: Problem) -> dict[str, torch.Tensor]:
    x, weight, dy = problem.x, problem.weight, problem.dy
    need = Need(True, False, True, True)
    dx, *_ = backend.backward(problem.base, dy, x, problem.s, problem.low_rank, need)
    return {"x": x, "weight": weight, "dy": dy, "dx": dx}


@pytest.mark.parametrize("card", ["80", "90"])
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize(
    ("plan", "r", "dtype", "reads_of_dy"),
    [
        ("shrink_gemm", 16, F16, 2),
        ("shrink_gemm", 48, F16, 2),
        ("shrink_gemm", 64, F16, 3),
        ("shrink_gemm", 16, F32, 2),
        ("shrink_gemm", 17, F32, 3),  # one block of an fp32 kernel holds 16 ranks
        ("grouped", 16, F16, 2),
        ("grouped", 64, F16, 3),
        ("grouped", 17, F32, 3),
        ("dual", 16, F16, 2),
        ("dual", 24, F32, 3),
        ("decode", 16, F16, 2),
        ("flag", 16, F16, 2),
        ("flag", 64, F16, 3),
    ],
)
def test_fused_plans(entering, plan, r, dtype, p, card, reads_of_dy):
    entering(use_plan(plan))
    case = Case(48, 136, 72, r, dtype, p=p, bias=True)
    if not serves(plan, case):
        pytest.skip("the plan does not serve this call")
    problem = Problem(case)
    with assume(CARDS[card]._replace(sms=3)):
        touched = kernels_touching(lambda: forward(problem))
        counts = {name: len(kernels) for name, kernels in touched.items()}
        x = 1 if plan in ONE_LAUNCH else 2
        assert counts == {"x": x, "weight": 1, "y": 1}, touched

        touched = kernels_touching(lambda: backward(problem))
        counts = {name: len(kernels) for name, kernels in touched.items()}
        assert counts == {"x": 1, "weight": 1, "dy": reads_of_dy, "dx": 1}, touched


def test_every_fused_plan_is_counted():
    mark = next(m for m in test_fused_plans.pytestmark if "plan" in m.args[0])
    # Not fused, not for the interpreter, or not of a dense weight.
    apart = {"aten", "cublas", "decode_cuda", "gluon", "decode_coded"}
    assert {case[0] for case in mark.args[1]} == PLANS.keys() - apart
    assert PLANS.keys() >= set(ONE_LAUNCH)


@pytest.mark.parametrize("r", [16, 64])
def test_the_branch_alone(r):
    """lora_add reads x and base_out once and writes y once; its backward as the fused plans'."""
    problem = Problem(Case(48, 136, 72, r, p=0.5))
    base = torch.randn(48, 136).half()

    def add() -> dict[str, torch.Tensor]:
        y, problem.s = backend.forward(Given(base), problem.x, problem.low_rank, True)
        return {"x": problem.x, "base_out": base, "y": y}

    def gradients() -> dict[str, torch.Tensor]:
        dx, *_ = backend.backward(
            Given(), problem.dy, problem.x, problem.s, problem.low_rank,
            Need(True, False, True, True),
        )  # fmt: skip
        return {"x": problem.x, "dy": problem.dy, "dx": dx}

    assert {n: len(k) for n, k in kernels_touching(add).items()} == {"x": 1, "base_out": 1, "y": 1}
    counts = {n: len(k) for n, k in kernels_touching(gradients).items()}
    assert counts == {"x": 1, "dy": 1 if r < 64 else 2, "dx": 1}


def test_nothing_is_read_for_a_gradient_nobody_needs():
    problem = Problem(Case(48, 136, 72, 16))
    with use_plan("shrink_gemm"):
        forward(problem)

        def only_dx() -> dict[str, torch.Tensor]:
            dx, *_ = backend.backward(
                problem.base, problem.dy, problem.x, problem.s, problem.low_rank,
                Need(True, False, False, False),
            )  # fmt: skip
            return {"x": problem.x, "dy": problem.dy, "dx": dx, "s": problem.s}

        counts = {n: len(k) for n, k in kernels_touching(only_dx).items()}
    assert counts == {"x": 0, "dy": 2, "dx": 1, "s": 0}


def test_the_count_sees_aten_too(entering):
    """The plan that adds the branch to torch's product touches y twice."""
    entering(use_plan("cublas"))
    problem = Problem(Case(48, 136, 72, 16))
    touched = kernels_touching(lambda: forward(problem))
    assert touched["y"] == ["aten.mm.default", "expand_kernel"]
