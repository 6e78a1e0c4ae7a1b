"""Many adapters in one call: values and gradients against fp64, whose rows are whose, isolation."""

import copy
import pickle
from contextlib import contextmanager
from dataclasses import dataclass

import numpy
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import forward_ad
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.nn import functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lora_kernels import Groups, lora_add_grouped, lora_linear, lora_linear_grouped
from lora_kernels._namespace import ops
from lora_kernels.backends.native import extension
from lora_kernels.testing import Aten

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GENERATOR = torch.Generator().manual_seed(0)


def randn(*shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(shape, generator=GENERATOR) * scale).to(dtype)


@dataclass
class Batch:
    """A call of lora_linear_grouped, whose rows are whose in numbers: -1 nobody's, -2 past the
    last segment."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    a: list
    b: list
    index: list
    groups: Groups
    weight_of: list | None = None
    scaling: tuple = ()
    p: float = 0.0
    seeds: tuple = ()
    stack: bool = False

    def leaves(self):
        """Copies that require grad, as the op is handed them: (x, weight, bias, a, b)."""
        x, weight, bias = (
            t if t is None else t.clone().requires_grad_() for t in (self.x, self.weight, self.bias)
        )
        if self.stack:
            a, b = (torch.stack(t).requires_grad_() for t in (self.a, self.b))
        else:
            a, b = ([t.clone().requires_grad_() for t in ts] for ts in (self.a, self.b))
        return x, weight, bias, a, b

    def options(self):
        return {
            "weight_of": self.weight_of, "scaling": self.scaling, "dropout_p": self.p,
            "seed": list(self.seeds),
        }  # fmt: skip

    def call(self, leaves):
        x, weight, bias, a, b = leaves
        return lora_linear_grouped(x, weight, a, b, self.groups, bias, **self.options())

    def by_hand(self, dtype):
        """y and the gradients of its sum with dy, in unfused torch: row by row of each group."""
        x, weight, bias = (
            t if t is None else t.to(dtype, copy=True).requires_grad_()
            for t in (self.x, self.weight, self.bias)
        )
        pairs = [[t.to(dtype, copy=True).requires_grad_() for t in ts] for ts in (self.a, self.b)]
        y = x.new_zeros(len(x), self.weight.shape[-2]) + 0 * weight.sum()
        shared = self.weight.dim() == 2
        for g in range(-1, len(self.a)):
            rows = [m for m, group in enumerate(self.index) if group == g]
            if not rows or (g == -1 and not shared):
                continue
            e = None if shared else (self.weight_of or range(len(self.a)))[g]
            base = (weight, bias) if shared else (weight[e], None if bias is None else bias[e])
            out = F.linear(x[rows], *base)
            if g >= 0:
                kept = x[rows]
                if self.p:
                    keep = oracle.keep_factor(self.seeds[g], len(rows), x.shape[1], self.p)
                    kept = kept * keep.to(dtype)
                a, b = pairs[0][g], pairs[1][g]
                out = out + self.scaling[g] * F.linear(F.linear(kept, a), b)
            y = y.index_copy(0, torch.tensor(rows), out)
        return y, [x, weight, bias, *pairs[0], *pairs[1]]


def batch(draw_index, *, dtype=torch.float32, K=24, N=20, ranks=(3, 5, 2), p=0.0, **options):
    experts = options.pop("experts", 0)
    count, M = len(ranks), len(draw_index)
    weights = (experts, N, K) if experts else (N, K)
    adapters = options.pop("adapter_dtype", dtype)
    groups = options.pop("groups", None) or Groups.from_rows(draw_index, count)
    bias = randn(*weights[:-1], dtype=dtype) if options.pop("bias", True) else None
    return Batch(
        randn(M, K, dtype=dtype), randn(*weights, dtype=dtype, scale=K**-0.5), bias,
        [randn(r, K, dtype=adapters, scale=K**-0.5) for r in ranks],
        [randn(N, r, dtype=adapters, scale=r**-0.5) for r in ranks],
        draw_index, groups, scaling=tuple(0.5 + g for g in range(count)), p=p,
        seeds=tuple(7 + 3 * g for g in range(count)), **options,
    )  # fmt: skip


def flat(leaves):
    x, weight, bias, a, b = leaves
    return [
        x,
        weight,
        bias,
        *([a] if torch.is_tensor(a) else a),
        *([b] if torch.is_tensor(b) else b),
    ]


def grads(tensors):
    """Of all but the bias that is not there; zeros for None."""
    return [torch.zeros_like(t) if t.grad is None else t.grad for t in tensors if t is not None]


def unstacked(found, count):
    """The gradients of a stack one by one."""
    *first, a, b = found
    return [*first, *a.unbind(0), *b.unbind(0)] if a.dim() == 3 else found


def require_right(batch, dy=None):
    """y and all gradients by the rule of accuracy, against fp64 and unfused torch."""
    leaves = batch.leaves()
    y = batch.call(leaves)
    dy = randn(*y.shape, dtype=y.dtype) if dy is None else dy
    y.backward(dy)
    mine = [y.detach(), *unstacked(grads(flat(leaves)), len(batch.a))]
    sides = []
    for dtype in (torch.float64, batch.x.dtype):
        out, tensors = batch.by_hand(dtype)
        out.backward(dy.to(dtype))
        sides.append([out.detach(), *grads(tensors)])
    exact, rival = sides
    for got, right, other in zip(mine, exact, rival, strict=True):
        assert got.shape == right.shape
        eps = torch.finfo(got.dtype).eps
        norm = right.norm() + 1e-12
        error, theirs = ((t.double() - right).norm() / norm for t in (got, other))
        assert error <= 2 * theirs + 2 * eps


INDEX = [0, 2, -1, 1, 0, 0, -1, 2, 2, 1, 0, 2, 0]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("experts", [0, 3])
def test_values_and_gradients(dtype, p, experts):
    require_right(batch(INDEX, dtype=dtype, p=p, experts=experts))


@pytest.mark.parametrize("experts", [0, 3])
def test_a_stack(experts):
    require_right(batch(INDEX, ranks=(4, 4, 4), stack=True, experts=experts))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("experts", [0, 3])
def test_errors_beside_those_of_unfused_torch(dtype, experts):
    """The geometric mean over calls, of y and of each gradient: no more is lost."""
    logs = {}
    for M, K, N, r in ((13, 96, 80, 4), (64, 64, 128, 8), (150, 160, 48, 16), (300, 72, 72, 8)):
        made = batch([m * 7 % 3 for m in range(M)], dtype=dtype, K=K, N=N, ranks=(r, 2 * r, r),
                     experts=experts)  # fmt: skip
        dy, leaves = randn(M, N, dtype=dtype), made.leaves()
        y = made.call(leaves)
        y.backward(dy)
        sides = [[y.detach(), *grads(flat(leaves))]]
        for one in (torch.float64, dtype):
            out, tensors = made.by_hand(one)
            out.backward(dy.to(one))
            sides.append([out.detach(), *grads(tensors)])
        names = ("y", "x", "weight", "bias", *["a"] * 3, *["b"] * 3)
        for name, got, exact, rival in zip(names, *sides, strict=True):
            error, theirs = ((t.double() - exact).norm() / exact.norm() for t in (got, rival))
            logs.setdefault(name, []).append((error / theirs).log())
    for name in ("y", "x", "a", "b"):
        assert torch.stack(logs[name]).mean().exp() <= 1.02, name


def test_lanes_past_a_rank_are_never_read():
    """Adapters that are the first rows, or columns, of larger memory: NaN beside them is nothing,
    neither where one call computes small groups nor where each is its own."""
    for M in (12, 60, 900):
        made = batch([m % 3 for m in range(M)], K=40, N=24)
        results = []
        for filling in (0.0, float("nan")):
            leaves = list(made.leaves())
            wide_a = [torch.full((16, 40), filling) for _ in made.a]
            wide_b = [torch.full((24, 16), filling) for _ in made.b]
            for wide, narrow in zip((*wide_a, *wide_b), (*made.a, *made.b), strict=True):
                wide[: narrow.shape[0], : narrow.shape[1]] = narrow
            leaves[3] = [w[: len(t)].requires_grad_() for w, t in zip(wide_a, made.a, strict=True)]
            leaves[4] = [
                w[:, : t.shape[1]].requires_grad_() for w, t in zip(wide_b, made.b, strict=True)
            ]
            y = made.call(leaves)
            y.sum().backward()
            with torch.no_grad():
                results.append([y, made.call(leaves), *grads(flat(leaves))])
        assert all(t.isfinite().all() for t in results[1])
        assert all(map(torch.equal, *results))


@pytest.mark.skipif(not extension.available(), reason="ATen's sums follow the threads")
@pytest.mark.parametrize("M", [13, 200])
def test_experts_on_any_number_of_threads(M):
    made = batch([m * 7 % 3 for m in range(M)], K=96, N=80, experts=3, p=0.3)
    threads, results, dy = torch.get_num_threads(), [], randn(M, 80)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            leaves = made.leaves()
            y = made.call(leaves)
            y.backward(dy)
            results.append([y, *grads(flat(leaves))])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("experts", [0, 3])
def test_nothing_is_kept_but_s(experts):
    """Beside what the caller has anyway: the arguments and the groups."""
    made = batch(INDEX, experts=experts, p=0.4)
    leaves, kept = made.leaves(), {}
    groups = (made.groups.order, made.groups.offsets)
    theirs = {t.data_ptr() for t in (*flat(leaves), *groups)}

    def keep(tensor):
        if tensor.data_ptr() not in theirs and tensor.dtype.is_floating_point:
            kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        made.call(leaves)
    assert sum(kept.values()) == len(INDEX) * max(len(a) for a in made.a) * 4


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_master_copies(dtype):
    made = batch(INDEX, dtype=dtype, adapter_dtype=torch.float32)
    leaves = made.leaves()
    made.call(leaves).float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in (*leaves[3], *leaves[4]))
    rounded = batch(INDEX)
    rounded.__dict__.update(made.__dict__ | {"a": [t.to(dtype) for t in made.a]})
    rounded.b = [t.to(dtype) for t in made.b]
    assert torch.equal(made.call(leaves), rounded.call(rounded.leaves()))


def test_experts_of_tenants():
    """Two tenants of each of two experts share its weight and its bias."""
    made = batch(INDEX, experts=2, weight_of=[1, 0, 1])
    require_right(made)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("experts", [0, 3])
def test_rows_past_the_last_segment_are_nobodys(bias, experts):
    """Not even read: a router leaves there what it likes."""
    groups = Groups.from_segments([2, 0, 4])
    made = batch([0, 0, 2, 2, 2, 2, -2, -2], groups=groups, bias=bias, experts=experts)
    dy = randn(8, 20)
    require_right(made, dy)
    made.x[6:], dy[6:] = float("nan"), float("nan")
    leaves = made.leaves()
    y = made.call(leaves)
    y.backward(dy)
    assert not y[6:].any()
    assert not leaves[0].grad[6:].any()
    assert all(t.isfinite().all() for t in grads(flat(leaves)))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_sizes(data):
    draw = data.draw
    count = draw(st.integers(1, 5))
    index = draw(st.lists(st.integers(-1, count - 1), max_size=40))
    if draw(st.booleans()):
        index.sort(key=lambda g: g % (count + 1))
    ranks = tuple(draw(st.integers(1, 9)) for _ in range(count))
    experts = draw(st.sampled_from((0, 2)))
    require_right(
        batch(
            index,
            K=draw(st.integers(1, 70)),
            N=draw(st.integers(1, 70)),
            ranks=ranks,
            p=draw(st.sampled_from((0.0, 0.4))),
            experts=experts,
            weight_of=[g % 2 for g in range(count)] if experts else None,
        )
    )


# ------------------------------------------------------------------------------------ whose is what


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 13, 200])
def test_rows_of_no_group_have_the_bits_of_the_frozen_layer(dtype, rows):
    index = torch.randint(-1, 3, (rows,), generator=GENERATOR)
    index[0] = -1
    made = batch(index.tolist(), dtype=dtype, K=96, N=64)
    y = made.call(made.leaves())
    frozen = F.linear(made.x, made.weight, made.bias)
    assert torch.equal(y[index == -1], frozen[index == -1])
    added = lora_add_grouped(frozen, made.x, made.a, made.b, made.groups, scaling=made.scaling)
    assert torch.equal(added[index == -1], frozen[index == -1])


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_a_group_is_a_call_of_its_own(p):
    """Of experts bit for bit, with the mask of its seed."""
    made = batch(INDEX, experts=3, p=p)
    leaves = made.leaves()
    y = made.call(leaves)
    y.sum().backward()
    for g in range(3):
        rows = [m for m, group in enumerate(INDEX) if group == g]
        x, a, b = (
            t.detach().clone().requires_grad_() for t in (made.x[rows], made.a[g], made.b[g])
        )
        alone = lora_linear(
            x, made.weight[g], a, b, made.bias[g],
            scaling=made.scaling[g], dropout_p=p, seed=made.seeds[g],
        )  # fmt: skip
        alone.sum().backward()
        assert torch.equal(alone, y[rows])
        for own, of_all in (
            (x, leaves[0].grad[rows]),
            (a, leaves[3][g].grad),
            (b, leaves[4][g].grad),
        ):
            assert torch.equal(own.grad, of_all)


@pytest.mark.parametrize("experts", [0, 3])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_isolation(experts, p):
    """Whatever other groups hold: NaN in their rows and adapters changes no bit of this one."""
    index = [0] * 9 + [1, 2] * 6 + [0]
    made = batch(index, experts=experts, p=p)
    spoilt = copy.deepcopy(made)
    spoilt.x[[m for m, g in enumerate(index) if g]] = float("nan")
    for g in (1, 2):
        spoilt.a[g].fill_(float("inf"))
        spoilt.b[g].fill_(float("nan"))
        if experts:
            spoilt.weight[g] = float("nan")
    dy, results = randn(len(index), 20), []
    for one in (made, spoilt):
        leaves = one.leaves()
        y = one.call(leaves)
        y.backward(dy)
        mine = [m for m, g in enumerate(index) if g == 0]
        results.append((y[mine], leaves[0].grad[mine], leaves[3][0].grad, leaves[4][0].grad))
    assert all(map(torch.equal, *results))


def _of_group(batch, dy, added):
    """y, dx of group 0's rows and its gradients: of lora_linear_grouped, or of lora_add_grouped."""
    mine = [m for m, g in enumerate(batch.index) if g == 0]
    x, weight, bias, a, b = batch.leaves()
    if added:
        rest = {"scaling": batch.scaling, "dropout_p": batch.p, "seed": list(batch.seeds)}
        y = lora_add_grouped(F.linear(x, weight, bias).detach(), x, a, b, batch.groups, **rest)
    else:
        y = batch.call((x, weight, bias, a, b))
    y.backward(dy)
    with torch.no_grad():
        inferred = batch.call((x, weight, bias, a, b))
    return y[mine], inferred[mine], x.grad[mine], a[0].grad, b[0].grad


