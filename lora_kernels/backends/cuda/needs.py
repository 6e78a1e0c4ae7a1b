"""What plans need beside the limits that they declare."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor

from lora_kernels.backends import forced
from lora_kernels.backends.cuda.plan import Call
from lora_kernels.backends.device import current

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def triton(call: Call) -> str | None:
    """Why Triton cannot compile, or interpret, kernels for a call."""
    absent = why_no_triton()
    if absent is not None:
        return absent
    if not current().has_tensor_cores:
        return "Triton has no tensor cores for this GPU: its kernels would be slower than ATen's"
    if call.dtype == "bfloat16" and interpreted():
        return (
            "Triton's interpreter computes bf16 products wrongly; use fp32 or fp16 with"
            " TRITON_INTERPRET=1"
        )
    return None


def gluon(call: Call) -> str | None:
    """Why a kernel for Hopper, written in Triton's language of layouts and barriers, cannot run."""
    if not current().is_hopper:
        return "the plan serves Hopper (H100, H200) alone"
    return triton(call) or _why_no_gluon()


@cache
def _why_no_gluon() -> str | None:
    try:
        from lora_kernels.backends.triton import specialised  # noqa: F401
    except ImportError as error:
        return f"this Triton has no Gluon as the kernel needs it: {error}"
    return None


@cache
def has_clusters() -> bool:
    """Whether that kernel may have two CTAs that share loads."""
    if _why_no_gluon() is not None:
        return False
    from lora_kernels.backends.triton import specialised

    return specialised.why_no_cluster() is None


@cache
def why_no_triton() -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton does not import: {error}"
    return None


@cache
def interpreted() -> bool:
    """Whether Triton, which is there, runs kernels on CPU tensors."""
    from lora_kernels.backends.triton.launch import INTERPRETED

    return INTERPRETED


def is_forced_on(rows: Tensor) -> bool:
    """Whether Triton's kernels are forced, no plan of one branch among them, and take such rows."""
    force = forced.now
    if force is None or force.backend not in ("cuda", "triton") or force.plan is not None:
        return False
    return runs_on(rows)


def runs_on(rows: Tensor) -> bool:
    """Whether Triton's kernels take such rows."""
    if rows.dtype not in _DTYPES or why_no_triton() is not None:
        return False
    return rows.is_cuda or (interpreted() and rows.dtype != torch.bfloat16)


def takes_addresses(rows: Tensor) -> bool:
    """Whether they are forced, and may be handed addresses of matrices, which are copied from the
    host: a graph that is being captured would keep those of its first call."""
    if not is_forced_on(rows):
        return False
    return not (rows.is_cuda and torch.cuda.is_current_stream_capturing())


def device_of(rows: Tensor) -> AbstractContextManager[object]:
    """Where Triton launches."""
    return torch.cuda.device(rows.device) if rows.is_cuda else nullcontext()
