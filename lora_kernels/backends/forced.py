"""What is forced for a while or for good: a backend, and of the backend `cuda` a plan.

Held for the whole process, because backward runs in threads of its own; so the contexts that set it
(`backends.use_backend`, `backends.cuda.choice.use_plan`) are not for several threads at a time.

What else is global and not a cache: `device._assumed` and `triton.launch._intercept`, by which the
code generation check pretends; the registry `cuda.plans.PLANS`; the values of `lora_kernels._env`,
which never change.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from lora_kernels import _env


class Force(NamedTuple):
    """demand is how it is written; tiles are of a plan, by launch fields that replace its own."""

    demand: str
    backend: str
    plan: str | None = None
    tiles: Mapping[str, Mapping[str, int]] = {}


def _of_environment() -> Force | None:
    if _env.PLAN is not None:
        return Force(f"LORA_KERNELS_PLAN={_env.PLAN}", "cuda", _env.PLAN)
    if _env.BACKEND is not None:
        return Force(f"LORA_KERNELS_BACKEND={_env.BACKEND}", _env.BACKEND)
    return None


now: Force | None = _of_environment()


@contextmanager
def held(force: Force | None) -> Iterator[None]:
    """Inside, this is forced and nothing else; None forces nothing."""
    global now
    before, now = now, force
    try:
        yield
    finally:
        now = before
