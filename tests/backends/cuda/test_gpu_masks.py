"""Dropout on a GPU without a tuned table: one elementwise kernel in place of ATen's hundred."""

import pytest
import torch

pytest.importorskip("triton")

from gpu_problem import DEVICE, Problem, error

from lora_kernels.backends import masks, use_backend
from lora_kernels.backends.dropout import keep_mask
from lora_kernels.backends.triton.launch import intercept

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("shape", [(4096, 4096), (70, 137), (1, 8), (33, 20_001)])
@pytest.mark.parametrize("words", [[7], [-1, 2**31 - 35, 4096]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_kernel_applies_the_mask_of_the_definition(dtype, words, shape):
    seed, p, first = torch.tensor(words, device=DEVICE), 0.3, 5
    x, term = (torch.randn(shape, device=DEVICE).to(dtype) for _ in range(2))
    keep = keep_mask(seed, first, *shape, p)
    mask = masks.mask(seed, first, *shape, p)
    launched = []

    def count(kernel, grid, args, meta, run):
        launched.append(kernel.fn.__name__)
        run()

    with intercept(count):
        assert torch.equal(mask.drop(x), x.masked_fill(~keep, 0))
        strided = x.t().contiguous().t()
        assert torch.equal(mask.drop(strided), x.masked_fill(~keep, 0))
        wide = term.to(torch.promote_types(dtype, torch.float32))
        expected = (x + (2 * wide).masked_fill(~keep, 0)).to(dtype)
        total = x.clone()
        mask.add_kept(total, wide, 2.0, slice(None))
        assert torch.equal(total, expected)
    assert set(launched) == {"mask_kernel"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(4096, 1024, 2048, 16), (129, 127, 257, 3)])
def test_the_composite_with_dropout_is_as_accurate_as_unfused(dtype, shape):
    problem = Problem(*shape, dtype=dtype, p=0.1)
    with use_backend("reference"):
        outputs = problem.run()
        again = problem.run()
    exact, rival = problem.unfused(torch.float64), problem.unfused(dtype)
    for out, same, other, true in zip(outputs, again, rival, exact, strict=True):
        assert torch.equal(out, same)
        assert error(out, true) <= 2 * error(other, true) + torch.finfo(dtype).eps * 2


def test_a_graph_captured_before_the_kernel_was_tried_takes_atens_mask(monkeypatch):
    monkeypatch.setattr(masks, "_right", {})
    seed = torch.tensor([11], device=DEVICE)
    x = torch.randn(64, 128, device=DEVICE)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        keep_mask(seed, 0, 64, 128, 0.5)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = masks.mask(seed, 0, 64, 128, 0.5).drop(x)
    assert not masks._right
    for words in (11, 12):
        seed.fill_(words)
        graph.replay()
        assert torch.equal(y, x.masked_fill(~keep_mask(seed, 0, 64, 128, 0.5), 0))
    assert type(masks.mask(seed, 0, 64, 128, 0.5)) is not masks.Mask
