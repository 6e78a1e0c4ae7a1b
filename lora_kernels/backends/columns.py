"""Who scales the columns of a matrix: one elementwise kernel on a GPU that has shown to compute
what ATen's calls do, these elsewhere, of 16 bits a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lora_kernels.backends import blocked, trial

_BLOCK_ELEMENTS = 1 << 18


def forward(z: Tensor, factor: Tensor, added: Tensor | None) -> Tensor:
    """z * factor + added of z [..., N], rounded once; added is [N] or as z."""
    if z.is_cuda and z.numel() and _vouched(z.device):
        from lora_kernels.backends.triton import columns

        with torch.cuda.device_of(z):
            return columns.forward(z, factor, added)
    return _forward(z, factor, added)


def backward(
    dy: Tensor, z: Tensor | None, factor: Tensor, need_z: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(dz in dy's dtype, dfactor in factor's), the second where z is given."""
    if dy.is_cuda and dy.numel() and _vouched(dy.device):
        from lora_kernels.backends.triton import columns

        with torch.cuda.device_of(dy):
            return columns.backward(dy, z, factor, need_z)
    return _backward(dy, z, factor, need_z)


def _forward(z: Tensor, factor: Tensor, added: Tensor | None) -> Tensor:
    if z.dtype == factor.dtype or z.numel() <= _BLOCK_ELEMENTS:
        y = z * factor if added is None else torch.addcmul(added.to(factor.dtype), z, factor)
        return y.to(z.dtype)
    y = torch.empty_like(z, memory_format=torch.contiguous_format)
    rows, out = z.reshape(-1, z.shape[-1]), y.view(-1, z.shape[-1])
    whole = None if added is None or added.dim() == 1 else added.reshape(rows.shape)
    bias = None if added is None or whole is not None else added.to(factor.dtype)
    for block in _blocks(rows):
        wide = rows[block].to(factor.dtype).mul_(factor)
        if whole is not None:
            wide.add_(whole[block])
        elif bias is not None:
            wide.add_(bias)
        out[block] = wide
    return y


def _backward(
    dy: Tensor, z: Tensor | None, factor: Tensor, need_z: bool
) -> tuple[Tensor | None, Tensor | None]:
    N = dy.shape[-1]
    rows = dy.reshape(-1, N)
    others = None if z is None else z.reshape(-1, N)
    dz = torch.empty_like(dy, memory_format=torch.contiguous_format) if need_z else None
    out = None if dz is None else dz.view(-1, N)
    dfactor = None if others is None else factor.new_zeros(N)
    for block in _blocks(rows):
        wide = rows[block].to(factor.dtype)
        if dfactor is not None and others is not None:
            dfactor += (wide * others[block]).sum(0)
        if out is not None:
            torch.mul(wide, factor, out=out[block])
    return dz, dfactor


def _blocks(rows: Tensor) -> Iterator[slice]:
    return blocked.blocks(len(rows), max(1, _BLOCK_ELEMENTS // max(1, rows.shape[1])))


_right: dict[torch.device, bool] = {}


def _vouched(device: torch.device) -> bool:
    """Whether the kernel computes what ATen's calls do there."""
    return trial.passes(
        _right, device, _deviation,
        f"columns on {device} are scaled by ATen's calls, which are many: the kernel fails",
    )  # fmt: skip


def _deviation(device: torch.device) -> str | None:
    from lora_kernels.backends.triton import columns

    return columns.deviation(device, _forward, _backward)
