"""The gated MLP as one, against its layers called one after the other and fp64."""

import contextlib
import math

import pytest
import torch
from torch.nn import functional as F

from lora_kernels import Projection, lora_linear, lora_linear_packed, lora_swiglu_mlp
from lora_kernels.backends import gating, native, use_backend
from lora_kernels.backends.gating import ACTIVATIONS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
K, INNER = 24, 40


def leaf(rng, std, dtype, *shape, trains=True):
    values = torch.randn(*shape, generator=rng, dtype=torch.float64) * std
    return values.to(dtype).requires_grad_(trains)


class Problem:
    def __init__(self, M, dtype, p=0.0, low=None, bias=True, one=False):
        rng, low = torch.Generator().manual_seed(3), low or dtype
        self.x = leaf(rng, 1, dtype, M, K)

        def projection(N, K, r, seed):
            return Projection(
                leaf(rng, K**-0.5, dtype, N, K, trains=False),
                leaf(rng, (3 * K) ** -0.5, low, r, K), leaf(rng, 0.5 * r**-0.5, low, N, r),
                leaf(rng, 0.5, dtype, N, trains=False) if bias else None, 2.0, p, seed,
            )  # fmt: skip

        self.gate = projection(2 * INNER if one else INNER, K, 4, 5)
        self.up = None if one else projection(INNER, K, 3, 6)
        self.down = projection(K, INNER, 4, 7)
        self.dy = leaf(rng, 0.1, dtype, M, K, trains=False)

    @property
    def parts(self):
        return [p for p in (self.gate, self.up, self.down) if p is not None]

    @property
    def leaves(self):
        return [self.x, *(t for p in self.parts for t in (p.lora_a, p.lora_b))]

    def gradients(self, y):
        return [y.detach(), *torch.autograd.grad(y, self.leaves, self.dy)]

    def as_one(self, act):
        return lora_swiglu_mlp(self.x, self.gate, self.up, self.down, act)

    def layers(self, act):
        function, _ = ACTIVATIONS[act]
        z = self.gate(self.x)
        g, u = z.chunk(2, -1) if self.up is None else (z, self.up(self.x))
        return self.down(function(g) * u)

    def exact(self, act):
        """Without dropout, of the leaves in fp64."""
        wide = [t.detach().double().requires_grad_() for t in self.leaves]
        x, *pairs = wide
        given = iter(pairs)

        def of(p, x):
            a, b = next(given), next(given)
            bias = None if p.bias is None else p.bias.double()
            return F.linear(x, p.weight.double(), bias) + 2.0 * F.linear(F.linear(x, a), b)

        function, _ = ACTIVATIONS[act]
        z = of(self.gate, x)
        g, u = z.chunk(2, -1) if self.up is None else (z, of(self.up, x))
        y = of(self.down, function(g) * u)
        return [y.detach(), *torch.autograd.grad(y, wide, self.dy.double())]


def error(found, exact):
    return float((found.double() - exact).norm() / exact.norm())


@pytest.fixture(params=["native", "reference"])
def backend(request):
    if request.param == "native":
        yield
    else:
        with use_backend("reference"):
            yield


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("one", [False, True], ids=["three", "two"])
def test_as_near_to_fp64_as_the_layers(backend, act, dtype, one):
    ratios = []
    for M, bias, low in ((1500, True, dtype), (7, False, torch.float32)):
        problem = Problem(M, dtype, bias=bias, low=low, one=one)
        found = zip(
            problem.gradients(problem.as_one(act)), problem.gradients(problem.layers(act)),
            problem.exact(act), strict=True,
        )  # fmt: skip
        for ours, theirs, right in found:
            assert ours.dtype == theirs.dtype
            own, other = error(ours, right), error(theirs, right)
            eps = torch.finfo(dtype).eps
            if dtype == torch.float32:  # no accumulator is wider: the order of a sum counts
                eps *= M**0.5 / 2
            assert own <= 2 * other + eps, act
            if M > 100:  # errors of few elements are accidents
                ratios.append((own + 1e-12) / (other + 1e-12))
    if dtype != torch.float32:
        assert math.exp(sum(map(math.log, ratios)) / len(ratios)) <= 1.02


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("one", [False, True], ids=["three", "two"])
def test_masks_are_those_of_the_layers(backend, p, one):
    problem = Problem(1500, torch.float32, p, one=one)
    ours, theirs = (problem.gradients(f("silu")) for f in (problem.as_one, problem.layers))
    for one_, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one_, other, rtol=1e-4, atol=1e-5)


