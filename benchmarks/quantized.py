"""Quantised bases, LoRA included, beside the frozen layer of 16 bits and beside PEFT's.

    python -m benchmarks.quantized --out benchmarks/results/quantized-cpu.json
    python -m benchmarks.quantized --few        # where the kernels for few rows stop to pay

Decoding: a few rows without gradients, weights cold: as many layers take turns as fill 256 MB, at
most 24; ratios are to the frozen `nn.Linear` in the same dtype. Training: 1024 rows, forward and
backward; ratios are to `lora_linear` on the dense weight; PEFT is its layer on NF4 weights of
bitsandbytes, where that is installed. Peers take turns; a ratio is the median over the rounds. FP8
has no kernels on the CPU and is left out by default.
"""

import argparse
import importlib.util
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_kernels import lora_linear, quantize
from lora_kernels.backends import dequantized
from lora_kernels.backends.native import quantized as native
from lora_kernels.branch import Branch
from lora_kernels.testing import DTYPES
from lora_kernels.tuning.clock import Deadline, Turn, interleaved, summary
from lora_kernels.tuning.machine import machine, machine_line
from lora_kernels.weights import KINDS, QuantizedWeight

SHAPES, RANK, SCALING = ((4096, 4096), (3072, 768)), 16, 2.0  # N, K
DECODED, TRAINED = (1, 4, 16), 1024
FROZEN, DENSE, PEFT = "frozen", "lora_linear", "PEFT, bitsandbytes NF4"
COLD_BYTES, MOST_LAYERS = 256 << 20, 24


class Case(NamedTuple):
    N: int
    K: int
    M: int
    dtype: str
    trains: bool


class Layer(NamedTuple):
    """One weight in all its forms."""

    dense: Tensor
    coded: dict[str, QuantizedWeight]
    peft: nn.Module | None


def layer(case: Case, kinds: Sequence[str], peft: bool) -> Layer:
    dense = (torch.randn(case.N, case.K) * case.K**-0.5).to(DTYPES[case.dtype])
    coded = {kind: quantize(dense, kind) for kind in kinds}
    return Layer(dense, coded, peft_layer(dense) if peft else None)


def peft_layer(dense: Tensor) -> nn.Module | None:
    if importlib.util.find_spec("bitsandbytes") is None:
        return None
    import bitsandbytes
    import peft

    N, K = dense.shape
    base = bitsandbytes.nn.Linear4bit(K, N, False, dense.dtype, quant_type="nf4")
    base.load_state_dict({"weight": dense})
    net = nn.Sequential(base.to("cpu"))
    net.is_loaded_in_4bit = True
    config = peft.LoraConfig(r=RANK, lora_alpha=SCALING * RANK, target_modules=["0"])
    wrapped: nn.Module = peft.get_peft_model(net, config).base_model.model[0]
    return wrapped.to(dense.dtype)


