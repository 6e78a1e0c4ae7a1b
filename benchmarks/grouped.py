"""Many adapters in one call: tenants and experts, beside what is used for them today.

    python -m benchmarks.grouped --out benchmarks/results/grouped-cpu.json

Tenants: M rows of G adapters on one base, forward and backward, and one row each (decoding, without
gradients). Peers: PEFT's `adapter_names`, one `lora_linear` a group, `torch._grouped_mm` on top of
the base, and one adapter for all rows, to which the ratios are. Experts: two of a token. Peers:
PEFT's `target_parameters`, one `lora_linear` an expert, `torch._grouped_mm` as projects write it,
and the experts without adapters. On a GPU (`--device cuda`) also our kernels of all groups, which
nothing chooses there yet. Peers take turns; a ratio is the median over the rounds.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import peft
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.memory import peak_bytes
from lora_kernels import Groups, lora_linear, lora_linear_grouped
from lora_kernels.backends import use_backend
from lora_kernels.testing import DTYPES
from lora_kernels.tuning.clock import Deadline, Turn, interleaved, summary
from lora_kernels.tuning.machine import machine, machine_line

ONE, OURS, LOOP, PEFT = "one adapter", "lora_linear_grouped", "lora_linear a group", "PEFT"
FROZEN, GROUPED_MM, FORCED = "frozen experts", "_grouped_mm", "lora_linear_grouped, Triton forced"
TENANTS, ROWS, RANKS, WIDTHS = (1, 4, 16, 64), (16, 512, 4096), (8, 64), (1024, 1024)
EXPERTS, TOP, TOKENS, EXPERT_WIDTHS = (8, 4, 16, 64), 2, 1024, (512, 1024)
SCALING = 2.0


def randn(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape) * scale).to(dtype)


def turn(call: Callable[[], Tensor], leaves: Sequence[Tensor], dy: Tensor | None) -> Turn:
    """Forward and backward in one part; without dy, forward alone without gradients."""

    def run(mark: Callable[[], None]) -> None:
        if dy is None:
            with torch.no_grad():
                call()
        else:
            torch.autograd.grad(call(), leaves, dy, allow_unused=True)
        mark()

    return run


def forced(run: Turn) -> Turn:
    """By Triton's kernels of all groups."""

    def inside(mark: Callable[[], None]) -> None:
        with use_backend("triton"):
            run(mark)

    return inside


def of_device(turns: dict[str, Turn]) -> dict[str, Turn]:
    """With our other kernels where there are any."""
    gpu = torch.get_default_device().type == "cuda"
    return turns | {FORCED: forced(turns[OURS])} if gpu else turns


Pairs = Sequence[Tensor] | Tensor


def branches_by_grouped_mm(x: Tensor, a: Pairs, b: Pairs, offsets: Tensor) -> Tensor:
    """As projects write it, of adapters of one rank."""
    low, high = (torch.stack(tuple(t)).transpose(1, 2) for t in (a, b))
    s = torch._grouped_mm(x, low, offs=offsets)
    return SCALING * torch._grouped_mm(s, high, offs=offsets)


def serves_grouped_mm(call: Callable[[], Tensor], expected: Tensor) -> bool:
    """Whether torch has it here for this dtype and these sizes."""
    try:
        found = call()
    except RuntimeError as error:
        print(f"torch._grouped_mm: {str(error).splitlines()[0]}")
        return False
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.2)
    return True


# ------------------------------------------------------------------------------------------ tenants


class Tenants(NamedTuple):
    G: int
    M: int
    r: int
    dtype: str
    trains: bool


