"""An adapter's files as another program reads them: PEFT, MLX, Diffusers, kohya, GGUF."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from lora_kernels import format_writers, formats, gguf_adapters
from lora_kernels.commands import loading

if TYPE_CHECKING:
    from lora_kernels.commands import Subparsers

FORMS = ("peft", "mlx", "diffusers", "kohya", "gguf")


def add(subparsers: "Subparsers") -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "convert", help="write an adapter's files in another format", description=__doc__
    )
    parser.add_argument("source", type=Path, metavar="IN", help="folder or file of any of them")
    parser.add_argument("out", type=Path, metavar="OUT", help="a folder; for kohya, GGUF a file")
    parser.add_argument("--to", choices=FORMS, required=True)
    add_names(parser)
    parser.add_argument(
        "--component", choices=format_writers.COMPONENTS, default="unet",
        help="of a pipeline, that the layers belong to in files of Diffusers and kohya",
    )  # fmt: skip
    return parser


def add_names(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        help="the base, of which the config alone is read: for files of Diffusers, kohya and GGUF",
    )


def read(path: Path, model: str | None) -> formats.Adapter:
    """The adapter of a folder or file. ValueError: it needs a model's names and none is given."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if (path / formats.CONFIG_NAME).exists():
        return formats.read(path, nn.Module())  # under the model's names already
    if model is None:
        raise ValueError(f"--model: is needed, {path} does not hold the names of the base's layers")
    named = loading.empty_model(model)
    if path.suffix == ".gguf":
        return gguf_adapters.read(path, named)
    return formats.read(path, named)


def _write(adapter: formats.Adapter, args: argparse.Namespace) -> Path:
    """The file that holds the tensors."""
    if args.to == "peft":
        return format_writers.write_peft(adapter, args.out)
    if args.to == "mlx":
        return format_writers.write_mlx(adapter, args.out)
    if args.to == "diffusers":
        return format_writers.write_diffusers(adapter, args.out, args.component)
    if args.to == "kohya":
        return format_writers.write_kohya(adapter, args.out, args.component)
    if args.model is None:
        raise ValueError("--model: is needed, GGUF's names follow the base's architecture")
    transformers = loading.require("transformers", "--model")
    return gguf_adapters.write(
        adapter, args.out, transformers.AutoConfig.from_pretrained(args.model)
    )


def run(args: argparse.Namespace) -> int:
    adapter = read(args.source, args.model)
    for left in adapter.left_out:
        print(f"not converted: {left}")
    written = _write(adapter, args)
    layers, _ = format_writers.layers_of(adapter)
    print(f"{len(layers)} layers, {written}")
    if any(layer.use_rslora for layer in layers.values()) and args.to in ("mlx", "kohya", "gguf"):
        print("use_rslora is written as the number that scales the same")
    if adapter.config.dropout and args.to in ("kohya", "gguf"):
        print(f"dropout {adapter.config.dropout}, of training alone, is not in the file")
    return 0
