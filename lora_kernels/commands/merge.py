"""A model with an adapter in its weights, as a plain Transformers folder."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lora_kernels import merge_lora, remove_lora
from lora_kernels.commands import loading

if TYPE_CHECKING:
    from lora_kernels.commands import Subparsers

_SAMPLE = "The quick brown fox jumps over the lazy dog, and then it writes down what it saw: 1, 2."


def add(subparsers: "Subparsers") -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "merge", help="write the model with the adapter in its weights", description=__doc__
    )
    loading.add_model(parser)
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    return parser


@torch.no_grad()
def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    device = next(model.parameters()).device
    found: Tensor = model.eval()(input_ids=ids.to(device)).logits.float()
    return found


def run(args: argparse.Namespace) -> int:
    if args.out.exists() and any(args.out.iterdir()):
        raise ValueError(f"--out: {args.out} is not empty, legal is a new folder")
    words = loading.tokenizer(args.model)
    model = loading.adapted(args.model, args.adapter, args.dtype, args.device)
    ids = words(_SAMPLE, return_tensors="pt")["input_ids"]
    before = _logits(model, ids)
    merge_lora(model, keep_base=False)
    remove_lora(model)
    model.save_pretrained(args.out)  # type: ignore[operator]  # a model of Transformers
    words.save_pretrained(args.out)
    # Of what was written, not of what is in memory.
    after = _logits(loading.model(str(args.out), "auto", args.device), ids)
    gap = float((after - before).abs().max() / before.abs().max())
    same = float((after.argmax(-1) == before.argmax(-1)).float().mean())
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    print(f"merged in {dtype}, in {args.out}")
    print(
        f"a sample of {ids.numel()} tokens: the logits differ from the adapter's by {gap:.1e} of"
        f" the largest, {same:.0%} of the likeliest tokens are the same"
    )
    return 0
