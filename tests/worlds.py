"""Runs checks in several processes at once, all of them in one start of a gloo world.

A module of checks has functions `check_<what>()` that every rank calls, in the order of their
names. One that raises ends the world, since the ranks can no longer be in step.
"""

import os
import pickle
import tempfile
import traceback
from datetime import timedelta
from functools import cache
from importlib import import_module
from pathlib import Path

import torch
import torch.distributed as dist

_TIMEOUT = timedelta(seconds=180)


def checks(module):
    return sorted(name for name in vars(import_module(module)) if name.startswith("check_"))


def _rank(rank, module, size, folder):
    torch.set_num_threads(1)
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    dist.init_process_group("gloo", f"file://{folder}/store", _TIMEOUT, rank=rank, world_size=size)
    outcomes = {}
    for name in checks(module):
        torch.manual_seed(0)
        try:
            getattr(import_module(module), name)()
            dist.barrier()
            outcomes[name] = None
        except Exception:
            outcomes[name] = traceback.format_exc()
        Path(folder, f"rank{rank}").write_bytes(pickle.dumps(outcomes))
        if outcomes[name]:
            os._exit(1)
    dist.destroy_process_group()


@cache
def run(module, size):
    """{check: what went wrong, by rank}; a check that was not reached says so."""
    with tempfile.TemporaryDirectory() as folder:
        context = torch.multiprocessing.get_context("spawn")
        ranks = [
            context.Process(target=_rank, args=(rank, module, size, folder)) for rank in range(size)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        files = [Path(folder, f"rank{rank}") for rank in range(size)]
        reached = [pickle.loads(f.read_bytes()) if f.exists() else {} for f in files]
    return {
        name: [
            f"rank {rank}: {outcomes.get(name, 'an earlier check failed')}"
            for rank, outcomes in enumerate(reached)
            if outcomes.get(name, "not reached") is not None
        ]
        for name in checks(module)
    }
