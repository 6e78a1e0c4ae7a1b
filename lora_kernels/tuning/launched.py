"""What plans make of calls, told without a GPU: a digest of the machine code that they launch, of
grids and arguments, and of what they ask of ATen.

A program of its own, that is given to Python as text (-c) in the root of this repository at any
commit, since `stamp` compares two. Standard input is a list of [plan, fields of a call, tiles], as
JSON; the output is an object of digests, by plan.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode

from lora_kernels.backends import codegen, cuda
from lora_kernels.backends.cuda.choice import use_plan
from lora_kernels.backends.device import CARDS, assume
from lora_kernels.backends.triton.launch import intercept
from lora_kernels.branch import Branch, Dense, Given, Need
from lora_kernels.testing import SCALING

_CARD = "90"  # of the package's tables: both are Hoppers
_ALLOCATES = ("aten::empty", "aten::new_empty")  # in what order is no part of the result


class _Record(TorchDispatchMode):
    """A line for everything that runs on the device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lines: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if not func.is_view and not func.name().startswith(_ALLOCATES):
            self.lines.append(f"{func.name()} {_told([args, kwargs])}")
        return func(*args, **(kwargs or {}))

    def launch(
        self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], meta: Any, run: object
    ) -> None:
        compiled = kernel.warmup(*args, grid=grid, **meta)
        ptx, metadata = _bare(compiled.asm["ptx"]), compiled.metadata
        code = hashlib.sha256(ptx.encode()).hexdigest()
        self.lines.append(f"{code} {metadata.shared} {metadata.num_warps} {grid} {_told(args)}")


def _told(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {tuple(value.shape)} {value.stride()}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_told, value))}]"
    return repr(value)


def _bare(ptx: str) -> str:
    """Without comments, lines, files and the kernel's name, which also names its parameters."""
    lines = (re.sub(r"//.*", "", line).strip() for line in ptx.splitlines())
    kept = [line for line in lines if line and not line.startswith((".loc", ".file"))]
    text = "\n".join(kept).partition(".section")[0]
    return re.sub(r"\b\w+_kernel(?=\b|_param)", "kernel", text)


def _run(call: Mapping[str, Any]) -> None:
    dtype = getattr(torch, call["dtype"])

    def tensor(rows: int, columns: int) -> torch.Tensor:
        return torch.empty(rows, columns, dtype=dtype, device="meta")

    M, N, K, r = (call[name] for name in "MNKr")
    x, dy, s = tensor(M, K), tensor(M, N), tensor(M, r)
    p = 0.1 if call["dropout"] else 0.0
    seed = torch.empty(1, dtype=torch.int64, device="meta") if p else None
    branch, weight = Branch(tensor(r, K), tensor(N, r), SCALING, p, seed), Dense(tensor(N, K))
    if call["op"] in ("forward", "add"):
        cuda.forward(weight if call["op"] == "forward" else Given(dy), x, branch, True)
        return
    base = weight if call["op"] == "backward" else Given()
    cuda.backward(base, dy, x, s, branch, Need(True, False, True, True))


def _to_ptx(backend: Any = None, stages: Any = None, *_: object) -> tuple[str, str] | None:
    """What assembles would take as long again, and tells no more. From Triton 3.7 on it is also
    asked, without arguments, what its part of a cache's key is."""
    if stages is None:
        return "ptx", "ptx"
    stages["cubin"] = lambda ptx, metadata: b""
    return None


def digests(calls: list[tuple[str, Mapping[str, Any], Mapping[str, Any]]]) -> dict[str, str]:
    """By plan. Takes the process's Triton driver for good."""
    triton.knobs.compilation.disable_line_info = True  # where a kernel stands is no part of it
    triton.knobs.runtime.add_stages_inspection_hook = _to_ptx
    triton.runtime.driver.set_active(codegen._OfflineDriver(_CARD))
    found: dict[str, Any] = {}
    for plan, call, tiles in calls:
        record = _Record()
        with assume(CARDS[_CARD]), intercept(record.launch), use_plan(plan, tiles), record:
            try:
                _run(call)
            except RuntimeError as error:  # a tree that cannot serve it is another one
                record.lines.append(str(error))
        found.setdefault(plan, hashlib.sha256()).update("\n".join(record.lines).encode())
    return {plan: digest.hexdigest()[:12] for plan, digest in found.items()}


if __name__ == "__main__":
    # Not in the user's cache, which would not know of the stage left out.
    with tempfile.TemporaryDirectory() as folder:
        triton.knobs.cache.dir = folder
        print(json.dumps(digests(json.load(sys.stdin))))
