"""Many rows of many adapters on one weight in one native call, where products are packed: values,
bits, and arguments that do not fit."""

import pytest
import torch
from torch.nn import functional as F

from lora_kernels import Groups, lora_linear_grouped
from lora_kernels.backends.native import extension, grouped
from lora_kernels.branch import Branches, Dense, Needs
from lora_kernels.grouped import composite, direct

OPS = torch.ops.lora_kernels
pytestmark = pytest.mark.skipif(
    not extension.available() or extension.packed_from(extension.best_isa()) == extension.NEVER,
    reason="nothing is packed here",
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
K, N, RANKS = 150, 70, (3, 8, 33, 5)


def randn(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def mixed(M):
    """Rows of four groups, the last without any, and of nobody, in any order."""
    rows = torch.randperm(M, generator=torch.Generator().manual_seed(M))
    return Groups.from_rows(rows % 4 - 1, 4)


def segments(M):
    """One of them of none, the last rows no group's, none ending with a tile of rows."""
    first, second = M // 3 + 1, M // 3 - 2
    return Groups.from_segments([first, 0, second, M - first - second - 7])


LAYOUTS = {"mixed": mixed, "segments": segments}


class Case:
    def __init__(self, layout, dtype, M=300, adapters=None, turned=False, bias=True, scaling=2.0):
        self.groups, self.M, self.scaling = LAYOUTS[layout](M), M, scaling
        self.x = randn(M, K, dtype=dtype)
        weight = randn(N, K, dtype=dtype) / K**0.5
        self.weight = weight.t().contiguous().t() if turned else weight
        self.bias = randn(N, dtype=dtype) if bias else None
        low = adapters or dtype
        self.a = [randn(r, K, dtype=low) / K**0.5 for r in RANKS]
        self.b = [randn(N, r, dtype=low) / r**0.5 for r in RANKS]
        self.dy = randn(M, N, dtype=dtype)

    @property
    def leaves(self):
        return [self.x, *self.a, *self.b]

    def branches(self):
        g = self.groups
        order = None if g.in_order else g.order
        scalings = [self.scaling] * len(RANKS)
        return Branches(self.a, self.b, scalings, 0.0, None, order, g.bounds, g.offsets)

    def found(self):
        """y, dx, dA and dB of each, None of a group without rows."""
        for leaf in self.leaves:
            leaf.requires_grad_()
        y = lora_linear_grouped(
            self.x, self.weight, self.a, self.b, self.groups, self.bias, scaling=self.scaling
        )
        gradients = torch.autograd.grad(y, self.leaves, self.dy, allow_unused=True)
        for leaf in self.leaves:
            leaf.requires_grad_(False)
        return [y.detach(), *gradients]

    def torch_in(self, dtype):
        """The same by torch's calls, of zeros where nothing is found."""
        rounded = [t.to(self.x.dtype).to(dtype).requires_grad_() for t in self.leaves]
        x, a, b = rounded[0], rounded[1 : 1 + len(RANKS)], rounded[1 + len(RANKS) :]
        bias = None if self.bias is None else self.bias.to(dtype)
        y, bounds = F.linear(x, self.weight.to(dtype), bias), self.groups.bounds
        order = torch.arange(self.M) if self.groups.order is None else self.groups.order
        for g in range(len(RANKS)):
            rows = order[bounds[g] : bounds[g + 1]]
            branch = self.scaling * F.linear(F.linear(x[rows], a[g]), b[g])
            y = y.index_add(0, rows, branch)
        served = torch.zeros(self.M, dtype=torch.bool)
        served[order[: bounds[-1]]] = True
        y = y * served[:, None]
        gradients = torch.autograd.grad(y, rounded, self.dy.to(dtype))
        return [y.detach(), *gradients]


@pytest.fixture
def calls(monkeypatch):
    """How often the layer was one call, forward and backward."""
    made = {"layer": 0, "layer_backward": 0}
    for name in made:
        original = getattr(grouped, name)

        def counted(*args, name=name, original=original):
            made[name] += 1
            return original(*args)

        monkeypatch.setattr(grouped, name, counted)
    return made


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        {}, {"M": 25}, {"turned": True, "bias": False}, {"turned": True}, {"scaling": 500.0},
        {"adapters": torch.float32, "bias": False},
    ],
)  # fmt: skip
def test_values_and_gradients(layout, dtype, options, calls):
    case = Case(layout, dtype, **options)
    exact, rival = case.torch_in(torch.float64), case.torch_in(dtype)
    for found, wanted, theirs in zip(case.found(), exact, rival, strict=True):
        if found is None:
            assert not wanted.any()
            continue
        size = wanted.norm() + 1e-30
        error, unfused = ((t.double() - wanted).norm() / size for t in (found, theirs))
        assert error <= 2 * unfused + torch.finfo(dtype).eps
    # Weights by columns under a bias are left to others.
    forward = not ("turned" in options and "bias" not in options)
    assert calls == {"layer": int(forward), "layer_backward": 1}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_the_threads(layout, dtype):
    case, threads, found = Case(layout, dtype, M=700), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append([t for t in case.found() if t is not None])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_others_hold_is_never_read(layout):
    """Infinities in one group's rows and adapters reach no other's, in a tile with them or not."""
    case, plain = Case(layout, torch.float32), Case(layout, torch.float32)
    order = torch.arange(case.M) if case.groups.order is None else case.groups.order
    bounds = case.groups.bounds
    own = order[bounds[2] : bounds[3]]
    for rows in (case.x, case.dy):
        rows[own] = float("inf")
    case.a[2].fill_(float("inf"))
    case.b[2].fill_(float("nan"))
    others = torch.ones(case.M, dtype=torch.bool)
    others[own] = False
    found, wanted = case.found(), plain.found()
    assert torch.equal(found[0][others], wanted[0][others])
    assert torch.equal(found[1][others], wanted[1][others])
    for i in (2, 2 + len(RANKS)):  # group 0's
        assert torch.equal(found[i], wanted[i])


