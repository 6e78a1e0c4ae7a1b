"""Which plan of the Triton backend serves a call: forced, proven on this GPU, or the plain one.

    aten         ATen calls throughout: the reference backend
    cublas       torch's GEMM, low-rank kernels beside it
    shrink_gemm  the GEMM in Triton, the low-rank term one more step into its accumulator
    grouped      the same, but backward makes dx and dA in one launch
    decode       forward in one launch for M <= 64, every program recomputes s
    dual         the same kernel with larger tiles, for small N
    flag         forward in one launch, the tiles of column 0 compute s for the others; no dropout
    decode_cuda  forward in one launch, compiled CUDA, for M <= 16 in 16 bits; no dropout

A plan becomes a default only once it has run correctly on a real GPU of that name and the GPU's
table says so. The tables are `triton/tuned/<gpu>.json`, the GPU's name in lower case with runs of
other characters as "_":

    {"gpu": "NVIDIA H200", "proven": ["aten", "cublas", "shrink_gemm"],
     "buckets": [{"op": "forward", "dtype": "bfloat16", "M": 8192, "N": 4096, "K": 4096, "r": 16,
                  "dropout": false, "plan": "shrink_gemm",
                  "tiles": {"gemm": {"bm": 128, "bn": 256, ...}, ...}}, ...]}

op is forward or backward. A call takes the plan of the nearest bucket of its op, dtype and dropout:
the smallest sum of |log2| ratios of M, N, K and r. Plans that are not proven are passed over.
"tiles" replaces fields of the analytic tiles, by launch (`LAUNCHES`; fields in `triton/tiles.py`).
They serve aligned calls of at most the bucket's rank; others take the plan and analytic tiles.

A tuner finds what to put there by `triton.tiles.candidates` and times each `with using(...)`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

from lora_kernels import _env
from lora_kernels.backends.native import decode

TUNED = Path(__file__).parent / "triton" / "tuned"
DECODE_ROWS = 64
LAUNCHES = {
    "forward": ("shrink", "gemm", "expand", "dual", "flag", "decode_cuda"),
    "backward": ("ds_db", "ds", "db", "da", "dx", "expand_dx", "dx_da"),
}

Tiles = Mapping[str, Mapping[str, int]]


class Call(NamedTuple):
    """What a plan depends on."""

    op: str
    dtype: str
    M: int
    N: int
    K: int
    r: int
    dropout: bool
    aligned: bool = True  # rows and bases of x, the weight and dy allow loads in wide words
    readable: bool = True  # x, the weight and lora_a have the rows that decode_cuda reads


class Choice(NamedTuple):
    """A plan, and by launch the fields that replace those of the analytic tile."""

    plan: str
    tiles: Tiles


_used: Choice | None = None


@contextmanager
def using(plan: str, tiles: Tiles | None = None) -> Iterator[None]:
    """Serve all calls inside by `plan` with the fields `tiles` of its launches, as
    `triton.tiles.candidates` lists them. A call that the plan cannot serve raises RuntimeError.

    Stronger than LORA_KERNELS_PLAN and than any table. Holds for the whole process, because
    backward runs in threads of its own; not for use from several threads at a time.
    """
    global _used
    if plan not in _env.PLANS:
        raise ValueError(f"plan: got {plan!r}, legal values are {', '.join(_env.PLANS)}")
    before, _used = _used, Choice(plan, _checked(tiles or {}, "tiles"))
    try:
        yield
    finally:
        _used = before


def forced() -> tuple[str, Choice] | None:
    """(how it is written, the choice) where a plan is forced."""
    if _used is not None:
        return f"using({_used.plan!r})", _used
    return None if _env.PLAN is None else (f"LORA_KERNELS_PLAN={_env.PLAN}", Choice(_env.PLAN, {}))


def _checked(tiles: Tiles, where: str) -> Tiles:
    legal = [name for names in LAUNCHES.values() for name in names]
    for name, fields in tiles.items():
        if name not in legal:
            raise ValueError(f"{where}: got {name!r}, legal names are {', '.join(legal)}")
        if not all(type(value) is int and value > 0 for value in fields.values()):
            raise ValueError(f"{where}: {name}: expected positive integers, got {dict(fields)}")
    return tiles


def file_name(gpu: str) -> str:
    """Of a GPU's table."""
    return re.sub(r"[^a-z0-9]+", "_", gpu.lower()).strip("_") + ".json"


