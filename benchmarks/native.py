"""The CPU on a grid: frozen layer, unfused torch, PEFT and ours, inference and a step of training.

    python -m benchmarks.native --out benchmarks/results/native-cpu.json
    python -m benchmarks.native --few    # up to how many rows one call serves

Every cell of M x widths x dtypes x (inference, training, training with dropout); ranks go round.
Layers are rotated, so that their weights come from memory as in a model. Peers take turns;
a ratio is the median over the rounds. `better` is the faster of PEFT and unfused torch. A cell that
seems slower than it by over 5 % is measured again, longer, and that is what counts.
"""

import argparse
import json
import math
import random
import timeit
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from statistics import geometric_mean
from unittest import mock

import torch

from benchmarks.layer import is_right
from benchmarks.peers import FROZEN, OURS, PEFT, UNFUSED, Peer, build
from lora_kernels import backends
from lora_kernels.backends.native import extension, few_rows
from lora_kernels.testing import DTYPES, SCALING, Case, Problem, problem
from lora_kernels.tuning.clock import Deadline, Turn, interleaved, summary
from lora_kernels.tuning.machine import machine, machine_line

ROWS = (1, 2, 4, 8, 16, 32, 64, 256, 1024, 4096)
WIDTHS = ((512, 512), (768, 768), (768, 3072), (3072, 768), (2048, 2048), (4096, 4096))
RANKS = (8, 16, 32, 64, 128)
# What is timed -> the probability of dropout; None without gradients.
MODES = {"inference": None, "training": 0.0, "training, dropout": 0.1}
NAMES = (FROZEN, UNFUSED, PEFT, OURS)
_COLD_BYTES = 96 << 20  # more than the last cache of most CPUs
_MOST_COPIES = 8
_NOISE = 1.05
_LONGER = 8  # times, where it is exceeded


def turn_of(peers: list[Peer], p: Problem, trains: bool) -> Turn:
    """The same call of one layer after the other."""
    turns = [peer.turn(p) for peer in peers]
    at = -1

    def run(mark: Callable[[], None]) -> None:
        nonlocal at
        at = (at + 1) % len(peers)
        if trains:
            return turns[at](mark)
        with torch.no_grad():
            peers[at].layer(p.x)
        mark()

    return run


def cell(case: Case, mode: str, seconds: float, rounds: tuple[int, int]) -> dict:
    """The medians of all peers, and ratios to the frozen layer."""
    p = problem(case, torch.device("cpu"))
    copies = math.ceil(_COLD_BYTES / (p.weight.numel() * p.weight.element_size()))
    copies = max(1, min(copies, _MOST_COPIES))
    trains = MODES[mode] is not None
    turns = {}
    for name in NAMES:
        peers = [build(name, p) for _ in range(copies)]
        if case.M * case.K * case.N < 1 << 30:  # the exact results of the largest take minutes
            is_right(name, peers[0], p)
        for peer in peers:
            peer.layer.train(trains)
        turns[name] = turn_of(peers, p, trains)
    times = {
        name: [sum(parts) for parts in of_peer]
        for name, of_peer in interleaved(turns, p.x.device, seconds, rounds).items()
    }
    row = case._asdict() | {"mode": mode, "rounds": len(times[FROZEN])}
    for name, taken in times.items():
        row[name] = summary(taken, times[FROZEN])
    return row


def best_peer(row: dict) -> float:
    """Milliseconds of the faster of PEFT and unfused torch."""
    return min(row[PEFT]["ms"], row[UNFUSED]["ms"])


def better(row: dict) -> float:
    """Our time over that of the better peer."""
    return row[OURS]["ms"] / best_peer(row)


def figures(rows: list[dict]) -> list[dict]:
    """Of every dtype and mode: cells, geometric mean and worst against the better peer, geometric
    mean against the frozen layer."""
    found = []
    for dtype, mode in product(DTYPES, MODES):
        some = [row for row in rows if row["dtype"] == dtype and row["mode"] == mode]
        if some:
            found.append({"dtype": dtype, "mode": mode} | figure(some))
    return [*found, {"dtype": "all", "mode": "all"} | figure(rows)] if rows else found


def figure(rows: list[dict]) -> dict:
    worst = max(rows, key=better)
    return {
        "cells": len(rows),
        "better": round(geometric_mean(map(better, rows)), 3),
        "worst": round(better(worst), 3),
        "worst_case": str(Case(*(worst[name] for name in Case._fields))),
        "slower": sum(better(row) > _NOISE for row in rows),
        "frozen": round(geometric_mean(row[OURS]["ratio"] for row in rows), 3),
    }


