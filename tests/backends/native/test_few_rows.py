"""A whole layer in one native call, and the way to it that passes the op over."""

import logging
from contextlib import contextmanager

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_native_safety import DTYPES, ISAS, SIZES, WRONG, Placed, misaligned
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lora_kernels import FusedLoRALinear, backends, lora_linear
from lora_kernels.backends import dropout, reference, use_backend
from lora_kernels.backends.native import choice, extension, few_rows
from lora_kernels.backends.scaling import split
from lora_kernels.branch import Branch, Dense, Need
from lora_kernels.nn.conv1d import FusedLoRAConv1D

pytestmark = pytest.mark.skipif(not extension.available(), reason=extension.status())
OPS = torch.ops.lora_kernels


# --------------------------------------------------------------------------------------- the kernel


@pytest.mark.parametrize("M", [16, 17, 24, 32, 33, 48])
@pytest.mark.parametrize("r", [1, 2, 4, 5])
def test_gradients_of_a_few_ranks_and_many_columns(M, r):
    """Sums of more terms than end in registers need memory, whatever the rank: on the stack there
    was less than they take."""
    N, K, isas = 6, 3000, extension.best_isa() + 1
    generator = torch.Generator().manual_seed(M)
    dy, x, s, weight, a, b = (
        torch.randn(shape, generator=generator)
        for shape in ((M, N), (M, K), (M, r), (N, K), (r, K), (N, r))
    )
    ds = dy @ b
    right = (dy @ weight + ds @ a, ds.t() @ x, dy.t() @ s)
    for isa in range(isas):
        found = OPS._linear_backward_cpu(
            dy, x, weight, a, b, s, 1.0, 1.0, 1.0, 0, None, isa, True, True, True
        )
        for one, other in zip(found, right, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("turned", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: extension.ISA_NAMES[isa])
def test_many_rows_some_at_a_time(isa, dtype, p, turned):
    """As the op by ATen's calls, mask included; into rows of a larger matrix, and added to them."""
    M, K, N, r = 700, 75, 41, 5
    torch.manual_seed(0)
    x, dy, bias = (torch.randn(*shape).to(dtype) for shape in ((M, K), (M, N), (N,)))
    weight = (torch.randn(K, N).t() if turned else torch.randn(N, K)).to(dtype) * K**-0.5
    a, b = torch.randn(r, K).to(dtype) * K**-0.5, torch.randn(N, r).to(dtype) * r**-0.5
    seed = torch.tensor(7) if p else None
    calls, branch = few_rows.FewRows(isa), Branch(a, b, 1.0, p, seed)
    wide = Branch(a.double(), b.double(), 1.0, p, seed)
    need = Need(True, False, True, True)
    base = Dense(weight.double(), bias.double())
    right, s = reference.forward(base, x.double(), wide, True)
    dx, _, d_a, d_b = reference.backward(
        base, dy.double(), x.double(), s.to(dtype).double(), wide, need
    )
    larger = torch.zeros(M + 2, K + N, dtype=dtype)
    y, kept = calls.forward(x, weight, bias, branch, True, larger[1:-1, :N])
    assert y.data_ptr() == larger[1].data_ptr()
    rows = few_rows.Rows(dy, x, s.to(dtype))
    given = calls.backward(weight, rows, branch, need, larger[1:-1, N:])
    found = (y.clone(), kept, *given)
    eps = torch.finfo(dtype).eps * (M**0.5 if dtype == torch.float32 else 1)  # sums are no wider
    for one, other in zip(found, (right, s, dx, d_a, d_b), strict=True):
        assert (one.double() - other).norm() <= 2 * eps * other.norm()
    assert not larger[0].any()
    assert not larger[-1].any()
    again = calls.backward(weight, rows, branch, need, larger[1:-1, N:], True)[0]
    assert (again.double() - 2 * dx).norm() <= 4 * eps * dx.norm()
    own = calls.backward(weight, rows, branch, need)[0]
    assert (own.double() - dx).norm() <= 2 * eps * dx.norm()
    wide = torch.zeros(M, K)  # a sum that is rounded once
    calls.backward(weight, rows, branch, need, wide)
    calls.backward(weight, rows, branch, need, wide, True)
    assert (wide.double() - 2 * dx).norm() <= 1e-5 * dx.norm()


@pytest.mark.parametrize("turned", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("M", [3, 30, 300])
@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: extension.ISA_NAMES[isa])
def test_a_frozen_layer(isa, M, turned):
    """Also with a bias, and of columns; in any dtype, without a bias into fp32."""
    for dtype in DTYPES:
        x, bias = torch.randn(M, 75).to(dtype), torch.randn(70).to(dtype)
        weight = (torch.randn(75, 70).t() if turned else torch.randn(70, 75)).to(dtype)
        for offset in (None, bias):
            right = F.linear(x.double(), weight.double(), None if offset is None else bias.double())
            given = x, weight, None, None, offset, 1.0, 1.0, 0, None, isa, None
            y, wide = OPS._linear_cpu(*given), torch.empty(M, 70)
            assert (y.double() - right).norm() <= torch.finfo(dtype).eps * 4 * right.norm()
            if offset is None or dtype == torch.float32:
                OPS._linear_cpu(*given, wide)
                assert (wide - right).norm() <= 1e-6 * right.norm()
            else:
                with pytest.raises(RuntimeError, match="into: must have the dtype of x"):
                    OPS._linear_cpu(*given, wide)


@settings(max_examples=200)
@given(st.data())
def test_values(data):
    """y and s against fp64, in every layout that the kernel reads."""
    draw = data.draw
    sizes = st.sampled_from((*SIZES, 33, 130, 300))
    M, K, N, r = (draw(sizes) for _ in range(4))
    dtype, isa = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(ISAS))
    low = draw(st.sampled_from((dtype, torch.float32)))
    p, seed = draw(st.sampled_from((0.0, 0.0, 0.4))), draw(st.integers(-(2**40), 2**40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**30)))
    layouts = st.sampled_from(("contiguous", "offset"))

    def tensor(*shape, dtype=dtype, std=1.0, layouts=layouts):
        values = (torch.randn(shape, generator=generator) * std).to(dtype)
        return Placed(values, draw(layouts)).view

    x = tensor(M, K, layouts=st.sampled_from(("contiguous", "offset", "expanded rows")))
    weight, bias = tensor(N, K, std=K**-0.5), tensor(1, N)[0]
    a, b = tensor(r, K, dtype=low, std=K**-0.5), tensor(N, r, dtype=low, std=r**-0.5)
    scaling = draw(st.sampled_from((0.5, -3.0)))
    scale, high = split(scaling, dtype)
    s = Placed(torch.zeros(M, r, dtype=dtype), draw(layouts))
    kept = oracle.keep_factor(seed, M, K, p).double()
    given_seed = torch.tensor([seed]) if p else None
    y = OPS._linear_cpu(
        x, weight, a, b, bias, scale / (1 - p), high, dropout.threshold(p), given_seed, isa, s.view
    )
    keep_scale = dropout.keep_scale(p) if p else 1.0
    branch = (x.double() * kept.ne(0)) @ a.to(dtype).double().T * (scale / (1 - p))
    assert keep_scale == pytest.approx(1 / (1 - p), rel=1e-3)
    terms = (x.double(), weight.double(), bias.double())
    exact = F.linear(*terms) + high * branch @ b.to(dtype).double().T
    eps = torch.finfo(dtype).eps
    sums = F.linear(*(t.abs() for t in terms)) + exact.abs()
    allowed = eps * exact.norm() + 2.0**-23 * sums.norm()
    assert (y.double() - exact).norm() <= allowed
    assert (s.view.double() - branch).norm() <= (eps + 2.0**-22) * branch.norm() + 1e-6
    s.assert_kept()
    plain = OPS._linear_cpu(x, weight, None, None, bias, 1.0, 1.0, 0, None, isa, None)
    assert (plain.double() - F.linear(*terms)).norm() <= allowed