def turns(case: Case, kinds: Sequence[str]) -> tuple[dict[str, Turn], list[Layer]]:
    """The peers, and the layers of which one call of each is made in a turn."""
    torch.manual_seed(0)
    dtype = DTYPES[case.dtype]
    count = min(MOST_LAYERS, -(-COLD_BYTES // (case.N * case.K * dtype.itemsize)))
    layers = [layer(case, kinds, case.trains) for _ in range(1 if case.trains else count)]
    x = torch.randn(case.M, case.K).to(dtype).requires_grad_(case.trains)
    a = (torch.randn(RANK, case.K) * case.K**-0.5).to(dtype).requires_grad_(case.trains)
    b = (torch.randn(case.N, RANK) * 0.1).to(dtype).requires_grad_(case.trains)
    dy = torch.randn(case.M, case.N).to(dtype)

    def on(weight: Callable[[Layer], Tensor | QuantizedWeight]) -> Turn:
        return turn(lambda one: lora_linear(x, weight(one), a, b, scaling=SCALING), (x, a, b))

    def turn(call: Callable[[Layer], Tensor], leaves: Sequence[Tensor]) -> Turn:
        each = itertools.cycle(layers)

        def run(mark: Callable[[], None]) -> None:
            if case.trains:
                torch.autograd.grad(call(next(each)), leaves, dy)
            else:
                with torch.no_grad():
                    for _ in layers:
                        call(next(each))
            mark()

        return run

    found = {DENSE: on(lambda one: one.dense)}
    if not case.trains:
        found = {FROZEN: turn(lambda one: F.linear(x, one.dense), ())} | found
    for kind in kinds:
        found[kind] = on(lambda one, kind=kind: one.coded[kind])
    if layers[0].peft is not None:
        pair = [p for n, p in layers[0].peft.named_parameters() if "lora_" in n]
        found[PEFT] = turn(lambda one: one.peft(x), (x, *pair))
    return found, layers


def measured(case: Case, args: argparse.Namespace) -> dict:
    made, layers = turns(case, args.kinds)
    count, one = len(layers), layers[0]
    times = interleaved(made, torch.device("cpu"), args.seconds, tuple(args.rounds))
    base = [sum(parts) / count for parts in times[next(iter(made))]]
    row = {"rounds": len(base), "layers": count}
    row["bytes"] = {kind: weight.nbytes / one.dense.nbytes for kind, weight in one.coded.items()}
    for name, taken in times.items():
        row[name] = summary([sum(parts) / count for parts in taken], base)
    return case._asdict() | row


def few(args: argparse.Namespace) -> None:
    """For each layout and dtype the two ways, by rows: ratios of codes multiplied as they lie to
    strips that are decoded for torch's product, the branch in both."""
    for dtype, (N, K) in itertools.product(args.dtypes, SHAPES):
        for kind in args.kinds:
            line = []
            for M in (1, 4, 8, 16, 32, 64, 128, 256):
                made = ways(Case(N, K, M, dtype, False), kind)
                with mock.patch.object(native, "most_coded", return_value=1 << 30):
                    times = interleaved(made, torch.device("cpu"), args.seconds, tuple(args.rounds))
                strips, codes = ([sum(p) for p in times[name]] for name in ("strips", "codes"))
                line.append(f"{M}: {summary(codes, strips)['ratio']:.2f}")
            print(f"{dtype} {kind} ({N}, {K})  {'  '.join(line)}", flush=True)


def ways(case: Case, kind: str) -> dict[str, Turn]:
    dtype = DTYPES[case.dtype]
    count = min(MOST_LAYERS, -(-COLD_BYTES // (case.N * case.K * 2)))
    layers = [layer(case, [kind], False).coded[kind] for _ in range(count)]
    x = torch.randn(case.M, case.K).to(dtype)
    a, b = torch.randn(RANK, case.K).to(dtype), torch.randn(case.N, RANK).to(dtype)
    branch = Branch(a, b, SCALING, 0.0, None)

    def codes(mark: Callable[[], None]) -> None:
        for weight in layers:
            native.forward(x, weight, None, branch, False)
        mark()

    def strips(mark: Callable[[], None]) -> None:
        for weight in layers:
            y = dequantized.product(x, weight, None)
            y.addmm_(SCALING * (x @ a.t()), b.t())
        mark()

    return {"strips": strips, "codes": codes}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="result file (JSON)")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16", "fp32"])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["int8", "nf4", "int4"])
    parser.add_argument("--few", action="store_true", help="print the limits of few rows only")
    parser.add_argument("--minutes", type=float, default=10, help="time box of the run")
    parser.add_argument("--seconds", type=float, default=4.0, help="time box of one case")
    parser.add_argument("--rounds", type=int, nargs=2, default=(5, 200), metavar=("MIN", "MAX"))
    args = parser.parse_args(arguments)
    info = machine(gpu=False)
    print(machine_line(info), flush=True)
    if args.few:
        return few(args)
    deadline, rows = Deadline(args.minutes), []
    for dtype, (N, K), M in itertools.product(args.dtypes, SHAPES, (*DECODED, TRAINED)):
        case = Case(N, K, M, dtype, M == TRAINED)
        if deadline.left() < 0:
            print(f"{case}: left out, the time is over")
            continue
        row = measured(case, args)
        rows.append(row)
        names = [name for name in row if isinstance(row[name], dict) and "ms" in row[name]]
        parts = "  ".join(f"{n} {row[n]['ms']:.3f} ms ({row[n]['ratio']:.2f})" for n in names)
        print(f"{tuple(case)}: {parts}", flush=True)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"machine": info, "quantized": rows}, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
