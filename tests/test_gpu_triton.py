"""The Triton kernels on a real GPU: `pytest -m gpu tests/test_gpu_triton.py`."""

import math
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import lora_kernels
from lora_kernels import _env, backends
from lora_kernels.backends import plans
from lora_kernels.backends.dropout import keep_mask, keep_scale

pytest.importorskip("triton")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PLANS = tuple(plan for plan in _env.PLANS if plan != "aten")
SCALING = 0.75


@pytest.fixture(autouse=True)
def forced(monkeypatch):
    """The Triton backend, and nothing left of an earlier choice."""
    monkeypatch.setattr(_env, "BACKEND", "triton")
    backends._forced_triton.cache_clear()
    yield monkeypatch
    backends._forced_triton.cache_clear()


class Problem:
    """Inputs on the GPU, leaves that require grad, and a gradient of the output."""

    def __init__(self, M, N, K, r, dtype=torch.bfloat16, p=0.0, adapters=None) -> None:
        generator = torch.Generator("cuda").manual_seed(M + N + K + r)

        def randn(*shape, dtype=dtype, scale=1.0):
            values = torch.randn(*shape, device="cuda", generator=generator) * scale
            return values.to(dtype)

        adapters = adapters or dtype
        self.dtype, self.p = dtype, p
        self.x = randn(M, K).requires_grad_()
        self.weight = randn(N, K, scale=K**-0.5)
        self.bias = randn(N)
        self.a = randn(r, K, dtype=adapters, scale=K**-0.5).requires_grad_()
        self.b = randn(N, r, dtype=adapters, scale=r**-0.5).requires_grad_()
        self.dy = randn(M, N)
        self.seed = torch.tensor([1234567890123], device="cuda")

    def forward(self) -> torch.Tensor:
        return lora_kernels.lora_linear(
            self.x, self.weight, self.a, self.b, self.bias,
            scaling=SCALING, dropout_p=self.p, seed=self.seed,
        )  # fmt: skip

    def run(self) -> list[torch.Tensor]:
        y = self.forward()
        return [y.detach(), *torch.autograd.grad(y, (self.x, self.a, self.b), self.dy)]

    def unfused(self, dtype: torch.dtype) -> list[torch.Tensor]:
        x, w, bias, dy = (t.detach().to(dtype) for t in (self.x, self.weight, self.bias, self.dy))
        a, b = (t.detach().to(self.dtype).to(dtype) for t in (self.a, self.b))
        leaves = [t.requires_grad_() for t in (x, a, b)]
        dropped = x
        if self.p:
            mask = keep_mask(self.seed, 0, *x.shape, self.p)
            dropped = x * (mask * keep_scale(self.p)).to(dtype)
        y = F.linear(x, w, bias) + F.linear(F.linear(dropped, a) * SCALING, b)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def error(out: torch.Tensor, exact: torch.Tensor) -> float:
    assert out.isfinite().all()
    return ((out.double() - exact).norm() / exact.norm()).item()


SHAPES = [
    (4096, 4096, 4096, 16),
    (2048, 11008, 4096, 64),
    (1000, 1544, 1032, 16),
    (129, 127, 257, 3),
    (63, 264, 1000, 200),
    (1, 4096, 4096, 8),
]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_accuracy(forced, plan, dtype, p):
    forced.setattr(_env, "PLAN", plan)
    logs = []
    for shape in SHAPES:
        name = str(dtype).removeprefix("torch.")
        if plans.refusal(plan, plans.Call("forward", name, *shape, p > 0)):
            continue
        wide = torch.float32 if shape[3] == 64 else None
        problem = Problem(*shape, dtype, p, wide)
        exact, rival = problem.unfused(torch.float64), problem.unfused(dtype)
        for out, other, true in zip(problem.run(), rival, exact, strict=True):
            ours, theirs = error(out, true), error(other, true)
            assert ours <= 2 * theirs + torch.finfo(dtype).eps, (shape, ours, theirs)
            if min(ours, theirs) > 0:
                logs.append(math.log(ours / theirs))
    assert logs
    assert math.exp(sum(logs) / len(logs)) <= 1.02


