"""lora_linear and lora_add as users call them: ranks, defaults, autocast, and every bad input."""

import os
import pathlib
import re
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F

import lora_kernels
from lora_kernels import lora_add, lora_add_, lora_linear
from lora_kernels._namespace import ops, qualified
from lora_kernels.backends.blocked import is_wide

K, N, R = 10, 6, 3


def inputs(leading=(4,), dtype=torch.float32, grad=False):
    shapes = {
        "x": (*leading, K),
        "weight": (N, K),
        "lora_a": (R, K),
        "lora_b": (N, R),
        "bias": (N,),
    }
    shapes["base_out"] = (*leading, N)
    return {n: torch.randn(s).to(dtype).requires_grad_(grad) for n, s in shapes.items()}


def pick(t, op, **changes):
    """The arguments of one of the functions."""
    skip = ("base_out",) if op is lora_linear else ("weight", "bias")
    return {**{n: v for n, v in t.items() if n not in skip}, **changes}


BOTH = pytest.mark.parametrize("op", [lora_linear, lora_add])


@BOTH
@pytest.mark.parametrize("leading", [(), (4,), (2, 3), (2, 1, 3), (0,), (2, 0, 3)])
def test_inputs_of_any_rank(op, leading):
    t = inputs(leading, torch.float64, grad=True)
    base = t["base_out"] if op is lora_add else F.linear(t["x"], t["weight"], t["bias"])
    expected = base + 1.5 * (t["x"] @ t["lora_a"].T @ t["lora_b"].T)
    y = op(**pick(t, op), scaling=1.5)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    leaves = list(pick(t, op).values())
    for got, exact in zip(
        torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, leaves, dy), strict=True
    ):
        torch.testing.assert_close(got, exact)


@BOTH
def test_leading_dimensions_that_do_not_collapse(op):
    t = inputs((4, 5))
    strided = {n: torch.randn(5, 4, t[n].shape[-1]).transpose(0, 1) for n in ("x", "base_out")}
    y = op(**pick(t, op, **pick(strided, op)))
    dense = {n: v.contiguous() for n, v in strided.items()}
    assert torch.equal(y, op(**pick(t, op, **pick(dense, op))))


def test_defaults():
    t = inputs()
    w, a, b, x = (t[n] for n in ("weight", "lora_a", "lora_b", "x"))
    torch.testing.assert_close(lora_linear(x, w, a, b), x @ (w + b @ a).T)
    torch.testing.assert_close(lora_add(t["base_out"], x, a, b), t["base_out"] + x @ (b @ a).T)
    assert torch.equal(lora_linear(x, w, a, b, seed=7), lora_linear(x, w, a, b))
    assert torch.equal(lora_linear(x, w, a, b, scaling=2), lora_linear(x, w, a, b, scaling=2.0))


@BOTH
@pytest.mark.parametrize("seed", [0, 5, -3, 2**63 - 1, -(2**63)])
def test_seed_as_int_and_as_tensor(op, seed):
    t = inputs()
    y = op(**pick(t, op), dropout_p=0.5, seed=seed)
    for tensor in (torch.tensor(seed), torch.tensor([seed])):
        assert torch.equal(y, op(**pick(t, op), dropout_p=0.5, seed=tensor))
    assert not torch.equal(y, op(**pick(t, op), dropout_p=0.5, seed=seed ^ 1))


@BOTH
@pytest.mark.parametrize("rows", [7, 300])  # few, and many, for weights of both dtypes
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_autocast(op, p, rows):
    """Equal to casting by hand; gradients arrive in the parameters' dtype."""
    t = inputs((rows,), grad=True)
    args = {"scaling": 2.0, "dropout_p": p, "seed": 3}
    with torch.autocast("cpu", torch.bfloat16):
        y = op(**pick(t, op), **args)
    assert y.dtype == torch.bfloat16
    cast = {n: v.detach().bfloat16().requires_grad_() for n, v in t.items()}
    expected = op(**pick(cast, op), **args)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    y.backward(dy)
    expected.backward(dy)
    for name, value in pick(t, op).items():
        assert value.grad.dtype == torch.float32
        # Gradients of fp32 parameters may skip the last rounding to bf16.
        torch.testing.assert_close(value.grad.bfloat16(), cast[name].grad, rtol=2**-7, atol=1e-6)