@pytest.mark.parametrize(("rows", "columns", "units"), [(3, 5, 4), (40, 50, 16)])
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_of_long_rows_stay_exact(dtype, isa, rows, columns, units):
    """A sum over 4096 columns in a few fp32 numbers, as torch's, is off by 20 to 200 of its
    units."""
    K = 1 << 12
    x, w = torch.full((rows, K), 1 / 3, dtype=dtype), torch.full((columns, K), 1 / 3, dtype=dtype)
    exact = K * float(x[0, 0]) * float(w[0, 0])
    for weight, most in ((w, units), (w.t().contiguous().t(), 24)):
        unit = max(torch.finfo(dtype).eps, most * 2.0**-23)
        y = OPS._linear_cpu(x, weight, None, None, None, 1.0, 1.0, 0, None, isa, None)
        assert (y.double() / exact - 1).abs().max() <= unit


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 1), (20, 1), (26, 60)])
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("isa", ISAS)
def test_masters_are_rounded_at_use(dtype, isa, rows, columns):
    """A difference that is lost in the rounding of the fp32 operand, or else all that is left."""
    lost = 1 + torch.finfo(dtype).eps / 4
    ones, zero = torch.ones(rows, 1, dtype=dtype), torch.zeros(columns, 1, dtype=dtype)
    pair, signs = torch.tensor([[lost, 1.0]]), torch.tensor([[1.0, -1.0]])
    both, pairs = ones * signs.to(dtype), pair.repeat(columns, 1)
    options, nothing = (None, 1.0, 1.0, 0, None, isa), zero.repeat(1, 2)
    found = [
        OPS._linear_cpu(both, nothing, pair, torch.ones(columns, 1), *options, None),
        OPS._linear_cpu(ones, zero, signs.t(), pairs, *options, None),
        OPS._linear_cpu(both, pairs, None, None, *options, None),
        OPS._linear_cpu(both, pairs.t().contiguous().t(), None, None, *options, None),
    ]
    for dy, weight, a, b in (
        (ones, zero.t(), pairs.t().contiguous(), signs),
        (both, pairs.t().contiguous(), zero.t().float(), torch.zeros(2, 1)),
    ):
        found += OPS._linear_backward_cpu(
            dy, None, weight, a, b, None, 1.0, 1.0, 1.0, 0, None, isa, True, False, False
        )[:1]
    for out in found:
        assert (out == 0).all()