def test_only_what_is_asked_for():
    case = Case("mixed", torch.float32)
    branches, whole = case.branches(), case.found()
    s = composite.forward(
        Dense(case.weight, case.bias), case.x, composite.Adapters(*branches[:5]),
        composite.Members(*branches[5:]), True,
    )[1]  # fmt: skip
    nothing = [False] * len(RANKS)
    for i in range(len(RANKS)):
        only = [j == i for j in range(len(RANKS))]
        for needs, place in (
            (Needs(False, False, False, only, nothing), 2 + i),
            (Needs(False, False, False, nothing, only), 2 + len(RANKS) + i),
        ):
            dx, d_a, d_b = grouped.layer_backward(
                Dense(case.weight), (case.dy, case.x, s), branches, needs
            )
            assert dx is None
            (one,) = (t for t in (*d_a, *d_b) if t is not None)
            wanted = whole[place]
            assert torch.equal(one, torch.zeros_like(one) if wanted is None else wanted)
    needs = Needs(True, False, False, nothing, nothing)
    rows = case.dy, case.dy.new_empty(0), case.dy.new_empty(0)
    assert torch.equal(
        grouped.layer_backward(Dense(case.weight), rows, branches, needs)[0], whole[1]
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_gradients_one_call_past_the_op(dtype):
    """Of the same values as a call with gradients."""
    case = Case("mixed", dtype, scaling=[0.5, 1.0, 3.0, 1.0])
    given = case.x, case.weight, (case.a, case.b), case.groups, case.bias, case.scaling
    y = direct.linear(*given)
    assert y is not None
    torch.testing.assert_close(y, lora_linear_grouped(
        case.x.requires_grad_(), case.weight, case.a, case.b, case.groups, case.bias,
        scaling=case.scaling,
    ).detach())  # fmt: skip
    assert direct.linear(*given[:-1], [0.5, 1.0, float("inf"), 1.0]) is None


def arguments(**changes):
    case = Case("segments", torch.float32)
    given = {
        "x": case.x, "weight": case.weight, "lora_a": case.a, "lora_b": case.b, "order": None,
        "bounds": case.groups.bounds, "bias": case.bias, "scale": [1.0] * 4, "high": [1.0] * 4,
        "isa": extension.best_isa(), "s": None,
    }  # fmt: skip
    return {**given, **changes}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": randn(23, K)}, "rows: products of [23, 70] are not packed"),
        ({"isa": 0}, "are not packed"),
        ({"x": randn(300, K).double()}, "x: must be float32, bfloat16 or float16"),
        ({"x": randn(K, 300).t()}, "x: the columns must be contiguous"),
        ({"weight": randn(N, K + 1)}, "weight: must be [70, 150]"),
        ({"weight": randn(K, N).t()}, "weight: its rows must be contiguous where there is a bias"),
        ({"bounds": [0, 8, 9, 25, 31]}, "bounds: must be 6 numbers"),
        ({"bounds": [0, 8, 9, 25, 31, 301]}, "bounds: must end at most at 300"),
        ({"bounds": [0, 8, 7, 25, 31, 300]}, "bounds: must rise"),
        (
            {"bounds": [0] * 5 + [300], "order": torch.arange(1, 301)},
            "order: must be rows, got 300",
        ),
        ({"lora_a": [randn(r, 2 * K)[:, ::2] for r in RANKS]}, "lora_a: the columns must be"),
        ({"lora_b": [randn(N, r + 1) for r in RANKS]}, "lora_b: must be [70, 3]"),
        ({"bias": randn(N + 1)}, "bias: must have 70 elements"),
        ({"scale": [1.0]}, "scale, high: must be one of each group"),
        ({"scale": [1.0, float("nan"), 1.0, 1.0]}, "scale, high: must be finite"),
        ({"s": randn(300, 32)}, "s: must have the columns of every rank"),
        ({"s": randn(299, 33)}, "s: must be [300, 33]"),
    ],
)
def test_wrong_arguments_are_refused(change, words):
    with pytest.raises(RuntimeError) as caught:
        OPS._linear_packed_cpu(*arguments(**change).values())
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dy": randn(23, N)}, "rows: products of [23, 150] are not packed"),
        ({"x": None}, "x: must be given for dA"),
        ({"s": None}, "s: must be given for dB"),
        ({"x": randn(299, K)}, "x: must be [300, 150]"),
        ({"s": randn(300, 32)}, "s: must have the columns of every rank"),
        ({"scaling": [1.0]}, "must be one of each group"),
        ({"need_b": [True]}, "must be one of each group"),
    ],
)
def test_wrong_arguments_of_the_backward_are_refused(change, words):
    case = arguments()
    given = {
        "dy": randn(300, N), "x": case["x"], "weight": case["weight"], "lora_a": case["lora_a"],
        "lora_b": case["lora_b"], "s": randn(300, 33), "order": None, "bounds": case["bounds"],
        "scaling": [1.0] * 4, "high": [1.0] * 4, "isa": case["isa"], "need_x": True,
        "need_a": [True] * 4, "need_b": [True] * 4, **change,
    }  # fmt: skip
    with pytest.raises(RuntimeError) as caught:
        OPS._linear_packed_backward_cpu(*given.values())
    assert words in str(caught.value)