@pytest.mark.parametrize("plan", PLANS)
def test_same_bits_over_50_runs(forced, plan):
    forced.setattr(_env, "PLAN", plan)
    problem = Problem(64 if plan == "decode" else 1024, 1024, 1024, 16, p=0.1)
    first = problem.run()
    for _ in range(50):
        assert all(map(torch.equal, first, problem.run()))


@pytest.mark.parametrize("plan", PLANS)
def test_graph_replay_sees_new_inputs_and_seeds(forced, plan):
    forced.setattr(_env, "PLAN", plan)
    problem = Problem(64, 512, 512, 16, p=0.5)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            problem.run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = problem.run()
    for step in range(3):
        problem.seed.fill_(step)
        with torch.no_grad():
            problem.x.mul_(0.5)
        graph.replay()
        replayed = [t.clone() for t in captured]
        assert all(map(torch.equal, replayed, problem.run()))


def test_two_streams(forced):
    forced.setattr(_env, "PLAN", "shrink_gemm")
    problems = [Problem(2048, 1024, 1024, r, p=0.1) for r in (16, 64)]
    expected = [problem.run() for problem in problems]
    streams = [torch.cuda.Stream() for _ in problems]
    torch.cuda.synchronize()
    for _ in range(20):
        found = []
        for stream, problem in zip(streams, problems, strict=True):
            with torch.cuda.stream(stream):
                found.append(problem.run())
        torch.cuda.synchronize()
        for outputs, right in zip(found, expected, strict=True):
            assert all(map(torch.equal, outputs, right))


def test_autograd_from_another_thread(forced):
    """TMA descriptors take scratch from an allocator that a new thread does not inherit."""
    forced.setattr(_env, "PLAN", "shrink_gemm")
    problem = Problem(1024, 1024, 1024, 16)
    expected, found = problem.run(), []
    thread = threading.Thread(target=lambda: found.extend(problem.run()))
    thread.start()
    thread.join()
    assert found
    assert all(map(torch.equal, found, expected))


def test_checkpoint_recomputes_the_mask(forced):
    forced.setattr(_env, "PLAN", "shrink_gemm")
    problem = Problem(512, 512, 512, 16, p=0.5)
    plain = problem.run()
    y = checkpoint(lambda x: problem.forward(), problem.x, use_reentrant=False)
    again = [y.detach(), *torch.autograd.grad(y, (problem.x, problem.a, problem.b), problem.dy)]
    assert all(map(torch.equal, plain, again))


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_compiled_in_full_graph(forced, p):
    forced.setattr(_env, "PLAN", "shrink_gemm")
    problem = Problem(256, 512, 512, 16, p=p)
    expected = problem.run()
    y = torch.compile(problem.forward, fullgraph=True)()
    found = [y.detach(), *torch.autograd.grad(y, (problem.x, problem.a, problem.b), problem.dy)]
    assert all(map(torch.equal, found, expected))


def test_forward_allocates_no_copy_of_a_full_size_array(forced):
    """Beside y and s: partial sums and descriptors, a few MiB however large x is."""
    forced.setattr(_env, "PLAN", "shrink_gemm")
    problem = Problem(16384, 4096, 4096, 16, p=0.1)
    problem.forward()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = problem.forward()
    extra = torch.cuda.max_memory_allocated() - before - y.numel() * y.element_size()
    assert extra < 16 << 20, extra


SANITIZED = """
import torch
from lora_kernels import _env
from tests.test_gpu_triton import PLANS, Problem
for plan in PLANS:
    _env.PLAN = plan
    Problem(33, 72, 136, 16, p=0.25).run()
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    root = Path(__file__).parent.parent
    environment = os.environ | {"LORA_KERNELS_BACKEND": "triton", "PYTHONPATH": str(root)}
    # Torch's caching allocator would hide an overrun inside one of its blocks.
    environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", SANITIZED]
    run = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
