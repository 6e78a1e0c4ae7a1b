"""Every environment variable of the library, read once at import (the table is in the README)."""

import os

_BACKENDS = ("reference", "native", "triton")


def _choice(name: str, legal: tuple[str, ...]) -> str | None:
    value = os.environ.get(name, "").strip().lower() or None
    if value is not None and value not in legal:
        raise ValueError(f"{name}: got {value!r}, legal values are {', '.join(legal)}")
    return value


# Forces one backend for every op; a call it cannot serve raises.
BACKEND = _choice("LORA_KERNELS_BACKEND", _BACKENDS)
