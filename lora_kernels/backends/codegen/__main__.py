"""Prints what the code generation check finds; exits with 1 if a kernel breaks a rule."""

from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import triton

from lora_kernels.backends import codegen
from lora_kernels.backends.codegen import TARGETS, Kernel, compile_case, faults
from lora_kernels.backends.codegen.cases import OTHERS, SHORT, Case, analytic, cases, is_served
from lora_kernels.backends.cuda import tables
from lora_kernels.backends.cuda.plans import PLANS
from lora_kernels.backends.device import CARDS
from lora_kernels.backends.triton.launch import INTERPRETED

NAMES = {
    "75": "T4", "80": "A100", "86": "RTX 30", "89": "RTX 40, L40S", "90": "H100, H200",
    "100": "B200", "120": "RTX 50", "gfx942": "MI300", "gfx950": "MI350", "gfx1201": "RX 9070",
}  # fmt: skip


def row(kernel: Kernel) -> str:
    k, c = kernel, kernel.constants
    tile = "x".join(str(c[n]) for n in ("R", "BM", "BN", "BC", "BK") if n in c)
    units = f"{k.mma_sync:4d} {k.wgmma:5d} {k.register_form:3d} {k.pending:5d} {k.tcgen05:4d}"
    return (
        f"{k.target.gfx or k.target.arch:>7} {k.name:16s} {tile:14s} {c['num_warps']:5d}"
        f" {k.registers:4d} {k.spills:6d}"
        f" {k.shared / 1024:6.1f}K {units} {k.tma:4d} {k.cp_async:5d} {k.fma:5d}  {k.case}"
    )


HEADER = (
    "   arch kernel           tile           warps regs spills shared  mma wgmma  RS async tc05"
    "  tma cp.as   fma  case"
)


def matrix(found: Mapping[tuple[str, str], list[Kernel]]) -> str:
    """Cards by plans, in Markdown: what became of the kernels of each."""
    proven: dict[str, set[str]] = defaultdict(set)
    for path in sorted(tables.TUNED.glob("*.json")):
        table = tables.read_table(path)
        for entry in table["proven"]:
            proven[entry["plan"]].add(table["gpu"].removeprefix("NVIDIA ").split()[0])

    def cell(plan: str, card: str) -> str:
        kernels = found.get((plan, card), ())
        if not kernels:
            return "–"
        broken = sum(bool(faults(kernel)) for kernel in kernels)
        spilling = sum(kernel.spills > 0 for kernel in kernels)
        text = f"{len(kernels)} kernels" if len(kernels) > 1 else "1 kernel"
        text += f", {spilling} spill" * bool(spilling) + f", {broken} faulty" * bool(broken)
        ran = card == "90" and proven[plan]  # both cards of the tables are Hoppers
        return f"{text}; run on {', '.join(sorted(proven[plan]))}" if ran else text

    plans = [name for name in (*PLANS, *OTHERS) if any((name, card) in found for card in CARDS)]
    lines = [f"| plan | {' | '.join(f'{NAMES[card]} ({_sm(card)})' for card in CARDS)} |"]
    lines.append("|---" * (len(CARDS) + 1) + "|")
    lines += [f"| `{n}` | {' | '.join(cell(n, card) for card in CARDS)} |" for n in plans]
    return "\n".join(lines)


def _sm(card: str) -> str:
    return card if card.startswith("gfx") else f"sm_{card}"


BEGIN, END = "<!-- made by codegen, from here -->", "<!-- to here -->"


def write_matrix(path: Path, found: Mapping[tuple[str, str], list[Kernel]]) -> None:
    """Between the marks in a page."""
    head, _, rest = path.read_text().partition(BEGIN)
    tail = rest.partition(END)[2]
    made = f"Triton {triton.__version__}.\n\n{matrix(found)}"
    path.write_text(f"{head}{BEGIN}\n{made}\n{END}{tail}")


def main() -> int:
    parser = argparse.ArgumentParser(description=codegen.__doc__.splitlines()[0])
    parser.add_argument("--arch", choices=TARGETS, action="append")
    parser.add_argument("--short", action="store_true", help="the cases of the test suite only")
    parser.add_argument("--analytic", action="store_true", help="not the tuner's tiles")
    parser.add_argument("--only", default="", help="a regular expression that the case must match")
    parser.add_argument("--page", type=Path, help="a page in which to write the matrix of plans")
    options = parser.parse_args()
    if INTERPRETED:
        sys.exit("TRITON_INTERPRET is set: nothing would be compiled")
    print(HEADER)
    found: dict[tuple[str, str], list[Kernel]] = defaultdict(list)
    for card in options.arch or TARGETS:
        seen: set[str] = set()
        chosen: Iterable[Case] = SHORT
        if not options.short:
            chosen = analytic() if options.analytic else cases(TARGETS[card])
        for case in chosen:
            if not re.search(options.only, str(case)) or not is_served(case, TARGETS[card]):
                continue
            for kernel in compile_case(case, card, seen):
                reasons = faults(kernel)
                print(
                    row(kernel),
                    *(f"  FAULT: {', '.join(reasons)}" for _ in reasons[:1]),
                    flush=True,
                )
                found[case.plan, card].append(kernel)
    if options.page:
        write_matrix(options.page, found)
    kernels = [kernel for of_one in found.values() for kernel in of_one]
    broken = sum(bool(faults(kernel)) for kernel in kernels)
    print(f"{len(kernels)} kernels, {broken} break a rule")
    return 1 if broken or not kernels else 0


if __name__ == "__main__":
    sys.exit(main())
