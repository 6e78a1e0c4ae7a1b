"""Text and JSONL files as rows of tokens to train on; pure functions, of lists of integers."""

import bisect
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

IGNORED = -100  # the label of a token that is no target, as Transformers' models have it
ROLES = ("system", "developer", "user", "assistant", "tool")
_LEGAL = (
    'legal are {"text": ...}, {"prompt": ..., "completion": ...} and {"messages": [{"role": ...,'
    ' "content": ...}, ...]}'
)
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Example(NamedTuple):
    """A document's tokens, and of each the token itself where it is a target, else IGNORED."""

    ids: list[int]
    labels: list[int]

    @property
    def targets(self) -> int:
        """Tokens that are learned: the first follows from nothing."""
        return sum(label != IGNORED for label in self.labels[1:])


class Row(NamedTuple):
    """Tokens of one or more documents; `positions` begin anew with each, and with the padding."""

    ids: list[int]
    labels: list[int]
    positions: list[int]
    documents: int


def read_text(path: Path) -> str:
    """A file's text. ValueError for what is not UTF-8, or empty."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text, {error}") from None
    if not text.strip():
        raise ValueError(f"{path}: holds no text")
    return text


def read_records(path: Path) -> dict[int, dict[str, Any]]:
    """The records of a JSONL file by line, from 1; blank lines are passed over. ValueError names
    file and line."""
    records = {}
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            try:
                records[number] = _record(line)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from None
    return records


def _record(line: str) -> dict[str, Any]:
    """One of the three kinds, without other keys."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}; {_LEGAL}") from None
    if not isinstance(value, dict):
        raise ValueError(f"got a {type(value).__name__}, not an object; {_LEGAL}")
    kinds = [kind for kind in ("text", "prompt", "messages") if kind in value]
    if len(kinds) != 1:
        raise ValueError(f"got the keys {', '.join(map(repr, value)) or 'none'}; {_LEGAL}")
    if kinds == ["messages"]:
        return {"messages": _messages(value["messages"])}
    keys = ("prompt", "completion") if kinds == ["prompt"] else ("text",)
    for key in keys:
        if not isinstance(value.get(key), str):
            raise ValueError(f"{key!r}: got {_shown(value.get(key))}, legal is text")
    if not value[keys[-1]]:
        raise ValueError(f"{keys[-1]!r}: is empty, there is nothing to learn")
    return {key: value[key] for key in keys}


def _messages(value: object) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"'messages': got {_shown(value)}, legal is a list of messages")
    for index, message in enumerate(value):
        where = f"'messages'[{index}]"
        if not isinstance(message, dict):
            raise ValueError(f"{where}: got {_shown(message)}, legal is an object")
        if message.get("role") not in ROLES:
            raise ValueError(
                f"{where}: 'role': got {_shown(message.get('role'))}, legal are {', '.join(ROLES)}"
            )
        if not isinstance(message.get("content"), str):
            raise ValueError(
                f"{where}: 'content': got {_shown(message.get('content'))}, legal is text"
            )
    return value


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:60] + "..."


def marks_answers(tokenizer: Any) -> bool:
    """Whether the chat template tells which tokens are the assistant's."""
    return bool(_GENERATION.search(tokenizer.chat_template or ""))


def encode(record: dict[str, Any], tokenizer: Any) -> Example:
    """A record's tokens. Targets are all of a text, a completion alone, of messages the
    assistant's turns where the chat template marks them and else all; texts and completions end
    with the tokenizer's end of text.

    ValueError where messages have no chat template.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if "text" in record:
        ids = [*tokenizer(record["text"])["input_ids"], *end]
        return Example(ids, ids)
    if "prompt" in record:
        prompt = list(tokenizer(record["prompt"])["input_ids"])
        answer = tokenizer(record["completion"], add_special_tokens=False)["input_ids"]
        answer = [*answer, *end]
        return Example([*prompt, *answer], [*[IGNORED] * len(prompt), *answer])
    if not tokenizer.chat_template:
        raise ValueError(
            "'messages': the tokenizer has no chat template; legal are 'text', and 'prompt' with"
            " 'completion'"
        )
    marked = marks_answers(tokenizer)
    found = tokenizer.apply_chat_template(
        record["messages"], return_dict=True, return_assistant_tokens_mask=marked
    )
    ids = list(found["input_ids"])
    if not marked:
        return Example(ids, ids)
    mask = found["assistant_masks"]
    return Example(ids, [i if m else IGNORED for i, m in zip(ids, mask, strict=True)])


def split(examples: Sequence[Example], fraction: float) -> tuple[list[Example], list[Example]]:
    """(training, held out): every k-th document is held out, k = 1 / fraction; where there are
    fewer than k of them, the last part of each."""
    every = round(1 / fraction)
    if len(examples) >= every:
        train = [e for i, e in enumerate(examples) if (i + 1) % every]
        return train, list(examples[every - 1 :: every])
    train, held = [], []
    for ids, labels in examples:
        at = len(ids) - max(1, round(len(ids) * fraction))
        train.append(Example(ids[:at], labels[:at]))
        held.append(Example(ids[at:], labels[at:]))
    return train, held


def pieces(examples: Iterable[Example], length: int) -> list[Example]:
    """Documents cut into pieces of at most `length` tokens, without those that hold no target."""
    cut = (
        Example(ids[at : at + length], labels[at : at + length])
        for ids, labels in examples
        for at in range(0, len(ids), length)
    )
    return [piece for piece in cut if piece.targets]


def pack(examples: Iterable[Example], length: int, padding: int) -> list[Row]:
    """Rows of `length` tokens: each piece goes where the least room is left after it.

    No piece is learned from the one before it: its first token is no target, and positions begin
    anew. What is left of a row is padding, which is no target.
    """
    rows: list[list[Example]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), in order
    for piece in sorted(pieces(examples, length), key=lambda piece: -len(piece.ids)):
        size = len(piece.ids)
        at = bisect.bisect_left(room, (size, -1))
        if at < len(room):
            left, row = room.pop(at)
            rows[row].append(piece)
        else:
            left, row = length, len(rows)
            rows.append([piece])
        if left > size:
            bisect.insort(room, (left - size, row))
    return [_row(row, length, padding) for row in rows]


def _row(documents: list[Example], length: int, padding: int) -> Row:
    ids: list[int] = []
    labels: list[int] = []
    positions: list[int] = []
    for document in documents:
        ids += document.ids
        labels += [IGNORED, *document.labels[1:]]
        positions += range(len(document.ids))
    left = length - len(ids)
    return Row(
        [*ids, *[padding] * left],
        [*labels, *[IGNORED] * left],
        [*positions, *range(left)],
        len(documents),
    )


def load(
    paths: Sequence[Path], jsonl: bool, tokenizer: Any, say: Callable[[str], object]
) -> list[Example]:
    """The documents of files: a text file is one, of a JSONL file each line. ValueError names the
    file, and the line where there is one; `say` is told what is done otherwise than one may expect.
    """
    if not jsonl:
        return [encode({"text": read_text(path)}, tokenizer) for path in paths]
    examples = []
    chats = False
    for path in paths:
        for number, record in read_records(path).items():
            try:
                examples.append(encode(record, tokenizer))
            except Exception as error:  # templates raise their own
                raise ValueError(f"{path}:{number}: {error}") from error
            chats |= "messages" in record
    if chats and not marks_answers(tokenizer):
        say("the chat template does not mark the assistant's turns: all tokens are learned")
    return examples