@pytest.mark.parametrize("isa", ISAS)
def test_rows_past_the_last_are_not_read(isa):
    """Of tiles that are not full (what is read beyond, AddressSanitizer says)."""
    x, w, y = torch.randn(26, 30), torch.randn(30, 30), torch.zeros(27, 30)
    OPS._linear_cpu(x, w, None, None, None, 1.0, 1.0, 0, None, isa, None, y[:26])
    torch.testing.assert_close(y[:26], x @ w.t())
    assert not y[26].any()


@pytest.mark.parametrize("rows", [7, 40])
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_the_threads(dtype, isa, rows):
    sizes = (rows, 300), (1027, 300), (19, 300), (1027, 19)
    x, w, a, b = (torch.randn(size).to(dtype) for size in sizes)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(OPS._linear_cpu(x, w, a, b, None, 2.0, 1.0, 0, None, isa, None))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, results[0]) for one in results)


@pytest.mark.parametrize("rows", [1, 2, 3, 6])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
def test_columns_of_a_large_weight(dtype, isa, rows):
    """Held by columns: of one or two rows the terms are shared out, of more the columns."""
    x, held = (torch.randn(s).to(dtype) for s in ((rows, 700), (700, 1100)))
    a, b, bias = (torch.randn(s).to(dtype) for s in ((8, 700), (1100, 8), (1100,)))
    y = OPS._linear_cpu(x, held.t(), a, b, bias, 0.5, 1.0, 0, None, isa, None)
    wide = [t.double() for t in (x, held, a, b, bias)]
    exact = wide[0] @ wide[1] + 0.5 * wide[0] @ wide[2].T @ wide[3].T + wide[4]
    eps = max(torch.finfo(dtype).eps, 2.0**-21)
    assert (y.double() - exact).norm() <= eps * exact.norm()


