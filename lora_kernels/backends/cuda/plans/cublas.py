"""torch's GEMM, low-rank kernels beside it; on a given base output those kernels alone."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels.backends.cuda import needs
from lora_kernels.backends.cuda.launches import EXPAND, EXPAND_DX, GRADIENTS, SHRINK
from lora_kernels.backends.cuda.plan import Pass, Plan, Tiles
from lora_kernels.backends.reference import Gradients
from lora_kernels.branch import Base, Branch, Dense, Need


def _forward(
    base: Dense, x: Tensor, branch: Branch, save_s: bool, tiles: Tiles
) -> tuple[Tensor, Tensor | None]:
    from lora_kernels.backends.triton.branch import add, unpadded

    bias = None if base.bias is None else base.bias.to(x.dtype)
    y = torch.nn.functional.linear(x, base.weight.to(x.dtype), bias)
    s = add(y, x, branch, y, tiles)
    return y, unpadded(s, branch) if save_s else None


def _backward(
    base: Base, dy: Tensor, x: Tensor, s: Tensor, branch: Branch, need: Need, tiles: Tiles
) -> Gradients:
    """Without a weight dx is the branch's alone."""
    from lora_kernels.backends.triton import dropout
    from lora_kernels.backends.triton.branch import gradients, weight_gradient
    from lora_kernels.backends.triton.low_rank import LowRank, expand

    def product(ds: Tensor, a: Tensor) -> tuple[Tensor, None]:
        term = LowRank(ds, a, dropout=dropout.of(branch.dropout_p, branch.seed))
        if isinstance(base, Dense):
            dx = torch.mm(dy, base.weight.to(dy.dtype))
            expand(dx, term, dx, tiles.get("expand_dx"))
        else:
            dx = dy.new_empty(dy.shape[0], a.shape[1])
            expand(None, term, dx, tiles.get("expand_dx"))
        return dx, None

    dx, d_a, d_b = gradients(dy, x, s, branch, need, product, tiles)
    return dx, weight_gradient(base, dy, x, need), d_a, d_b


def _add(base_out: Tensor, x: Tensor, branch: Branch, out: Tensor, tiles: Tiles) -> Tensor:
    from lora_kernels.backends.triton.branch import add

    return add(base_out, x, branch, out, tiles)


PLAN = Plan(
    name="cublas",
    summary="torch's GEMM, low-rank kernels beside it",
    forward=Pass(_forward, (SHRINK, EXPAND), needs=needs.triton),
    backward=Pass(_backward, (*GRADIENTS, EXPAND_DX), needs=needs.triton),
    add=Pass(_add, (SHRINK, EXPAND), needs=needs.triton),
    add_backward=Pass(_backward, (*GRADIENTS, EXPAND_DX), needs=needs.triton),
)
