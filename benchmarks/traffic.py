"""What a GPU without a tuned table has to do for a call: kernels, and bytes per element of x.

    python -m benchmarks.traffic [--size M K N r]

Counted from the calls themselves, on tensors without memory: every ATen op that is no view and
every Triton launch, with the tensors that it reads and writes, each once. What an op reads again,
and what a cache keeps, is not counted. No GPU is needed.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import peers
from benchmarks.peers import FROZEN, OURS, PEFT, UNFUSED
from lora_kernels.backends import blocked, masks, reference
from lora_kernels.backends.triton import launch
from lora_kernels.branch import Branch, Dense, Need
from lora_kernels.testing import DTYPES, SCALING, Aten, Case, Problem


class Traffic(NamedTuple):
    kernels: int
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


def count(name: str, case: Case) -> tuple[Traffic, Traffic]:
    """Of forward, and of backward."""
    p, found = problem(case), []

    def counted(function: Callable[[], object]) -> object:
        sizes: list[int] = []

        def note(name: str, values: Sequence[object]) -> None:
            tensors = {id(t): t for t in values if isinstance(t, Tensor)}.values()
            sizes.append(sum(t.numel() * t.element_size() for t in tensors))

        def launched(kernel, grid, args, meta, run) -> None:
            note(kernel.fn.__name__, args)

        with Aten(note), launch.intercept(launched):
            result = function()
        found.append(Traffic(len(sizes), sum(sizes)))
        return result

    with as_on_a_gpu():
        if name == OURS:  # what the op computes by: of the op itself torch makes a fake
            seed = torch.empty((), dtype=torch.int64, device="meta") if case.dropout else None
            base, branch = Dense(p.weight), Branch(p.a, p.b, SCALING, case.dropout, seed)
            x, need = p.x.detach(), Need(True, False, True, True)
            _, s = counted(lambda: reference.forward(base, x, branch, True))
            counted(lambda: reference.backward(base, p.dy, x, s, branch, need))
        else:
            peer = peers.build(name, p)
            y = counted(lambda: peer.layer(p.x))
            counted(lambda: torch.autograd.grad(y, (p.x, *peer.adapters), p.dy))
    return found[0], found[1]


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


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, nargs=4, default=(8192, 4096, 4096, 16))
    args = parser.parse_args(arguments)
    case = Case(*args.size)
    print(f"{case}, bytes per element of x, of which it has {case.M * case.K:,}\n\n{table(case)}")


if __name__ == "__main__":
    main()
