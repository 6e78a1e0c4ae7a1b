"""A GPU proves the plans and times them: `tune`, `python -m lora_kernels tune`."""

import importlib
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_kernels import backends
from lora_kernels.backends.cuda import tables
from lora_kernels.nn import LoRALayer
from lora_kernels.testing import DTYPES, Case
from lora_kernels.tuning import ranks
from lora_kernels.tuning.table import (
    BASES,
    ELSEWHERE,
    Candidate,
    locked,
    merge,
    replace_text,
    to_json,
    touch_lock,
)
from lora_kernels.weights import QuantizedTensor

_logger = logging.getLogger("lora_kernels")
ROWS = (8192, 2048, 16, 1)
SHAPES = ((4096, 4096, 16), (14336, 4096, 16), (4096, 14336, 16))
LIMIT = 60.0
SECONDS, ROUNDS = 0.15, (5, 100)
_MOST_CRASHES = 2  # outside of any candidate


@dataclass
class TuningReport:
    """What `tune` did; prints as a short text.

    path: the table. buckets: how many kinds of calls it knows, of which `added` are new. proven:
    the plans that ran right, each as "plan in dtype" with or without dropout. failed: why a plan
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
    dtype: str = "bf16",
    minutes: float = 3.0,
    backward: bool = True,
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
        model: whose LoRA layers' sizes, dtypes and dropout are taken; or
        shapes: (N, K, r) of weights [N,K] and ranks, in `dtype` ("bf16", "fp16", "fp32").
        rows: M, the numbers of rows (tokens) of a call.
        minutes: when to stop; what is missing is found by calling it again.
        backward: whether gradients are asked for.
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
        todo = [(base, case) for base in BASES for case in _cases(model, rows, shapes, dtype)]
        options = {
            "backward": int(backward), "seconds": seconds, "rounds": rounds, "jobs": jobs,
            "plugins": plugins, "todo": json.dumps(todo),
        }  # fmt: skip
        with locked(path):
            if force:
                path.unlink(missing_ok=True)
            before = _buckets(path)
            finished = _supervise(path, minutes, limit, options)
        return _Made(path.read_text(), before, finished)

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


def _cases(
    model: nn.Module | None,
    rows: Sequence[int],
    shapes: Iterable[tuple[int, int, int]] | None,
    dtype: str,
) -> list[Case]:
    if dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype!r}, legal values are {', '.join(DTYPES)}")
    found: dict[tuple[Any, ...], None] = {}
    if model is None:
        for N, K, r in SHAPES if shapes is None else shapes:
            found |= dict.fromkeys((K, N, r, dtype, p) for p in (0.0, 0.1))
    else:
        found |= dict.fromkeys(sizes for layer in model.modules() for sizes in _sizes(layer))
        if not found:
            raise ValueError("model: has no LoRA layer; call apply_lora first, or give shapes")
    cases = [Case(M, *sizes) for M in rows for sizes in found]
    for case in cases:
        if min(case[:4]) < 1:
            raise ValueError(f"rows, shapes: expected sizes of at least 1, got {case}")
    return cases


def _sizes(layer: nn.Module) -> Iterator[tuple[int, int, int, str, float]]:
    """K, N, r, dtype and dropout of the calls of a LoRA layer, PEFT's too; in eval mode none
    drops."""
    names = {value: name for name, value in DTYPES.items()}
    found: list[tuple[Tensor, Tensor, Tensor, float]] = []
    if isinstance(layer, LoRALayer) and layer.weight.dim() == 2:
        for one in map(layer.adapter, layer.names):
            found.append((one.lora_A, one.lora_B, layer.weight, one.dropout))
    elif isinstance(getattr(layer, "lora_A", None), nn.ModuleDict):
        of_peft: Any = layer
        for name, down in of_peft.lora_A.items():
            p = getattr(of_peft.lora_dropout[name], "p", 0.0)
            found.append((down.weight, of_peft.lora_B[name].weight, of_peft.base_layer.weight, p))
    for a, b, weight, dropout in found:
        if isinstance(weight, QuantizedTensor):
            continue  # no plan that is tuned multiplies with it
        if weight.dtype in names:
            for p in dict.fromkeys((dropout, 0.0)):
                yield a.shape[1], b.shape[0], a.shape[0], names[weight.dtype], p


def _buckets(path: Path) -> int:
    return len(tables.read_table(path)["buckets"]) if path.exists() else 0


def _supervise(path: Path, minutes: float, limit: float, options: dict[str, Any]) -> bool:
    """Workers one after the other until one ends well; whether all was done."""
    end = time.monotonic() + 60 * minutes
    command = [sys.executable, "-m", "lora_kernels.tuning.worker", "--out", str(path)]
    for name, value in options.items():
        command += [f"--{name}", *_texts(value)]
    crashes = 0
    while True:
        minutes = max(0.0, end - time.monotonic()) / 60
        child = subprocess.Popen([*command, "--minutes", str(minutes)])
        try:
            status, hung = _watch(child, path, limit, max(limit, 30 * minutes))
        except BaseException:  # Ctrl-C: the candidate is not to blame
            child.terminate()
            child.wait()
            raise
        if status == 0:
            break
        content = _content(path)
        mark = content.get("trying")
        if mark is None:
            crashes += 1
            if crashes == _MOST_CRASHES:
                raise RuntimeError(f"tune: the worker ended with {status} twice; see its output")
            continue
        if hung:
            mark["why"] = f"it hung: no result in {limit:g} s"
            replace_text(path, to_json(content))
        candidate = Candidate(mark["plan"], mark["tiles"])
        why = "hung" if hung else f"took its process along (exit status {status})"
        print(f"{candidate} {why}: struck out", flush=True)
    finished: bool = end > time.monotonic()
    return finished


def _texts(value: object) -> list[str]:
    return [str(each) for each in (value if isinstance(value, (tuple, list)) else (value,))]


def _watch(
    child: "subprocess.Popen[bytes]", path: Path, limit: float, compiling: float
) -> tuple[int, bool]:
    """(exit status, whether it was killed because nothing came of a candidate in time). Before the
    first candidate others may be compiled ahead."""
    seen, since = None, time.monotonic()
    while child.poll() is None:
        time.sleep(0.1)
        touch_lock(path)
        try:
            now = path.stat().st_mtime_ns
        except FileNotFoundError:
            now = None
        if now != seen:
            seen, since = now, time.monotonic()
            continue
        idle = time.monotonic() - since
        if idle > limit and (idle > compiling + limit or "trying" in _content(path)):
            child.kill()
            return child.wait(), True
    return child.returncode, False


def _content(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text())) if path.exists() else {}


def _report(path: Path, made: _Made, adopted: bool) -> TuningReport:
    table = json.loads(made.text)
    proven = [
        f"{e['plan']} in {e['dtype']}{' with dropout' * e['dropout']}" for e in table["proven"]
    ]
    failed = [
        f"{Candidate(e['plan'], e['tiles'])} for {e['call']}: {e['why']}"
        for e in table.get("failed", ())
    ]
    added = len(table["buckets"]) - made.before
    known = len(table["buckets"])
    return TuningReport(path, known, added, proven, failed, made.finished, adopted)


__all__ = ["TuningReport", "merge_files", "tune"]
