"""Fine-tunes a causal language model on texts: adapter, tokenizer, log and plot in one folder."""

import argparse
import dataclasses
import math
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lora_kernels import apply_lora, fuse_blocks, lora_parameters, quantize_base, save_adapter
from lora_kernels import train_model as train
from lora_kernels._version import __version__
from lora_kernels.commands import folder, loading, texts
from lora_kernels.commands.evaluate import held_out_loss
from lora_kernels.recipes import History
from lora_kernels.recipes.callbacks import CSV, Callback, EarlyStopping, TensorBoard
from lora_kernels.weights import KINDS

if TYPE_CHECKING:
    from lora_kernels.commands import Subparsers

SCHEDULES = ("cosine", "linear", "constant")


def add(subparsers: "Subparsers") -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "finetune", help="train an adapter on texts", description=__doc__
    )
    loading.add_model(parser, required=False)
    loading.add_data(parser, required=False)
    held = parser.add_mutually_exclusive_group()
    held.add_argument("--eval", type=Path, nargs="+", metavar="FILE", help="held-out files")
    held.add_argument("--holdout", type=float, default=0.1, help="share held out; 0 for none")
    adapter = parser.add_argument_group("adapter")
    adapter.add_argument("--rank", type=loading.positive, default=16)
    adapter.add_argument("--alpha", type=float, help="default: twice the rank")
    adapter.add_argument("--dropout", type=float, default=0.0)
    adapter.add_argument("--target", nargs="+", metavar="NAME", help="default: all but the head")
    adapter.add_argument("--rslora", action="store_true", help="scale by alpha / sqrt(rank)")
    adapter.add_argument("--dora", action="store_true")
    adapter.add_argument("--quantize", choices=KINDS, help="the base's weights in fewer bits")
    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=loading.positive, default=1)
    training.add_argument("--max-steps", type=loading.positive)
    training.add_argument("--accumulate", type=loading.positive, default=1, help="batches a step")
    training.add_argument("--lr", type=float, default=2e-4)
    training.add_argument("--schedule", choices=SCHEDULES, default="cosine")
    training.add_argument("--warmup", type=loading.whole, default=0, help="steps to the full rate")
    training.add_argument("--weight-decay", type=float, default=0.0)
    training.add_argument("--max-grad-norm", type=float, default=1.0)
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--eval-every", type=loading.positive, help="steps; default: epochs")
    training.add_argument("--patience", type=loading.positive, help="evaluations without a gain")
    training.add_argument("--checkpoint-every", type=loading.positive, help="steps, beside epochs")
    parser.add_argument("--out", type=Path, required=True, help="folder for all results")
    parser.add_argument("--resume", action="store_true", help="go on from --out's checkpoint")
    parser.add_argument("--tensorboard", action="store_true", help="log there too")
    parser.add_argument("--no-progress", action="store_true")
    parser.set_defaults(parser=parser)
    return parser


def _data(args: argparse.Namespace, words: Any) -> tuple[list[texts.Row], list[texts.Row]]:
    """Rows to train on and rows held out."""
    if not 0 <= args.holdout <= 0.5:
        raise ValueError(f"--holdout: got {args.holdout}, legal is a share from 0 to 0.5")
    argument = "--text" if args.text else "--data"
    examples, held = loading.documents(args, words), []
    if args.eval:
        held = texts.load(args.eval, args.text is None, words, print)
    elif args.holdout:
        examples, held = texts.split(examples, args.holdout)
    long = sum(len(example.ids) > args.length for example in examples)
    if long and args.data:
        print(f"{long} of {len(examples)} documents are longer than a row and were cut (--length)")
    rows = loading.packed(examples, args.length, words, argument)
    where = "--eval" if args.eval else f"--holdout {args.holdout} of {argument}"
    tests = loading.packed(held, args.length, words, where) if held or args.eval else []
    print(f"{len(rows)} rows of {args.length} tokens to train on, {len(tests)} held out")
    return rows, tests


def _scheduler(args: argparse.Namespace, optimizer: Any, steps: int) -> Any:
    warmup: int = args.warmup

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(1, steps - warmup)
        if args.schedule == "constant":
            return 1.0
        return 1 - done if args.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _steps(args: argparse.Namespace, rows: int) -> int:
    steps: int = args.epochs * math.ceil(math.ceil(rows / args.batch_size) / args.accumulate)
    return steps if args.max_steps is None else min(steps, args.max_steps)