OTHERS = {
    "nobody's": lambda made: [g and -1 for g in made.index],
    "half of them nobody's": lambda made: [-1 if g == 2 else g for g in made.index],
    "one group's": lambda made: [g and 1 for g in made.index],
}


@pytest.mark.parametrize("others", [*OTHERS, "of other ranks", "past the last segment"])
@pytest.mark.parametrize(("M", "share"), [(4, 4), (12, 3), (40, 2), (150, 3), (150, 9), (700, 2)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("added", [False, True])
def test_isolation_from_whose_the_others_are(added, dtype, M, share, others):
    """In a batch of one shape a group keeps its bits when the other rows change hands. Of 700
    rows each group has more than are computed together, or others do once they are one's."""
    index = [0] * (M // share) + [1 + m % 2 for m in range(M - M // share)]
    made = batch(index, dtype=dtype, K=72, N=40, ranks=(5, 3, 8), p=0.3 if M == 40 else 0.0)
    changed = copy.copy(made)
    if others == "of other ranks":
        changed.a = [made.a[0], randn(9, 72, dtype=dtype), randn(70, 72, dtype=dtype)]
        changed.b = [made.b[0], randn(40, 9, dtype=dtype), randn(40, 70, dtype=dtype)]
    elif others == "past the last segment":
        changed.groups = Groups.from_segments([M // share, 0, 0])
    else:
        changed.index = OTHERS[others](made)
        changed.groups = Groups.from_rows(changed.index, 3)
    dy = randn(M, 40, dtype=dtype)
    assert all(map(torch.equal, _of_group(made, dy, added), _of_group(changed, dy, added)))


def test_isolation_from_adapters_that_are_not_handed_over():
    """A layer is handed the adapters that a batch names: a group may be one of three or alone."""
    made = batch([0] * 3 + [1, 2] * 4, K=72, N=40)
    alone = copy.copy(made)
    alone.__dict__.update(
        a=made.a[:1], b=made.b[:1], scaling=made.scaling[:1], seeds=made.seeds[:1],
        groups=Groups.from_rows([0] * 3 + [-1] * 8, 1),
    )  # fmt: skip
    dy = randn(11, 40)
    assert all(map(torch.equal, _of_group(made, dy, False), _of_group(alone, dy, False)))


def test_groups_without_rows():
    """Zeros in a stack; in a sequence None, so that Adam neither moves nor decays them."""
    index = [0, 2, 0]
    stack = batch(index, ranks=(4, 4, 4), stack=True)
    leaves = stack.leaves()
    stack.call(leaves).sum().backward()
    assert not leaves[3].grad[1].any()
    assert not leaves[4].grad[1].any()
    assert leaves[3].grad[0].any()
    each = batch(index)
    leaves = each.leaves()
    optimizer = torch.optim.AdamW([*leaves[3], *leaves[4]], lr=0.1, weight_decay=0.1)
    before = leaves[3][1].detach().clone()
    each.call(leaves).sum().backward()
    assert leaves[3][1].grad is None
    assert leaves[4][1].grad is None
    optimizer.step()
    assert torch.equal(leaves[3][1], before)
    assert leaves[3][0].grad is not None


@pytest.mark.parametrize("wanted", ["x", "a", "b", "weight", "bias"])
def test_only_what_is_asked_for(wanted):
    made = batch(INDEX, experts=3)
    leaves = dict(zip(("x", "weight", "bias", "a", "b"), made.leaves(), strict=True))
    all_of = made.leaves()
    made.call(all_of).sum().backward()
    for name, leaf in leaves.items():
        for t in leaf if isinstance(leaf, list) else [leaf]:
            t.requires_grad_(name == wanted)
    made.call(tuple(leaves.values())).sum().backward()
    for name, of_all in zip(leaves, all_of, strict=True):
        several = isinstance(of_all, list)
        for t, same in zip(
            leaves[name] if several else [leaves[name]],
            of_all if several else [of_all],
            strict=True,
        ):
            assert t.grad is None if name != wanted else torch.equal(t.grad, same.grad)


def test_the_base_of_lora_add_grouped():
    made = batch(INDEX)
    base = F.linear(made.x, made.weight, made.bias)
    leaves = [base.clone().requires_grad_(), made.x.clone().requires_grad_()]
    pairs = [[t.clone().requires_grad_() for t in ts] for ts in (made.a, made.b)]
    y = lora_add_grouped(*leaves, *pairs, made.groups, scaling=made.scaling)
    whole = made.leaves()
    expected = made.call(whole)
    dy = randn(*y.shape)
    y.backward(dy)
    expected.backward(dy)
    torch.testing.assert_close(y, expected)
    assert torch.equal(leaves[0].grad, dy)
    torch.testing.assert_close(leaves[1].grad + dy @ made.weight, whole[0].grad)
    for mine, theirs in zip((*pairs[0], *pairs[1]), (*whole[3], *whole[4]), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_leading_dimensions_and_strides():
    made = batch([0, 1, 2, -1, 1, 0])
    y = made.call(made.leaves())
    shaped = copy.copy(made)
    shaped.x = made.x.t().contiguous().t().view(2, 3, -1)
    # torch's product may add up other strides in another order.
    torch.testing.assert_close(shaped.call(shaped.leaves()), y.view(2, 3, -1))


def test_no_rows():
    made = batch([])
    leaves = made.leaves()
    y = made.call(leaves)
    y.sum().backward()
    assert y.shape == (0, 20)
    assert leaves[3][0].grad is None
    assert leaves[0].grad.shape == (0, 24)


# ------------------------------------------------------------------------------ who calls, and when


def test_two_forwards_before_two_backwards():
    """The rows of a call are its own, whenever its backward comes."""
    first, second = batch(INDEX), batch([*reversed(INDEX)])
    second.__dict__.update(weight=first.weight, bias=first.bias, a=first.a, b=first.b)
    alone = []
    for one in (first, second):
        leaves = one.leaves()
        one.call(leaves).sum().backward()
        alone.append(flat(leaves))
    together = [one.leaves() for one in (first, second)]
    outs = [one.call(leaves) for one, leaves in zip((first, second), together, strict=True)]
    for y in reversed(outs):
        y.sum().backward()
    for leaves, expected in zip(together, alone, strict=True):
        for t, same in zip(flat(leaves), expected, strict=True):
            assert torch.equal(t.grad, same.grad)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(reentrant):
    made = batch(INDEX, p=0.4)
    plain, again = made.leaves(), made.leaves()
    made.call(plain).sum().backward()
    checkpoint(
        lambda *leaves: made.call((*leaves, *again[3:])), *again[:3], use_reentrant=reentrant
    ).sum().backward()
    for t, same in zip(flat(again), flat(plain), strict=True):
        assert torch.equal(t.grad, same.grad)


def test_compiled_once_for_other_rows():
    counted = []

    def backend(graph, inputs):
        counted.append(graph)
        return graph.forward

    def run(x, weight, bias, a, b, groups):
        return lora_linear_grouped(x, weight, a, b, groups, bias, scaling=2.0)

    torch._dynamo.reset()
    compiled = torch.compile(run, backend=backend, fullgraph=True)
    for index in (INDEX, [*reversed(INDEX)], [0] * 13, [-1] * 13):
        made = batch(index)
        leaves, eager = made.leaves(), made.leaves()
        y, expected = compiled(*leaves, made.groups), run(*eager, made.groups)
        assert torch.equal(y, expected)
        y.sum().backward()
        expected.sum().backward()
        for t, same in zip(grads(flat(leaves)), grads(flat(eager)), strict=True):
            assert torch.equal(t, same)
    assert len(counted) == 1


def test_compiled_through_autograd():
    torch._dynamo.reset()
    made = batch(INDEX, ranks=(4, 4, 4), stack=True)
    leaves, eager = made.leaves(), made.leaves()
    compiled = torch.compile(lambda *t: made.call(t).sin(), backend="aot_eager", fullgraph=True)
    compiled(*leaves).sum().backward()
    made.call(eager).sin().sum().backward()
    for t, same in zip(flat(leaves), flat(eager), strict=True):
        torch.testing.assert_close(t.grad, same.grad)


@pytest.mark.parametrize("experts", [0, 3])
def test_opcheck(experts):
    made = batch(INDEX, experts=experts, ranks=(4, 4, 4))
    x, weight, bias, a, b = made.leaves()
    groups = made.groups
    rest = (groups.order, groups.offsets, list(groups.bounds), [1.0, 2.0, 3.0], 0.0, None)
    of = [0, 1, 2] if experts else None
    torch.library.opcheck(ops.lora_linear_grouped, (x, weight, a, b, bias, of, *rest, True))
    base = randn(len(INDEX), 20).requires_grad_()
    torch.library.opcheck(ops.lora_add_grouped, (base, x, a, b, *rest, True))


def test_under_autocast():
    made = batch(INDEX)
    with torch.autocast("cpu", torch.bfloat16):
        leaves = made.leaves()
        y = made.call(leaves)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert leaves[0].grad.dtype == torch.float32
    assert leaves[1].grad.dtype == torch.float32
    narrow = copy.copy(made)
    narrow.x, narrow.weight, narrow.bias = (t.bfloat16() for t in (made.x, made.weight, made.bias))
    assert torch.equal(y, narrow.call(narrow.leaves()))


def test_half_adapters_under_autocast():
    """Of another 16 bits than autocast's: cast, as `lora_linear` casts them."""
    made = batch(INDEX, adapter_dtype=torch.float16)
    with torch.autocast("cpu", torch.bfloat16):
        y = made.call(made.leaves())
    cast = copy.copy(made)
    cast.a, cast.b = ([t.bfloat16() for t in ts] for ts in (made.a, made.b))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(y, cast.call(cast.leaves()))


@pytest.mark.parametrize("which", ["x", "lora_a"])
def test_forward_mode_is_refused(which):
    made = batch(INDEX)
    base = F.linear(made.x, made.weight)
    rest = (None, made.groups.order, made.groups.offsets, None, [1.0] * 3, 0.0, None, False)
    with forward_ad.dual_level():
        x, a = made.x, made.a
        if which == "x":
            x = forward_ad.make_dual(x, x)
        else:
            a = [forward_ad.make_dual(a[0], a[0]), *a[1:]]
        with pytest.raises(NotImplementedError, match="forward-mode"):
            lora_linear_grouped(x, made.weight, a, made.b, made.groups)
        with pytest.raises(NotImplementedError, match="forward-mode"):
            lora_add_grouped(base, x, a, made.b, made.groups)
        with pytest.raises(NotImplementedError, match="forward-mode"):
            ops.lora_linear_grouped(x, made.weight, a, made.b, None, *rest)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev, torch.func.vjp])
@pytest.mark.parametrize("added", [False, True])
def test_transforms_of_gradients_are_refused(transform, added):
    made = batch(INDEX)

    def run(x):
        if added:
            return lora_add_grouped(F.linear(x, made.weight), x, made.a, made.b, made.groups).sum()
        return made.call((x, made.weight, made.bias, made.a, made.b)).sum()

    with pytest.raises(NotImplementedError, match=r"grouped ops under torch\.func's grad, vjp"):
        transform(run, made.x) if transform is torch.func.vjp else transform(run)(made.x)
    assert run(made.x).isfinite()  # without a transform


@pytest.mark.parametrize("name", ["x", "weight", "bias", "a", "b", "stack", "base_out"])
def test_dtensors_are_refused_by_name(name):
    made = batch(INDEX, ranks=(4, 4, 4))
    given = {
        "x": made.x, "weight": made.weight, "bias": made.bias, "a": made.a, "b": made.b,
        "base_out": F.linear(made.x, made.weight),
    }  # fmt: skip
    with on_a_mesh() as mesh:

        def spread(t):
            return distribute_tensor(t, mesh, [Replicate()])

        if name == "stack":
            given["a"] = spread(torch.stack(made.a))
        else:
            whole = given[name]
            given[name] = [*map(spread, whole)] if isinstance(whole, list) else spread(whole)
        words = {"a": r"lora_a\[0\]", "b": r"lora_b\[0\]", "stack": "lora_a"}.get(name, name)
        refused = pytest.raises(NotImplementedError, match=f"^{words}: .*got a DTensor")
        x, a, b = given["x"], given["a"], given["b"]
        if name != "base_out":
            with refused:
                lora_linear_grouped(x, given["weight"], a, b, made.groups, given["bias"])
        if name not in ("weight", "bias"):
            with refused:
                lora_add_grouped(given["base_out"], x, a, b, made.groups)


@contextmanager
def on_a_mesh():
    """A mesh of this process alone."""
    torch.distributed.init_process_group("fake", rank=0, world_size=1, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        torch.distributed.destroy_process_group()


def test_double_backward_and_vmap_are_refused():
    made = batch(INDEX)
    leaves = made.leaves()
    (dx,) = torch.autograd.grad(made.call(leaves).sum(), leaves[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        dx.sum().backward()
    with pytest.raises(NotImplementedError, match="more rows"):
        torch.vmap(lambda x: made.call((x, *leaves[1:])))(made.x[None])
    base = F.linear(made.x, made.weight)
    for in_dims in ((0, None), (None, 0), (0, 0)):
        pairs = zip((base, made.x), in_dims, strict=True)
        batched = [t if dim is None else t[None] for t, dim in pairs]
        with pytest.raises(NotImplementedError, match="more rows"):
            torch.vmap(
                lambda base, x: lora_add_grouped(base, x, made.a, made.b, made.groups), in_dims
            )(*batched)


@pytest.mark.parametrize("experts", [0, 3])
def test_flops(experts):
    made = batch(INDEX, experts=experts, ranks=(2, 3, 4))
    leaves = made.leaves()
    M, K, N, ranks = 13, 24, 20, 5 * 2 + 2 * 3 + 4 * 4
    with FlopCounterMode(display=False) as counter:
        y = made.call(leaves)
        assert counter.get_total_flops() == 2 * (M * K * N + ranks * (K + N))
        y.sum().backward()
    expected = 2 * (3 * M * K * N + ranks * (K + N) + ranks * 2 * (K + N))
    assert counter.get_total_flops() == expected


def test_flops_of_lora_add_grouped():
    made = batch(INDEX, ranks=(2, 3, 4))
    x, _, _, a, b = made.leaves()
    base = randn(13, 20).requires_grad_()
    K, N, ranks = 24, 20, 5 * 2 + 2 * 3 + 4 * 4
    with FlopCounterMode(display=False) as counter:
        y = lora_add_grouped(base, x, a, b, made.groups)
        assert counter.get_total_flops() == 2 * ranks * (K + N)
        y.sum().backward()
    assert counter.get_total_flops() == 2 * ranks * (K + N) * 3


def test_a_module_with_an_optimizer():
    class Tenants(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(randn(16, 16, scale=0.2), requires_grad=False)
            self.a = nn.ParameterList([nn.Parameter(randn(2, 16, scale=0.2)) for _ in range(3)])
            self.b = nn.ParameterList([nn.Parameter(torch.zeros(16, 2)) for _ in range(3)])

        def forward(self, x, groups):
            return lora_linear_grouped(x, self.weight, list(self.a), list(self.b), groups)

    model, x = Tenants(), randn(6, 16)
    groups = Groups.from_names(["v", None, "u"], ["u", "v", "w"], 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    target = randn(6, 16)
    losses = []
    for _ in range(30):
        loss = F.mse_loss(model(x, groups), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert not model.b[2].any()
    assert model.b[0].any()
    assert model.b[1].any()


def test_rows_that_lie_together_are_not_copied():
    """Beside y and the gradients nothing of the size of x."""
    M, K, N = 400, 64, 48
    made = batch(
        [0] * 150 + [1] * 150 + [2] * 100, K=K, N=N, groups=Groups.from_segments([150, 150, 100])
    )
    leaves, sizes = made.leaves(), []
    with Aten(lambda name, values: sizes.append((name, values[-1]))):
        made.call(leaves).sum().backward()
    copies = [n for n, v in sizes if torch.is_tensor(v) and v.shape == (M, K) and "mm" not in n]
    assert not [n for n in copies if "index" in n or "clone" in n or "copy" in n]


# ------------------------------------------------------------------------------------------- Groups


def index_of(groups, rows):
    """Whose the rows are, read from order and offsets; -2 past all."""
    order = [*range(groups.offsets[-1])] if groups.order is None else groups.order.tolist()
    found, offsets = [-2] * rows, groups.offsets.tolist()
    for g in range(groups.count + 1):
        for row in order[offsets[g] : offsets[g + 1]]:
            found[row] = -1 if g == groups.count else g
    return found


def test_from_rows():
    for index in (INDEX, torch.tensor(INDEX), torch.tensor(INDEX, dtype=torch.int32).view(1, -1)):
        groups = Groups.from_rows(index, 4)
        assert index_of(groups, 13) == INDEX
        assert groups.rows == 13
        assert groups.bounds == tuple(groups.offsets.tolist())
    order = Groups.from_rows(INDEX, 3).order.tolist()
    assert order == sorted(range(13), key=lambda m: (INDEX[m] % 4, m))


def test_from_segments():
    assert index_of(Groups.from_segments([2, 0, 3]), 6) == [0, 0, 2, 2, 2, -2]
    assert index_of(Groups.from_segments(torch.tensor([2, 0, 3])), 5) == [0, 0, 2, 2, 2]
    groups = Groups.from_segments([1, 2, 1, 1], [2, -1, 0, 2], 4)
    assert index_of(groups, 6) == [2, -1, -1, 0, 2, -2]
    assert Groups.from_segments([1, 2]).order is None


def test_from_names():
    groups = Groups.from_names(["b", None, "a"], {"a": 1, "b": 0}, [1, 2, 1])
    assert index_of(groups, 4) == [0, -1, -1, 1]
    assert index_of(Groups.from_names(["b", "a"], ["a", "b"]), 2) == [1, 0]


@pytest.mark.parametrize("keep", [[2, 0], [1], [0, 1, 2], [2, 1, 0]])
def test_select(keep):
    index = torch.tensor([2, -1, 0, 0, 1, 2, 2])
    groups = Groups.from_rows(index, 3).select(keep)
    numbers = {g: keep.index(g) if g in keep else -1 for g in (-1, 0, 1, 2)}
    wanted = Groups.from_rows([numbers[g] for g in index.tolist()], len(keep))
    assert torch.equal(groups.order, wanted.order)
    assert (groups.bounds, groups.rows, groups.count) == (wanted.bounds, 7, len(keep))
    assert torch.equal(groups.offsets, wanted.offsets)


def test_select_of_segments():
    groups = Groups.from_segments([2, 0, 3]).select([2])
    assert groups.rows is None  # rows past the last segment stay nobody's
    assert groups.order.tolist() == [2, 3, 4, 0, 1]
    assert groups.bounds == (0, 3, 5)
    for wrong in ([3], [-1], [0, 0]):
        with pytest.raises(ValueError, match="groups: expected different ones of 0 to 0"):
            groups.select(wrong)
    with pytest.raises(ValueError, match="at least one group"):
        groups.select([])


def test_whole_numbers_of_other_types():
    """What counts as an integer elsewhere in Python: numpy's, tensors without dimensions."""
    numbers = numpy.array([0, 2, -1])
    for index in (numbers, list(numbers), list(torch.tensor(numbers))):
        assert index_of(Groups.from_rows(index, numpy.int64(3)), 3) == [0, 2, -1]
    assert Groups.from_segments(numpy.array([2, 1])).bounds == (0, 2, 3, 3)
    assert Groups.from_names(["a", "b"], ["a", "b"], numpy.array([2, 1])).bounds == (0, 2, 3, 3)


def test_groups_are_a_value():
    groups = Groups.from_rows(INDEX, 3)
    with pytest.raises(AttributeError, match="immutable"):
        groups.count = 4
    with pytest.raises(TypeError, match="from_rows"):
        Groups()
    for again in (pickle.loads(pickle.dumps(groups)), copy.deepcopy(groups)):
        assert index_of(again, 13) == INDEX
        assert again.bounds == groups.bounds
    assert groups.to("cpu") is groups
    assert groups.to("meta").offsets.is_meta
    assert "rows of each=[5, 2, 4], of none=2" in repr(groups)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: Groups.from_rows([0, 3], 3), ValueError, "index: expected groups of -1 to 2"),
        (lambda: Groups.from_rows([0, -2], 3), ValueError, "got -2 to 0"),
        (
            lambda: Groups.from_rows(torch.ones(2), 3),
            TypeError,
            "integer tensor, got torch.float32",
        ),
        (lambda: Groups.from_rows([0.5, 1], 2), TypeError, "index: expected integers, got 0.5"),
        (lambda: Groups.from_rows([True, 1], 2), TypeError, "index: expected integers, got True"),
        (
            lambda: Groups.from_rows(torch.ones(2).bool(), 2),
            TypeError,
            "index: expected an integer",
        ),
        (lambda: Groups.from_rows([0, 1], 2.0), TypeError, "count: expected an integer, got float"),
        (
            lambda: Groups.from_segments(torch.tensor([2.0, 3.0])),
            TypeError,
            "lengths: expected an integer tensor, got torch.float32",
        ),
        (lambda: Groups.from_segments([2.0, 3]), TypeError, "lengths: expected integers, got 2.0"),
        (
            lambda: Groups.from_segments([2, 3], [0.0, 1]),
            TypeError,
            "groups: expected integers, got 0.0",
        ),
        (
            lambda: Groups.from_segments(torch.tensor([[2], [3]])),
            ValueError,
            "lengths: expected shape [S], got (2, 1)",
        ),
        (
            lambda: Groups.from_names(["a"], ["a"], 2.5),
            TypeError,
            "rows_per_sample: expected integers, got 2.5",
        ),
        (lambda: Groups.from_rows([0], 0), ValueError, "count: expected at least one"),
        (lambda: Groups.from_segments([1, -1]), ValueError, "lengths: expected at least 0, got -1"),
        (lambda: Groups.from_segments([1, 1], [0]), ValueError, "one of each of 2 segments, got 1"),
        (lambda: Groups.from_segments([1, 1], [0, 2]), ValueError, "groups of -1 to 1, got 2"),
        (lambda: Groups.from_segments([]), ValueError, "count: expected at least one"),
        (
            lambda: Groups.from_names(["x"], ["a", "b"]),
            ValueError,
            "got 'x', known adapters are 'a', 'b'",
        ),
        (lambda: Groups.from_names(["a"], ["a"], [1, 2]), ValueError, "one of each of 1 samples"),
    ],
)
def test_groups_that_cannot_be(make, error, words):
    with pytest.raises(error) as caught:
        make()
    assert words in str(caught.value)


# --------------------------------------------------------------------------------------- bad inputs

WRONG = {
    "rows": ({"x": randn(5, 24)}, ValueError, "groups: expected those of 5 rows, got 13"),
    "groups": ({"groups": INDEX}, TypeError, "groups: expected Groups, got list"),
    "count": ({"groups": Groups.from_rows(INDEX, 4)}, ValueError, "one of each of 4 groups, got 3"),
    "past": ({"groups": Groups.from_segments([9, 9, 9])}, ValueError, "at most the 13 rows"),
    "K": ({"weight": randn(20, 23)}, ValueError, "weight: expected shape [N, K]"),
    "a": ({"a": [randn(3, 24), randn(5, 24), randn(2, 23)]}, ValueError, "lora_a[2]: expected"),
    "b": ({"b": [randn(20, 3), randn(20, 4), randn(20, 2)]}, ValueError, "lora_b[1]: expected"),
    "ranks": (
        {"a": randn(3, 4, 24), "b": randn(3, 20, 5)},
        ValueError,
        "lora_b[0]: expected shape [N, r] = [20, 4], got (20, 5)",
    ),
    "stack": ({"a": randn(3, 24)}, ValueError, "lora_a: expected a stack of 3 dimensions"),
    "bias": ({"bias": randn(19)}, ValueError, "bias: expected shape (20,)"),
    "dtype": ({"weight": randn(20, 24).half()}, TypeError, "weight: expected x's dtype"),
    "adapters": (
        {"a": [randn(r, 24).half() for r in (3, 5, 2)]}, TypeError, "lora_a[0]: expected x's dtype"
    ),
    "integers": ({"x": torch.ones(13, 24, dtype=torch.int64)}, TypeError, "x: expected float32"),
    "scaling": ({"scaling": [1.0]}, ValueError, "scaling: expected one of each of 3 groups"),
    "infinite": ({"scaling": float("inf")}, ValueError, "scaling: expected a finite number"),
    "p": ({"dropout_p": 1.0}, ValueError, "dropout_p: expected a probability"),
    "seed": ({"dropout_p": 0.1, "seed": [1]}, ValueError, "seed: expected an int of 64 bits"),
    "seeds": (
        {"dropout_p": 0.1, "seed": torch.zeros(2).long()}, ValueError, "int64 tensor [3]"
    ),
    "one weight": ({"weight_of": [0, 0, 0]}, ValueError, "weight_of: expected None"),
    "experts": ({"weight": randn(2, 20, 24), "bias": None}, ValueError, "say which is whose"),
    "half an expert": (
        {"weight": randn(2, 20, 24), "bias": None, "weight_of": [0, 1.5, 0]},
        TypeError,
        "weight_of: expected integers, got 1.5",
    ),
    "no expert": (
        {"weight": randn(2, 20, 24), "bias": None, "weight_of": [0, 1, 2]},
        ValueError,
        "weight_of: expected one of 2 experts",
    ),
    "device": ({"weight": torch.empty(20, 24, device="meta")}, ValueError, "x's device cpu"),
    "groups elsewhere": (
        {"groups": Groups.from_rows(INDEX, 3).to("meta")}, ValueError, "move them with groups.to"
    ),
    "no tensor": ({"weight": None}, TypeError, "weight: expected a Tensor, got NoneType"),
    "no tensors": ({"a": [None] * 3}, TypeError, "lora_a[0]: expected a Tensor, got NoneType"),
    "sparse": ({"x": randn(13, 24).to_sparse()}, ValueError, "x: expected a dense tensor"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_refused_by_name(name):
    change, error, words = WRONG[name]
    made = batch(INDEX)
    given = {
        "x": made.x, "weight": made.weight, "a": made.a, "b": made.b, "groups": made.groups,
        "bias": made.bias, **change,
    }  # fmt: skip
    arguments = [given.pop(k) for k in ("x", "weight", "a", "b", "groups", "bias")]
    with pytest.raises(error) as caught:
        lora_linear_grouped(*arguments, **given)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "offsets", [[0, 5, 7, 11], [0, 7, 5, 11, 13], [1, 5, 7, 11, 13], [0, 5, 7, 11, 14]]
)
def test_offsets_of_a_stranger_read_nothing_outside(offsets):
    made = batch(INDEX)
    rest = (made.groups.order, torch.tensor(offsets), None, [1.0] * 3, 0.0, None, False)
    with pytest.raises(ValueError, match=r"offsets|groups|order"):
        ops.lora_linear_grouped(made.x, made.weight, made.a, made.b, made.bias, None, *rest)
