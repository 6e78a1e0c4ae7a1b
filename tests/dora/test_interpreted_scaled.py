"""DoRA's layer with the factor in the product's own kernel, in Triton's interpreter: by pointers
and by descriptors, against fp64 and the path that writes z."""

import math

import pytest
import torch
from interpreted import AMPERE, HOPPER, laid_out, poisoned_memory
from test_dora_op import definition, error, gradients, problem

from lora_kernels import functional, lora_linear
from lora_kernels.backends import use_backend
from lora_kernels.backends.device import assume
from lora_kernels.backends.triton.launch import intercept
from lora_kernels.functional import scaled_linear

__all__ = ["poisoned_memory"]  # a fixture of every test
pytestmark = pytest.mark.interpreted
F16, F32 = torch.float16, torch.float32
SIZES = [(1, 1, 1, 1), (3, 17, 129, 3), (70, 136, 72, 20), (130, 65, 40, 64), (300, 40, 48, 8)]
NAMES = ("x", "weight", "lora_a", "lora_b", "bias", "factor")
FACTORS = (-1.5, 0.0, 0.7, 2.0, 1e-5)


@pytest.fixture(autouse=True, params=[AMPERE, HOPPER], ids=["pointers", "descriptors"])
def forced(request):
    with use_backend("triton"), assume(request.param):
        yield request.param


@pytest.fixture
def launched():
    names = []

    def record(kernel, grid, args, meta, run):
        names.append(kernel.fn.__name__)
        run()

    with intercept(record):
        yield names


def leaves(sizes, dtype, bias=True, low=None):
    """Those of a problem, with factors of both signs, none and tiny."""
    tensors, dy = problem(*sizes, dtype, low, bias)
    del tensors["magnitude"]
    factor = torch.tensor(FACTORS * sizes[1])[: sizes[1]]
    return {**tensors, "factor": factor.requires_grad_()}, dy


def layer(t, scaling=2.0, p=0.0):
    pair = t["lora_a"], t["lora_b"]
    return scaled_linear(t["x"], t["weight"], pair, t.get("bias"), (scaling, p, 3), t["factor"])


def unfused(t, scaling=2.0):
    """As torch computes it op by op in x's dtype."""
    x, dtype = t["x"], t["x"].dtype
    a, b, factor = (t[name].to(dtype) for name in ("lora_a", "lora_b", "factor"))
    return (x @ t["weight"].t() + scaling * ((x @ a.t()) @ b.t())) * factor + t.get("bias", 0.0)


def in_fp64(t):
    return {name: tensor.detach().double().requires_grad_() for name, tensor in t.items()}


def assert_accurate(t, dy, ours, eps_of):
    """The accuracy rule, of y and all gradients."""
    exact = in_fp64(t)
    truth = gradients(unfused(exact), exact, dy.double())
    peer = gradients(unfused(t), t, dy)
    eps = torch.finfo(t["x"].dtype).eps * eps_of
    for name, right in truth.items():
        own, other = error(ours[name], right), error(peer[name], right)
        assert ours[name].dtype == peer[name].dtype
        assert own <= 2 * other + eps, f"{name}: {own:.2g}, unfused {other:.2g}"


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize("sizes", SIZES)
def test_values_and_gradients(launched, sizes, dtype, bias):
    for low in dict.fromkeys((dtype, F32)):
        t, dy = leaves(sizes, dtype, bias, low)
        ours = gradients(layer(t), t, dy)
        assert not [name for name in launched if name.startswith("scale_")]
        assert_accurate(t, dy, ours, max(1.0, max(sizes) ** 0.5 / 2))


@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize("factor", [0.0, 1e-7, 1e-3])
def test_of_factors_that_leave_nothing_of_z_in_y(dtype, factor):
    """Every column's z is formed again, for which y would have been useless."""
    t, dy = leaves((70, 65, 40, 4), dtype)
    with torch.no_grad():
        t["factor"].fill_(factor)
        t["bias"].fill_(3.0)
    exact = in_fp64(t)
    truth = gradients(unfused(exact), exact, dy.double())["factor"]
    found = gradients(layer(t), t, dy)["factor"]
    assert error(found, truth) < 4 * torch.finfo(dtype).eps


def test_fp16_beyond_its_normal_numbers():
    """Without a bias y loses z where it has few bits left."""
    t, dy = leaves((70, 65, 40, 4), F16, bias=False)
    with torch.no_grad():
        t["factor"].fill_(2.0**-20)
    exact = in_fp64(t)
    truth = gradients(unfused(exact), exact, dy.double())["factor"]
    assert error(gradients(layer(t), t, dy)["factor"], truth) < 4 * torch.finfo(F16).eps


@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_strides(dtype, layout):
    t, _ = leaves((40, 48, 72, 8), dtype)
    torch.manual_seed(0)
    t["x"] = laid_out(40, 72, layout, dtype).requires_grad_()
    weight = laid_out(48, 72, "transposed", dtype) / math.sqrt(72)
    t["weight"] = weight.detach().requires_grad_()
    dy = laid_out(40, 48, layout, dtype)
    assert_accurate(t, dy, gradients(layer(t), t, dy), 5)


