"""Who applies the dropout mask to ATen's tensors: the elementwise kernel on a GPU that has shown to
compute its bits, ATen's calls elsewhere."""

from __future__ import annotations

import warnings
from functools import cached_property

import torch
from torch import Tensor

from lora_kernels.backends.dropout import keep_mask


class Mask:
    """The mask of `rows` rows of x from `first_row` on, applied by ATen's calls."""

    def __init__(self, seed: Tensor, first_row: int, rows: int, columns: int, p: float) -> None:
        self.seed, self.first_row, self.p = seed, first_row, p
        self._shape = rows, columns

    @cached_property
    def _keep(self) -> Tensor:
        return keep_mask(self.seed, self.first_row, *self._shape, self.p)

    def drop(self, x: Tensor) -> Tensor:
        """x with 0 where it is dropped."""
        return x.masked_fill(~self._keep, 0)

    def add_kept(self, total: Tensor, term: Tensor, scale: float, columns: slice) -> None:
        """total += scale * term where x is kept, in these columns of the mask; term is used up."""
        total.add_(term.masked_fill_(~self._keep[:, columns], 0), alpha=scale)


class _KernelMask(Mask):
    """The same in one launch each, without a mask in memory."""

    def drop(self, x: Tensor) -> Tensor:
        from lora_kernels.backends.triton import masking

        with torch.cuda.device_of(x):
            return masking.drop(x, self.seed, self.first_row, self.p)

    def add_kept(self, total: Tensor, term: Tensor, scale: float, columns: slice) -> None:
        from lora_kernels.backends.triton import masking

        if columns.indices(self._shape[1]) != (0, self._shape[1], 1):
            super().add_kept(total, term, scale, columns)
            return
        if term.dtype == torch.float64:  # kernels take scales in fp32
            term, scale = term.mul_(scale), 1.0
        with torch.cuda.device_of(total):
            masking.add_kept(total, term, scale, self.seed, self.first_row, self.p)


def mask(seed: Tensor, first_row: int, rows: int, columns: int, p: float) -> Mask:
    """The mask of these rows: the kernel's where x lies on a GPU that computes it right."""
    by_kernel = seed.is_cuda and _vouched(seed.device)
    return (_KernelMask if by_kernel else Mask)(seed, first_row, rows, columns, p)


_right: dict[torch.device, bool] = {}


def _vouched(device: torch.device) -> bool:
    """Whether the kernel's bits are the definition's there; tried once in a process, never while a
    graph is captured, which could not compile it nor wait for the result."""
    if device not in _right:
        if torch.cuda.is_current_stream_capturing():
            return False
        _right[device] = _is_right(device)
    return _right[device]


def _is_right(device: torch.device) -> bool:
    try:
        from lora_kernels.backends.triton import masking

        with torch.cuda.device(device):
            fault = masking.deviation(device)
    except ImportError:
        return False  # no Triton: ATen's calls, as `doctor` says
    except Exception as error:
        fault = f"{type(error).__name__}: {(str(error) or '?').splitlines()[0]}"
    if fault is not None:
        warnings.warn(
            f"dropout on {device} takes ATen's calls, which are many: the mask kernel fails"
            f" ({fault})",
            RuntimeWarning,
            stacklevel=2,
        )
    return fault is None