def rows_of(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "x",
    [
        rows_of(6),
        rows_of(1, 1, 6),
        rows_of(2, 3, 6),
        rows_of(2, 1, 3, 1, 6),
        rows_of(5, 4, 6)[:, -1:],
        rows_of(5, 4, 6)[:, 2],
        rows_of(4, 12)[:, 3:9],
        rows_of(1, 6).expand(4, 6),
        rows_of(0, 3, 6),
    ],
    ids=lambda x: f"{tuple(x.shape)} {x.stride()}",
)
def test_any_leading_dimensions(x):
    w, a, b = rows_of(5, 6), rows_of(2, 6), rows_of(5, 2)
    y = OPS._linear_cpu(x, w, a, b, None, 2.0, 1.0, 0, None, 0, None)
    assert y.shape == (*x.shape[:-1], 5)
    assert y.device == x.device
    assert y.is_contiguous()
    torch.testing.assert_close(y, F.linear(x, w) + 2 * F.linear(F.linear(x, a), b))


GIVEN = {
    "x": (4, 6), "weight": (5, 6), "lora_a": (2, 6), "lora_b": (5, 2), "bias": (5,), "scale": 1.0,
    "high": 1.0, "threshold": 9, "seed": torch.tensor([3]), "isa": 0, "s": (4, 2),
}  # fmt: skip


def call(**changes):
    given = {k: torch.ones(v) if isinstance(v, tuple) else v for k, v in (GIVEN | changes).items()}
    return OPS._linear_cpu(*given.values())