def _adapt(args: argparse.Namespace, model: nn.Module) -> None:
    print(
        apply_lora(
            model, args.rank, alpha=2 * args.rank if args.alpha is None else args.alpha,
            dropout=args.dropout, target_modules=args.target, use_rslora=args.rslora,
            use_dora=args.dora,
        )
    )  # fmt: skip
    if args.quantize:
        print(quantize_base(model, args.quantize))
    fuse_blocks(model)


def _callbacks(args: argparse.Namespace) -> list[Callback]:
    found: list[Callback] = [CSV(args.out / "log.csv")]
    if args.tensorboard:
        found.append(TensorBoard(args.out / "tensorboard"))
    if args.patience:
        found.append(EarlyStopping(args.patience))
    return found


def run(args: argparse.Namespace) -> int:
    if args.resume:
        folder.take_options(args)
    folder.check(args)
    callbacks = _callbacks(args)
    torch.manual_seed(args.seed)
    words = loading.tokenizer(args.model)
    rows, tests = _data(args, words)
    if args.patience and not tests:
        raise ValueError(f"--patience {args.patience}: needs held-out texts, --eval or --holdout")
    model = loading.model(args.model, args.dtype, args.device)
    separate = loading.separates(model)
    if not separate and any(row.documents > 1 for row in rows):
        print("the model does not tell the documents of a row apart: later ones see earlier ones")
    batches = loading.loader(rows, args.batch_size, separate, args.seed)
    held = loading.loader(tests, args.batch_size, separate) if tests else None
    _adapt(args, model)
    # New adapters are zero: this is the base.
    before = None if held is None else held_out_loss(model, held)
    optimizer = torch.optim.AdamW(
        lora_parameters(model), lr=args.lr, weight_decay=args.weight_decay
    )
    checkpoint = args.out / folder.CHECKPOINT
    args.out.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {
        "options": folder.options(args),
        "versions": _versions(),
        "rows": len(rows),
        "held_out_rows": len(tests),
        "loss_before": before,
    }
    folder.write(args.out, record)
    history = train(
        model, batches, None, optimizer, epochs=args.epochs, max_steps=args.max_steps,
        accumulation_steps=args.accumulate, max_grad_norm=args.max_grad_norm,
        scheduler=_scheduler(args, optimizer, _steps(args, len(rows))), count=loading.targets,
        progress=False if args.no_progress else None, checkpoint=checkpoint,
        checkpoint_every=args.checkpoint_every, resume_from=checkpoint if args.resume else None,
        eval_loader=held, eval_every=args.eval_every if tests else None,
        keep_best="loss" if tests else None, callbacks=callbacks,
    )  # fmt: skip
    after = None if held is None else held_out_loss(model, held)
    save_adapter(model, args.out, base_model=args.model)
    words.save_pretrained(args.out)
    folder.write(args.out, {**record, "loss_after": after, "history": dataclasses.asdict(history)})
    _report(args, history, before, after)
    return 0


def _report(
    args: argparse.Namespace, history: History, before: float | None, after: float | None
) -> None:
    folder.plot(args.out / "loss.png", history, before)
    if history.stopped:
        print(f"stopped after {len(history)} steps: {history.stopped}")
    if before is not None and after is not None:
        print(
            f"held-out loss {before:.4f} -> {after:.4f},"
            f" perplexity {math.exp(before):.2f} -> {math.exp(after):.2f}"
        )
    print(f"{len(history)} steps, {history.tokens_per_second:.0f} tokens/s; all in {args.out}")
    quantize = f"; quantize_base(model, {args.quantize!r})" if args.quantize else ""
    names = "load_adapter, quantize_base" if args.quantize else "load_adapter"
    print("to load it:")
    print(f"    from transformers import AutoModelForCausalLM; from lora_kernels import {names}")
    print(f"    model = AutoModelForCausalLM.from_pretrained({args.model!r})")
    print(f"    load_adapter(model, {str(args.out)!r}){quantize}")


def _versions() -> dict[str, str]:
    transformers = loading.require("transformers", "--model")
    return {
        "lora_kernels": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
