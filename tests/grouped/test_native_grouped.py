"""The native ops of many branches: bits and threads, layouts, and arguments that do not fit."""

import pytest
import torch
from torch.nn import functional as F

from lora_kernels import Groups, lora_add_grouped, lora_linear_grouped
from lora_kernels.backends import use_backend
from lora_kernels.backends.native import extension, grouped
from lora_kernels.branch import Branches
from lora_kernels.grouped import direct, functional
from lora_kernels.testing import Aten

pytestmark = pytest.mark.skipif(not extension.available(), reason=extension.status())
OPS = torch.ops.lora_kernels
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RANKS = (3, 16, 40)


def randn(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def arguments(M=30, K=70, N=50, dtype=torch.float32, isa=0, **changes):
    given = {
        "y": randn(M, N, dtype=dtype), "x": randn(M, K, dtype=dtype),
        "lora_a": [randn(r, K, dtype=dtype) for r in RANKS],
        "lora_b": [randn(N, r, dtype=dtype) for r in RANKS],
        "order": None, "bounds": [0, 8, 9, 25, 30], "most_rows": 30,
        "scale": [1.0, 2.0, 3.0], "high": [1.0] * 3, "threshold": 0, "seeds": None,
        "isa": isa, "s": None,
    }  # fmt: skip
    return {**given, **changes}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_bits_do_not_depend_on_the_threads(dtype, mixed, p):
    index = torch.arange(200) % 3 if mixed else torch.arange(200) // 70
    groups = Groups.from_rows(index, 3)
    threads, results = torch.get_num_threads(), []
    a, b = [randn(r, 70) for r in RANKS], [randn(50, r) for r in RANKS]
    rows = groups.order, groups.bounds, groups.offsets
    branches = Branches(a, b, [1.0] * 3, 0.0, None, *rows)
    assert grouped.serves(randn(200, 70, dtype=dtype), branches)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            leaves = [randn(200, 50, dtype=dtype), randn(200, 70, dtype=dtype)]
            leaves += [randn(r, 70) for r in RANKS] + [randn(50, r) for r in RANKS]
            for leaf in leaves:
                leaf.requires_grad_()
            base, x, *pairs = leaves
            y = lora_add_grouped(base, x, pairs[:3], pairs[3:], groups, dropout_p=p, seed=5)
            y.backward(randn(200, 50, dtype=dtype))
            results.append([y, *(leaf.grad for leaf in leaves)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_call_is_the_calls_of_each_group(dtype):
    """By the same kernels, so to the bit; with dropout torch has no part in either."""
    x, base = randn(60, 70, dtype=dtype), randn(60, 50, dtype=dtype)
    a, b = ([randn(*s, dtype=dtype) for s in sizes] for sizes in (((8, 70),) * 3, ((50, 8),) * 3))
    options = {"scaling": [0.5, 1.0, 3.0], "dropout_p": 0.3, "seed": [1, 2, 3]}
    index = torch.arange(60) * 7 % 3
    together = lora_add_grouped(base, x, a, b, Groups.from_rows(index, 3), **options)
    with use_backend("native"):
        for g in range(3):
            alone = torch.where(index == g, 0, -1)
            alone = lora_add_grouped(
                base, x, a[g : g + 1], b[g : g + 1], Groups.from_rows(alone, 1),
                scaling=options["scaling"][g], dropout_p=0.3, seed=g + 1,
            )  # fmt: skip
            assert torch.equal(together[index == g], alone[index == g])


def test_a_matrix_of_strided_and_shifted_rows():
    wide = torch.cat([torch.zeros(30, 3), randn(30, 70), torch.zeros(30, 9)], 1)
    groups = Groups.from_rows(torch.arange(30) % 3, 3)
    a, b = ([randn(*s) for s in sizes] for sizes in (((8, 70),) * 3, ((50, 8),) * 3))
    base = randn(30, 50)
    plain = lora_add_grouped(base, randn(30, 70), a, b, groups)
    assert torch.equal(lora_add_grouped(base, wide[:, 3:73], a, b, groups), plain)
    turned = [t.t().contiguous().t() for t in b]
    assert torch.equal(lora_add_grouped(base, wide[:, 3:73], a, turned, groups), plain)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bounds": [0, 8, 9, 25]}, "bounds: must be 5 numbers"),
        ({"bounds": [0, 8, 9, 25, 31]}, "bounds: must end at most at 30"),
        ({"bounds": [0, 8, 7, 25, 30]}, "bounds: must rise"),
        ({"order": torch.arange(29)}, "order: must be 30 contiguous int64"),
        ({"order": torch.arange(1, 31)}, "order: must be rows, got 30"),
        ({"order": -torch.arange(30)}, "order: must be rows, got -1"),
        ({"seeds": torch.zeros(2, dtype=torch.int64)}, "seeds: must be 3 contiguous int64"),
        ({"y": randn(29, 50)}, "y: must be [30, 50]"),
        ({"y": randn(1, 50).expand(30, 50)}, "y: its elements overlap"),
        ({"x": randn(70, 30).t()}, "x: the columns must be contiguous"),
        ({"lora_b": [randn(50, r) for r in (3, 16, 41)]}, "lora_b: must be [50, 40]"),
        ({"lora_a": [randn(3, 70)] * 2}, "lora_a and lora_b: must be as many"),
        ({"scale": [1.0]}, "scale, high: must be one of each group"),
        ({"s": randn(30, 39)}, "s: must have the columns of every rank"),
        ({"threshold": 65536}, "threshold: must be in [0, 65536)"),
        ({"isa": 9}, "isa: got 9"),
    ],
)
def test_wrong_arguments_are_refused_before_memory_is_touched(change, words):
    with pytest.raises(RuntimeError) as caught:
        OPS._add_grouped_cpu(*arguments(**change).values())
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": None}, "x: must be given for dA"),
        ({"s": None}, "s: must be given for dB"),
        ({"x": randn(29, 70)}, "x: must be [30, 70]"),
        ({"dx": randn(30, 69)}, "dx: must be [30, 70]"),
        ({"d_a": [randn(2, 70)] * 3}, "d_a: must be [3, 70]"),
        ({"d_b": [randn(50, 3)] * 2}, "must be one of each group"),
        ({"s": randn(30, 2)}, "s: must have the columns of every rank"),
    ],
)
def test_wrong_arguments_of_the_backward_are_refused(change, words):
    base = arguments()
    given = {
        "dx": randn(30, 70), "dy": base["y"], "x": base["x"], "lora_a": base["lora_a"],
        "lora_b": base["lora_b"], "s": randn(30, 40), "order": None, "bounds": base["bounds"],
        "most_rows": 30, "scaling": [1.0] * 3, "high": [1.0] * 3, "keep": 1.0, "threshold": 0,
        "seeds": None, "isa": 0, "d_a": [torch.empty(r, 70) for r in RANKS],
        "d_b": [torch.empty(50, r) for r in RANKS], **change,
    }  # fmt: skip
    with pytest.raises(RuntimeError) as caught:
        OPS._backward_grouped_cpu(*given.values())
    assert words in str(caught.value)


