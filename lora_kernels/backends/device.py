"""What tiles and plans depend on of a device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch


class Target(NamedTuple):
    arch: int  # 10 * major + minor of the compute capability; 0 of AMD's
    sms: int
    shared: int  # bytes of shared memory that a block may have
    gfx: str = ""  # AMD's name of the architecture, "" of NVIDIA's

    @property
    def is_hopper(self) -> bool:
        return self.arch // 10 == 9

    @property
    def is_blackwell(self) -> bool:
        """Of data centres: the consumers' kind has neither their tensor memory nor their shared
        memory, and computes as an Ada does."""
        return self.arch // 10 in (10, 11)

    @property
    def has_wide_tiles(self) -> bool:
        """Whether its tensor cores read shared memory, which TMA fills."""
        return self.is_hopper or self.is_blackwell

    @property
    def has_narrow_waves(self) -> bool:
        """Of AMD's: a warp has 32 threads, not 64."""
        return self.gfx.startswith("gfx1")

    @property
    def has_tensor_cores(self) -> bool:
        """That Triton uses: it has none for Turing."""
        return self.arch >= 80 or self.gfx.startswith(("gfx9", "gfx11", "gfx12"))


# A card of every kind, by architecture: T4, A100, RTX 3090, L40S, H100, B200, RTX 5090; MI300X,
# MI350X, RX 9070 XT.
CARDS = {
    "75": Target(75, 40, 65_536),
    "80": Target(80, 108, 166_912),
    "86": Target(86, 82, 101_376),
    "89": Target(89, 142, 101_376),
    "90": Target(90, 132, 232_448),
    "100": Target(100, 148, 232_448),
    "120": Target(120, 170, 101_376),
    "gfx942": Target(0, 304, 65_536, "gfx942"),
    "gfx950": Target(0, 256, 163_840, "gfx950"),
    "gfx1201": Target(0, 64, 65_536, "gfx1201"),
}
# An interpreted call pretends to be a small Hopper, so that persistent loops make several rounds.
_INTERPRETED = CARDS["90"]._replace(sms=3)

_assumed: Target | None = None


def target(device: torch.device) -> Target:
    if _assumed is not None:
        return _assumed
    if device.type != "cuda":
        return _INTERPRETED
    return _properties(torch.cuda.current_device() if device.index is None else device.index)


def current() -> Target:
    """The device that Triton would launch on."""
    return target(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


@cache
def _properties(index: int) -> Target:
    device = torch.cuda.get_device_properties(index)
    sms = device.multi_processor_count
    # torch for AMD does not tell of the first.
    shared = getattr(device, "shared_memory_per_block_optin", device.shared_memory_per_block)
    if torch.version.hip is not None:
        return Target(0, sms, shared, device.gcnArchName.partition(":")[0])
    return Target(10 * device.major + device.minor, sms, shared)


@contextmanager
def assume(device: Target) -> Iterator[None]:
    """Choose tiles and kernels for another device than the tensors' own."""
    global _assumed
    before, _assumed = _assumed, device
    try:
        yield
    finally:
        _assumed = before
