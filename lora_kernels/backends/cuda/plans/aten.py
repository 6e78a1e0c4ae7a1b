"""ATen calls throughout: the reference backend."""

from __future__ import annotations

from torch import Tensor

from lora_kernels.backends import reference
from lora_kernels.backends.cuda.plan import Pass, Plan, Tiles
from lora_kernels.branch import Base, Branch, Dense, Need


def _forward(
    base: Dense, x: Tensor, branch: Branch, save_s: bool, tiles: Tiles
) -> tuple[Tensor, Tensor | None]:
    return reference.forward(base, x, branch, save_s)


def _backward(
    base: Base, dy: Tensor, x: Tensor, s: Tensor, branch: Branch, need: Need, tiles: Tiles
) -> reference.Gradients:
    return reference.backward(base, dy, x, s, branch, need)


def _add(base_out: Tensor, x: Tensor, branch: Branch, out: Tensor, tiles: Tiles) -> Tensor:
    if out is not base_out:
        out.copy_(base_out)
    return reference.add_branch(out, x, branch)


PLAN = Plan(
    name="aten",
    summary="ATen calls throughout",
    forward=Pass(_forward),
    backward=Pass(_backward),
    add=Pass(_add),
    add_backward=Pass(_backward),
)