def tenants(case: Tenants) -> dict[str, Turn]:
    """Rows of all adapters in one batch, those of one together, as samples of one length."""
    torch.manual_seed(0)
    (K, N), dtype, count = WIDTHS, DTYPES[case.dtype], case.M // case.G
    x = randn(case.M, K, dtype=dtype).requires_grad_()
    weight = randn(N, K, dtype=dtype, scale=K**-0.5)
    a = [randn(case.r, K, dtype=dtype, scale=K**-0.5).requires_grad_() for _ in range(case.G)]
    b = [randn(N, case.r, dtype=dtype, scale=0.1).requires_grad_() for _ in range(case.G)]
    dy = randn(case.M, N, dtype=dtype) if case.trains else None
    groups = Groups.from_segments([count] * case.G)

    linear = nn.Linear(K, N, bias=False, dtype=dtype)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    names = [f"tenant{g}" for g in range(case.G)]
    options = {"r": case.r, "lora_alpha": SCALING * case.r, "target_modules": ["0"]}
    model = peft.get_peft_model(
        nn.Sequential(linear), peft.LoraConfig(**options), adapter_name=names[0]
    )
    for name in names[1:]:
        model.add_adapter(name, peft.LoraConfig(**options))
    layer = model.base_model.model[0].to(dtype).eval()
    for name, one, other in zip(names, a, b, strict=True):
        layer.lora_A[name].weight = nn.Parameter(one.detach().clone())
        layer.lora_B[name].weight = nn.Parameter(other.detach().clone())
    pairs = [layer.lora_A[n].weight for n in names] + [layer.lora_B[n].weight for n in names]
    for parameter in pairs:
        parameter.requires_grad_(True)
    of_samples = [names[g] for g in range(case.G) for _ in range(count)]

    def one_by_one() -> Tensor:
        parts = x.split(count)
        return torch.cat(
            [
                lora_linear(part, weight, one, other, scaling=SCALING)
                for part, one, other in zip(parts, a, b, strict=True)
            ]
        )

    def grouped() -> Tensor:
        return lora_linear_grouped(x, weight, a, b, groups, scaling=SCALING)

    offsets = torch.arange(count, case.M + 1, count, dtype=torch.int32)

    def by_grouped_mm() -> Tensor:
        return F.linear(x, weight) + branches_by_grouped_mm(x, a, b, offsets)

    torch.testing.assert_close(
        grouped(), layer(x, adapter_names=of_samples), rtol=0.05, atol=0.05 * N**0.5
    )
    turns = {
        ONE: turn(lambda: lora_linear(x, weight, a[0], b[0], scaling=SCALING), (x, a[0], b[0]), dy),
        OURS: turn(grouped, (x, *a, *b), dy),
        LOOP: turn(one_by_one, (x, *a, *b), dy),
        PEFT: turn(lambda: layer(x, adapter_names=of_samples), (x, *pairs), dy),
    }
    if serves_grouped_mm(by_grouped_mm, grouped()):
        turns[GROUPED_MM] = turn(by_grouped_mm, (x, *a, *b), dy)
    return of_device(turns)


# ------------------------------------------------------------------------------------------ experts


