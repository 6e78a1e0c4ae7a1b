"""The op with its low-rank half in compiled CPU kernels; shapes and results as in `reference`.

Two kernels do all of it: one reads wide rows once and leaves rank-sized results (s; ds and dB; dA),
the other writes a rank-sized product over a whole output. The base product stays with torch, which
accumulates into that output. Calls that torch's own calls win, or that the kernels cannot serve, go
back to `reference`; a forced backend raises for the latter. So do 16-bit products that a CPU
without instructions for them forms in fp32: there the branch is added before the one rounding.
"""

import torch
from torch import Tensor

from lora_kernels import _env
from lora_kernels.backends import blocked, reference
from lora_kernels.backends.dropout import keep_scale, threshold
from lora_kernels.backends.native.extension import best_isa
from lora_kernels.backends.scaling import split

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Without dropout torch's own calls win below so many rows, and with 16-bit matrix instructions.
_MIN_ROWS = 128

_ops = torch.ops.lora_kernels


def _serves(rows: Tensor, width: int, dropout_p: float) -> bool:
    """Whether the kernels take a call with these rows [M,C] and an output of `width` columns."""
    forced = _env.BACKEND == "native"
    if rows.dtype not in _DTYPES:
        if forced:
            raise RuntimeError(
                f"LORA_KERNELS_BACKEND=native: its kernels compute in float32, bfloat16 and"
                f" float16, got {rows.dtype}"
            )
        return False
    if rows.numel() == 0 or width == 0:
        return False
    if forced or dropout_p:
        return True
    return rows.dtype == torch.float32 and rows.shape[0] >= _MIN_ROWS and best_isa() > 0


def _shrink(
    rows: Tensor,
    matrix: Tensor | None,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    low: Tensor | None = None,
    gradient: Tensor | None = None,
    gradient_scale: float = 1.0,
) -> Tensor | None:
    """scale * drop(rows) @ matrix^T; fills gradient with gradient_scale * low^T @ drop(rows) from
    the same read."""
    kept = keep_scale(dropout_p) if dropout_p else 1.0
    shrunk = None if matrix is None else rows.new_empty(rows.shape[0], matrix.shape[0])
    _ops._shrink_cpu(
        rows, matrix, low, scale * kept, gradient_scale * kept, threshold(dropout_p),
        seed if dropout_p else None, best_isa(), shrunk, gradient,
    )  # fmt: skip
    return shrunk


def _expand(
    low: Tensor,
    matrix: Tensor,
    out: Tensor,
    scale: float = 1.0,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    accumulate: bool = False,
) -> None:
    """out = scale * drop'(low @ matrix) + bias, added to what is there if `accumulate`."""
    kept = keep_scale(dropout_p) if dropout_p else 1.0
    _ops._expand_cpu(
        low, matrix, bias, scale * kept, threshold(dropout_p), seed if dropout_p else None,
        accumulate, best_isa(), out,
    )  # fmt: skip


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
    if blocked.is_wide(x) or not _serves(x, weight.shape[0], dropout_p):
        return reference.lora_linear(
            x, weight, lora_a, lora_b, bias, scaling, dropout_p, seed, save_s, save_mask
        )
    low, high = split(scaling, x.dtype)
    s = _shrink(x, lora_a, low, dropout_p, seed)
    y = x.new_empty(x.shape[0], weight.shape[0])
    _expand(s, lora_b.t(), y, high, bias=None if bias is None else bias.to(x.dtype))
    y.addmm_(x, weight.t().to(x.dtype))
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
    if not _serves(x, base_out.shape[1], dropout_p):
        return reference.lora_add_(base_out, x, lora_a, lora_b, scaling, dropout_p, seed)
    low, high = split(scaling, x.dtype)
    s = _shrink(x, lora_a, low, dropout_p, seed)
    if base_out.stride(1) == 1 and base_out.data_ptr() % base_out.element_size() == 0:
        _expand(s, lora_b.t(), base_out, high, accumulate=True)
    else:
        y = base_out.clone(memory_format=torch.contiguous_format)
        _expand(s, lora_b.t(), y, high, accumulate=True)
        base_out.copy_(y)


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
    if not _serves(x, base_out.shape[1], dropout_p):
        return reference.lora_add(
            base_out, x, lora_a, lora_b, scaling, dropout_p, seed, save_s, save_mask
        )
    y = base_out.clone(memory_format=torch.contiguous_format)
    low, high = split(scaling, x.dtype)
    s = _shrink(x, lora_a, low, dropout_p, seed)
    _expand(s, lora_b.t(), y, high, accumulate=True)
    return y, s if save_s else x.new_empty(0), x.new_empty(0)


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
    if blocked.is_wide(dy) or not _serves(dy, lora_a.shape[1], dropout_p):
        return reference.lora_linear_backward(
            dy, x, weight, lora_a, lora_b, s, mask, scaling, dropout_p, seed,
            need_x, need_weight, need_a, need_b,
        )  # fmt: skip
    dx, d_a, d_b = _branch_backward(
        dy, x, lora_a, lora_b, s, scaling, dropout_p, seed, need_x, need_a, need_b
    )
    if need_x:
        dx.addmm_(dy, weight.to(dy.dtype))
    dweight = torch.mm(dy.t(), x).to(weight.dtype) if need_weight else weight.new_empty(0)
    return dx, dweight, d_a, d_b


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
    if not _serves(dy, lora_a.shape[1], dropout_p):
        return reference.lora_add_backward(
            dy, x, lora_a, lora_b, s, mask, scaling, dropout_p, seed, need_x, need_a, need_b
        )
    return _branch_backward(
        dy, x, lora_a, lora_b, s, scaling, dropout_p, seed, need_x, need_a, need_b
    )


def _branch_backward(
    dy, x, lora_a, lora_b, s, scaling, dropout_p, seed, need_x, need_a, need_b
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dA, dB) of the branch alone, each of size 0 where not needed."""
    (M, N), (r, K) = dy.shape, lora_a.shape
    need_ds = need_x or need_a
    dx = dy.new_empty((M, K) if need_x else 0)
    d_a = lora_a.new_empty((r, K) if need_a else 0)
    d_b = lora_b.new_empty((N, r) if need_b else 0)
    if need_ds or need_b:
        ds = _shrink(
            dy,
            lora_b.t() if need_ds else None,
            scaling,
            low=s if need_b else None,
            gradient=d_b.t() if need_b else None,
            gradient_scale=split(scaling, dy.dtype)[1],
        )
    if need_x:
        _expand(ds, lora_a, dx, dropout_p=dropout_p, seed=seed)
    if need_a:
        _shrink(x, None, 1.0, dropout_p, seed, low=ds, gradient=d_a)
    return dx, d_a, d_b
