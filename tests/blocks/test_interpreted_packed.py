"""The two launches of packed projections in Triton's interpreter, by the rule of accuracy."""

import pytest
import torch
from interpreted import poisoned_memory
from torch.nn import functional as F

from lora_kernels import Projection
from lora_kernels.backends.triton.launch import intercept
from lora_kernels.packed import project

__all__ = ["poisoned_memory"]  # a fixture of every test
pytestmark = pytest.mark.interpreted


def leaves_of(M, K, layers, dtype, adapter_dtype=None, bias=True):
    """x, and of each (N, r) its weight, A, B and bias; r 0 is no branch."""
    generator = torch.Generator().manual_seed(M + K)

    def draw(std, *shape):
        return (std * torch.randn(*shape, generator=generator)).to(dtype)

    found = []
    for N, r in layers:
        pair = [draw(K**-0.5, r, K), draw(0.3, N, r)] if r else [None, None]
        pair = [p if p is None else p.to(adapter_dtype or dtype).requires_grad_() for p in pair]
        found.append([draw(K**-0.5, N, K), *pair, draw(1.0, N) if bias else None])
    return draw(1.0, M, K).requires_grad_(), found


def results(x, layers, dys, scalings, kernels):
    """ys and gradients; scalings of the layers, of more than there may be."""
    if kernels:
        given = zip(layers, scalings, strict=False)
        ys = project(x, [Projection(*layer, scaling) for layer, scaling in given])
    else:
        ys = [F.linear(x, w, bias) for w, _, _, bias in layers]
        for i, (_, a, b, _) in enumerate(layers):
            if a is not None:
                branch = F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))
                ys[i] = ys[i] + scalings[i] * branch
    leaves = [x, *(t for _, a, b, _ in layers for t in (a, b) if t is not None)]
    return [*ys, *torch.autograd.grad(ys, leaves, dys)]


def error(tensor, exact):
    return float((tensor.double() - exact).norm() / exact.norm())


@pytest.fixture
def launched():
    """The names of the kernels that are launched."""
    names = []

    def note(kernel, grid, args, meta, run):
        names.append(kernel.fn.__name__)
        run()

    with intercept(note):
        yield names


@pytest.mark.parametrize(
    ("M", "K", "layers"),
    [
        (5, 48, [(40, 4), (16, 4), (16, 4)]),
        (33, 31, [(130, 3), (17, 0), (64, 20)]),
        (1, 129, [(1, 1), (128, 70)]),
        (70, 16, [(16, 8), (16, 8), (129, 8), (3, 2)]),
    ],
)
@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"),
    [(torch.float32, None), (torch.float16, None), (torch.float16, torch.float32)],
)
@pytest.mark.parametrize("scalings", [(2.0,) * 4, (0.5, -48.0, 1.0, 3.0)])
def test_values_and_gradients(M, K, layers, dtype, adapter_dtype, scalings, launched):
    x, given = leaves_of(M, K, layers, dtype, adapter_dtype, bias=K % 2 == 0)
    dys = [torch.randn(M, N).to(dtype) for N, _ in layers]
    ours = results(x, given, dys, scalings, kernels=True)
    assert [name for name in launched if "packed" in name] == ["packed_kernel", "packed_dx_kernel"]
    wide = lambda t: None if t is None else t.detach().double().requires_grad_(t.requires_grad)  # noqa: E731
    exact = results(
        wide(x),
        [list(map(wide, one)) for one in given],
        [dy.double() for dy in dys],
        scalings,
        False,
    )
    theirs = results(x, given, dys, scalings, kernels=False)
    for mine, other, true in zip(ours, theirs, exact, strict=True):
        assert mine.dtype == other.dtype
        assert error(mine, true) <= 2 * error(other, true) + torch.finfo(dtype).eps


def test_what_it_does_not_serve_is_computed_layer_by_layer(launched):
    """Dropout, weights whose rows do not lie one after the other, and more layers than one sum
    takes."""
    x, given = leaves_of(9, 32, [(24, 4), (24, 4)], torch.float32)
    dys = [torch.randn(9, 24)] * 2
    turned = [[w.t().contiguous().t(), *others] for w, *others in given]
    theirs = results(x, given, dys, (2.0, 2.0), kernels=False)
    ours = results(x, turned, dys, (2.0, 2.0), kernels=True)
    project(x, [Projection(*one, 2.0, 0.5, 7) for one in given])
    project(x, [Projection(*given[0], 2.0)] * 5)
    assert launched
    assert not [name for name in launched if "packed" in name]
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


def test_a_layer_that_nothing_comes_back_through():
    x, given = leaves_of(9, 32, [(24, 4), (40, 4), (8, 2)], torch.float32)
    projections = [Projection(w, a, b, bias, 2.0) for w, a, b, bias in given]
    first, _, last = project(x, projections)
    found = torch.autograd.grad(first.sum() + last.square().sum(), x)[0]
    one, other = projections[0](x), projections[2](x)
    true = torch.autograd.grad(one.sum() + other.square().sum(), x)[0]
    torch.testing.assert_close(found, true, rtol=1e-4, atol=1e-4)
