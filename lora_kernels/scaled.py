"""DoRA's layer without dropout as one product, each column times a factor of its own before it is
rounded:

    y = factor * z + bias, z = x W^T + s B^T      dz = dy * factor      dfactor = the sum of dy * z

z is never written. Backward keeps y in its place and takes z from it; where y has been changed in
place since, and in columns in which y has lost z (a factor of 0), it is formed again.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lora_kernels import _dispatch
from lora_kernels._dispatch import any_requires_grad, is_plain
from lora_kernels.backends import columns
from lora_kernels.backends.cuda import scaled
from lora_kernels.branch import Branch, Dense


def linear(
    x: Tensor, base: Dense, pair: tuple[Tensor, Tensor], scaling: float | Tensor, factor: Tensor
) -> Tensor | None:
    """y [..., N] of x [..., K] and factor [N]; None where z is to be written: somebody watches,
    dtypes are autocast's to settle, or nothing here computes it."""
    (weight, bias, _), (a, b) = base, pair
    if torch.compiler.is_compiling() or not is_plain(x, weight, a, b, bias, factor):
        return None
    if not _fits(x, base, pair, factor) or isinstance(scaling, Tensor):
        return None
    rows = x.reshape(-1, x.shape[-1])
    if not math.isfinite(scaling) or not scaled.serves(rows):
        return None
    if torch.is_grad_enabled() and any_requires_grad(x, weight, a, b, bias, factor):
        y = _linear(scaling, rows, weight, a, b, bias, factor)
    else:
        y, _ = scaled.forward(base, rows, Branch(a, b, scaling, 0.0, None), factor)
    return y.view(*x.shape[:-1], weight.shape[0])


def _fits(x: Tensor, base: Dense, pair: tuple[Tensor, Tensor], factor: Tensor) -> bool:
    (weight, bias, _), (a, b) = base, pair
    given = [t for t in (weight, a, b, bias, factor) if t is not None]
    if x.dim() == 0 or torch.is_autocast_enabled(x.device.type):
        return False
    if any(t.device != x.device or t.layout != torch.strided for t in (x, *given)):
        return False
    if not weight.dim() == a.dim() == b.dim() == 2 or not weight.numel() * a.shape[0]:
        return False
    (N, K), r = weight.shape, a.shape[0]
    shapes = [tuple(t.shape) for t in given]
    vectors = [(N,)] * (len(given) - 3)
    low = (x.dtype, torch.float32)
    return (
        shapes == [(N, K), (r, K), (N, r), *vectors]
        and x.shape[-1] == K
        and a.dtype in low
        and b.dtype in low
        and weight.dtype == x.dtype
        and (bias is None or bias.dtype == x.dtype)
        and factor.dtype == torch.float32
    )


class _Linear(torch.autograd.Function):
    """Of matrices: x, weight, a, b, bias, factor."""

    @staticmethod
    def forward(ctx: Any, scaling: float, *tensors: Any) -> Tensor:
        x, weight, a, b, bias, factor = tensors
        _, _, need_weight, need_a, need_b, _, need_factor = ctx.needs_input_grad
        y, s = scaled.forward(Dense(weight, bias), x, Branch(a, b, scaling, 0.0, None), factor)
        ctx.set_materialize_grads(False)
        ctx.scaling, ctx.bias_dtype = scaling, None if bias is None else bias.dtype
        ctx.save_for_backward(
            x if need_weight or need_a or need_factor else None,
            weight,
            a,
            b,
            bias if need_factor else None,
            factor,
            s if need_b or need_factor else None,
            # Torch refuses a backward that has kept what was changed in place; this one need not.
            y.data if need_factor else None,
        )
        # Counts y's changes, and holds none of its memory.
        ctx.witness = y.detach()
        ctx.witness.data = y.new_empty(0)
        ctx.version = y._version
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 7
        x, weight, a, b, bias, factor, s, y = ctx.saved_tensors
        _, *need, need_bias, need_factor = ctx.needs_input_grad
        if torch.is_grad_enabled() and any_requires_grad(dy, x, weight, a, b, factor):
            raise NotImplementedError("lora_kernels: double backward is not supported")
        branch, dfactor = Branch(a, b, ctx.scaling, 0.0, None), None
        if not need_factor:
            dz = _dz(dy, factor) if any(need) else None
        elif is_plain(dy, weight):
            y = y if ctx.witness._version == ctx.version else None
            rows = dy, x, s, y
            dz, dfactor = scaled.backward(Dense(weight, bias), rows, branch, factor, any(need))
        else:
            z = x @ weight.t() + ctx.scaling * ((x @ a.to(x.dtype).t()) @ b.to(x.dtype).t())
            dz, dfactor = _dz(dy, factor), (dy.float() * z).sum(0)
        found: tuple[Tensor | None, ...] = (None,) * 4
        if dz is not None and any(need):
            results = _dispatch.call_backward(
                "lora_linear_backward", dz, x, weight, a, b, s, *branch[2:], *need
            )
            found = tuple(
                result if needed else None for needed, result in zip(need, results, strict=True)
            )
        d_bias = dy.sum(0).to(ctx.bias_dtype) if need_bias else None
        return None, *found, d_bias, dfactor


def _dz(dy: Tensor, factor: Tensor) -> Tensor | None:
    if is_plain(dy, factor):
        return columns.backward(dy, None, factor, True)[0]
    return (dy.to(factor.dtype) * factor).to(dy.dtype)


_linear: Callable[..., Tensor] = _Linear.apply