def test_autocast_saves_nothing_weight_sized():
    t, saved = inputs((2,)), []
    for name in ("x", "lora_a", "lora_b"):
        t[name].requires_grad_()
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda v: saved.append(v) or v, lambda v: v)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        lora_linear(**pick(t, lora_linear))
    own = {v.data_ptr() for v in t.values()}
    assert t["weight"].data_ptr() in {v.data_ptr() for v in saved}
    assert max(v.numel() for v in saved if v.data_ptr() not in own) <= t["x"].numel() < N * K


@BOTH
def test_autocast_around_fp64_and_half_adapters(op):
    t = inputs(dtype=torch.float64)
    plain = op(**pick(t, op))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(op(**pick(t, op)), plain)
        t = inputs()
        half = {n: t[n].half() for n in ("lora_a", "lora_b")}
        assert op(**pick(t, op, **half)).dtype == torch.bfloat16


def test_calls_inside_autocast_are_not_cast_again():
    t = inputs((33,), torch.float16)
    with torch.autocast("cpu", torch.float16):
        inside = lora_linear(**pick(t, lora_linear))
        with torch.autocast("cpu", enabled=False):
            outside = lora_linear(**pick(t, lora_linear))
        nested = lora_add(inside, t["x"], t["lora_a"], t["lora_b"])
    assert inside.dtype == nested.dtype == torch.float16
    assert torch.equal(inside, outside)
    with torch.autocast("cpu", torch.bfloat16):
        raw = ops.lora_linear(
            *(t[n] for n in ("x", "weight", "lora_a", "lora_b", "bias")),
            *(1.0, 0.0, None, False),
        )[0]
    assert torch.equal(raw, inside)


class Int8Linear(torch.nn.Module):
    """A foreign base: int8 weight with a scale per row."""

    def __init__(self, weight):
        super().__init__()
        self.scale = weight.abs().amax(1, keepdim=True) / 127
        self.q = (weight / self.scale).round().to(torch.int8)

    def forward(self, x):
        return F.linear(x, self.q.to(x.dtype) * self.scale)


def test_a_quantised_base_trains_and_infers():
    torch.manual_seed(0)
    base, x = Int8Linear(torch.randn(N, K)), torch.randn(64, K)
    target = x @ torch.randn(K, N)
    a, b = torch.randn(N, K).mul(0.3).requires_grad_(), torch.zeros(N, N, requires_grad=True)
    optimizer = torch.optim.Adam([a, b], lr=0.02)
    losses = []
    for _ in range(300):
        loss = F.mse_loss(lora_add(base(x), x, a, b, scaling=2.0), target)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 1e-2 * losses[0]
    with torch.no_grad():
        out = base(x)
        assert lora_add_(out, x, a, b, scaling=2.0) is out
        torch.testing.assert_close(out, base(x) + 2.0 * x @ a.T @ b.T)


@pytest.mark.parametrize("name", ["base_out", "x", "lora_a", "lora_b"])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_in_place_in_grad_mode_raises(name, p):
    t = inputs()
    t[name].requires_grad_()
    with pytest.raises(RuntimeError, match=r"lora_add_.*no_grad.*lora_add"):
        lora_add_(**pick(t, lora_add), dropout_p=p)
    with torch.no_grad():
        lora_add_(**pick(t, lora_add), dropout_p=p)


def test_in_place_on_what_cannot_be_viewed_raises():
    t = inputs((4, 5))
    t["base_out"] = torch.randn(5, 4, N).transpose(0, 1)
    with pytest.raises(ValueError, match=r"base_out: .*view as one.*strides \(6, 24, 1\)"):
        lora_add_(**pick(t, lora_add))


def z(*shape, **kwargs):
    return torch.zeros(*shape, **kwargs)