class Experts(nn.Module):
    """The product of a mixture's experts, W [E,K,N], of rows that a router has sorted."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, rows: Tensor, lengths: Sequence[int]) -> Tensor:
        parts = zip(rows.split(list(lengths)), self.weight, strict=True)
        return torch.cat([part @ w for part, w in parts])


class Mixture(NamedTuple):
    G: int
    r: int
    dtype: str


def experts(case: Mixture) -> dict[str, Turn]:
    torch.manual_seed(0)
    (K, N), dtype = EXPERT_WIDTHS, DTYPES[case.dtype]
    chosen = torch.randn(TOKENS, case.G).topk(TOP).indices.flatten()
    lengths = torch.bincount(chosen, minlength=case.G)
    x = randn(TOKENS * TOP, K, dtype=dtype).requires_grad_()
    dy = randn(TOKENS * TOP, N, dtype=dtype)
    weight = randn(case.G, N, K, dtype=dtype, scale=K**-0.5)
    a = randn(case.G, case.r, K, dtype=dtype, scale=K**-0.5).requires_grad_()
    b = randn(case.G, N, case.r, dtype=dtype, scale=0.1).requires_grad_()
    groups, counts = Groups.from_segments(lengths), lengths.tolist()

    plain = Experts(weight.transpose(1, 2).contiguous())
    config = peft.LoraConfig(
        r=case.r, lora_alpha=SCALING * case.r, target_modules=[], target_parameters=["0.weight"]
    )
    wrapped = peft.get_peft_model(nn.Sequential(Experts(plain.weight.clone())), config)
    layer = wrapped.base_model.model[0].to(dtype)
    pairs = [layer.lora_A.default.weight, layer.lora_B.default.weight]

    def grouped() -> Tensor:
        return lora_linear_grouped(x, weight, a, b, groups, scaling=SCALING)

    offsets = lengths.cumsum(0).int()

    def one_by_one() -> Tensor:
        return torch.cat(
            [
                lora_linear(part, w, one, other, scaling=SCALING)
                for part, w, one, other in zip(x.split(counts), weight, a, b, strict=True)
            ]
        )

    def by_grouped_mm() -> Tensor:
        y = torch._grouped_mm(x, weight.transpose(1, 2), offs=offsets)
        return y + branches_by_grouped_mm(x, a, b, offsets)

    expected = torch.cat(
        [
            F.linear(part, w) + SCALING * F.linear(F.linear(part, one), other)
            for part, w, one, other in zip(x.split(counts), weight, a, b, strict=True)
        ]
    )
    torch.testing.assert_close(grouped(), expected, rtol=0.05, atol=0.2)
    turns = {
        FROZEN: turn(lambda: plain(x, counts), (x,), dy),
        OURS: turn(grouped, (x, a, b), dy),
        LOOP: turn(one_by_one, (x, a, b), dy),
        PEFT: turn(lambda: layer(x, counts), (x, *pairs), dy),
    }
    if serves_grouped_mm(by_grouped_mm, expected):
        turns[GROUPED_MM] = turn(by_grouped_mm, (x, a, b), dy)
    return of_device(turns)


# ----------------------------------------------------------------------------------------- measured


def peak(run: Turn, device: torch.device) -> float:
    """MiB that one turn takes at most beside what was there."""
    return round(peak_bytes(lambda: run(lambda: None), device) / 2**20, 1)


def measured(turns: dict[str, Turn], base: str, args: argparse.Namespace) -> dict:
    times = {
        name: [sum(parts) for parts in of_peer]
        for name, of_peer in interleaved(
            turns, args.device, args.seconds, tuple(args.rounds)
        ).items()
    }
    row = {"rounds": len(times[base])}
    for name, taken in times.items():
        row[name] = summary(taken, times[base]) | {"peak_mib": peak(turns[name], args.device)}
    return row


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="result file (JSON)")
    parser.add_argument("--device", type=torch.device, default="cpu", help="cpu or cuda")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="M of the tenants")
    parser.add_argument("--tenants", type=int, nargs="+", default=TENANTS, help="G of the tenants")
    parser.add_argument("--experts", type=int, nargs="+", default=EXPERTS, help="G of the experts")
    parser.add_argument("--minutes", type=float, default=15, help="time box of the run")
    parser.add_argument("--seconds", type=float, default=1.0, help="time box of one case")
    parser.add_argument("--rounds", type=int, nargs=2, default=(5, 200), metavar=("MIN", "MAX"))
    args = parser.parse_args(arguments)
    info = machine(gpu=args.device.type == "cuda")
    print(machine_line(info), flush=True)
    deadline, rows = Deadline(args.minutes), []
    cases: list[tuple[str, Tenants | Mixture]] = []
    for dtype in args.dtypes:
        cases += [("experts", Mixture(G, r, dtype)) for G in args.experts for r in RANKS]
        cases += [
            ("tenants", Tenants(G, M, r, dtype, trains))
            for M in args.rows
            for r in RANKS
            for G in args.tenants
            for trains in ((True, False) if M >= 512 else (False,))
            if G <= M
        ]
    for kind, case in cases:
        if deadline.left() < 0:
            print(f"{kind} {case}: left out, the time is over")
            continue
        with args.device:
            made = experts(case) if isinstance(case, Mixture) else tenants(case)
        row = measured(made, next(iter(made)), args)
        rows.append({"kind": kind} | case._asdict() | row)
        parts = "  ".join(
            f"{name} {row[name]['ms']:.3f} ms {row[name]['peak_mib']:.0f} MiB" for name in made
        )
        print(f"{kind} {tuple(case)}: {parts}", flush=True)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"machine": info, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
