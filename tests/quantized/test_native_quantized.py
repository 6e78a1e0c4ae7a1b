"""The CPU kernels of quantised weights, by every instruction set that this CPU has."""

import pytest
import torch
from torch.nn import functional as F

from lora_kernels import quantize
from lora_kernels.backends import use_backend
from lora_kernels.backends.native import extension
from lora_kernels.backends.native import quantized as native
from lora_kernels.backends.scaling import split
from lora_kernels.branch import Branch
from lora_kernels.weights import FourBit, Int8

if not extension.available():
    pytest.skip(extension.status(), allow_module_level=True)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EVERY = range(extension.best_isa() + 1)
NAMES = [extension.ISA_NAMES[isa] for isa in EVERY]


@pytest.fixture(params=EVERY, ids=NAMES)
def isa(request, monkeypatch):
    monkeypatch.setattr(extension, "best_isa", lambda: request.param)
    monkeypatch.setattr(native, "most_coded", lambda kind, dtype: 99)
    return request.param


def weights(N, K):
    """What the kernels know: the last of them decode alone."""
    dense = torch.randn(N, K)
    int8, nf4 = quantize(dense, "int8"), quantize(dense, "nf4")
    known = [int8, nf4, quantize(dense, "int4", block=64)]
    known.append(FourBit((N, K), nf4.codes, nf4.table, torch.rand(N * K // 64)))
    known.append(Int8((N, K), int8.codes, int8.scale, factor=1 / 127))
    return known, Int8((N, K), int8.codes, int8.scale, torch.randn(N))


@pytest.mark.parametrize("shape", [(1, 64), (33, 128), (5, 1344), (64, 2048)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_decoded_bits_are_those_of_the_reference(isa, shape, dtype):
    N, K = shape
    known, decoded = weights(N, K)
    for weight in (*known, decoded):
        whole = weight.dequantize(dtype)
        for rows, columns in (
            (slice(0, N), slice(0, K)), (slice(N // 2, N), slice(0, 64)),
            (slice(0, 1), slice(K - 64, K)),
        ):  # fmt: skip
            assert native.decodes(weight, columns, dtype)
            out = torch.empty(rows.stop - rows.start, columns.stop - columns.start, dtype=dtype)
            native.decode(weight, rows, columns, out)
            assert torch.equal(out, whole[rows, columns])


def test_any_number_of_columns_of_int8(isa):
    weight = quantize(torch.randn(5, 77), "int8")
    whole = weight.dequantize(torch.float32)
    for left, right in ((0, 77), (3, 4), (1, 50)):
        out = torch.empty(5, right - left)
        native.decode(weight, slice(0, 5), slice(left, right), out)
        assert torch.equal(out, whole[:, left:right])


@pytest.mark.parametrize("shape", [(33, 128), (41, 1344), (130, 2048)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", [1, 2, 3, 5, 8, 16, 23])
def test_values(isa, shape, dtype, M):
    N, K = shape
    x, bias = torch.randn(M, K).to(dtype), torch.randn(N).to(dtype)
    a, b = (torch.randn(7, K) / K**0.5).to(dtype), torch.randn(N, 7)
    for weight in weights(N, K)[0]:
        # Products of 4 bits take values that are rounded to the dtype, those of int8 do not.
        four = isinstance(weight, FourBit)
        W = weight.dequantize(dtype if four else torch.float64).double()
        exact = F.linear(x.double(), W, bias.double())
        s = 2 * F.linear(x.double(), a.double())
        branch = F.linear(s, b.to(dtype).double())
        dense = F.linear(x, weight.dequantize(dtype), bias)
        rival = dense + 2 * F.linear(F.linear(x, a), b.to(dtype))
        assert native.takes(x, weight)
        eps = torch.finfo(dtype).eps / (1 if dtype != torch.float32 else 0.25)
        for given, true, other in (
            (Branch(a, b, 2.0, 0.0, None), exact + branch, rival), (None, exact, dense),
        ):  # fmt: skip
            y, saved = native.forward(x, weight, bias, given, given is not None)
            assert y.dtype == dtype
            mine, theirs = ((out.double() - true).norm() / true.norm() for out in (y, other))
            assert mine <= 2 * theirs + eps
            if given is not None:
                low, _ = split(2.0, dtype)
                torch.testing.assert_close(saved.double(), s * low / 2, rtol=0.02, atol=0.02)


def test_bits_do_not_depend_on_threads(isa):
    threads, x = torch.get_num_threads(), torch.randn(9, 1024).bfloat16()
    known, results = weights(257, 1024)[0], []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append([native.forward(x, w, None, None, False)[0] for w in known])
    finally:
        torch.set_num_threads(threads)
    for one, two, three in zip(*results, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


def test_long_sums_stay_exact(isa):
    """One large value among many small ones, which a single running sum would lose."""
    K = 1 << 16
    x = torch.full((1, K), 1.0)
    x[0, 0] = 2.0**24
    codes = torch.ones(1, K, dtype=torch.int8)
    weight = Int8((1, K), codes, torch.ones(1))
    y = native.forward(x, weight, None, None, False)[0]
    exact = 2.0**24 + K - 1
    assert abs(y.item() - exact) / exact < 2e-4


def test_what_is_left_to_the_reference(isa, monkeypatch):
    x = torch.randn(2, 64)
    weight, odd = quantize(torch.randn(8, 64), "nf4"), quantize(torch.randn(8, 96), "nf4")
    assert native.takes(x, weight)
    assert not native.takes(x.double(), weight)
    assert not native.takes(torch.randn(2, 96), odd)
    assert not native.takes(x[:0], weight)
    assert not native.takes(torch.randn(100, 64), weight)
    half = FourBit(weight.shape, weight.codes, weight.table, torch.rand(8).half())
    assert not native.takes(x, half)
    assert not native.decodes(half, slice(0, 64), torch.float32)
    assert not native.takes(x, quantize(torch.randn(8, 64), "fp8"))
    assert not native.takes(x, weights(8, 64)[1])
    assert native.decodes(weight, slice(0, 64), torch.float32)
    assert not native.decodes(weight, slice(1, 64), torch.float32)
    with use_backend("reference"):
        assert not native.takes(x, weight)
        assert not native.decodes(weight, slice(0, 64), torch.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": torch.zeros(255, dtype=torch.uint8)}, "codes: must be contiguous"),
        ({"scale": torch.zeros(7)}, "scale: must be contiguous"),
        ({"table": torch.zeros(15)}, "table: must be contiguous"),
        ({"sizes": [8, 64, 32, 1]}, "whole blocks of a multiple of 64"),
        ({"sizes": [8, 64, 64]}, "sizes: must be"),
        ({"sizes": [8, 64, 0, 1]}, "sizes: must be"),
        ({"x": torch.zeros(2, 128)}, "x: must have 64 columns"),
        ({"outer_table": torch.zeros(256)}, "outer_table: must come with outer_scale"),
        ({"isa": 9}, "isa: got 9"),
    ],
)
def test_the_kernels_check_what_they_are_given(change, message):
    given = {
        "x": torch.zeros(2, 64), "codes": torch.zeros(256, dtype=torch.uint8),
        "scale": torch.zeros(8), "zero": None, "table": torch.zeros(16), "outer_table": None,
        "outer_scale": None, "offset": None, "factor": 1.0, "sizes": [8, 64, 64, 1],
        "lora_a": None, "lora_b": None, "bias": None, "scale_": 1.0, "high": 1.0, "threshold": 0,
        "seed": None, "isa": 0, "s": None,
    }  # fmt: skip
    with pytest.raises(RuntimeError, match=message):
        torch.ops.lora_kernels._linear_coded_cpu(*{**given, **change}.values())


def test_parts_outside_are_refused():
    weight = quantize(torch.randn(8, 128), "nf4")
    op, given = torch.ops.lora_kernels._decode_cpu, native.given(weight)
    for row, column, shape, message in (
        (1, 0, (8, 128), "within the weight"), (0, 64, (8, 128), "within the weight"),
        (-1, 0, (8, 128), "within the weight"), (0, 32, (8, 64), "begin and end with blocks"),
        (0, 0, (8, 32), "begin and end with blocks"),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=message):
            op(*given, row, column, 0, torch.empty(shape))
