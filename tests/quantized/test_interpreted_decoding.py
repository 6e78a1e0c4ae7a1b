"""The kernel that decodes quantised weights, in Triton's interpreter: the bits of `weights`."""

import pytest
import torch

from lora_kernels import quantize
from lora_kernels.backends.triton import decoding
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
