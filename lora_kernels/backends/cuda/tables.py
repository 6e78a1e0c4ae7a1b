"""What ran right and fast on which GPU: the tables that make a plan a default.

The first of these that is there: the file that LORA_KERNELS_TUNED names, or one of the GPU's name
in the folder that it names; what `tune` left in the user's cache folder, for this GPU, these
versions and these kernels; the package's `tuned/<gpu>.json`, the GPU's name in lower case with
runs of other characters as "_":

    {"gpu": "NVIDIA H200",
     "proven": [{"plan": "shrink_gemm", "dtype": "bfloat16", "dropout": false}, ...],
     "buckets": [{"op": "forward", "dtype": "bfloat16", "M": 8192, "N": 4096, "K": 4096, "r": 16,
                  "dropout": false, "plan": "shrink_gemm",
                  "tiles": {"gemm": {"bm": 128, "bn": 256, ...}, ...}},
                 {"op": "coded", "weight": "nf4", ..., "plan": "decode_coded"}, ...]}

op is forward or backward, add or add_backward of a given base output, or coded, the forward of a
quantised weight. What is of such a weight says its kind, "weight", in "proven" too; "aten" is then
to decode it by strips that ATen multiplies.

A call takes the plan of the nearest bucket of its op, dtype, dropout and weight: the smallest sum
of |log2| ratios of M, N, K and r. Plans that are not proven for that dtype, dropout and weight are
passed over. "tiles" replaces fields of the analytic tiles, by launch. They serve aligned calls of
at most the bucket's rank; others take the plan and analytic tiles.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Mapping
from datetime import date
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lora_kernels import _env
from lora_kernels.backends.cuda import sources
from lora_kernels.backends.cuda.plan import DTYPES, OPS, WEIGHTS, Call, Tiles
from lora_kernels.backends.cuda.plans import PLANS, known
from lora_kernels.backends.device import target

_logger = logging.getLogger("lora_kernels")
TUNED = Path(__file__).parent / "tuned"
KIND = ("op", "dtype", "dropout")  # what of a bucket must be the call's own
SIZES = ("M", "N", "K", "r")  # and what may be near it

Entry = Mapping[str, Any]  # of JSON


def cure() -> str:
    """What ends a line on a table that is not there."""
    return " (python -m lora_kernels tune makes one)" if _env.TUNE != "off" else ""


class Choice(NamedTuple):
    """A plan, and by launch the fields that replace those of the analytic tile."""

    plan: str
    tiles: Tiles


def file_name(gpu: str) -> str:
    """Of a GPU's table."""
    return re.sub(r"[^a-z0-9]+", "_", gpu.lower()).strip("_") + ".json"


def proof(plan: str, dtype: str, dropout: bool, weight: str = "dense") -> dict[str, Any]:
    """An entry of "proven"."""
    return {"plan": plan, "dtype": dtype, "dropout": dropout} | named(weight)


def named(weight: str) -> dict[str, str]:
    """What an entry says of its weight: nothing of a dense one."""
    return {} if weight == "dense" else {"weight": weight}


def weight_of(entry: Entry) -> str:
    """The kind of weight that an entry is of."""
    weight: str = entry.get("weight", "dense")
    return weight


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
    if weight_of(entry) not in WEIGHTS:
        legal = ", ".join(WEIGHTS)
        raise ValueError(f"{path}: {what}: weight: got {entry['weight']!r}, legal are {legal}")


def index_of(device: torch.device) -> int:
    """Of a CUDA device; without one it is the current."""
    return torch.cuda.current_device() if device.index is None else device.index


class Found(NamedTuple):
    """The table of a GPU and where it lies; or why there is none, and where it would."""

    path: Path
    table: dict[str, Any] | None
    absent: str | None = None
    changed: tuple[str, ...] = ()  # plans whose kernels are no longer those that were proven


@cache
def tuned(index: int) -> dict[str, Any] | None:
    """The table of a CUDA device, None if there is none that holds here."""
    return _installed.get(_name(index)) or _found(index).table


@cache
def why_none(index: int) -> str | None:
    """Why no table holds for a CUDA device; None where one does."""
    return None if _name(index) in _installed else _found(index).absent


_installed: dict[str, dict[str, Any]] = {}  # by file name: what `install` was given


def install(index: int, table: dict[str, Any]) -> None:
    """Makes a table that of a device and its like, for this process, whatever lies in the cache
    folder; LORA_KERNELS_TUNED is stronger, and another card's is none."""
    name = _name(index)
    if is_of(index, table) and _given(name) is None:
        _installed[name] = table


def is_of(index: int, table: Entry) -> bool:
    """Whether a table is of a device's kind of GPU."""
    return file_name(table["gpu"]) == _name(index)


def forget() -> None:
    """Has tables looked for and read anew."""
    _installed.clear()
    for cached in (tuned, why_none, _look):
        cached.cache_clear()


def _name(index: int) -> str:
    return file_name(torch.cuda.get_device_name(index))


def _found(index: int) -> Found:
    try:
        cached = cache_path(index)
    except RuntimeError:  # a user without a home
        cached = None
    return _look(_name(index), cached)


