"""lora_linear on a quantised weight: values and gradients against fp64 on what it decodes to, its
memory, and what else an op must do."""

import contextlib

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized_layouts import assert_accurate
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lora_kernels import direct, lora_linear, quantize, quantized
from lora_kernels.backends import blocked, dequantized, use_backend
from lora_kernels.backends.native import extension
from lora_kernels.backends.native import quantized as native
from lora_kernels.functional import linear_quantized
from lora_kernels.testing import Aten
from lora_kernels.weights import KINDS, Int8, assemble

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = ("reference", "native") if extension.available() else ("reference",)


@contextlib.contextmanager
def small_strips(size=1, most=0):
    """Many strips where there would be one, and the native kernels for so many rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dequantized, "_CPU_STRIP_BYTES", size)
        patch.setattr(native, "most_coded", lambda kind, dtype: most)
        yield


def of_kind(kind):
    return lambda weight: quantize(weight, kind, block=32 if kind == "int4" else None)


@st.composite
def cases(draw):
    dtype = draw(st.sampled_from((*DTYPES, torch.float64)))
    half = dtype in (torch.bfloat16, torch.float16)
    return oracle.Case(
        M=draw(st.sampled_from((1, 2, 3, 5, 8, 17, 64))),
        K=draw(st.sampled_from((32, 64, 128, 192))),
        N=draw(st.sampled_from((1, 2, 17, 130))),
        r=draw(st.sampled_from((1, 3, 16, 40))),
        dtype=dtype,
        adapter_dtype=draw(st.sampled_from((None, torch.float32))) if half else None,
        bias=draw(st.booleans()),
        scaling=draw(st.sampled_from((2.0, 1 / 3))),
        p=draw(st.sampled_from((0.0, 0.0, 0.25))),
        layout=draw(st.sampled_from(oracle.LAYOUTS)),
        seed=draw(st.integers(0, 2**40)),
    )


@settings(max_examples=120)
@given(cases(), st.sampled_from(KINDS), st.sampled_from(BACKENDS), st.sampled_from((0, 99)))
def test_values_and_gradients(case, kind, backend, most):
    dtype = case.dtype if case.dtype in DTYPES else None
    forced = backend if dtype is not None else None  # fp64 has no kernels
    with small_strips(most=most), use_backend(forced):
        assert_accurate(case, of_kind(kind))


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_where_16_bits_are_formed_in_fp32(kind, dtype, monkeypatch):
    monkeypatch.setattr(blocked, "_multiplies", lambda dtype: False)
    with small_strips(), use_backend("reference"):
        assert_accurate(oracle.Case(20, 128, 200, 8, dtype, p=0.1), of_kind(kind))


@pytest.mark.parametrize("shape", [(33, 130), (7, 66)])
def test_rows_that_are_no_whole_blocks(shape):
    N, K = shape
    with small_strips():
        assert_accurate(oracle.Case(5, K, N, 4), of_kind("nf4"))


@pytest.mark.parametrize("kind", KINDS)
def test_the_frozen_layer(kind):
    weight, bias = quantize(torch.randn(48, 256), kind), torch.randn(48, requires_grad=True)
    x = torch.randn(2, 3, 256, requires_grad=True)
    y = linear_quantized(x, weight, bias)
    dy = torch.randn_like(y)
    expected = F.linear(x, weight.dequantize(torch.float32), bias)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-4)
    ours, theirs = (torch.autograd.grad(out, (x, bias), dy) for out in (y, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(
            linear_quantized(x, weight), expected - bias, rtol=1e-5, atol=1e-4
        )


def adapter(K, N, r=4, dtype=torch.float32):
    a = (torch.randn(r, K) / K**0.5).to(dtype).requires_grad_()
    return a, torch.randn(N, r).to(dtype).requires_grad_()


@pytest.mark.parametrize("M", [0, 1])
def test_no_rows_and_any_number_of_dimensions(M):
    weight, (a, b) = quantize(torch.randn(48, 64), "nf4"), adapter(64, 48)
    x = torch.randn(M, 2, 64, requires_grad=True)
    y = lora_linear(x, weight, a, b)
    assert y.shape == (M, 2, 48)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert lora_linear(x[..., 0, :].detach(), weight, a, b).shape == (M, 48)
    if M:
        assert lora_linear(x[0, 0].detach(), weight, a, b).shape == (48,)


def test_strips_are_a_quarter_and_no_more_than_a_cache_holds():
    """Rows of a strip, in forward; those of an accelerator too, of which "meta" is one here."""

    def rows(N, K, device, dtype=torch.bfloat16):
        codes, scale = torch.empty(N, K, dtype=torch.int8), torch.empty(N)
        weight = Int8((N, K), codes.to("meta"), scale.to("meta"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Int8, "device", torch.device(device))
            return dequantized.rows_of_strip(weight, dtype)

    for device, most in (("cpu", 8 << 20), ("meta", 32 << 20)):
        assert rows(4096, 4096, device) == 1024
        assert rows(4096, 4096, device, torch.float32) == min(1024, most // (4096 * 4))
        assert rows(1 << 14, 8192, device) == most // (8192 * 2)
        assert rows(2, 1 << 20, device) == 16
        assert rows(100, 1 << 18, device) == 16
        assert rows(3072, 768, device) == 1536  # equal parts, of 4 MiB at most
        assert rows(512, 512, device) == 512


def test_nothing_of_the_weight_is_kept_but_itself():
    weight, (a, b) = quantize(torch.randn(256, 256), "nf4"), adapter(256, 256)
    x = torch.randn(8, 256, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lora_linear(x, weight, a, b)
    parts = {part.data_ptr() for part in weight.parts}
    others = [t for t in kept if t.data_ptr() not in parts]
    assert sum(t.numel() for t in others) <= x.numel() + a.numel() + b.numel() + 8 * 4


def test_gradients_that_are_not_asked_for():
    weight, (a, b) = quantize(torch.randn(48, 64), "int8"), adapter(64, 48)
    x = torch.randn(5, 64)
    with FlopCounterMode(display=False) as counter:
        lora_linear(x, weight, a, b).sum().backward()
    # Forward, then ds, dA and dB: no product with the weight in backward.
    assert counter.get_total_flops() == 2 * 5 * (64 * 48 + 4 * (64 + 48)) + 2 * 5 * 4 * (
        48 + 64 + 48
    )
    assert a.grad is not None
    assert b.grad is not None


def test_checkpointed_and_with_fresh_seeds():
    weight, (a, b) = quantize(torch.randn(48, 64), "nf4"), adapter(64, 48)
    x = torch.randn(50, 64, requires_grad=True)

    def layer(x):
        return lora_linear(x, weight, a, b, dropout_p=0.5, seed=7)

    grads = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        grads.append(torch.autograd.grad(run(x).square().sum(), (x, a, b)))
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))
    first, second = (lora_linear(x, weight, a, b, dropout_p=0.5) for _ in range(2))
    assert not torch.equal(first, second)


def test_the_mask_is_that_of_the_dense_layer():
    dense = torch.randn(48, 64)
    weight, (a, b) = quantize(dense, "int8"), adapter(64, 48)
    x = torch.randn(50, 64)
    zero = Int8(weight.shape, torch.zeros_like(weight.codes), weight.scale)
    ours = lora_linear(x, zero, a, b, dropout_p=0.3, seed=11)
    theirs = lora_linear(x, torch.zeros_like(dense), a, b, dropout_p=0.3, seed=11)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.skipif(not extension.available(), reason="needs the compiled extension")
@pytest.mark.parametrize("dtype", DTYPES)
def test_past_the_op(dtype):
    """A call of few rows that nobody sees; whoever listens gets the op."""
    N, K = 48, 64
    weight, (a, b) = quantize(torch.randn(N, K), "nf4"), adapter(K, N, dtype=dtype)
    x, bias = torch.randn(2, 3, K).to(dtype), torch.randn(N).to(dtype)
    y = lora_linear(x, weight, a, b, bias, scaling=0.5).detach()
    with torch.no_grad():
        past = direct.quantized(x, weight, bias, (a, b, 0.5, 0.0))
        assert past.shape == (2, 3, N)
        tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 16 * torch.finfo(dtype).eps}
        torch.testing.assert_close(past, y, **tolerance)
        frozen = direct.quantized(x, weight, None, direct.FROZEN)
        torch.testing.assert_close(frozen, linear_quantized(x, weight), **tolerance)
        for given in (
            (x, weight, bias, (a, b, 0.5, 0.1)), (x, weight, bias, (a, b, float("nan"), 0.0)),
            (x[..., 1:], weight, bias, (a, b, 0.5, 0.0)), (x, weight, bias[1:], (a, b, 0.5, 0.0)),
            (x, weight, bias.double(), (a, b, 0.5, 0.0)),
            (x, weight, bias, (a[:, 1:], b, 0.5, 0.0)),
            (x[:0], weight, bias, (a, b, 0.5, 0.0)), (x.double(), weight, None, (a, b, 0.5, 0.0)),
            (torch.randn(500, K).to(dtype), weight, bias, (a, b, 0.5, 0.0)),
            (x, quantize(torch.randn(N, K), "fp8"), bias, (a, b, 0.5, 0.0)),
            (x, weight, bias, (a, b, torch.tensor(0.5), 0.0)),
        ):  # fmt: skip
            assert direct.quantized(*given) is None
        with use_backend("native"):
            assert direct.quantized(x, weight, bias, (a, b, 0.5, 0.0)) is None
        with Aten(lambda name, values: None):
            assert direct.quantized(x, weight, bias, (a, b, 0.5, 0.0)) is None
    assert direct.quantized(x, weight, bias, (a, b, 0.5, 0.0)) is None  # a gradient is asked for


class Layer(nn.Module):
    def __init__(self, kind, N=48, K=128):
        super().__init__()
        self.weight = quantize(torch.randn(N, K), kind)
        a, b = adapter(K, N)
        self.a, self.b = nn.Parameter(a.detach()), nn.Parameter(b.detach())

    def forward(self, x):
        return lora_linear(x, self.weight, self.a, self.b, scaling=0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled(kind):
    layer = Layer(kind)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(20, 128, requires_grad=True)
    grads = []
    for run in (layer, compiled):
        y = run(x)
        grads.append((y, *torch.autograd.grad(y.square().sum(), (x, layer.a, layer.b))))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x))


def test_exported():
    layer, x = Layer("nf4"), torch.randn(20, 128)
    program = torch.export.export(layer, (x,))
    torch.testing.assert_close(program.module()(x), layer(x))
    assert "lora_linear_quantized" in str(program.graph)


def test_under_autocast_and_on_meta():
    layer, x = Layer("nf4"), torch.randn(20, 128)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.5)
    a, b = adapter(128, 48)
    y = lora_linear(x.to("meta"), layer.weight.to("meta"), a.to("meta"), b.to("meta"))
    assert y.shape == (20, 48)
    assert y.is_meta


def test_op_check():
    weight, (a, b) = quantize(torch.randn(48, 64), "nf4"), adapter(64, 48)
    x, bias = torch.randn(5, 64, requires_grad=True), torch.randn(48, requires_grad=True)
    op = torch.ops.lora_kernels.lora_linear_quantized.default
    arguments = (x, weight.parts, weight.form, a, b, bias, 2.0, 0.0, None, True)
    torch.library.opcheck(op, arguments)
    frozen = (x, weight.parts, weight.form, None, None, None, 1.0, 0.0, None, False)
    torch.library.opcheck(op, frozen)


def test_refusals():
    weight, (a, b) = quantize(torch.randn(48, 64), "nf4"), adapter(64, 48)
    x = torch.randn(5, 64, requires_grad=True)
    y = lora_linear(x, weight, a, b)
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        dx.sum().backward()
    with pytest.raises(NotImplementedError, match="vmap"):
        torch.vmap(lambda x: lora_linear(x, weight, a, b))(x[None])
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.detach(), torch.randn_like(x))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            lora_linear(dual, weight, a, b)
    op = torch.ops.lora_kernels.lora_linear_quantized
    with pytest.raises(RuntimeError, match="needs save_s=True"):
        op(x, weight.parts, weight.form, a, b, None, 1.0, 0.0, None, False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trains_x", [False, True])
def test_a_part_that_asks_for_a_gradient(kind, trains_x):
    """After the record was made, which refuses one before."""
    weight, (a, b) = quantize(torch.randn(48, 128), kind), adapter(128, 48)
    scale = next(part for part in weight.parts if part.dtype == torch.float32)
    scale.requires_grad_()
    x = torch.randn(5, 128, requires_grad=trains_x)
    with pytest.raises(ValueError, match="expected a tensor that does not require grad"):
        lora_linear(x, weight, a, b)
    with pytest.raises(ValueError, match="expected a tensor that does not require grad"):
        linear_quantized(x, weight)
    with pytest.raises(ValueError, match="expected a tensor that does not require grad"):
        assemble(weight.form, weight.parts)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.randn(5, 63)}, ValueError, r"x: expected shape \[..., 64\]"),
        ({"x": [1.0]}, TypeError, "x: expected a Tensor, got list"),
        ({"x": torch.randn(5, 64).int()}, TypeError, "x: expected float32"),
        ({"bias": torch.randn(47)}, ValueError, r"bias: expected shape \[N\] = \[48\]"),
        ({"bias": torch.randn(48).half()}, TypeError, "bias: expected x's dtype"),
        ({"lora_a": torch.randn(4, 63)}, ValueError, "lora_a: expected shape"),
        (
            {"lora_b": torch.randn(47, 4)},
            ValueError,
            r"lora_b: expected shape \[N, r\] = \[48, 4\]",
        ),
        ({"lora_b": torch.randn(48, 4).half()}, TypeError, "lora_b: expected x's dtype"),
        ({"x": torch.randn(5, 64, device="meta")}, ValueError, "expected x's device meta"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p"),
        ({"scaling": float("nan")}, ValueError, "scaling"),
        ({"seed": "one"}, TypeError, "seed"),
    ],
)
def test_bad_arguments(change, error, message):
    a, b = adapter(64, 48)
    given = {
        "x": torch.randn(5, 64), "weight": quantize(torch.randn(48, 64), "nf4"),
        "lora_a": a, "lora_b": b, "bias": None,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        lora_linear(**{**given, **change})


def test_bad_arguments_of_the_op():
    weight, (a, b) = quantize(torch.randn(48, 64), "nf4"), adapter(64, 48)
    op, x = torch.ops.lora_kernels.lora_linear_quantized, torch.randn(5, 64)
    rest = (1.0, 0.0, None, False)
    for device in ("cpu", "meta"):
        with torch.device(device), torch.no_grad():
            for rows, one, other, message in (
                (x[:, 1:], a, b, r"x: expected \[M, 64\]"),
                (x, a[:, 1:], b, "lora_a, lora_b"),
                (x, a, None, "both or none"),
            ):
                given = [t if t is None else t.to(device) for t in (rows, one, other)]
                parts = weight.to(device).parts
                with pytest.raises(ValueError, match=message):
                    op(given[0], parts, weight.form, *given[1:], None, *rest)
    with torch.no_grad(), pytest.raises(ValueError, match="form"):
        op(x, weight.parts, "nothing", a, b, None, *rest)
    with torch.no_grad(), pytest.raises(ValueError, match="codes: expected shape"):
        op(x, [weight.codes[1:], *weight.parts[1:]], weight.form, a, b, None, *rest)


def test_the_log_says_who_serves(caplog):
    a, b = adapter(256, 48)
    known, other = quantize(torch.randn(48, 256), "nf4"), quantize(torch.randn(48, 256), "fp8")
    quantized._say_once.cache_clear()
    with caplog.at_level("INFO", logger="lora_kernels"), torch.no_grad():
        for weight in (known, known, other):
            lora_linear(torch.randn(500, 256), weight, a, b)
        lora_linear(torch.randn(1, 256), known, a, b)
    said = [r.getMessage() for r in caplog.records if "weights under" in r.getMessage()]
    here = extension.available()
    decoder = "the compiled CPU kernels" if here else "ATen's calls"
    assert said[0] == (
        f"4bit weights under cpu rows in torch.float32: strips decoded by {decoder},"
        " torch's products"
    )
    assert "fp8 weights under cpu rows in torch.float32: strips decoded by ATen's" in said[1]
    assert len(said) == (3 if here and extension.best_isa() else 2)