# (argument, what is passed, exception, words of the message: what is legal, what it got)
BAD = [
    ("x", z(4, 9), ValueError, "lora_a", "K = 9", "(3, 10)"),
    ("x", z(()), ValueError, "x", "K >= 1", "got ()"),
    ("x", z(4, 0), ValueError, "x", "K >= 1", "(4, 0)"),
    ("x", [1.0], TypeError, "x", "Tensor", "got list"),
    ("x", z(4, K, dtype=torch.int64), TypeError, "x", "bfloat16", "torch.int64"),
    ("x", z(4, K, dtype=torch.complex64), TypeError, "x", "float32", "torch.complex64"),
    ("x", z(4, K, device="meta"), ValueError, "@", "device meta", "got cpu"),
    ("x", z(4, K, dtype=torch.float64), TypeError, "@", "torch.float64", "got torch.float32"),
    ("lora_a", None, TypeError, "lora_a", "Tensor", "got NoneType"),
    ("lora_a", z(R), ValueError, "lora_a", "[r, K]", "(3,)"),
    ("lora_a", z(0, K), ValueError, "lora_a", "r >= 1", "(0, 10)"),
    ("lora_a", z(R, K + 1), ValueError, "lora_a", "K = 10", "(3, 11)"),
    ("lora_a", z(R, K, dtype=torch.int32), TypeError, "lora_a", "or float32", "torch.int32"),
    ("lora_a", z(R, K, dtype=torch.float16), TypeError, "lora_a", "or float32", "torch.float16"),
    ("lora_a", z(R, K, device="meta"), ValueError, "lora_a", "device cpu", "got meta"),
    ("lora_b", 1.0, TypeError, "lora_b", "Tensor", "got float"),
    ("lora_b", z(N, R + 1), ValueError, "lora_b", "r = 3", "(6, 4)"),
    ("lora_b", z(N), ValueError, "lora_b", "[N, r]", "(6,)"),
    ("lora_b", z(N + 1, R), ValueError, "@b", "6", "7"),
    ("lora_b", z(N, R, dtype=torch.float64), TypeError, "lora_b", "or float32", "torch.float64"),
    ("lora_b", z(N, R, device="meta"), ValueError, "lora_b", "device cpu", "got meta"),
    ("scaling", float("nan"), ValueError, "scaling", "finite", "got nan"),
    ("scaling", float("inf"), ValueError, "scaling", "finite", "got inf"),
    ("scaling", -float("inf"), ValueError, "scaling", "finite", "got -inf"),
    ("scaling", 10**400, ValueError, "scaling", "finite", "got 1000"),
    ("scaling", "2", TypeError, "scaling", "float", "got str"),
    ("scaling", True, TypeError, "scaling", "float", "got bool"),
    ("scaling", z(2), ValueError, "scaling", "one element", "got (2,)"),
    ("scaling", z((), dtype=torch.int64), TypeError, "scaling", "floating", "torch.int64"),
    ("scaling", z((), device="meta"), ValueError, "scaling", "device cpu", "got meta"),
    ("scaling", z((), requires_grad=True), ValueError, "scaling", "requires_grad", "detach"),
    ("dropout_p", 1.0, ValueError, "dropout_p", "[0, 1)", "got 1.0"),
    ("dropout_p", -0.1, ValueError, "dropout_p", "[0, 1)", "got -0.1"),
    ("dropout_p", float("nan"), ValueError, "dropout_p", "[0, 1)", "got nan"),
    ("dropout_p", None, TypeError, "dropout_p", "float", "got NoneType"),
    ("seed", 1.5, TypeError, "seed", "int", "got float"),
    ("seed", True, TypeError, "seed", "int", "got bool"),
    ("seed", 2**63, ValueError, "seed", "64-bit", "9223372036854775808"),
    ("seed", z(2, dtype=torch.int64), ValueError, "seed", "one element", "(2,)"),
    ("seed", z(1, dtype=torch.int32), ValueError, "seed", "int64", "torch.int32"),
    ("seed", z(1, dtype=torch.int64, device="meta"), ValueError, "seed", "device cpu", "got meta"),
]
BAD_BASE = [
    (lora_linear, "weight", None, TypeError, "weight", "Tensor", "got NoneType"),
    (lora_linear, "weight", z(N, K - 1), ValueError, "weight", "K = 10", "(6, 9)"),
    (lora_linear, "weight", z(N), ValueError, "weight", "[N, K]", "(6,)"),
    (
        lora_linear,
        "weight",
        z(N, K, dtype=torch.int8),
        TypeError,
        "weight",
        "torch.float32",
        "int8",
    ),
    (lora_linear, "weight", z(N, K).half(), TypeError, "weight", "torch.float32", "torch.float16"),
    (lora_linear, "weight", z(N, K, device="meta"), ValueError, "weight", "device cpu", "got meta"),
    (lora_linear, "bias", 0, TypeError, "bias", "Tensor", "got int"),
    (lora_linear, "bias", z(N + 1), ValueError, "bias", "[6]", "(7,)"),
    (lora_linear, "bias", z(1, N), ValueError, "bias", "[6]", "(1, 6)"),
    (lora_linear, "bias", z(N).bfloat16(), TypeError, "bias", "torch.float32", "torch.bfloat16"),
    (lora_linear, "bias", z(N, device="meta"), ValueError, "bias", "device cpu", "got meta"),
]
for _op in (lora_add, lora_add_):
    BAD_BASE += [
        (_op, "base_out", None, TypeError, "base_out", "Tensor", "got NoneType"),
        (_op, "base_out", z(4, N + 1), ValueError, "base_out", "(4, 6)", "(4, 7)"),
        (_op, "base_out", z(2, 2, N), ValueError, "base_out", "(4, 6)", "(2, 2, 6)"),
        (_op, "base_out", z(4, N).half(), TypeError, "base_out", "torch.float32", "torch.float16"),
        (_op, "base_out", z(4, N, device="meta"), ValueError, "base_out", "device cpu", "got meta"),
    ]


