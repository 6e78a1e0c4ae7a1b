"""The low-rank branch of a convolution, added to what the base has computed.

    y += scaling * conv1x1(conv(drop(x), A), B)

A has the base's kernel, stride, padding, dilation and groups, B is 1x1 with as many groups. For
backward x and s = conv(drop(x), A) are kept: drop(x) is made again from its seed.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lora_kernels._dispatch import any_requires_grad, is_plain
from lora_kernels.columns import dropped

# By the number of dimensions of the weight.
_CONVS: dict[int, Callable[..., Tensor]] = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


class Geometry(NamedTuple):
    """How a convolution reads x [n, C, *]: with zeros around it, of numbers alone."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return _CONVS[weight.dim()](x, weight, bias, *self)

    def backward(
        self, dy: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """(dx, dweight), None where not needed."""
        dx, dweight, _ = torch.ops.aten.convolution_backward(
            dy, x, weight, None, self.stride, self.padding, self.dilation, False,
            [0] * len(self.stride), self.groups, [need_x, need_weight, False],
        )  # fmt: skip
        return dx, dweight


_Values = tuple[Geometry, float, float]  # the last are scaling and p


def pointwise(like: Geometry) -> Geometry:
    """That of B."""
    ones = (1,) * len(like.stride)
    return Geometry(ones, (0,) * len(ones), ones, like.groups)


def dropped_positions(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """drop(x) of x [n, C, *]: the library's mask of x as a matrix [n C, positions]."""
    return dropped(x.flatten(2), p, seed).view(x.shape)


def add_branch(
    y: Tensor,
    x: Tensor,
    pair: tuple[Tensor, Tensor],
    geometry: Geometry,
    scaling: float,
    dropout: tuple[float, Tensor | None] = (0.0, None),
) -> Tensor:
    """y [n, N, *out] with the branch of x [n, C, *] added, in place unless something watches.

    A [r, C / groups, *kernel] and B [N, r / groups, *1] are rounded to y's dtype at use. dropout is
    (p, seed). y must be a tensor that nothing else reads.
    """
    x, A, B = (tensor.to(y.dtype) for tensor in (x, *pair))
    p, seed = dropout
    if torch.compiler.is_compiling() or not is_plain(y, x, A, B, seed):
        if p:
            assert seed is not None  # beside p
            x = dropped_positions(x, p, seed)
        s = geometry.convolve(x, A)
        return torch.add(y, pointwise(geometry).convolve(s, B), alpha=scaling)
    if torch.is_grad_enabled() and any_requires_grad(y, x, A, B):
        return _branch(y, x, A, B, (geometry, scaling, p), seed)
    _forward(y, x, A, B, (geometry, scaling, p), seed)
    return y


def _forward(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, values: _Values, seed: Tensor | None
) -> Tensor:
    """Adds to y; returns s."""
    geometry, scaling, p = values
    s = geometry.convolve(dropped_positions(x, p, seed) if seed is not None and p else x, A)
    n, N = y.shape[:2]
    r, groups = A.shape[0], geometry.groups
    positions = y.shape[2:].numel()
    if y.is_contiguous():
        out = y.view(n * groups, N // groups, positions)
        factors = B.reshape(groups, N // groups, -1).expand(n, -1, -1, -1).flatten(0, 1)
        out.baddbmm_(factors, s.reshape(n * groups, r // groups, positions), alpha=scaling)
    elif groups == 1 and (last := y.movedim(1, -1)).is_contiguous():
        rows = s.movedim(1, -1).reshape(-1, r)
        last.view(-1, N).addmm_(rows, B.reshape(N, r).t(), alpha=scaling)
    else:
        y.add_(pointwise(geometry).convolve(s, B), alpha=scaling)
    return s


class _Branch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, *given: Any) -> Tensor:
        x, A, B, ctx.values, seed = given
        s = _forward(y, *given)
        ctx.mark_dirty(y)
        ctx.shape = x.shape
        _, _, need_a, need_b, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if need_a else None, A, B, s if need_b else None, seed)
        ctx.s_shape = s.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, s, seed = ctx.saved_tensors
        geometry, scaling, p = ctx.values
        need_y, need_x, need_a, need_b, *_ = ctx.needs_input_grad
        dx = d_a = None
        ds, d_b = pointwise(geometry).backward(
            dy, _or_empty(s, dy, ctx.s_shape), B, need_x or need_a, need_b
        )
        if d_b is not None:
            d_b = d_b.mul_(scaling)
        if ds is not None:
            if x is not None and p:
                x = dropped_positions(x, p, seed)
            ds = ds.mul_(scaling)
            dx, d_a = geometry.backward(ds, _or_empty(x, dy, ctx.shape), A, need_x, need_a)
        if dx is not None and p:
            dx = dropped_positions(dx, p, seed)
        return dy if need_y else None, dx, d_a, d_b, None, None


def _or_empty(tensor: Tensor | None, like: Tensor, shape: torch.Size) -> Tensor:
    """A tensor, or one of its shape that is not read."""
    return like.new_empty(1).expand(shape) if tensor is None else tensor


_branch: Callable[..., Tensor] = _Branch.apply
