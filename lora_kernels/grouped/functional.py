"""The grouped ops as other libraries call them: checks, autocast and flattening around `ops`."""

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels import _checks, _dispatch, _namespace
from lora_kernels._contract import DTYPES
from lora_kernels.direct import draw_seed
from lora_kernels.grouped import direct, ops
from lora_kernels.grouped.groups import Groups, whole_numbers
from lora_kernels.sharding import is_sharded

Stack = Tensor | Sequence[Tensor]


def lora_linear_grouped(
    x: Tensor,
    weight: Tensor,
    lora_a: Stack,
    lora_b: Stack,
    groups: Groups,
    bias: Tensor | None = None,
    *,
    weight_of: Sequence[int] | None = None,
    scaling: float | Sequence[float] = 1.0,
    dropout_p: float = 0.0,
    seed: int | Sequence[int] | Tensor | None = None,
) -> Tensor:
    """Linear layer whose rows have adapters of their own, or experts and adapters.

    Row m of group g is::

        F.linear(x[m], W_g, bias_g) + scaling_g * F.linear(F.linear(drop(x[m]), A_g), B_g)

    Rows of no group are those of the frozen layer, bit for bit, or zero where each group has a
    weight of its own; rows past the last segment are zero, as are their gradients. The bits of a
    group's rows and gradients do not depend on what other groups hold. A group without rows has a
    gradient of zeros in a stack, None in a sequence.

    Args:
        x: [..., K]; fp32, fp16, bf16 or fp64, dense.
        weight: [N, K] of all rows, or [E, N, K] of experts, in x's dtype. Under autocast x, weight
            and bias are cast to the autocast dtype.
        lora_a: [G, r, K], or G tensors [r_g, K] with ranks of their own, in x's dtype or fp32.
        lora_b: [G, N, r], or G tensors [N, r_g], likewise.
        groups: which rows are whose; see `Groups`.
        bias: [N], or [E, N] of experts, in x's dtype, or None.
        weight_of: the expert of each group, where weight is [E, N, K]; group g is of expert g if
            not given.
        scaling: factor of the branches, or one of each group.
        dropout_p: probability in [0, 1) of dropping elements of x in the branch.
        seed: of the masks: an int for all groups, or G of them, or an int64 tensor [G]; drawn from
            torch's generator if not given. A row's mask follows from its group's seed and its place
            among the group's rows, as in a call of `lora_linear` with these rows alone.

    Returns:
        [..., N] in x's dtype, differentiable in x, weight, lora_a, lora_b and bias.

    Raises ValueError (shapes, devices, values), TypeError (dtypes) and NotImplementedError
    (DTensors), naming the argument; NotImplementedError under torch.vmap, torch.func's transforms
    and forward-mode AD.
    """
    if weight_of is None and dropout_p == 0 and not torch.compiler.is_compiling():
        found = direct.linear(x, weight, (lora_a, lora_b), groups, bias, scaling)
        if found is not None:
            return found
    pairs = _pairs(lora_a, lora_b)
    K = _columns(x)
    _require_tensors({"weight": weight} if bias is None else {"weight": weight, "bias": bias})
    experts = weight.dim() == 3
    if weight.dim() not in (2, 3) or weight.shape[-1] != K:
        raise ValueError(
            f"weight: expected shape [N, K] or [E, N, K] with K = {K} of x, got {_shape(weight)}"
        )
    N = weight.shape[-2]
    _check_pairs(pairs, groups, K, N)
    wanted = weight.shape[:-1]
    if bias is not None and bias.shape != wanted:
        raise ValueError(f"bias: expected shape {tuple(wanted)}, got {_shape(bias)}")
    of_groups = _weight_of(weight_of, weight.shape[0], groups.count) if experts else None
    if weight_of is not None and not experts:
        raise ValueError(f"weight_of: expected None for one weight {_shape(weight)}")
    x, pairs, autocast = _under_autocast(x, pairs)
    _check_dtypes(x, pairs, {"weight": weight, "bias": bias}, autocast)
    rows = x.reshape(-1, K)
    call = _call(pairs, groups, rows, (scaling, dropout_p, seed))
    arguments: tuple[Any, ...] = (
        rows,
        weight,
        *call.pairs,
        bias,
        of_groups,
        *call.rest,
        _saves(call),
    )
    _refuse_other_modes(call, rows, weight, bias)
    y: Tensor
    if not _is_unwatched(call, rows, weight, bias):
        y = _namespace.ops.lora_linear_grouped(*arguments)[0]
    elif _trains(call, rows, weight, bias):
        y = direct.trained(arguments)
    else:
        y = ops.linear(*arguments)[0]
    return y.view(*x.shape[:-1], N)


