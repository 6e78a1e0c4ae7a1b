"""What plans need beside the limits that they declare."""

from __future__ import annotations

from functools import cache

from lora_kernels.backends.cuda.plan import Call
from lora_kernels.backends.device import current


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
