"""Real text that every Python has: the standard library's documentation and its source code."""

import ast
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.utils.data import DataLoader

_PACKAGES = (
    "asyncio", "collections", "concurrent/futures", "email", "html", "http", "importlib", "json",
    "logging", "multiprocessing", "unittest", "urllib", "xml/dom", "xml/etree",
)  # fmt: skip


def _sources() -> list[str]:
    library = Path(sysconfig.get_paths()["stdlib"])
    paths = [p for folder in ("", *_PACKAGES) for p in sorted((library / folder).glob("*.py"))]
    return [path.read_text(encoding="utf-8", errors="replace") for path in paths]


def _docstrings(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text and len(text) > 200:
                yield text


def documentation() -> list[str]:
    """The language reference behind `help()` and the library's longer docstrings."""
    from pydoc_data.topics import topics

    return [*topics.values(), *(text for source in _sources() for text in _docstrings(source))]


def source_code() -> list[str]:
    return _sources()


def held_out(documents: list[str]) -> tuple[list[str], list[str]]:
    """(training, held-out): every tenth document is held out; of a single one its last tenth."""
    if len(documents) < 10:
        documents = [d[i : i + 2000] for d in documents for i in range(0, len(d), 2000)]
    test = documents[9::10]
    return [d for i, d in enumerate(documents) if i % 10 != 9], test or documents[-1:]


def require_enough(documents: list[str], tokens: int) -> None:
    """ValueError where the texts cannot give `tokens` to train on, with a tenth held out.

    A token is two to three bytes of the texts here; five a token leave room for repetitive ones.
    """
    size, needed = sum(len(document.encode()) for document in documents), 5 * tokens
    if size < needed:
        raise ValueError(f"got {size} bytes of text; it takes at least {needed}")


def train_tokenizer(documents: Iterable[str], vocabulary: int) -> Tokenizer:
    """Byte-level BPE: any text can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def sequences(tokenizer: Tokenizer, documents: list[str], length: int, limit: int) -> Tensor:
    """[count, length] token ids, at most `limit` sequences spread evenly over the documents."""
    ids = [i for encoding in tokenizer.encode_batch(documents) for i in encoding.ids]
    whole = torch.tensor(ids[: len(ids) // length * length], dtype=torch.int64).view(-1, length)
    if len(whole) <= limit:
        return whole
    return whole[torch.linspace(0, len(whole) - 1, limit).long()]


def loader(data: Tensor, batch_size: int, *, shuffle: bool, seed: int = 0) -> DataLoader:
    """Batches as Transformers' models take them."""

    def collate(rows: list[Tensor]) -> dict[str, Tensor]:
        ids = torch.stack(rows)
        return {"input_ids": ids, "labels": ids}

    generator = torch.Generator().manual_seed(seed)
    return DataLoader(data, batch_size, shuffle=shuffle, collate_fn=collate, generator=generator)
