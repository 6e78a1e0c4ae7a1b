"""Times every legal plan and tile set per shape and writes the table that picks among them.

    python benchmarks/tune.py --minutes 5       # the package's backends/cuda/tuned/<gpu>.json
    python benchmarks/tune.py --merge A.json B.json --out C.json

Every candidate is checked against fp64 before it is timed. The table is on disk after every bucket;
the same command goes on where the last one ended, and passes over a candidate in which the process
died. A plan is "proven" for a dtype, with dropout or without, when it was right wherever it ran so;
one wrong result strikes it out. Of candidates within 1 % of the fastest the simplest is taken.
"""

import argparse
import json
import math
import signal
import statistics
import subprocess
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

from lora_kernels.backends.cuda import tables
from lora_kernels.backends.cuda.choice import candidates, use_plan
from lora_kernels.backends.cuda.plan import Call
from lora_kernels.backends.cuda.plans import PLANS
from lora_kernels.backends.device import target
from lora_kernels.backends.triton.tiles import vectorises

# By the base: a dense weight, or an output that is given (lora_add).
OPS = {"dense": ("forward", "backward"), "given": ("add", "add_backward")}
_KEY = ("op", "dtype", "M", "N", "K", "r", "dropout")
_CLOSE = 1.01  # as fast as the fastest
_ops = torch.ops.lora_kernels


class Candidate(NamedTuple):
    plan: str
    tiles: dict[str, dict[str, int]]

    def __str__(self) -> str:
        return self.plan + (f" {json.dumps(self.tiles)}" if self.tiles else "")


class Table:
    """A tuned table on disk: what `tables.read_table` reads, and what tuning must remember."""

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
            found = tables.read_table(path)
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

    def interrupted(self) -> None:
        """Of a process that is told to end: the candidate is not to blame."""
        if self.content.pop("trying", None) is not None:
            self.write()

    def trying(self, candidate: Candidate, call: dict) -> None:
        """On disk before the first run, so that a process that dies in it is remembered."""
        self.content["trying"] = {**candidate._asdict(), "call": call}
        self.write()

    def worked(self, candidate: Candidate, call: dict) -> None:
        self.content.pop("trying", None)
        proof = _proof(candidate.plan, call)
        if not self.proves(candidate, call) and proof not in _struck(self.content["failed"]):
            self.content["proven"].append(proof)

    def proves(self, candidate: Candidate, call: dict) -> bool:
        return _proof(candidate.plan, call) in self.content["proven"]

    def failed(self, candidate: Candidate, call: dict, why: str, wrong: bool = True) -> None:
        """`wrong`: not just too large for the device, so the plan is not to be trusted."""
        self.content.pop("trying", None)
        entry = {**candidate._asdict(), "call": call, "why": why, "wrong": wrong}
        self.content["failed"].append(entry)
        # Analytic tiles are what an unknown shape gets: they must fit everywhere.
        if (wrong or not candidate.tiles) and self.proves(candidate, call):
            self.content["proven"].remove(_proof(candidate.plan, call))
        self.write()

    def refuses(self, candidate: Candidate, call: dict) -> bool:
        """Whether it is known to fail: its plan was wrong, or it did not fit this call."""
        return any(
            _proof(entry["plan"], entry["call"]) == _proof(candidate.plan, call)
            and (entry["wrong"] or (entry["tiles"] == candidate.tiles and entry["call"] == call))
            for entry in self.content["failed"]
        )

    def add(self, bucket: dict) -> None:
        self.content["buckets"].append(bucket)
        self.write()


def _proof(plan: str, call: dict) -> dict:
    return tables.proof(plan, call["dtype"], call["dropout"])


def _struck(failed: Sequence[dict]) -> list[dict]:
    """What is not to be proven."""
    strikes = (entry for entry in failed if entry["wrong"] or not entry["tiles"])
    return [_proof(entry["plan"], entry["call"]) for entry in strikes]


class Work(NamedTuple):
    """One op of one problem: what is run, and what it must give."""

    call: Call
    run: Callable[[], list[Tensor]]
    right: Expected
    names: tuple[str, ...]


