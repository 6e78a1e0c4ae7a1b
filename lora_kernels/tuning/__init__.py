"""A GPU proves the plans and times them: `tune`, `python -m lora_kernels tune`."""

import importlib
import json
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from lora_kernels import backends
from lora_kernels.backends.cuda import tables
from lora_kernels.progress import is_shown, progress_bar
from lora_kernels.tuning import ranks
from lora_kernels.tuning.cases import cases_of
from lora_kernels.tuning.table import (
    ELSEWHERE,
    Candidate,
    locked,
    merge,
    missing,
    replace_text,
    to_json,
)
from lora_kernels.tuning.workers import Told, supervise

_logger = logging.getLogger("lora_kernels")
ROWS = (8192, 2048, 16, 1)
LIMIT = 60.0
SECONDS, ROUNDS = 0.15, (5, 100)


@dataclass
class TuningReport:
    """What `tune` did; prints as a short text.

    path: the table. buckets: how many kinds of calls it knows, of which `added` are new. proven:
    the plans that ran right, each as "plan in dtype" with or without dropout, and of which kind of
    quantised weights. failed: why a plan
    was struck out, or a tile did not fit. finished: False where the time was over first. adopted:
    False where this process goes on without, because a CUDA graph was captured before.
    """

    path: Path
    buckets: int
    added: int
    proven: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    finished: bool = True
    adopted: bool = True

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.buckets} kinds of calls, {self.added} of them new"]
        lines.append(f"proven: {', '.join(self.proven) or 'none, calls go to ATen'}")
        lines += [f"struck out: {reason}" for reason in self.failed]
        if not self.finished:
            lines.append("the time was over; the same call goes on")
        if not self.adopted:
            lines.append("a CUDA graph was captured before: processes after this one use the table")
        return "\n".join(lines)


def tune(
    model: nn.Module | None = None,
    rows: Sequence[int] = ROWS,
    *,
    shapes: Iterable[tuple[int, int, int]] | None = None,
    dtype: str | None = None,
    weight: str = "dense",
    minutes: float = 3.0,
    backward: bool = True,
    variants: bool = True,
    progress: bool | None = None,
    force: bool = False,
    out: str | os.PathLike[str] | None = None,
    plugins: Sequence[str] = (),
    limit: float = LIMIT,
    seconds: float = SECONDS,
    rounds: tuple[int, int] = ROUNDS,
    jobs: int = 1,
) -> TuningReport:
    """Proves and times the plans on this GPU, for the calls of a model, and has this process and
    later ones use what was found.

    Everything runs in a process of its own: a kernel that hangs, dies or computes something else
    strikes its plan out and harms nobody. Call it before CUDA graphs are captured, after which a
    process keeps what serves it, or a model is compiled; under torch.distributed by all ranks:
    rank 0 tunes, and all use its table, which every node keeps.

    Args:
        model: whose LoRA layers' sizes, dtypes, kinds of weights and dropout are taken; or
        shapes: (N, K, r) of weights [N,K] and ranks.
        dtype: "bf16", "fp16" or "fp32" in which all is computed; by default each layer's own, and
            bf16 for shapes.
        weight: of shapes, "dense" or quantised: "nf4", "int8", "fp8" or another kind that
            `lora_kernels.weights.CODED` lists. A layer's own is taken of a model.
        rows: M, the numbers of rows (tokens) of a call.
        minutes: when to stop; what is missing is found by calling it again.
        backward: whether gradients are asked for.
        variants: False tries every plan with its analytic tiles alone, which is several times
            faster; a later call with them goes on from there.
        progress: True shows a bar (if tqdm is there), False nothing, None a bar in a terminal and
            lines elsewhere.
        force: begins a new table in place of the one that is there.
        out: the table's file; by default that of this GPU, these versions and kernels in the
            user's cache folder, where later processes look for it.
        plugins: names of modules that register plans of their own.
        limit: seconds that a candidate may take, compiling included, before it counts as hung.
        seconds, rounds: of timing for a kind of call, and at least and at most how many rounds.
        jobs: processes that compile beforehand.

    Raises:
        ValueError: no GPU, a model without LoRA layers, a size that is not positive.
        RuntimeError: another process makes the table; there is nowhere to write it, and what to
            set; in a capture of a CUDA graph; in one of several processes without their group. On
            all ranks what rank 0 raises.
    """
    ranks.must_be_in_group()

    def make() -> _Made:
        _check_device(out)
        for module in plugins:
            importlib.import_module(module)
        path = _path(out)
        # All of a weight first: most calls are of that kind.
        found = cases_of(model, rows, shapes, dtype, weight)
        todo = list(dict.fromkeys([*found, *(("given", case) for _, case in found)]))
        options = {
            "backward": int(backward), "variants": int(variants), "seconds": seconds,
            "rounds": rounds, "jobs": jobs, "plugins": plugins, "todo": json.dumps(todo),
        }  # fmt: skip
        with locked(path):
            if force:
                path.unlink(missing_ok=True)
            known = _buckets(path)
            lacking = sum(len(missing(known, *each, variants, backward)) for each in todo)
            with progress_bar(progress, lacking, "tune") as bar:
                told = Told(bar, progress is not False and not is_shown(bar))
                finished = supervise(path, minutes, limit, options, told)
        return _Made(path.read_text(), len(known), finished)

    made = ranks.made_by_rank_0(make)
    for module in plugins:
        importlib.import_module(module)
    path = _kept(out, made.text)
    ranks.wait_for_all()
    adopted = out is not None or _adopted(made.text)
    return _report(path, made, adopted)


