"""What a Transformer layer costs the host: microseconds and operators, forward and backward.

    python -m benchmarks.host --out benchmarks/results/host-cpu.json

A Llama of width 64 with 16 tokens, in which next to nothing is computed, built with few and with
many layers: a layer is their difference, so embeddings, head and loss do not count. On a GPU the
times are those of launching, without waiting for the kernels.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.utils import logging

from benchmarks.model import (
    SIZES,
    adapters,
    base_model,
    calls_of,
    equalise,
    gate,
    make_ours,
    make_peft,
)
from benchmarks.peers import BLOCKS, FROZEN, OURS, PEFT, PEFT_COMPILED
from benchmarks.store import Results
from lora_kernels import fuse_blocks
from lora_kernels.tuning.machine import machine, machine_line

FEW, MANY = 2, 8
PASSES = ("forward", "backward")


def models_of(layers: int, device: torch.device, compiled: bool) -> dict[str, nn.Module]:
    """The peers, with equal weights and adapters, checked against fp64."""
    base = base_model("host", torch.float32, device, layers)
    models = {PEFT: make_peft(base, fp32=False), OURS: make_ours(base, fp32=False)}
    models[BLOCKS] = copy.deepcopy(models[OURS])
    fuse_blocks(models[BLOCKS])
    equalise(list(models.values()))
    gate(models, ids_of(device))
    if compiled:
        models[PEFT_COMPILED] = copy.deepcopy(models[PEFT])
        models[PEFT_COMPILED].forward = torch.compile(models[PEFT_COMPILED].forward)
    for model in models.values():
        model.train()
    base.enable_input_require_grads()
    return {FROZEN: base.train(), **models}


def ids_of(device: torch.device) -> Tensor:
    *_, vocabulary, batch, length = SIZES["host"]
    return torch.randint(
        vocabulary, (batch, length), generator=torch.Generator().manual_seed(0)
    ).to(device)


def seconds_of(model: nn.Module, ids: Tensor) -> tuple[float, float]:
    """Of one forward and one backward, as the host sees them."""
    if ids.is_cuda:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    middle = time.perf_counter()
    loss.backward()
    return middle - begin, time.perf_counter() - middle


def operators(model: nn.Module, ids: Tensor) -> tuple[int, int]:
    """How many a forward and a backward call."""
    losses: list[Tensor] = []
    forward: Callable[[], None] = lambda: losses.append(  # noqa: E731
        model(input_ids=ids, labels=ids, use_cache=False).loss
    )
    return calls_of(forward), calls_of(lambda: losses[-1].backward())


def measure(
    few: dict[str, nn.Module],
    many: dict[str, nn.Module],
    ids: Tensor,
    seconds: float,
    least: int,
) -> list[dict[str, object]]:
    """A row for each peer: medians over rounds, at least `least`, in which all take turns."""
    apart = MANY - FEW
    times: dict[str, list[list[float]]] = {name: [[], []] for name in few}
    for _ in range(5):  # packs and compiled graphs settle
        for model in (*few.values(), *many.values()):
            seconds_of(model, ids)
    begin, rounds = time.monotonic(), 0
    while rounds < least or time.monotonic() - begin < seconds:
        for name in few:
            pair = zip(seconds_of(few[name], ids), seconds_of(many[name], ids), strict=True)
            for of_pass, (short, long) in zip(times[name], pair, strict=True):
                of_pass.append((long - short) / apart * 1e6)
        for model in (*few.values(), *many.values()):
            for parameter in adapters(model).values():
                parameter.grad = None
        rounds += 1
    rows: list[dict[str, object]] = []
    for name, of_passes in times.items():
        counts = zip(operators(few[name], ids), operators(many[name], ids), strict=True)
        row: dict[str, object] = {"table": "host", "peer": name, "rounds": rounds}
        for what, found, (short, long) in zip(PASSES, of_passes, counts, strict=True):
            row[f"{what}_us"] = round(statistics.median(found), 1)
            row[f"{what}_calls"] = round((long - short) / apart, 1)
        rows.append(row)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="result file (JSON)")
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--rounds", type=int, default=10, help="at least so many")
    parser.add_argument("--compiled", action="store_true", help="PEFT under torch.compile too")
    args = parser.parse_args(arguments)
    logging.set_verbosity_error()
    gpu = torch.cuda.is_available()
    device, info = torch.device("cuda" if gpu else "cpu"), machine(gpu)
    print(machine_line(info), flush=True)
    results = Results(args.out, info)
    if results.done({"table": "host"}):
        return
    few, many = (models_of(layers, device, args.compiled) for layers in (FEW, MANY))
    rows = measure(few, many, ids_of(device), args.seconds, args.rounds)
    results.add(rows)
    for row in rows:
        shown = "  ".join(
            f"{what} {row[f'{what}_us']:7.1f} us {row[f'{what}_calls']:6.1f} operators"
            for what in PASSES
        )
        print(f"    {row['peer']:24} {shown}", flush=True)


if __name__ == "__main__":
    main()