@pytest.mark.parametrize("words", WRONG)
@pytest.mark.parametrize("name", [k for k, v in GIVEN.items() if isinstance(v, tuple)])
def test_each_argument_is_checked_by_name(name, words):
    if name == "x" and words == "dimension":
        return  # any number of dimensions will do
    call()
    with pytest.raises(RuntimeError) as caught:
        call(**{name: WRONG[words](torch.ones(GIVEN[name]))})
    assert f"{name}: " in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.tensor(1.0)}, "x: must have a dimension"),
        ({"x": (4, 0)}, "x: must have columns"),
        ({"x": torch.ones(6, 4).t()}, "x: the columns must be contiguous"),
        ({"x": torch.ones(3, 2, 6).transpose(0, 1)}, "x: must view as one matrix"),
        ({"x": torch.ones((1,) * 16 + (6,)), "s": (1, 2)}, "x: must have at most 16 dimensions"),
        ({"weight": (5, 7)}, "weight: must be [5, 6], got [5, 7]"),
        ({"weight": (0, 6)}, "weight: must have rows"),
        ({"weight": torch.ones(10, 12)[::2, ::2]}, "weight: the rows or the columns must be"),
        ({"weight": torch.ones(5, 6).half()}, "weight: must have the dtype of the rows"),
        ({"lora_a": None}, "lora_a and lora_b go together"),
        ({"lora_a": None, "lora_b": None}, "s and seed: are of a branch"),
        ({"lora_a": (0, 6)}, "lora_a: must have rows"),
        ({"lora_a": (2, 7)}, "lora_a: must be [2, 6]"),
        ({"lora_b": (4, 2)}, "lora_b: must be [5, 2]"),
        ({"lora_b": torch.ones(2, 5).t()}, "lora_b: the columns must be contiguous"),
        ({"bias": (4,)}, "bias: must have 5 elements, got 4"),
        ({"bias": torch.ones(10)[::2]}, "bias: must be contiguous"),
        ({"s": (4, 3)}, "s: must be [4, 2]"),
        ({"s": torch.ones(2, 4).t()}, "s: the columns must be contiguous, got stride 4"),
        ({"s": torch.ones(2).expand(4, 2)}, "s: its elements overlap"),
        ({"isa": 9}, "isa: got 9"),
        ({"threshold": 65536}, "threshold: must be in [0, 65536)"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused_before_memory_is_touched(change, words):
    with pytest.raises(RuntimeError) as caught:
        call(**change)
    assert words in str(caught.value)


# ------------------------------------------------------------------------------- past the op


@pytest.fixture
def passed(monkeypatch):
    """The arguments of the calls, forward and backward, that went straight to the kernel."""
    calls, few = [], few_rows.of_this_machine()

    def spied(call):
        def spy(*args):
            results = call(*args)
            calls.append(args)
            return results

        return spy

    few.linear, few._backward = spied(few.linear), spied(few._backward)
    monkeypatch.setattr(backends, "_few_rows", lambda: few)
    return calls


needs_vectors = pytest.mark.skipif(max(ISAS) == 0, reason="plain C++ serves no call")


def layer_and_rows(**options):
    torch.manual_seed(0)
    options = {"alpha": 8, "init": "random"} | options
    return FusedLoRALinear.from_linear(nn.Linear(40, 24), 4, **options).eval(), torch.randn(
        2, 3, 40
    )


def expected_of(layer, x):
    """By the op, of the tensors that the layer computes with."""
    with use_backend("reference"), torch.no_grad():
        return layer(x)


@needs_vectors
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_layers_and_functions_infer_in_one_call(passed, context):
    layer, x = layer_and_rows()
    expected = expected_of(layer, x)
    assert not passed
    with context():
        torch.testing.assert_close(layer(x), expected)
        y = lora_linear(
            x, layer.weight, layer.lora_A, layer.lora_B, layer.bias, scaling=layer.scaling
        )
    torch.testing.assert_close(y, expected)
    assert len(passed) == 2


@contextmanager
def logged():
    logger = logging.getLogger("lora_kernels")
    level = logger.level
    logger.setLevel(logging.INFO)
    yield
    logger.setLevel(level)


class Seen(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class SeenBelow(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


WATCHED = {
    "a forced backend": lambda: use_backend("reference"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "the profiler": torch.profiler.profile,
    "a mode": Seen,
    "a mode below": SeenBelow,
    "forward mode": torch.autograd.forward_ad.dual_level,
    "the log": logged,
}


@pytest.mark.parametrize("watcher", WATCHED)
def test_who_watches_sees_the_op(passed, watcher):
    layer, x = layer_and_rows()
    expected = expected_of(layer, x)
    with torch.no_grad(), WATCHED[watcher]():
        y = layer(x)
        function = lora_linear(
            x, layer.weight, layer.lora_A, layer.lora_B, layer.bias, scaling=layer.scaling
        )
    assert not passed
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if watcher == "autocast" else {}
    for each in (y, function):
        torch.testing.assert_close(each.detach().to(expected.dtype), expected, **tolerance)


class Subclass(torch.Tensor):
    pass


@torch.no_grad()
def test_what_is_traced_compiled_or_no_plain_tensor(passed):
    layer, x = layer_and_rows()
    expected = expected_of(layer, x)
    flat = x.flatten(0, 1)
    assert type(layer(x.as_subclass(Subclass))) is Subclass
    torch.testing.assert_close(torch.func.vmap(layer)(flat), expected.flatten(0, 1))
    torch.testing.assert_close(torch.jit.trace(layer, x)(x), expected)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(layer, backend="eager", fullgraph=True)(x), expected)
    graph = torch.fx.symbolic_trace(layer)
    assert any(node.target is lora_linear for node in graph.graph.nodes)
    assert not [args for args in passed if type(args[0]) is not torch.Tensor]
    with torch.device("meta"):
        assert layer.to("meta")(torch.empty(2, 40)).shape == (2, 24)


@needs_vectors
@torch.no_grad()
def test_states_of_a_layer(passed):
    """Merged, switched off, started with PiSSA, in training: what acts, and nothing else."""
    layer, x = layer_and_rows()
    base, adapted = F.linear(x, layer.weight, layer.bias), expected_of(layer, x)
    layer._disabled = True
    torch.testing.assert_close(layer(x), base)
    layer._disabled = False
    layer.merge()
    torch.testing.assert_close(layer(x), adapted)
    assert len(passed) == 2
    layer._disabled = True
    torch.testing.assert_close(layer(x), base)
    layer._disabled = False
    layer.unmerge()
    layer.train().dropout = 0.5
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    layer.use_rslora = True
    torch.testing.assert_close(layer(x), expected_of(layer, x))
    layer.alpha = None
    torch.testing.assert_close(layer(x), expected_of(layer, x))
    layer, x = layer_and_rows(init="pissa")
    linear = nn.Linear(40, 24)
    with torch.no_grad():
        linear.weight.copy_(layer.weight + layer.scaling * layer.lora_B @ layer.lora_A)
        linear.bias.copy_(layer.bias)
    layer.lora_B.mul_(2)
    torch.testing.assert_close(layer(x), expected_of(layer, x))
    layer._disabled = True
    torch.testing.assert_close(layer(x), linear(x))


class Doubled(nn.Module):
    def forward(self, tensor):
        return 2 * tensor


class Twisted(FusedLoRALinear):
    def low_rank(self, lora_A, lora_B, **others):
        return 3 * lora_A, lora_B


@torch.no_grad()
@pytest.mark.parametrize("how", ["parametrized", "pruned", "weight norm", "twisted", "conv1d"])
def test_parameters_that_do_not_lie_as_they_act(passed, how):
    layer, x = layer_and_rows()
    if how == "parametrized":
        parametrize.register_parametrization(layer, "lora_A", Doubled())
    elif how == "pruned":
        prune.l1_unstructured(layer, "lora_B", 0.5)
    elif how == "weight norm":
        nn.utils.weight_norm(layer, "lora_A")
        layer.lora_A_g.mul_(2)
    elif how == "twisted":
        layer.__class__ = Twisted
    else:
        pytest.importorskip("transformers")
        from transformers.pytorch_utils import Conv1D

        layer = FusedLoRAConv1D.from_linear(Conv1D(24, 40), 4, alpha=8, init="random").eval()
    torch.testing.assert_close(layer(x), expected_of(layer, x))
    for args in passed:  # by `lora_linear`, with what acts
        assert args[2] is not layer._parameters.get("lora_A") or how in ("pruned", "conv1d")


@torch.no_grad()
def test_what_the_kernel_does_not_take_is_computed_or_refused_by_name(passed):
    layer, x = layer_and_rows()
    expected = expected_of(layer, x)
    torch.testing.assert_close(layer(x.transpose(0, 1)), expected.transpose(0, 1))
    torch.testing.assert_close(layer(misaligned(x).copy_(x)), expected)
    many = x.repeat(200, 1, 1)
    torch.testing.assert_close(layer(many), expected.repeat(200, 1, 1))
    assert [args[0].shape[:2] for args in passed] in (
        [], [(3, 2)], [(400, 3)], [(3, 2), (400, 3)],
    )  # fmt: skip
    torch.testing.assert_close(layer.double()(x.double()), expected.double(), rtol=1e-4, atol=1e-5)
    layer.float()
    with pytest.raises(ValueError, match=r"x|lora_a: expected shape"):
        layer(torch.randn(2, 41))
    with pytest.raises(TypeError, match="weight: expected x's dtype"):
        layer(x.half())
    args = (x, layer.weight, layer.lora_A, layer.lora_B, layer.bias)
    with pytest.raises(ValueError, match="scaling: expected a finite number"):
        lora_linear(*args, scaling=float("nan"))
    with pytest.raises(TypeError, match="x: expected a Tensor"):
        lora_linear(x.numpy(), *args[1:])
    for wrong in (1.5, float("nan"), -0.1):
        with pytest.raises(ValueError, match="dropout_p"):
            lora_linear(*args, dropout_p=wrong)
    with pytest.raises(TypeError, match="dropout_p"):
        lora_linear(*args, dropout_p="0.1")
    y = lora_linear(*args, scaling=torch.tensor(2.0))
    torch.testing.assert_close(y, expected)


BACKWARD = {
    "dy": (4, 5), "x": (4, 6), "weight": (5, 6), "lora_a": (2, 6), "lora_b": (5, 2), "s": (4, 2),
    "scaling": 1.0, "high": 1.0, "keep": 1.0, "threshold": 9, "seed": torch.tensor([3]), "isa": 0,
    "need_x": True, "need_a": True, "need_b": True,
}  # fmt: skip


def call_backward(**changes):
    given = {
        k: torch.ones(v) if isinstance(v, tuple) else v for k, v in (BACKWARD | changes).items()
    }
    return OPS._linear_backward_cpu(*given.values())


@pytest.mark.parametrize("words", WRONG)
@pytest.mark.parametrize("name", [k for k, v in BACKWARD.items() if isinstance(v, tuple)])
def test_each_argument_of_the_backward_is_checked_by_name(name, words):
    if name in ("dy", "x") and words == "dimension":
        return  # any number of dimensions will do
    call_backward()
    with pytest.raises(RuntimeError) as caught:
        call_backward(**{name: WRONG[words](torch.ones(BACKWARD[name]))})
    assert f"{name}: " in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dy": (0, 5)}, "dy, lora_a: must have rows and columns, got [0, 5], [2, 6]"),
        ({"dy": (4, 4)}, "weight: must be [4, 6]"),
        ({"x": (3, 6)}, "x: must be [4, 6] in the dtype of dy"),
        ({"x": torch.ones(4, 6).half()}, "x: must be [4, 6] in the dtype of dy"),
        ({"x": None}, "x: must be given for dA"),
        ({"s": None}, "s: must be given for dB"),
        ({"s": (4, 3)}, "s: must be [4, 2]"),
        ({"lora_b": (5, 3)}, "lora_b: must be [5, 2]"),
        ({"isa": -1}, "isa: got -1"),
    ],
)
def test_wrong_arguments_of_the_backward_are_refused(change, words):
    with pytest.raises(RuntimeError) as caught:
        call_backward(**change)
    assert words in str(caught.value)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", [1, 3, 9, 40])
@pytest.mark.parametrize("transposed", [False, True])
def test_bits_of_the_gradients_do_not_depend_on_the_threads(isa, rows, transposed):
    dy, x, w = (torch.randn(s).bfloat16() for s in ((rows, 300), (rows, 1030), (300, 1030)))
    w = w.t().contiguous().t() if transposed else w
    a, b, s = torch.randn(19, 1030), torch.randn(300, 19), torch.randn(rows, 19).bfloat16()
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(
                OPS._linear_backward_cpu(
                    dy, x, w, a, b, s, 2.0, 1.0, 1.1, 6000, torch.tensor(5), isa, True, True, True
                )
            )
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
    kept = oracle.keep_factor(5, rows, 1030, 6000 / 65536).ne(0).double()
    ds, factors = 2 * dy.double() @ b.bfloat16().double(), 1.1 * kept
    exact = (
        dy.double() @ w.double() + ds @ a.bfloat16().double() * factors,
        ds.T @ (x.double() * factors),
        dy.double().T @ s.double(),
    )
    for got, right, eps in zip(results[0], exact, (2.0**-8, 2.0**-22, 2.0**-22), strict=True):
        assert (got.double() - right).norm() <= eps * right.norm()


# ----------------------------------------------------------------------------------------- training


def gradients_of(layer, x, dy, wanted=("x", "lora_A", "lora_B")):
    """y and the gradients of these, by backward()."""
    x = x.detach().requires_grad_("x" in wanted)
    layer.lora_A.requires_grad_("lora_A" in wanted)
    layer.lora_B.requires_grad_("lora_B" in wanted)
    layer.zero_grad()
    torch.manual_seed(3)
    y = layer(x)
    y.backward(dy)
    return y.detach(), x.grad, layer.lora_A.grad, layer.lora_B.grad


@needs_vectors
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize(
    "wanted", [("x", "lora_A", "lora_B"), ("x",), ("lora_A",), ("lora_B",), ("x", "lora_B")]
)
def test_a_step_of_training_in_two_calls(passed, dtype, p, wanted):
    layer, x = layer_and_rows(dropout=p)
    layer.to(dtype).train()
    x, dy = x.to(dtype), torch.randn(2, 3, 24).to(dtype)
    ours = gradients_of(layer, x, dy, wanted)
    assert len(passed) == 2
    with use_backend("reference"):
        expected = gradients_of(layer, x, dy, wanted)
    tolerance = {} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 3e-2}
    for one, other in zip(ours, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, **tolerance)


