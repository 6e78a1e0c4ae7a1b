"""What tiles and plans depend on of a device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch


class Target(NamedTuple):
    arch: int  # 10 * major + minor of the compute capability
    sms: int


# An interpreted call pretends to be a small Hopper, so that persistent loops make several rounds.
_INTERPRETED = Target(arch=90, sms=3)

_assumed: Target | None = None


def target(device: torch.device) -> Target:
    if _assumed is not None:
        return _assumed
    if device.type != "cuda":
        return _INTERPRETED
    return _properties(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _properties(index: int) -> Target:
    device = torch.cuda.get_device_properties(index)
    return Target(10 * device.major + device.minor, device.multi_processor_count)


@contextmanager
def assume(device: Target) -> Iterator[None]:
    """Choose tiles and kernels for another device than the tensors' own."""
    global _assumed
    before, _assumed = _assumed, device
    try:
        yield
    finally:
        _assumed = before
