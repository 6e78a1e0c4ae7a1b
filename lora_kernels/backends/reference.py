"""The op as ATen calls: every device and dtype, the default of every op and the fallback of every
backend.

Shapes: x [M,K], weight [N,K], lora_a [r,K], lora_b [N,r], bias [N], dy and y [M,N]; adapters in x's
dtype or fp32 and a weight of another dtype than x (autocast) are rounded to x's dtype at use.

Nothing of size M x N, M x K or N x K is allocated beside the outputs. Dropout and CPUs without fast
half-precision products need such temporaries: `blocked` works through the rows for them.
"""

import torch
from torch import Tensor

from lora_kernels.backends import blocked

_RANK_FIRST_ROWS = 128


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
        dtype = x.dtype
        s = _scaled_product(x, lora_a.to(dtype).t(), scaling)
        w_t = weight.to(dtype).t()
        y = torch.mm(x, w_t) if bias is None else torch.addmm(bias.to(dtype), x, w_t)
        y.addmm_(s, lora_b.to(dtype).t())
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
    s = _scaled_product(x, lora_a.to(x.dtype).t(), scaling)
    y.addmm_(s, lora_b.to(x.dtype).t())
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
    none = dy.new_empty(0)
    dweight = none if weight is None else weight.new_empty(0)
    dx, d_a, d_b = none, lora_a.new_empty(0), lora_b.new_empty(0)
    if dropout_p or blocked.is_wide(dy):
        if need_weight:
            dweight = blocked.weight_gradient(dy, x, weight)
        grads = blocked.backward(
            dy, x, weight, lora_a, lora_b, s, scaling, dropout_p, seed, need_x, need_a, need_b
        )
        dx, d_a, d_b = (
            kept if kept is not None else size_0
            for kept, size_0 in zip(grads, (dx, d_a, d_b), strict=True)
        )
        return dx, dweight, d_a, d_b
    dtype = dy.dtype
    # CPU BLAS is several times faster with many rows if r comes first in these; both copies are
    # rank-sized.
    rank_first = dy.device.type == "cpu" and dy.shape[0] >= _RANK_FIRST_ROWS
    if need_x or need_a:
        b = lora_b.to(dtype)
        ds = _scaled_product(dy, b.t().contiguous().t() if rank_first else b, scaling)
    if need_x:
        a = lora_a.to(dtype)
        dx = torch.mm(ds, a) if weight is None else torch.mm(dy, weight.to(dtype)).addmm_(ds, a)
    if need_weight:
        dweight = torch.mm(dy.t(), x).to(weight.dtype)
    if need_a:
        d_a = torch.mm(ds.t(), x).to(lora_a.dtype)
    if need_b:
        d_b = torch.mm(s.t(), dy).t().contiguous() if rank_first else torch.mm(dy.t(), s)
        d_b = d_b.to(lora_b.dtype)
    return dx, dweight, d_a, d_b


def _scaled_product(rows: Tensor, matrix: Tensor, scaling: float) -> Tensor:
    """scaling * rows @ matrix, scaled before it is rounded."""
    unread = rows.new_empty(rows.shape[0], matrix.shape[1])
    return torch.addmm(unread, rows, matrix, beta=0, alpha=scaling)