def read_table(path: Path) -> dict:
    """A tuned table; ValueError says what is wrong with one that cannot be used."""
    table = json.loads(path.read_text())
    proven = table.get("proven")
    if not isinstance(proven, list) or not set(proven) <= set(_env.PLANS):
        legal = ", ".join(_env.PLANS)
        raise ValueError(f"{path}: proven: got {proven!r}, expected a list of {legal}")
    for bucket in table.get("buckets", ()):
        missing = {*Call._fields, "plan"} - {"aligned", "readable", *bucket}
        if missing:
            raise ValueError(f"{path}: a bucket lacks {', '.join(sorted(missing))}: {bucket}")
        _checked(bucket.get("tiles", {}), f"{path}: tiles")
    return table


@cache
def has_tables() -> bool:
    return any(TUNED.glob("*.json"))


@cache
def tuned(index: int) -> dict | None:
    """The table of a CUDA device, None if there is none."""
    path = TUNED / file_name(torch.cuda.get_device_name(index))
    return read_table(path) if path.exists() else None


def nearest(table: dict, call: Call) -> Choice | None:
    """What the nearest bucket says whose plan is proven; None where no bucket is of this kind."""

    def distance(bucket: dict) -> float:
        return sum(abs(math.log2(getattr(call, n) / bucket[n])) for n in ("M", "N", "K", "r"))

    def fits(bucket: dict) -> bool:
        kind = all(bucket[n] == getattr(call, n) for n in ("op", "dtype", "dropout"))
        return kind and bucket["plan"] in table["proven"] and refusal(bucket["plan"], call) is None

    bucket = min(filter(fits, table.get("buckets", ())), key=distance, default=None)
    if bucket is None:
        return None
    # A larger rank needs more shared memory than the tiles were found to fit.
    fitting = call.aligned and call.r <= max(16, bucket["r"])
    return Choice(bucket["plan"], bucket.get("tiles", {}) if fitting else {})


def refusal(plan: str, call: Call) -> str | None:
    """Why a plan cannot serve a call, None if it can. Every plan has a backward, which serves
    every call."""
    if call.op == "backward":
        return None
    if plan == "decode" and call.M > DECODE_ROWS:
        return f"the plan serves M <= {DECODE_ROWS}, got M = {call.M}"
    if plan in ("flag", "decode_cuda") and call.dropout:
        return "the plan serves no dropout"
    if plan == "decode_cuda":
        return _decode_cuda_refusal(call)
    # One block holds s; a masked x on its way to two products would stall the one by the weight.
    most = 32 if call.dropout or call.dtype == "float32" else 128
    if plan in ("decode", "dual", "flag") and call.r > most:
        kind = call.dtype + " with dropout" * call.dropout
        return f"the plan serves r <= {most} in {kind}, got r = {call.r}"
    return None


def _decode_cuda_refusal(call: Call) -> str | None:
    if call.M > decode.MAX_ROWS:
        return f"the plan serves M <= {decode.MAX_ROWS}, got M = {call.M}"
    if getattr(torch, call.dtype) not in decode.DTYPES:
        return f"the plan serves float16 and bfloat16, got {call.dtype}"
    if call.K % 8 or not call.readable:
        return (
            "the plan serves x, weight and lora_a with contiguous rows of a multiple of 8 elements"
            f" that start at multiples of 16 bytes, got others (K = {call.K})"
        )
    return decode.why_absent()


@lru_cache(maxsize=4096)
def _choose(index: int | None, call: Call, otherwise: str) -> Choice:
    table = None if index is None else tuned(index)
    return (table and nearest(table, call)) or Choice(otherwise, {})


def choose(call: Call, device: torch.device) -> Choice:
    """The plan and the tiles of a call. Raises RuntimeError if a forced plan cannot serve it."""
    demand = forced()
    if demand is not None:
        name, choice = demand
        reason = refusal(choice.plan, call)
        if reason is not None:
            raise RuntimeError(f"{name}: {reason}; force another plan or none")
        return choice
    index = None
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
    # What no table has proven is no default; a forced backend is to run its own kernels.
    return _choose(index, call, "cublas" if _env.BACKEND == "triton" else "aten")