# ------------------------------------------------------------------------ few rows, no gradient


def few(dtype=torch.float32, M=9, K=70, N=50, turned=False, adapters=None):
    """(x, weight, lora_a, lora_b, bias) of `_linear_grouped_cpu`."""
    weight = randn(N, K, dtype=dtype) / K**0.5
    a = [randn(r, K, dtype=adapters or dtype) / K**0.5 for r in RANKS]
    b = [randn(N, r, dtype=adapters or dtype) / r**0.5 for r in RANKS]
    return (
        randn(M, K, dtype=dtype), weight.t().contiguous().t() if turned else weight, a, b,
        randn(N, dtype=dtype),
    )  # fmt: skip


SCALING = [0.5, 1.0, 3.0]


def unfused(tensors, index, dtype):
    """In torch's calls, row by row, of numbers -1 nobody's, -2 zero."""
    x, weight, a, b, bias = (
        [t.to(dtype) for t in one] if isinstance(one, list) else one.to(dtype) for one in tensors
    )
    y = F.linear(x, weight, bias)
    for m, g in enumerate(index):
        if g >= 0:
            y[m] += SCALING[g] * F.linear(F.linear(x[m], a[g]), b[g])
        if g == -2:
            y[m] = 0
    return y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("adapters", [None, torch.float32])
@pytest.mark.parametrize("isa", range(len(extension.ISA_NAMES)))
def test_few_rows_in_one_call(dtype, turned, adapters, isa):
    if isa > extension.best_isa() or 0 < isa < 5 <= extension.best_isa():
        pytest.skip("not of this CPU")
    tensors = few(dtype, turned=turned, adapters=adapters)
    x, weight, a, b, bias = tensors
    for groups, index in (
        (Groups.from_rows([2, 0, -1, 1, 1, 2, 0, 2, 2], 3), [2, 0, -1, 1, 1, 2, 0, 2, 2]),
        (Groups.from_segments([4, 0, 2]), [0, 0, 0, 0, 2, 2, -2, -2, -2]),
    ):
        order = None if groups.in_order else groups.order
        y = OPS._linear_grouped_cpu(x, weight, a, b, order, groups.bounds, bias, SCALING, isa)
        rounded = (x, weight, [t.to(dtype) for t in a], [t.to(dtype) for t in b], bias)
        exact, rival = (unfused(rounded, index, one) for one in (torch.float64, dtype))
        error, theirs = ((t.double() - exact).norm() / exact.norm() for t in (y, rival))
        assert error <= 2 * theirs + torch.finfo(dtype).eps


