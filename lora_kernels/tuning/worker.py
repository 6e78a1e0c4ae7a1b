"""The process that runs candidates: whatever they do to it, who started it goes on.

    python -m lora_kernels.tuning.worker --out TABLE --todo JSON ... [--part I/N]

The table is on disk after every bucket; the same command goes on where the last one ended, and
passes over the candidate in which it died. Exit status 0: all is done, or the time is over.
"""

import argparse
import importlib
import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from lora_kernels.testing import Case, problem
from lora_kernels.tuning.clock import Deadline
from lora_kernels.tuning.machine import machine
from lora_kernels.tuning.search import bucket_of, left, run_part, works
from lora_kernels.tuning.table import Table, missing


def compile_ahead(arguments: Sequence[str], jobs: int, minutes: float) -> None:
    """`run_part` in as many processes; what is not done in time is compiled when it is timed."""
    command = [sys.executable, "-m", "lora_kernels.tuning.worker", *arguments, "--part"]
    children = [subprocess.Popen([*command, f"{i}/{jobs}"]) for i in range(jobs)]
    deadline = Deadline(minutes)
    for child in children:
        try:
            child.wait(max(0.0, deadline.left()))
        except subprocess.TimeoutExpired:
            child.kill()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--todo", required=True, help="[[base, case], ...]")
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--rounds", type=int, nargs=2, required=True)
    parser.add_argument("--jobs", type=int, required=True)
    parser.add_argument("--backward", type=int, choices=(0, 1), required=True)
    parser.add_argument("--variants", type=int, choices=(0, 1), required=True)
    parser.add_argument("--plugins", nargs="*", required=True)
    parser.add_argument("--quiet", action="store_true")
    parser.add_argument("--part")
    args = parser.parse_args(arguments)
    for module in args.plugins:
        importlib.import_module(module)
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    todo = [(base, Case(*case)) for base, case in json.loads(args.todo)]
    variants = bool(args.variants)
    if args.part:
        run_part(args.part, left(todo, args.out, variants), device, variants)
        return

    def say(line: str) -> None:
        if not args.quiet:
            print(line, flush=True)

    deadline = Deadline(args.minutes)
    info = machine(gpu)
    table = Table(args.out, str(info["gpu"] or "interpreter"), info)
    table.write()

    def stop(signum: int, frame: object) -> None:
        table.interrupted()
        raise SystemExit(128 + signum)

    # Does not come through where a kernel hangs: that one is remembered.
    signal.signal(signal.SIGTERM, stop)
    if args.jobs > 1:
        given = sys.argv[1:] if arguments is None else arguments
        compile_ahead(given, args.jobs, args.minutes / 2)
    for done, (base, case) in enumerate(todo):
        ops = missing(table.content["buckets"], base, case, variants, bool(args.backward))
        if not ops:
            continue
        if deadline.left() <= 0:
            say(f"time is over with {len(todo) - done} cases left; run again to go on")
            break
        for work in works(problem(case, device), base):
            if work.call.op in ops:
                bucket = bucket_of(work, table, args.seconds, tuple(args.rounds), variants)
                if bucket:
                    table.add(bucket)
        say(f"{done + 1} of {len(todo)}: {base} {case}")
    table.write()


if __name__ == "__main__":
    main()
