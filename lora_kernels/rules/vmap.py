"""The ops under torch.func.vmap.

Where only the rows are batched (x, base_out, dy, s), there is no dropout and no gradient of a
parameter is asked for, the batch becomes more rows of one call. Otherwise the op is called once for
every element: with dropout because each has a mask from its own first row on, equal ones for
randomness="same" (one seed), others for "different" (a batch of seeds).
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lora_kernels._contract import OPS, Args, Op
from lora_kernels._namespace import ops, qualified

if TYPE_CHECKING:
    from torch._ops import OpOverload

InDims = tuple[int | None, ...]  # of every argument the dimension that is batched
Batched = tuple[tuple[Tensor, ...] | None, tuple[int | None, ...] | None]  # results, their dims
_PARAMETER_GRADIENTS = ("need_weight", "need_a", "need_b")


def register(library: torch.library.Library) -> None:
    for name, op in OPS.items():
        torch.library.register_vmap(qualified(name), _rule(op), lib=library)


def _rule(op: Op) -> Callable[..., Batched]:
    overload = getattr(ops, op.name).default

    def rule(info: Any, in_dims: InDims, *args: Any) -> Batched:
        if _only_rows(op, in_dims, args):
            return _as_rows(overload, op.rows, info.batch_size, in_dims, args)
        return _one_by_one(overload, info.batch_size, in_dims, args)

    return rule


def _only_rows(op: Op, in_dims: InDims, args: Args) -> bool:
    if op.writes:
        return False
    batched = {i for i, dim in enumerate(in_dims) if dim is not None}
    asked = any(args[op.index[name]] for name in _PARAMETER_GRADIENTS if name in op.index)
    return args[op.index["dropout_p"]] == 0 and batched.issubset(op.rows) and not asked


def _as_rows(
    op: Callable[..., Any], rows: tuple[int, ...], batch: int, in_dims: InDims, given: Args
) -> Batched:
    args = list(given)
    for i in rows:
        dim = in_dims[i]
        args[i] = args[i].expand(batch, *args[i].shape) if dim is None else args[i].movedim(dim, 0)
    leading = args[rows[0]].shape[:2]
    for i in rows:
        args[i] = args[i].flatten(0, 1)
    outputs = op(*args)
    # What was not asked for is of size 0 and has one dimension.
    dims = tuple(0 if output.dim() == 2 else None for output in outputs)
    return tuple(o.unflatten(0, leading) if o.dim() == 2 else o for o in outputs), dims


def _one_by_one(op: "OpOverload", batch: int, in_dims: InDims, args: Args) -> Batched:
    if not op._schema.returns and in_dims[0] is None:
        raise ValueError("base_out: is not batched by vmap, x or the adapter is; call lora_add")
    if batch == 0:
        raise ValueError("vmap: a batch of size 0 needs one where only x is batched, no dropout")
    calls = [
        op(*(a if dim is None else a.select(dim, i) for a, dim in zip(args, in_dims, strict=True)))
        for i in range(batch)
    ]
    if not op._schema.returns:
        return None, None
    outputs: tuple[Tensor, ...] = tuple(map(torch.stack, zip(*calls, strict=True)))
    return outputs, (0,) * len(outputs)