def grid(args: argparse.Namespace) -> list[dict]:
    """Groups of one layer in random order, one dtype after the other; rows of a group rise until a
    round takes too long."""
    groups = []
    for dtype in args.dtypes:
        of_dtype = [*product([dtype], WIDTHS, MODES)]
        random.Random(0).shuffle(of_dtype)
        groups += of_dtype
    deadline, rows, left = Deadline(args.minutes), [], 0
    for dtype, widths, mode in groups:
        K, N = (max(1, width // args.scale) for width in widths)
        for M in args.rows:
            if deadline.left() < 0:
                left += 1
                continue
            r = RANKS[(M + K + N) // 64 % len(RANKS)]
            case = Case(M, K, N, r, dtype, MODES[mode] or 0.0)
            row = cell(case, mode, args.seconds, args.rounds)
            if better(row) > _NOISE:
                again = cell(case, mode, _LONGER * args.seconds, args.rounds)
                row = again | {"first": round(better(row), 3)}
            rows.append(row)
            times = "  ".join(f"{name} {row[name]['ms']:.3f}" for name in NAMES)
            first = f", at first {row['first']:.2f}" if "first" in row else ""
            print(
                f"{dtype} ({M},{K},{N},r={r}) {mode}: {times} ms, {better(row):.2f} of the"
                f" better{first}",
                flush=True,
            )
            if sum(row[name]["ms"] for name in NAMES) > args.longest * 1e3:
                print(f"{dtype} ({K},{N}) {mode}: more rows take too long here", flush=True)
                break
    if left:
        print(f"{left} cells left out: the time is over")
    return rows


def microseconds(function: Callable[[], object], calls: int) -> float:
    """Of one call, the best of seven runs."""
    function()
    return round(min(timeit.repeat(function, number=calls, repeat=7)) / calls * 1e6, 1)


class _Nothing(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def latency(calls: int) -> dict[str, float]:
    """Microseconds of a 64 x 64 layer, fp32, rank 16: one row without gradients and of what they
    are made, and forward and backward of four rows."""
    found = {}
    p, few = problem(Case(1, 64, 64, 16, "fp32"), torch.device("cpu")), backends.few_rows()
    with torch.no_grad():
        for name in NAMES:
            layer = build(name, p).layer.eval()
            found[f"{name}, one row"] = microseconds(lambda layer=layer: layer(p.x), calls)
        nothing = _Nothing()
        found["of it nn.Module's call"] = microseconds(lambda: nothing(p.x), calls)
        if few is not None:
            found["of it the native op, with checks"] = microseconds(
                lambda: few.linear(
                    p.x, p.weight, p.a, p.b, None, SCALING, 1.0, 0, None, few.isa, None
                ),
                calls,
            )
    p = problem(Case(4, 64, 64, 16, "fp32"), torch.device("cpu"))
    for name in NAMES:
        peer = build(name, p)
        turn = peer.turn(p)
        found[f"{name}, forward and backward of 4 rows"] = microseconds(
            lambda turn=turn: turn(lambda: None), calls
        )
    return found


def few(args: argparse.Namespace) -> None:
    """Ratios of a layer by one call and by torch's product, and where the first ceases to win."""
    isa = extension.best_isa()
    for dtype, mode in product(args.dtypes, ("inference", "training")):
        last = 0
        for M in args.rows:
            gains = []
            for K, N in WIDTHS:
                ratios = []
                for most in (max(args.rows), 0):
                    with mock.patch.object(few_rows, "most_rows", return_value=most):
                        backends.forget()
                        row = cell(Case(M, K, N, 16, dtype), mode, args.seconds, args.rounds)
                    ratios.append(row[OURS]["ms"] / row[FROZEN]["ms"])
                gains.append(ratios[0] / ratios[1])
            mean = geometric_mean(gains)
            cells = " ".join(f"{gain:.2f}" for gain in gains)
            print(f"{dtype} {mode} {M} rows: {mean:.2f} ({cells})", flush=True)
            if mean > 1:
                break
            last = M
        print(f"{dtype} {mode}: {last} rows on {extension.ISA_NAMES[isa]}", flush=True)
    backends.forget()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="result file (JSON)")
    parser.add_argument("--few", action="store_true", help="measure up to how many rows are few")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32", "bf16", "fp16"])
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="M")
    parser.add_argument("--minutes", type=float, default=60, help="time box of the grid")
    parser.add_argument("--seconds", type=float, default=1.0, help="time box of one cell")
    parser.add_argument("--longest", type=float, default=1.0, help="seconds of a round")
    parser.add_argument("--rounds", type=int, nargs=2, default=(5, 1000), metavar=("MIN", "MAX"))
    parser.add_argument("--calls", type=int, default=2000, help="calls of one timing of latency")
    parser.add_argument("--scale", type=int, default=1, help="divides the widths (for a smoke run)")
    args = parser.parse_args(arguments)
    args.rounds = tuple(args.rounds)
    if not extension.available():
        raise SystemExit(f"the compiled extension is not there: {extension.status()}")
    info = machine(gpu=False) | {"extension": extension.status()}
    print(machine_line(info), extension.status(), sep="; ", flush=True)
    if args.few:
        return few(args)
    parts = latency(args.calls)
    for name, value in parts.items():
        print(f"{name}: {value} us", flush=True)
    rows = grid(args)
    found = figures(rows)
    for one in found:
        print(json.dumps(one))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        result = {"machine": info, "latency": parts, "figures": found, "rows": rows}
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
