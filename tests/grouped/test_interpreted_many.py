"""The kernels of many groups in Triton's interpreter: the branches of tenants and experts with
their bases, one launch for each product of them all."""

import pytest
import torch
from test_grouped import batch, randn

from lora_kernels import Groups, backends, lora_linear_grouped
from lora_kernels.backends.triton.launch import intercept

pytestmark = pytest.mark.interpreted
INDEX = [2, 0, -1, 2, 2, 0, 1, -1, 2, 0, 2, 2]


def results(case, bases=False):
    """(y and its gradients, dy); with those of weight and bias."""
    leaves = case.leaves()
    y = case.call(leaves)
    x, weight, bias, a, b = leaves
    wanted = [x, *([weight, bias] * bases), *([a, b] if case.stack else [*a, *b])]
    dy = randn(*y.shape, dtype=y.dtype)
    grads = torch.autograd.grad(y, wanted, dy, allow_unused=True)
    return [y, *grads], dy


def truth(case, dy, bases=False):
    """In fp64, and unfused in the case's own dtype."""
    found = []
    for dtype in (torch.float64, case.x.dtype):
        y, leaves = case.by_hand(dtype)
        x, weight, bias, *pairs = leaves
        wanted = [x, *([weight, bias] * bases), *pairs]
        grads = torch.autograd.grad(y, wanted, dy.to(dtype), allow_unused=True)
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


def launched(case, bases=False):
    """What `results` gives by Triton's kernels, and their names."""
    calls = []
    with (
        backends.use_backend("triton"),
        intercept(lambda k, g, a, m, run: (calls.append(k.fn.__name__), run())),
    ):
        return *results(case, bases), calls


def require_right(case, ours, dy, bases=False):
    exact, unfused = truth(case, dy, bases)
    for mine, right, other in zip(ours, exact, unfused, strict=True):
        if mine is None:  # of a group without rows
            assert right is None
            continue
        norm = right.norm()
        assert (mine.double() - right).norm() <= 1.5 * (other.double() - right).norm() + 2e-6 * norm


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name):
    case = batch(INDEX, **CASES[name])
    ours, dy, calls = launched(case)
    assert len(calls) == 2 + 4
    require_right(case, ours, dy)


EXPERTS = {
    "mixed": {},
    "sixteen bits and dropout": {"dtype": torch.float16, "p": 0.3},
    "master copies": {"dtype": torch.float16, "adapter_dtype": torch.float32},
    "odd sizes, more ranks than a block": {"K": 71, "N": 65, "ranks": (17, 40, 3), "p": 0.3},
    "aligned": {"K": 64, "N": 80, "ranks": (16, 16, 16), "stack": True},
    "tenants of experts": {"experts": 2, "weight_of": [1, 0, 1]},
    "no bias": {"bias": False},
}
OF_EXPERTS = [
    "many_shrink_kernel", "experts_kernel",
    "many_shrink_kernel", "experts_kernel", "many_tall_kernel", "many_tall_kernel",
]  # fmt: skip


def unstacked(case, ours):
    """With the gradients of stacks one by one."""
    return [*ours[:-2], *ours[-2], *ours[-1]] if case.stack else ours


@pytest.mark.parametrize("name", EXPERTS)
def test_values_and_gradients_of_experts(name):
    case = batch(INDEX, **{"experts": 3, **EXPERTS[name]})
    ours, dy, calls = launched(case)
    assert calls == OF_EXPERTS
    require_right(case, unstacked(case, ours), dy)


def test_experts_stored_transposed_and_strided_rows():
    """As GPT-OSS has them; x and y may be parts of larger matrices."""
    case = batch(INDEX, experts=3, K=40, N=33, dtype=torch.float16)
    weight = case.weight.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.full((2 * len(INDEX), 50), float("nan"), dtype=torch.float16)
    wide[::2, 3:43] = case.x
    x = wide[::2, 3:43].detach().requires_grad_()
    a, b = ([t.clone().requires_grad_() for t in ts] for ts in (case.a, case.b))
    with backends.use_backend("triton"):
        y = lora_linear_grouped(x, weight, a, b, case.groups, case.bias, **case.options())
        dy = randn(len(INDEX), 2 * 33, dtype=torch.float16)[:, ::2]
        grads = torch.autograd.grad(y, [x, *a, *b], dy)
    require_right(case, [y, *grads], dy)


