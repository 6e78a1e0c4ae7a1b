"""`lora_linear` with a magnitude, against the definition in fp64 and in unfused torch."""

import math

import oracle
import pytest
import torch
from torch.nn import functional as F

from lora_kernels import lora_linear, quantize
from lora_kernels.backends import columns as scaled_by
from lora_kernels.backends import native, use_backend
from lora_kernels.backends.dropout import keep_mask, keep_scale
from lora_kernels.columns import dropped, scale_columns
from lora_kernels.norms import weight_norms

NAMES = ("x", "weight", "lora_a", "lora_b", "bias", "magnitude")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def problem(M, N, K, r, dtype, low=None, bias=True, draw=0):
    """Leaves by name and dy, at the magnitudes of a layer in training; M may be a shape."""
    rows = M if isinstance(M, tuple) else (M,)
    rng = torch.Generator().manual_seed(1000 * draw + rows[0])

    def leaf(std, dtype, *shape):
        values = torch.randn(*shape, generator=rng, dtype=torch.float64) * std
        return values.to(dtype).requires_grad_()

    low = low or dtype
    tensors = {
        "x": leaf(1, dtype, *rows, K), "weight": leaf(K**-0.5, dtype, N, K),
        "lora_a": leaf((3 * K) ** -0.5, low, r, K), "lora_b": leaf(0.5 * r**-0.5, low, N, r),
    }  # fmt: skip
    if bias:
        tensors["bias"] = leaf(0.5, dtype, N)
    tensors["magnitude"] = (1 + 0.2 * leaf(1, torch.float64, N).detach()).to(low).requires_grad_()
    return tensors, leaf(0.1, dtype, *rows, N).detach()


def definition(t, scaling, kept=None):
    """As PEFT computes it, op by op, in the dtype of x; the norm is a constant."""
    dtype = t["x"].dtype
    a, b, m = (t[name].to(dtype) for name in ("lora_a", "lora_b", "magnitude"))
    norm = torch.linalg.norm(t["weight"] + scaling * (b @ a), dim=1).detach()
    g = m / norm
    x = t["x"] if kept is None else t["x"] * kept.to(dtype)
    y = F.linear(t["x"], t["weight"], t.get("bias"))
    branch = F.linear(F.linear(x, a), b) * scaling
    return y + (g - 1) * F.linear(x, t["weight"]) + g * branch


def gradients(y, tensors, dy):
    found = torch.autograd.grad(y, list(tensors.values()), dy)
    return {"y": y.detach(), **dict(zip(tensors, found, strict=True))}


def error(found, exact):
    return float((found.double() - exact).norm() / exact.norm().clamp_min(1e-300))


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("sizes", [(150, 130, 72, 8), (1, 48, 64, 3), (17, 1, 129, 1)])
def test_values_and_gradients(sizes, dtype, p):
    """As accurate as unfused torch; of small results many draws, whose errors are no accident."""
    M, N, K, r = sizes
    ratios = []
    for low in dict.fromkeys((dtype, torch.float32 if dtype != torch.float64 else dtype)):
        for scaling in (1.0, 0.5, -2.0):
            sums = {}
            for draw in range(1 if M > 100 else 16):
                tensors, dy = problem(M, N, K, r, dtype, low, draw=draw)
                kept = oracle.keep_factor(draw, M, K, p) if p else None
                exact = {name: t.detach().double().requires_grad_() for name, t in tensors.items()}
                truth = gradients(definition(exact, scaling, kept), exact, dy.double())
                peer = gradients(definition(tensors, scaling, kept), tensors, dy)
                y = lora_linear(**tensors, scaling=scaling, dropout_p=p, seed=draw)
                ours = gradients(y, tensors, dy)
                for name, right in truth.items():
                    assert ours[name].shape == right.shape
                    assert ours[name].dtype == (dtype if name == "y" else tensors[name].dtype)
                    squares = [(v[name].double() - right).square().sum() for v in (ours, peer)]
                    squares.append(right.square().sum())
                    sums[name] = sums.get(name, 0) + torch.stack(squares)
            eps = torch.finfo(dtype).eps * max(1.0, max(sizes) ** 0.5 / 2)
            for name, squares in sums.items():
                own, other = (squares[:2] / squares[2]).sqrt().tolist()
                assert own <= 2 * other + eps, f"{name}: {own:.2g}, unfused {other:.2g}"
                if min(own, other) > 0:
                    ratios.append(own / other)
    if dtype in DTYPES[1:]:
        assert math.exp(sum(map(math.log, ratios)) / len(ratios)) <= 1.02