@pytest.mark.parametrize(
    ("op", "argument", "value", "error", "named", "legal", "got"),
    [(op, *case) for case in BAD for op in (lora_linear, lora_add, lora_add_)] + BAD_BASE,
)
def test_bad_input(op, argument, value, error, named, legal, got):
    t = pick(inputs(), op, **{argument: value})
    base = "weight" if op is lora_linear else "base_out"
    named = {"@": base, "@b": "lora_b" if op is lora_linear else "base_out"}.get(named, named)
    if argument == "seed":
        t["dropout_p"] = 0.5
    with pytest.raises(error) as caught:
        op(**t)
    message = str(caught.value)
    assert message.startswith(f"{named}: expected")
    assert legal in message
    assert got in message


@BOTH
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("scaling", [2.0, -0.3, 0.0, 1e-4, 1e3])
@pytest.mark.parametrize(
    ("dtype", "adapter"),
    [
        (torch.float32, None),
        (torch.float64, None),
        (torch.bfloat16, None),
        (torch.bfloat16, torch.float32),
        (torch.float16, None),
        (torch.float16, torch.float32),
    ],
)
def test_a_tensor_s_scaling_is_as_accurate_as_a_number_s(op, p, scaling, dtype, adapter):
    def of_tensor(**arguments):
        arguments["scaling"] = torch.tensor(arguments["scaling"], dtype=torch.float64)
        return op(**arguments)

    add = op is lora_add
    oracle.assert_accurate(oracle.Case(33, 24, 20, 4, dtype, adapter, True, scaling, p, add=add),
                           of_tensor)  # fmt: skip


@BOTH
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float64])
def test_tensors_of_one_element_and_scalars_of_numpy_are_numbers(op, kind):
    t = inputs()
    expected = op(**pick(t, op), scaling=1.5, dropout_p=0.25, seed=3)
    for scaling in (torch.tensor(1.5, dtype=kind), torch.tensor([1.5], dtype=kind)):
        y = op(**pick(t, op), scaling=scaling, dropout_p=0.25, seed=3)
        assert y.dtype == torch.float32
        torch.testing.assert_close(y, expected)
    for number in (np.float16, np.float32, np.float64):
        y = op(**pick(t, op), scaling=number(1.5), dropout_p=number(0.25), seed=np.int64(3))
        assert torch.equal(y, expected)


def test_a_tensor_s_scaling_rounds_db_as_the_sums_are():
    """Once where they are formed in fp32; where a CPU multiplies 16 bits fast they are rounded
    before they are scaled, and again after."""
    x, weight, a, b, dy = (
        torch.randn(n).bfloat16() for n in ((9, 8), (64, 8), (4, 8), (64, 4), (9, 64))
    )
    b.requires_grad_()
    lora_linear(x, weight, a, b, scaling=torch.tensor(1.1)).backward(dy)
    s = (x @ a.t()).double()
    total, scaling = dy.double().t() @ s, float(torch.tensor(1.1))
    exact = scaling * total
    rounded = exact if is_wide(x) else scaling * total.bfloat16().double()
    right = (rounded.bfloat16().double() - exact).norm()
    assert (b.grad.double() - exact).norm() <= 1.02 * right


def test_a_tensor_s_scaling_in_place_under_autocast_and_on_meta():
    t, scaling = inputs(), torch.tensor(1.5)
    out = t["base_out"].clone()
    lora_add_(**pick(t, lora_add, base_out=out), scaling=scaling)
    torch.testing.assert_close(out, lora_add(**pick(t, lora_add), scaling=1.5))
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (lora_linear(**pick(t, lora_linear), scaling=s) for s in (scaling, 1.5))
    assert ours.dtype == torch.bfloat16
    assert (ours - theirs).norm() <= 2**-7 * theirs.norm()
    meta = {n: v.to("meta") for n, v in t.items()}
    assert lora_linear(**pick(meta, lora_linear), scaling=scaling.to("meta")).is_meta


