"""What a GPU without a tuned table has to do for a call: kernels, and bytes per element of x.

    python -m benchmarks.traffic [--size M K N r] [--plans]

Counted from the calls themselves, on tensors without memory: every ATen op that is no view and
every Triton launch, with the tensors that it reads and writes, each once. What an op reads again,
and what a cache keeps, is not counted. No GPU is needed.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import peers
from benchmarks.peers import FROZEN, OURS, PEFT, UNFUSED
from lora_kernels.backends import blocked, cuda, masks, reference
from lora_kernels.backends.cuda.choice import use_plan
from lora_kernels.backends.device import CARDS, assume
from lora_kernels.backends.triton import launch
from lora_kernels.branch import Branch, Dense, Need
from lora_kernels.testing import DTYPES, SCALING, Aten, Case, Problem


class Traffic(NamedTuple):
    kernels: int
    bytes: int


class Moved(NamedTuple):
    """An ATen op or a kernel of Triton, and what it reads and writes."""

    name: str
    bytes: int


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Tensors without memory take the way of those on a GPU whose mask kernel is right."""

    def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return torch.native_dropout(x, p, training)[0] if training and p else x

    def summed(total: Tensor | None, left: Tensor, right: Tensor, scale: float) -> Tensor:
        product = torch.mm(left, right)  # in fp32 on a GPU; small beside what it reads
        if total is None:
            return product if scale == 1 else product.mul_(scale)
        return total.add_(product, alpha=scale)

    with (
        mock.patch.object(blocked, "mask", masks._KernelMask),
        mock.patch.object(blocked, "_summed", summed),
        mock.patch.object(F, "dropout", dropout),  # on a GPU one kernel
    ):
        yield


def problem(case: Case) -> Problem:
    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=DTYPES[case.dtype], device="meta")

    M, K, N, r = case[:4]
    x = empty(M, K).requires_grad_()
    return Problem(case, x, empty(N, K), empty(r, K), empty(N, r), empty(M, N))


def calls(name: str, case: Case, plan: str | None = None) -> tuple[list[Moved], list[Moved]]:
    """What is launched one after the other, forward and backward; by a plan of ours, as on an
    H100, where one is given."""
    p, found = problem(case), []

    def counted(function: Callable[[], object]) -> object:
        moved: list[Moved] = []

        def note(name: str, values: Sequence[object]) -> None:
            tensors = {id(t): t for t in values if isinstance(t, Tensor)}.values()
            moved.append(Moved(name, sum(t.numel() * t.element_size() for t in tensors)))

        def launched(kernel, grid, args, meta, run) -> None:
            note(kernel.fn.__name__, args)

        with Aten(note), launch.intercept(launched):
            result = function()
        found.append(moved)
        return result

    with ExitStack() as held:
        held.enter_context(as_on_a_gpu())
        if name == OURS:  # what the op computes by: of the op itself torch makes a fake
            seed = torch.empty((), dtype=torch.int64, device="meta") if case.dropout else None
            base, branch = Dense(p.weight), Branch(p.a, p.b, SCALING, case.dropout, seed)
            x, need = p.x.detach(), Need(True, False, True, True)
            backend = reference
            if plan is not None:
                backend = cuda
                held.enter_context(assume(CARDS["90"]))
                held.enter_context(use_plan(plan))
            _, s = counted(lambda: backend.forward(base, x, branch, True))
            counted(lambda: backend.backward(base, p.dy, x, s, branch, need))
        else:
            peer = peers.build(name, p)
            y = counted(lambda: peer.layer(p.x))
            counted(lambda: torch.autograd.grad(y, (p.x, *peer.adapters), p.dy))
    return found[0], found[1]


def count(name: str, case: Case) -> tuple[Traffic, Traffic]:
    """Of forward, and of backward."""
    forward, backward = (
        Traffic(len(moved), sum(one.bytes for one in moved)) for moved in calls(name, case)
    )
    return forward, backward


def table(case: Case) -> str:
    """In Markdown."""
    lines = ["| layer | dropout | forward | backward |", "|---|---|---|---|"]
    elements = case.M * case.K
    for p in (0.0, 0.1):
        for name in (FROZEN, UNFUSED, PEFT, OURS):
            if name == FROZEN and p:
                continue
            both = count(name, case._replace(dropout=p))
            cells = [f"{t.kernels} kernels, {t.bytes / elements:.1f} B" for t in both]
            lines.append(f"| {name} | {p:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plans_table(case: Case) -> str:
    """Of the plans of Triton's kernels and of ATen's calls, as on an H100, in Markdown."""
    lines = ["| plan | dropout | forward | backward |", "|---|---|---|---|"]
    for plan in ("aten", "cublas", "shrink_gemm", "grouped", "gluon", "dual", "flag"):
        for p in (0.0, 0.1):
            try:
                both = calls(OURS, case._replace(dropout=p), plan)
            except RuntimeError:  # the plan serves no dropout
                lines.append(f"| `{plan}` | {p:g} | – | – |")
                continue
            cells = [
                f"{len(moved)} {'call' if len(moved) == 1 else 'calls'},"
                f" {sum(one.bytes for one in moved) / 2**20:.0f} MiB"
                for moved in both
            ]
            lines.append(f"| `{plan}` | {p:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, nargs=4, default=(8192, 4096, 4096, 16))
    parser.add_argument("--plans", action="store_true", help="our plans beside one another")
    args = parser.parse_args(arguments)
    case = Case(*args.size)
    if args.plans:
        print(f"{case}\n\n{plans_table(case)}")
        return
    print(f"{case}, bytes per element of x, of which it has {case.M * case.K:,}\n\n{table(case)}")


if __name__ == "__main__":
    main()
