"""The LoRA branch of an embedding: a linear layer whose x is one-hot, of which nobody makes the
ones and noughts."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class _Columns(torch.autograd.Function):
    """A [r, V], indices [M] -> [M, r]. The gradient of A is zero but for the columns that were
    read, which are summed in one order, in fp32 where they are of 16 bits."""

    generate_vmap_rule = True

    @staticmethod
    def forward(A: Tensor, indices: Tensor, padding_idx: int | None) -> Tensor:
        return A.index_select(1, indices).t()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        A, indices, ctx.padding_idx = inputs
        ctx.shape, ctx.dtype = A.shape, A.dtype
        ctx.save_for_backward(indices)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (indices,) = ctx.saved_tensors
        wide = torch.float64 if ctx.dtype == torch.float64 else torch.float32
        gradient = gradient.to(wide)
        if ctx.padding_idx is not None:
            gradient = gradient.masked_fill((indices == ctx.padding_idx)[:, None], 0)
        total = gradient.new_zeros(ctx.shape)
        # Each is the one of the two whose sums have one order on its device.
        if total.is_cuda:
            total.t().index_put_((indices,), gradient, accumulate=True)
        else:
            total.index_add_(1, indices, gradient.t())
        return total.to(ctx.dtype), None, None


def lora_embedding(
    indices: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scaling: float = 1.0,
    padding_idx: int | None = None,
) -> Tensor:
    """Rows of an embedding with a LoRA adapter: `weight + scaling (lora_b lora_a)^T` at `indices`.

    Equivalent to::

        F.embedding(indices, weight) + scaling * F.embedding(indices, lora_a.t()) @ lora_b.t()

    rounded once. Backward keeps the indices and the [M, r] rows of `lora_a`; the gradient of
    `lora_a` is summed in an order of its own, the same in every run, and is zero in columns that
    `indices` does not name, and in that of `padding_idx`.

    Args:
        indices: int64 or int32, of any shape [...], each in [0, V).
        weight: [V, D], fp32, fp16, bf16 or fp64. Gets a gradient if it requires one.
        lora_a: [r, V], in the weight's dtype or fp32, as PEFT's lora_embedding_A.
        lora_b: [D, r], likewise.
        scaling: a float.
        padding_idx: an index whose rows give no gradient to `weight` and `lora_a`.

    Returns:
        [..., D] in the weight's dtype, under autocast too.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit.
    """
    _check(indices, weight, lora_a, lora_b)
    base = F.embedding(indices, weight, padding_idx)
    return add_branch(base, indices, lora_a, lora_b, scaling, padding_idx)


def add_branch(
    base: Tensor,
    indices: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    padding_idx: int | None,
) -> Tensor:
    """The branch of `lora_embedding` on top of rows `base` [..., D], unchecked."""
    dtype = base.dtype
    columns: Any = _Columns.apply
    s: Tensor = columns(lora_a, indices.reshape(-1), padding_idx)
    with torch.autocast(base.device.type, enabled=False):
        rows = base.reshape(-1, base.shape[-1])
        y = torch.addmm(rows, s.to(dtype), lora_b.to(dtype).t(), alpha=scaling)
    return y.view(base.shape)


def _check(indices: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor) -> None:
    given = {"indices": indices, "weight": weight, "lora_a": lora_a, "lora_b": lora_b}
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}")
    if weight.dim() != 2:
        raise ValueError(f"weight: expected shape [V, D], got {tuple(weight.shape)}")
    (V, D), r = weight.shape, lora_a.shape[0] if lora_a.dim() else 0
    if lora_a.shape != (r, V) or r == 0:
        raise ValueError(
            f"lora_a: expected shape [r, V] with r >= 1 and V = {V}, got {tuple(lora_a.shape)}"
        )
    if lora_b.shape != (D, r):
        raise ValueError(f"lora_b: expected shape [D, r] = [{D}, {r}], got {tuple(lora_b.shape)}")
    if indices.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"indices: expected int64 or int32, got {indices.dtype}")
    if weight.dtype not in _FLOATS:
        raise TypeError(f"weight: expected a floating dtype, got {weight.dtype}")
    for name in ("lora_a", "lora_b"):
        dtype = given[name].dtype
        if dtype != weight.dtype and (dtype != torch.float32 or weight.dtype == torch.float64):
            raise TypeError(
                f"{name}: expected the weight's dtype {weight.dtype} or float32, got {dtype}"
            )
    for name, tensor in given.items():
        if tensor.device != weight.device:
            raise ValueError(
                f"{name}: expected the weight's device {weight.device}, got {tensor.device}"
            )