class _Made(NamedTuple):
    """A table as it is written, how many buckets it had before, whether all of it was done."""

    text: str
    before: int
    finished: bool


def _check_device(out: str | os.PathLike[str] | None) -> None:
    gpu = torch.cuda.is_available()
    if not gpu and (out is None or os.environ.get("TRITON_INTERPRET") != "1"):
        raise ValueError("tune: there is no GPU here; a trial needs TRITON_INTERPRET=1 and `out`")
    if gpu and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("tune: a CUDA graph is being captured; tune before")


def _path(out: str | os.PathLike[str] | None) -> Path:
    if out is not None:
        return Path(out)
    try:
        return tables.cache_path(torch.cuda.current_device())
    except RuntimeError as error:
        raise RuntimeError(f"tune: this user has no cache folder ({error}); {ELSEWHERE}") from error


def _kept(out: str | os.PathLike[str] | None, text: str) -> Path:
    """Where the table lies for this process; the first of a node writes what rank 0 has made."""
    try:
        path = _path(out)
        if ranks.is_maker() or not ranks.is_first_of_node():
            return path
        if out is None and not tables.is_of(torch.cuda.current_device(), json.loads(text)):
            _logger.warning("the table of rank 0 is of another GPU than this node's")
            return Path("(not kept)")
        if not path.exists() or path.read_text() != text:
            replace_text(path, text)
    except (OSError, RuntimeError) as error:  # it serves this process all the same
        _logger.warning("the table of rank 0 is not kept on this node: %s; %s", error, ELSEWHERE)
        return Path("(not kept)")
    return path


def _adopted(text: str) -> bool:
    """Whether this process uses the table from now on: the same on all ranks, whatever lies on
    their disks."""
    if not backends.forget():
        return False
    if ranks.in_group():
        tables.install(torch.cuda.current_device(), json.loads(text))
    return True


def merge_files(one: Path, other: Path, out: Path) -> None:
    """Writes the table of two: `table.merge`."""
    replace_text(out, to_json(merge(*map(tables.read_table, (one, other)))))


def _buckets(path: Path) -> list[dict[str, Any]]:
    return list(tables.read_table(path)["buckets"]) if path.exists() else []


def _report(path: Path, made: _Made, adopted: bool) -> TuningReport:
    table = json.loads(made.text)
    proven = [
        " ".join([f"{e['plan']} in {e['dtype']}{' with dropout' * e['dropout']}",
                  *(f"of {kind}" for kind in tables.named(tables.weight_of(e)).values())])
        for e in table["proven"]
    ]  # fmt: skip
    failed = [
        f"{Candidate(e['plan'], e['tiles'])} for {e['call']}: {e['why']}"
        for e in table.get("failed", ())
    ]
    added = len(table["buckets"]) - made.before
    known = len(table["buckets"])
    return TuningReport(path, known, added, proven, failed, made.finished, adopted)


__all__ = ["TuningReport", "merge_files", "tune"]
