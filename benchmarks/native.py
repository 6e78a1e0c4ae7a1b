"""What the compiled CPU kernels gain: frozen layer, PEFT, ours by ATen calls, ours (fwd + bwd).

    python -m benchmarks.native --out benchmarks/results/native-cpu.json

Rounds, ratios and the check before them are those of `layer.py`. `--forced` times the kernels also
where the library hands a call back to ATen, and `--isa` older instruction sets than this CPU's.
"""

import argparse
import copy
import json
from pathlib import Path

import torch

from benchmarks.layer import is_right
from benchmarks.peers import FROZEN, OURS, PEFT, build
from lora_kernels.backends import native
from lora_kernels.backends.native import extension
from lora_kernels.testing import DTYPES, Case, problem
from lora_kernels.tuning.clock import interleaved, summary
from lora_kernels.tuning.machine import machine, machine_line

# (M, K, N, r)
SHAPES = [
    (1024, 2048, 2048, 16),
    (4096, 768, 768, 8),
    (1024, 2048, 2048, 64),
    (64, 2048, 2048, 16),
    (16, 2048, 2048, 16),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="result file (JSON)")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0, 0.1])
    parser.add_argument("--seconds", type=float, default=8, help="time box of one case")
    parser.add_argument("--rounds", type=int, nargs=2, default=(3, 200), metavar=("MIN", "MAX"))
    parser.add_argument("--scale", type=int, default=1, help="divides M, K and N (for a smoke run)")
    parser.add_argument("--forced", action="store_true", help="the kernels serve every call")
    parser.add_argument("--isa", choices=extension.ISA_NAMES, help="this instruction set")
    args = parser.parse_args()
    if not extension.available():
        raise SystemExit(f"the compiled extension is not there: {extension.status()}")
    if args.isa:
        isa = min(extension.ISA_NAMES.index(args.isa), extension.best_isa())
        native.best_isa = lambda: isa
    info = machine(gpu=False) | {"extension": extension.status()}
    print(machine_line(info), extension.status(), sep="; ", flush=True)
    rows = []
    for dtype in args.dtypes:
        for dropout in args.dropout:
            for M, K, N, r in SHAPES:
                M, K, N = (max(1, size // args.scale) for size in (M, K, N))
                p = problem(Case(M, K, N, r, dtype, dropout), torch.device("cpu"))
                built = {name: build(name, p) for name in (FROZEN, PEFT, OURS)}
                ours = built.pop(OURS)._replace(backend="native" if args.forced else None)
                aten = ours._replace(layer=copy.deepcopy(ours.layer), backend="reference")
                aten = aten._replace(adapters=(aten.layer.lora_A, aten.layer.lora_B))
                for name, peer in (("ours, ATen", aten), ("ours", ours)):
                    is_right(OURS, peer, p)
                    built[name] = peer
                turns = {name: peer.turn(p) for name, peer in built.items()}
                times = {
                    name: [sum(parts) for parts in of_peer]
                    for name, of_peer in interleaved(
                        turns, p.x.device, args.seconds, tuple(args.rounds)
                    ).items()
                }
                case = p.case._asdict()
                rows += [
                    case | {"peer": name, "rounds": len(t), **summary(t, times[FROZEN])}
                    for name, t in times.items()
                ]
                cells = "".join(
                    f"  {row['peer']} {row['ratio']:.3f} [{row['p20']:.3f}, {row['p80']:.3f}]"
                    for row in rows[1 - len(built) :]
                )
                print(f"{dtype} ({M},{K},{N},r={r}) p={dropout}:{cells}", flush=True)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"machine": info, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
