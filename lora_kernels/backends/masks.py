"""Who applies the dropout mask to ATen's tensors: the elementwise kernel on a GPU that has shown to
compute its bits, ATen's calls elsewhere."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from lora_kernels.backends import trial
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
    """Whether the kernel's bits are the definition's there."""
    return trial.passes(
        _right, device, _deviation,
        f"dropout on {device} takes ATen's calls, which are many: the mask kernel fails",
    )  # fmt: skip


def _deviation(device: torch.device) -> str | None:
    from lora_kernels.backends.triton import masking

    return masking.deviation(device)
