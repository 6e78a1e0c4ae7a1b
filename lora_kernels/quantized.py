"""The op on a quantised weight, which it takes as its tensors and its form (`weights`): the
branch is that of `lora_add`, the base product decodes as it multiplies. dW is refused.

    y = x deq(W)^T + bias + s B^T      dx = dy deq(W) + drop'(ds A)      the rest as in `_ops`

Without lora_a and lora_b it is the frozen layer.
"""

import logging
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lora_kernels import _dispatch, backends
from lora_kernels._dispatch import any_requires_grad, is_unwatched, refuse_forward_mode
from lora_kernels._namespace import ops
from lora_kernels.backends import dequantized
from lora_kernels.backends.cuda import coded
from lora_kernels.backends.cuda.plan import Coded
from lora_kernels.backends.native import quantized as native
from lora_kernels.branch import Branch, Given, Need
from lora_kernels.rules import flops
from lora_kernels.weights import QuantizedWeight, assemble, shape_of

_logger = logging.getLogger("lora_kernels")
_WEIGHT = "Tensor[] parts, str form"
_BRANCH = "float scaling, float dropout_p, Tensor? seed"
_SCHEMAS = {
    "lora_linear_quantized": f"(Tensor x, {_WEIGHT}, Tensor? lora_a, Tensor? lora_b, Tensor? bias,"
    f" {_BRANCH}, bool save_s) -> (Tensor y, Tensor s)",
    "lora_linear_quantized_backward": f"(Tensor dy, Tensor x, {_WEIGHT}, Tensor? lora_a,"
    f" Tensor? lora_b, Tensor s, {_BRANCH}, bool need_x, bool need_a, bool need_b)"
    " -> (Tensor dx, Tensor da, Tensor db)",
}
for _name, _schema in _SCHEMAS.items():
    _dispatch.define(_name, _schema)


def linear(
    x: Tensor, weight: QuantizedWeight, bias: Tensor | None, branch: Branch | None
) -> Tensor:
    """y [M,N] of x [M,K], of arguments that fit together; without a branch the frozen layer."""
    refuse_forward_mode((x, bias, *(branch or ())))
    a, b, scaling, p, seed = branch or Branch(None, None, 1.0, 0.0, None)  # type: ignore[arg-type]
    saves = torch.is_grad_enabled() and b is not None and b.requires_grad
    y: Tensor
    parts = weight.parts
    unseen = not torch.compiler.is_compiling() and is_unwatched(x, parts[0], a, b, bias, seed)
    if unseen and not (torch.is_grad_enabled() and any_requires_grad(x, a, b, bias, *parts)):
        y, _ = _forward(x, weight, bias, branch, False)
        return y
    arguments = (x, parts, weight.form, a, b, bias, scaling, p, seed, saves)
    y = ops.lora_linear_quantized(*arguments)[0]
    return y


# ------------------------------------------------------------------------------------------ kernels


def _forward(
    x: Tensor, weight: QuantizedWeight, bias: Tensor | None, branch: Branch | None, save_s: bool
) -> tuple[Tensor, Tensor | None]:
    if native.takes(x, weight):
        _say(x, weight, "its codes multiplied as they lie, by the compiled CPU kernels")
        return native.forward(x, weight, bias, branch, save_s)
    plan = None if branch is None else coded.chosen(x, weight, branch)
    if branch is not None and plan is not None:
        _say(x, weight, f"its codes multiplied as they lie, by the plan {plan.plan}")
        return coded.forward(plan, Coded(weight, bias), x, branch, save_s)
    if _logger.isEnabledFor(logging.INFO):
        decoder = dequantized.decoder(weight, x.dtype)
        _say(x, weight, f"strips decoded by {decoder}, torch's products")
    y = dequantized.product(x, weight, bias)
    if branch is None:
        return y, None
    s = backends.serving(Given(y), x, branch).add_(y, x, branch)
    return y, s[:, : branch.lora_a.shape[0]].contiguous() if save_s else None


def _say(x: Tensor, weight: QuantizedWeight, how: str) -> None:
    if _logger.isEnabledFor(logging.INFO):
        _say_once(weight.kind, str(x.device.type), str(x.dtype), how)


@cache
def _say_once(kind: str, device: str, dtype: str, how: str) -> None:
    _logger.info("%s weights under %s rows in %s: %s", kind, device, dtype, how)


def _backward(
    weight: QuantizedWeight, rows: tuple[Tensor, Tensor, Tensor], branch: Branch | None, need: Need
) -> tuple[Tensor | None, ...]:
    dy, x, s = rows
    dx = d_a = d_b = None
    if branch is not None:
        base = Given(None)
        backend = backends.serving(base, dy, branch)
        dx, _, d_a, d_b = backend.backward(base, dy, x, s, branch, need)
    elif need.x:
        dx = dy.new_zeros(len(dy), weight.shape[1])
    if dx is not None:
        dequantized.add_gradient(dx, dy, weight)
    return dx, d_a, d_b


def _branch(lora_a: Tensor | None, lora_b: Tensor | None, *rest: Any) -> Branch | None:
    if lora_a is None or lora_b is None:
        return None
    return Branch(lora_a, lora_b, *rest)


