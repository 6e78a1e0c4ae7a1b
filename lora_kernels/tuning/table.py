"""A tuned table on disk: what `tables.read_table` reads, and what tuning must remember."""

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from lora_kernels.backends.cuda import sources, tables
from lora_kernels.backends.cuda.plan import Call
from lora_kernels.files import replace_atomically
from lora_kernels.testing import DTYPES, Case

# By the base, a dense weight, or an output that is given (lora_add): the ops that are tuned. Of a
# quantised weight, a base by its kind, it is one: its backward is that of what is given.
BASES = {"dense": ("forward", "backward"), "given": ("add", "add_backward")}
_OF_QUANTISED = ("coded",)
KEY = ("op", "dtype", "M", "N", "K", "r", "dropout")  # and the weight, where that is quantised
ELSEWHERE = (
    "set XDG_CACHE_HOME to a folder that can be written, for this and later processes, or tune with"
    " --out FILE (`out`) and set LORA_KERNELS_TUNED to that file"
)
_OF_ALL = ("gpu", "versions", "ptxas", "kernels")  # what all that a table says is of
_STALE = 600.0  # seconds after which a lock is nobody's


class Candidate(NamedTuple):
    plan: str
    tiles: dict[str, dict[str, int]]

    def __str__(self) -> str:
        return self.plan + (f" {json.dumps(self.tiles)}" if self.tiles else "")


def ops_of(base: str) -> tuple[str, ...]:
    return BASES.get(base, _OF_QUANTISED)


def weight_of(base: str) -> str:
    """The kind of weight of a base's calls."""
    return "dense" if base in BASES else base


def key_of(case: Case, op: str, weight: str = "dense") -> dict[str, Any]:
    """What a bucket is found by."""
    dtype = str(DTYPES[case.dtype]).removeprefix("torch.")
    values = (op, dtype, case.M, case.N, case.K, case.r, case.dropout > 0)
    return dict(zip(KEY, values, strict=True)) | tables.named(weight)


def entry_of(call: Call) -> dict[str, Any]:
    """A call as a table has it."""
    return {name: getattr(call, name) for name in KEY} | tables.named(call.weight)