def works(p: Problem, base: str) -> list[Work]:
    """Forward and backward as the ops themselves, below autograd, of a dense weight or of a given
    base output."""
    case, x = p.case, p.x.detach()
    seed = torch.tensor(1234, dtype=torch.int64, device=x.device) if case.dropout else None
    branch = (SCALING, case.dropout, seed)
    with use_plan("aten"):
        _, s = _ops.lora_linear(x, p.weight, p.a, p.b, None, *branch, True)

    def forward() -> list[Tensor]:
        return [_ops.lora_linear(x, p.weight, p.a, p.b, None, *branch, True)[0]]

    def backward() -> list[Tensor]:
        dx, _, d_a, d_b = _ops.lora_linear_backward(
            p.dy, x, p.weight, p.a, p.b, s, *branch, True, False, True, True
        )
        return [dx, d_a, d_b]

    given = torch.randn_like(p.dy)

    def add() -> list[Tensor]:
        return [_ops.lora_add(given, x, p.a, p.b, *branch, True)[0]]

    def add_backward() -> list[Tensor]:
        return list(_ops.lora_add_backward(p.dy, x, p.a, p.b, s, *branch, True, True, True))

    if base == "dense":
        right, weights, runs = expected(p, seed), (p.weight,), (forward, backward)
    else:
        right = _on_top(given, expected(p._replace(weight=torch.zeros_like(p.weight)), seed))
        weights, runs = (), (add, add_backward)
    found = []
    for op, rows, run, names in zip(
        OPS[base], (x, p.dy), runs, (("y",), ("dx", "dA", "dB")), strict=True
    ):
        aligned = all(map(vectorises, (rows, *weights)))
        call = Call(aligned=aligned, **key_of(case, op))
        found.append(Work(call, run, right, names))
    return found


def _on_top(given: Tensor, right: Expected) -> Expected:
    """What is right of a branch, on a base output."""
    base = given[right.rows]
    exact, rival = right.exact[0] + base.double(), right.rival[0] + base
    rival = rival.to(given.dtype).float()
    return right._replace(exact=[exact, *right.exact[1:]], rival=[rival, *right.rival[1:]])


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
        with use_plan(*candidate):
            outs = work.run()
        work.right.require(str(candidate), outs, work.names)
    except Exception as error:
        why = f"{type(error).__name__}: {(str(error) or '?').splitlines()[0]}"
        if is_fatal(error):
            raise  # the mark "trying" stays: the next process knows
        table.failed(candidate, call, why, wrong=isinstance(error, WrongResult))
        return False
    table.worked(candidate, call)
    return True


def timed(
    candidates: Sequence[Candidate], work: Work, seconds: float, rounds: tuple[int, int]
) -> list[list[float]]:
    def turn_of(candidate: Candidate) -> Callable[[Callable[[], None]], None]:
        def turn(mark: Callable[[], None]) -> None:
            with use_plan(*candidate):
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
    plans = list(PLANS)
    return min(close, key=lambda i: (plans.index(candidates[i].plan), len(candidates[i].tiles)))


