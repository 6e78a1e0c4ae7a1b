"""The native ops of many branches: bits and threads, layouts, and arguments that do not fit."""

import pytest
import torch

from lora_kernels import Groups, lora_add_grouped
from lora_kernels.backends import use_backend
from lora_kernels.backends.native import extension, grouped
from lora_kernels.branch import Branches

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
        "scale": [1.0, 2.0, 3.0], "high": [1.0] * 3, "threshold": 0, "seeds": None, "isa": isa, "s": None,
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
