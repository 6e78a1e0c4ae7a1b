"""Several layers of one x in one call, against a call of each and fp64."""

import math
import threading

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lora_kernels import Projection, lora_linear, lora_linear_packed
from lora_kernels.backends import blocked, native, packed, use_backend
from lora_kernels.backends.dropout import keep_mask, keep_scale
from lora_kernels.branch import Asked, Dense, Layer, Rows, Wanted
from lora_kernels.packed import prepared, project

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS = 300  # more than are few anywhere, with the factor of small weights
K = 40
# Of the layers, the third of which has no branch.
ALIKE, OWN = (2.0,) * 4, (2.0, -0.5, 1.0, 48.0)
NO_DROPOUT, OWN_PS = (0.0,) * 4, (0.3, 0.0, 0.0, 0.6)


@pytest.fixture(params=["native", "reference", "wide", "few", "any"])
def M(request, monkeypatch):
    """How many rows, and who computes; rows, and columns where they are widened, in many blocks. Of
    any number of rows each layer is a call of its own, as on some processors in fp32."""
    monkeypatch.setattr(native, "are_few", lambda rows, *_: rows == 3 or request.param == "any")
    monkeypatch.setattr(packed, "_BLOCK_BYTES", 4 * K * 130)
    monkeypatch.setattr(blocked, "_CPU_BLOCK_BYTES", 4 * 48 * 20)
    if request.param == "wide":
        monkeypatch.setattr(blocked, "_multiplies", lambda dtype: dtype == torch.float32)
    if request.param == "reference":
        with use_backend("reference"):
            yield ROWS
    else:
        yield {"native": 2000, "wide": ROWS, "few": 3, "any": 700}[request.param]