@BOTH
def test_a_scaling_that_trains_is_refused_where_its_gradient_would_be_lost(op):
    t, scaling = inputs(grad=True), torch.tensor(1.5, requires_grad=True)
    with torch.no_grad():
        assert torch.equal(op(**pick(t, op), scaling=scaling), op(**pick(t, op), scaling=scaling))
    with pytest.raises(ValueError, match=r"scaling: .*detach"):
        torch.func.grad(lambda s: op(**pick(t, op), scaling=s).sum())(scaling.detach())
    op(**pick(t, op), scaling=scaling.detach()).sum().backward()


def test_transforms_with_a_tensor_s_scaling():
    t = pick(inputs((5,)), lora_linear)
    each = torch.tensor([0.5, 2.0, -1.0])
    ours = torch.func.vmap(lambda s: lora_linear(**t, scaling=s))(each)
    for y, scaling in zip(ours, each.tolist(), strict=True):
        torch.testing.assert_close(y, lora_linear(**t, scaling=scaling))

    def loss(b, scaling):
        return lora_linear(**{**t, "lora_b": b}, scaling=scaling).square().sum()

    gradient = torch.func.grad(loss)
    torch.testing.assert_close(gradient(t["lora_b"], each[1]), gradient(t["lora_b"], 2.0))


@pytest.mark.parametrize(
    ("argument", "value"),
    [("weight", torch.int8), ("lora_a", torch.float64), ("bias", torch.float64)],
)
def test_bad_dtypes_under_autocast(argument, value):
    t = pick(inputs(), lora_linear)
    t[argument] = t[argument].to(value)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError) as caught:
        lora_linear(**t)
    assert re.match(rf"{argument}: expected x's dtype torch.bfloat16.*{value}", str(caught.value))


def test_autocast_base_out_in_another_dtype():
    t = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        assert lora_add(**pick(t, lora_add)).dtype == torch.bfloat16
        with pytest.raises(TypeError, match=r"base_out: .*torch.bfloat16, got torch.float32"):
            lora_add_(**pick(t, lora_add))


def test_meta_tensors_give_shapes():
    t = {n: v.to("meta") for n, v in inputs((2, 3)).items()}
    for op in (lora_linear, lora_add):
        y = op(**pick(t, op), dropout_p=0.1, seed=1)
        assert y.is_meta
        assert y.shape == (2, 3, N)


def run_with_backend(name):
    code = """import torch, lora_kernels
y = lora_kernels.lora_linear(torch.ones(2, 3), torch.ones(4, 3), torch.ones(1, 3), torch.ones(4, 1))
print(y.sum().item())"""
    root = str(pathlib.Path(lora_kernels.__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": root, "LORA_KERNELS_BACKEND": name}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)


LACKING = ("cpu", "CUDA") if find_spec("triton") else ("triton does not import",)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cutlass", ("ValueError", "LORA_KERNELS_BACKEND", "'cutlass'", "reference", "triton")),
        ("triton", ("RuntimeError", "LORA_KERNELS_BACKEND=triton", *LACKING)),
    ],
)
def test_a_backend_that_cannot_serve_raises(name, words):
    result = run_with_backend(name)
    assert result.returncode != 0
    assert all(word in result.stderr for word in words), result.stderr


def test_reference_can_be_forced():
    result = run_with_backend(" Reference ")
    assert result.stdout.strip() == "48.0", result.stderr


@BOTH
def test_fp32_masters_are_rounded_to_x_at_use(op):
    case = oracle.Case(9, 8, 7, 2, torch.bfloat16, torch.float32, add=op is lora_add)
    t, _ = oracle.make(case)
    rounded = {n: t[n].bfloat16() for n in ("lora_a", "lora_b")}
    assert torch.equal(op(**t), op(**{**t, **rounded}))


LAYOUTS = {
    "sparse": lambda t: t.to_sparse(),
    "mkldnn": lambda t: t.to_mkldnn(),
    "nested": lambda t: torch.nested.nested_tensor([t]),
    "jagged": lambda t: torch.nested.nested_tensor([t[..., None]], layout=torch.jagged),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [(2,), (2, 130)])
