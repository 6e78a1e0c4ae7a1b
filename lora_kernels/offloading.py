"""Modules whose parameters accelerate holds elsewhere between their calls."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

OFFLOADED = (
    "offloaded by accelerate; load the model without offloading, or bring it back with"
    " accelerate.hooks.remove_hook_from_module(model, recurse=True)"
)


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate holds a module's own parameters elsewhere between its calls."""
    held = module._parameters.values()
    return hasattr(module, "_hf_hook") and any(p is not None and p.is_meta for p in held)


@contextlib.contextmanager
def present(module: nn.Module) -> Iterator[None]:
    """Within it the parameters of a module that accelerate has offloaded can be read; what is
    written to them is lost."""
    hook: Any = module._hf_hook if is_offloaded(module) else None
    if hook is not None:
        hook.pre_forward(module)
    try:
        yield
    finally:
        if hook is not None:
            hook.post_forward(module, None)