class Problem:
    """Layers of one x: unequal widths, ranks, a bias, one without a branch."""

    widths = 48, 33, 48, 17

    def __init__(self, M, dtype, low=None, scalings=ALIKE, ps=NO_DROPOUT):
        rng, widths = torch.Generator().manual_seed(7), self.widths
        self.scalings, self.ps, low = scalings, ps, low or dtype

        def leaf(std, dtype, *shape, trains=True):
            values = torch.randn(*shape, generator=rng, dtype=torch.float64) * std
            return values.to(dtype).requires_grad_(trains)

        ranks = (4, 7, None, 1)
        self.x = leaf(1, dtype, M, K)
        self.weights = [leaf(K**-0.5, dtype, N, K, trains=False) for N in widths]
        self.a = [None if r is None else leaf((3 * K) ** -0.5, low, r, K) for r in ranks]
        self.b = [
            None if r is None else leaf(0.5 * r**-0.5, low, N, r)
            for r, N in zip(ranks, widths, strict=True)
        ]
        self.biases = [leaf(0.5, dtype, widths[0], trains=False), None, None, None]
        self.dys = [leaf(0.1, dtype, M, N, trains=False) for N in widths]
        self.seeds = [3, 5, None, 11]

    @property
    def leaves(self):
        return [self.x, *(t for t in (*self.a, *self.b) if t is not None)]

    def gradients(self, ys):
        return [*(y.detach() for y in ys), *torch.autograd.grad(ys, self.leaves, self.dys)]

    @property
    def projections(self):
        return [
            Projection(*of)
            for of in zip(
                self.weights, self.a, self.b, self.biases, self.scalings, self.ps, self.seeds,
                strict=True,
            )
        ]  # fmt: skip

    def together(self):
        return self.gradients(project(self.x, self.projections))

    def each(self):
        return self.gradients([one(self.x) for one in self.projections])

    def exact(self):
        x = self.x.detach().double().requires_grad_()
        a, b = ([t if t is None else t.detach().double().requires_grad_() for t in ts]
                for ts in (self.a, self.b))  # fmt: skip
        ys = []
        for i, (w, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            ys.append(F.linear(x, w.double(), None if bias is None else bias.double()))
            if a[i] is not None:
                p, kept = self.ps[i], x
                if p:
                    mask = keep_mask(torch.tensor(self.seeds[i]), 0, *x.shape, p)
                    kept = x * mask * keep_scale(p)
                ys[i] = ys[i] + self.scalings[i] * F.linear(F.linear(kept, a[i]), b[i])
        leaves = [x, *(t for t in (*a, *b) if t is not None)]
        found = torch.autograd.grad(ys, leaves, [dy.double() for dy in self.dys])
        return [*(y.detach() for y in ys), *found]


def error(found, exact):
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("shared", [False, True], ids=["three", "one"])
def test_a_weight_that_is_packed_already(M, shared):
    """Phi-3's query, key and value are rows of one weight, read as it lies, with an A of each or
    one for all."""
    torch.manual_seed(0)
    parts = torch.randn(48 + 16 + 16, K).mul_(K**-0.5).split([48, 16, 16])
    x = torch.randn(M, K, requires_grad=True)
    a = [torch.randn(4, K).mul_(K**-0.5).requires_grad_() for _ in range(1 if shared else 3)]
    b = [torch.randn(len(part), 4, requires_grad=True) for part in parts]
    as_ = a * 3 if shared else a
    dys = [torch.randn(M, len(part)) for part in parts]
    ys = lora_linear_packed(x, parts, as_, b, scalings=[1.0, 2.0, 0.5])
    right = [
        F.linear(x, part) + scaling * F.linear(F.linear(x, one), other)
        for part, one, other, scaling in zip(parts, as_, b, [1.0, 2.0, 0.5], strict=True)
    ]
    leaves = [x, *a, *b]
    found = [*(y.detach() for y in ys), *torch.autograd.grad(ys, leaves, dys)]
    wanted = [*(y.detach() for y in right), *torch.autograd.grad(right, leaves, dys)]
    for one, other in zip(found, wanted, strict=True):
        assert error(one, other.double()) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("low", ["same", "fp32"])
@pytest.mark.parametrize(
    ("scalings", "ps"), [(ALIKE, NO_DROPOUT), (OWN, NO_DROPOUT), (OWN, OWN_PS)]
)
def test_as_near_to_fp64_as_separate_layers(M, dtype, low, scalings, ps):
    problem = Problem(M, dtype, torch.float32 if low == "fp32" else dtype, scalings, ps)
    ratios = []
    for ours, theirs, exact in zip(
        problem.together(), problem.each(), problem.exact(), strict=True
    ):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        own, other = error(ours, exact), error(theirs, exact)
        eps = torch.finfo(dtype).eps
        if dtype == torch.float32:  # no accumulator is wider: the order of a sum counts
            eps *= max(1.0, M**0.5 / 2)
        assert own <= 2 * other + eps
        if M > 100:  # errors of few elements are accidents
            ratios.append((own + 1e-12) / (other + 1e-12))
    if dtype != torch.float32 and ratios:
        assert math.exp(sum(map(math.log, ratios)) / len(ratios)) <= 1.02


@pytest.mark.parametrize("ps", [NO_DROPOUT, OWN_PS])
def test_bf16_gradient_of_x_is_rounded_less_often(ps):
    """One sum of all layers, not a rounded sum of rounded ones."""
    problem = Problem(2000, torch.bfloat16, ps=ps)
    together, each, exact = problem.together()[4], problem.each()[4], problem.exact()[4]
    assert error(together, exact) < 0.95 * error(each, exact)


@pytest.mark.parametrize("ps", [NO_DROPOUT, OWN_PS])
def test_gradient_of_x_is_rounded_once_where_products_are_formed_in_fp32(monkeypatch, ps):
    monkeypatch.setattr(blocked, "_multiplies", lambda dtype: dtype == torch.float32)
    problem = Problem(ROWS, torch.bfloat16, ps=ps)
    together, exact = problem.together()[4], problem.exact()[4]
    # What else is lost is ds, rounded to bf16.
    assert error(together, exact) < 1.2 * error(exact.bfloat16(), exact)


def test_masks_are_those_of_separate_layers(M):
    """Of x, which y shows, and of its gradient, 0 where every layer drops and nowhere else."""
    problem = Problem(M, torch.float32, ps=(0.5, 0.5, 0.0, 0.4))
    layers = (0, 1, 3)
    for w in problem.weights:
        w.zero_()
    for i in layers:
        problem.a[i].detach().fill_(1.0)
        problem.b[i].detach().abs_()
    problem.x.detach().copy_(2.0 ** (torch.arange(K) % 20))  # any sum of them is exact
    kept = {i: keep_mask(torch.tensor(problem.seeds[i]), 0, M, K, problem.ps[i]) for i in layers}
    ys = project(problem.x, problem.projections)
    for i, mask in kept.items():
        s = 2.0 * keep_scale(problem.ps[i]) * (problem.x * mask).sum(1, dtype=torch.float64)
        y = s[:, None] * problem.b[i].double().sum(1)
        if problem.biases[i] is not None:
            y += problem.biases[i].double()
        torch.testing.assert_close(ys[i].double(), y, rtol=1e-6, atol=1e-3)
    (dx,) = torch.autograd.grad(ys, problem.x, [dy.abs() for dy in problem.dys])
    assert torch.equal(dx != 0, torch.stack([*kept.values()]).any(0))


@pytest.mark.skipif(not native.extension.available(), reason=native.extension.status())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ps", [OWN_PS, (0.3, 0.1, 0.0, 0.6)])
def test_dropout_leaves_the_bits_of_separate_layers(monkeypatch, dtype, ps):
    """Of outputs and of dB, whatever the blocks."""
    monkeypatch.setattr(packed, "_BLOCK_BYTES", 4 * K * 130)
    monkeypatch.setattr(blocked, "_multiplies", lambda _: True)
    monkeypatch.setattr(native, "are_few", lambda *_: False)
    problem = Problem(2000, dtype, scalings=OWN, ps=ps)
    with use_backend("native"):
        together, each = problem.together(), problem.each()
    for i in (*range(4), -3, -2, -1):
        assert torch.equal(together[i], each[i])


@pytest.mark.parametrize("scalings", [ALIKE, OWN])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_masks_scalings_and_parts_of_the_gradients(M, p, scalings):
    problem = Problem(M, torch.float32, scalings=scalings, ps=(p,) * 4)
    for ours, theirs in zip(problem.together(), problem.each(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    frozen = [problem.x, problem.a[0], problem.b[1]]
    for leaf in frozen:
        leaf.requires_grad_(False)
    given = (problem.x, problem.weights, problem.a, problem.b, problem.biases)
    ys = lora_linear_packed(*given, scalings=scalings, dropout_p=p, seeds=problem.seeds)
    ys[0].backward(problem.dys[0], retain_graph=True)
    assert all(leaf.grad is None for leaf in frozen)
    assert problem.b[0].grad.any()
    assert problem.a[1].grad is None  # nothing came back through its layer
    ys[1].backward(problem.dys[1])
    assert problem.a[1].grad.any()


@pytest.mark.parametrize("ps", [NO_DROPOUT, OWN_PS])
def test_one_node_and_x_kept_once(ps):
    problem, kept = Problem(2000, torch.float32, scalings=OWN, ps=ps), []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda t: t):
        ys = project(problem.x, problem.projections)
    assert len({y.grad_fn for y in ys}) == 1
    assert sum(t is problem.x or t.shape == problem.x.shape for t in kept) == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("scalings", "ps"), [(ALIKE, NO_DROPOUT), (OWN, NO_DROPOUT), (OWN, OWN_PS)]
)
def test_layers_go_together(M, dtype, scalings, ps, monkeypatch):
    """All but the few rows that a call of each takes."""
    apart = []
    for name in ("_one_by_one", "_backward_one_by_one"):
        own = getattr(packed, name)
        monkeypatch.setattr(packed, name, lambda *a, own=own: apart.append(own) or own(*a))
    Problem(M, dtype, scalings=scalings, ps=ps).together()
    assert len(apart) == (2 if M in (3, 700) and native.extension.available() else 0)


@pytest.mark.skipif(not native.extension.available(), reason=native.extension.status())
@pytest.mark.parametrize(("ps", "blocks"), [(NO_DROPOUT, 1), (OWN_PS, 4)])
def test_x_is_read_once_for_all_branches(monkeypatch, ps, blocks):
    """Forward and for all dA; with dropout a block of it for one layer after the other."""
    monkeypatch.setattr(packed, "_BLOCK_BYTES", 4 * K * 500)
    monkeypatch.setattr(native, "are_few", lambda *_: False)
    reads = []
    for name in ("shrink", "outer"):
        own = getattr(native, name)
        monkeypatch.setattr(
            native, name, lambda *a, own=own, **k: reads.append(a[0]) or own(*a, **k)
        )
    problem = Problem(2000, torch.float32, scalings=OWN, ps=ps)
    problem.together()
    of_x = [rows.storage_offset() // K for rows in reads if rows.shape[1] == K]
    layers = 3 if any(ps) else 1
    rows = [i * 2000 // blocks for i in range(blocks) for _ in range(layers)]
    assert of_x == 2 * rows


class _Largest(TorchDispatchMode):
    """The memory that calls ask for, in bytes, from a size on."""

    def __init__(self, least):
        super().__init__()
        self.least, self.found = least, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for t in results if isinstance(results, (tuple, list)) else [results]:
            if isinstance(t, torch.Tensor) and t.untyped_storage().nbytes() >= self.least:
                self.found[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return results


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("scalings", "ps"), [(OWN, NO_DROPOUT), (OWN, OWN_PS)])
def test_no_copy_of_x(M, dtype, scalings, ps):
    """Nor of a gradient beside the one that is returned, beyond blocks of rows."""
    problem = Problem(M, dtype, scalings=scalings, ps=ps)
    if M == 3:
        pytest.skip("a row block is all")
    layers, x = [prepared(problem.x, one) for one in problem.projections], problem.x.detach()
    dys = [dy[:, :8].contiguous() for dy in problem.dys]
    narrow = [
        Layer(
            Dense(base.weight[:8]),
            None
            if b is None
            else b._replace(lora_a=b.lora_a.detach(), lora_b=b.lora_b[:8].detach()),
        )
        for base, b in layers
    ]
    with _Largest(x.nbytes) as largest:
        _, kept = packed.forward(x, narrow, [True] * 4)
    assert set(largest.found) <= {x.data_ptr()}
    wanted = [Wanted(b is not None, b is not None) for _, b in narrow]
    with _Largest(x.nbytes) as largest:
        dx, _ = packed.backward(Rows(dys, x, kept), narrow, Asked(wanted, True))
    assert set(largest.found) <= {x.data_ptr(), dx.data_ptr()}


def test_leading_dimensions_autocast_and_watchers():
    problem = Problem(2000, torch.float32)
    given = (problem.weights, problem.a, problem.b, problem.biases)
    flat = lora_linear_packed(problem.x, *given, scalings=2.0)
    ys = lora_linear_packed(problem.x.view(20, 100, 40), *given, scalings=2.0)
    for y, z in zip(ys, flat, strict=True):
        assert torch.equal(y.reshape(z.shape), z)
    with torch.autocast("cpu", torch.bfloat16):
        ys = lora_linear_packed(problem.x, *given, scalings=2.0)
        problem.gradients([y.float() for y in ys])
    for y, z in zip(ys, flat, strict=True):
        assert y.dtype == torch.bfloat16
        assert error(y.detach(), z.detach().double()) < 1e-2
    with torch.no_grad():
        for y, z in zip(lora_linear_packed(problem.x, *given, scalings=2.0), flat, strict=True):
            torch.testing.assert_close(y, z)
    compiled = torch.compile(
        lambda x: lora_linear_packed(x, *given, scalings=2.0), fullgraph=True, backend="aot_eager"
    )
    for y, z in zip(compiled(problem.x), flat, strict=True):
        torch.testing.assert_close(y, z)
    with pytest.raises(NotImplementedError, match="double backward"):
        torch.autograd.grad(flat[0].sum(), problem.x, create_graph=True)


def test_backward_in_another_thread_and_within_autocast():
    problem = Problem(2000, torch.float32)
    right = problem.together()
    ys = lora_linear_packed(
        problem.x, problem.weights, problem.a, problem.b, problem.biases, scalings=2.0
    )
    found = []

    def back():
        with torch.autocast("cpu", torch.bfloat16):
            found.extend(torch.autograd.grad(ys, problem.leaves, problem.dys))

    thread = threading.Thread(target=back)
    thread.start()
    thread.join()
    for one, other in zip(found, right[4:], strict=True):
        assert torch.equal(one, other)


def test_bad_input():
    problem = Problem(5, torch.float32)
    w, a, b = problem.weights, problem.a, problem.b
    x, given = problem.x, {"weights": w, "lora_as": a, "lora_bs": b}
    for change, kind, words in (
        ({"lora_as": a[:3]}, ValueError, "lora_as: expected one of each of 4 weights, got 3"),
        ({"biases": [None]}, ValueError, "biases: expected one of each"),
        ({"scalings": [1.0]}, ValueError, "scalings: expected one of each"),
        ({"seeds": (1, 2)}, ValueError, "seeds: expected one of each"),
        ({"lora_bs": [*b[:3], None]}, ValueError, r"lora_as\[3\], lora_bs\[3\]: expected both"),
        ({"weights": [w[0], w[1].t(), *w[2:]]}, ValueError, "layer 1: weight: expected shape"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p: "),
        ({"x": x.half()}, TypeError, "layer 0: "),
        ({"weights": [None, *w[1:]]}, TypeError, "layer 0: weight: expected a Tensor"),
    ):
        with pytest.raises(kind, match=words):
            lora_linear_packed(**{"x": x, **given, **change})
    assert lora_linear_packed(x, [], [], []) == ()


def test_a_projection_is_a_call_of_one_layer():
    problem = Problem(5, torch.float32)
    one = Projection(problem.weights[0], problem.a[0], problem.b[0], problem.biases[0], 2.0)
    right = lora_linear(
        problem.x, problem.weights[0], problem.a[0], problem.b[0], problem.biases[0], scaling=2.0
    )
    assert torch.equal(one(problem.x), right)
    frozen = Projection(problem.weights[0])(problem.x)
    assert torch.equal(frozen, F.linear(problem.x, problem.weights[0]))
