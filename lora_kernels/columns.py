"""The columns of a product, each by a factor of its own: what DoRA does to a layer's output.

    y = z * factor + added      dz = dy * factor      dfactor = the sum of dy * z over the rows

In one pass over z forward and one over dy and z backward, rounded once. Where something watches
(torch.compile, which fuses the plain calls itself, transforms, tensor subclasses) it is those
calls.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lora_kernels._dispatch import any_requires_grad, is_plain
from lora_kernels.backends import columns, native
from lora_kernels.backends.dropout import keep_mask, keep_scale
from lora_kernels.backends.masks import mask
from lora_kernels.sharding import is_sharded, replicated


def scale_columns(z: Tensor, factor: Tensor, added: Tensor | None = None) -> Tensor:
    """z * factor + added in z's dtype, of z [..., N], factor [N] in fp32 (fp64 of fp64), added [N]
    or as z."""
    if torch.compiler.is_compiling() or not is_plain(z, factor, added):
        y = z * factor if added is None else torch.addcmul(added.to(factor.dtype), z, factor)
        return y.to(z.dtype)
    if torch.is_grad_enabled() and any_requires_grad(z, factor, added):
        return _scaled(z, factor, added)
    return columns.forward(z, factor, added)


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, factor: Tensor, added: Tensor | None) -> Tensor:
        ctx.set_materialize_grads(False)
        _, need_factor, _ = ctx.needs_input_grad
        ctx.save_for_backward(z if need_factor else None, factor)
        ctx.added = None if added is None else (added.dim(), added.dtype)
        return columns.forward(z, factor, added)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return None, None, None
        z, factor = ctx.saved_tensors
        need_z, need_factor, need_added = ctx.needs_input_grad
        if torch.is_grad_enabled() or not is_plain(dy, factor, z):
            wide = dy.to(factor.dtype)
            dz = (wide * factor).to(dy.dtype) if need_z else None
            dfactor = (wide * z).flatten(0, -2).sum(0) if need_factor else None
        else:
            dz, dfactor = columns.backward(dy, z, factor, need_z)
        d_added = None
        if need_added:
            dim, dtype = ctx.added
            d_added = dy if dim == dy.dim() else dy.flatten(0, -2).sum(0)
            d_added = d_added.to(dtype)
        return dz, dfactor, d_added


_scaled: Callable[..., Tensor] = _Scaled.apply


def dropped(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """drop(x) of x [..., K]: the values of the library's mask, those kept scaled, of which the op
    itself never makes a matrix."""
    if torch.compiler.is_compiling() or not is_plain(x, seed):
        K = x.shape[-1]
        kept = keep_mask(seed, 0, x.shape[:-1].numel(), K, p).view(x.shape)
        if is_sharded(x):
            kept = replicated(kept, x)
        return torch.where(kept, x, 0) * keep_scale(p)
    return _dropped(x, p, seed)


class _Dropped(torch.autograd.Function):
    """Its own gradient: linear, of a mask that is made again from the seed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, seed: Tensor) -> Tensor:
        ctx.p = p
        ctx.save_for_backward(seed)
        rows = x.reshape(-1, x.shape[-1])
        if native.drops(rows):
            return native.drop(rows, p, seed).view(x.shape)
        whole = mask(seed, 0, rows.shape[0], rows.shape[1], p)
        return whole.drop(rows).mul_(keep_scale(p)).view(x.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (seed,) = ctx.saved_tensors
        return dropped(dy, ctx.p, seed), None, None


_dropped: Callable[..., Tensor] = _Dropped.apply
