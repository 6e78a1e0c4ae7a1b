"""What ran right and fast on which GPU: the tables that make a plan a default.

The first of these that is there: the file that LORA_KERNELS_TUNED names, or one of the GPU's name
in the folder that it names; what `tune` left in the user's cache folder, for this GPU, these
versions and these kernels; the package's `tuned/<gpu>.json`, the GPU's name in lower case with
runs of other characters as "_":

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

import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lora_kernels import _env
from lora_kernels.backends.cuda.plan import DTYPES, OPS, Call, Tiles
from lora_kernels.backends.cuda.plans import PLANS, known
from lora_kernels.backends.device import target

_logger = logging.getLogger("lora_kernels")
TUNED = Path(__file__).parent / "tuned"
_CURE = " (python -m lora_kernels tune makes one)" if _env.TUNE != "off" else ""
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
    """Of the table to be used, which may not be there."""
    name = file_name(torch.cuda.get_device_name(index))
    if _env.TUNED is not None:
        given = Path(_env.TUNED)
        if not given.exists():
            raise ValueError(f"LORA_KERNELS_TUNED: no file or folder {given}")
        if given.is_file():
            return given
        if (given / name).exists():
            return given / name
    cached = cache_path(index)
    return cached if cached.exists() and _is_sound(cached) else TUNED / name


@cache
def _is_sound(path: Path) -> bool:
    try:
        read_table(path)
    except (ValueError, OSError) as error:
        _logger.warning("%s is passed over, python -m lora_kernels tune --force makes it anew: %s",
                        path, error)  # fmt: skip
        return False
    return True


def cache_path(index: int) -> Path:
    """The user's table of a GPU: $XDG_CACHE_HOME/lora_kernels/v1/<gpu>-<key>.json."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    stem = Path(file_name(torch.cuda.get_device_name(index))).stem
    return base / "lora_kernels" / "v1" / f"{stem}-{key_of(index)}.json"


@cache
def key_of(index: int) -> str:
    """Of what changes the machine code: our kernels and plans, Triton, torch, CUDA, the card."""
    folder = Path(__file__).parent
    sources = [*folder.glob("plans/*.py"), *folder.parent.glob("triton/*.py")]
    card = target(torch.device("cuda", index))
    what = (_triton(), torch.__version__, torch.version.cuda, torch.version.hip, *card)
    digest = hashlib.sha256(repr(what).encode())
    for source in sorted(sources):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:12]


def describe(index: int) -> list[str]:
    """Lines on the table of a CUDA device: file, age, contents, what was struck out and why."""
    absent, path = why_none(index), _path(index)
    if absent is not None:
        return [absent]
    table = read_table(path)
    plans = dict.fromkeys(entry["plan"] for entry in table["proven"])
    lines = [f"{path}, of {table.get('date', 'an unknown day')}"]
    lines.append(f"{len(table['buckets'])} kinds of calls; proven: {', '.join(plans)}")
    for entry in table.get("failed", ()):
        lines.append(f"struck out: {entry['plan']} {entry['tiles']}: {entry['why']}")
    return lines


@cache
def why_none(index: int) -> str | None:
    """Why no table holds for a CUDA device; None where one does. What ran right and fast is what
    one Triton compiled: another compiles other machine code."""
    path = _path(index)
    if not path.exists():
        return "no tuned table for this GPU" + _CURE
    proven, here = json.loads(path.read_text()).get("versions", {}).get("triton"), _triton()
    if proven != here:
        return (
            f"the tuned table of this GPU is of Triton {proven}, this is {here or 'without'}{_CURE}"
        )
    return None


def forget() -> None:
    """Has tables looked for and read anew."""
    for cached in (tuned, why_none, _is_sound):
        cached.cache_clear()


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
