"""The op as ATen calls: every device and dtype, the default of every op and the fallback of every
backend.

The arguments are those of `lora_kernels.branch`; adapters in x's dtype or fp32 and a weight of
another dtype than x (autocast) are rounded to x's dtype at use.

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
from lora_kernels.branch import Base, Branch, Dense, Need

_RANK_FIRST_ROWS = 512, 1024  # of 16 bits
_FEW_ROWS = 48

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def lacks(device: torch.device) -> str | None:
    """None: it serves every call."""
    return None


def default(device: torch.device) -> tuple[bool, str]:
    return True, "ATen composite, the default of every device"


def refusal(rows: Tensor) -> str | None:
    """None."""
    return None


def leaves(base: Base, rows: Tensor, branch: Branch) -> str | None:
    """None."""
    return None


def forward(base: Base, x: Tensor, branch: Branch, save_s: bool) -> tuple[Tensor, Tensor | None]:
    """(y, s)."""
    if not isinstance(base, Dense):
        assert base.out is not None  # of a forward
        y = base.out.clone(memory_format=torch.contiguous_format)
        s = add_branch(y, x, branch)
    elif branch.dropout_p or blocked.is_wide(x, forward=True):
        y, s = blocked.forward(base, x, branch)
    else:
        low, high = split(branch.scaling, x.dtype)
        s = scaled_product(x, _as(branch.lora_a, x).t(), low)
        y = _base(x, _as(base.weight, x), None if base.bias is None else _as(base.bias, x))
        y.addmm_(s, _as(branch.lora_b, x).t(), alpha=high)
    return y, s if save_s else None


def add_(base_out: Tensor, x: Tensor, branch: Branch) -> Tensor:
    """Adds the low-rank branch to base_out [M,N] in place; returns s."""
    return add_branch(base_out, x, branch)


def backward(base: Base, dy: Tensor, x: Tensor, s: Tensor, branch: Branch, need: Need) -> Gradients:
    """(dx, dweight, dA, dB), None where not needed; without a weight dx is the branch's alone."""
    if not branch.dropout_p and not blocked.is_wide(dy):
        return _whole_backward(base, dy, x, s, branch, need)
    dx, d_a, d_b = blocked.backward(base, dy, x, s, branch, need)
    dweight = None
    if need.weight and isinstance(base, Dense):
        dweight = blocked.weight_gradient(dy, x, base.weight)
    return dx, dweight, d_a, d_b


def add_branch(y: Tensor, x: Tensor, branch: Branch) -> Tensor:
    """y += s B^T; returns s."""
    if branch.dropout_p or blocked.is_wide(x):
        return blocked.add_branch(y, x, branch)
    low, high = split(branch.scaling, x.dtype)
    s = scaled_product(x, _as(branch.lora_a, x).t(), low)
    y.addmm_(s, _as(branch.lora_b, x).t(), alpha=high)
    return s


def _whole_backward(
    base: Base, dy: Tensor, x: Tensor, s: Tensor, branch: Branch, need: Need
) -> Gradients:
    dx = dweight = d_a = d_b = None
    # CPU BLAS is faster with many rows if r comes first in these; both copies are rank-sized.
    rank_first = dy.device.type == "cpu" and dy.shape[0] >= _RANK_FIRST_ROWS[dy.dtype.itemsize == 2]
    if need.x or need.a:
        b = _as(branch.lora_b, dy)
        turned = rank_first and dy.dtype.itemsize > 2
        ds = scaled_product(dy, b.t().contiguous().t() if turned else b, branch.scaling)
    if need.x:
        a = _as(branch.lora_a, dy)
        if isinstance(base, Dense):
            dx = torch.mm(dy, _as(base.weight, dy)).addmm_(ds, a)
        else:
            dx = torch.mm(ds, a)
    if need.weight and isinstance(base, Dense):
        dweight = _as(torch.mm(dy.t(), x), base.weight)
    if need.a:
        d_a = _as(torch.mm(ds.t(), x), branch.lora_a)
    if need.b:
        _, high = split(branch.scaling, dy.dtype)
        product = functools.partial(scaled_product, scaling=high) if high != 1 else torch.mm
        d_b = product(s.t(), dy).t().contiguous() if rank_first else product(dy.t(), s)
        d_b = _as(d_b, branch.lora_b)
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


def scaled_product(rows: Tensor, matrix: Tensor, scaling: float) -> Tensor:
    """scaling * rows @ matrix, scaled before it is rounded."""
    unread = rows.new_empty(rows.shape[0], matrix.shape[1])
    return torch.addmm(unread, rows, matrix, beta=0, alpha=scaling)