def test_z_is_never_written(launched):
    """One launch has y forward and one backward; a product is one launch each."""
    t, dy = leaves((70, 136, 72, 8), F16)
    y = layer(t)
    forward = list(launched)
    assert len(forward) == 2  # s, y
    assert forward[0] == "shrink_kernel"
    assert forward[1] in ("scaled_gemm_kernel", "scaled_gemm_tma_kernel")
    launched.clear()
    torch.autograd.grad(y, list(t.values()), dy)
    assert launched.count("unscale_kernel") == launched.count("factor_kernel") == 1
    assert not {"scale_kernel", "scale_backward_kernel"} & {*launched}


def test_which_kernel(launched, forced):
    for sizes, dtype in (((70, 136, 72, 8), F16), ((70, 136, 72, 8), F32), ((70, 135, 72, 8), F16)):
        layer(leaves(sizes, dtype)[0])
    by_tma = ["scaled_gemm_tma_kernel"] * (forced is HOPPER)
    pointers = ["scaled_gemm_kernel"] * (3 - len(by_tma))
    assert [name for name in launched if name != "shrink_kernel"] == by_tma + pointers


def test_what_is_kept():
    """y in z's place for a factor that is trained, neither for one that is not."""
    t, dy = leaves((70, 136, 72, 8), F16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda s: saved.append(s) or s, lambda s: s):
        y = layer(t)
    assert sum(each.shape == y.shape for each in saved) == 1
    t["factor"].requires_grad_(False)
    saved.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda s: saved.append(s) or s, lambda s: s):
        y = layer(t)
    assert not [each for each in saved if each.shape == y.shape]
    given = {name: tensor for name, tensor in t.items() if name != "factor"}
    ours = gradients(y, given, dy)
    with use_backend("reference"):
        theirs = gradients(layer(t), given, dy)
    for name, found in ours.items():
        torch.testing.assert_close(found, theirs[name], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("dtype", [F32, F16])
def test_y_may_be_changed_in_place(dtype):
    t, dy = leaves((33, 24, 40, 4), dtype)
    right = gradients(layer(t) * 1.0, t, dy)
    y = layer({**t, "x": t["x"].view(3, 11, 40)})
    y += 1.0
    y.relu_()
    found = torch.autograd.grad(y, list(t.values()), dy.view(3, 11, 24), retain_graph=True)
    want = layer(t) + 1.0
    want = torch.autograd.grad(want.relu(), list(t.values()), dy)
    assert not torch.equal(found[-1], right["factor"])
    for one, other in zip(found, want, strict=True):
        torch.testing.assert_close(one, other, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("name", NAMES)
def test_one_gradient_alone(name):
    t, dy = leaves((17, 24, 40, 4), F32)
    all_of_them = gradients(layer(t), t, dy)
    alone = {key: tensor.detach() for key, tensor in t.items()}
    alone[name].requires_grad_()
    (found,) = torch.autograd.grad(layer(alone), alone[name], dy)
    torch.testing.assert_close(found, all_of_them[name])


def test_dropout_and_others_are_as_before(launched, monkeypatch):
    """Of which z is written: dropout, autocast, a scaling that is a tensor, fp64."""
    seen = []
    scale = functional.columns.scale_columns
    monkeypatch.setattr(
        functional.columns, "scale_columns", lambda *given: seen.append(1) or scale(*given)
    )
    t, dy = leaves((33, 24, 40, 4), F32)
    with use_backend("reference"):
        theirs = gradients(layer(t, p=0.3), t, dy)
    for name, found in gradients(layer(t, p=0.3), t, dy).items():
        torch.testing.assert_close(found, theirs[name], rtol=1e-4, atol=1e-5)
    layer(t, torch.tensor(2.0))
    with torch.autocast("cpu", F16):
        layer(t)
    assert len(seen) == 4
    with use_backend(None), torch.no_grad():
        layer(t)
    assert len(seen) == 5
    assert "scaled_gemm_kernel" not in launched
    layer(t)
    assert "scaled_gemm_kernel" in launched
    assert len(seen) == 5


def test_by_a_magnitude():
    tensors, dy = problem((3, 11), 24, 40, 4, F32)
    exact = in_fp64(tensors)
    truth = gradients(definition(exact, 0.5), exact, dy.double())
    for name, found in gradients(lora_linear(**tensors, scaling=0.5), tensors, dy).items():
        assert error(found, truth[name]) < 1e-5, name


def test_double_backward_is_refused():
    t, dy = leaves((5, 7, 9, 2), F32)
    with pytest.raises(NotImplementedError, match="double backward"):
        torch.autograd.grad(layer(t).sum(), t["x"], create_graph=True)
    rows = torch.stack([dy, 2 * dy])
    found = torch.autograd.grad(layer(t), t["factor"], rows, is_grads_batched=True)[0]
    torch.testing.assert_close(found[0], gradients(layer(t), t, dy)["factor"])
