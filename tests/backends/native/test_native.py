"""The compiled CPU kernels, on every instruction set of this CPU."""

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_kernels import backends, lora_add, lora_add_, lora_linear
from lora_kernels.backends import blocked, dropout, native, reference, use_backend
from lora_kernels.backends.native import extension
from lora_kernels.branch import Branch, Dense

pytestmark = pytest.mark.skipif(not extension.available(), reason=extension.status())

ISAS = range(extension.best_isa() + 1 if extension.available() else 1)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPS = torch.ops.lora_kernels


@pytest.fixture(params=ISAS, ids=lambda isa: extension.ISA_NAMES[isa])
def isa(request, monkeypatch, entering):
    """The kernels of one instruction set serve every call, on the path of a CPU that has 16-bit
    products."""
    entering(use_backend("native"))
    monkeypatch.setattr(native, "best_isa", lambda: request.param)
    monkeypatch.setattr(native, "are_few", lambda *a: False)
    monkeypatch.setattr(blocked, "_multiplies", lambda dtype: True)
    return request.param


@pytest.fixture(params=(0, 10**6), ids=("low rank alone", "whole layer"))
def few(request, isa, monkeypatch):
    """Whether one call computes the layer."""
    monkeypatch.setattr(native, "are_few", lambda *a: bool(request.param))
    return request.param


def test_they_are_the_default_on_the_cpu():
    choice = backends.choose("cpu")
    assert choice.name == "native"
    assert choice.reason == f"CPU kernels, {extension.ISA_NAMES[extension.best_isa()]}"


def test_calls_that_torch_wins_are_handed_back(monkeypatch):
    served = []
    monkeypatch.setattr(blocked, "_multiplies", lambda dtype: True)
    monkeypatch.setattr(native, "best_isa", lambda: 1)
    monkeypatch.setattr(native, "shrink", lambda *a, **k: served.append(True) or a[0][:, :1])
    monkeypatch.setattr(native, "expand", lambda *a, **k: None)
    monkeypatch.setattr(native, "are_few", lambda *a: False)
    for rows, rank, dtype, p, expected in (
        (128, 2, torch.float32, 0.0, True),
        (127, 2, torch.float32, 0.0, False),
        (128, 63, torch.float32, 0.0, True),
        (128, 64, torch.float32, 0.0, False),
        (128, 2, torch.bfloat16, 0.0, False),
        (1, 64, torch.bfloat16, 0.1, True),
    ):
        served.clear()
        x, a, b = torch.ones(rows, 8), torch.ones(rank, 8), torch.ones(4, rank)
        lora_linear(x.to(dtype), torch.ones(4, 8).to(dtype), a, b, scaling=1.0, dropout_p=p, seed=0)
        assert bool(served) == expected, (rows, rank, dtype, p)


# ------------------------------------------------------------------------------------------- values


@st.composite
def cases(draw, add):
    dtype = draw(st.sampled_from(DTYPES))
    sizes = (1, 2, 7, 8, 31, 64, 65, 127, 130, 300)
    return oracle.Case(
        *(draw(st.sampled_from(sizes)) for _ in range(3)),
        r=draw(st.sampled_from((1, 2, 3, 4, 7, 8, 16, 33, 64, 200))),
        dtype=dtype,
        adapter_dtype=draw(st.sampled_from((None, torch.float32))),
        bias=draw(st.booleans()),
        scaling=draw(st.sampled_from((2.0, 1.0, 1 / 3, -1.5))),
        p=draw(st.sampled_from((0.0, 0.0, 0.05, 0.5, 0.9))),
        layout=draw(st.sampled_from(oracle.LAYOUTS)),
        add=add,
        seed=draw(st.integers(0, 2**40)),
    )


@pytest.mark.parametrize("add", [False, True], ids=["linear", "add"])
def test_values_and_gradients(few, add):
    @settings(max_examples=40)
    @given(cases(add))
    def check(case):
        oracle.assert_accurate(case, lora_add if add else lora_linear)

    check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_wider_than_a_strip_and_more_rows_than_a_chunk(few, dtype):
    for p in (0.0, 0.3):
        oracle.assert_accurate(oracle.Case(300, 1100, 1030, 5, dtype, p=p), lora_linear)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("rows", [5000, 20_011])
def test_sums_over_as_many_rows_as_a_batch_has(isa, rows, p):
    """dA and dB are sums of up to 64 chunks: 40 of 128 rows, then 63 of 320."""
    oracle.assert_accurate(oracle.Case(rows, 16, 16, 8, p=p), lora_linear)


@pytest.mark.parametrize("case", oracle.LARGE)
def test_large_values_in_fp16(few, case):
    oracle.assert_fp16_range(case, lora_add if case.add else lora_linear)


