"""The elementwise kernels of columns in Triton's interpreter, against ATen's calls."""

import pytest
import torch
from interpreted import poisoned_memory

from lora_kernels.backends import columns as plain

__all__ = ["poisoned_memory"]  # a fixture of every test
pytestmark = pytest.mark.interpreted


@pytest.fixture
def kernels():
    from lora_kernels.backends.triton import columns

    return columns


def test_no_deviation(kernels):
    assert kernels.deviation(torch.device("cpu"), plain._forward, plain._backward) is None


@pytest.mark.parametrize("size", [(1, 1), (3, 17), (16, 256), (17, 257), (300, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("turned", [False, True])
def test_values(kernels, size, dtype, turned):
    M, N = size
    generator = torch.Generator().manual_seed(M)

    def matrix():
        values = torch.randn(N, M, generator=generator).to(dtype)
        return values.t() if turned else values.t().contiguous()

    z, dy, added = matrix(), matrix(), matrix()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    factor = torch.randn(N, generator=generator).to(wide)
    for more in (None, added[0], added):
        found, right = kernels.forward(z, factor, more), plain._forward(z, factor, more)
        torch.testing.assert_close(found, right)
        assert found.is_contiguous()
    for need_z, other in ((True, z), (True, None), (False, z)):
        found = kernels.backward(dy, other, factor, need_z)
        right = plain._backward(dy, other, factor, need_z)
        for one, expected in zip(found, right, strict=True):
            assert (one is None) == (expected is None)
            if one is not None:
                rtol = 1e-3 if dtype == torch.float16 else 1e-5
                torch.testing.assert_close(one, expected, rtol=rtol, atol=1e-4)


def test_leading_dimensions(kernels):
    z, factor, added = torch.randn(2, 3, 5), torch.randn(5), torch.randn(2, 3, 5)
    torch.testing.assert_close(kernels.forward(z, factor, added), plain._forward(z, factor, added))
    dz, _ = kernels.backward(added, z, factor, True)
    assert dz.shape == z.shape
