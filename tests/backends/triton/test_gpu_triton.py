"""What the Triton kernels compute on a real GPU: `pytest -m gpu`."""

import math

import pytest
import torch

pytest.importorskip("triton")

from gpu_problem import (
    DEVICE,
    PLANS,
    SCALING,
    Problem,
    error,
    most_rows,
    refused,
    triton_backend,
)
from torch.utils.checkpoint import checkpoint

import lora_kernels
from lora_kernels.backends.cuda.choice import candidates, use_plan
from lora_kernels.backends.cuda.plan import Call
from lora_kernels.backends.device import target
from lora_kernels.backends.dropout import keep_mask, keep_scale

pytestmark = pytest.mark.gpu
assert triton_backend  # a fixture, used by being here

MODEL = [(4096, 4096, 4096, 16), (2048, 11008, 4096, 64), (1, 4096, 4096, 8), (64, 4096, 4096, 16)]
ODD = [(1000, 1544, 1032, 16), (129, 127, 257, 3), (63, 264, 1000, 200), (1, 130, 72, 8)]
HALF, FULL = torch.float16, torch.float32


def judge(problem: Problem, outputs: list[torch.Tensor]) -> list[float]:
    """Logarithms of error over the error of unfused torch, each held to the rule of one case."""
    eps = torch.finfo(problem.dtype).eps
    if problem.dtype == FULL:  # no accumulator is wider: the order of a sum costs sqrt(length) eps
        eps *= max(1.0, max(*problem.x.shape, *problem.dy.shape) ** 0.5 / 2)
    exact, rival = problem.unfused(torch.float64), problem.unfused(problem.dtype)
    logs = []
    for out, other, true in zip(outputs, rival, exact, strict=True):
        ours, theirs = error(out, true), error(other, true)
        assert ours <= 2 * theirs + eps, (tuple(problem.x.shape), ours, theirs)
        if min(ours, theirs) > 0:
            logs.append(math.log(ours / theirs))
    return logs


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(
    ("dtype", "p", "shapes"),
    [
        (torch.bfloat16, 0.0, MODEL + ODD),
        (torch.bfloat16, 0.1, MODEL + ODD),
        (HALF, 0.1, MODEL[:1] + ODD[:2]),
        (HALF, 0.0, MODEL[2:3] + ODD[2:3]),
        (FULL, 0.1, [(512, 1024, 1024, 16), *ODD[1:3]]),
        (FULL, 0.0, [(512, 1024, 1024, 16), *ODD[1:3]]),
    ],
)
def test_accuracy(plan, dtype, p, shapes):
    served = [shape for shape in shapes if not refused(plan, dtype, shape, p)]
    if not served:
        pytest.skip(f"the plan serves none of the shapes: {refused(plan, dtype, shapes[0], p)}")
    logs = []
    with use_plan(plan):
        for shape in served:
            problem = Problem(*shape, dtype, p, FULL if shape[3] == 64 else None)
            logs += judge(problem, problem.run())
    assert logs
    if dtype != FULL:
        assert math.exp(sum(logs) / len(logs)) <= 1.02


@pytest.mark.parametrize("r", [16, 64])
def test_branch_on_a_foreign_base(r):
    """lora_add, in place as well; the reference is the same branch on a base of zero weight."""
    problem = Problem(1000, 1544, 1032, r, p=0.1)
    base = torch.randn_like(problem.dy)
    before = base.clone()
    arguments = {"scaling": SCALING, "dropout_p": 0.1, "seed": problem.seed}
    y = lora_kernels.lora_add(base, problem.x, problem.a, problem.b, **arguments)
    gradients = torch.autograd.grad(y, (problem.x, problem.a, problem.b), problem.dy)
    assert torch.equal(base, before)
    with torch.no_grad():
        lora_kernels.lora_add_(base, problem.x, problem.a, problem.b, **arguments)
    assert torch.equal(base, y)
    problem.weight.zero_()
    problem.bias.zero_()
    exact, rival = problem.unfused(torch.float64), problem.unfused(problem.dtype)
    eps = torch.finfo(problem.dtype).eps
    for ours, theirs, true in zip(gradients, rival[1:], exact[1:], strict=True):
        assert error(ours, true) <= 2 * error(theirs, true) + eps
    exact = before.double() + exact[0]
    assert error(y, exact) <= 2 * error(before + rival[0], exact) + eps


@pytest.mark.parametrize(("op", "p"), [("forward", 0.0), ("backward", 0.1)])
def test_every_candidate_of_a_tuner(op, p):
    """All tiles that a tuned table may come to hold, at one shape."""
    problem = Problem(1024, 1024, 1024, 16, p=p)
    call = Call(op, "bfloat16", 1024, 1024, 1024, 16, p > 0)
    listed = candidates(call, target(problem.x.device))
    assert len(listed) > len(PLANS)
    for plan, fields in listed:
        with use_plan(plan, fields):
            judge(problem, problem.run())


@pytest.mark.parametrize("seed", [0, 2**31 + 5, -1, 0x0123456789ABCDEF])
def test_mask_is_the_references(seed):
    M, K, p = 70, 137, 0.3
    seed = torch.tensor([seed], device=DEVICE)
    kept = keep_mask(seed, 0, M, K, p) * keep_scale(p)
    ones = torch.ones(M, K, device=DEVICE, requires_grad=True)
    eye = torch.eye(K, device=DEVICE, requires_grad=True)
    y = lora_kernels.lora_add(torch.zeros_like(ones), ones, eye, eye, dropout_p=p, seed=seed)
    assert torch.equal(y, kept.float())
    (dx,) = torch.autograd.grad(y, ones, torch.ones_like(y))
    assert torch.equal(dx, kept.float())


@pytest.mark.parametrize("plan", PLANS)
def test_same_bits_over_50_runs(plan):
    shape = (most_rows(plan, 1024), 1024, 1024, 16)
    if refused(plan, torch.bfloat16, shape, 0.0):
        pytest.skip(refused(plan, torch.bfloat16, shape, 0.0))
    p = 0.0 if refused(plan, torch.bfloat16, shape, 0.1) else 0.1
    problem = Problem(*shape, p=p)
    with use_plan(plan):
        first = problem.run()
        for _ in range(50):
            assert all(map(torch.equal, first, problem.run()))


def test_checkpoint_recomputes_the_mask():
    problem = Problem(512, 512, 512, 16, p=0.5)
    with use_plan("shrink_gemm"):
        plain = problem.run()
        y = checkpoint(lambda x: problem.forward(), problem.x, use_reentrant=False)
        assert all(map(torch.equal, plain, problem.outputs(y)))


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_compiled_in_full_graph(p):
    problem = Problem(256, 512, 512, 16, p=p)
    with use_plan("shrink_gemm"):
        expected = problem.run()
        y = torch.compile(problem.forward, fullgraph=True)()
        assert all(map(torch.equal, problem.outputs(y), expected))
