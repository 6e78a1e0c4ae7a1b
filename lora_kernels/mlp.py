"""The gated block of today's models, down(act(gate(x)) * up(x)), which keeps gate(x) and up(x) and
computes the product again in backward."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_kernels.backends import gating, packed
from lora_kernels.backends.gating import ACTIVATIONS
from lora_kernels.branch import Asked, Layer, Pairs, Rows
from lora_kernels.functional import flat_rows
from lora_kernels.packed import (
    Kept,
    Projection,
    as_one,
    fits,
    flat,
    prepared,
    project,
    refuse_double_backward,
    tensors_of,
    wanted_of,
    without_autocast,
)


def lora_swiglu_mlp(
    x: Tensor,
    gate: Projection,
    up: Projection | None,
    down: Projection,
    act: str = "silu",
) -> Tensor:
    """down(act(gate(x)) * up(x)), each layer with a LoRA branch or without.

    Equal to the separate layers; the product is rounded once. Kept for backward are x, gate(x),
    up(x) and what has the size of a rank: half of what the separate layers keep, of which the
    product and act(gate(x)) are computed again. Nothing that a caller could see is overwritten.

    Args:
        x: [..., K], as in `lora_linear`.
        gate, up: of weights [I, K]. With up=None gate is both, one above the other: [2 I, K].
        down: of a weight [N, I].
        act: "silu", "gelu", "gelu_tanh", "relu" or "relu2".

    Returns:
        [..., N] in x's dtype.

    Raises:
        ValueError: an activation that is not known, sizes that do not fit. TypeError, ValueError:
            what `lora_linear` raises.
    """
    if act not in ACTIVATIONS:
        raise ValueError(f"act: got {act!r}, legal values are {', '.join(ACTIVATIONS)}")
    first = [gate] if up is None else [gate, up]
    _check_sizes(first, down)
    rows = as_one(x, first)
    if rows is None or rows.numel() == 0 or not _fits_down(x, down, rows.dtype):
        return _separately(x, first, down, act)
    layers = [prepared(rows, p) for p in (*first, down)]
    y = _mlp(flat_rows(rows), layers, act, *tensors_of(layers))
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])


def _fits_down(x: Tensor, down: Projection, dtype: torch.dtype) -> bool:
    inner = x.new_empty(0, down.weight.shape[-1])  # as what it gets is
    return fits(inner, down, dtype, torch.is_autocast_enabled(x.device.type))


def _check_sizes(first: Sequence[Projection], down: Projection) -> None:
    sizes = [p.weight.shape[0] for p in first]
    if len(first) == 1 and sizes[0] % 2:
        raise ValueError(f"gate: expected a weight [2 I, K] without up, got {sizes[0]} rows")
    inner = sizes[0] // 2 if len(first) == 1 else sizes[0]
    if len(first) == 2 and sizes[1] != inner:
        raise ValueError(f"up: expected a weight of {inner} rows as gate's, got {sizes[1]}")
    if down.weight.shape[-1] != inner:
        raise ValueError(
            f"down: expected a weight of {inner} columns, got {tuple(down.weight.shape)}"
        )


def _separately(x: Tensor, first: Sequence[Projection], down: Projection, act: str) -> Tensor:
    outputs = project(x, first)
    g, u = outputs if len(outputs) == 2 else outputs[0].chunk(2, -1)
    function, _ = ACTIVATIONS[act]
    return down(function(g) * u)


def _halves(outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(gate(x), up(x)) of one output or two."""
    g, u = outputs if len(outputs) == 2 else outputs[0].chunk(2, 1)
    return g, u


class _Mlp(torch.autograd.Function):
    """Of matrices."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: list[Layer], act: str, *tensors: Tensor) -> Tensor:
        _, _, _, *needs = ctx.needs_input_grad
        wanted = wanted_of(layers, needs)
        saves = [b for _, b in wanted]
        with without_autocast(x):
            outputs, kept = packed.forward(x, layers[:-1], saves[:-1])
            h = gating.gated(*_halves(outputs), act)
            (y,), (s,) = packed.forward(h, layers[-1:], saves[-1:])
        held = Kept.of(layers, [*kept, s])
        ctx.set_materialize_grads(False)
        ctx.others, ctx.act, ctx.outputs = held.others, act, len(outputs)
        reads_x = any(a for a, _ in wanted[:-1])
        ctx.save_for_backward(x if reads_x else None, *outputs, *held.tensors)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Any, ...]:
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        x, *saved = ctx.saved_tensors  # once: checkpoints give them one time
        refuse_double_backward([dy, x, *saved])
        need_x, _, _, *needs = ctx.needs_input_grad
        outputs, tensors = saved[: ctx.outputs], saved[ctx.outputs :]
        layers, kept = Kept(tensors, ctx.others).layers()
        wanted = wanted_of(layers, needs)
        rows = Rows([dy], None, kept[-1:])
        first = Rows([], x, kept[:-1])
        with without_autocast(dy):
            dx, pairs = _backward(
                ctx.act, _halves(outputs), (first, rows), layers, Asked(wanted, need_x)
            )
        return dx, None, None, *flat(layers, pairs)


def _backward(
    act: str, of: tuple[Tensor, Tensor], rows: tuple[Rows, Rows], layers: list[Layer], asked: Asked
) -> tuple[Tensor | None, Pairs]:
    """dx and the gradients of all layers, of = (gate(x), up(x)); rows of the first layers, which
    lack their dys, and of the last."""
    *wanted, of_down = asked.of
    first, last = rows
    count = len(layers) - 1
    h = gating.gated(*of, act) if of_down.a else None
    need_first = asked.x or any(a or b for a, b in wanted)
    dh, pairs = packed.backward(last._replace(x=h), layers[count:], Asked([of_down], need_first))
    if dh is None:
        return None, [(None, None)] * count + pairs
    if count == 1:
        dz = dh.new_empty(len(dh), 2 * dh.shape[1])
        dg, du = dz.chunk(2, 1)
        dys = [dz]
    else:  # h has been read, and nobody else has it, nor dh
        dg, du = torch.empty_like(dh) if h is None else h, dh
        dys = [dg, du]
    gating.gradients(of, dh, act, (dg, du))
    dx, more = packed.backward(first._replace(dys=dys), layers[:count], Asked(wanted, asked.x))
    return dx, more + pairs


_mlp: Callable[..., Tensor] = _Mlp.apply
