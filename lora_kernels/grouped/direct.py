"""The ways past the op: one native call of few rows of many adapters, without gradients, or of more
where they are packed; and with gradients a node of autograd that takes tensors one by one, where
torch.library walks through lists for longer than the branches take.

What native calls are told of each group is checked in them; here little is done for each. A call
that they do not take, or that somebody might see, gets the op, whose checks name what is wrong.
"""

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels import _dispatch, backends
from lora_kernels._contract import DTYPES
from lora_kernels._namespace import ops as seen
from lora_kernels.backends.native import grouped as native
from lora_kernels.backends.native.choice import ANY
from lora_kernels.branch import Dense, only
from lora_kernels.grouped import composite, ops
from lora_kernels.grouped.groups import Groups

_NUMBERS = frozenset((float, int))
_LARGEST = sys.float_info.max
_MOST_ROWS = 256  # whose sums are kept in fp32 for the branches
Stack = Tensor | Sequence[Tensor]


class _Given(NamedTuple):
    x: Tensor
    weight: Tensor
    a: Sequence[Tensor]
    b: Sequence[Tensor]
    bias: Tensor | None
    groups: Groups
    factors: Any


def linear(
    x: Tensor,
    weight: Tensor,
    pair: tuple[Stack, Stack],
    groups: Groups,
    bias: Tensor | None,
    scaling: float | Sequence[float],
) -> Tensor | None:
    """What `lora_linear_grouped` returns of one weight [N,K], without dropout; None where the op is
    to say it. The caller knows that nothing is compiled."""
    if type(groups) is not Groups or groups.bounds is None:
        return None
    try:
        a, b = (each.unbind(0) if isinstance(each, Tensor) else each for each in pair)
        if not _dispatch.is_unwatched(x, weight, bias, *a, *b) or not groups.offsets.is_cpu:
            return None
        if not x.is_cpu or x.dtype != weight.dtype or weight.dim() != 2:
            return None
        if groups.rows is not None and groups.rows * weight.shape[1] != x.numel():
            return None
        factors = [scaling] * groups.count if type(scaling) in _NUMBERS else scaling
        if not _NUMBERS.issuperset(map(type, factors)):  # type: ignore[arg-type]  # iterable now
            return None
        given = _Given(x, weight, a, b, bias, groups, factors)
        if not torch.is_grad_enabled() or not _dispatch.any_requires_grad(x, weight, bias, *a, *b):
            return _inferred(given)
        return _trained(given, isinstance(pair[0], Tensor)) if _are_sound(given) else None
    except (RuntimeError, TypeError, ValueError, AttributeError):  # the checks by name say more
        return None


def _inferred(given: _Given) -> Tensor | None:
    """By a native call, which checks what it is given."""
    x, weight, a, b, bias, groups, factors = given
    few, (N, K) = backends.few_rows(), weight.shape
    if few is None:
        return None
    packs = native.packs(x.numel() // max(K, 1), N) and (bias is None or weight.stride(1) == 1)
    if x.numel() > min(few.most(weight, False), ANY if packs else _MOST_ROWS) * K:
        return None
    order, bounds = None if groups.in_order else groups.order, groups.bounds
    assert bounds is not None  # as the caller has seen
    arguments = x, weight, a, b, order, bounds, bias, factors
    y: Tensor
    if packs:
        y = few.packed(*arguments, [1.0] * groups.count, few.isa, None)
    else:
        y = few.grouped(*arguments, few.isa)
    if bounds[-2] < bounds[-1]:
        members = composite.Members(order, bounds, groups.offsets)
        rows = y.view(-1, N), Dense(weight, bias), x.reshape(-1, K)
        composite.frozen_for_nobody(*rows, members)
    return y


def _are_sound(given: _Given) -> bool:
    """Whether the arguments are such as they nearly always are, told at one look."""
    x, weight, a, b, bias, groups, factors = given
    (N, K), dtype = weight.shape, x.dtype
    if not len(a) == len(b) == len(factors) == groups.count or x.shape[-1] != K or x.numel() == 0:
        return False
    if dtype not in DTYPES or (bias is not None and (bias.shape, bias.dtype) != ((N,), dtype)):
        return False
    if not all(abs(factor) <= _LARGEST for factor in factors):
        return False
    types = (dtype,) if dtype is torch.float64 else (dtype, torch.float32)
    for one, other in zip(a, b, strict=True):
        rank, columns = one.shape
        if columns != K or rank == 0 or other.shape != (N, rank):
            return False
        if one.dtype not in types or other.dtype not in types:
            return False
    return all(
        t is None or (t.is_cpu and t.layout is torch.strided and not t.is_nested)
        for t in (x, weight, bias, *a, *b)
    )


def _trained(given: _Given, stacked: bool) -> Tensor:
    """By autograd's node, past the op; the parts of a stack are parts of one gradient."""
    x, weight, a, b, bias, groups, factors = given
    order, bounds = None if groups.in_order else groups.order, groups.bounds
    assert bounds is not None  # as the caller has seen
    if not stacked:
        a, b = with_rows(a, bounds), with_rows(b, bounds)
    saves, flat = any(each.requires_grad for each in b), x.dim() == 2
    rest = None, order, groups.offsets, bounds, factors, 0.0, None, saves
    y = trained((x if flat else x.reshape(-1, x.shape[-1]), weight, a, b, bias, *rest))
    return y if flat else y.view(*x.shape[:-1], y.shape[1])


def with_rows(tensors: Sequence[Tensor], bounds: Sequence[int]) -> list[Tensor]:
    """Without a gradient where a group has no rows: an optimizer leaves a parameter alone whose
    gradient is None."""
    return [
        t if bounds[i] < bounds[i + 1] or not t.requires_grad else t.detach()
        for i, t in enumerate(tensors)
    ]


def trained(arguments: tuple[Any, ...]) -> Tensor:
    """y [M,N] of the op's arguments, which have been checked, where nobody would see the op."""
    x, weight, a, b, bias, *rest = arguments
    y: Tensor = _apply(rest, x, weight, bias, *a, *b)
    return y


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rest: list[Any], x: Tensor, weight: Tensor, bias: Tensor | None, *pairs: Tensor
    ) -> Tensor:
        count = len(pairs) // 2
        weight_of, order, offsets, bounds, *values, seeds, _ = rest
        y, s = ops.linear(x, weight, pairs[:count], pairs[count:], bias, *rest)
        _, _, need_weight, _, *need_pairs = ctx.needs_input_grad
        reads_x = need_weight or any(need_pairs[:count])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            x if reads_x else None, weight, bias, s, order, offsets, seeds, *pairs
        )
        ctx.others = weight_of, bounds, values
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, bias, s, order, offsets, seeds, *pairs = ctx.saved_tensors
        if dy is None:
            return (None,) * (4 + len(pairs))
        weight_of, bounds, values = ctx.others
        count, (_, need_x, need_weight, need_bias, *need) = len(pairs) // 2, ctx.needs_input_grad
        watched = torch.is_grad_enabled() or not _dispatch.is_unwatched(dy, weight, x, s, *pairs)
        compute = seen.lora_linear_grouped_backward if watched else ops.linear_backward
        dx, dw, dbias, d_a, d_b = compute(
            dy, ops.whole(x, dy), weight, pairs[:count], pairs[count:], bias, s, weight_of, order,
            offsets, bounds, *values, seeds, need_x, need_weight, need_bias, need[:count],
            need[count:],
        )  # fmt: skip
        found = (dx, dw, dbias, *d_a, *d_b)
        wanted = (need_x, need_weight, need_bias, *need)
        return None, *only(wanted, found)


_apply: Any = _Linear.apply
