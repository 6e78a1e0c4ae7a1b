"""The contract of the ops on one page: kernels, fakes, autograd. Their arguments are data in
`_contract`, their kernels live in backends/.

All tensors are 2-D here: x [M,K], weight [N,K], lora_a [r,K], lora_b [N,r], bias [N], y and
base_out [M,N]; seed is an int64 tensor on x's device of one element, or of three where x is a part
of a larger matrix: the seed, then the row and the column (a multiple of 8) of x's first element
there, which are those of the dropout mask. s [M,r] is what dB needs, of size 0 when it will not be
asked for: save_s is decided above autograd, where that is known.

    s = scaling * drop(x) A^T      y = x W^T + bias + s B^T      lora_add: y = base_out + s B^T
    ds = scaling * dy B            dx = dy W + drop'(ds A)       dA = ds^T drop(x)    dB = dy^T s
"""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from lora_kernels import _checks, _dispatch, backends
from lora_kernels._contract import OPS, Args, Op
from lora_kernels.rules import flops, vmap

# ------------------------------------------------------------------------------------------ kernels


def _forward(op: Op, args: Args) -> _dispatch.Results:
    base, x, branch = op.base(args), args[op.index["x"]], op.branch(args)
    results: _dispatch.Results = backends.serving(base, x, branch).forward(
        base, x, branch, args[-1]
    )
    return results


def _add_(op: Op, args: Args) -> None:
    base_out, x = args[:2]
    _checks.check_written(base_out, x)
    branch = op.branch(args)
    backends.serving(op.base(args), x, branch).add_(base_out, x, branch)


def _backward(op: Op, args: Args) -> _dispatch.Results:
    base, (dy, x), branch = op.base(args), args[:2], op.branch(args)
    backend = backends.serving(base, dy, branch)
    gradients = backend.backward(base, dy, x, args[op.index["s"]], branch, op.need(args))
    return gradients if op.has_weight else (gradients[0], *gradients[2:])


def _compute(op: Op) -> _dispatch.Compute:
    compute = _add_ if op.writes else _backward if op.is_backward else _forward

    def run(args: Args) -> _dispatch.Results | None:
        device = args[0].device.type
        if torch.is_autocast_enabled(device):
            # Dtypes are settled above the op; ATen calls inside it must not be cast again.
            with torch.autocast(device, enabled=False):
                return compute(op, args)
        return compute(op, args)

    return run


def _fake(op: Op) -> _dispatch.Fake:
    check = _checks.checker(op)

    def run(args: Args) -> tuple[Tensor, ...] | None:
        check(args)
        return op.fake(args)

    return run


# ----------------------------------------------------------------------------------------- autograd


def _formula(op: Op) -> tuple[_dispatch.Save, _dispatch.Gradients]:
    """Of lora_linear and lora_add: save and gradients, as `_dispatch` wants them."""
    index, backward = op.index, OPS[f"{op.name}_backward"]
    nothing = (None,) * len(op.arguments)
    wanted = [index[name] for name in ("x", "weight", "lora_a", "lora_b") if name in index]
    readers = [index[name] for name in ("weight", "lora_a") if name in index]  # of x
    bias, base_out = index.get("bias"), index.get("base_out")

    def save(ctx: Any, args: Args, output: _dispatch.Results) -> None:
        branch = op.branch(args)
        if branch.lora_b.requires_grad and not args[-1]:
            raise RuntimeError("lora_kernels: lora_b requires grad, which needs save_s=True")
        ctx.set_materialize_grads(False)
        x = args[index["x"]] if any(args[i].requires_grad for i in readers) else None
        weight = args[index["weight"]] if op.has_weight else None
        ctx.save_for_backward(x, weight, branch.lora_a, branch.lora_b, output[1], branch.seed)
        ctx.scaling, ctx.dropout_p = branch.scaling, branch.dropout_p
        given = None if bias is None else args[bias]
        ctx.bias_dtype = None if given is None else given.dtype

    def gradients(
        ctx: Any, needs: Sequence[bool], dy: Tensor | None, *_: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if dy is None:
            return nothing
        found: list[Tensor | None] = list(nothing)
        need = [needs[i] for i in wanted]
        if any(need):
            x, weight, a, b, s, seed = ctx.saved_tensors
            results = _dispatch.call_backward(
                backward.name, dy, x, *(() if weight is None else (weight,)), a, b, s,
                ctx.scaling, ctx.dropout_p, seed, *need,
            )  # fmt: skip
            for i, needed, result in zip(wanted, need, results, strict=True):
                found[i] = result if needed else None
        if bias is not None and needs[bias]:
            found[bias] = dy.sum(0).to(ctx.bias_dtype)
        if base_out is not None and needs[base_out]:
            found[base_out] = dy
        return tuple(found)

    return save, gradients


def _refuse_double_backward(ctx: Any, needs: Sequence[bool], *d_outputs: Tensor | None) -> NoReturn:
    """A backward op without a formula of its own would differentiate to silent zeros."""
    raise NotImplementedError("lora_kernels: double backward is not supported")


for _op in OPS.values():
    _dispatch.register_kernel(_op, _checks.checker(_op), _compute(_op))
    _dispatch.register_fake(_op, _fake(_op))
    if _op.is_backward:
        _dispatch.register_autograd(_op, lambda *args: None, _refuse_double_backward)
    elif _op.returns:
        _dispatch.register_autograd(_op, *_formula(_op))

vmap.register(_dispatch.LIBRARY)
flops.register()