@needs_vectors
def test_a_layer_of_transformers_trains_in_two_calls(passed):
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    layer = FusedLoRAConv1D.from_linear(Conv1D(24, 40), 4, alpha=8, init="random")
    x, dy = torch.randn(5, 40), torch.randn(5, 24)
    ours = gradients_of(layer, x, dy)
    assert len(passed) == 2
    with use_backend("reference"):
        expected = gradients_of(layer, x, dy)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other)


@needs_vectors
@pytest.mark.parametrize("watcher", ["the profiler", "a mode below", "autocast"])
def test_who_watches_a_backward_sees_the_op(passed, watcher):
    layer, x = layer_and_rows()
    dy = torch.randn(2, 3, 24)
    expected = gradients_of(layer, x, dy)
    passed.clear()
    x = x.requires_grad_()
    y = layer(x)
    layer.zero_grad()
    with WATCHED[watcher]():
        y.backward(dy)
    assert len(passed) == 1
    found = (x.grad, layer.lora_A.grad, layer.lora_B.grad)
    for one, other in zip(found, expected[1:], strict=True):
        torch.testing.assert_close(one, other)


@needs_vectors
def test_other_ways_to_ask_for_gradients(passed):
    layer, x = layer_and_rows()
    x.requires_grad_()
    parameters = [x, layer.lora_A, layer.lora_B]
    y = layer(x)
    (expected,) = torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)
    (of_sum,) = torch.autograd.grad(y.sum(), x, retain_graph=True)  # dy is expanded
    torch.testing.assert_close(of_sum, expected)
    (batched,) = torch.autograd.grad(
        y, x, torch.ones(2, *y.shape), is_grads_batched=True, retain_graph=True
    )
    torch.testing.assert_close(batched, expected.expand(2, *x.shape))
    (created,) = torch.autograd.grad(y, x, torch.ones_like(y), create_graph=True)
    torch.testing.assert_close(created, expected)
    with pytest.raises(NotImplementedError, match="double backward"):
        created.sum().backward()
    with torch.autograd.graph.save_on_cpu():
        saved = torch.autograd.grad(layer(x).sum(), parameters)
    torch.testing.assert_close(saved[0], expected)
    layer.lora_A.data.mul_(1)
    y = layer(x)
    with torch.no_grad():
        layer.lora_A.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_base_that_trains_goes_by_the_op(passed, name):
    layer, x = layer_and_rows()
    getattr(layer, name).requires_grad_()
    layer(x).sum().backward()
    assert not passed
    assert getattr(layer, name).grad.any()


