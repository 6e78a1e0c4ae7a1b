"""Tensors that are split over ranks (DTensors), asked and read without importing what defines
them."""

from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: Tensor | None) -> "TypeGuard[DTensor]":
    """Whether it is a DTensor."""
    return hasattr(tensor, "placements")


def whole(tensor: Tensor) -> Tensor:
    """A DTensor gathered on every rank, which all of them call for; another tensor as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


@torch.no_grad()
def copy_whole(target: Tensor, value: Tensor) -> None:
    """target.copy_(value) for a value that every rank has whole."""
    target.copy_(replicated(value.to(target.device), target) if is_sharded(target) else value)


def replicated(value: Tensor, like: Tensor) -> Tensor:
    """A value that every rank has whole, as a DTensor on the mesh of another."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh  # type: ignore[attr-defined]  # of a DTensor
    return DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
