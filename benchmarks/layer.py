"""What a LoRA layer costs against the frozen layer and against every other way to do it today.

    python -m benchmarks.layer --out benchmarks/results/layer-cpu.json     # or: make bench

Every peer is checked against fp64 before it is timed; a wrong one is reported and not timed. Peers
take turns in one process, and the ratio of a peer is the median over the rounds of its time over
the frozen layer's in the same round. Results are on disk after every case, and the same command
goes on where the last one ended. The tables, in this order on a GPU:

    headline    Llama-3-8B and 70B at M = 8192, r = 16
    lorafusion  the published setup of LoRAFusion
    slow        a dozen cells for PEFT in its three forms, and for each plan of ours
    decode      few rows, forward alone, as a CUDA graph
    grid        the other named shapes, rows and ranks
"""

import argparse
import gc
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import peers, shapes
from benchmarks.memory import peak_bytes
from benchmarks.peers import (
    ADDMM,
    FROZEN,
    OURS,
    OURS_FP32,
    PEERS,
    PEFT,
    PEFT_COMPILED,
    PEFT_FP32,
    UNFUSED,
    Peer,
)  # fmt: skip
from benchmarks.store import Results
from lora_kernels.backends.cuda.plan import Call
from lora_kernels.backends.cuda.plans import PLANS
from lora_kernels.testing import DTYPES, Case, Problem, expected, is_fatal, problem
from lora_kernels.tuning.clock import Deadline, graphed, interleaved, summary
from lora_kernels.tuning.machine import machine, machine_line

GRID = (FROZEN, ADDMM, OURS)
_SEED = 1234


def drawn_seed(device: torch.device) -> torch.Tensor:
    """The next seed that a call of ours will draw; the generator is put back."""
    torch.manual_seed(_SEED)
    seed = torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)
    torch.manual_seed(_SEED)
    return seed


class Job(NamedTuple):
    table: str
    case: Case
    peers: Sequence[str]


def _legal_plans(case: Case) -> list[str]:
    call = Call(
        "forward", str(DTYPES[case.dtype]).removeprefix("torch."),
        case.M, case.N, case.K, case.r, case.dropout > 0,
    )  # fmt: skip
    return [peers.of_plan(name) for name, plan in PLANS.items() if plan.refusal(call) is None]


def gpu_jobs() -> list[Job]:
    """What matters most comes first: a run that is cut short has it."""
    grid = shapes.grid()
    decode = (FROZEN, ADDMM, PEFT, OURS)
    return [
        *(Job("headline", case, GRID) for case in grid if shapes.is_headline(case)),
        *(Job("lorafusion", case, (FROZEN, UNFUSED, ADDMM, OURS)) for case in shapes.lorafusion()),
        *(Job("slow", c, (*PEERS, *_legal_plans(c))) for c in shapes.named_cells()),
        *(Job("decode", c, (*decode, *_legal_plans(c))) for c in shapes.decode()),
        *(Job("grid", case, GRID) for case in grid if not shapes.is_headline(case)),
    ]


def cpu_jobs() -> list[Job]:
    jobs = []
    for case in shapes.cpu():
        fp32 = [PEFT_FP32, OURS_FP32] if case.dtype != "fp32" else []
        compiled = [PEFT_COMPILED] if case.M == 1024 and not case.dropout else []
        jobs.append(Job("cpu", case, (FROZEN, ADDMM, PEFT, *fp32, *compiled, OURS)))
    return jobs