@pytest.mark.parametrize(("dtype", "scaling"), [(torch.float32, 2.0), (torch.float16, 3.0)])
def test_in_place_on_any_strides(isa, dtype, scaling):
    case = oracle.Case(9, 33, 70, 3, dtype, scaling=scaling, add=True)
    t, dy = oracle.make(case)
    exact = oracle.reference64(case, t, dy)["y"]
    t = {name: value.detach() for name, value in t.items()}
    expected = lora_add(**t, scaling=scaling)
    assert (expected - exact).norm() <= 2 * torch.finfo(dtype).eps * exact.norm()
    for layout in ("contiguous", "transposed", "sliced"):
        out = oracle.lay_out(t["base_out"].clone(), layout)
        lora_add_(out, t["x"], t["lora_a"], t["lora_b"], scaling=scaling)
        assert torch.equal(out, expected)


def test_what_lies_beside_an_output_stays(isa):
    around = torch.full((12, 100), 7.0)
    low, matrix = torch.ones(10, 2), torch.ones(2, 69)
    OPS._expand_cpu(low, matrix, None, 1.0, 0, None, False, isa, around[1:11, 3:72])
    assert (around[1:11, 3:72] == 2).all()
    around[1:11, 3:72] = 7
    assert (around == 7).all()


def test_non_finite_values_stay_what_they_are(few):
    x = torch.ones(3, 70)
    x[0, 5], x[1, 69] = float("nan"), float("inf")
    for dtype in DTYPES:
        for p in (0.0, 1e-5):  # rounded to a mask that drops nothing
            y = lora_linear(
                x.to(dtype), torch.ones(4, 70).to(dtype), torch.ones(1, 70).to(dtype),
                torch.ones(4, 1).to(dtype), scaling=1.0, dropout_p=p, seed=1,
            )  # fmt: skip
            assert y[0].isnan().all()
            assert (y[1] == float("inf")).all()
            assert y[2].isfinite().all()


def test_bits_do_not_depend_on_the_threads(isa):
    case = oracle.Case(3000, 40, 24, 8, torch.bfloat16, p=0.2)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            tensors, dy = oracle.make(case)
            results.append(oracle.compute(case, tensors, dy, lora_linear))
    finally:
        torch.set_num_threads(threads)
    # torch's own product is not asked to be equal: dA, dB are the kernels' alone.
    for name in ("lora_a", "lora_b"):
        assert all(torch.equal(one[name], results[0][name]) for one in results)


# ------------------------------------------------------------------------------------------ dropout


@pytest.mark.parametrize("columns", [1, 8, 13, 64, 1023, 1024, 1100])
@pytest.mark.parametrize(
    "seed", [0, 5, -1, 2**63 - 1, (9, 7, 24), (3, 2**31, 8 * 2**31), (4, 2**31 - 4, 8)]
)
def test_masks_are_the_reference_mask(isa, columns, seed):
    seed, rows = torch.tensor(seed), 9
    for p in (0.1, 0.5):
        at = 0 if seed.numel() == 1 else seed[1:].tolist()
        expected = dropout.keep_mask(seed[:1].clone() if at else seed, 0, rows, columns, p)
        if at:
            expected = mask_at(int(seed[0]), *at, rows, columns, p)
        out = torch.empty(rows, columns)
        threshold = dropout.threshold(p)
        low = torch.ones(rows, 1)
        OPS._expand_cpu(low, torch.ones(1, columns), None, 1.0, threshold, seed, False, isa, out)
        assert torch.equal(out != 0, expected)
        gradient = torch.empty(rows, columns)
        OPS._shrink_cpu(
            torch.ones(rows, columns), None, torch.eye(rows), 1.0, 1.0, threshold, seed, isa,
            None, gradient,
        )  # fmt: skip
        assert torch.equal(gradient != 0, expected)
        dropped = torch.full((columns, rows), torch.nan).t()
        OPS._drop_cpu(torch.ones(columns, rows).t(), 2.0, threshold, seed, isa, dropped)
        assert torch.equal(dropped, 2.0 * expected)


@pytest.mark.parametrize("seed", [(6,), (6, 2**31 - 35_000, 8)], ids=("whole", "part"))
def test_masks_of_as_many_rows_as_a_batch_has(isa, seed):
    seed, (rows, columns), p = torch.tensor(seed), (70_000, 8), 0.5
    expected = dropout.keep_mask(seed, 0, rows, columns, p)
    ones, eye, threshold = torch.ones(rows, columns), torch.eye(columns), dropout.threshold(p)
    out, shrunk = torch.empty(rows, columns), torch.empty(rows, columns)
    OPS._expand_cpu(ones, eye, None, 1.0, threshold, seed, False, isa, out)
    OPS._shrink_cpu(ones, eye, None, 1.0, 1.0, threshold, seed, isa, shrunk, None)
    assert torch.equal(out, expected.float())
    assert torch.equal(shrunk, expected.float())