def test_each_instruction_set_has_its_choices():
    assert list(choice.CHOICES) == list(extension.ISA_NAMES)
    for isa in range(len(extension.ISA_NAMES)):
        for dtype in DTYPES:
            few = choice.few(dtype, isa)
            assert min(few.forward, few.backward) > 0 or isa == 0
            assert few_rows.most_rows(dtype, isa) == few.forward
            assert few_rows.most_rows(dtype, isa, backward=True) == few.backward
    assert few_rows.most_rows(torch.float64, 1) == 0
    assert choice.rows(choice.ANY) == "any number of rows"
    assert choice.rows(7) == "up to 7 rows"


def test_what_was_measured_on_amds_is_not_said_of_others(monkeypatch):
    isa = extension.ISA_NAMES.index("AVX-512 BF16")
    found = []
    for amd in (True, False):
        monkeypatch.setattr(extension, "is_amd", lambda amd=amd: amd)
        found.append([few_rows.most_rows(dtype, isa) for dtype in DTYPES])
        assert choice.of(0) is choice.CHOICES["plain C++"]
    assert choice.ANY in found[0]
    assert all(other < own for own, other in zip(*found, strict=True))


def test_small_weights_have_more_rows_that_are_few():
    large, small = torch.empty(2048, 1024), torch.empty(1024, 1024)
    most = few_rows.most_rows(torch.float32, 2)
    assert few_rows.are_few(most, large, 2)
    assert not few_rows.are_few(most + 1, large, 2)
    assert few_rows.are_few(2 * most, small, 2)
    assert not few_rows.are_few(2 * most + 1, small, 2)
    assert not few_rows.are_few(1, small.double(), 2)