def scaled(job: Job, scale: int) -> Job:
    """The job with M, K and N divided, for a smoke run."""
    M, K, N = (max(1, size // scale) for size in job.case[:3])
    return job._replace(case=job.case._replace(M=M, K=K, N=N))


def is_right(name: str, peer: Peer, p: Problem) -> None:
    """Raises WrongResult unless the peer computes the layer; ours with its dropout mask, others,
    whose mask is their own affair, without."""
    if not peer.adapters:
        return
    if name.startswith(OURS):
        seed = drawn_seed(p.x.device)
        expected(p, seed).require(name, peer.results(p))
        return
    peer.layer.eval()
    expected(p).require(name, peer.results(p))
    peer.layer.train()


def usable(names: Iterable[str], p: Problem) -> tuple[dict[str, Peer], dict[str, str]]:
    """The peers that are right, and why the others are not timed."""
    right, refused = {}, {}
    for name in names:
        try:
            peer = peers.build(name, p)
            is_right(name, peer, p)
            right[name] = peer
        except Exception as error:
            if is_fatal(error):
                raise
            refused[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return right, refused


def _forward_alone(peer: Peer, x: Tensor) -> Callable[[Callable[[], None]], None]:
    def forward() -> Tensor:
        with torch.no_grad(), peer.context():
            return peer.layer(x)

    run = graphed(forward) if x.is_cuda else forward

    def turn(mark: Callable[[], None]) -> None:
        run()
        mark()

    return turn


def _passes(parts: list[list[float]]) -> dict[str, list[float]]:
    """Seconds of each pass by round, from the parts of a turn."""
    if len(parts[0]) == 1:
        return {"forward": [part[0] for part in parts]}
    forward, backward = zip(*parts, strict=True)
    return {"forward": forward, "backward": backward, "both": [sum(part) for part in parts]}


def rows_of(job: Job, seconds: float, rounds: tuple[int, int], device: torch.device) -> list[dict]:
    """One row a peer: milliseconds and ratio of each pass, peak memory."""
    p = problem(job.case, device)
    right, refused = usable(job.peers, p)
    key = {"table": job.table, "layer": shapes.names(job.case.N, job.case.K), **job.case._asdict()}
    reasons = [key | {"peer": name, "refused": why} for name, why in refused.items()]
    if FROZEN not in right:
        return reasons
    alone = job.table == "decode"
    turns = {
        name: _forward_alone(peer, p.x.detach()) if alone else peer.turn(p)
        for name, peer in right.items()
    }
    times = {name: _passes(parts) for name, parts in
             interleaved(turns, device, seconds, rounds).items()}  # fmt: skip
    rows = []
    for name, passes in times.items():
        row = key | {"peer": name, "rounds": len(passes["forward"])}
        for which, spent in passes.items():
            row[which] = summary(spent, times[FROZEN][which])
        if not alone:
            step = right[name].turn(p)
            row["peak_mib"] = round(
                peak_bytes(lambda step=step: step(lambda: None), device) / 2**20, 6
            )
        rows.append(row)
    return rows + reasons


def ceilings(dtypes: Iterable[str], device: torch.device, scale: int) -> list[dict]:
    """What this device reached at best: bytes per second of a copy, operations of a product."""
    gpu = device.type == "cuda"
    size, n = ((1 << 30) if gpu else (1 << 28)) // scale, (8192 if gpu else 2048) // scale
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    rows = []
    for dtype in dtypes:
        matrix = torch.randn(n, n, device=device).to(DTYPES[dtype])

        def both(mark: Callable[[], None], matrix: Tensor = matrix) -> None:
            target.copy_(source)
            mark()
            matrix @ matrix
            mark()

        parts = interleaved({"": both}, device, 1.0, (3, 20))[""]
        copy, product = (min(part) for part in zip(*parts, strict=True))
        rows.append(
            {"table": "ceiling", "dtype": dtype, "gb_s": round(2 * size / copy / 1e9, 2),
             "tflops": round(2 * n**3 / product / 1e12, 4)}
        )  # fmt: skip
    return rows


def _print(rows: list[dict]) -> None:
    job = {name: rows[0][name] for name in Case._fields}
    print(f"{rows[0]['table']}: {Case(**job)} {rows[0]['layer']}", flush=True)
    for row in rows:
        if "refused" in row:
            print(f"    {row['peer']:26} not timed: {row['refused']}", flush=True)
            continue
        cells = "".join(
            f"  {which} {row[which]['ms']:9.3f} ms {row[which]['ratio']:6.3f}x"
            for which in shapes.PASSES
            if which in row
        )
        memory = f"  {row['peak_mib']:9.1f} MiB" if "peak_mib" in row else ""
        print(f"    {row['peer']:26}{cells}{memory}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 if a form of ours was wrong or is missing, 0 if all is well or time ran out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="result file (JSON), continued if it is there")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=7.5, help="time box of the run")
    parser.add_argument("--seconds", type=float, help="of one case (GPU 0.15, CPU 6)")
    parser.add_argument("--rounds", type=int, nargs=2, default=(3, 100), metavar=("MIN", "MAX"))
    parser.add_argument("--tables", nargs="+", help="only these")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="only these")
    parser.add_argument("--scale", type=int, default=1, help="divides M, K and N (a smoke run)")
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    gpu = device.type == "cuda"
    seconds = args.seconds if args.seconds is not None else 0.15 if gpu else 6.0
    deadline = Deadline(args.minutes)
    info = machine(gpu)
    print(machine_line(info), flush=True)
    results = Results(args.out, info)
    jobs = [
        scaled(job, args.scale)
        for job in (gpu_jobs() if gpu else cpu_jobs())
        if (args.tables is None or job.table in args.tables)
        and (args.dtypes is None or job.case.dtype in args.dtypes)
    ]
    if not results.done({"table": "ceiling"}):
        results.add(ceilings(dict.fromkeys(j.case.dtype for j in jobs), device, args.scale))
    for index, job in enumerate(jobs):
        if results.done({"table": job.table, **job.case._asdict()}):
            continue
        if deadline.left() <= 0:
            print(f"time is over with {len(jobs) - index} cases left; run again to go on")
            break
        begin = time.perf_counter()
        rows = rows_of(job, seconds, tuple(args.rounds), device)
        results.add(rows)
        _print(rows)
        gc.collect()
        print(f"    {time.perf_counter() - begin:.1f} s", flush=True)
    wrong = [row for row in results.rows if "refused" in row and row["peer"].startswith(OURS)]
    for row in wrong:
        print(f"FAILED {row['table']} {row['peer']}: {row['refused']}")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
