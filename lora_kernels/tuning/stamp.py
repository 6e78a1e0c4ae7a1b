"""Says of a tuned table that today's kernels are those that were proven: the same machine code.

    python -m lora_kernels.tuning.stamp --before COMMIT TABLE.json ...

"kernels" of a table holds a digest of each plan's sources (`sources.py`). One that changes takes
its plan out of use until it is tuned again, or until this command has compiled the plan's calls of
that table, with the table's Triton and without a GPU, as the repository was at a commit where the
digests held, and as it is: where both are the same, it writes the new digests. A plan whose code
differs it names and leaves as it is; the exit status is 1 then.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import triton

from lora_kernels.backends import codegen, cuda
from lora_kernels.backends.cuda import sources, tables
from lora_kernels.backends.cuda.choice import use_plan
from lora_kernels.backends.cuda.plan import Call, Tiles
from lora_kernels.backends.cuda.plans import PLANS
from lora_kernels.backends.device import CARDS, assume
from lora_kernels.backends.triton.launch import INTERPRETED, intercept
from lora_kernels.branch import Branch, Dense, Given, Need
from lora_kernels.testing import SCALING
from lora_kernels.tuning.table import replace_text, to_json

CARD = "90"  # of the package's tables: both are Hoppers
_COMPILED = "decode_cuda"  # by nvcc, from csrc, whose text is in "kernels"


def calls(table: Mapping[str, Any], plan: str) -> Iterator[tuple[Call, Tiles]]:
    """What was proven of a plan: its calls among the table's, with the analytic tiles, and with
    those of a bucket that takes it."""
    for bucket in table["buckets"]:
        kind = tables.proof(plan, bucket["dtype"], bucket["dropout"])
        call = Call(**{name: bucket[name] for name in (*tables.KIND, *tables.SIZES)})
        forward = plan == _COMPILED and call.op == "forward"
        if kind not in table["proven"] or forward or PLANS[plan].refusal(call) is not None:
            continue
        yield call, {}
        if bucket["plan"] == plan and "tiles" in bucket:
            yield call, bucket["tiles"]


def code_of(table: Mapping[str, Any], plan: str) -> str:
    """Digest of the PTX of all that a plan launches for `calls`. Takes the process's Triton driver
    for good."""
    found: dict[str, str] = {}

    def build(
        kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], meta: dict[str, Any], run: object
    ) -> None:
        compiled = kernel.warmup(*args, grid=grid, **meta)
        if compiled.hash not in found:
            shared = compiled.metadata.shared
            found[compiled.hash] = f"{shared} {_bare(compiled.asm['ptx'])}"

    triton.runtime.driver.set_active(codegen._OfflineDriver(CARD))
    with assume(CARDS[CARD]), intercept(build):
        for call, tiles in calls(table, plan):
            with use_plan(plan, tiles):
                _run(call)
    return hashlib.sha256("\n".join(sorted(set(found.values()))).encode()).hexdigest()[:12]


def _bare(ptx: str) -> str:
    """Without what tells of lines, files and names."""
    lines = (re.sub(r"//.*", "", line).strip() for line in ptx.splitlines())
    kept = [line for line in lines if line and not line.startswith((".loc", ".file"))]
    text = "\n".join(kept).partition(".section")[0]
    return re.sub(r"\b\w+_kernel(?=\b|_param)", "kernel", text)


def _run(call: Call) -> None:
    dtype = getattr(torch, call.dtype)

    def tensor(rows: int, columns: int) -> torch.Tensor:
        return torch.empty(rows, columns, dtype=dtype, device="meta")

    M, N, K, r = call.M, call.N, call.K, call.r
    x, dy, s = tensor(M, K), tensor(M, N), tensor(M, r)
    p = 0.1 if call.dropout else 0.0
    seed = torch.empty(1, dtype=torch.int64, device="meta") if call.dropout else None
    branch = Branch(tensor(r, K), tensor(N, r), SCALING, p, seed)
    if call.op in ("forward", "add"):
        base = Dense(tensor(N, K)) if call.op == "forward" else Given(dy)
        cuda.forward(base, x, branch, True)
        return
    of_dense = call.op == "backward"
    base = Dense(tensor(N, K)) if of_dense else Given()
    cuda.backward(base, dy, x, s, branch, Need(True, False, True, True))


def _codes(table: Mapping[str, Any], plans: Sequence[str]) -> dict[str, str]:
    return {plan: code_of(table, plan) for plan in plans}


def _codes_before(commit: str, path: Path, plans: Sequence[str]) -> dict[str, str]:
    """`_codes` of the repository at a commit, in a process of its own."""
    root = Path(__file__).parents[2]
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder, "tree.tar")
        command = ["git", "archive", "--output", str(archive), commit, "lora_kernels"]
        subprocess.run(command, cwd=root, check=True)
        with tarfile.open(archive) as tree:
            tree.extractall(folder, filter="data")
        there = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, "-m", "lora_kernels.tuning.stamp", str(path.resolve()),
                   "--codes", *plans]  # fmt: skip
        environment = os.environ | {"PYTHONPATH": there}
        done = subprocess.run(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
    found: dict[str, str] = json.loads(done.stdout)
    return found


def restamped(
    table: Mapping[str, Any], before: Mapping[str, str], now: Mapping[str, str]
) -> tuple[dict[str, Any], list[str]]:
    """(the table with new digests of the plans that have the same code before and now; the plans
    that have not). A digest of CUDA sources, which Triton does not compile, stays."""
    same = [plan for plan in now if before.get(plan) == now[plan]]
    kernels = table["kernels"] | {plan: sources.of_plan(plan) for plan in same}
    found = {**table, "kernels": kernels}
    kernels.pop("files", None)
    different = list(tables.changed_plans(found))
    if not different:
        kernels["files"] = sources.files()
    return found, different


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", type=Path, nargs="+", metavar="TABLE.json")
    parser.add_argument("--before", metavar="COMMIT", help="where the digests held")
    parser.add_argument("--codes", nargs="+", metavar="PLAN", help="print digests of the code")
    args = parser.parse_args(arguments)
    if (args.before is None) == (args.codes is None):
        parser.error("expected --before or --codes")
    if INTERPRETED:
        parser.error("TRITON_INTERPRET is set: nothing would be compiled")
    # Where a kernel stands in a file is no part of its code.
    triton.knobs.compilation.disable_line_info = True
    status = 0
    for path in args.tables:
        table = tables.read_table(path)
        proven = table["versions"]["triton"]
        if proven != triton.__version__:
            parser.error(f"{path}: the table is of Triton {proven}, this is {triton.__version__}")
        if args.codes:
            print(json.dumps(_codes(table, args.codes)))
            continue
        changed = tables.changed_plans(table)
        now = _codes(table, changed)
        found, different = restamped(table, _codes_before(args.before, path, changed), now)
        replace_text(path, to_json(found))
        print(f"{path}: {len(changed)} plans changed; other code: {', '.join(different) or 'none'}")
        status |= bool(different)
    return status


if __name__ == "__main__":
    sys.exit(main())
