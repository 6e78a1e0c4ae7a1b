"""Several processes, one table: rank 0 makes it, and all get that one, or why there is none."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch.distributed as dist

Made = TypeVar("Made")


class _Failure(NamedTuple):
    is_value_error: bool
    why: str


def in_group() -> bool:
    """Whether this process is one of several that know of each other."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def must_be_in_group() -> None:
    """RuntimeError in one of several processes that do not: each would make a table."""
    several = int(os.environ.get("WORLD_SIZE") or 1) > 1
    if several and not in_group():
        raise RuntimeError(
            f"tune: this is one of WORLD_SIZE = {os.environ['WORLD_SIZE']} processes, which do not"
            " know of each other yet; call it after torch.distributed.init_process_group, or tune"
            " before, in a process of its own"
        )


def is_first_of_node() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0"


def is_maker() -> bool:
    return not in_group() or dist.get_rank() == 0


def made_by_rank_0(make: Callable[[], Made]) -> Made:
    """What `make` returns on rank 0, on all ranks. Where it raises there, no rank waits: the others
    raise ValueError or RuntimeError with the same words."""
    if not in_group():
        return make()
    outcome: list[Made | _Failure | None] = [None]
    try:
        if is_maker():
            outcome[0] = make()
    except BaseException as error:
        outcome[0] = _Failure(isinstance(error, ValueError), str(error) or type(error).__name__)
        raise
    finally:
        dist.broadcast_object_list(outcome, src=0)
    (found,) = outcome
    if isinstance(found, _Failure):
        raise (ValueError if found.is_value_error else RuntimeError)(f"on rank 0: {found.why}")
    assert found is not None
    return found


def wait_for_all() -> None:
    if in_group():
        dist.barrier()
