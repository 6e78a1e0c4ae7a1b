"""What ran right and fast on which GPU: the tables that make a plan a default.

They are `tuned/<gpu>.json`, the GPU's name in lower case with runs of other characters as "_":

    {"gpu": "NVIDIA H200",
     "proven": [{"plan": "shrink_gemm", "dtype": "bfloat16", "dropout": false}, ...],
     "buckets": [{"op": "forward", "dtype": "bfloat16", "M": 8192, "N": 4096, "K": 4096, "r": 16,
                  "dropout": false, "plan": "shrink_gemm",
                  "tiles": {"gemm": {"bm": 128, "bn": 256, ...}, ...}}, ...]}

op is forward or backward, or add or add_backward of a given base output. A call takes the plan of
the nearest bucket of its op, dtype and dropout: the smallest sum of |log2| ratios of M, N, K and r.
Plans that are not proven for that dtype and dropout are passed over. "tiles" replaces fields of the
analytic tiles, by launch. They serve aligned calls of at most the bucket's rank; others take the
plan and analytic tiles.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lora_kernels.backends.cuda.plan import DTYPES, OPS, Call, Tiles
from lora_kernels.backends.cuda.plans import PLANS, known

TUNED = Path(__file__).parent / "tuned"
KIND = ("op", "dtype", "dropout")  # what of a bucket must be the call's own
SIZES = ("M", "N", "K", "r")  # and what may be near it

Entry = Mapping[str, Any]  # of JSON


class Choice(NamedTuple):
    """A plan, and by launch the fields that replace those of the analytic tile."""

    plan: str
    tiles: Tiles


def file_name(gpu: str) -> str:
    """Of a GPU's table."""
    return re.sub(r"[^a-z0-9]+", "_", gpu.lower()).strip("_") + ".json"


def proof(plan: str, dtype: str, dropout: bool) -> dict[str, Any]:
    """An entry of "proven"."""
    return {"plan": plan, "dtype": dtype, "dropout": dropout}


def read_table(path: Path) -> dict[str, Any]:
    """A tuned table; ValueError says what is wrong with one that cannot be used."""
    table: dict[str, Any] = json.loads(path.read_text())
    proven = table.get("proven")
    if not isinstance(proven, list) or not all(isinstance(entry, dict) for entry in proven):
        raise ValueError(
            f"{path}: proven: got {proven!r}, expected a list of entries as"
            f" {json.dumps(proof('aten', 'bfloat16', False))}; tune again, with a new file"
        )
    for entry in proven:
        _has(entry, proof("", "", False), path, "an entry of proven")
        known(entry["plan"], f"{path}: proven")
        _is_of_a_kind(entry, path, "proven")
    for bucket in table.get("buckets", ()):
        _has(bucket, (*KIND, *SIZES, "plan"), path, "a bucket")
        _is_of_a_kind(bucket, path, "a bucket")
        if bucket["op"] not in OPS:
            raise ValueError(f"{path}: op: got {bucket['op']!r}, legal are {', '.join(OPS)}")
        for name in SIZES:
            if type(bucket[name]) is not int or bucket[name] < 1:
                raise ValueError(f"{path}: {name}: got {bucket[name]!r}, expected at least 1")
        plan = known(bucket["plan"], f"{path}: plan")
        plan.check(bucket.get("tiles", {}), f"{path}: tiles", (bucket["op"],))
    return table


def _has(entry: Entry, names: tuple[str, ...] | Entry, path: Path, what: str) -> None:
    missing = set(names) - entry.keys()
    if missing:
        raise ValueError(f"{path}: {what} lacks {', '.join(sorted(missing))}: {dict(entry)}")


def _is_of_a_kind(entry: Entry, path: Path, what: str) -> None:
    if entry["dtype"] not in DTYPES:
        legal = ", ".join(DTYPES)
        raise ValueError(f"{path}: {what}: dtype: got {entry['dtype']!r}, legal are {legal}")
    if type(entry["dropout"]) is not bool:
        raise ValueError(
            f"{path}: {what}: dropout: got {entry['dropout']!r}, expected true or false"
        )


def index_of(device: torch.device) -> int:
    """Of a CUDA device; without one it is the current."""
    return torch.cuda.current_device() if device.index is None else device.index


@cache
def tuned(index: int) -> dict[str, Any] | None:
    """The table of a CUDA device, None if there is none that holds here."""
    path = _path(index)
    return read_table(path) if why_none(index) is None else None


def _path(index: int) -> Path:
    return TUNED / file_name(torch.cuda.get_device_name(index))


@cache
def why_none(index: int) -> str | None:
    """Why no table holds for a CUDA device; None where one does. What ran right and fast is what
    one Triton compiled: another compiles other machine code."""
    path = _path(index)
    if not path.exists():
        return "no tuned table for this GPU"
    proven, here = json.loads(path.read_text()).get("versions", {}).get("triton"), _triton()
    if proven != here:
        return f"the tuned table of this GPU is of Triton {proven}, this is {here or 'without'}"
    return None


def _triton() -> str | None:
    try:
        return version("triton")
    except PackageNotFoundError:
        return None


def nearest(table: Entry, call: Call) -> Choice | None:
    """What the nearest bucket says whose plan is proven; None where no bucket is of this kind."""

    def distance(bucket: Entry) -> float:
        return sum(abs(math.log2(getattr(call, name) / bucket[name])) for name in SIZES)

    def fits(bucket: Entry) -> bool:
        plan = bucket["plan"]
        kind = all(bucket[name] == getattr(call, name) for name in KIND)
        proven = proof(plan, call.dtype, call.dropout) in table["proven"]
        return kind and proven and PLANS[plan].refusal(call) is None

    bucket = min(filter(fits, table.get("buckets", ())), key=distance, default=None)
    if bucket is None:
        return None
    # A larger rank needs more shared memory than the tiles were found to fit.
    fitting = call.aligned and call.r <= max(16, bucket["r"])
    return Choice(bucket["plan"], bucket.get("tiles", {}) if fitting else {})
