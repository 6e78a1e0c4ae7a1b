"""LORA_KERNELS_TUNE=auto: a kind of call that no table knows is proven and timed before its first.

A kind is a weight's shape and kind, a rank, a dtype, and rows up to a power of two; forward and
backward, with dropout and without, are proven together, with each plan's analytic tiles. What has
been chosen stays: no bits change in the middle of a run.
"""

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

import torch

from lora_kernels import _env
from lora_kernels.backends.cuda import needs, tables
from lora_kernels.backends.cuda.plan import Call

_logger = logging.getLogger("lora_kernels")
_MOST_ROWS = 8192
_DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}  # as the command has them
_MINUTES_OF_A_KIND, _MINUTES = 1.0, 5.0
_STARTING = 60.0  # seconds that a command may take beside its minutes

_lock = threading.Lock()  # backward runs in threads of its own
_tried: set[tuple[object, ...]] = set()
_spent = 0.0  # seconds


def is_on() -> bool:
    """Not in one of several processes, of which each would wait for the others' tables, nor where
    LORA_KERNELS_TUNED says which table it is."""
    alone = "LOCAL_RANK" not in os.environ and _env.TUNED is None
    return _env.TUNE == "auto" and alone and needs.why_no_triton() is None


def rows_of_kind(M: int) -> int:
    """The rows that stand for M of them."""
    return min(_MOST_ROWS, 1 << (M - 1).bit_length())


def prepare(index: int, call: Call) -> None:
    """Before the first call of a kind on a CUDA device: has the command prove it, unless the time
    of this process for that is over."""
    if not is_on() or torch.cuda.is_current_stream_capturing():
        return
    with _lock:
        kind = (index, rows_of_kind(call.M), call.N, call.K, call.r, call.dtype, call.weight)
        if kind not in _tried and not _is_known(index, call):
            _tried.add(kind)
            _prove(index, call)


def _is_known(index: int, call: Call) -> bool:
    table = tables.tuned(index)
    fixed = ("N", "K", "r", *tables.KIND)
    return table is not None and any(
        all(bucket[name] == getattr(call, name) for name in fixed)
        and tables.weight_of(bucket) == call.weight
        and rows_of_kind(bucket["M"]) == rows_of_kind(call.M)
        for bucket in table["buckets"]
    )


def _prove(index: int, call: Call) -> None:
    global _spent
    minutes = min(_MINUTES_OF_A_KIND, _MINUTES - _spent / 60)
    what = (
        f"x [{rows_of_kind(call.M)},{call.K}] in {call.dtype}, {call.weight} weight"
        f" [{call.N},{call.K}], rank {call.r}"
    )
    if minutes <= 0:
        _logger.warning(
            "LORA_KERNELS_TUNE=auto: %s is not proven, this process has spent its %g minutes:"
            " `python -m lora_kernels tune` goes on", what, _MINUTES,
        )  # fmt: skip
        return
    _logger.warning("LORA_KERNELS_TUNE=auto: proving and timing the fused kernels for %s", what)
    torch.cuda.synchronize(index)  # what is under way would be timed too
    since = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, *command(call, minutes)],
            env=os.environ | {"LORA_KERNELS_TUNE": "off"} | _visible(index),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60 * minutes + _STARTING,
        )
        why = done.stderr.strip() if done.returncode else None
    except (OSError, subprocess.TimeoutExpired) as error:
        why = str(error)
    _spent += time.monotonic() - since
    if why is not None:  # the call that asked goes on
        _logger.warning("LORA_KERNELS_TUNE=auto: %s could not be proven: %s", what, why)
    tables.forget()


def command(call: Call, minutes: float) -> Sequence[str]:
    """What proves a call's kind, after the interpreter's name."""
    return (
        "-m", "lora_kernels", "tune", "--quick", "--no-progress", "--minutes", str(minutes),
        "--rows", str(rows_of_kind(call.M)), "--shapes", f"{call.N},{call.K},{call.r}",
        "--dtype", _DTYPES[call.dtype], "--weight", call.weight,
    )  # fmt: skip


def _visible(index: int) -> dict[str, str]:
    """Has the command see this device as its first, and no other."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return {"CUDA_VISIBLE_DEVICES": seen.split(",")[index] if seen else str(index)}