def _check_shapes(
    name: str, rows: Tensor, width: int, form: str, *pair: Tensor | None
) -> tuple[int, int]:
    """(N, K) of the form, which what comes past `functional` must fit."""
    N, K = shape_of(form)
    expected = (N, K)[width]
    if rows.dim() != 2 or rows.shape[1] != expected:
        raise ValueError(
            f"{name}: expected [M, {expected}] of a weight {N} x {K}, got {rows.shape}"
        )
    a, b = pair
    if (a is None) != (b is None):
        raise ValueError("lora_a: expected both or none of lora_a and lora_b")
    if a is not None and b is not None:
        r = a.shape[0]
        if a.shape != (r, K) or b.shape != (N, r):
            raise ValueError(
                f"lora_a, lora_b: expected [r, {K}] and [{N}, r], got {a.shape} and {b.shape}"
            )
    return N, K


def _whole(tensor: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if tensor is None else tensor


def _linear(x: Tensor, parts: Any, form: str, a: Any, b: Any, *rest: Any) -> tuple[Tensor, Tensor]:
    bias, *values, save_s = rest
    refuse_forward_mode((x, a, b, bias))
    _check_shapes("x", x, 1, form, a, b)
    with torch.autocast(x.device.type, enabled=False):
        y, s = _forward(x, assemble(form, parts), bias, _branch(a, b, *values), save_s)
    return y, _whole(s, x)


def _linear_backward(
    dy: Tensor, x: Tensor, parts: Any, form: str, *rest: Any
) -> tuple[Tensor, ...]:
    a, b, s, *values, need_x, need_a, need_b = rest
    _check_shapes("dy", dy, 0, form, a, b)
    need = Need(need_x, False, need_a, need_b)
    with torch.autocast(dy.device.type, enabled=False):
        found = _backward(assemble(form, parts), (dy, x, s), _branch(a, b, *values), need)
    return tuple(
        _whole(tensor, dy if like is None else like)
        for tensor, like in zip(found, (dy, a, b), strict=True)
    )


# -------------------------------------------------------------------------------------------- fakes


def _fake_linear(
    x: Tensor, parts: Any, form: str, a: Any, b: Any, *rest: Any
) -> tuple[Tensor, Tensor]:
    N, _ = _check_shapes("x", x, 1, form, a, b)
    s = x.new_empty(x.shape[0], a.shape[0]) if rest[-1] and a is not None else x.new_empty(0)
    return x.new_empty(x.shape[0], N), s


def _fake_backward(dy: Tensor, x: Tensor, parts: Any, form: str, *rest: Any) -> tuple[Tensor, ...]:
    a, b, *_, need_x, need_a, need_b = rest
    _, K = _check_shapes("dy", dy, 0, form, a, b)
    dx = dy.new_empty((dy.shape[0], K) if need_x else (0,))
    pair = ((a, need_a), (b, need_b))
    return dx, *(
        dy.new_empty(0) if one is None else one.new_empty(one.shape if need else (0,))
        for one, need in pair
    )


# ----------------------------------------------------------------------------------------- autograd


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    x, parts, ctx.form, a, b, bias, ctx.scaling, ctx.dropout_p, seed, _ = inputs
    if b is not None and b.requires_grad and output[1].dim() != 2:
        raise RuntimeError("lora_kernels: lora_b requires grad, which needs save_s=True")
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.parts = len(parts)
    kept = x if a is not None and a.requires_grad else None
    ctx.save_for_backward(kept, a, b, output[1], seed, *parts)


def _gradients(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    nothing = [None] * ctx.parts
    if dy is None:
        return (None, nothing, *(None,) * 8)
    need_x, _, _, need_a, need_b, need_bias, *_ = ctx.needs_input_grad
    x, a, b, s, seed, *parts = ctx.saved_tensors
    dx = d_a = d_b = None
    if need_x or need_a or need_b:
        dx, d_a, d_b = ops.lora_linear_quantized_backward(
            dy, _whole(x, dy), parts, ctx.form, a, b, s, ctx.scaling, ctx.dropout_p, seed,
            need_x, need_a, need_b,
        )  # fmt: skip
    bias = dy.sum(0).to(ctx.bias_dtype) if need_bias else None
    return (
        dx if need_x else None, nothing, None, d_a if need_a else None, d_b if need_b else None,
        bias, None, None, None, None,
    )  # fmt: skip


# -------------------------------------------------------------------------------------------- flops


def _rank(a: Sequence[int] | None) -> int:
    return 0 if a is None else a[0]


def _linear_flops(x: Any, parts: Any, form: str, a: Any, *_: Any, **__: object) -> int:
    (N, K), M = shape_of(form), x[0]
    flops: int = 2 * M * (K * N + _rank(a) * (K + N))
    return flops


def _backward_flops(dy: Any, x: Any, parts: Any, form: str, a: Any, *rest: Any, **_: object) -> int:
    (N, K), M, r, (need_x, need_a, need_b) = shape_of(form), dy[0], _rank(a), rest[-3:]
    low = N * (need_x or need_a) + K * need_x + K * need_a + N * need_b
    flops: int = 2 * M * (K * N * need_x + r * low)
    return flops


_NO_VMAP = "the op on a quantised weight under vmap is not supported; make the batch more rows"
for _name, _kernel, _fake, _flops, _formula in (
    ("lora_linear_quantized", _linear, _fake_linear, _linear_flops, (_save, _gradients)),
    ("lora_linear_quantized_backward", _linear_backward, _fake_backward, _backward_flops, None),
):
    flops.add(_name, _flops)
    _dispatch.register(_name, _kernel, _fake, _formula, _NO_VMAP)
