"""Every environment variable of the library, read once at import (docs/configuration.md)."""

import os


def _text(name: str) -> str | None:
    return os.environ.get(name, "").strip().lower() or None


def _choice(name: str, legal: tuple[str, ...]) -> str | None:
    value = _text(name)
    if value is not None and value not in legal:
        raise ValueError(f"{name}: got {value!r}, legal values are {', '.join(legal)}")
    return value


# Forces one backend for every op; a call it cannot serve raises. backends checks the name.
BACKEND = _text("LORA_KERNELS_BACKEND")

# Forces one plan of CUDA calls, and with it that backend; backends/cuda/choice.py checks the name.
PLAN = _text("LORA_KERNELS_PLAN")
if PLAN is not None and BACKEND not in (None, "cuda", "triton"):
    raise ValueError(
        f"LORA_KERNELS_PLAN={PLAN} forces a plan of the cuda backend,"
        f" but LORA_KERNELS_BACKEND={BACKEND}"
    )

# Registers autograd by torch.library's own means alone: slower calls, no private part of torch.
PUBLIC_DISPATCH = _choice("LORA_KERNELS_PUBLIC_DISPATCH", ("0", "1")) == "1"

# A tuned table, or a folder of them, before the user's and the package's; cuda/tables.py reads it.
TUNED = os.environ.get("LORA_KERNELS_TUNED", "").strip() or None

# What becomes of a GPU without a tuned table: nothing, its reports and logs name the command that
# makes one, or that is spawned too (cuda/background.py), or it runs before a kind of call's first
# (cuda/unseen.py).
TUNE = _choice("LORA_KERNELS_TUNE", ("off", "hint", "check", "auto")) or "hint"