def kept_by(problem, call):
    """Bytes that autograd keeps beside x and the layers' tensors, each memory once."""
    given = [problem.x, *(t for p in problem.parts for t in p[:4])]
    theirs = {t.untyped_storage().data_ptr() for t in given}
    seen = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in theirs:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = call()
    return sum(seen.values()), y


@pytest.mark.parametrize("profiled", [False, True])
@pytest.mark.parametrize("one", [False, True], ids=["three", "two"])
def test_half_is_kept(one, profiled):
    problem = Problem(1500, torch.float32, one=one)
    rank_sized = 1500 * 4 * sum(p.lora_a.shape[0] for p in problem.parts)
    with torch.profiler.profile() if profiled else contextlib.nullcontext():
        ours, y = kept_by(problem, lambda: problem.as_one("silu"))
    theirs, z = kept_by(problem, lambda: problem.layers("silu"))
    assert ours - rank_sized == 2 * 1500 * INNER * 4
    assert ours - rank_sized <= (theirs - rank_sized) / 2
    torch.testing.assert_close(y, z)


def test_with_a_frozen_no_input_is_kept():
    """LoRA-FA: of one layer, of several on one x and of an MLP."""
    problem, kept = Problem(1500, torch.float32), []
    for part in problem.parts:
        part.lora_a.requires_grad_(False)
    pairs = [(p.weight, p.lora_a, p.lora_b) for p in (problem.gate, problem.up)]
    x = problem.x.detach() * 1.0
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda t: t):
        lora_linear(x, *pairs[0])
        lora_linear_packed(x, *zip(*pairs, strict=True))
        lora_swiglu_mlp(x, *problem.parts)
    assert not any(t.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for t in kept)
    assert sum(tuple(t.shape) == (1500, INNER) for t in kept) == 2  # gate(x) and up(x)


def test_nothing_that_is_used_twice_is_overwritten():
    problem = Problem(1500, torch.float32)
    y = problem.as_one("silu")
    first = torch.autograd.grad(y, problem.leaves, problem.dy, retain_graph=True)
    dy = problem.dy.clone()
    again = torch.autograd.grad(y, problem.leaves, problem.dy)
    assert torch.equal(dy, problem.dy)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_only_what_is_asked_for():
    problem = Problem(1500, torch.float32)
    found = problem.gradients(problem.as_one("silu"))[1:]
    leaves = problem.leaves
    right = dict(zip(map(id, leaves), found, strict=True))
    for chosen in (leaves[:1], leaves[1:2], leaves[5:6], leaves[6:]):
        for leaf_ in problem.leaves:
            leaf_.requires_grad_(any(leaf_ is one for one in chosen))
        found = torch.autograd.grad(problem.as_one("silu"), chosen, problem.dy)
        for one, leaf_ in zip(found, chosen, strict=True):
            torch.testing.assert_close(one, right[id(leaf_)], rtol=1e-4, atol=1e-6)


def test_frozen_layers_among_them():
    problem = Problem(1500, torch.float32)
    problem.up = Projection(problem.up.weight)
    problem.down = Projection(problem.down.weight, bias=problem.down.bias)
    leaves = [problem.x, problem.gate.lora_a, problem.gate.lora_b]
    ours, theirs = (
        torch.autograd.grad(f("silu"), leaves, problem.dy) for f in (problem.as_one, problem.layers)
    )
    for one, other in zip(ours, theirs, strict=True):
        assert error(one, other.double()) <= 2e-6  # two orders of sums over 1500 rows


