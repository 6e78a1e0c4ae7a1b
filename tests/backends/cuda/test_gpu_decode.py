"""The compiled CUDA decode kernel on a real GPU: `pytest -m gpu`."""

import itertools
import math
import statistics

import pytest
import torch
import torch.nn.functional as F
from gpu_problem import DEVICE, error

from lora_kernels.backends.native import decode, extension
from lora_kernels.branch import Dense

pytestmark = pytest.mark.gpu
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SCALING = 0.75


@pytest.fixture(autouse=True)
def kernel():
    if not extension.cuda_available():
        pytest.skip(f"the CUDA kernels are not there: {extension.cuda_status()}")


def clusters() -> tuple[int, ...]:
    return (1, 2, 4, 8) if torch.cuda.get_device_capability()[0] >= 9 else (1,)


def make(M, N, K, r, dtype=BF16, adapters=None):
    generator = torch.Generator(DEVICE).manual_seed(M + N + K + r)

    def randn(*shape, dtype=dtype, scale=1.0):
        return (torch.randn(*shape, device=DEVICE, generator=generator) * scale).to(dtype)

    a = randn(r, K, dtype=adapters or dtype, scale=K**-0.5)
    b = randn(N, r, dtype=adapters or dtype, scale=r**-0.5)
    return randn(M, K), randn(N, K, scale=K**-0.5), a, b, randn(N)


def unfused(x, weight, a, b, bias, dtype):
    a, b = a.to(x.dtype).to(dtype), b.to(x.dtype).to(dtype)
    x, weight = x.to(dtype), weight.to(dtype)
    s = F.linear(x, a) * SCALING
    return F.linear(x, weight, None if bias is None else bias.to(dtype)) + F.linear(s, b), s


def run(tensors, tile, save_s=True):
    x, weight, a, b, bias = tensors
    base, tile = Dense(weight, bias), decode.DecodeTile(*tile)
    return decode.decode(x, base, (a, b), (SCALING, 1.0), save_s, tile)


def judge(tensors, tile) -> float:
    """Logarithm of our error over unfused torch's, y and s held to the rule of one case."""
    dtype = tensors[0].dtype
    y, s = run(tensors, tile)
    exact, rival = unfused(*tensors, torch.float64), unfused(*tensors, dtype)
    logs = []
    for out, other, true in zip((y, s), rival, exact, strict=True):
        ours, theirs = error(out, true), error(other, true)
        assert ours <= 2 * theirs + torch.finfo(dtype).eps, (tile, ours, theirs)
        logs.append(math.log(max(ours, 1e-12) / max(theirs, 1e-12)))
    return logs[0]


@pytest.mark.parametrize(("dtype", "adapters"), [*itertools.product((BF16, F16), (None, F32))])
@pytest.mark.parametrize("M", [1, 2, 7, 8, 9, 16])
def test_accuracy(M, dtype, adapters):
    logs = []
    for N, K, r in ((4096, 4096, 16), (1031, 1032, 3), (14, 4096, 70), (130, 72, 200), (33, 8, 1)):
        tensors = make(M, N, K, r, dtype, adapters)
        for rows, warps, cluster in itertools.product((16, 32), (4, 8), clusters()):
            if warps == 4 or torch.cuda.get_device_capability()[0] >= 9:
                logs.append(judge(tensors, (rows, warps, cluster)))
    assert sum(logs) / len(logs) <= math.log(1.02)


def test_strides_and_no_bias():
    x, weight, a, b, _ = make(5, 520, 264, 24)
    wide = torch.full((5, 528), float("nan"), dtype=BF16, device=DEVICE)
    wide[:, 8:272] = x
    apart = torch.full((520, 512), float("nan"), dtype=BF16, device=DEVICE)
    apart[:, :264] = weight
    for bias in (None, torch.randn(2, 520, device=DEVICE)[0], torch.randn(520, 2)[:, 0].cuda()):
        judge((wide[:, 8:272], apart[:, :264], a, b.t().contiguous().t(), bias), (16, 4, 1))


def test_same_bits_over_50_runs_and_in_a_graph():
    tensors = make(16, 4096, 4096, 64)
    tile = (16, 8 if clusters()[-1] > 1 else 4, clusters()[-1])
    first = run(tensors, tile)
    for _ in range(50):
        assert all(map(torch.equal, first, run(tensors, tile)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(tensors, tile)
    for _ in range(3):
        graph.replay()
        assert all(map(torch.equal, first, captured))


def test_on_the_current_stream():
    """A kernel on the default stream would not wait for what is still being computed."""
    tensors = make(4, 512, 512, 8)
    expected = run(tensors, (16, 4, 1))[0]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    for _ in range(20):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(1_000_000)
            late = tensors[0].clone()
            y = run((late, *tensors[1:]), (16, 4, 1))[0]
        torch.cuda.synchronize()
        assert torch.equal(y, expected)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({0: lambda t: t.float()}, "x: must be bfloat16 or float16"),
        ({0: lambda t: t[:, :-4]}, "x: its columns must be a multiple of 8"),
        ({0: lambda t: t.repeat(5, 1)}, "x: must have 1 to 16 rows, got 20"),
        ({0: lambda t: t.t().contiguous().t()}, "x: rows must be contiguous"),
        ({1: lambda t: t.half()}, "weight: must have the dtype of x"),
        ({1: lambda t: t.cpu()}, "weight: must be a CUDA tensor"),
        ({2: lambda t: t[0]}, "lora_a: must have 2 dimensions"),
        ({2: lambda t: t.double()}, "lora_a: must have the dtype of x or float32"),
        ({3: lambda t: t[:-1]}, r"lora_b: must be \[64, 8\], got \[63, 8\]"),
        ({3: lambda t: t.half()}, "lora_b: must have the dtype of x or float32"),
        ({4: lambda t: t[:-1]}, "bias: must have 64 elements"),
        ({4: lambda t: t.half()}, "bias: must have the dtype of x or float32"),
    ],
)
def test_wrong_arguments_are_refused(changes, words):
    tensors = list(make(4, 64, 64, 8))
    for index, change in changes.items():
        tensors[index] = change(tensors[index])
    with pytest.raises(RuntimeError, match=words):
        run(tensors, (16, 4, 1), False)


@pytest.mark.parametrize("tile", [(8, 4, 1), (16, 5, 1), (16, 4, 3), (16, 4, 16)])
def test_wrong_tiles_are_refused(tile):
    with pytest.raises(RuntimeError, match=r"(rows|warps|cluster): must be"):
        run(make(4, 64, 64, 8), tile, False)


def test_one_launch_is_not_slower_than_three():
    """Against torch's product, shrink and expand; medians of interleaved rounds with cold weights,
    with room for noise. What it gains is the tuner's business."""
    tensors = make(1, 4096, 4096, 16)
    x, weight, a, b, _ = tensors
    tile = (16, 8, 4) if clusters()[-1] > 1 else (16, 4, 1)
    copies = [weight.clone() for _ in range(8)]

    def ours(w):
        run((x, w, a, b, None), tile, False)

    def plain(w):
        torch.addmm(F.linear(x, w), F.linear(x, a), b.t())

    ratios = []
    for _ in range(30):
        spent = []
        for function in (ours, plain):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for w in copies:
                function(w)
            end.record()
            end.synchronize()
            spent.append(begin.elapsed_time(end))
        ratios.append(spent[0] / spent[1])
    assert statistics.median(ratios) < 1.1
