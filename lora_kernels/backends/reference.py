"""The op as ATen calls: every device and dtype, the default of every op and the fallback of every
backend.

Shapes: x [M,K], weight [N,K], lora_a [r,K], lora_b [N,r], bias [N], dy and y [M,N]; adapters in x's
dtype or fp32 and a weight of another dtype than x (autocast) are rounded to x's dtype at use.

Nothing of size M x N or M x K is allocated beside the outputs, for more than a few rows. Dropout
and CPUs without fast half-precision products need such temporaries: `blocked` works through the
rows for them.
"""

import functools

import torch
from torch import Tensor
from torch.nn.functional import linear

from lora_kernels.backends import blocked
from lora_kernels.backends.scaling import split

_RANK_FIRST_ROWS = 128
_FEW_ROWS = 64


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    save_s: bool,
    save_mask: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, s, mask). The mask is always of size 0 here: backward regenerates it from the seed."""
    if dropout_p or blocked.is_wide(x, forward=True):
        y, s = blocked.lora_linear(x, weight, lora_a, lora_b, bias, scaling, dropout_p, seed)
    else:
        low, high = split(scaling, x.dtype)
        s = _scaled_product(x, _as(lora_a, x).t(), low)
        y = _base(x, _as(weight, x), None if bias is None else _as(bias, x))
        y.addmm_(s, _as(lora_b, x).t(), alpha=high)
    return y, s if save_s else x.new_empty(0), x.new_empty(0)


def lora_add_(
    base_out: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
) -> None:
    """Adds the low-rank branch to base_out [M,N] in place."""
    _add_branch(base_out, x, lora_a, lora_b, scaling, dropout_p, seed)


def lora_add(
    base_out: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    save_s: bool,
    save_mask: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, s, mask) as `lora_linear`, on top of a base output [M,N] computed elsewhere."""
    y = base_out.clone(memory_format=torch.contiguous_format)
    s = _add_branch(y, x, lora_a, lora_b, scaling, dropout_p, seed)
    return y, s if save_s else x.new_empty(0), x.new_empty(0)


def _add_branch(y, x, lora_a, lora_b, scaling, dropout_p, seed) -> Tensor:
    """y += s B^T; returns s."""
    if dropout_p or blocked.is_wide(x):
        return blocked.add_branch(y, x, lora_a, lora_b, scaling, dropout_p, seed)
    low, high = split(scaling, x.dtype)
    s = _scaled_product(x, _as(lora_a, x).t(), low)
    y.addmm_(s, _as(lora_b, x).t(), alpha=high)
    return s


def lora_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    s: Tensor,
    mask: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    need_x: bool,
    need_weight: bool,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dweight, dA, dB), each of size 0 where not needed; x is read for dweight and dA only."""
    return _backward(
        dy,
        x,
        weight,
        lora_a,
        lora_b,
        s,
        scaling,
        dropout_p,
        seed,
        need_x,
        need_weight,
        need_a,
        need_b,
    )


def lora_add_backward(
    dy: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    s: Tensor,
    mask: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    need_x: bool,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dA, dB) of the branch alone, each of size 0 where not needed; x is read for dA only."""
    dx, _, d_a, d_b = _backward(
        dy, x, None, lora_a, lora_b, s, scaling, dropout_p, seed, need_x, False, need_a, need_b
    )
    return dx, d_a, d_b


def _backward(
    dy, x, weight, lora_a, lora_b, s, scaling, dropout_p, seed, need_x, need_weight, need_a, need_b
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx = dweight = d_a = d_b = None
    if dropout_p or blocked.is_wide(dy):
        dx, d_a, d_b = blocked.backward(
            dy, x, weight, lora_a, lora_b, s, scaling, dropout_p, seed, need_x, need_a, need_b
        )
        if need_weight:
            dweight = blocked.weight_gradient(dy, x, weight)
    else:
        dx, dweight, d_a, d_b = _whole_backward(
            dy, x, weight, lora_a, lora_b, s, scaling, need_x, need_weight, need_a, need_b
        )
    return (
        dy.new_empty(0) if dx is None else dx,
        (dy if weight is None else weight).new_empty(0) if dweight is None else dweight,
        lora_a.new_empty(0) if d_a is None else d_a,
        lora_b.new_empty(0) if d_b is None else d_b,
    )


def _whole_backward(
    dy, x, weight, lora_a, lora_b, s, scaling, need_x, need_weight, need_a, need_b
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    dx = dweight = d_a = d_b = None
    # CPU BLAS is several times faster with many rows if r comes first in these; both copies are
    # rank-sized.
    rank_first = dy.device.type == "cpu" and dy.shape[0] >= _RANK_FIRST_ROWS
    if need_x or need_a:
        b = _as(lora_b, dy)
        ds = _scaled_product(dy, b.t().contiguous().t() if rank_first else b, scaling)
    if need_x:
        a = _as(lora_a, dy)
        dx = torch.mm(ds, a) if weight is None else torch.mm(dy, _as(weight, dy)).addmm_(ds, a)
    if need_weight:
        dweight = _as(torch.mm(dy.t(), x), weight)
    if need_a:
        d_a = _as(torch.mm(ds.t(), x), lora_a)
    if need_b:
        _, high = split(scaling, dy.dtype)
        product = functools.partial(_scaled_product, scaling=high) if high != 1 else torch.mm
        d_b = product(s.t(), dy).t().contiguous() if rank_first else product(dy.t(), s)
        d_b = _as(d_b, lora_b)
    return dx, dweight, d_a, d_b


def _as(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor in the dtype of another; a `to` that changes nothing costs a microsecond."""
    return tensor if tensor.dtype == like.dtype else tensor.to(like.dtype)


def _base(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The frozen layer. Between a vector and many rows CPU BLAS takes 0.5 to 0.9 of the time if the
    long side comes first; the copy that costs is of few rows."""
    few = x.device.type == "cpu" and x.dtype == torch.float32 and 1 < x.shape[0] <= _FEW_ROWS
    if not few:
        return linear(x, weight, bias)
    x_t = x.t()
    y_t = torch.mm(weight, x_t) if bias is None else torch.addmm(bias[:, None], weight, x_t)
    return y_t.t().contiguous()


def _scaled_product(rows: Tensor, matrix: Tensor, scaling: float) -> Tensor:
    """scaling * rows @ matrix, scaled before it is rounded."""
    unread = rows.new_empty(rows.shape[0], matrix.shape[1])
    return torch.addmm(unread, rows, matrix, beta=0, alpha=scaling)
