"""The reference's values and gradients against fp64, bounded by what unfused torch itself loses."""

import math
from contextlib import contextmanager

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_kernels import lora_add, lora_linear
from lora_kernels._namespace import ops
from lora_kernels.backends import blocked, use_backend
from lora_kernels.backends.scaling import split

HALF = (torch.bfloat16, torch.float16)
SIZES = (1, 2, 3, 8, 17, 64, 127, 129)


@pytest.fixture(autouse=True)
def _reference(entering):
    """The other backends have such tests of their own."""
    entering(use_backend("reference"))


@contextmanager
def path(wide, block_bytes):
    """The wide or the plain path whatever this CPU can do, in blocks of a few rows and columns."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocked, "_multiplies", lambda dtype: not (wide and dtype in HALF))
        patch.setattr(blocked, "_CPU_BLOCK_BYTES", block_bytes)
        yield


@st.composite
def cases(draw, add):
    dtype = draw(st.sampled_from((torch.float32, *HALF, torch.float64)))
    return oracle.Case(
        *(draw(st.sampled_from(SIZES)) for _ in range(3)),
        r=draw(st.sampled_from((1, 2, 3, 8, 16, 64, 200, 256))),
        dtype=dtype,
        adapter_dtype=draw(st.sampled_from((None, torch.float32))) if dtype in HALF else None,
        bias=draw(st.booleans()),
        scaling=draw(st.sampled_from((2.0, 1.0, 1 / 3, -1.5))),
        p=draw(st.sampled_from((0.0, 0.0, 0.05, 0.5, 0.9))),
        layout=draw(st.sampled_from(oracle.LAYOUTS)),
        add=add,
        seed=draw(st.integers(0, 2**40)),
    )


@settings(max_examples=120)
@given(cases(add=False), st.booleans(), st.sampled_from((8192, 8 << 20)))
def test_lora_linear(case, wide, block_bytes):
    with path(wide, block_bytes):
        oracle.assert_accurate(case, lora_linear)


@settings(max_examples=80)
@given(cases(add=True), st.booleans(), st.sampled_from((8192, 8 << 20)))
def test_lora_add(case, wide, block_bytes):
    with path(wide, block_bytes):
        oracle.assert_accurate(case, lora_add)


@pytest.mark.parametrize("layout", oracle.LAYOUTS)
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("add", [False, True], ids=["linear", "add"])
@pytest.mark.parametrize("wide", [False, True], ids=["plain", "wide"])
def test_every_layout_in_bf16(layout, p, add, wide):
    case = oracle.Case(33, 127, 65, 5, torch.bfloat16, torch.float32, p=p, layout=layout, add=add)
    with path(wide, 4096):
        oracle.assert_accurate(case, lora_add if add else lora_linear)


@pytest.mark.parametrize("add", [False, True], ids=["linear", "add"])
@pytest.mark.parametrize("wide", [False, True], ids=["plain", "wide"])
def test_blocks_of_one_row_and_column(add, wide):
    case = oracle.Case(11, 13, 9, 4, torch.bfloat16, p=0.5, add=add)
    with path(wide, 1):
        oracle.assert_accurate(case, lora_add if add else lora_linear)


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("add", [False, True], ids=["linear", "add"])
@pytest.mark.parametrize("wide", [False, True], ids=["plain", "wide"])
def test_sums_over_many_blocks(add, wide, p):
    """79 blocks of 64 rows, with which masks pass row 4096."""
    case = oracle.Case(5000, 16, 16, 8, torch.bfloat16, p=p, add=add)
    with path(wide, 4 * 16 * 64):
        oracle.assert_accurate(case, lora_add if add else lora_linear)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("wide", [False, True], ids=["plain", "wide"])
def test_nothing_is_rounded_more_often_than_stored(wide, p, dtype):
    """s and ds once, scaling included; y once on top of the base product, in the wide path once."""
    case = oracle.Case(96, 64, 80, 8, dtype, scaling=2.7, p=p)
    (t, dy), seed = oracle.make(case), torch.tensor(case.seed)
    t = {name: v.detach() for name, v in t.items()}
    x, w, a, b, bias = (t[n].double() for n in ("x", "weight", "lora_a", "lora_b", "bias"))
    factor = oracle.keep_factor(case.seed, case.M, case.K, p) if p else 1.0
    low, branch = (t["lora_a"], t["lora_b"]), (2.7, p, seed)
    with path(wide, 8192):
        y, s = ops.lora_linear(t["x"], t["weight"], *low, t["bias"], *branch, True)
        eye = torch.eye(case.r, dtype=dtype)
        # With A = I the gradient of x is ds itself.
        ds, _, _ = ops.lora_add_backward(
            dy, t["x"][:, : case.r], eye, low[1], s, 2.7, 0.0, None, True, False, False
        )
    low, high = split(2.7, dtype)
    exact_s, exact_ds = low * (x * factor) @ a.T, 2.7 * dy.double() @ b
    base, term = x @ w.T + bias, high * exact_s.to(dtype).double() @ b.T
    base = base if wide else base.to(dtype).double()
    exact_y = x @ w.T + bias + high * exact_s @ b.T
    for got, exact, rounded in (
        (s, exact_s, exact_s.to(dtype)),
        (ds, exact_ds, exact_ds.to(dtype)),
        (y, exact_y, (base + term).to(dtype)),
    ):
        assert (got.double() - exact).norm() <= 1.02 * (rounded.double() - exact).norm()


@pytest.mark.parametrize("case", oracle.LARGE)
@pytest.mark.parametrize("wide", [False, True], ids=["plain", "wide"])
def test_large_values_in_fp16(wide, case):
    with path(wide, 8192):
        oracle.assert_fp16_range(case, lora_add if case.add else lora_linear)


GRID = [
    oracle.Case(M, K, N, r, scaling=scaling, p=p)
    for M, K, N, r, scaling in (
        (64, 96, 80, 8, 2.0),
        (33, 127, 129, 3, 0.3),
        (128, 64, 200, 16, 1.0),
        (48, 256, 64, 64, 2.0),
        (130, 129, 31, 200, 0.5),
        (1, 300, 300, 4, 2.0),
    )
    for p in (0.0, 0.1)
]
PATHS = {
    "fp32": (False, torch.float32, None),
    "bf16": (False, torch.bfloat16, None),
    "fp16": (False, torch.float16, None),
    "bf16-fp32-adapters": (False, torch.bfloat16, torch.float32),
    "wide-bf16": (True, torch.bfloat16, None),
    "wide-fp16": (True, torch.float16, None),
    "wide-bf16-fp32-adapters": (True, torch.bfloat16, torch.float32),
}


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("add", [False, True], ids=["linear", "add"])
def test_geometric_mean_of_the_error(name, add):
    wide, dtype, adapter_dtype = PATHS[name]
    op, logs = lora_add if add else lora_linear, {}
    with path(wide, 16384):
        for case in GRID:
            case = oracle.replace(case, dtype=dtype, adapter_dtype=adapter_dtype, add=add)
            for output, (ours, peer) in oracle.errors(case, op).items():
                # Both errors are 0 where the gradient is dy itself.
                if peer or ours:
                    logs.setdefault(output, []).append(math.log(ours / peer))
    means = {output: math.exp(sum(v) / len(v)) for output, v in logs.items()}
    assert {"y", "x", "lora_a", "lora_b"} <= means.keys()
    assert all(mean <= 1.02 for mean in means.values()), means
    if wide:
        assert means["y"] < 1, means
