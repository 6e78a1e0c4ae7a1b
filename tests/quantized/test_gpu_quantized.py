"""Quantised weights on a card: the decoding kernel's bits, values, gradients, a captured graph."""

import pytest
import torch
from torch.nn import functional as F

from lora_kernels import lora_linear, quantize
from lora_kernels.backends import dequantized
from lora_kernels.weights import KINDS

pytestmark = pytest.mark.gpu
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def test_the_kernel_is_vouched_for():
    assert dequantized._vouched(torch.device("cuda", torch.cuda.current_device()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits(kind, dtype):
    from lora_kernels.backends.triton import decoding

    weight = quantize(torch.randn(1000, 2048), kind).to("cuda")
    rows, columns = slice(5, 1000), slice(128, 2048)
    out = torch.empty(995, 1920, dtype=dtype, device="cuda")
    decoding.decode(weight, rows, columns, out)
    assert torch.equal(out, weight.dequantize(dtype)[rows, columns])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", [1, 16, 700])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_values_and_gradients(kind, dtype, M, p):
    N, K, r = 768, 1024, 16
    weight = quantize(torch.randn(N, K) * K**-0.5, kind).to("cuda")
    x = torch.randn(M, K, device="cuda").to(dtype).requires_grad_()
    a = (torch.randn(r, K, device="cuda") * K**-0.5).to(dtype).requires_grad_()
    b = (torch.randn(N, r, device="cuda") * 0.2).to(dtype).requires_grad_()
    dy = torch.randn(M, N, device="cuda").to(dtype)
    options = {"scaling": 2.0, "dropout_p": p, "seed": 5}
    leaves = (x, a, b)
    y = lora_linear(x, weight, a, b, **options)
    ours = [y, *torch.autograd.grad(y, leaves, dy)]
    dense = weight.dequantize(dtype)
    y = lora_linear(x, dense, a, b, **options)
    theirs = [y, *torch.autograd.grad(y, leaves, dy)]
    tolerance = {torch.float32: 1e-2, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).float().norm() <= tolerance * other.float().norm()
    again = lora_linear(x, weight, a, b, **options)
    assert torch.equal(again, ours[0])


def test_a_captured_graph():
    weight = quantize(torch.randn(512, 512), "nf4").to("cuda")
    x = torch.randn(8, 512, device="cuda")
    a, b = torch.randn(8, 512, device="cuda"), torch.randn(512, 8, device="cuda")
    with torch.no_grad():
        lora_linear(x, weight, a, b)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = lora_linear(x, weight, a, b)
        x.copy_(torch.randn(8, 512))
        graph.replay()
        expected = F.linear(x, weight.dequantize(torch.float32)) + F.linear(F.linear(x, a), b)
    torch.testing.assert_close(y, expected, rtol=1e-2, atol=0.5)
