"""Every legal plan and tile set of a call: proven first, then timed.

A candidate is right when its outputs are, by the rule of `lora_kernels.testing`, with all memory
that it is given poisoned by NaN, when it gives equal bits run after run and, on a GPU, in the
replay of a graph. Of candidates within 1 % of the fastest the simplest is taken, ATen's calls
first of all.
"""

import contextlib
import math
import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels import _ops  # noqa: F401 defines the ops that are run
from lora_kernels._namespace import ops
from lora_kernels.backends.cuda import tables
from lora_kernels.backends.cuda.choice import candidates, use_plan
from lora_kernels.backends.cuda.plan import Call, Tiles
from lora_kernels.backends.cuda.plans import PLANS
from lora_kernels.backends.device import target
from lora_kernels.backends.triton.tiles import vectorises
from lora_kernels.testing import (
    DTYPES,
    SCALING,
    Case,
    Expected,
    Problem,
    WrongResult,
    expected,
    is_fatal,
    problem,
)
from lora_kernels.tuning.clock import interleaved, summary
from lora_kernels.tuning.table import BASES, KEY, Candidate, Table

_CLOSE = 1.01  # as fast as the fastest
_RUNS, _RUNS_COOPERATING = 5, 20


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
        _, s = ops.lora_linear(x, p.weight, p.a, p.b, None, *branch, True)

    def forward() -> list[Tensor]:
        return [ops.lora_linear(x, p.weight, p.a, p.b, None, *branch, True)[0]]

    def backward() -> list[Tensor]:
        dx, _, d_a, d_b = ops.lora_linear_backward(
            p.dy, x, p.weight, p.a, p.b, s, *branch, True, False, True, True
        )
        return [dx, d_a, d_b]

    given = torch.randn_like(p.dy)

    def add() -> list[Tensor]:
        return [ops.lora_add(given, x, p.a, p.b, *branch, True)[0]]

    def add_backward() -> list[Tensor]:
        return list(ops.lora_add_backward(p.dy, x, p.a, p.b, s, *branch, True, True, True))

    weights: tuple[Tensor, ...]
    if base == "dense":
        right, weights, runs = expected(p, seed), (p.weight,), (forward, backward)
    else:
        right = _on_top(given, expected(p._replace(weight=torch.zeros_like(p.weight)), seed))
        weights, runs = (), (add, add_backward)
    found = []
    for op, rows, run, names in zip(
        BASES[base], (x, p.dy), runs, (("y",), ("dx", "dA", "dB")), strict=True
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


def key_of(case: Case, op: str) -> dict[str, Any]:
    dtype = str(DTYPES[case.dtype]).removeprefix("torch.")
    values = (op, dtype, case.M, case.N, case.K, case.r, case.dropout > 0)
    return dict(zip(KEY, values, strict=True))


def qualify(candidate: Candidate, work: Work, again: bool = False) -> None:
    """Raises WrongResult, or whatever the candidate raises, unless it is right. Where its plan has
    been proven with other tiles or sizes, a second run has to do."""
    plan, device = PLANS[candidate.plan], work.right.rows.device
    overlaps = any(fields.get("pdl") for fields in candidate.tiles.values())
    cooperates = plan.cooperates or overlaps
    runs = 2 if again else _RUNS_COOPERATING if cooperates else _RUNS
    with use_plan(*candidate):
        with poisoned():
            first = work.run()
        work.right.require(str(candidate), first, work.names)
        with _busy(device) if cooperates else contextlib.nullcontext():
            for run in range(1, runs):
                if not all(map(torch.equal, first, work.run())):
                    raise WrongResult(f"{candidate}: other bits in run {run + 1}")
        if device.type == "cuda" and not again:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = work.run()
            graph.replay()
            # By the rule: torch may choose another algorithm for a product within a graph.
            replayed = [out.clone() for out in captured]
            work.right.require(f"{candidate} in a graph", replayed, work.names)
            graph.replay()
            if not all(map(torch.equal, replayed, captured)):
                raise WrongResult(f"{candidate}: other bits in a graph's second replay")


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """New memory holds NaN."""
    memory: Any = torch.utils.deterministic
    before = torch.get_deterministic_debug_mode(), memory.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of cuBLAS, which need not be deterministic here
        torch.use_deterministic_algorithms(True, warn_only=True)
        memory.fill_uninitialized_memory = True
        try:
            yield
        finally:
            torch.set_deterministic_debug_mode(before[0])
            memory.fill_uninitialized_memory = before[1]


@contextlib.contextmanager
def _busy(device: torch.device) -> Iterator[None]:
    """Another stream of a GPU has work meanwhile."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        matrix = torch.zeros(4096, 4096, dtype=torch.float16, device=device)
        for _ in range(20):
            matrix @ matrix
    yield
    stream.synchronize()


def works_right(candidate: Candidate, work: Work, table: Table) -> bool:
    """Runs and checks it once; a failure is written down."""
    call = {name: getattr(work.call, name) for name in KEY}
    if table.refuses(candidate, call):
        return False
    table.trying(candidate, call)
    try:
        qualify(candidate, work, table.proves(candidate, call))
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


def _plain(tiles: Tiles) -> dict[str, dict[str, int]]:
    return {launch: dict(fields) for launch, fields in tiles.items()}


def bucket_of(
    work: Work, table: Table, seconds: float, rounds: tuple[int, int]
) -> dict[str, Any] | None:
    """The bucket of one call; None where ATen's calls are not right."""
    found = candidates(work.call, target(work.right.rows.device))
    listed = [Candidate(plan, _plain(tiles)) for plan, tiles in found]
    right = [candidate for candidate in listed if works_right(candidate, work, table)]
    # One that ran right before its plan was found wrong is out too.
    call = work.call._asdict()
    right = [candidate for candidate in right if table.proves(candidate, call)]
    if all(candidate.plan != "aten" for candidate in right):
        return None  # nothing is taken that was not timed beside it
    times = timed(right, work, seconds, rounds)
    more = joined(right, [statistics.median(spent) for spent in times])
    more = [candidate for candidate in more if works_right(candidate, work, table)]
    if more:  # all again: times of two runs do not compare
        right += more
        times = timed(right, work, seconds, rounds)
    best = simplest(right, [statistics.median(spent) for spent in times])
    plain = next(i for i, candidate in enumerate(right) if candidate.plan == "aten")
    figures = summary(times[best], times[plain])
    bucket = {name: getattr(work.call, name) for name in KEY} | {"plan": right[best].plan}
    if right[best].tiles:
        bucket["tiles"] = right[best].tiles
    return bucket | {"ms": figures["ms"], "ratio_to_aten": figures["ratio"],
                     "date": str(date.today())}  # fmt: skip


def missing(buckets: Sequence[Mapping[str, Any]], base: str, case: Case) -> list[str]:
    """The ops of a case that no bucket is of."""
    keys = {op: key_of(case, op).items() for op in BASES[base]}
    return [op for op, key in keys.items() if not any(key <= b.items() for b in buckets)]


def left(todo: Sequence[tuple[str, Case]], path: Path) -> list[tuple[str, Case]]:
    """Without the cases whose buckets the table at the path has."""
    found = tables.read_table(path)["buckets"] if path.exists() else []
    return [(base, case) for base, case in todo if missing(found, base, case)]


def run_part(part: str, todo: Sequence[tuple[str, Case]], device: torch.device) -> None:
    """Runs every n-th candidate from the i-th on once, for part i/n, so that Triton's cache has
    what they need. Whether they are right is not asked here."""
    first, step = map(int, part.split("/"))
    for base, case in todo:
        for work in works(problem(case, device), base):
            for found in candidates(work.call, target(device))[first::step]:
                try:
                    with use_plan(*found):
                        work.run()
                except Exception as error:
                    if is_fatal(error):
                        raise