def lora_add_grouped(
    base_out: Tensor,
    x: Tensor,
    lora_a: Stack,
    lora_b: Stack,
    groups: Groups,
    *,
    scaling: float | Sequence[float] = 1.0,
    dropout_p: float = 0.0,
    seed: int | Sequence[int] | Tensor | None = None,
) -> Tensor:
    """The branches of `lora_linear_grouped` on top of a base output that something else computed.

    `base_out` is [..., N] with the leading dimensions of x, in x's dtype; rows of no group and past
    the last segment are those of base_out. Arguments, errors and gradients (to base_out, x, lora_a
    and lora_b) are those of `lora_linear_grouped`.
    """
    pairs = _pairs(lora_a, lora_b)
    _require_tensors({"base_out": base_out})
    K, N = _columns(x), base_out.shape[-1] if base_out.dim() else 0
    _check_pairs(pairs, groups, K, N)
    if base_out.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"base_out: expected the leading dimensions of x {_shape(x)}, got {_shape(base_out)}"
        )
    x, pairs, autocast = _under_autocast(x, pairs)
    base_out = base_out.to(x.dtype) if autocast and base_out.is_floating_point() else base_out
    _check_dtypes(x, pairs, {"base_out": base_out}, False)
    rows = x.reshape(-1, K)
    call = _call(pairs, groups, rows, (scaling, dropout_p, seed))
    base_rows = base_out.reshape(-1, N)
    arguments: tuple[Any, ...] = (base_rows, rows, *call.pairs, *call.rest, _saves(call))
    _refuse_other_modes(call, rows, base_rows)
    given = call, rows, base_rows, None
    unseen = _is_unwatched(*given) and not _trains(*given)
    y: Tensor = (ops.add if unseen else _namespace.ops.lora_add_grouped)(*arguments)[0]
    return y.view(base_out.shape)


class _Call(NamedTuple):
    """(lora_a, lora_b), and what follows them in both ops."""

    pairs: tuple[list[Tensor], list[Tensor]]
    rest: tuple[object, ...]


def _call(
    pairs: tuple[list[Tensor], list[Tensor]],
    groups: Groups,
    rows: Tensor,
    values: tuple[float | Sequence[float], float, int | Sequence[int] | Tensor | None],
) -> _Call:
    scaling, dropout_p, seed = values
    count = groups.count
    if groups.offsets.device != rows.device:
        raise ValueError(
            f"groups: expected x's device {rows.device}, got {groups.offsets.device}; move them"
            " with groups.to"
        )
    if groups.rows is not None and groups.rows != len(rows):
        raise ValueError(f"groups: expected those of {len(rows)} rows, got {groups.rows}")
    factors = _each("scaling", scaling, count)
    for factor in factors:
        _checks.check_range(factor, 0.0)
    _checks.check_range(1.0, dropout_p)
    seeds = _seeds(seed, count, rows.device) if dropout_p else None
    order, bounds = groups.order, None
    if not torch.compiler.is_compiling():  # else the numbers would be part of the graph
        bounds = groups.bounds
        order = None if groups.in_order else order
    if bounds is not None and not isinstance(pairs[0], _Unbound):
        pairs = direct.with_rows(pairs[0], bounds), direct.with_rows(pairs[1], bounds)
    known = None if bounds is None else list(bounds)
    rest = (order, groups.offsets, known, factors, float(dropout_p), seeds)
    return _Call((list(pairs[0]), list(pairs[1])), rest)


class _Unbound(list[Tensor]):
    """The parts of a stack: their gradients are parts of one."""


def _pairs(lora_a: Stack, lora_b: Stack) -> tuple[list[Tensor], list[Tensor]]:
    for name, stack in (("lora_a", lora_a), ("lora_b", lora_b)):
        if not isinstance(stack, Tensor):
            continue
        _require_tensors({name: stack})
        if stack.dim() != 3:
            raise ValueError(
                f"{name}: expected a stack of 3 dimensions or a sequence, got {_shape(stack)}"
            )
    a, b = (
        _Unbound(stack.unbind(0)) if isinstance(stack, Tensor) else list(stack)
        for stack in (lora_a, lora_b)
    )
    for name, tensors in (("lora_a", a), ("lora_b", b)):
        _require_tensors({f"{name}[{g}]": tensor for g, tensor in enumerate(tensors)})
    return a, b


def _require_tensors(given: dict[str, Tensor]) -> None:
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}")
        if is_sharded(tensor):
            raise NotImplementedError(
                f"{name}: expected a plain tensor, got a DTensor, which the grouped ops do not"
                " compute with; give each rank its own rows and whole adapters (to_local,"
                " full_tensor)"
            )


def _saves(call: _Call) -> bool:
    return torch.is_grad_enabled() and any(b.requires_grad for b in call.pairs[1])


def _refuse_other_modes(call: _Call, *others: Tensor | None) -> None:
    if not torch.compiler.is_compiling():
        _dispatch.refuse_gradient_transforms("grouped ops")
        _dispatch.refuse_forward_mode((*others, *call.pairs[0], *call.pairs[1]))


def _is_unwatched(call: _Call, x: Tensor, base: Tensor, bias: Tensor | None) -> bool:
    """Whether nothing would see the op, so that what it computes is all that matters."""
    if torch.compiler.is_compiling() or x.is_meta:
        return False
    return _dispatch.is_unwatched(x, base, bias, *call.pairs[0], *call.pairs[1])


