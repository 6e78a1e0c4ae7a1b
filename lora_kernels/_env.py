"""Every environment variable of the library, read once at import (the table is in the README)."""

import os

_BACKENDS = ("reference", "native", "triton")
PLANS = ("aten", "cublas", "shrink_gemm", "grouped", "decode", "dual", "flag", "decode_cuda")


def _choice(name: str, legal: tuple[str, ...]) -> str | None:
    value = os.environ.get(name, "").strip().lower() or None
    if value is not None and value not in legal:
        raise ValueError(f"{name}: got {value!r}, legal values are {', '.join(legal)}")
    return value


# Forces one backend for every op; a call it cannot serve raises.
BACKEND = _choice("LORA_KERNELS_BACKEND", _BACKENDS)

# Forces one plan of the Triton backend (backends/plans.py), and with it that backend.
PLAN = _choice("LORA_KERNELS_PLAN", PLANS)
if PLAN is not None and BACKEND not in (None, "triton"):
    raise ValueError(
        f"LORA_KERNELS_PLAN={PLAN} forces a plan of the triton backend,"
        f" but LORA_KERNELS_BACKEND={BACKEND}"
    )

# Registers autograd by torch.library's own means alone: slower calls, no private part of torch.
PUBLIC_DISPATCH = _choice("LORA_KERNELS_PUBLIC_DISPATCH", ("0", "1")) == "1"
