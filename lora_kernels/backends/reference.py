"""The op as ATen calls: every device and dtype, the default of every op and the fallback of every backend.

Shapes: x [M,K], weight [N,K], lora_a [r,K], lora_b [N,r], bias [N], dy and y [M,N]; adapters in x's
dtype or fp32 and a weight of another dtype than x (autocast) are rounded to x's dtype at use.

Memory: nothing of size M x N, M x K or N x K is allocated beside the outputs. Dropout and wide arithmetic
need such temporaries and work through the rows in blocks of a few MiB; otherwise all rows are one block.

Wide arithmetic: a CPU without bf16/fp16 matrix instructions multiplies such matrices in scalar loops, up
to 200 times slower than fp32. There operands are widened to fp32 block by block, which is faster than the
frozen layer itself and rounds every output once.
"""

from functools import cache

import torch
from torch import Tensor

from lora_kernels.backends.dropout import keep_mask, keep_scale

_CPU_BLOCK_BYTES = 8 << 20
_ACCELERATOR_BLOCK_BYTES = 64 << 20
# Up to here ATen's dot products of half-precision rows beat widening the whole weight.
_NARROW_FORWARD_ROWS = 8


@cache
def _multiplies(device_type: str, dtype: torch.dtype) -> bool:
    """Whether the device has a fast matrix product for `dtype`."""
    if device_type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return True
    name = "bf16" if dtype == torch.bfloat16 else "fp16"
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", None)
    return supported is not None and supported()