@pytest.mark.parametrize("bias", [True, False])
def test_leading_dimensions_strides_and_no_rows(bias):
    tensors, _ = problem((3, 5), 24, 40, 4, torch.float32, bias=bias)
    y = lora_linear(**tensors, scaling=0.5)
    flat = {**tensors, "x": tensors["x"].reshape(15, 40)}
    assert torch.equal(y.reshape(15, 24), lora_linear(**flat, scaling=0.5))
    turned = tensors["x"].transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(y, lora_linear(**{**tensors, "x": turned}, scaling=0.5))
    none = {**tensors, "x": torch.empty(0, 40, requires_grad=True)}
    empty = lora_linear(**none, scaling=0.5, dropout_p=0.5)
    assert empty.shape == (0, 24)
    found = torch.autograd.grad(empty, list(none.values()), torch.empty(0, 24))
    assert all(not each.any() for each in found)


def test_the_magnitude_of_the_norms_changes_nothing():
    tensors, _ = problem(9, 24, 40, 4, torch.float32)
    norms = weight_norms(tensors["weight"], tensors["lora_a"], tensors["lora_b"], 2.0)
    tensors["magnitude"] = norms
    plain = lora_linear(**{k: v for k, v in tensors.items() if k != "magnitude"}, scaling=2.0)
    torch.testing.assert_close(lora_linear(**tensors, scaling=2.0), plain)


def test_norms():
    tensors, _ = problem(1, 300, 200, 6, torch.float64)
    weight, a, b = (tensors[name].detach() for name in NAMES[1:4])
    exact = (weight - 1.5 * b @ a).norm(dim=1)
    torch.testing.assert_close(weight_norms(weight, a, b, -1.5), exact)
    scaling = torch.tensor(-1.5)
    torch.testing.assert_close(weight_norms(weight, a, b, scaling), exact)
    single = weight_norms(weight.float(), a.float(), b.float(), -1.5)
    assert single.dtype == torch.float32
    assert error(single, exact) < 1e-6
    half = weight_norms(weight.bfloat16(), a.float(), b.float(), -1.5)
    assert half.dtype == torch.float32
    assert error(half, exact) < 2e-3
    whole = weight.float() @ torch.eye(200)
    gone = weight_norms(whole, torch.eye(200), -whole, 1.0)  # nothing is left: not below 0
    assert gone.isfinite().all()
    assert (gone < 1e-2).all()


