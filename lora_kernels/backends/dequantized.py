"""Products with a quantised weight that is decoded strip by strip, each as large as the cache of a
core or a few launches want it: at no time is there a copy of the whole.

The weight is rounded to the dtype of the rows, as its owner's own method rounds it.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lora_kernels.backends import blocked, trial
from lora_kernels.backends.native import quantized as native
from lora_kernels.weights import QuantizedWeight

_CPU_STRIP_BYTES = 8 << 20
_ACCELERATOR_STRIP_BYTES = 64 << 20
_ALIGNED = 128  # rows and columns of strips; any block of a layout fits


def product(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """y [M,N] = x W^T + bias of x [M,K], by strips of rows of W."""
    N, K = weight.shape
    y = x.new_empty(x.shape[0], N)
    wide = blocked.is_wide(x, forward=True)
    if bias is not None:
        bias = bias.to(x.dtype)
    step = _step(K, x)
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
    step = _step(N, dy)
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


def _step(length: int, rows: Tensor) -> int:
    """How many vectors of a length are a strip, in the dtype of rows."""
    most = _CPU_STRIP_BYTES if rows.device.type == "cpu" else _ACCELERATOR_STRIP_BYTES
    return max(1, most // (length * rows.element_size() * _ALIGNED)) * _ALIGNED
