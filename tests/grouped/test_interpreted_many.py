"""The kernels of many groups in Triton's interpreter: the branches of tenants, one launch for each
product of them all."""

import pytest
import torch
from test_grouped import batch, randn

from lora_kernels import Groups, backends, lora_linear_grouped
from lora_kernels.backends.triton.launch import intercept

pytestmark = pytest.mark.interpreted
INDEX = [2, 0, -1, 2, 2, 0, 1, -1, 2, 0, 2, 2]


def results(case):
    leaves = case.leaves()
    y = case.call(leaves)
    x, _, _, a, b = leaves
    wanted = [x, *([a, b] if case.stack else [*a, *b])]
    dy = randn(*y.shape, dtype=y.dtype)
    grads = torch.autograd.grad(y, wanted, dy, allow_unused=True)
    return [y, *grads], dy


def truth(case, dy):
    """In fp64, and unfused in the case's own dtype."""
    found = []
    for dtype in (torch.float64, case.x.dtype):
        y, leaves = case.by_hand(dtype)
        x, _, _, *pairs = leaves
        grads = torch.autograd.grad(y, [x, *pairs], dy.to(dtype), allow_unused=True)
        found.append([y, *grads])
    return found


CASES = {
    "mixed": {},
    "dropout": {"p": 0.3},
    "sixteen bits": {"dtype": torch.float16},
    "master copies": {"dtype": torch.float16, "adapter_dtype": torch.float32, "p": 0.3},
    "more ranks than a block": {"ranks": (17, 40, 3)},
    "odd sizes": {"K": 71, "N": 65},
    "aligned": {"K": 64, "N": 80, "ranks": (16, 16, 16)},
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name):
    case = batch(INDEX, **CASES[name])
    calls = []
    with (
        backends.use_backend("triton"),
        intercept(lambda k, g, a, m, run: (calls.append(k), run())),
    ):
        ours, dy = results(case)
    assert len(calls) == 2 + 4
    exact, unfused = truth(case, dy)
    for mine, right, other in zip(ours, exact, unfused, strict=True):
        norm = right.norm()
        assert (mine.double() - right).norm() <= 1.5 * (other.double() - right).norm() + 2e-6 * norm


def test_more_rows_than_a_tile():
    index = [(7 * m) % 3 if m % 5 else -1 for m in range(230)]
    case = batch(index, K=16, N=24)
    with backends.use_backend("triton"):
        ours, dy = results(case)
    exact, _ = truth(case, dy)
    for mine, right in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.double(), right, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("lengths", [[3, 0, 5], [0, 0, 4], [8, 1, 1]])
def test_segments_and_rows_past_them(lengths):
    index = [g for g, length in enumerate(lengths) for _ in range(length)]
    index += [-2] * (12 - len(index))
    case = batch(index, groups=Groups.from_segments(lengths))
    with backends.use_backend("triton"):
        ours, dy = results(case)
    exact, _ = truth(case, dy)
    for g, length in enumerate(lengths):
        assert (ours[2 + g] is None) == (length == 0)
    for mine, right in zip(ours, exact, strict=True):
        if mine is not None:
            torch.testing.assert_close(mine.double(), right, rtol=1e-5, atol=1e-5)


def test_isolation_and_lanes_past_a_rank():
    """NaN in another's rows and adapter changes no bit; nor does what lies behind a small A."""
    case = batch(INDEX)
    rows = [m for m, group in enumerate(INDEX) if group == 2]
    others = [m for m in range(len(INDEX)) if m not in rows]
    dy, nan = randn(len(INDEX), 20), float("nan")

    def run(x, a, b):
        leaves = [x.clone().requires_grad_(), *(t.requires_grad_() for t in a)]
        y = lora_linear_grouped(
            leaves[0], case.weight, a, b, case.groups, case.bias, scaling=list(case.scaling)
        )
        dx, *d_a = torch.autograd.grad(y, leaves, dy)
        return y[others], dx[others], *d_a[:2]

    behind = [torch.full((40, 24), nan) for _ in case.a]
    for tensor, a in zip(behind, case.a, strict=True):
        tensor[: len(a)] = a
    a = [t[: len(own)] for t, own in zip(behind, case.a, strict=True)]
    x, b = case.x.clone(), [t.clone() for t in case.b]
    x[rows] = nan
    b[2].fill_(nan)
    with backends.use_backend("triton"):
        clean = run(case.x, [t.clone() for t in case.a], case.b)
        for mine, other in zip(run(x, a, b), clean, strict=True):
            assert torch.equal(mine, other)


def test_only_what_is_asked_for():
    case = batch(INDEX)
    calls = []
    with backends.use_backend("triton"):
        a = [case.a[0].clone().requires_grad_(), *case.a[1:]]
        with intercept(lambda k, g, args, m, run: (calls.append(k.fn.__name__), run())):
            y = lora_linear_grouped(
                case.x, case.weight, a, case.b, case.groups, scaling=list(case.scaling)
            )
            y.sum().backward()
    assert calls == [
        "many_shrink_kernel", "many_expand_kernel", "many_shrink_kernel", "many_tall_kernel",
    ]  # fmt: skip
    assert a[0].grad.isfinite().all()
