"""The elementwise kernels of gated activations in Triton's interpreter, against ATen's calls."""

import pytest
import torch
from interpreted import poisoned_memory

from lora_kernels.backends import gating as plain

__all__ = ["poisoned_memory"]  # a fixture of every test
pytestmark = pytest.mark.interpreted


@pytest.fixture
def kernels():
    from lora_kernels.backends.triton import gating

    return gating


def test_no_deviation(kernels):
    assert tuple(plain.ACTIVATIONS) == kernels.ACTIVATIONS
    assert kernels.deviation(torch.device("cpu"), plain._gated, plain._gradients) is None


@pytest.mark.parametrize("act", plain.ACTIVATIONS)
@pytest.mark.parametrize("size", [(1, 1), (9, 257), (30, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_halves_of_wider_rows(kernels, act, size, dtype):
    M, N = size
    generator = torch.Generator().manual_seed(M)
    both = (4 * torch.randn(M, 2 * N, generator=generator)).to(dtype)
    g, u = both.chunk(2, 1)
    dh = torch.randn(M, N, generator=generator).to(dtype)
    close = (2e-3, 2e-3) if dtype == torch.float16 else (1e-4, 3e-5)
    tolerance = dict(zip(("rtol", "atol"), close, strict=True))
    torch.testing.assert_close(kernels.gated(g, u, act), plain._gated(g, u, act), **tolerance)
    out, right = (torch.full((M, 2 * N), torch.nan, dtype=dtype) for _ in range(2))
    kernels.gradients((g, u), dh, act, tuple(out.chunk(2, 1)))
    plain._gradients((g, u), dh, act, tuple(right.chunk(2, 1)))
    torch.testing.assert_close(out, right, **tolerance)
    turned = u.t().contiguous().t()  # other strides than g's
    plain._gradients((g, turned), dh, act, tuple(right.chunk(2, 1)))
    kernels.gradients((g, turned), dh, act, tuple(out.chunk(2, 1)))
    torch.testing.assert_close(out, right, **tolerance)
    torch.testing.assert_close(kernels.gated(g, turned, act), plain._gated(g, u, act), **tolerance)
    memory = dh.clone()
    other = torch.empty_like(memory)
    kernels.gradients((g, u), memory, act, (other, memory))
    assert torch.equal(torch.cat([other, memory], 1), out)
