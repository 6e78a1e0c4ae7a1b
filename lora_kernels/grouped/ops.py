"""The grouped ops as torch sees them: schemas, kernels, fakes, autograd.

x [M,K], y and base_out [M,N], lora_a G tensors [r_g,K], lora_b G tensors [N,r_g], seeds int64 [G];
weight [N,K] with bias [N], or [E,N,K] with bias [E,N] and weight_of [G]. order, offsets and bounds
are those of `Groups`; bounds may be None. s [M, the largest r] begins with the rows of groups, in
their order; its other elements are zero.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels import _dispatch
from lora_kernels._dispatch import refuse_forward_mode
from lora_kernels._namespace import ops
from lora_kernels.branch import Dense, Experts, Given, Needs, only
from lora_kernels.grouped import composite
from lora_kernels.grouped.composite import Adapters, Members
from lora_kernels.rules import flops

_ADAPTERS = "Tensor[] lora_a, Tensor[] lora_b"
_GROUPS = "Tensor? order, Tensor offsets, int[]? bounds"
_BRANCH = "float[] scaling, float dropout_p, Tensor? seeds"
_SCHEMAS = {
    "lora_linear_grouped": f"(Tensor x, Tensor weight, {_ADAPTERS}, Tensor? bias, int[]? weight_of,"
    f" {_GROUPS}, {_BRANCH}, bool save_s) -> (Tensor y, Tensor s)",
    "lora_add_grouped": f"(Tensor base_out, Tensor x, {_ADAPTERS}, {_GROUPS}, {_BRANCH},"
    " bool save_s) -> (Tensor y, Tensor s)",
    "lora_linear_grouped_backward": f"(Tensor dy, Tensor x, Tensor weight, {_ADAPTERS}, Tensor?"
    f" bias, Tensor s, int[]? weight_of, {_GROUPS}, {_BRANCH}, bool need_x, bool need_weight,"
    " bool need_bias, bool[] need_a, bool[] need_b)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor[] da, Tensor[] db)",
    "lora_add_grouped_backward": f"(Tensor dy, Tensor x, {_ADAPTERS}, Tensor s, {_GROUPS},"
    f" {_BRANCH}, bool need_x, bool[] need_a, bool[] need_b)"
    " -> (Tensor dx, Tensor[] da, Tensor[] db)",
}
for _name, _schema in _SCHEMAS.items():
    _dispatch.define(_name, _schema)


class Call(NamedTuple):
    """What both ops have in common."""

    lora_a: list[Tensor]
    lora_b: list[Tensor]
    order: Tensor | None
    offsets: Tensor
    bounds: Sequence[int] | None
    scaling: list[float]
    dropout_p: float
    seeds: Tensor | None

    def members(self, rows: Tensor) -> Members:
        """Checked against the rows of a call: offsets are the caller's own."""
        bounds, groups = self.bounds or self.offsets.tolist(), len(self.lora_a)
        ordered = all(a <= b for a, b in pairwise(bounds))
        if len(bounds) != groups + 2 or bounds[0] != 0 or not ordered:
            raise ValueError(
                f"offsets: expected {groups + 2} for {groups} groups, from 0 on and rising,"
                f" got {list(bounds)}"
            )
        if bounds[-1] > rows.shape[0]:
            raise ValueError(
                f"groups: expected at most the {rows.shape[0]} rows of x, got {bounds[-1]}"
            )
        if self.order is not None and len(self.order) != bounds[-1]:
            raise ValueError(f"order: expected {bounds[-1]} rows, got {len(self.order)}")
        return Members(self.order, bounds, self.offsets)

    def adapters(self) -> Adapters:
        return Adapters(self.lora_a, self.lora_b, self.scaling, self.dropout_p, self.seeds)


def _base(weight: Tensor, bias: Tensor | None, weight_of: list[int] | None) -> Dense | Experts:
    return Dense(weight, bias) if weight.dim() == 2 else Experts(weight, bias, weight_of or [])


def whole(tensor: Tensor | None, like: Tensor) -> Tensor:
    """The tensor, or one of size 0."""
    return like.new_empty(0) if tensor is None else tensor


def _all(tensors: Sequence[Tensor | None], likes: Sequence[Tensor]) -> list[Tensor]:
    return [whole(tensor, like) for tensor, like in zip(tensors, likes, strict=True)]


# ------------------------------------------------------------------------------------------ kernels


def _without_autocast(device: torch.device) -> torch.autocast:
    """Dtypes are settled above the op."""
    return torch.autocast(device.type, enabled=False)


def linear(x: Tensor, weight: Tensor, a: Any, b: Any, bias: Any, weight_of: Any, *rest: Any) -> Any:
    call, save_s = Call(a, b, *rest[:-1]), rest[-1]
    refuse_forward_mode((x, weight, bias, *a, *b))
    with _without_autocast(x.device):
        y, s = composite.forward(
            _base(weight, bias, weight_of), x, call.adapters(), call.members(x), save_s
        )
    return y, whole(s, x)


