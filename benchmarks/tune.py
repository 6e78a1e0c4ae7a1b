"""Times every legal plan and tile set per shape and writes the table that picks among them.

    python benchmarks/tune.py --minutes 5       # the package's backends/triton/tuned/<gpu>.json
    python benchmarks/tune.py --merge A.json B.json --out C.json

Every candidate is checked against fp64 before it is timed. The table is on disk after every bucket;
the same command goes on where the last one ended, and passes over a candidate in which the process
died. A plan is "proven" when it was right wherever it ran; one wrong result strikes it out. Of
candidates within 1 % of the fastest the simplest is taken.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import NamedTuple

import peers
import shapes
import torch
from clock import Deadline, interleaved, summary
from gate import Expected, WrongResult, expected, is_fatal
from machine import machine, machine_line
from peers import SCALING, Problem
from shapes import Case
from store import replace_text, to_json
from torch import Tensor
from tqdm import tqdm

from lora_kernels._env import PLANS
from lora_kernels.backends import plans
from lora_kernels.backends.plans import Call

OPS = ("forward", "backward")
_KEY = ("op", "dtype", "M", "N", "K", "r", "dropout")
_CLOSE = 1.01  # as fast as the fastest
_ops = torch.ops.lora_kernels


class Candidate(NamedTuple):
    plan: str
    tiles: dict[str, dict[str, int]]

    def __str__(self) -> str:
        return self.plan + (f" {json.dumps(self.tiles)}" if self.tiles else "")


class Table:
    """A tuned table on disk: what `plans.read_table` reads, and what tuning must remember."""

    def __init__(self, path: Path, gpu: str, info: dict) -> None:
        self.path = path
        self.content = {
            "gpu": gpu,
            "date": str(date.today()),
            "versions": info["versions"],
            "commit": info["commit"],
            "proven": [],
            "failed": [],
            "buckets": [],
        }
        if path.exists():
            found = plans.read_table(path)
            for name in ("gpu", "versions"):
                if found.get(name) != self.content[name]:
                    raise SystemExit(
                        f"{path}: {name}: the table is of {found.get(name)}, this is"
                        f" {self.content[name]}; move it away to begin a new one"
                    )
            self.content = found
        died = self.content.pop("trying", None)
        if died is not None:
            self.failed(Candidate(died["plan"], died["tiles"]), died["call"], "the process died")

    def write(self) -> None:
        replace_text(self.path, to_json(self.content))

    def has(self, key: dict) -> bool:
        return any(key.items() <= bucket.items() for bucket in self.content["buckets"])

    def trying(self, candidate: Candidate, call: dict) -> None:
        """On disk before the first run, so that a process that dies in it is remembered."""
        self.content["trying"] = {**candidate._asdict(), "call": call}
        self.write()

    def worked(self, candidate: Candidate) -> None:
        self.content.pop("trying", None)
        struck = any(entry["plan"] == candidate.plan for entry in self._struck())
        if not struck and candidate.plan not in self.content["proven"]:
            self.content["proven"].append(candidate.plan)

    def failed(self, candidate: Candidate, call: dict, why: str, wrong: bool = True) -> None:
        """`wrong`: not just too large for the device, so the plan is not to be trusted."""
        self.content.pop("trying", None)
        entry = {**candidate._asdict(), "call": call, "why": why, "wrong": wrong}
        self.content["failed"].append(entry)
        # Analytic tiles are what an unknown shape gets: they must fit everywhere.
        if (wrong or not candidate.tiles) and candidate.plan in self.content["proven"]:
            self.content["proven"].remove(candidate.plan)
        self.write()

    def _struck(self) -> list[dict]:
        return [entry for entry in self.content["failed"] if entry["wrong"] or not entry["tiles"]]

    def refuses(self, candidate: Candidate, call: dict) -> bool:
        """Whether it is known to fail: its plan was wrong, or it did not fit this call."""
        return any(
            entry["plan"] == candidate.plan
            and (entry["wrong"] or (entry["tiles"] == candidate.tiles and entry["call"] == call))
            for entry in self.content["failed"]
        )

    def add(self, bucket: dict) -> None:
        self.content["buckets"].append(bucket)
        self.write()


class Work(NamedTuple):
    """One op of one problem: what is run, and what it must give."""

    call: Call
    run: Callable[[], list[Tensor]]
    right: Expected
    names: tuple[str, ...]


def works(p: Problem) -> list[Work]:
    """Forward and backward as the op itself, below autograd."""
    from lora_kernels.backends.triton import tiles

    case, x = p.case, p.x.detach()
    seed = torch.tensor(1234, dtype=torch.int64, device=x.device) if case.dropout else None
    branch = (SCALING, case.dropout, seed)
    right = expected(p, seed)

    def forward() -> list[Tensor]:
        return list(_ops.lora_linear(x, p.weight, p.a, p.b, None, *branch, True))

    with plans.using("aten"):
        _, s = forward()

    def backward() -> list[Tensor]:
        dx, _, d_a, d_b = _ops.lora_linear_backward(
            p.dy, x, p.weight, p.a, p.b, s, *branch, True, False, True, True
        )
        return [dx, d_a, d_b]

    dtype, weight_fits = str(x.dtype).removeprefix("torch."), tiles.vectorises(p.weight)
    found = []
    for op, rows, run, names in (
        ("forward", x, lambda: forward()[:1], ("y",)),
        ("backward", p.dy, backward, ("dx", "dA", "dB")),
    ):
        aligned = weight_fits and tiles.vectorises(rows)
        call = Call(op, dtype, case.M, case.N, case.K, case.r, case.dropout > 0, aligned)
        found.append(Work(call, run, right, names))
    return found


def key_of(case: Case, op: str) -> dict:
    dtype = str(peers.DTYPES[case.dtype]).removeprefix("torch.")
    values = (op, dtype, case.M, case.N, case.K, case.r, case.dropout > 0)
    return dict(zip(_KEY, values, strict=True))


def works_right(candidate: Candidate, work: Work, table: Table) -> bool:
    """Runs and checks it once; a failure is written down."""
    call = {name: getattr(work.call, name) for name in _KEY}
    if table.refuses(candidate, call):
        return False
    table.trying(candidate, call)
    try:
        with plans.using(*candidate):
            outs = work.run()
        work.right.require(str(candidate), outs, work.names)
    except Exception as error:
        why = f"{type(error).__name__}: {(str(error) or '?').splitlines()[0]}"
        if is_fatal(error):
            raise  # the mark "trying" stays: the next process knows
        table.failed(candidate, call, why, wrong=isinstance(error, WrongResult))
        return False
    table.worked(candidate)
    return True


def timed(
    candidates: Sequence[Candidate], work: Work, seconds: float, rounds: tuple[int, int]
) -> list[list[float]]:
    def turn_of(candidate: Candidate) -> Callable[[Callable[[], None]], None]:
        def turn(mark: Callable[[], None]) -> None:
            with plans.using(*candidate):
                work.run()
            mark()

        return turn

    turns = {str(index): turn_of(candidate) for index, candidate in enumerate(candidates)}
    device = work.right.rows.device
    found = interleaved(turns, device, seconds, rounds)
    return [[part[0] for part in parts] for parts in found.values()]


def joined(candidates: Sequence[Candidate], medians: Sequence[float]) -> list[Candidate]:
    """For each plan the best tile of every launch together, where that is a new candidate."""
    found = []
    for plan in dict.fromkeys(candidate.plan for candidate in candidates):
        of_plan = [(m, c) for m, c in zip(medians, candidates, strict=True) if c.plan == plan]
        analytic = min((m for m, c in of_plan if not c.tiles), default=math.inf)
        tiles: dict[str, dict[str, int]] = {}
        for median, candidate in sorted(of_plan, key=lambda pair: pair[0]):
            if median < analytic:
                for launch, fields in candidate.tiles.items():
                    tiles.setdefault(launch, fields)
        if len(tiles) > 1:
            found.append(Candidate(plan, tiles))
    return found


def simplest(candidates: Sequence[Candidate], medians: Sequence[float]) -> int:
    """Index of the simplest one within 1 % of the fastest: first plans first, analytic tiles."""
    close = [i for i, median in enumerate(medians) if median <= _CLOSE * min(medians)]
    return min(close, key=lambda i: (PLANS.index(candidates[i].plan), len(candidates[i].tiles)))


def tune(work: Work, table: Table, seconds: float, rounds: tuple[int, int]) -> dict | None:
    """The bucket of one call; None where nothing works."""
    from lora_kernels.backends.triton import launch, tiles

    target = launch.target(work.right.rows.device)
    listed = [Candidate(*found) for found in tiles.candidates(work.call, target)]
    right = [candidate for candidate in listed if works_right(candidate, work, table)]
    # One that ran right before its plan was found wrong is out too.
    right = [candidate for candidate in right if candidate.plan in table.content["proven"]]
    if not right:
        return None
    times = timed(right, work, seconds, rounds)
    more = joined(right, [statistics.median(spent) for spent in times])
    more = [candidate for candidate in more if works_right(candidate, work, table)]
    if more:  # all again: times of two runs do not compare
        right += more
        times = timed(right, work, seconds, rounds)
    best = simplest(right, [statistics.median(spent) for spent in times])
    plain = next((i for i, c in enumerate(right) if c.plan == "aten"), 0)
    figures = summary(times[best], times[plain])
    bucket = {name: getattr(work.call, name) for name in _KEY} | {"plan": right[best].plan}
    if right[best].tiles:
        bucket["tiles"] = right[best].tiles
    return bucket | {"ms": figures["ms"], "ratio_to_aten": figures["ratio"],
                     "date": str(date.today())}  # fmt: skip


def merge(one: dict, other: dict) -> dict:
    """Both tables' buckets, the other's where both have one. A plan that was wrong in either is not
    proven. ValueError where they are of two GPUs or two versions."""
    for name in ("gpu", "versions"):
        if one.get(name) != other.get(name):
            raise ValueError(f"{name}: cannot merge {one.get(name)} with {other.get(name)}")
    buckets = {tuple(b[n] for n in _KEY): b for b in (*one["buckets"], *other["buckets"])}
    failed = [*one.get("failed", ()), *other.get("failed", ())]
    struck = {entry["plan"] for entry in failed if entry["wrong"] or not entry["tiles"]}
    proven = [p for p in PLANS if p in (*one["proven"], *other["proven"]) and p not in struck]
    merged = {"proven": proven, "failed": failed, "buckets": list(buckets.values())}
    return {**one, **other, **merged}


def _cases(args: argparse.Namespace) -> list[Case]:
    if args.sizes:
        found = [Case(*map(int, size.split(",")), args.dtype, p) for size in args.sizes
                 for p in shapes.DROPOUTS]  # fmt: skip
    else:
        found = [case._replace(dtype=args.dtype) for case in shapes.grid()]
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="table (default: the package's, of this GPU)")
    parser.add_argument("--minutes", type=float, default=5, help="time box")
    parser.add_argument("--seconds", type=float, default=0.15, help="of timing for a bucket")
    parser.add_argument("--rounds", type=int, nargs=2, default=(5, 100), metavar=("MIN", "MAX"))
    parser.add_argument("--dtype", choices=peers.DTYPES, default="bf16")
    parser.add_argument("--sizes", nargs="+", metavar="M,K,N,r", help="in place of the named ones")
    parser.add_argument("--merge", type=Path, nargs=2, metavar=("A", "B"), help="no tuning")
    args = parser.parse_args(arguments)
    if args.merge:
        if args.out is None:
            parser.error("--merge needs --out")
        replace_text(args.out, to_json(merge(*map(plans.read_table, args.merge))))
        print(args.out)
        return
    gpu = torch.cuda.is_available()
    if not gpu:
        from lora_kernels.backends.triton.launch import INTERPRETED

        if not INTERPRETED or args.out is None:
            parser.error("no GPU here: a trial needs TRITON_INTERPRET=1 and --out")
    device = torch.device("cuda" if gpu else "cpu")
    info = machine(gpu)
    name = info["gpu"] or "interpreter"
    deadline = Deadline(args.minutes)
    table = Table(args.out or plans.TUNED / plans.file_name(name), name, info)
    table.write()
    print(machine_line(info), flush=True)
    cases = _cases(args)
    for case in tqdm(cases, desc="cases", file=sys.stdout, mininterval=1):
        if all(table.has(key_of(case, op)) for op in OPS):
            continue
        if deadline.left() <= 0:
            print(f"\ntime is over with cases left, from {case} on; run again to go on")
            break
        for work in works(peers.problem(case, device)):
            if not table.has(key_of(case, work.call.op)):
                bucket = tune(work, table, args.seconds, tuple(args.rounds))
                if bucket:
                    table.add(bucket)
    table.write()
    print(f"{table.path}: {len(table.content['buckets'])} buckets, proven:"
          f" {', '.join(table.content['proven'])}")  # fmt: skip
    for entry in table.content["failed"]:
        print(f"failed: {entry['plan']} {entry['tiles']} {entry['call']}: {entry['why']}")


if __name__ == "__main__":
    main()