def test_a_row_of_zeros_is_no_nan():
    tensors, dy = problem(9, 24, 40, 4, torch.float32)
    with torch.no_grad():
        for name in ("weight", "lora_b", "magnitude"):
            tensors[name][3] = 0
    y = lora_linear(**tensors)
    assert torch.equal(y[:, 3], tensors["bias"][3].expand(9))
    assert all(grad.isfinite().all() for grad in gradients(y, tensors, dy).values())


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_on_a_quantised_weight(kind, p):
    tensors, dy = problem(70, 96, 128, 4, torch.float32)
    record = quantize(tensors.pop("weight").detach(), kind)
    dense = {**tensors, "weight": record.dequantize(torch.float32)}
    options = {"scaling": 0.5, "dropout_p": p, "seed": 3}
    ours = gradients(lora_linear(**tensors, weight=record, **options), tensors, dy)
    theirs = gradients(lora_linear(**dense, **options), tensors, dy)
    for name, found in ours.items():
        torch.testing.assert_close(found, theirs[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("columns", [1, 13, 64, 1030])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_dropped_rows_are_those_of_the_mask(columns, dtype):
    x = torch.randn(37, columns, dtype=torch.float64).to(dtype).requires_grad_()
    seed = torch.tensor(2**40 + 5)
    right = torch.where(keep_mask(seed, 0, 37, columns, 0.4), x, 0) * keep_scale(0.4)
    y = dropped(x, 0.4, seed)
    assert torch.equal(y, right)
    with use_backend("reference"):
        assert not native.drops(x)
        assert torch.equal(dropped(x, 0.4, seed), right)
    dy = torch.randn_like(x)
    assert torch.equal(*(torch.autograd.grad(each, x, dy)[0] for each in (y, right)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("added", ["none", "vector", "matrix"])
def test_columns_of_many_blocks(monkeypatch, dtype, added):
    """More rows than are scaled at a time, read by strides, on to memory that was never written."""
    monkeypatch.setattr(scaled_by, "_BLOCK_ELEMENTS", 64)
    z = torch.randn(50, 30).to(dtype).t()
    factor, other = torch.rand(50) + 0.5, torch.randn(30, 50).to(dtype)
    more = {"none": None, "vector": other[0], "matrix": other}[added]
    wide = z.double() * factor.double()
    wide += 0 if more is None else more.double()
    tolerance = torch.finfo(dtype).eps
    found = scaled_by.forward(z, factor, more)
    assert found.dtype == dtype
    assert error(found, wide) < tolerance
    dy = torch.randn(30, 50).to(dtype)
    dz, dfactor = scaled_by.backward(dy, z, factor, True)
    assert error(dz, dy.double() * factor.double()) < tolerance
    assert dfactor.dtype == torch.float32
    assert error(dfactor, (dy.double() * z.double()).sum(0)) < 1e-6
    assert scaled_by.backward(dy, None, factor, False) == (None, None)


def test_gradients_are_only_those_asked_for():
    z, factor = torch.randn(6, 5), torch.rand(5)
    for leaf in (z, factor):
        leaf.requires_grad_()
        y = scale_columns(z, factor, torch.zeros(5))
        y.sum().backward()
        leaf.requires_grad_(False)
    assert torch.equal(z.grad, factor.detach().expand(6, 5))
    assert factor.grad is not None
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t):
        scale_columns(z.requires_grad_(), factor)
    assert [tuple(each.shape) for each in saved] == [(5,)]  # z is not kept for a constant factor


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_compiled(p):
    tensors, dy = problem(24, 40, 32, 4, torch.float32)
    seed = torch.tensor(11)

    def call(**given):
        return lora_linear(**given, scaling=0.5, dropout_p=p, seed=seed)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    ours = gradients(compiled(**tensors), tensors, dy)
    for name, right in gradients(call(**tensors), tensors, dy).items():
        torch.testing.assert_close(ours[name], right)


def test_autocast_and_profiler():
    tensors, dy = problem(24, 40, 32, 4, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_linear(**tensors, scaling=0.5)
    assert y.dtype == torch.bfloat16
    exact = definition({k: v.detach().double() for k, v in tensors.items()}, 0.5)
    assert error(y.detach(), exact) < 1e-2
    with torch.profiler.profile():
        watched = gradients(lora_linear(**tensors, scaling=0.5), tensors, dy)
    for name, right in gradients(lora_linear(**tensors, scaling=0.5), tensors, dy).items():
        torch.testing.assert_close(watched[name], right)


def test_bad_input():
    tensors, _ = problem(3, 24, 40, 4, torch.float32)
    for change, kind, words in (
        ({"magnitude": 1.0}, TypeError, "magnitude: expected a Tensor or None, got float"),
        ({"magnitude": torch.ones(23)}, ValueError, r"magnitude: expected shape \[N\] = \[24\]"),
        ({"magnitude": torch.ones(24, 1)}, ValueError, r"magnitude: expected shape \[N\] = \[24\]"),
        ({"magnitude": torch.ones(24).half()}, TypeError, "magnitude: expected x's dtype"),
        ({"magnitude": torch.ones(24, device="meta")}, ValueError, "magnitude: expected x's dev"),
        ({"lora_a": torch.ones(4, 39)}, ValueError, "lora_a: expected shape"),
        ({"lora_b": torch.ones(23, 4)}, ValueError, "lora_b: expected shape"),
        ({"weight": torch.ones(24)}, ValueError, "weight: expected shape"),
        ({"weight": None}, TypeError, "weight: expected a Tensor"),
        ({"bias": torch.ones(23)}, ValueError, "bias: expected shape"),
        ({"x": torch.ones(3, 41)}, ValueError, "lora_a: expected shape"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p: "),
        ({"scaling": float("nan")}, ValueError, "scaling: "),
    ):
        with pytest.raises(kind, match=words):
            lora_linear(**{**tensors, **change})
