"""The folder of a fine-tuning run: what is in it, and whether a run may go on there."""

import argparse
import json
from pathlib import Path
from typing import Any

from lora_kernels.adapter_files import read_json
from lora_kernels.files import replace_atomically
from lora_kernels.recipes import History

CHECKPOINT = "checkpoint.pt"
RUN = "run.json"
# What may differ between a run and the one it resumes, and what is no option.
_FREE = ("resume", "tensorboard", "no_progress", "out", "device")
_NO_OPTION = ("command", "run", "parser")


def options(args: argparse.Namespace) -> dict[str, Any]:
    """The options as JSON."""
    found = {name: value for name, value in vars(args).items() if name not in _NO_OPTION}
    return json.loads(json.dumps(found, default=str))  # type: ignore[no-any-return]


def take_options(args: argparse.Namespace) -> None:
    """Gives a run that is resumed the options of the first; those that were given must be equal.

    FileNotFoundError, ValueError: no run to go on with, or another one.
    """
    if not (args.out / CHECKPOINT).exists():
        raise FileNotFoundError(f"--resume: {args.out / CHECKPOINT}: no such file")
    stored = read_json(args.out / RUN).get("options")
    if not isinstance(stored, dict):
        raise ValueError(f"{args.out / RUN}: holds no options, it is not of finetune")
    given = options(args)
    for name, value in given.items():
        if name in _FREE or value == stored.get(name):
            continue
        if value != json.loads(json.dumps(args.parser.get_default(name), default=str)):
            raise ValueError(
                f"--{name.replace('_', '-')}: got {value}, but the run in {args.out} has"
                f" {stored.get(name)}; --resume takes the options of the run it goes on with"
            )
        restored = stored.get(name)
        if name in ("text", "data", "eval") and restored is not None:
            restored = [Path(path) for path in restored]
        setattr(args, name, restored)


def check(args: argparse.Namespace) -> None:
    """ValueError: what a run needs is missing, or its folder holds another."""
    if args.model is None:
        raise ValueError("--model: is missing; legal is a folder, or a name of the hub")
    if args.text is None and args.data is None:
        raise ValueError("--text, --data: one of them is needed, the files to train on")
    if not args.resume and (args.out / RUN).exists():
        raise ValueError(
            f"--out: {args.out} holds a run; give another folder, or --resume to go on with it"
        )


def write(out: Path, record: dict[str, Any]) -> None:
    text = json.dumps(record, indent=2) + "\n"
    replace_atomically(out / RUN, lambda path: Path(path).write_text(text))


def plot(path: Path, history: History, before: float | None) -> None:
    """The losses over the steps; says so where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"{path.name}: not drawn, that needs matplotlib: pip install matplotlib")
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    axis.plot(
        range(1, len(history) + 1), history.loss, color="#2a6fdb", alpha=0.5, label="training"
    )
    found = [(e["step"], e["loss"]) for e in history.evaluations]
    if before is not None:
        found.insert(0, (0, before))
    if found:
        axis.plot(*zip(*found, strict=True), "o-", color="#d98a2b", markersize=4, label="held out")
    axis.set(xlabel="optimizer step", ylabel="loss (nats per token)")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=130)
