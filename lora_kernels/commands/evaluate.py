"""The loss and perplexity of a model on texts, with an adapter or without."""

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lora_kernels import evaluate_model
from lora_kernels.commands import loading

if TYPE_CHECKING:
    from lora_kernels.commands import Subparsers


def add(subparsers: "Subparsers") -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "evaluate", help="loss and perplexity on texts", description=__doc__
    )
    loading.add_model(parser)
    parser.add_argument("--adapter", type=Path, help="of any format that load_adapter reads")
    loading.add_data(parser)
    return parser


def held_out_loss(model: nn.Module, batches: Any) -> float:
    """Mean over the target tokens, in nats."""
    return evaluate_model(model, batches, None, count=loading.targets)["loss"]


def run(args: argparse.Namespace) -> int:
    words = loading.tokenizer(args.model)
    rows = loading.packed(
        loading.documents(args, words), args.length, words, "--text" if args.text else "--data"
    )
    model = loading.adapted(args.model, args.adapter, args.dtype, args.device)
    batches = loading.loader(rows, args.batch_size, loading.separates(model))
    loss = held_out_loss(model, batches)
    count = sum(map(loading.targets, batches))
    print(f"loss {loss:.4f}, perplexity {math.exp(loss):.2f}, {count} tokens")
    return 0
