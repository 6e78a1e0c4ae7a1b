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
from lora_kernels.backends.codegen import Kernel, compile_case, faults
from lora_kernels.backends.codegen.cases import (
    INTERPRETED_CARDS,
    OTHERS,
    SHORT,
    Case,
    analytic,
    cases,
    is_served,
)
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


def cells(found: Mapping[tuple[str, str], list[Kernel]]) -> dict[tuple[str, str], str]:
    """By plan and card: what became of its kernels there."""
    ran: dict[str, set[str]] = defaultdict(set)
    for path in sorted(tables.TUNED.glob("*.json")):
        table = tables.read_table(path)
        for entry in table["proven"]:
            ran[entry["plan"]].add(table["gpu"].removeprefix("NVIDIA ").split()[0])

    def cell(plan: str, card: str, kernels: list[Kernel]) -> str:
        broken = sum(bool(faults(kernel)) for kernel in kernels)
        spilling = sum(kernel.spills > 0 for kernel in kernels)
        text = f"{len(kernels)} compiled"
        text += f", {spilling} spill" * bool(spilling) + f", {broken} faulty" * bool(broken)
        if plan in OTHERS or (card in INTERPRETED_CARDS and plan != "gluon"):
            text += ", interpreted"
        on = ", ".join(sorted(ran[plan])) if card == "90" else ""  # the tables' are Hoppers
        return f"{text}, run on {on}" if on else text

    return {key: cell(*key, kernels) for key, kernels in found.items() if kernels}


def matrix(cells: Mapping[tuple[str, str], str]) -> str:
    """Plans by cards, in Markdown."""
    plans = [name for name in (*PLANS, *OTHERS) if any((name, card) in cells for card in CARDS)]
    lines = [f"| plan | {' | '.join(f'{NAMES[card]} ({_sm(card)})' for card in CARDS)} |"]
    lines.append("|---" * (len(CARDS) + 1) + "|")
    for name in plans:
        lines.append(f"| `{name}` | {' | '.join(cells.get((name, c), '–') for c in CARDS)} |")
    return "\n".join(lines)


def _sm(card: str) -> str:
    return card if card.startswith("gfx") else f"sm_{card}"


BEGIN, END = "<!-- made by codegen, from here -->", "<!-- to here -->"


def written(page: str) -> dict[tuple[str, str], str]:
    """The cells that stand between the marks in a page."""
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", page.partition(BEGIN)[2].partition(END)[0], re.M)
    named = [(name, zip(CARDS, line.split(" | "), strict=True)) for name, line in rows]
    return {(name, card): text for name, row in named for card, text in row if text != "–"}


def with_matrix(page: str, new: Mapping[tuple[str, str], str], whole: bool) -> str:
    """The page with these cells between the marks; unless they are the whole, beside the others
    that stand there. ValueError where another Triton made those."""
    version = f"Triton {triton.__version__}."
    head, _, rest = page.partition(BEGIN)
    if not whole:
        if version not in rest:
            raise ValueError(f"--page: its other cells are not of {version[:-1]}: make them all")
        new = {**written(page), **new}
    return f"{head}{BEGIN}\n{version}\n\n{matrix(new)}\n{END}{rest.partition(END)[2]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=codegen.__doc__.splitlines()[0])
    parser.add_argument("--arch", choices=CARDS, action="append")
    parser.add_argument("--short", action="store_true", help="the cases of the test suite only")
    parser.add_argument("--analytic", action="store_true", help="not the tuner's tiles")
    parser.add_argument("--only", default="", help="a regular expression that the case must match")
    parser.add_argument("--others", action="store_true", help="only kernels that are no plan's")
    parser.add_argument("--page", type=Path, help="a page in which to write the matrix of plans")
    options = parser.parse_args()
    if options.page and (options.only or options.short):
        parser.error("--page: its cells count all kernels of a plan, so no --only and no --short")
    if INTERPRETED:
        sys.exit("TRITON_INTERPRET is set: nothing would be compiled")
    print(HEADER)
    found: dict[tuple[str, str], list[Kernel]] = defaultdict(list)
    for card in options.arch or CARDS:
        seen: set[str] = set()
        chosen: Iterable[Case] = SHORT
        if not options.short:
            chosen = analytic() if options.analytic else cases(CARDS[card])
        for case in chosen:
            if options.others and case.plan not in OTHERS:
                continue
            if not re.search(options.only, str(case)) or not is_served(case, CARDS[card]):
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
        whole = not (options.others or options.arch)
        page = with_matrix(options.page.read_text(), cells(found), whole)
        options.page.write_text(page)
    kernels = [kernel for of_one in found.values() for kernel in of_one]
    broken = sum(bool(faults(kernel)) for kernel in kernels)
    print(f"{len(kernels)} kernels, {broken} break a rule")
    return 1 if broken or not kernels else 0


if __name__ == "__main__":
    sys.exit(main())
