"""Says of a tuned table that today's kernels are those that were proven: the same machine code.

    python -m lora_kernels.tuning.stamp --before COMMIT TABLE.json ...

"kernels" of a table holds a digest of each plan's sources (`sources.py`). One that changes takes
its plan out of use until it is tuned again, or until this command has compiled the plan's calls of
that table, with the table's Triton and without a GPU, as the repository was at a commit of which
the table is, and as it is: where all that is launched is the same (`launched.py`), it writes the
new digests. A plan of which something differs it names and leaves as it is; the exit status is 1
then. So it leaves decode_cuda, which nvcc compiles.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import triton

from lora_kernels.backends.cuda import sources, tables
from lora_kernels.backends.cuda.plan import Call, Tiles
from lora_kernels.backends.cuda.plans import PLANS
from lora_kernels.backends.triton.launch import INTERPRETED
from lora_kernels.tuning import launched
from lora_kernels.tuning.table import replace_text, to_json

_ROOT = Path(__file__).parents[2]
_NOT_TRITON_S = "decode_cuda"
Asked = tuple[str, Call, Tiles]  # of a plan


def calls(table: Mapping[str, Any], plan: str) -> Iterator[tuple[Call, Tiles]]:
    """What was proven of a plan: its calls among the table's, with the analytic tiles, and with
    those of a bucket that takes it. None are of quantised weights: such a plan is tuned again."""
    for bucket in table["buckets"]:
        if tables.weight_of(bucket) != "dense":
            continue
        kind = tables.proof(plan, bucket["dtype"], bucket["dropout"])
        call = Call(**{name: bucket[name] for name in (*tables.KIND, *tables.SIZES)})
        unproven = kind not in table["proven"] or plan == _NOT_TRITON_S
        if unproven or PLANS[plan].refusal(call) is not None:
            continue
        yield call, {}
        if bucket["plan"] == plan and "tiles" in bucket:
            yield call, bucket["tiles"]


def digests(asked: Sequence[Asked], tree: Path) -> dict[str, str]:
    """Of what the plans launch for these calls, by plan, as the repository is in a folder."""
    program = Path(launched.__file__).read_text()
    text = json.dumps([(plan, call._asdict(), tiles) for plan, call, tiles in asked])
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tree, input=text, stdout=subprocess.PIPE, text=True,
        check=True,
    )  # fmt: skip
    found: dict[str, str] = json.loads(done.stdout)
    return found


def _digests_at(commit: str, asked: Sequence[Asked]) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder, "tree.tar")
        command = ["git", "archive", "--output", str(archive), commit, "lora_kernels"]
        subprocess.run(command, cwd=_ROOT, check=True)
        with tarfile.open(archive) as tree:
            tree.extractall(folder, filter="data")
        return digests(asked, Path(folder))


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
    parser.add_argument(
        "--before", metavar="COMMIT", required=True,
        help="where the digests held, or of which the table is (its \"commit\")",
    )  # fmt: skip
    args = parser.parse_args(arguments)
    if INTERPRETED:
        parser.error("TRITON_INTERPRET is set: nothing would be compiled")
    status = 0
    for path in args.tables:
        table = tables.read_table(path)
        proven = table["versions"]["triton"]
        if proven != triton.__version__:
            parser.error(f"{path}: the table is of Triton {proven}, this is {triton.__version__}")
        changed = tables.changed_plans(table)
        asked = [(plan, call, tiles) for plan in changed for call, tiles in calls(table, plan)]
        before, now = _digests_at(args.before, asked), digests(asked, _ROOT)
        found, different = restamped(table, before, now)
        replace_text(path, to_json(found))
        print(f"{path}: {len(changed)} plans changed; other code: {', '.join(different) or 'none'}")
        status |= bool(different)
    return status


if __name__ == "__main__":
    sys.exit(main())
