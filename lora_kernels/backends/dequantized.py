"""Products with a quantised weight that is decoded strip by strip: at most a quarter of the weight
is there at a time, and no more than a cache holds, so that the product reads what was just written.
Only what is small, or a few vectors in all, is a strip of its own.

The weight is rounded to the dtype of the rows, as its owner's own method rounds it.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lora_kernels.backends import blocked, trial
from lora_kernels.backends.native import quantized as native
from lora_kernels.weights import QuantizedWeight

# More than 8 MiB are past a core's share of the cache, more than 32 past the last cache of a large
# GPU. Under 4 a quarter is too narrow a matrix: the product costs more than the memory is worth.
_CPU_STRIP_BYTES, _ACCELERATOR_STRIP_BYTES, _LEAST_BYTES = 8 << 20, 32 << 20, 4 << 20
_SHARE = 4
_ALIGNED = 128  # rows and columns of strips; any block of a layout fits
_FEW = 16  # rows, of a weight that has not many


def product(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """y [M,N] = x W^T + bias of x [M,K], by strips of rows of W."""
    N, K = weight.shape
    y = x.new_empty(x.shape[0], N)
    wide = blocked.is_wide(x, forward=True)
    if bias is not None:
        bias = bias.to(x.dtype)
    step = rows_of_strip(weight, _dtype_of_strips(x, wide))
    memory = x.new_empty(min(N, step), K)
    for rows in blocked.blocks(N, step):
        strip = decode(weight, rows, slice(0, K), memory[: rows.stop - rows.start])
        some = None if bias is None else bias[rows]
        if wide:
            y[:, rows] = blocked.product(x, strip, some)
        elif some is None:
            torch.mm(x, strip.t(), out=y[:, rows])
        else:
            torch.addmm(some, x, strip.t(), out=y[:, rows])
    return y


def add_gradient(dx: Tensor, dy: Tensor, weight: QuantizedWeight) -> None:
    """dx [M,K] += dy W of dy [M,N], by strips of columns of W: each element is rounded once."""
    N, K = weight.shape
    wide = blocked.is_wide(dy)
    most = _fitting(weight, K, _dtype_of_strips(dy, wide))
    step = _even(K, most, _ALIGNED)
    memory = dy.new_empty(N * min(K, step))
    for columns in blocked.blocks(K, step):
        width = columns.stop - columns.start
        strip = decode(weight, slice(0, N), columns, memory[: N * width].view(N, width))
        if wide:
            blocked.add_product(dx[:, columns], dy, strip)
        else:
            dx[:, columns].addmm_(dy, strip)


def decode(weight: QuantizedWeight, rows: slice, columns: slice, out: Tensor) -> Tensor:
    """A part of the weight into `out`."""
    return _decoder(weight, columns, out.dtype)[1](weight, rows, columns, out)


def decoder(weight: QuantizedWeight, dtype: torch.dtype) -> str:
    """Who decodes it for rows of a dtype, in words."""
    return _decoder(weight, slice(0, weight.shape[1]), dtype)[0]


_Decode = Callable[[QuantizedWeight, slice, slice, Tensor], Tensor]


def _decoder(weight: QuantizedWeight, columns: slice, dtype: torch.dtype) -> tuple[str, _Decode]:
    """The kernels that know these columns of the weight, else what it does itself."""
    if native.decodes(weight, columns, dtype):
        return "the compiled CPU kernels", native.decode
    if weight.device.type == "cuda" and _vouched(weight.device):
        from lora_kernels.backends.triton import decoding

        if decoding.decodes(weight, columns, dtype):
            return "Triton's kernel", _by_triton
    return "ATen's calls", type(weight).decode


def _by_triton(weight: QuantizedWeight, rows: slice, columns: slice, out: Tensor) -> Tensor:
    from lora_kernels.backends.triton import decoding

    with torch.cuda.device_of(out):
        return decoding.decode(weight, rows, columns, out)


_right: dict[torch.device, bool] = {}


def _vouched(device: torch.device) -> bool:
    """Whether the kernel's bits are those of the weights there."""
    return trial.passes(
        _right, device, _deviation,
        f"quantised weights on {device} are decoded by ATen's calls, which are many: the kernel"
        " fails",
    )  # fmt: skip


def _deviation(device: torch.device) -> str | None:
    from lora_kernels.backends.triton import decoding

    return decoding.deviation(device)


def rows_of_strip(weight: QuantizedWeight, dtype: torch.dtype) -> int:
    """How many rows of a weight are a strip in a dtype."""
    most = _fitting(weight, weight.shape[0], dtype)
    return _even(weight.shape[0], most, _ALIGNED if most >= _ALIGNED else _FEW)


def _even(count: int, most: int, unit: int) -> int:
    """The step by which `count` is gone through in equal parts, of whole units and at most `most`,
    but at least of one unit."""
    parts = -(-count // (max(1, most // unit) * unit))
    return -(-count // (parts * unit)) * unit


def _fitting(weight: QuantizedWeight, count: int, dtype: torch.dtype) -> int:
    """Of the weight's `count` vectors, how many may be decoded at a time."""
    N, K = weight.shape
    whole = N * K * dtype.itemsize
    most = _CPU_STRIP_BYTES if weight.device.type == "cpu" else _ACCELERATOR_STRIP_BYTES
    return min(most, max(_LEAST_BYTES, whole // _SHARE)) * count // whole


def _dtype_of_strips(rows: Tensor, wide: bool) -> torch.dtype:
    """That which they are multiplied in: there may be such a copy of each."""
    return torch.float32 if wide else rows.dtype
