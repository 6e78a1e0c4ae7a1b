"""Proves and times the fused kernels on this GPU."""

import argparse
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lora_kernels import tuning
from lora_kernels.backends.cuda.plan import WEIGHTS
from lora_kernels.testing import DTYPES

if TYPE_CHECKING:
    from lora_kernels.commands import Subparsers


def _shape(text: str) -> tuple[int, ...]:
    sizes = tuple(int(part) for part in text.split(","))
    if len(sizes) != 3:
        raise argparse.ArgumentTypeError(f"expected N,K,r, got {text!r}")
    return sizes


def add(subparsers: "Subparsers") -> argparse.ArgumentParser:
    tune = subparsers.add_parser(
        "tune",
        help="prove and time the fused kernels on this GPU, for this user",
        description=tuning.__doc__,
    )
    tune.add_argument("--shapes", nargs="+", type=_shape, metavar="N,K,r", help="of weights")
    tune.add_argument("--rows", nargs="+", type=int, default=tuning.ROWS, metavar="M")
    tune.add_argument("--dtype", choices=DTYPES, default="bf16")
    tune.add_argument(
        "--weight", choices=WEIGHTS, default="dense", help="of the shapes, quantised or not"
    )
    tune.add_argument("--minutes", type=float, default=3, help="time box; again goes on")
    tune.add_argument(
        "--seconds", type=float, default=tuning.SECONDS, help="of timing for a kind of call"
    )
    tune.add_argument("--rounds", type=int, nargs=2, default=tuning.ROUNDS, metavar=("MIN", "MAX"))
    tune.add_argument("--jobs", type=int, default=1, help="processes that compile beforehand")
    tune.add_argument("--limit", type=float, default=tuning.LIMIT, help="seconds of a candidate")
    tune.add_argument("--plugins", nargs="*", default=(), help="modules that register plans")
    tune.add_argument("--no-backward", action="store_true", help="for serving")
    tune.add_argument(
        "--quick", action="store_true", help="each plan's analytic tiles alone; again goes on"
    )
    tune.add_argument("--no-progress", action="store_true")
    tune.add_argument("--force", action="store_true", help="begin anew")
    tune.add_argument("--out", type=Path, help="the table (default: the user's, of this GPU)")
    tune.add_argument("--merge", type=Path, nargs=2, metavar=("A", "B"), help="no tuning")
    tune.set_defaults(usage_error=tune.error)
    return tune


def run(args: argparse.Namespace) -> int:
    if args.merge:
        if args.out is None:
            args.usage_error("--merge needs --out")
        one, other = args.merge
        tuning.merge_files(one, other, args.out)
        print(args.out)
        return 0
    # A worker that is told to end blames no candidate.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        report = tuning.tune(
            rows=args.rows, shapes=args.shapes, dtype=args.dtype, weight=args.weight,
            minutes=args.minutes,
            backward=not args.no_backward, variants=not args.quick,
            progress=False if args.no_progress else None, force=args.force, out=args.out,
            seconds=args.seconds, rounds=args.rounds, jobs=args.jobs, limit=args.limit,
            plugins=args.plugins,
        )  # fmt: skip
    except (ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    print(report)
    return 0