def test_few_rows_need_no_op(monkeypatch):
    """One native call, whatever the number of groups; with leading dimensions and a stack too.
    Where somebody watches there is the op."""
    x, weight, a, b, bias = few(M=12)
    groups = Groups.from_rows(torch.arange(12) % 3, 3)
    with torch.no_grad():
        with Aten(lambda name, values: None):
            watched = lora_linear_grouped(x, weight, a, b, groups, bias, scaling=SCALING)
        monkeypatch.setattr(functional, "ops", None)
        y = lora_linear_grouped(x, weight, a, b, groups, bias, scaling=SCALING)
        shaped = direct.linear(x.view(3, 4, 70), weight, (a, b), groups, bias, SCALING)
        with Aten(lambda name, values: None):
            assert direct.linear(x, weight, (a, b), groups, bias, SCALING) is None
        a, b = [randn(2, 70)] * 3, [randn(50, 2)] * 3
        stacks = torch.stack(a), torch.stack(b)
        of_stacks, of_lists = (
            direct.linear(x, weight, pair, groups, None, 2.0) for pair in (stacks, (a, b))
        )
    assert torch.equal(shaped, y.view(3, 4, 50))
    assert torch.equal(of_stacks, of_lists)
    torch.testing.assert_close(watched, y)


def test_few_rows_of_nobody_have_the_bits_of_the_frozen_layer():
    x, weight, a, b, bias = few()
    for groups in (Groups.from_rows([0, -1, 2, -1, 1, 1, 1, 0, -1], 3),
                   Groups.from_segments([2, 3, 2, 2], [0, 1, 2, -1], 3)):  # fmt: skip
        nobody = torch.arange(9) if groups.order is None else groups.order
        nobody = nobody[groups.bounds[-2] :]
        with torch.no_grad():
            y = direct.linear(x, weight, (a, b), groups, bias, SCALING)
        assert torch.equal(y[nobody], F.linear(x, weight, bias)[nobody])


def test_few_rows_on_any_number_of_threads():
    """Bits do not depend on it."""
    x, weight, a, b, bias = few(M=16, K=700, N=600)
    groups, threads, found = Groups.from_rows(torch.arange(16) % 3, 3), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with torch.no_grad():
                found.append(direct.linear(x, weight, (a, b), groups, bias, SCALING))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_what_few_rows_leave_to_the_op():
    x, weight, a, b, bias = few()
    groups = Groups.from_segments([4, 2, 3])

    def call(**changes):
        given = {"x": x, "weight": weight, "pair": (a, b), "groups": groups, "bias": bias,
                 "scaling": SCALING, **changes}  # fmt: skip
        return direct.linear(*given.values())

    refused = (
        {"x": x.double()}, {"x": x[:5]}, {"weight": weight.half()}, {"bias": bias[1:]},
        {"pair": (a[:2], b)}, {"pair": (a, [None] * 3)}, {"scaling": [1.0]}, {"scaling": None},
        {"scaling": [1.0, float("nan"), 1.0]}, {"scaling": [True] * 3}, {"groups": None},
        {"groups": Groups.from_segments([4, 2, 4])}, {"weight": torch.stack([weight] * 3)},
        {"groups": Groups.from_rows([0], 3)}, {"pair": (a, [t[:, :-1] for t in b])},
        {"pair": ([t.double() for t in a], b)}, {"pair": ([t[:, 1:] for t in a], b)},
        {"x": randn(9, 0), "weight": randn(50, 0)}, {"bias": bias.double()},
    )  # fmt: skip
    assert call() is not None  # nothing requires a gradient
    for changes in refused:
        assert call(**changes) is None
    weight = weight.clone().requires_grad_()  # now something does, where it is not what is changed
    assert call().requires_grad
    for changes in refused:
        assert call(**changes) is None
    weight = weight.detach()
    with use_backend("native"):
        assert call() is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bounds": [0, 8, 9]}, "bounds: must be 5 numbers"),
        ({"bounds": [0, 4, 6, 9, 10]}, "bounds: must end at most at 9"),
        ({"bounds": [0, 4, 3, 9, 9]}, "bounds: must rise"),
        ({"order": torch.arange(1, 10)}, "order: must be rows, got 9"),
        ({"weight": randn(50, 69)}, "weight: must be [50, 70]"),
        ({"weight": randn(50, 140)[:, ::2]}, "weight: the rows or the columns must be contiguous"),
        ({"lora_a": [randn(r, 140)[:, ::2] for r in RANKS]}, "lora_a: the columns must be"),
        ({"lora_b": [randn(50, r) for r in (3, 16, 41)]}, "lora_b: must be [50, 40]"),
        ({"bias": randn(49)}, "bias: must have 50 elements"),
        ({"bias": randn(50).half()}, "bias: must have the dtype of the rows"),
        ({"scaling": [1.0]}, "scaling: must be one of each group"),
        ({"scaling": [1.0, float("inf"), 1.0]}, "scaling: must be finite"),
        ({"x": randn(9, 70).double()}, "x: must be float32, bfloat16 or float16"),
        ({"isa": 9}, "isa: got 9"),
    ],
)
def test_wrong_arguments_of_few_rows_are_refused(change, words):
    x, weight, a, b, bias = few()
    given = {
        "x": x, "weight": weight, "lora_a": a, "lora_b": b, "order": None,
        "bounds": [0, 4, 6, 9, 9], "bias": bias, "scaling": SCALING, "isa": 0, **change,
    }  # fmt: skip
    with pytest.raises(RuntimeError) as caught:
        OPS._linear_grouped_cpu(*given.values())
    assert words in str(caught.value)