def _trains(call: _Call, x: Tensor, base: Tensor, bias: Tensor | None) -> bool:
    tensors = (bias, *call.pairs[0], *call.pairs[1])
    return torch.is_grad_enabled() and _dispatch.any_requires_grad(x, base, *tensors)


def _columns(x: Tensor) -> int:
    _require_tensors({"x": x})
    _checks.check_layout("x", x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: expected shape [..., K] with K >= 1, got {_shape(x)}")
    return x.shape[-1]


def _check_pairs(pairs: tuple[list[Tensor], list[Tensor]], groups: Groups, K: int, N: int) -> None:
    if not isinstance(groups, Groups):
        raise TypeError(f"groups: expected Groups, got {type(groups).__name__}")
    for name, tensors in zip(("lora_a", "lora_b"), pairs, strict=True):
        if len(tensors) != groups.count:
            raise ValueError(
                f"{name}: expected one of each of {groups.count} groups, got {len(tensors)}"
            )
    for g, (a, b) in enumerate(zip(*pairs, strict=True)):
        if a.dim() != 2 or a.shape[1] != K or a.shape[0] == 0:
            raise ValueError(
                f"lora_a[{g}]: expected shape [r, K] with r >= 1 and K = {K} of x, got {_shape(a)}"
            )
        if b.shape != (N, a.shape[0]):
            raise ValueError(
                f"lora_b[{g}]: expected shape [N, r] = [{N}, {a.shape[0]}], got {_shape(b)}"
            )


def _weight_of(weight_of: Sequence[int] | None, experts: int, groups: int) -> list[int]:
    if weight_of is None:
        if experts != groups:
            raise ValueError(
                f"weight: expected one of each of {groups} groups, got {experts}; say which is"
                " whose by weight_of"
            )
        return [*range(groups)]
    found = whole_numbers("weight_of", weight_of)
    if len(found) != groups or not all(0 <= expert < experts for expert in found):
        raise ValueError(
            f"weight_of: expected one of {experts} experts for each of {groups} groups, got {found}"
        )
    return found


def _under_autocast(
    x: Tensor, pairs: tuple[list[Tensor], list[Tensor]]
) -> tuple[Tensor, tuple[list[Tensor], list[Tensor]], bool]:
    a, b = pairs
    x, cast, autocast = _checks.under_autocast(x, [*a, *b])
    return x, (type(a)(cast[: len(a)]), type(b)(cast[len(a) :])), autocast


def _check_dtypes(
    x: Tensor,
    pairs: tuple[list[Tensor], list[Tensor]],
    others: dict[str, Tensor | None],
    autocast: bool,
) -> None:
    if x.dtype not in DTYPES:
        raise TypeError(f"x: expected float32, float16, bfloat16 or float64, got {x.dtype}")
    for name, tensor in others.items():
        if tensor is None:
            continue
        _check_device(name, tensor, x)
        if tensor.dtype != x.dtype and not (autocast and tensor.dtype in DTYPES[:3]):
            raise TypeError(f"{name}: expected x's dtype {x.dtype}, got {tensor.dtype}")
    for name, tensors in zip(("lora_a", "lora_b"), pairs, strict=True):
        for g, tensor in enumerate(tensors):
            _check_device(f"{name}[{g}]", tensor, x)
            wide = tensor.dtype == torch.float32 and x.dtype != torch.float64
            if tensor.dtype != x.dtype and not wide:
                raise TypeError(
                    f"{name}[{g}]: expected x's dtype {x.dtype} or float32, got {tensor.dtype}"
                )


def _check_device(name: str, tensor: Tensor, x: Tensor) -> None:
    _checks.check_layout(name, tensor)
    if tensor.device != x.device:
        raise ValueError(f"{name}: expected x's device {x.device}, got {tensor.device}")


def _each(name: str, value: float | Sequence[float], count: int) -> list[float]:
    values = [value] * count if isinstance(value, Real) else [*value]  # type: ignore[misc]
    if len(values) != count:
        raise ValueError(f"{name}: expected one of each of {count} groups, got {len(values)}")
    for one in values:
        if isinstance(one, bool) or not isinstance(one, Real):
            raise TypeError(f"{name}: expected numbers, got {type(one).__name__}")
    return [float(one) for one in values]


def _seeds(seed: int | Sequence[int] | Tensor | None, count: int, device: torch.device) -> Tensor:
    """int64 [G] on the device."""
    if seed is None:
        return torch.stack([draw_seed(device) for _ in range(count)])
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.shape != (count,):
            raise ValueError(
                f"seed: expected an int64 tensor [{count}], got {seed.dtype} {_shape(seed)}"
            )
        return seed.to(device)
    values = [seed] * count if isinstance(seed, Integral) else [*seed]  # type: ignore[misc]
    whole = all(isinstance(one, Integral) and not isinstance(one, bool) for one in values)
    if len(values) != count or not whole or not all(-(2**63) <= int(s) < 2**63 for s in values):
        raise ValueError(f"seed: expected an int of 64 bits, or one of each of {count} groups")
    return torch.tensor([int(one) for one in values], dtype=torch.int64, device=device)


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
