"""The compiled CUDA kernel for a few rows: forward in one launch (csrc/cuda/decode.cuh)."""

import torch
from torch import Tensor

from lora_kernels.backends.native import extension

MAX_ROWS = 16
DTYPES = (torch.float16, torch.bfloat16)


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
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    scale: tuple[float, float],
    save_s: bool,
    rows: int,
    warps: int,
    cluster: int,
) -> tuple[Tensor, Tensor]:
    """(y, s), s of size 0 if it is not to be saved: x [M,K], weight [N,K], lora_a [r,K], lora_b
    [N,r], M at most 16; scale as `scaling.split` gives it. A block of `warps` warps takes `rows`
    rows of the weight; `cluster` blocks share out s."""
    M, r = x.shape[0], lora_a.shape[0]
    y = x.new_empty(M, weight.shape[0])
    s = x.new_empty(M, r) if save_s else None
    torch.ops.lora_kernels._decode_cuda(
        x, weight, lora_a, lora_b, bias, *scale, rows, warps, cluster, s, y
    )
    return y, x.new_empty(0) if s is None else s
