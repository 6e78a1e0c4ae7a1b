"""DoRA beside PEFT's, and beside our LoRA, whose cost it is meant to have.

    python -m benchmarks.dora --out benchmarks/results/dora-cpu.json

Training: 1024 rows, forward and backward. Decoding: one row, without gradients, in evaluation.
Peers take turns; ratios are to our LoRA layer in the same dtypes, medians over the rounds.
"""

import argparse
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import peft
import torch
from torch import Tensor, nn

from lora_kernels import FusedLoRALinear
from lora_kernels.testing import DTYPES
from lora_kernels.tuning.clock import Turn, interleaved, summary
from lora_kernels.tuning.machine import machine, machine_line

N, K, RANK, SCALING = 2048, 2048, 16, 2.0
TRAINED = 1024
FROZEN, LORA, DORA, PEFT_LORA, PEFT = "frozen", "LoRA", "DoRA", "PEFT's LoRA", "PEFT's DoRA"
NAMES = (FROZEN, LORA, DORA, PEFT_LORA, PEFT)
# Of the base and of the adapter; PEFT's default is the second.
PAIRS = (("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16"))


class Case(NamedTuple):
    dtype: str
    adapter_dtype: str
    dropout: float
    M: int


def layers(case: Case) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    dtype, low = DTYPES[case.dtype], DTYPES[case.adapter_dtype]
    base = nn.Linear(K, N, dtype=dtype)
    found: dict[str, nn.Module] = {FROZEN: base.requires_grad_(False)}
    for name, use_dora in ((LORA, False), (DORA, True)):
        found[name] = FusedLoRALinear.from_linear(
            nn.Linear(K, N, dtype=dtype), RANK, alpha=SCALING * RANK, dropout=case.dropout,
            adapter_dtype=low, use_dora=use_dora,
        )  # fmt: skip
    for name, use_dora in ((PEFT_LORA, False), (PEFT, True)):
        config = peft.LoraConfig(
            r=RANK, lora_alpha=int(SCALING * RANK), lora_dropout=case.dropout,
            target_modules=["0"], use_dora=use_dora,
        )  # fmt: skip
        net = nn.Sequential(nn.Linear(K, N, dtype=dtype))
        wrapped = peft.get_peft_model(net, config, autocast_adapter_dtype=low != dtype)
        found[name] = wrapped.base_model.model[0]
    return {name: layer.train(case.M == TRAINED) for name, layer in found.items()}


def turn(layer: nn.Module, x: Tensor, dy: Tensor) -> Turn:
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]

    def run(mark: Callable[[], None]) -> None:
        if x.requires_grad:
            torch.autograd.grad(layer(x), leaves, dy)
        else:
            with torch.no_grad():
                layer(x)
        mark()

    return run


def measured(case: Case, seconds: float, rounds: tuple[int, int]) -> dict:
    dtype = DTYPES[case.dtype]
    made = layers(case)
    x = torch.randn(case.M, K).to(dtype).requires_grad_(case.M == TRAINED)
    dy = torch.randn(case.M, N).to(dtype)
    turns = {name: turn(layer, x, dy) for name, layer in made.items()}
    times = interleaved(turns, torch.device("cpu"), seconds, rounds)
    base = [sum(parts) for parts in times[LORA]]
    row = {name: summary([sum(parts) for parts in taken], base) for name, taken in times.items()}
    return case._asdict() | {"rounds": len(base)} | row


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="result file (JSON)")
    parser.add_argument("--seconds", type=float, default=10.0, help="time box of one case")
    parser.add_argument("--rounds", type=int, nargs=2, default=(5, 200), metavar=("MIN", "MAX"))
    args = parser.parse_args(arguments)
    info = machine(gpu=False)
    print(machine_line(info), flush=True)
    rows = []
    for (dtype, low), (dropout, M) in itertools.product(
        PAIRS, ((0.0, TRAINED), (0.1, TRAINED), (0.0, 1))
    ):
        row = measured(Case(dtype, low, dropout, M), args.seconds, tuple(args.rounds))
        rows.append(row)
        parts = (f"{n} {row[n]['ms']:.2f} ms ({row[n]['ratio']:.2f})" for n in NAMES)
        print(
            f"{dtype}, adapter {low}, dropout {dropout}, {M} rows: {'  '.join(parts)}", flush=True
        )
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"machine": info, "dora": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