def tune(work: Work, table: Table, seconds: float, rounds: tuple[int, int]) -> dict | None:
    """The bucket of one call; None where nothing works."""
    listed = candidates(work.call, target(work.right.rows.device))
    listed = [Candidate(*found) for found in listed]
    right = [candidate for candidate in listed if works_right(candidate, work, table)]
    # One that ran right before its plan was found wrong is out too.
    call = work.call._asdict()
    right = [candidate for candidate in right if table.proves(candidate, call)]
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
    proven for that dtype and dropout. ValueError where they are of two GPUs or two versions."""
    for name in ("gpu", "versions"):
        if one.get(name) != other.get(name):
            raise ValueError(f"{name}: cannot merge {one.get(name)} with {other.get(name)}")
    buckets = {tuple(b[n] for n in _KEY): b for b in (*one["buckets"], *other["buckets"])}
    failed = [*one.get("failed", ()), *other.get("failed", ())]
    struck = _struck(failed)
    found = (*one["proven"], *(entry for entry in other["proven"] if entry not in one["proven"]))
    proven = [entry for entry in found if entry not in struck]
    merged = {"proven": proven, "failed": failed, "buckets": list(buckets.values())}
    return {**one, **other, **merged}


def left(todo: Sequence[tuple[str, Case]], path: Path) -> list[tuple[str, Case]]:
    """Without the cases whose buckets the table at the path has."""
    found = tables.read_table(path)["buckets"] if path.exists() else []
    return [
        (base, case) for base, case in todo
        if not all(any(key_of(case, op).items() <= b.items() for b in found) for op in OPS[base])
    ]  # fmt: skip


def run_part(part: str, todo: Sequence[tuple[str, Case]], device: torch.device) -> None:
    """Runs every n-th candidate from the i-th on once, for part i/n, so that Triton's cache has
    what they need. Whether they are right is not asked here."""
    first, step = map(int, part.split("/"))
    for base, case in todo:
        for work in works(peers.problem(case, device), base):
            for found in candidates(work.call, target(device))[first::step]:
                try:
                    with use_plan(*found):
                        work.run()
                except Exception as error:
                    if is_fatal(error):
                        raise


def compile_ahead(arguments: Sequence[str], jobs: int, minutes: float) -> None:
    """`run_part` in as many processes; what is not done in time is compiled when it is timed."""
    command = [sys.executable, __file__, *arguments, "--part"]
    children = [subprocess.Popen([*command, f"{i}/{jobs}"]) for i in range(jobs)]
    deadline = Deadline(minutes)
    for child in children:
        try:
            child.wait(max(0.0, deadline.left()))
        except subprocess.TimeoutExpired:
            child.kill()


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
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile beforehand")
    parser.add_argument("--part", metavar="I/N", help="compile a part of the candidates, no tuning")
    parser.add_argument("--merge", type=Path, nargs=2, metavar=("A", "B"), help="no tuning")
    args = parser.parse_args(arguments)
    if args.merge:
        if args.out is None:
            parser.error("--merge needs --out")
        replace_text(args.out, to_json(merge(*map(tables.read_table, args.merge))))
        print(args.out)
        return
    gpu = torch.cuda.is_available()
    if not gpu:
        from lora_kernels.backends.triton.launch import INTERPRETED

        if not INTERPRETED or args.out is None:
            parser.error("no GPU here: a trial needs TRITON_INTERPRET=1 and --out")
    device = torch.device("cuda" if gpu else "cpu")
    # All of a weight first: most calls are of that kind.
    todo = [(base, case) for base in OPS for case in _cases(args)]
    info = machine(gpu)
    name = info["gpu"] or "interpreter"
    path = args.out or tables.TUNED / tables.file_name(name)
    if args.part:
        run_part(args.part, left(todo, path), device)
        return
    deadline = Deadline(args.minutes)
    table = Table(path, name, info)
    table.write()

    def stop(signum: int, frame: object) -> None:
        table.interrupted()
        raise SystemExit(128 + signum)

    # Does not come through where a kernel hangs: that one is remembered.
    signal.signal(signal.SIGTERM, stop)
    print(machine_line(info), flush=True)
    if args.jobs > 1:
        given = sys.argv[1:] if arguments is None else arguments
        compile_ahead(given, args.jobs, args.minutes / 2)
    for base, case in tqdm(todo, desc="cases", file=sys.stdout, mininterval=1):
        if all(table.has(key_of(case, op)) for op in OPS[base]):
            continue
        if deadline.left() <= 0:
            print(f"\ntime is over with cases left, from {base} {case} on; run again to go on")
            break
        for work in works(peers.problem(case, device), base):
            if not table.has(key_of(case, work.call.op)):
                bucket = tune(work, table, args.seconds, tuple(args.rounds))
                if bucket:
                    table.add(bucket)
    table.write()
    proven = ", ".join(dict.fromkeys(entry["plan"] for entry in table.content["proven"]))
    print(f"{table.path}: {len(table.content['buckets'])} buckets, proven: {proven}")
    for entry in table.content["failed"]:
        print(f"failed: {entry['plan']} {entry['tiles']} {entry['call']}: {entry['why']}")


if __name__ == "__main__":
    main()