def test_autocast_compile_and_double_backward():
    problem = Problem(1500, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = problem.as_one("silu"), problem.layers("silu")
        assert type(ours.grad_fn).__name__ == "_MlpBackward"
    assert ours.dtype == torch.bfloat16
    right = problem.exact("silu")
    found = (problem.gradients(y.float()) for y in (ours, theirs))
    for one, other, exact in zip(*found, right, strict=True):
        assert error(one, exact) <= 1.3 * error(other, exact)
    call = torch.compile(lambda: problem.as_one("silu"), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(call(), problem.layers("silu"))
    (dx,) = torch.autograd.grad(call().sum(), problem.x)
    assert dx.any()
    y = problem.as_one("silu")
    with pytest.raises(NotImplementedError, match="double backward"):
        torch.autograd.grad(y.sum(), problem.x, create_graph=True)


def test_bad_input():
    problem = Problem(5, torch.float32)
    with pytest.raises(ValueError, match="act: got 'swish', legal values are silu, gelu, "):
        problem.as_one("swish")
    gate, up, down = problem.parts
    for parts, words in (
        ((gate, gate._replace(weight=gate.weight[:7]), down), "up: expected a weight of 40 rows"),
        ((gate, up, down._replace(weight=down.weight[:, :7])), "down: expected a weight of 40 col"),
        (
            (gate._replace(weight=gate.weight[:7]), None, down),
            r"gate: expected a weight \[2 I, K\]",
        ),
        ((gate._replace(lora_a=gate.lora_b), up, down), "layer 0: lora_a: expected shape"),
    ):
        with pytest.raises(ValueError, match=words):
            lora_swiglu_mlp(problem.x, *parts)


# -------------------------------------------------------------------------- the elementwise kernels


@pytest.fixture(params=range(len(native.extension.ISA_NAMES)))
def isa(request, monkeypatch):
    if not native.extension.available() or request.param > native.best_isa():
        pytest.skip("the compiled kernels of this instruction set are not here")
    if native.extension.ISA_NAMES[request.param].startswith(("AMX", "NEON")):
        pytest.skip("its rows are those of the set before it")
    monkeypatch.setattr(gating.extension, "best_isa", lambda: request.param)
    return request.param


@pytest.mark.parametrize("act", native.extension.ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 17, 512, 1030])
def test_kernels_of_every_instruction_set(isa, act, dtype, columns):
    """Halves of wider rows, written over what was read, at values far beyond those of a layer."""
    values = torch.cat([torch.linspace(-100, 100, 6 * columns), 3 * torch.randn(6 * columns)])
    both = values.view(6, 2 * columns).to(dtype)
    g, u = both.chunk(2, 1)
    dh = torch.randn(6, columns).to(dtype)
    assert gating._by_kernels(act, g, u)
    function, derivative = ACTIVATIONS[act]
    wide = [t.double() for t in (g, u, dh)]
    gate, up, gradient = wide
    slope = derivative(torch.ones_like(gate), gate)
    right = (
        (function(gate) * up, up),
        (gradient * up * slope, gradient * up),
        (gradient * function(gate), gradient),
    )
    out = torch.full((6, 2 * columns), torch.nan, dtype=dtype)
    gating.gradients((g, u), dh, act, tuple(out.chunk(2, 1)))
    memory = dh.clone()
    other = torch.empty_like(memory)
    gating.gradients((g, u), memory, act, (memory, other))
    assert torch.equal(torch.cat([memory, other], 1), out)
    eps = torch.finfo(dtype).eps
    found = (gating.gated(g, u, act), *out.chunk(2, 1))
    for one, (exact, multiplier) in zip(found, right, strict=True):
        rounded = exact.to(dtype)
        assert torch.equal(one.isfinite(), rounded.isfinite())  # fp16 overflows where it must
        inside = rounded.isfinite()
        scale = (exact.abs() + multiplier.abs())[inside] + 1e-6
        assert float(((one.double() - exact)[inside].abs() / scale).max()) <= eps + 2e-6


def test_nan_stays_nan():
    g = torch.tensor([[float("nan"), float("inf"), 1.0]])
    for act in ("silu", "gelu_tanh"):
        h = gating.gated(g, torch.ones(1, 3), act)
        assert h.isnan().tolist() == [[True, False, False]]


@pytest.mark.skipif(not native.extension.available(), reason=native.extension.status())
def test_what_the_kernels_refuse():
    ok, _turned = torch.zeros(3, 8), torch.zeros(8, 3).t()
    op = torch.ops.lora_kernels._gate_cpu
    for call, words in (
        (lambda: op(ok, ok, None, 9, 0, ok.clone(), None, None), "act: must be in"),
        (lambda: op(ok, ok[:2], None, 0, 0, ok.clone(), None, None), "u: must be"),
        (lambda: op(ok, ok.half(), None, 0, 0, ok.clone(), None, None), "u: "),
        (lambda: op(ok, ok, None, 0, 0, None, None, None), "h, or dh, dg and du"),
        (lambda: op(ok, ok, ok, 0, 0, None, ok.clone(), None), "h, or dh, dg and du"),
        (lambda: op(ok, ok, None, 0, 0, torch.zeros(1, 8).expand(3, 8), None, None), "h: "),
        (
            lambda: op(ok, torch.zeros(8, 3).t(), None, 0, 0, ok.clone(), None, None),
            "u: the columns",
        ),
    ):
        with pytest.raises(RuntimeError, match=words):
            call()
