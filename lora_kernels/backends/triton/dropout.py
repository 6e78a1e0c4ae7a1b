"""The dropout of one call as the kernels take it; backends/dropout.py defines the mask."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from lora_kernels.backends.dropout import keep_scale, threshold


class Dropout(NamedTuple):
    """The kernels read the seed on the device: no host synchronisation, and a graph replay sees the
    value of its time. It has three words where x is a part of a larger matrix."""

    seed: Tensor
    threshold: int
    scale: float


# What is passed in place of one: no seed is read, nothing is scaled.
WITHOUT = (None, 0, 1.0)


def of(dropout_p: float, seed: Tensor | None) -> Dropout | None:
    if not dropout_p:
        return None
    assert seed is not None  # of a branch with dropout
    return Dropout(seed, threshold(dropout_p), keep_scale(dropout_p))


def words(dropout: Dropout | None) -> int:
    """How many words of the seed the kernels read, their DROP."""
    return 0 if dropout is None else dropout.seed.numel()