@cache
def _look(name: str, cached: Path | None) -> Found:
    """Once a process: what appears on disk meanwhile is for the next, on a second GPU too."""
    path = _given(name)
    if path is not None:
        try:
            return _checked(path)
        except OSError as error:
            raise ValueError(f"LORA_KERNELS_TUNED: {path} cannot be read: {error}") from error
    if cached is not None and _is_there(cached):
        try:
            found = _checked(cached)
            if found.absent is not None:
                raise ValueError(found.absent)
            return found
        except ValueError as error:
            anew = "python -m lora_kernels tune --force makes it anew"
            _logger.warning("%s is passed over, %s: %s", cached, anew, error)
        except OSError as error:
            _logger.warning("%s is passed over, it cannot be read: %s", cached, error)
    path = TUNED / name
    try:
        return _checked(path)
    except OSError:
        return Found(path, None, "no tuned table for this GPU" + cure())


def _given(name: str) -> Path | None:
    """What LORA_KERNELS_TUNED says of a GPU with this file name."""
    if _env.TUNED is None:
        return None
    given = Path(_env.TUNED)
    if not _is_there(given):
        raise ValueError(f"LORA_KERNELS_TUNED: no file or folder {given}")
    if not given.is_dir():
        return given
    return given / name if _is_there(given / name) else None


def _is_there(path: Path) -> bool:
    """False too where it lies in a folder that this user may not enter."""
    try:
        path.stat()
    except OSError:
        return False
    return True


def _checked(path: Path) -> Found:
    """A table, unless it is of another compiler, less the plans whose kernels have changed: what
    ran right and fast is machine code."""
    content = json.loads(path.read_text())
    for tool, proven, here in (
        ("Triton", content.get("versions", {}).get("triton"), _triton()),
        ("ptxas", content.get("ptxas", sources.PTXAS), sources.ptxas()),
    ):
        if proven != here:
            absent = (
                f"the tuned table of this GPU is of {tool} {proven}, this is {here or 'without'}"
            )
            return Found(path, None, absent + cure())
    table = read_table(path)
    changed = changed_plans(table)
    kept = [entry for entry in table["proven"] if entry["plan"] not in changed]
    return Found(path, table | {"proven": kept}, None, changed)


def changed_plans(table: Entry) -> tuple[str, ...]:
    """The plans whose kernels are not those that a table was made with. One without "kernels"
    does not say."""
    plans = dict.fromkeys(entry["plan"] for entry in table["proven"])
    return sources.changed(plans, table["kernels"]) if "kernels" in table else ()


def cache_path(index: int) -> Path:
    """The user's table of a GPU: $XDG_CACHE_HOME/lora_kernels/v1/<gpu>-<key>.json. RuntimeError
    where there is no such variable and the user has no home."""
    base = os.environ.get("XDG_CACHE_HOME")
    folder = Path(base) if base else Path.home() / ".cache"
    return folder / "lora_kernels" / "v1" / f"{Path(_name(index)).stem}-{key_of(index)}.json"


@cache
def key_of(index: int) -> str:
    """Of what changes the machine code: kernels, plans, Triton, ptxas, torch, CUDA, the card."""
    card = target(torch.device("cuda", index))
    what = (_triton(), sources.ptxas(), torch.__version__, torch.version.cuda, torch.version.hip,
            *card)  # fmt: skip
    digest = hashlib.sha256(repr(what).encode())
    for source in sources.kernel_files():
        digest.update(source.read_bytes())
    return digest.hexdigest()[:12]


def describe(index: int) -> list[str]:
    """Lines on the table of a CUDA device: file, age, contents, what was struck out and why."""
    found = _found(index)
    table = tuned(index)
    if table is None:
        return [found.absent or ""]
    installed = " (as installed by tune, in memory)" * (_name(index) in _installed)
    lines = [f"{found.path}, {_age(table.get('date'))}{installed}"]
    lines.append(f"{len(table['buckets'])} kinds of calls")
    kinds: dict[str, list[str]] = {}
    for entry in table["proven"]:
        kind = f"{entry['dtype']}, {'' if entry['dropout'] else 'no '}dropout"
        kind += ", ".join(["", *named(weight_of(entry)).values()])
        kinds.setdefault(kind, []).append(entry["plan"])
    lines += [f"proven in {kind}: {', '.join(plans)}" for kind, plans in kinds.items()]
    for plan in found.changed:
        lines.append(f"passed over: {plan}: its kernels have changed since{cure()}")
    for entry in table.get("failed", ()):
        lines.append(f"struck out: {entry['plan']} {entry['tiles']}: {entry['why']}")
    return lines


def _age(day: str | None) -> str:
    if day is None:
        return "of an unknown day"
    days = (date.today() - date.fromisoformat(day)).days
    return f"{days} days old ({day})" if days != 1 else f"1 day old ({day})"


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
        proven = proof(plan, call.dtype, call.dropout, call.weight) in table["proven"]
        serves = plan == "aten" or PLANS[plan].refusal(call) is None  # ATen's calls serve all
        return kind and weight_of(bucket) == call.weight and proven and serves

    bucket = min(filter(fits, table.get("buckets", ())), key=distance, default=None)
    if bucket is None:
        return None
    # A larger rank needs more shared memory than the tiles were found to fit.
    fitting = call.aligned and call.r <= max(16, bucket["r"])
    return Choice(bucket["plan"], bucket.get("tiles", {}) if fitting else {})
