"""The way past the op: one native call of few rows of many adapters, without gradients.

What is checked of each group is checked in that call; here nothing is done for each. A call that it
does not take, or that somebody might see, gets the op, whose checks name what is wrong.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_kernels import _dispatch, backends
from lora_kernels.grouped.groups import Groups

_NUMBERS = frozenset((float, int))
Stack = Tensor | Sequence[Tensor]


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
        if torch.is_grad_enabled() and _dispatch.any_requires_grad(x, weight, bias, *a, *b):
            return None
        if not x.is_cpu or x.dtype != weight.dtype or weight.dim() != 2:
            return None
        few = backends.few_rows()
        if few is None:
            return None
        if x.numel() > few.most(weight, False) * weight.shape[1]:
            return None
        if groups.rows is not None and groups.rows * weight.shape[1] != x.numel():
            return None
        factors = [scaling] * groups.count if type(scaling) in _NUMBERS else scaling
        if not _NUMBERS.issuperset(map(type, factors)):  # type: ignore[arg-type]  # iterable now
            return None
        order = None if groups.in_order else groups.order
        y: Tensor = few.grouped(x, weight, a, b, order, groups.bounds, bias, factors, few.isa)
        if groups.bounds[-2] < groups.bounds[-1]:
            _freeze_rows(y, x, weight, bias, groups)
    except (RuntimeError, TypeError):  # the checks by name say more
        return None
    return y


def _freeze_rows(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, groups: Groups) -> None:
    """Gives the rows of no group the bits of torch's own layer."""
    begin, end = groups.bounds[-2:]  # type: ignore[index]  # known, as the caller has seen
    rows = slice(begin, end) if groups.order is None else groups.order[begin:end]
    N, K = weight.shape
    y.view(-1, N)[rows] = F.linear(x.reshape(-1, K), weight, bias)[rows]