def test_gradients_of_the_bases():
    """Of weight and bias each expert's sum, beside the kernels."""
    case = batch(INDEX, experts=2, weight_of=[1, 0, 1])
    ours, dy, calls = launched(case, bases=True)
    assert calls == OF_EXPERTS
    require_right(case, ours, dy, bases=True)


def test_experts_with_more_rows_than_a_tile():
    """Many tiles of rows and of columns; an expert of one row and one of none."""
    index = [(7 * m) % 2 for m in range(230)]
    index[17] = 2
    case = batch(index, experts=4, K=17, N=140, ranks=(3, 5, 2, 4), p=0.3)
    ours, dy, _ = launched(case)
    require_right(case, ours, dy)
    again, _, _ = launched(case)
    assert torch.equal(ours[0], again[0])


@pytest.mark.parametrize("lengths", [[3, 0, 5], [8, 1, 1]])
def test_experts_and_rows_past_them(lengths):
    index = [g for g, length in enumerate(lengths) for _ in range(length)]
    index += [-2] * (12 - len(index))
    case = batch(index, groups=Groups.from_segments(lengths), experts=3)
    case.x[sum(lengths) :] = float("nan")
    ours, dy, calls = launched(case)
    assert calls == OF_EXPERTS
    for rows in ours[:2]:  # y and dx
        assert not rows[sum(lengths) :].any()
    require_right(case, ours, dy)


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


@pytest.mark.parametrize("experts", [0, 3])
def test_isolation_and_lanes_past_a_rank(experts):
    """NaN in another's rows, adapter and expert changes no bit; nor does what lies behind a small
    A."""
    case = batch(INDEX, experts=experts)
    rows = [m for m, group in enumerate(INDEX) if group == 2]
    others = [m for m in range(len(INDEX)) if m not in rows]
    dy, nan = randn(len(INDEX), 20), float("nan")

    def run(x, a, b, weight):
        leaves = [x.clone().requires_grad_(), *(t.requires_grad_() for t in a)]
        y = lora_linear_grouped(
            leaves[0], weight, a, b, case.groups, case.bias, scaling=list(case.scaling)
        )
        dx, *d_a = torch.autograd.grad(y, leaves, dy)
        return y[others], dx[others], *d_a[:2]

    behind = [torch.full((40, 24), nan) for _ in case.a]
    for tensor, a in zip(behind, case.a, strict=True):
        tensor[: len(a)] = a
    a = [t[: len(own)] for t, own in zip(behind, case.a, strict=True)]
    x, b, weight = case.x.clone(), [t.clone() for t in case.b], case.weight.clone()
    x[rows] = nan
    b[2].fill_(nan)
    if experts:
        weight[2] = nan
    with backends.use_backend("triton"):
        clean = run(case.x, [t.clone() for t in case.a], case.b, case.weight)
        for mine, other in zip(run(x, a, b, weight), clean, strict=True):
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


def test_weight_of_an_expert_that_is_not_there():
    """Said by the op itself: kernels would read outside."""
    case = batch(INDEX, experts=2, weight_of=[1, 0, 2])
    groups = case.groups
    with backends.use_backend("triton"), pytest.raises(ValueError, match="weight_of: expected"):
        torch.ops.lora_kernels.lora_linear_grouped(
            case.x, case.weight, case.a, case.b, case.bias, case.weight_of, groups.order,
            groups.offsets, groups.bounds, list(case.scaling), 0.0, None, False,
        )  # fmt: skip


def test_autocast_leaves_wider_experts_to_the_loop():
    """Rounded one expert at a time: no copy of them all."""
    case = batch(INDEX, experts=3, dtype=torch.float16, adapter_dtype=torch.float32)
    case.weight, case.bias = case.weight.float(), case.bias.float()
    calls = []
    with (
        backends.use_backend("triton"),
        torch.autocast("cpu", dtype=torch.float16),
        intercept(lambda k, g, a, m, run: (calls.append(k.fn.__name__), run())),
    ):
        y = case.call(case.leaves())
    assert "experts_kernel" not in calls
    assert y.dtype == torch.float16
