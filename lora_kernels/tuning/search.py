"""Every legal plan and tile set of a call: proven first, then timed.

A candidate is right when its outputs are, by the rule of `lora_kernels.testing`, with all memory
that it is given poisoned by NaN, when it writes nowhere beside it, when it gives equal bits run
after run and, on a GPU, in the replay of a graph. What is right of a quantised weight is what is of
the weight that it decodes to. A candidate's time is the median, over rounds
in which all take turns, of its ratio to that of ATen's calls. Below 0.99 the fastest is taken, or
the simplest within 1 % of it, else ATen's calls.
"""

import contextlib
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from functools import cache
from operator import truediv
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels import _ops, quantized  # noqa: F401 define the ops that are run
from lora_kernels._namespace import ops
from lora_kernels.backends.cuda import tables
from lora_kernels.backends.cuda.choice import candidates, use_plan
from lora_kernels.backends.cuda.plan import Call, Tiles
from lora_kernels.backends.cuda.plans import PLANS
from lora_kernels.backends.device import target
from lora_kernels.backends.triton.tiles import vectorises
from lora_kernels.testing import (
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
from lora_kernels.tuning.guards import guarded, poisoned
from lora_kernels.tuning.table import (
    Candidate,
    Table,
    entry_of,
    key_of,
    missing,
    ops_of,
    weight_of,
)
from lora_kernels.weights import sample

_CLOSE = 1.01  # as fast as the fastest
_TAKEN = 0.99  # of ATen's time, below which a plan is taken
_RUNS, _RUNS_COOPERATING = 5, 20


class Work(NamedTuple):
    """One op of one problem: what is run, and what it must give."""

    call: Call
    run: Callable[[], list[Tensor]]
    right: Expected
    names: tuple[str, ...]


def works(p: Problem, base: str) -> list[Work]:
    """Forward and backward as the ops themselves, below autograd, of a dense weight or of a given
    base output; of a quantised weight, which `base` names by its kind, forward alone."""
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
    runs: tuple[Callable[[], list[Tensor]], ...]
    if weight_of(base) != "dense":
        record = sample(p.weight, base)
        decoded = p._replace(weight=record.dequantize(x.dtype))

        def coded() -> list[Tensor]:
            given = (x, record.parts, record.form, p.a, p.b, None, *branch, True)
            return [ops.lora_linear_quantized(*given)[0]]

        right, weights, runs = expected(decoded, seed), (), (coded,)
    elif base == "dense":
        right, weights, runs = expected(p, seed), (p.weight,), (forward, backward)
    else:
        right = _on_top(given, expected(p._replace(weight=torch.zeros_like(p.weight)), seed))
        weights, runs = (), (add, add_backward)
    found = []
    for op, run in zip(ops_of(base), runs, strict=True):
        back = op.endswith("backward")
        rows, names = (p.dy, ("dx", "dA", "dB")) if back else (x, ("y",))
        aligned = all(map(vectorises, (rows, *weights)))
        call = Call(aligned=aligned, **key_of(case, op, weight_of(base)))
        found.append(Work(call, run, right, names))
    return found


def _on_top(given: Tensor, right: Expected) -> Expected:
    """What is right of a branch, on a base output."""
    base = given[right.rows]
    exact, rival = right.exact[0] + base.double(), right.rival[0] + base
    rival = rival.to(given.dtype).float()
    return right._replace(exact=[exact, *right.exact[1:]], rival=[rival, *right.rival[1:]])


def overlaps(candidate: Candidate) -> bool:
    """Whether a launch begins before the one ahead of it has ended."""
    return any(fields.get("pdl") for fields in candidate.tiles.values())


def qualify(candidate: Candidate, work: Work, again: bool = False) -> None:
    """Raises WrongResult, or whatever the candidate raises, unless it is right. Where its plan has
    been proven with other tiles or sizes, a second run has to do, unless launches overlap."""
    device = work.right.rows.device
    again = again and not overlaps(candidate)
    cooperates = PLANS[candidate.plan].cooperates or overlaps(candidate)
    runs = 2 if again else _RUNS_COOPERATING if cooperates else _RUNS
    with use_plan(*candidate):
        with poisoned(), guarded(str(candidate)):
            first = work.run()
        work.right.require(str(candidate), first, work.names)
        with _busy(device, cooperates) as more_work:
            for run in range(1, runs):
                more_work()
                if not all(map(torch.equal, first, work.run())):
                    raise WrongResult(f"{candidate}: other bits in run {run + 1}")
        if device.type == "cuda" and not again:
            _in_a_graph(candidate, work)


def _in_a_graph(candidate: Candidate, work: Work) -> None:
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


@cache
def _matrix(device: torch.device) -> Tensor:
    return torch.zeros(4096, 4096, dtype=torch.float16, device=device)


@contextlib.contextmanager
def _busy(device: torch.device, wanted: bool) -> Iterator[Callable[[], None]]:
    """What gives another stream of a GPU more to do."""
    if device.type != "cuda" or not wanted:
        yield lambda: None
        return
    stream, matrix = torch.cuda.Stream(device), _matrix(device)
    stream.wait_stream(torch.cuda.current_stream(device))

    def more_work() -> None:
        with torch.cuda.stream(stream):
            for _ in range(4):
                matrix @ matrix

    yield more_work
    stream.synchronize()


def works_right(candidate: Candidate, work: Work, table: Table) -> bool:
    """Runs and checks it once; a failure is written down."""
    call = entry_of(work.call)
    if table.refuses(candidate, call):
        return False
    table.trying(candidate, call)
    try:
        qualify(candidate, work, table.proves(candidate, call))
    except Exception as error:
        why = f"{type(error).__name__}: {(str(error) or '?').splitlines()[0]}"
        if is_fatal(error):
            table.trying(candidate, call, why)  # the mark stays: the next process knows
            raise
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


def ratios_to_aten(
    candidates: Sequence[Candidate], times: Sequence[Sequence[float]]
) -> list[float]:
    """By candidate the median, over rounds, of its time over ATen's in the same round."""
    plain = next(t for c, t in zip(candidates, times, strict=True) if c.plan == "aten")
    return [statistics.median(map(truediv, spent, plain)) for spent in times]


def joined(candidates: Sequence[Candidate], ratios: Sequence[float]) -> list[Candidate]:
    """For each plan the best tile of every launch together, where that is a new candidate."""
    found = []
    for plan in dict.fromkeys(candidate.plan for candidate in candidates):
        of_plan = [(m, c) for m, c in zip(ratios, candidates, strict=True) if c.plan == plan]
        analytic = min((m for m, c in of_plan if not c.tiles), default=math.inf)
        tiles: dict[str, dict[str, int]] = {}
        for ratio, candidate in sorted(of_plan, key=lambda pair: pair[0]):
            if ratio < analytic:
                for launch, fields in candidate.tiles.items():
                    tiles.setdefault(launch, fields)
        if len(tiles) > 1:
            found.append(Candidate(plan, tiles))
    return found


def simplest(candidates: Sequence[Candidate], ratios: Sequence[float]) -> int:
    """Index of what is taken: within 1 % of the fastest the first plan, with analytic tiles if it
    may be; ATen's calls unless that is below 0.99 of their time."""
    plans = list(PLANS)
    most = _CLOSE * min(ratios)
    close = [i for i, ratio in enumerate(ratios) if ratio < _TAKEN and ratio <= most]
    if not close:
        return next(i for i, candidate in enumerate(candidates) if candidate.plan == "aten")
    return min(close, key=lambda i: (plans.index(candidates[i].plan), len(candidates[i].tiles)))


def _plain(tiles: Tiles) -> dict[str, dict[str, int]]:
    return {launch: dict(fields) for launch, fields in tiles.items()}


def bucket_of(
    work: Work, table: Table, seconds: float, rounds: tuple[int, int], variants: bool = True
) -> dict[str, Any] | None:
    """The bucket of one call; None where ATen's calls are not right."""
    found = listed(work.call, work.right.rows.device, variants)
    right = [candidate for candidate in found if works_right(candidate, work, table)]
    # One that ran right before its plan was found wrong is out too.
    call = work.call._asdict()
    right = [candidate for candidate in right if table.proves(candidate, call)]
    if all(candidate.plan != "aten" for candidate in right):
        return None  # nothing is taken that was not timed beside it
    times = timed(right, work, seconds, rounds)
    more = joined(right, ratios_to_aten(right, times))
    more = [candidate for candidate in more if works_right(candidate, work, table)]
    if more:  # all again: times of two runs do not compare
        right += more
        times = timed(right, work, seconds, rounds)
    best = simplest(right, ratios_to_aten(right, times))
    plain = next(i for i, candidate in enumerate(right) if candidate.plan == "aten")
    figures = summary(times[best], times[plain])
    bucket = entry_of(work.call) | {"plan": right[best].plan}
    if right[best].tiles:
        bucket["tiles"] = right[best].tiles
    if not variants:
        bucket["variants"] = False
    return bucket | {"ms": figures["ms"], "ratio_to_aten": figures["ratio"],
                     "date": str(date.today())}  # fmt: skip


def left(
    todo: Sequence[tuple[str, Case]], path: Path, variants: bool = True
) -> list[tuple[str, Case]]:
    """Without the cases whose buckets the table at the path has."""
    found = tables.read_table(path)["buckets"] if path.exists() else []
    return [(base, case) for base, case in todo if missing(found, base, case, variants)]


def listed(call: Call, device: torch.device, variants: bool) -> list[Candidate]:
    """What may serve a call; without `variants` each plan with its analytic tiles alone. Last are
    those whose programs wait for one another: they may hang, and the rest is then done."""
    found = candidates(call, target(device))
    kept = [Candidate(plan, _plain(tiles)) for plan, tiles in found if variants or not tiles]
    return sorted(kept, key=lambda candidate: PLANS[candidate.plan].cooperates)


def run_part(
    part: str, todo: Sequence[tuple[str, Case]], device: torch.device, variants: bool
) -> None:
    """Runs every n-th candidate from the i-th on once, for part i/n, so that Triton's cache has
    what they need. Whether they are right is not asked here."""
    first, step = map(int, part.split("/"))
    for base, case in todo:
        for work in works(problem(case, device), base):
            for found in listed(work.call, device, variants)[first::step]:
                try:
                    with use_plan(*found):
                        work.run()
                except Exception as error:
                    if is_fatal(error):
                        raise
