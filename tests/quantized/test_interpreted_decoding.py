"""The kernels that decode quantised weights, in Triton's interpreter: the bits of `weights`, and
products of few rows."""

import pytest
import torch
from torch.nn import functional as F

from lora_kernels import lora_linear, quantize
from lora_kernels.backends.dropout import keep_mask, keep_scale
from lora_kernels.backends.triton import decoding
from lora_kernels.backends.triton.launch import intercept
from lora_kernels.weights import Float8, FourBit, Int8

pytestmark = pytest.mark.interpreted
# The interpreter cuts bf16 off.
DTYPES = (torch.float32, torch.float16)


def weights():
    dense, odd = torch.randn(21, 256), torch.randn(9, 90)
    nf4, int8 = quantize(dense, "nf4"), quantize(dense, "int8")
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).repeat(3, 1)
    yield from (nf4, int8, quantize(dense, "int4"), quantize(odd, "nf4"), quantize(odd, "int8"))
    yield from (quantize(dense, "fp8"), quantize(dense, "fp8", block=32), quantize(odd, "fp8"))
    yield quantize(odd, "fp8", block=64)
    yield FourBit(nf4.shape, nf4.codes, nf4.table, torch.rand(84).half())
    yield Int8(int8.shape, int8.codes, int8.scale, torch.randn(21), factor=1 / 127)
    yield Float8((3, 256), codes, torch.tensor([[0.37]]))


@pytest.mark.parametrize("index", range(12))
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits(index, dtype):
    weight = list(weights())[index]
    N, K = weight.shape
    whole = weight.dequantize(dtype)
    for rows, columns in (
        (slice(0, N), slice(0, K)),
        (slice(1, N), slice(2, K - 2)),
        (slice(N - 1, N), slice(64, 66)),
    ):
        assert decoding.decodes(weight, columns, dtype)
        wide = torch.full((rows.stop - rows.start, columns.stop - columns.start + 3), 7.0).to(dtype)
        out = wide[:, :-3]
        decoding.decode(weight, rows, columns, out)
        right = whole[rows, columns]
        assert torch.equal(out.nan_to_num(99), right.nan_to_num(99))
        assert torch.equal(out.isnan(), right.isnan())
        assert (wide[:, -3:] == 7).all()


def test_what_it_does_not_decode():
    weight = quantize(torch.randn(8, 64), "nf4")
    assert not decoding.decodes(weight, slice(1, 64), torch.float32)
    assert not decoding.decodes(weight, slice(0, 64), torch.float64)
    assert decoding.decodes(quantize(torch.randn(8, 63), "int8"), slice(1, 63), torch.float32)
    odd = quantize(torch.randn(8, 63), "nf4")
    assert not decoding.decodes(odd, slice(0, 63), torch.float32)


def test_deviation(monkeypatch):
    assert decoding.deviation(torch.device("cpu")) is None
    monkeypatch.setattr(decoding, "decode", lambda weight, rows, columns, out: out.zero_())
    assert "decodes nf4 to other numbers" in decoding.deviation(torch.device("cpu"))


@pytest.mark.parametrize("index", range(12))
@pytest.mark.parametrize("dtype", DTYPES)
def test_few_rows(index, dtype):
    """y and s against fp64, no worse than unfused torch; gradients by the backward for any rows."""
    weight = list(weights())[index]
    N, K = weight.shape
    launched = []
    for M, r, p, bias in ((1, 1, 0.0, False), (5, 3, 0.3, True), (19, 40, 0.0, True)):
        generator = torch.Generator().manual_seed(M)
        x = torch.randn(M, K, generator=generator).to(dtype).requires_grad_()
        a = (torch.randn(r, K, generator=generator) * K**-0.5).to(dtype).requires_grad_()
        b = torch.randn(N, r, generator=generator).to(dtype).requires_grad_()
        offset = torch.randn(N, generator=generator).to(dtype) if bias else None
        with intercept(
            lambda kernel, grid, args, meta, run: launched.append(name(kernel)) or run()
        ):
            y = lora_linear(x, weight, a, b, offset, scaling=1.5, dropout_p=p, seed=9)
        results = []
        for other in (torch.float64, dtype):
            given = [t.detach().to(other) for t in (x, a, b)]
            dropped = given[0]
            if p:
                keep = keep_mask(torch.tensor([9]), 0, M, K, p)
                dropped = given[0] * keep * keep_scale(p)
            W = weight.dequantize(dtype).to(other)
            base = F.linear(given[0], W, None if offset is None else offset.to(other))
            s = F.linear(dropped.to(other), given[1])
            results.append((base + 1.5 * F.linear(s, given[2])).double())
        exact, unfused = (out.nan_to_num() for out in results)
        mine = (y.detach().double().nan_to_num() - exact).norm()
        assert mine <= 2 * (unfused - exact).norm() + 4 * torch.finfo(dtype).eps * exact.norm()
        y.nan_to_num().square().sum().backward()
        assert all(t.grad is not None for t in (x, a, b))
    assert launched.count("coded_kernel") == 3


def name(kernel):
    return getattr(kernel, "fn", kernel).__name__