def test_other_layouts_are_refused_by_name(layout, rows):
    shapes = {
        "weight": (5, 8),
        "lora_a": (3, 8),
        "lora_b": (5, 3),
        "bias": (5,),
        "base_out": (*rows, 5),
    }
    given = {"x": torch.ones(*rows, 8)} | {k: torch.ones(v) for k, v in shapes.items()}
    linear = ("x", "weight", "lora_a", "lora_b", "bias")
    add = ("base_out", "x", "lora_a", "lora_b")
    for op, names in ((lora_linear, linear), (lora_add, add), (lora_add_, add)):
        for name in names:
            wrong = given | {name: LAYOUTS[layout](given[name])}
            with pytest.raises(ValueError, match=f"^{name}: expected a dense tensor, got"):
                op(*(wrong[key] for key in names))


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_jagged_x(p):
    """As its rows one after the other, gradients too."""
    lengths = (3, 0, 4)
    parts = [torch.randn(n, 8) for n in lengths]
    weight, bias = torch.randn(5, 8), torch.randn(5)
    a, b = torch.randn(3, 8, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    results = []
    for x in (torch.nested.nested_tensor(parts, layout=torch.jagged), torch.cat(parts)):
        x.requires_grad_()
        y = lora_linear(x, weight, a, b, bias, scaling=2.0, dropout_p=p, seed=3)
        if x.is_nested:
            assert [len(part) for part in y.unbind()] == list(lengths)
            assert (y + F.linear(x, weight)).shape == y.shape  # the same ragged dimension
        values = y.values() if x.is_nested else y
        dx, da, db = torch.autograd.grad(values.square().sum(), (x, a, b))
        results.append((values, dx.values() if x.is_nested else dx, da, db))
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("rows", [1, 64, 200])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_memory_that_is_written_and_met_again_is_refused(rows, p):
    a, b = torch.ones(4, 16), torch.ones(16, 4)
    memory = torch.zeros(rows * 40 + 16)
    apart = memory.as_strided((rows, 16), (40, 1))
    beside = memory.as_strided((rows, 16), (40, 1), 16)
    overlapping = memory.as_strided((rows, 16), (8, 1) if rows > 1 else (1, 0))
    options = {"dropout_p": p, "seed": 3}
    with torch.no_grad():
        for base_out, x, words in (
            (overlapping, torch.ones(rows, 16), "elements apart in memory"),
            (apart, apart, "memory apart from x's"),
            (apart, memory.as_strided((rows, 16), (40, 1), 8), "memory apart from x's"),
        ):
            with pytest.raises(ValueError, match=f"^base_out: expected {words}"):
                lora_add_(base_out, x, a, b, **options)
            assert not memory.any()
        x = torch.ones(1, 16).expand(rows, 16)
        expected = lora_add(apart, x, a, b, **options)
        assert torch.equal(lora_add_(apart, x, a, b, **options), expected)
        expected = lora_add(beside, apart, a, b, **options)
        assert torch.equal(lora_add_(beside, apart, a, b, **options), expected)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace")
@pytest.mark.parametrize("trains", [False, True])
def test_a_trace_serves_other_batches(trains):
    a, b = torch.randn(3, 8), torch.randn(5, 3)
    weight, bias = torch.randn(5, 8), torch.randn(5)
    a.requires_grad_(trains)

    def model(x, a):
        y = lora_linear(x, weight, a, b, bias, scaling=2.0)
        y = lora_add(y, x, a, b, scaling=0.5)
        return y if trains else lora_add_(y, x, a, b)

    traced = torch.jit.trace(model, (torch.randn(2, 3, 8), a))
    assert qualified("") not in str(traced.graph)
    x = torch.randn(4, 7, 8)
    torch.testing.assert_close(traced(x, a), model(x, a))
    a = a.detach()
    with pytest.raises(ValueError, match="seed: expected None under"):
        torch.jit.trace(lambda x: lora_linear(x, weight, a, b, dropout_p=0.5, seed=1), x)
    dropping = torch.jit.trace(
        lambda x: lora_linear(x, weight, a, b, dropout_p=0.5), x, check_trace=False
    )
    assert not torch.equal(dropping(x), dropping(x))


@pytest.mark.parametrize("rows", [1, 3, 700])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_wider_weight_is_for_autocast_alone(rows, dtype):
    """Few rows too, whose kernel could read it."""
    x, weight = torch.randn(rows, 16).to(dtype), torch.randn(8, 16)
    a, b = torch.randn(2, 16), torch.randn(8, 2)
    with pytest.raises(TypeError, match="weight: expected x's dtype"):
        lora_linear(x, weight, a, b)
    with torch.autocast("cpu", dtype):
        assert lora_linear(x, weight, a, b).dtype == dtype