def add(base_out: Tensor, x: Tensor, a: Any, b: Any, *rest: Any) -> Any:
    call, save_s = Call(a, b, *rest[:-1]), rest[-1]
    refuse_forward_mode((base_out, x, *a, *b))
    with _without_autocast(x.device):
        y, s = composite.forward(Given(base_out), x, call.adapters(), call.members(x), save_s)
    return y, whole(s, x)


def linear_backward(
    dy: Tensor, x: Tensor, weight: Tensor, a: Any, b: Any, bias: Any, s: Tensor, *rest: Any
) -> Any:
    weight_of, call, needs = rest[0], Call(a, b, *rest[1:7]), Needs(*rest[7:])
    base = _base(weight, bias, weight_of)
    with _without_autocast(dy.device):
        dx, dw, dbias, d_a, d_b = composite.backward(
            base, (dy, x, s), call.adapters(), call.members(dy), needs
        )
    d_bias = whole(dbias, weight if bias is None else bias)
    return whole(dx, dy), whole(dw, weight), d_bias, _all(d_a, a), _all(d_b, b)


def _add_backward(dy: Tensor, x: Tensor, a: Any, b: Any, s: Tensor, *rest: Any) -> Any:
    call, (need_x, need_a, need_b) = Call(a, b, *rest[:6]), rest[6:]
    needs = Needs(need_x, False, False, need_a, need_b)
    with _without_autocast(dy.device):
        dx, _, _, d_a, d_b = composite.backward(
            Given(None), (dy, x, s), call.adapters(), call.members(dy), needs
        )
    return whole(dx, dy), _all(d_a, a), _all(d_b, b)


# -------------------------------------------------------------------------------------------- fakes


def _fake_s(x: Tensor, call: Call, save_s: bool) -> Tensor:
    if not save_s:
        return x.new_empty(0)
    return x.new_empty(x.shape[0], max(a.shape[0] for a in call.lora_a))


def _fake_linear(x: Tensor, weight: Tensor, a: Any, b: Any, *rest: Any) -> Any:
    call, save_s = Call(a, b, *rest[2:-1]), rest[-1]
    return x.new_empty(x.shape[0], weight.shape[-2]), _fake_s(x, call, save_s)


def _fake_add(base_out: Tensor, x: Tensor, a: Any, b: Any, *rest: Any) -> Any:
    call, save_s = Call(a, b, *rest[:-1]), rest[-1]
    return base_out.new_empty(base_out.shape), _fake_s(x, call, save_s)


def _likes(tensors: list[Tensor], needs: list[bool]) -> list[Tensor]:
    return [t.new_empty(t.shape if need else (0,)) for t, need in zip(tensors, needs, strict=True)]


