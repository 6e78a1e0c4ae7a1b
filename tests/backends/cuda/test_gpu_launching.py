"""How the Triton kernels are launched on a real GPU: graphs, streams, threads, memory, tools."""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from gpu_problem import PLANS, Problem, most_rows, refused, triton_backend
from racecheck import hazards

from lora_kernels.backends.cuda.choice import use_plan

pytestmark = pytest.mark.gpu
assert triton_backend  # a fixture, used by being here

TESTS = Path(__file__).parents[2]


@pytest.mark.parametrize("plan", PLANS)
def test_graph_replay_sees_new_inputs_and_seeds(plan):
    shape = (most_rows(plan, 64), 512, 512, 16)
    if refused(plan, torch.bfloat16, shape, 0.0):
        pytest.skip(refused(plan, torch.bfloat16, shape, 0.0))
    problem = Problem(*shape, p=0.0 if refused(plan, torch.bfloat16, shape, 0.5) else 0.5)
    with use_plan(plan):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
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


@pytest.mark.parametrize(("plan", "p"), [("shrink_gemm", 0.1), ("flag", 0.0), ("gluon", 0.0)])
def test_two_streams(plan, p):
    problems = [Problem(2048, 1024, 1024, r, p=p) for r in (16, 64)]
    with use_plan(plan):
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


@pytest.mark.parametrize("plan", ["shrink_gemm", "flag", "gluon"])
def test_autograd_from_another_thread(plan):
    """TMA descriptors take scratch from an allocator that a new thread does not inherit."""
    problem = Problem(1024, 1024, 1024, 16)
    found = []
    with use_plan(plan):
        expected = problem.run()
        thread = threading.Thread(target=lambda: found.extend(problem.run()))
        thread.start()
        thread.join()
    assert found
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("M", [64, 4096])
@pytest.mark.parametrize("split", [1, 4])
def test_overlapped_launches(M, split):
    """The GEMM begins while s is being made: the bits of plain order, call after call and replayed,
    with other calls between that take and free memory."""
    problem, other = Problem(M, 1024, 2048, 16), Problem(512, 1024, 1024, 64)
    tiles = {"shrink": {"split": split}}
    with use_plan("shrink_gemm", tiles):
        right = problem.run()
    with use_plan("shrink_gemm", tiles | {"gemm": {"pdl": 1}}):
        for _ in range(100):
            other.run()
            assert all(map(torch.equal, problem.run(), right))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = problem.forward()
        for _ in range(20):
            y.detach().fill_(float("nan"))
            graph.replay()
            assert torch.equal(y, right[0])


@pytest.mark.parametrize("plan", ["shrink_gemm", "grouped", "dual", "flag", "gluon"])
def test_no_copy_of_a_full_size_array(plan):
    """Beside what a call returns: partial sums and descriptors, a few MiB however large x is, and
    in backward one partial dB for 128 rows."""
    M, N, K, r = 16384, 4096, 4096, 16
    problem = Problem(M, N, K, r, p=0.1 if plan == "shrink_gemm" else 0.0)

    def extra(run) -> int:
        run()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        kept = run()
        torch.cuda.synchronize()
        kept = sum(t.numel() * t.element_size() for t in kept)
        return torch.cuda.max_memory_allocated() - before - kept

    with use_plan(plan):
        forward = extra(lambda: [problem.forward()])
        y = problem.forward()
        leaves = (problem.x, problem.a, problem.b)
        backward = extra(lambda: torch.autograd.grad(y, leaves, problem.dy, retain_graph=True))
    assert forward < 16 << 20, forward
    assert backward < (16 << 20) + M // 128 * N * r * 4, backward


def run_python(code: str, *before: str, timeout: int) -> subprocess.CompletedProcess:
    """The code in a process of its own, which a hanging kernel cannot take along."""
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    environment = os.environ | {"LORA_KERNELS_BACKEND": "triton", "PYTHONPATH": path}
    if before:  # torch's caching allocator would hide an overrun inside one of its blocks
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    command = [*before, sys.executable, "-c", code]
    return subprocess.run(
        command, env=environment, cwd=TESTS.parent, capture_output=True, text=True, timeout=timeout
    )


FLAGS = """
import torch
from gpu_problem import Problem
from lora_kernels.backends.cuda.choice import use_plan
problems = [Problem(M, 512, 256, 16) for M in (4096, 4000)]
streams = [torch.cuda.Stream() for _ in problems]
with torch.no_grad(), use_plan("flag"):
    expected = [problem.forward() for problem in problems]
    torch.cuda.synchronize()
    wrong = [torch.zeros((), dtype=torch.bool, device=y.device) for y in expected]
    for _ in range(5000):
        for problem, stream, y, fault in zip(problems, streams, expected, wrong):
            with torch.cuda.stream(stream):
                fault |= (problem.forward() != y).any()
    torch.cuda.synchronize()
assert not any(map(bool, wrong))
"""


def test_10000_flag_launches():
    """On two streams, so that kernels whose programs wait for each other share the device."""
    run = run_python(FLAGS, timeout=120)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]


SANITIZED = """
import torch
from gpu_problem import PLANS, Problem, refused
from lora_kernels.backends.cuda.choice import use_plan
for shape in ((33, 72, 136, 16), (130, 257, 129, 3), (9, 200, 136, 40)):
    for plan in PLANS:
        for p in (0.0, 0.25):
            if not refused(plan, torch.bfloat16, shape, p):
                with use_plan(plan):
                    Problem(*shape, p=p).run()
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    # Racecheck's own status counts what `hazards` knows better.
    strict = ["--error-exitcode", "9"] if tool == "memcheck" else []
    run = run_python(SANITIZED, sanitizer, "--tool", tool, *strict, timeout=240)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    if tool == "racecheck":
        assert not (found := hazards(run.stdout)), "\n".join(found)
