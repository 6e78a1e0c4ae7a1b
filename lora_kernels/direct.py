"""The way past the op: a call that nobody else sees goes straight to the kernel of the whole layer.

The op costs tens of microseconds of Python and dispatcher, more than a small layer computes. Here a
call costs a look at who might listen, then one call of the backend, forward or backward: of few
rows all in C++, of more what the op would call. Whoever listens gets the op; so does every call
that the kernels do not take.
"""

import sys
from typing import Any

import torch
from torch import Tensor

from lora_kernels import _checks, _dispatch, backends
from lora_kernels.backends.native import ManyRows
from lora_kernels.backends.native import quantized as native
from lora_kernels.backends.native.extension import DTYPES
from lora_kernels.backends.native.few_rows import FewRows, Rows
from lora_kernels.branch import Need
from lora_kernels.weights import QuantizedWeight

_NUMBERS = (float, int)
_LARGEST = sys.float_info.max

# lora_a, lora_b, scaling and the probability of dropout.
Pair = tuple[Tensor | None, Tensor | None, float | Tensor, float]
FROZEN: Pair = (None, None, 1.0, 0.0)
_MANY = ManyRows()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, pair: Pair) -> Tensor | None:
    """What `lora_linear` returns, or by the pair FROZEN the plain layer; the caller knows that
    nothing is compiled. None where something might see the op, the arguments do not fit together or
    ask for other gradients than of x and the pair, or the plain layer has more than few rows.
    """
    a, b, scaling, p = pair
    if not _dispatch.is_unwatched(x, weight, a, b, bias) or not x.is_cpu:
        return None
    if x.dtype != weight.dtype:  # the kernel takes a wider one, as autocast leaves it
        return None
    few = backends.few_rows()
    if few is None or type(scaling) not in _NUMBERS or type(p) not in _NUMBERS:
        return None
    if isinstance(scaling, Tensor) or not (abs(scaling) <= _LARGEST and 0 <= p < 1):
        return None
    y: Tensor
    try:
        trains = torch.is_grad_enabled() and _dispatch.any_requires_grad(x, weight, a, b, bias)
        calls: FewRows | ManyRows = few
        if x.numel() > few.most(weight, trains) * weight.shape[-1]:
            if a is None or b is None or x.dtype not in DTYPES:
                return None
            if not _checks.are_sound(x, a, b, weight, bias, linear=True):
                return None
            calls = _MANY
        if trains:
            if a is None or weight.requires_grad or (bias is not None and bias.requires_grad):
                return None
            if x.numel() == 0:
                return None
            y = _apply(calls, x, weight, a, b, bias, scaling, p, draw_seed(x.device) if p else None)
            return y
        if p or calls is _MANY:
            seed = draw_seed(x.device) if p else None
            return calls.forward(x, weight, bias, (a, b, scaling, p, seed), False)[0]
        y = few.linear(x, weight, a, b, bias, scaling, 1.0, 0, None, few.isa, None)
        return y
    except RuntimeError:  # the checks by name say more
        return None


def quantized(x: Tensor, weight: QuantizedWeight, bias: Tensor | None, pair: Pair) -> Tensor | None:
    """`linear` on a quantised weight, where no gradient is asked for and nothing is dropped."""
    a, b, scaling, p = pair
    given = x if a is None else a
    if p or type(scaling) not in _NUMBERS or isinstance(scaling, Tensor):
        return None
    if not _dispatch.is_unwatched(x, given, b, bias) or not x.is_cpu or x.numel() == 0:
        return None
    if torch.is_grad_enabled() and _dispatch.any_requires_grad(x, a, b, bias):
        return None
    if backends.few_rows() is None or not abs(scaling) <= _LARGEST:
        return None
    if x.numel() > native.most_rows(weight, x.dtype) * weight.shape[1]:
        return None
    try:
        return native.call(x, weight, bias, (a, b, scaling))
    except RuntimeError:  # the checks by name say more
        return None


def draw_seed(device: torch.device) -> Tensor:
    """From torch's generator of the device."""
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, few: FewRows | ManyRows, x: Tensor, weight: Tensor, a: Tensor, b: Tensor,
        bias: Tensor | None, *others: Any,
    ) -> Tensor:  # fmt: skip
        _, _, _, need_a, need_b, *_ = ctx.needs_input_grad
        y, s = few.forward(x, weight, bias, (a, b, *others), need_b)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if need_a else None, weight, a, b, s, others[2])
        ctx.few, ctx.others = few, others[:2]
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 9
        x, weight, a, b, s, seed = ctx.saved_tensors
        _, need_x, _, need_a, need_b, *_ = ctx.needs_input_grad
        need, branch = Need(need_x, False, need_a, need_b), (a, b, *ctx.others, seed)
        watched = torch.is_grad_enabled() or not _dispatch.is_unwatched(dy, weight, a, b, x)
        compute = _by_op if watched else ctx.few.backward
        dx, d_a, d_b = compute(weight, Rows(dy, x, s), branch, need)
        return None, dx, None, d_a, d_b, None, None, None, None


_apply: Any = _Linear.apply


def _by_op(
    weight: Tensor, rows: Rows, branch: tuple[Any, ...], need: Need
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients, for whoever watches a backward alone."""
    dy, x, s = rows
    N, K = weight.shape
    dx, _, d_a, d_b = _dispatch.call_backward(
        "lora_linear_backward", dy.reshape(-1, N), None if x is None else x.reshape(-1, K), weight,
        *branch[:2], s, *branch[2:], *need,
    )  # fmt: skip
    dx = dx.view(*dy.shape[:-1], K) if need.x and dx is not None else None
    return dx, d_a if need.a else None, d_b if need.b else None
