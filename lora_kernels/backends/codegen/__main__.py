"""Prints what the code generation check finds; exits with 1 if a kernel breaks a rule."""

from __future__ import annotations

import argparse
import re
import sys

from lora_kernels.backends import codegen
from lora_kernels.backends.codegen import TARGETS, Kernel, compile_case, faults
from lora_kernels.backends.codegen.cases import SHORT, cases
from lora_kernels.backends.triton.launch import INTERPRETED


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


def main() -> int:
    parser = argparse.ArgumentParser(description=codegen.__doc__.splitlines()[0])
    parser.add_argument("--arch", choices=TARGETS, action="append")
    parser.add_argument("--short", action="store_true", help="the cases of the test suite only")
    parser.add_argument("--only", default="", help="a regular expression that the case must match")
    options = parser.parse_args()
    if INTERPRETED:
        sys.exit("TRITON_INTERPRET is set: nothing would be compiled")
    print(HEADER)
    broken = total = 0
    for arch in options.arch or TARGETS:
        seen: set[str] = set()
        chosen = SHORT if options.short else cases(TARGETS[arch])
        for case in (case for case in chosen if re.search(options.only, str(case))):
            for kernel in compile_case(case, arch, seen):
                reasons = faults(kernel)
                print(
                    row(kernel),
                    *(f"  FAULT: {', '.join(reasons)}" for _ in reasons[:1]),
                    flush=True,
                )
                total, broken = total + 1, broken + bool(reasons)
    print(f"{total} kernels, {broken} break a rule")
    return 1 if broken or not total else 0


if __name__ == "__main__":
    sys.exit(main())