def _key(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    return *(entry[name] for name in KEY), tables.weight_of(entry)


def missing(
    buckets: Sequence[Mapping[str, Any]],
    base: str,
    case: Case,
    variants: bool = True,
    backward: bool = True,
) -> list[str]:
    """The ops of a case that no bucket is of; with `variants` one that was made without is none."""
    found = [b for b in buckets if b.get("variants", True) or not variants]
    ops = [op for op in ops_of(base) if backward or not op.endswith("backward")]
    keys = {op: key_of(case, op, weight_of(base)).items() for op in ops}
    return [op for op, key in keys.items() if not any(key <= b.items() for b in found)]


class Table:
    """One that is being made. A candidate is on disk before it runs (`trying`): who finds the mark
    knows in what a process died."""

    def __init__(self, path: Path, gpu: str, info: Mapping[str, Any]) -> None:
        self.path = path
        self.content: dict[str, Any] = {
            "gpu": gpu,
            "date": str(date.today()),
            "versions": info["versions"],
            "commit": info["commit"],
            "ptxas": sources.ptxas(),
            "kernels": sources.of_plans(),
            "proven": [],
            "failed": [],
            "buckets": [],
        }
        if path.exists():
            found = tables.read_table(path)
            for name in _OF_ALL:
                if found.get(name, self.content[name]) != self.content[name]:
                    raise ValueError(
                        f"{path}: {name}: the table is of {found.get(name)}, this is"
                        f" {self.content[name]}; move it away to begin a new one"
                    )
            self.content = found
        died = self.content.pop("trying", None)
        if died is not None:
            candidate = Candidate(died["plan"], died["tiles"])
            self.failed(candidate, died["call"], died.get("why", "the process died"))

    def write(self) -> None:
        replace_text(self.path, to_json(self.content))

    def interrupted(self) -> None:
        """Of a process that is told to end: the candidate is not to blame."""
        if self.content.pop("trying", None) is not None:
            self.write()

    def trying(self, candidate: Candidate, call: Mapping[str, Any], why: str = "") -> None:
        """On disk before the first run, so that a process that dies in it is remembered; `why`
        where it is known that it will."""
        said = {"why": why} if why else {}
        self.content["trying"] = {**candidate._asdict(), "call": call, **said}
        self.write()

    def worked(self, candidate: Candidate, call: Mapping[str, Any]) -> None:
        self.content.pop("trying", None)
        proof = _proof(candidate.plan, call)
        if not self.proves(candidate, call) and proof not in _struck(self.content["failed"]):
            self.content["proven"].append(proof)

    def proves(self, candidate: Candidate, call: Mapping[str, Any]) -> bool:
        return _proof(candidate.plan, call) in self.content["proven"]

    def failed(
        self, candidate: Candidate, call: Mapping[str, Any], why: str, wrong: bool = True
    ) -> None:
        """`wrong`: not just too large for the device, so the plan is not to be trusted."""
        self.content.pop("trying", None)
        entry = {**candidate._asdict(), "call": call, "why": why, "wrong": wrong}
        self.content["failed"].append(entry)
        # Analytic tiles are what an unknown shape gets: they must fit everywhere.
        if (wrong or not candidate.tiles) and self.proves(candidate, call):
            self.content["proven"].remove(_proof(candidate.plan, call))
        self.write()

    def refuses(self, candidate: Candidate, call: Mapping[str, Any]) -> bool:
        """Whether it is known to fail: its plan was wrong, or it did not fit this call."""
        return any(
            _proof(entry["plan"], entry["call"]) == _proof(candidate.plan, call)
            and (entry["wrong"] or (entry["tiles"] == candidate.tiles and entry["call"] == call))
            for entry in self.content["failed"]
        )

    def add(self, bucket: Mapping[str, Any]) -> None:
        """In place of one that is of the same."""
        others = [b for b in self.content["buckets"] if _key(b) != _key(bucket)]
        self.content["buckets"] = [*others, bucket]
        self.write()


def _proof(plan: str, call: Mapping[str, Any]) -> dict[str, Any]:
    return tables.proof(plan, call["dtype"], call["dropout"], tables.weight_of(call))


def _struck(failed: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What is not to be proven."""
    strikes = (entry for entry in failed if entry["wrong"] or not entry["tiles"])
    return [_proof(entry["plan"], entry["call"]) for entry in strikes]


def merge(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Both tables' buckets, the other's where both have one. A plan that was wrong in either is not
    proven for that dtype, dropout and weight. ValueError where they are of two GPUs, or two
    versions of anything."""
    for name in _OF_ALL:
        if one.get(name) != other.get(name):
            raise ValueError(f"{name}: cannot merge {one.get(name)} with {other.get(name)}")
    buckets = {_key(bucket): bucket for bucket in (*one["buckets"], *other["buckets"])}
    failed = [*one.get("failed", ()), *other.get("failed", ())]
    struck = _struck(failed)
    found = (*one["proven"], *(entry for entry in other["proven"] if entry not in one["proven"]))
    proven = [entry for entry in found if entry not in struck]
    merged = {"proven": proven, "failed": failed, "buckets": list(buckets.values())}
    return {**one, **other, **merged}


def replace_text(path: Path, text: str) -> None:
    """Writes the file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_atomically(path, lambda draft: Path(draft).write_text(text))


def to_json(document: Mapping[str, Any]) -> str:
    """JSON with one row or bucket a line, so that changes read well and files stay short."""
    lines = []
    for key, value in document.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            body = ",\n".join(f"  {json.dumps(entry, ensure_ascii=False)}" for entry in value)
            lines.append(f" {json.dumps(key)}: [\n{body}\n ]")
        else:
            lines.append(f" {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keeps other processes from making the same table. RuntimeError names the one that does, or
    the folder where nothing can be written; a lock that is ten minutes old is nobody's."""
    lock = path.with_name(path.name + ".lock")
    try:
        descriptor = _open_lock(lock)
    except FileExistsError:
        holder = lock.read_text().strip() or "another one"
        raise RuntimeError(
            f"{path}: process {holder} makes this table; wait for it, or remove {lock.name}"
        ) from None
    except OSError as error:
        raise RuntimeError(
            f"tune: the table cannot be written to {path.parent} ({error.strerror}); {ELSEWHERE}"
        ) from error
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(str(os.getpid()))
        yield
    finally:
        lock.unlink(missing_ok=True)


def _open_lock(lock: Path) -> int:
    lock.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        if time.time() - lock.stat().st_mtime > _STALE:
            lock.unlink()
    return os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY)


def touch_lock(path: Path) -> None:
    """Says that the holder lives."""
    with contextlib.suppress(FileNotFoundError):
        os.utime(path.with_name(path.name + ".lock"))