def mask_at(seed, row, column, rows, columns, p):
    words = [
        [oracle.half_word(seed, row + m, column + k) for k in range(columns)] for m in range(rows)
    ]
    return torch.tensor(words) >= dropout.threshold(p)


# ------------------------------------------------------------------------------ what they refuse


def call(op, defaults, changes):
    """Shapes stand for tensors of ones."""
    given = {
        name: torch.ones(value) if isinstance(value, tuple) else value
        for name, value in (defaults | changes).items()
    }
    op(*given.values())


def shrink(**changes):
    defaults = {
        "rows": (4, 6), "matrix": (2, 6), "low": (4, 2), "scale": 1.0, "gradient_scale": 1.0,
        "threshold": 0, "seed": None, "isa": 0, "shrunk": (4, 2), "gradient": (2, 6),
    }  # fmt: skip
    call(OPS._shrink_cpu, defaults, changes)


def expand(**changes):
    defaults = {
        "low": (4, 2), "matrix": (2, 6), "bias": None, "scale": 1.0, "threshold": 0, "seed": None,
        "accumulate": False, "isa": 0, "out": (4, 6),
    }  # fmt: skip
    call(OPS._expand_cpu, defaults, changes)


THREE = torch.tensor([1, 2, 4])


@pytest.mark.parametrize(
    ("op", "change", "words"),
    [
        (shrink, {"rows": (4, 6, 1)}, "rows: must have 2 dimensions"),
        (shrink, {"matrix": (2, 7)}, "matrix: must be [2, 6]"),
        (shrink, {"low": (5, 2)}, "low: must be [4, 2]"),
        (shrink, {"low": torch.ones(4, 2).double()}, "low: must be float32, bfloat16 or float16"),
        (shrink, {"matrix": torch.ones(2, 6).half()}, "matrix: must have the dtype of the rows"),
        (shrink, {"matrix": None}, "matrix and shrunk go together"),
        (shrink, {"gradient": None}, "low and gradient go together"),
        (shrink, {"shrunk": torch.ones(1, 2).expand(4, 2)}, "shrunk: its elements overlap"),
        (shrink, {"gradient": torch.ones(2, 6).int()}, "gradient: must be float32"),
        (shrink, {"rows": torch.ones(4, 6, device="meta")}, "rows: must be a CPU tensor"),
        (shrink, {"isa": 9}, "isa: got 9"),
        (shrink, {"isa": -1}, "isa: got -1"),
        (shrink, {"threshold": 65536}, "threshold: must be in [0, 65536)"),
        (shrink, {"seed": torch.ones(2, dtype=torch.int64)}, "seed: must be a contiguous int64"),
        (shrink, {"seed": torch.ones(1)}, "seed: must be a contiguous int64"),
        (shrink, {"seed": THREE}, "seed: its column must be a multiple of 8, got 4"),
        (shrink, {"seed": THREE - 8}, "rows: with dropout they end at 2^32"),
        (expand, {"low": (4, 3)}, "matrix: must be [3, 6]"),
        (expand, {"out": (4, 7)}, "out: must be [4, 6]"),
        (expand, {"out": torch.ones(6, 4).t()}, "out: the columns must be contiguous"),
        (expand, {"out": torch.ones(6).expand(4, 6)}, "out: its elements overlap"),
        (expand, {"out": torch.ones(4, 6).double()}, "out: must be float32, bfloat16 or float16"),
        (expand, {"low": torch.ones(4, 2).half()}, "low: must have the dtype of the rows"),
        (expand, {"bias": torch.ones(5)}, "bias: must have 6 elements, got 5"),
        (expand, {"bias": torch.ones(6).long()}, "bias: must be float32"),
        (expand, {"low": (4, 0), "matrix": (0, 6)}, "rank and columns: must be at least 1"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused_before_memory_is_touched(op, change, words):
    with pytest.raises(RuntimeError) as caught:
        op(**change)
    assert words in str(caught.value)


def test_other_dtypes_fall_back_or_raise_when_forced(entering):
    case = oracle.Case(70, 20, 24, 3, torch.float64)
    tensors, _ = oracle.make(case)
    t = {name: value.detach() for name, value in tensors.items()}
    y = lora_linear(**t, scaling=2.0)
    base, low = Dense(t["weight"], t["bias"]), Branch(t["lora_a"], t["lora_b"], 2.0, 0.0, None)
    assert torch.equal(y, reference.forward(base, t["x"], low, False)[0])
    entering(use_backend("native"))
    with pytest.raises(RuntimeError, match=r"use_backend.'native'.*torch\.float64"):
        lora_linear(**t, scaling=2.0)
    with pytest.raises(RuntimeError, match="no kernels for cuda tensors"):
        backends.choose("cuda")
