"""What the commands share: models and tokenizers, batches, options, optional packages."""

import argparse
import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lora_kernels import load_adapter
from lora_kernels.commands import texts

DTYPES = {"auto": "auto", "fp32": torch.float32, "bf16": torch.bfloat16}


def require(package: str, needed_for: str) -> Any:
    """An optional package; ImportError says what to install."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        name = package.partition(".")[0]
        raise ImportError(f"{needed_for} needs {name}: pip install {name} ({error})") from error


def tokenizer(path: str) -> Any:
    """The tokenizer of a folder or of the hub."""
    return require("transformers", "--model").AutoTokenizer.from_pretrained(path)


def model(path: str, dtype: str, device: str | None) -> nn.Module:
    """A causal language model of a folder or of the hub, on the GPU where there is one."""
    transformers = require("transformers", "--model")
    loaded: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES[dtype])
    return loaded.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def adapted(path: str, adapter: Path | None, dtype: str, device: str | None) -> nn.Module:
    """The same with an adapter."""
    if adapter is not None and not adapter.exists():
        raise FileNotFoundError(f"--adapter: {adapter}: no such file or folder")
    loaded = model(path, dtype, device)
    if adapter is not None:
        load_adapter(loaded, adapter)
    return loaded


def empty_model(path: str) -> nn.Module:
    """A model on the meta device, of its config alone: for its names and shapes."""
    if (Path(path) / "config.json").exists() and (
        kind := _diffusers_class(Path(path) / "config.json")
    ):
        classes = require("diffusers", "--model of a Diffusers component")
        with torch.device("meta"):
            built: nn.Module = getattr(classes, kind).from_config(path)
            return built
    transformers = require("transformers", "--model")
    config = transformers.AutoConfig.from_pretrained(path)
    named = (getattr(transformers, name, None) for name in config.architectures or ())
    cls = next((one for one in named if one is not None), None)
    with torch.device("meta"):
        built = transformers.AutoModel.from_config(config) if cls is None else cls(config)
    return built


def _diffusers_class(path: Path) -> str | None:
    from lora_kernels.adapter_files import read_json

    return read_json(path).get("_class_name")


def whole(text: str, low: int = 0) -> int:
    """An argparse type: an integer of at least `low`."""
    if not text.isdecimal() or int(text) < low:
        raise argparse.ArgumentTypeError(f"got {text!r}, legal is an integer of at least {low}")
    return int(text)


def positive(text: str) -> int:
    """An argparse type."""
    return whole(text, 1)


def add_model(parser: argparse.ArgumentParser, required: bool = True) -> None:
    parser.add_argument("--model", required=required, help="a folder, or a name of the hub")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the base's weights")
    parser.add_argument("--device", help="default: cuda where there is a GPU, else cpu")


def add_data(parser: argparse.ArgumentParser, required: bool = True) -> None:
    given = parser.add_mutually_exclusive_group(required=required)
    given.add_argument("--text", type=Path, nargs="+", metavar="FILE", help="text files")
    given.add_argument("--data", type=Path, nargs="+", metavar="FILE", help="JSONL files")
    parser.add_argument("--length", type=positive, default=512, help="tokens in a row")
    parser.add_argument("--batch-size", type=positive, default=8, help="rows in a batch")


def documents(
    args: argparse.Namespace, words: Any, say: Callable[[str], object] = print
) -> list[texts.Example]:
    """The documents of --text or --data."""
    return texts.load(args.text or args.data, args.text is None, words, say)


def packed(
    examples: list[texts.Example], length: int, words: Any, argument: str
) -> list[texts.Row]:
    """Their rows. ValueError where nothing in them is to be predicted."""
    given = (words.pad_token_id, words.eos_token_id, 0)  # behind the text, where no target looks
    rows = texts.pack(examples, length, next(i for i in given if i is not None))
    if not rows:
        raise ValueError(f"{argument}: holds no token to predict; legal are two tokens and more")
    return rows


def loader(
    rows: list[texts.Row], batch_size: int, separate: bool, seed: int | None = None
) -> DataLoader[Any]:
    """Batches as Transformers' models take them, shuffled where there is a seed; `separate` gives
    the positions too, from which such models tell the documents of a row apart."""

    def collate(batch: list[texts.Row]) -> dict[str, Any]:
        ids, labels, positions = (
            torch.tensor([getattr(row, name) for row in batch])
            for name in ("ids", "labels", "positions")
        )
        found = {"input_ids": ids, "labels": labels}
        # With a cache Transformers' masks take the positions for those of one text.
        return found | ({"position_ids": positions, "use_cache": False} if separate else {})

    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return DataLoader(
        rows,  # type: ignore[arg-type]  # a list is a dataset
        batch_size,
        shuffle=seed is not None,
        collate_fn=collate,
        generator=generator,
    )


def targets(batch: dict[str, Tensor]) -> int:
    """Tokens that a batch's loss is the mean over."""
    return int((batch["labels"][:, 1:] != texts.IGNORED).sum())


@torch.no_grad()
def separates(model: nn.Module) -> bool:
    """Whether documents packed into one row, with positions of their own, do not see each other:
    asked of the model, by changing the first and looking at the second."""
    if not {"position_ids", "use_cache"} <= inspect.signature(model.forward).parameters.keys():
        return False
    device = next(model.parameters()).device
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]], device=device)
    training, _ = model.training, model.eval()
    try:
        one, other = (
            model(
                input_ids=torch.tensor([[first] * 4 + [1, 2, 1, 2]], device=device),
                position_ids=positions,
                use_cache=False,
            ).logits[0, 4:]
            for first in (0, 3)
        )
    finally:
        model.train(training)
    return torch.equal(one, other)
