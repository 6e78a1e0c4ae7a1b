"""The lengths of the rows of W + scaling B A, for DoRA, from products of the rank's size."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lora_kernels.backends import blocked, dequantized
from lora_kernels.weights import QuantizedTensor, QuantizedWeight

HELD = "_norms"  # the key under which a module's dictionary holds those of evaluation


@torch.no_grad()
def weight_norms(
    weight: Tensor | QuantizedWeight, lora_a: Tensor, lora_b: Tensor, scaling: float | Tensor
) -> Tensor:
    """|W + scaling B A| of each row: [N] in fp32 (fp64 of an fp64 weight), without a gradient.

    The norm of DoRA (Liu et al., 2024, arXiv:2402.09353), without the sum, which is as large as W:

        |W|^2 + 2 scaling <W A^T, B> + scaling^2 <B (A A^T), B>        of each row, at least 0

    Args:
        weight: [N, K]. lora_a: [r, K]. lora_b: [N, r], in any floating dtypes.
    """
    if isinstance(weight, QuantizedTensor):
        weight = weight.record
    wide = isinstance(weight, Tensor) and weight.dtype == torch.float64
    dtype = torch.float64 if wide else torch.float32
    device = weight.device.type
    with torch.autocast("cpu" if device == "meta" else device, enabled=False):
        a, b = lora_a.to(dtype), lora_b.to(dtype)
        if isinstance(weight, QuantizedWeight):
            squares, cross = _of_strips(weight, a)
        else:
            squares = torch.linalg.vector_norm(weight, dim=1, dtype=dtype).square()
            cross = (weight @ lora_a.to(weight.dtype).t()).to(dtype)
        of_branch = 2 * cross + scaling * (b @ (a @ a.t()))
        total = squares + scaling * (of_branch * b).sum(1)
        return total.clamp_min(torch.finfo(dtype).tiny).sqrt()


def _of_strips(weight: QuantizedWeight, a: Tensor) -> tuple[Tensor, Tensor]:
    """|W|^2 of each row and W A^T, decoded a few rows at a time."""
    (N, K), r = weight.shape, a.shape[0]
    squares, cross = a.new_empty(N), a.new_empty(N, r)
    for rows in blocked.blocks(N, dequantized.rows_of_strip(weight, a.dtype)):
        memory = a.new_empty(rows.stop - rows.start, K)
        strip = dequantized.decode(weight, rows, slice(0, K), memory)
        squares[rows] = strip.square().sum(1)
        cross[rows] = strip @ a.t()
    return squares, cross


def norms_in_evaluation(
    held: dict[str, Any],
    weight: Tensor | QuantizedWeight,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float | Tensor,
) -> Tensor:
    """`weight_norms`, those that a module's dictionary holds where nothing has changed since: the
    tensors are the same and count no change. Torch does not count what is written to `.data`."""
    if isinstance(weight, QuantizedTensor):
        weight = weight.record
    # A record is never changed.
    counted = [lora_a, lora_b] if isinstance(weight, QuantizedWeight) else [weight, lora_a, lora_b]
    if torch.compiler.is_compiling() or isinstance(scaling, Tensor) or not _count_changes(counted):
        return weight_norms(weight, lora_a, lora_b, scaling)
    key = scaling, *((t.data_ptr(), t._version, t.dtype, t.shape) for t in counted)
    found: tuple[object, object, Tensor] | None = held.get(HELD)
    of_weight = weight if isinstance(weight, QuantizedWeight) else None
    if found is None or found[0] != key or found[1] is not of_weight:
        found = held[HELD] = key, of_weight, weight_norms(weight, lora_a, lora_b, scaling)
    return found[2]


def _count_changes(tensors: Sequence[Tensor]) -> bool:
    """Whether each change of the tensors is one that they count: not where torch's FSDP fills them,
    nor in a graph of CUDA, which is replayed without a look at them."""
    if dist.is_available() and dist.is_initialized():
        return False
    if any(type(t) not in (Tensor, nn.Parameter) or t.is_inference() for t in tensors):
        return False
    return not (tensors[0].is_cuda and torch.cuda.is_current_stream_capturing())
