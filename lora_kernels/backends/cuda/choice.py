"""Which plan serves a call: the forced one, one that is proven on this GPU, or the plain one."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import lru_cache

import torch

from lora_kernels import _env
from lora_kernels.backends import forced
from lora_kernels.backends.cuda import tables, unseen
from lora_kernels.backends.cuda.plan import Call, Tiles
from lora_kernels.backends.cuda.plans import PLANS, known
from lora_kernels.backends.cuda.tables import Choice, index_of, nearest, tuned
from lora_kernels.backends.device import Target

_MOST_VARIED_RANK = 128

if _env.PLAN is not None:
    known(_env.PLAN, "LORA_KERNELS_PLAN")


def use_plan(plan: str, tiles: Tiles | None = None) -> AbstractContextManager[None]:
    """A context that serves all calls by `plan` with the fields `tiles` of its launches, as
    `candidates` lists them. A call that the plan cannot serve raises RuntimeError; ValueError where
    the plan, a launch or a field is not known.

    Stronger than the environment, any table and a context around it. Holds for the whole process,
    because backward runs in threads of its own; not for use from several threads at a time.
    """
    tiles = tiles or {}
    known(plan, "plan").check(tiles, "tiles")
    return forced.held(forced.Force(f"use_plan({plan!r})", "cuda", plan, tiles))


def choose(call: Call, device: torch.device) -> Choice:
    """The plan and the tiles of a call. Raises RuntimeError if a forced one cannot serve it."""
    force = forced.now
    if force is not None and force.plan is not None:
        reason = PLANS[force.plan].refusal(call)
        if reason is not None:
            raise RuntimeError(f"{force.demand}: {reason}; force another plan or none")
        return Choice(force.plan, force.tiles)
    index = index_of(device) if device.type == "cuda" else None
    return _choose(index, call, None if force is None else force.demand)


@lru_cache(maxsize=4096)
def _choose(index: int | None, call: Call, demand: str | None) -> Choice:
    if index is not None and demand is None and not _captured:
        unseen.prepare(index, call)
    table = None if index is None else tuned(index)
    found = nearest(table, call) if table else None
    if found is not None:
        return found
    if demand is None:  # what no table has proven is no default
        return Choice("aten", {})
    reason = PLANS["cublas"].refusal(call)
    if reason is not None:
        raise RuntimeError(f"{demand}: {reason}")
    return Choice("cublas", {})


def forget() -> None:
    """Has plans chosen anew, and tables looked for and read."""
    _choose.cache_clear()
    tables.forget()


_captured = False


def watch() -> None:
    """Of every call on a CUDA device: whether a graph is being captured, which keeps the plans."""
    global _captured
    if not _captured and torch.cuda.is_initialized():
        _captured = torch.cuda.is_current_stream_capturing()


def is_frozen() -> bool:
    """Whether a graph was captured: what replays and what is launched must stay one choice."""
    return _captured


def candidates(call: Call, target: Target) -> list[tuple[str, Tiles]]:
    """(plan, tiles) of everything that may serve a call, to be timed `with use_plan(...)`.

    The first of a plan has the analytic tiles; every other one changes one launch, so that a tuner
    may join the best of each. A pass that plans share is listed for the first of them. What is
    listed for a rank is listed for every smaller one, except the launches of a backward that fuses
    ds and dB at one rank and not at the other.
    """
    # Larger ranks leave the kernels few registers: their analytic tiles alone are checked.
    varied = call.dtype != "float32" and call.aligned and call.r <= _MOST_VARIED_RANK
    # Of a quantised weight ATen's calls are no pass: strips of it are decoded and multiplied.
    found: list[tuple[str, Tiles]] = [("aten", {})] if call.op == "coded" else []
    listed: set[object] = set()
    for name, plan in PLANS.items():
        serving = plan.serving(call.op)
        if serving is None or serving in listed or serving.refusal(call) is not None:
            continue
        listed.add(serving)
        found.append((name, {}))
        for launch in serving.launches if varied else ():
            if launch.serves(call):
                found += [(name, {launch.name: f}) for f in launch.variants(call, target)]
    return found
