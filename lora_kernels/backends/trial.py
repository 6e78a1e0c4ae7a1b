"""Whether an elementwise kernel may stand in for ATen's calls on a GPU: where it has shown, once in
a process, to compute their bits."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch


def passes(
    known: dict[torch.device, bool],
    device: torch.device,
    deviation: Callable[[torch.device], str | None],
    otherwise: str,
) -> bool:
    """Whether `deviation` finds none on a device, as `known` holds it; never asked while a graph is
    captured, which could not compile the kernel nor wait for the result. `otherwise` begins the
    warning where there is one."""
    if device not in known:
        if torch.cuda.is_current_stream_capturing():
            return False
        known[device] = _try(device, deviation, otherwise)
    return known[device]


def _try(
    device: torch.device, deviation: Callable[[torch.device], str | None], otherwise: str
) -> bool:
    try:
        with torch.cuda.device(device):
            fault = deviation(device)
    except ImportError:
        return False  # no Triton: ATen's calls, as `doctor` says
    except Exception as error:
        fault = f"{type(error).__name__}: {(str(error) or '?').splitlines()[0]}"
    if fault is not None:
        warnings.warn(f"{otherwise} ({fault})", RuntimeWarning, stacklevel=3)
    return fault is None
