"""Microbenchmarks for pytest-benchmark, whose tables compare the peers of one group.

    pytest benchmarks --benchmark-only

The host groups take so small a layer that what is timed is the work of the host per call: on a GPU
its kernels end before the next call can start one. The decode groups (GPU) replay CUDA graphs; the
column of extra information has the weight traffic in GB/s from a cold L2 cache, between events.
"""

import statistics

import pytest
import torch

from benchmarks.peers import ADDMM, FROZEN, OURS, PEFT, PEFT_FUSED, build
from benchmarks.report import weight_gb_s
from benchmarks.shapes import decode
from lora_kernels.testing import Case, problem
from lora_kernels.tuning.clock import graphed, interleaved

GPU = torch.cuda.is_available()
DEVICE, DTYPE = torch.device("cuda" if GPU else "cpu"), "bf16" if GPU else "fp32"
TINY = Case(4, 64, 64, 8, DTYPE)
LAYER = Case(8192, 4096, 4096, 16, DTYPE) if GPU else Case(256, 1024, 1024, 16, DTYPE)
ROW = TINY._replace(M=1)
NAMES = (FROZEN, ADDMM, PEFT, OURS)
PEFTS = (PEFT, PEFT_FUSED)


def _ignore() -> None:
    pass


def _finish() -> None:
    if GPU:
        torch.cuda.synchronize()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.benchmark(group="host time per call, forward without gradients")
def test_host_forward(benchmark, name):
    p = problem(TINY, DEVICE)
    layer, x = build(name, p).layer, p.x.detach()
    with torch.no_grad():
        benchmark(layer, x)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.benchmark(group="host time per call, forward and backward")
def test_host_both(benchmark, name):
    p = problem(TINY, DEVICE)
    benchmark(build(name, p).turn(p), _ignore)


@pytest.mark.parametrize("name", PEFTS)
@pytest.mark.benchmark(group="PEFT's layer, one row, forward without gradients")
def test_peft_forward(benchmark, name):
    p = problem(ROW, DEVICE)
    layer, x = build(name, p).layer, p.x.detach()
    with torch.no_grad():
        benchmark(layer, x)


@pytest.mark.parametrize("name", PEFTS)
@pytest.mark.benchmark(group="PEFT's layer, one row, forward and backward")
def test_peft_both(benchmark, name):
    p = problem(ROW, DEVICE)
    benchmark(build(name, p).turn(p), _ignore)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.benchmark(group=f"one layer, forward and backward, {LAYER}")
def test_layer(benchmark, name):
    p = problem(LAYER, DEVICE)
    turn = build(name, p).turn(p)

    def step() -> None:
        turn(_ignore)
        _finish()

    benchmark(step)


@pytest.mark.skipif(not GPU, reason="CUDA graphs need a CUDA device")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", decode(), ids=str)
def test_decode(benchmark, name, case):
    benchmark.group = f"decode, CUDA graph, {case}"
    p = problem(case, DEVICE)
    layer, x = build(name, p).layer, p.x.detach()

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return layer(x)

    replay = graphed(forward)

    def turn(mark) -> None:
        replay()
        mark()

    times = [part[0] for part in interleaved({name: turn}, DEVICE, 0.1, (10, 100))[name]]
    benchmark.extra_info["gb_s"] = weight_gb_s(case, 1e3 * statistics.median(times))

    def step() -> None:
        replay()
        _finish()

    benchmark(step)