class _Arithmetic:
    """How one call computes: the dtype its products are formed in and the blocks of rows and columns."""

    def __init__(self, x: Tensor, columns: int, dropout_p: float, narrow: bool = False) -> None:
        M = x.shape[0]
        self.wide = not narrow and not _multiplies(x.device.type, x.dtype)
        self.dtype = torch.float32 if self.wide else x.dtype
        self.accumulation = torch.float64 if x.dtype == torch.float64 else torch.float32
        budget = _CPU_BLOCK_BYTES if x.device.type == "cpu" else _ACCELERATOR_BLOCK_BYTES
        self.step = max(1, budget // (4 * max(columns, 1)))
        self.blocked = self.wide or dropout_p > 0
        rows = self.step if self.blocked else max(M, 1)
        self.blocks = [slice(first, min(first + rows, M)) for first in range(0, M, rows)]

    def adapters(self, x: Tensor, lora_a: Tensor, lora_b: Tensor) -> tuple[Tensor, Tensor]:
        """Both adapters rounded to x's dtype, in the dtype of the products."""
        return lora_a.to(x.dtype).to(self.dtype), lora_b.to(x.dtype).to(self.dtype)

    def shrink(self, rows: Tensor, matrix: Tensor, scale: float, out: Tensor) -> None:
        """out = scale * rows @ matrix, scaled before it is rounded."""
        if self.wide:
            out.copy_(torch.addmm(rows.new_zeros(()), rows, matrix, beta=0, alpha=scale))
        else:
            torch.addmm(out, rows, matrix, beta=0, alpha=scale, out=out)

    def expand(
        self, total: Tensor, low: Tensor, matrix: Tensor, keep: Tensor | None, scale: float
    ) -> None:
        """total += low @ matrix, or with a mask total += scale * keep * (low @ matrix)."""
        if keep is None:
            torch.addmm(total, low, matrix, out=total)
        else:
            low, matrix = low.to(self.accumulation), matrix.to(self.accumulation)
            term = torch.addmm(low.new_zeros(()), low, matrix, beta=0, alpha=scale)
            total.add_(term.masked_fill_(~keep, 0))

    def product(
        self,
        rows: Tensor,
        matrix: Tensor,
        bias: Tensor | None,
        low: Tensor,
        low_matrix: Tensor,
        out: Tensor,
        keep: Tensor | None = None,
        scale: float = 1.0,
    ) -> None:
        """out = rows @ matrix + bias + low @ low_matrix, the low-rank term masked and scaled if asked for."""
        step = self.step if self.wide else max(1, matrix.shape[1])
        low = low.to(self.dtype)
        for first in range(0, matrix.shape[1], step):
            columns = slice(first, first + step)
            part = matrix[:, columns].to(out.dtype).to(self.dtype)
            total = torch.empty_like(out[:, columns], dtype=self.dtype) if self.wide else out
            if bias is None:
                torch.mm(rows, part, out=total)
            else:
                part_bias = bias[columns].to(out.dtype).to(self.dtype)
                torch.addmm(part_bias, rows, part, out=total)
            part_keep = None if keep is None else keep[:, columns]
            self.expand(total, low, low_matrix[:, columns], part_keep, scale)
            if self.wide:
                out[:, columns] = total

    def add_low_rank(
        self, out: Tensor, low: Tensor, matrix: Tensor, keep: Tensor | None = None, scale: float = 1.0
    ) -> None:
        """`expand` of a total that is an output, rounded once."""
        total = out.to(self.dtype)
        self.expand(total, low.to(self.dtype), matrix, keep, scale)
        if self.wide:
            out.copy_(total)

    def accumulate(self, total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
        """total + left^T @ right, summed over the blocks in the accumulation dtype."""
        if not self.blocked:
            return torch.mm(left.t(), right)
        left, right = left.to(self.accumulation), right.to(self.accumulation)
        if total is None:
            return torch.mm(left.t(), right)
        return total.addmm_(left.t(), right)


def _none(like: Tensor) -> Tensor:
    return like.new_empty(0)


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
    M, K = x.shape
    how = _Arithmetic(x, K, dropout_p, narrow=M <= _NARROW_FORWARD_ROWS)
    lora_a, lora_b = how.adapters(x, lora_a, lora_b)
    y = x.new_empty(M, weight.shape[0])
    s = x.new_empty(M, lora_a.shape[0])
    for block in how.blocks:
        rows = x[block].to(how.dtype)
        _shrink_rows(how, rows, block, lora_a, scaling, dropout_p, seed, s)
        how.product(rows, weight.t(), bias, s[block], lora_b.t(), y[block])
    return y, s if save_s else _none(x), _none(x)


def _shrink_rows(how, rows, block, lora_a, scaling, dropout_p, seed, s) -> None:
    if dropout_p:
        keep = keep_mask(seed, block.start, *rows.shape, dropout_p)
        rows, scaling = rows.masked_fill(~keep, 0), scaling * keep_scale(dropout_p)
    how.shrink(rows, lora_a.t(), scaling, s[block])


def lora_add_(
    base_out: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
) -> None:
    """Adds the low-rank branch to base_out in place."""
    _add_branch(base_out, x, lora_a, lora_b, scaling, dropout_p, seed)


def _add_branch(base_out, x, lora_a, lora_b, scaling, dropout_p, seed) -> Tensor:
    """`lora_add_` that returns s."""
    how = _Arithmetic(x, x.shape[1], dropout_p)
    lora_a, lora_b = how.adapters(x, lora_a, lora_b)
    s = x.new_empty(x.shape[0], lora_a.shape[0])
    for block in how.blocks:
        _shrink_rows(how, x[block].to(how.dtype), block, lora_a, scaling, dropout_p, seed, s)
        how.add_low_rank(base_out[block], s[block], lora_b.t())
    return s


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
    return y, s if save_s else _none(x), _none(x)


def lora_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
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
    """(dx, dweight, dA, dB), each of size 0 where not needed; x is read for dweight and dA only.

    Without a weight dx holds the low-rank term alone. Products over the rows are summed in fp32.
    """
    M, K = dy.shape[0], lora_a.shape[1]
    how = _Arithmetic(dy, K, dropout_p)
    a, b = how.adapters(dy, lora_a, lora_b)
    scale = keep_scale(dropout_p) if dropout_p else 1.0
    dx = dy.new_empty(M, K) if need_x else _none(dy)
    ds = dy.new_empty(M, a.shape[0])
    d_a = d_b = None
    for block in how.blocks:
        rows = dy[block].to(how.dtype)
        keep = None
        if dropout_p and (need_x or need_a):
            keep = keep_mask(seed, block.start, block.stop - block.start, K, dropout_p)
        if need_x or need_a:
            how.shrink(rows, b, scaling, ds[block])
        if need_x and weight is not None:
            how.product(rows, weight, None, ds[block], a, dx[block], keep, scale)
        elif need_x:
            dx[block] = 0
            how.add_low_rank(dx[block], ds[block], a, keep, scale)
        if need_a:
            dropped = x[block] if keep is None else x[block].masked_fill(~keep, 0)
            d_a = how.accumulate(d_a, ds[block], dropped)
        if need_b:
            # [r,N] is a far faster shape for BLAS than [N,r]; the transposition is rank-sized.
            d_b = how.accumulate(d_b, s[block], rows)
    return (
        dx,
        _weight_gradient(how, dy, x, weight) if need_weight else _none(dy if weight is None else weight),
        _finished(d_a, lora_a, scale) if need_a else _none(lora_a),
        _finished(None if d_b is None else d_b.t(), lora_b, 1.0) if need_b else _none(lora_b),
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
    """(dx, dA, dB) of the branch alone."""
    dx, _, d_a, d_b = lora_linear_backward(
        dy, x, None, lora_a, lora_b, s, mask, scaling, dropout_p, seed, need_x, False, need_a, need_b
    )
    return dx, d_a, d_b


def _weight_gradient(how: _Arithmetic, dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """dy^T x in the weight's dtype; several blocks go through one strip of its rows after the other."""
    if not how.blocked:
        return torch.mm(dy.t(), x).to(weight.dtype)
    dw = torch.zeros_like(weight, memory_format=torch.contiguous_format)
    for first in range(0, len(dw), how.step):
        columns = slice(first, first + how.step)
        total = None
        for block in how.blocks:
            total = how.accumulate(total, dy[block, columns], x[block])
        if total is not None:
            dw[columns] = total
    return dw


def _finished(total: Tensor | None, parameter: Tensor, scale: float) -> Tensor:
    """The gradient of an adapter in its own dtype, scaled before it is rounded; zeros where M = 0."""
    if total is None:
        return torch.zeros_like(parameter, memory_format=torch.contiguous_format)
    if scale != 1.0:
        total = total * scale
    return total.to(parameter.dtype).contiguous()
