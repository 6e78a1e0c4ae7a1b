"""Where the ops are registered, named once: `torch.ops.<NAMESPACE>`.

A Hub kernel (`make hub`) has another module in this one's place, as versions of it live side by
side in one process. backends/native says "lora_kernels" itself, as the libraries of csrc/ do.
"""

from typing import Any

import torch

NAMESPACE = "lora_kernels"
ops: Any = getattr(torch.ops, NAMESPACE)


def qualified(name: str) -> str:
    """An op's name as torch.library's functions take it."""
    return f"{NAMESPACE}::{name}"
