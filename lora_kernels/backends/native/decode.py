"""The compiled CUDA kernel for a few rows: forward in one launch (csrc/cuda/decode.cuh)."""

from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels.backends.native import extension
from lora_kernels.branch import Dense

MAX_ROWS = 16
DTYPES = (torch.float16, torch.bfloat16)


class DecodeTile(NamedTuple):
    """Rows of the weight and warps of a block, blocks that share out s."""

    rows: int
    warps: int
    cluster: int


def unreadable(x: Tensor, weight: Tensor, lora_a: Tensor) -> bool:
    """Whether the kernel cannot read the rows of a tensor in words of 16 bytes."""
    return x.shape[1] % 8 != 0 or not all(map(_in_words, (x, weight, lora_a)))


def _in_words(matrix: Tensor) -> bool:
    pitch = matrix.stride(0) * matrix.element_size() if matrix.shape[0] > 1 else 0
    return matrix.stride(1) == 1 and pitch % 16 == matrix.data_ptr() % 16 == 0


def why_absent() -> str | None:
    """Why the kernel cannot run on this machine."""
    if extension.cuda_available():
        return None
    return f"the CUDA kernels are not there: {extension.cuda_status()}"


def decode(
    x: Tensor,
    base: Dense,
    pair: tuple[Tensor, Tensor],
    scale: tuple[float, float],
    save_s: bool,
    tile: DecodeTile,
) -> tuple[Tensor, Tensor]:
    """(y, s), s of size 0 if it is not to be saved: x [M,K], base.weight [N,K] in x's dtype, and of
    the pair A [r,K] and B [N,r]; M at most 16; scale as `scaling.split` gives it."""
    y = x.new_empty(x.shape[0], base.weight.shape[0])
    s = x.new_empty(x.shape[0], pair[0].shape[0]) if save_s else None
    torch.ops.lora_kernels._decode_cuda(x, base.weight, *pair, base.bias, *scale, *tile, s, y)
    return y, x.new_empty(0) if s is None else s
