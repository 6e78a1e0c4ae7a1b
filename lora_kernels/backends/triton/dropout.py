"""The dropout of one call as the kernels take it; backends/dropout.py defines the mask."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from lora_kernels.backends.dropout import keep_scale, threshold


class Dropout(NamedTuple):
    """The kernels read the seed on the device: no host synchronisation, and a graph replay sees the
    value of its time."""

    seed: Tensor
    threshold: int
    scale: float


def of(dropout_p: float, seed: Tensor | None) -> Dropout | None:
    return Dropout(seed, threshold(dropout_p), keep_scale(dropout_p)) if dropout_p else None
