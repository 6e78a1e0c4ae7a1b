"""What a LoRA layer costs against the frozen layer: forward + backward, every peer in one process.

    python benchmarks/layer.py --out benchmarks/results/layer-cpu.json

Each round times every peer once, in turn; a peer's ratio is the median over the rounds of its time
over the frozen layer's time in the same round, so drifting clocks and noisy neighbours cancel.
Before anything is timed every LoRA peer's output and gradients are checked against fp64.
"""

import argparse
import copy
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from machine import machine, machine_line
from torch import Tensor, nn

from lora_kernels import FusedLoRALinear

# (M, K, N, r)
SHAPES = [(1024, 2048, 2048, 16), (4096, 768, 768, 8), (16, 2048, 2048, 16)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FROZEN, PEFT, OURS = "frozen nn.Linear", "PEFT, same dtype", "lora_kernels"


def peers(K: int, N: int, r: int, dtype: torch.dtype, dropout: float) -> dict[str, nn.Module]:
    """One layer per peer, each with its own copy of equal weights: none warms another's cache."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    linear = nn.Linear(K, N, bias=False).to(dtype).requires_grad_(False)
    ours = FusedLoRALinear.from_linear(copy.deepcopy(linear), r, alpha=2 * r, dropout=dropout)
    nn.init.normal_(ours.lora_B, std=0.02)
    holder = nn.Sequential(nn.Linear(K, N, bias=False).to(dtype))
    config = LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=dropout, target_modules=["0"])
    peft = get_peft_model(holder, config, autocast_adapter_dtype=False).base_model.model[0]
    with torch.no_grad():
        peft.base_layer.weight.copy_(linear.weight)
        peft.lora_A["default"].weight.copy_(ours.lora_A)
        peft.lora_B["default"].weight.copy_(ours.lora_B)
    return {FROZEN: linear, PEFT: peft, OURS: ours}


def check(layers: dict[str, nn.Module], x: Tensor, dy: Tensor) -> None:
    """Raises unless ours is as near to fp64 as PEFT is (within 1 % of its error plus one eps)."""
    for layer in layers.values():
        layer.eval()

    def results(layer: nn.Module) -> list[Tensor]:
        y = layer(x)
        trained = [p for p in layer.parameters() if p.requires_grad]
        return [y.detach(), *torch.autograd.grad(y, [x, *trained], dy)]

    ours = layers[OURS]
    x64, dy64 = x.detach().double(), dy.double()
    W, A, B = (p.detach().double() for p in (ours.weight, ours.lora_A, ours.lora_B))
    ds = ours.scaling * (dy64 @ B)
    exact = [
        x64 @ W.T + ours.scaling * (x64 @ A.T) @ B.T,
        dy64 @ W + ds @ A,
        ds.T @ x64,
        dy64.T @ (ours.scaling * (x64 @ A.T)),
    ]

    def errors(layer: nn.Module) -> list[float]:
        pairs = zip(results(layer), exact, strict=True)
        return [float((got.double() - want).norm() / want.norm()) for got, want in pairs]

    for name, mine, theirs in zip(
        ("y", "dx", "dA", "dB"), errors(ours), errors(layers[PEFT]), strict=True
    ):
        if not mine <= 1.01 * theirs + torch.finfo(x.dtype).eps:
            raise AssertionError(
                f"{name}: error {mine:.2e}, PEFT's {theirs:.2e}; nothing was timed"
            )
    for layer in layers.values():
        layer.train()


def _step(layer: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], None]:
    trained = [x, *(p for p in layer.parameters() if p.requires_grad)]

    def step() -> None:
        torch.autograd.grad(layer(x), trained, dy)

    return step


def measure(
    layers: dict[str, nn.Module], x: Tensor, dy: Tensor, seconds: float, rounds: tuple[int, int]
) -> dict[str, list[float]]:
    """Seconds per step of each peer, one entry a round."""
    steps = {name: _step(layer, x, dy) for name, layer in layers.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    gc.collect()
    begin = time.perf_counter()
    while len(times[FROZEN]) < rounds[0] or (
        time.perf_counter() - begin < seconds and len(times[FROZEN]) < rounds[1]
    ):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    return times


def rows_of(times: dict[str, list[float]], case: dict[str, object]) -> list[dict[str, object]]:
    rows = []
    for name, seconds in times.items():
        ratios = [a / b for a, b in zip(seconds, times[FROZEN], strict=True)]
        cuts = statistics.quantiles(ratios, n=5)
        rows.append(
            case
            | {
                "peer": name,
                "ms": round(statistics.median(seconds) * 1e3, 3),
                "ratio": round(statistics.median(ratios), 4),
                "p20": round(cuts[0], 4),
                "p80": round(cuts[-1], 4),
                "rounds": len(seconds),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="result file (JSON)")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--seconds", type=float, default=20, help="time box of one case")
    parser.add_argument("--rounds", type=int, nargs=2, default=(3, 100), metavar=("MIN", "MAX"))
    parser.add_argument("--scale", type=int, default=1, help="divides M, K and N (for a smoke run)")
    args = parser.parse_args()
    info = machine()
    print(machine_line(info), flush=True)
    rows = []
    for dtype in args.dtypes:
        for M, K, N, r in SHAPES:
            M, K, N = (max(1, size // args.scale) for size in (M, K, N))
            layers = peers(K, N, r, DTYPES[dtype], args.dropout)
            x = torch.randn(M, K).to(DTYPES[dtype]).requires_grad_()
            dy = torch.randn(M, N).to(DTYPES[dtype])
            check(layers, x, dy)
            case = {"dtype": dtype, "M": M, "K": K, "N": N, "r": r, "dropout": args.dropout}
            rows += rows_of(measure(layers, x, dy, args.seconds, args.rounds), case)
            for row in rows[-len(layers) :]:
                print(
                    f"{dtype} ({M},{K},{N},r={r})  {row['peer']:18} {row['ms']:10.2f} ms"
                    f"  {row['ratio']:.3f}x  [{row['p20']:.3f}, {row['p80']:.3f}]",
                    flush=True,
                )
            if args.out:
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps({"machine": info, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