def _fake_linear_backward(dy: Tensor, x: Tensor, weight: Tensor, a: Any, b: Any, *rest: Any) -> Any:
    bias, (need_x, need_weight, need_bias, need_a, need_b) = rest[0], rest[-5:]
    K = weight.shape[-1]
    biases = weight if bias is None else bias
    return (
        dy.new_empty((dy.shape[0], K) if need_x else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
        biases.new_empty(biases.shape if need_bias else (0,)),
        _likes(a, need_a),
        _likes(b, need_b),
    )


def _fake_add_backward(dy: Tensor, x: Tensor, a: Any, b: Any, *rest: Any) -> Any:
    need_x, need_a, need_b = rest[-3:]
    dx = dy.new_empty((dy.shape[0], a[0].shape[1]) if need_x else (0,))
    return dx, _likes(a, need_a), _likes(b, need_b)


# ----------------------------------------------------------------------------------------- autograd


def _save(ctx: Any, rows: Tensor | None, others: Sequence[Any], call: Call, s: Tensor) -> None:
    """others: the weight and the bias, or None."""
    ctx.set_materialize_grads(False)
    ctx.groups = len(call.lora_a)
    ctx.bounds, ctx.scaling, ctx.dropout_p = call.bounds, call.scaling, call.dropout_p
    ctx.save_for_backward(
        rows, *others, s, call.order, call.offsets, call.seeds, *call.lora_a, *call.lora_b
    )


def _saved(ctx: Any) -> tuple[Any, ...]:
    """(x, weight, bias, s, call)."""
    x, weight, bias, s, order, offsets, seeds, *pairs = ctx.saved_tensors
    a, b = pairs[: ctx.groups], pairs[ctx.groups :]
    rest = (ctx.bounds, ctx.scaling, ctx.dropout_p, seeds)
    return x, weight, bias, s, Call(a, b, order, offsets, *rest)


def _save_linear(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, a, b, bias, ctx.weight_of, *rest = inputs
    ctx.mark_non_differentiable(output[1])
    reads_x = weight.requires_grad or any(one.requires_grad for one in a)
    call = Call(a, b, *rest[:-1])
    _save(ctx, x if reads_x else None, (weight, bias), call, output[1])


def _save_add(ctx: Any, inputs: Any, output: Any) -> None:
    _, x, a, b, *rest = inputs
    ctx.mark_non_differentiable(output[1])
    reads_x = any(one.requires_grad for one in a)
    _save(ctx, x if reads_x else None, (None, None), Call(a, b, *rest[:-1]), output[1])


def _linear_gradients(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    need_x, need_weight, need_a, need_b, need_bias, *_rest = ctx.needs_input_grad
    nothing = (None,) * 8
    if dy is None:
        return (None, None, [None] * ctx.groups, [None] * ctx.groups, None, *nothing)
    x, weight, bias, s, call = _saved(ctx)
    a, b, *rest = call
    dx, dw, dbias, d_a, d_b = ops.lora_linear_grouped_backward(
        dy, whole(x, dy), weight, a, b, bias, s, ctx.weight_of, *rest,
        need_x, need_weight, need_bias, need_a, need_b,
    )  # fmt: skip
    wanted = only((need_x, need_weight, need_bias), (dx, dw, dbias))
    return (*wanted[:2], only(need_a, d_a), only(need_b, d_b), wanted[2], *nothing)


def _add_gradients(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    need_base, need_x, need_a, need_b, *_rest = ctx.needs_input_grad
    nothing = (None,) * 7
    if dy is None:
        return (None, None, [None] * ctx.groups, [None] * ctx.groups, *nothing)
    x, _, _, s, call = _saved(ctx)
    a, b, *rest = call
    d_x, d_a, d_b = ops.lora_add_grouped_backward(
        dy, whole(x, dy), a, b, s, *rest, need_x, need_a, need_b
    )
    base = dy if need_base else None
    return (base, d_x if need_x else None, only(need_a, d_a), only(need_b, d_b), *nothing)


# -------------------------------------------------------------------------------------------- flops


def _ranks(a: Any, bounds: Sequence[int] | None, rows: int) -> int:
    """Of every row the rank of its group, in all; where they are not known, as if all had the
    first."""
    if bounds is None:
        return int(rows * a[0][0])
    sizes = (end - begin for begin, end in pairwise(bounds))
    return sum(size * shape[0] for size, shape in zip(sizes, a, strict=False))


def _linear_flops(x: Any, weight: Any, a: Any, b: Any, *rest: Any, **_: object) -> int:
    bounds, (M, K), N = rest[4], x, weight[-2]
    flops: int = 2 * (M * K * N + _ranks(a, bounds, M) * (K + N))
    return flops


def _add_flops(base_out: Any, x: Any, a: Any, b: Any, *rest: Any, **_: object) -> int:
    (M, N), K = base_out, x[1]
    flops: int = 2 * _ranks(a, rest[2], M) * (K + N)
    return flops


def _linear_backward_flops(
    dy: Any, x: Any, weight: Any, a: Any, b: Any, *rest: Any, **_: object
) -> int:
    (M, N), K, needs = dy, weight[-1], Needs(*rest[-5:])
    ranks = _ranks(a, rest[5], M)
    flops: int = 2 * (M * K * N * (needs.x + needs.weight) + ranks * _branch_flops(needs, K, N))
    return flops


def _add_backward_flops(dy: Any, x: Any, a: Any, b: Any, *rest: Any, **_: object) -> int:
    (M, N), K, (need_x, need_a, need_b) = dy, a[0][1], rest[-3:]
    needs = Needs(need_x, False, False, need_a, need_b)
    return 2 * _ranks(a, rest[3], M) * _branch_flops(needs, K, N)


def _branch_flops(needs: Needs, K: int, N: int) -> int:
    """For each rank of each row, were the same asked for of all groups."""
    a, b = any(needs.a), any(needs.b)
    return N * (needs.x or a) + K * needs.x + K * a + N * b


_NO_VMAP = "grouped ops under vmap are not supported; make the batch more rows"
for _name, _kernel, _fake, _flops, _formula in (
    (
        "lora_linear_grouped",
        linear,
        _fake_linear,
        _linear_flops,
        (_save_linear, _linear_gradients),
    ),
    ("lora_add_grouped", add, _fake_add, _add_flops, (_save_add, _add_gradients)),
    (
        "lora_linear_grouped_backward",
        linear_backward,
        _fake_linear_backward,
        _linear_backward_flops,
        None,
    ),
    ("lora_add_grouped_backward", _add_backward, _fake_add_backward, _add_backward_flops, None),
):
    flops.add(_name, _flops)
    _dispatch.register(_name, _kernel, _fake, _formula, _NO_VMAP)
