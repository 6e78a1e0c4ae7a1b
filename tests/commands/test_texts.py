"""Text and JSONL files as rows of tokens."""

import json
from pathlib import Path

import pytest

from lora_kernels.commands import texts
from lora_kernels.commands.texts import IGNORED, Example


def write(tmp_path, *records):
    path = tmp_path / "data.jsonl"
    lines = (r if isinstance(r, str) else json.dumps(r) for r in records)
    path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", r":2: not JSON: .*legal are \{\"text\""),
        ("[1]", r":2: got a list, not an object"),
        ("{}", r":2: got the keys none; legal are"),
        ('{"question": 1}', r":2: got the keys 'question'; legal are"),
        ('{"text": "a", "prompt": "b"}', r":2: got the keys 'text', 'prompt'"),
        ('{"text": 5}', r":2: 'text': got 5, legal is text"),
        ('{"text": ""}', r":2: 'text': is empty"),
        ('{"prompt": "a"}', r":2: 'completion': got null, legal is text"),
        ('{"messages": []}', r":2: 'messages': got \[\], legal is a list"),
        ('{"messages": ["a"]}', r":2: 'messages'\[0\]: got \"a\", legal is an object"),
        (
            '{"messages": [{"role": "bot", "content": "a"}]}',
            r":2: 'messages'\[0\]: 'role': got \"bot\", legal are system",
        ),
        (
            '{"messages": [{"role": "user", "content": 1}]}',
            r":2: 'messages'\[0\]: 'content': got 1",
        ),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    path = write(tmp_path, {"text": "fine"}, line)
    with pytest.raises(ValueError, match=r"data\.jsonl" + message):
        texts.read_records(path)


def test_files_without_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match=r"a\.txt: expected UTF-8"):
        texts.read_text(path)
    path.write_text(" \n")
    with pytest.raises(ValueError, match=r"a\.txt: holds no text"):
        texts.read_text(path)


def test_line_separators_of_unicode_end_no_record(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a\u2028b"}\n\n{"text": "c"}\n', encoding="utf-8")
    assert texts.read_records(path) == {1: {"text": "a\u2028b"}, 3: {"text": "c"}}


def test_a_completion_alone_is_learned(words):
    ids, labels = texts.encode({"prompt": "The name", "completion": " of it"}, words)
    assert words.decode(ids) == "The name of it<end>"
    assert words.decode([i for i in labels if i != IGNORED]) == " of it<end>"
    assert labels[: labels.count(IGNORED)] == [IGNORED] * labels.count(IGNORED)


CHAT = [
    {"role": "user", "content": "What is it?"},
    {"role": "assistant", "content": "A name."},
    {"role": "user", "content": "Thanks"},
    {"role": "assistant", "content": "Bye"},
]


def test_the_assistant_s_turns_are_learned(words):
    ids, labels = texts.encode({"messages": CHAT}, words)
    assert words.decode(ids).startswith("<user>What is it?\n<assistant>A name.")
    assert words.decode([i for i in labels if i != IGNORED]) == "A name.\nBye\n"


def test_without_marks_all_turns_are_learned_and_it_is_said(words, tmp_path, monkeypatch):
    monkeypatch.setattr(
        words, "chat_template", "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    said = []
    (example,) = texts.load([write(tmp_path, {"messages": CHAT})], True, words, said.append)
    assert example.labels == example.ids
    assert said == ["the chat template does not mark the assistant's turns: all tokens are learned"]
    monkeypatch.setattr(words, "chat_template", None)
    with pytest.raises(ValueError, match=r"data\.jsonl:1: 'messages': .* no chat template"):
        texts.load([tmp_path / "data.jsonl"], True, words, said.append)


def test_a_template_s_own_refusal_names_the_line(words, tmp_path, monkeypatch):
    monkeypatch.setattr(words, "chat_template", "{{ raise_exception('roles must alternate') }}")
    path = write(tmp_path, {"text": "a"}, {"messages": CHAT})
    with pytest.raises(ValueError, match=r"data\.jsonl:2: roles must alternate"):
        texts.load([path], True, words, print)


def numbered(*sizes):
    """Documents of tokens that tell document and place: 100, 101, ... 200, 201, ..."""
    return [
        Example(ids, ids)
        for ids in ([100 * (i + 1) + j for j in range(size)] for i, size in enumerate(sizes))
    ]


def test_packing_loses_nothing_and_no_document_is_learned_from_another():
    documents = numbered(5, 10, 3, 2, 20, 1)
    rows = texts.pack(documents, 8, padding=7)
    held = [i for row in rows for i in row.ids if i != 7]
    # The last document holds no target.
    assert sorted(held) == sorted(i for document in documents[:-1] for i in document.ids)
    for ids, labels, positions, _ in rows:
        assert len(ids) == len(labels) == len(positions) == 8
        for before, now, label, position in zip(
            ids, ids[1:], labels[1:], positions[1:], strict=False
        ):
            if label == IGNORED:
                assert now == 7 or position == 0
            else:
                assert label == now == before + 1
                assert position > 0
    learned = sum(label != IGNORED for row in rows for label in row.labels[1:])
    assert learned == sum(piece.targets for piece in texts.pieces(documents, 8))


def test_packing_fills_rows():
    rows = texts.pack(numbered(6, 5, 3, 2), 8, padding=0)
    assert sorted(row.positions for row in rows) == [
        [0, 1, 2, 3, 4, 0, 1, 2],
        [0, 1, 2, 3, 4, 5, 0, 1],
    ]


def test_padding_is_no_document():
    (row,) = texts.pack(numbered(5), 8, padding=7)
    assert row.ids == [100, 101, 102, 103, 104, 7, 7, 7]
    assert row.labels == [IGNORED, 101, 102, 103, 104, IGNORED, IGNORED, IGNORED]
    assert row.positions == [0, 1, 2, 3, 4, 0, 1, 2]
    assert row.documents == 1
    assert [row.documents for row in texts.pack(numbered(5, 3), 8, padding=0)] == [2]


def test_what_is_held_out():
    documents = numbered(*[4] * 12)
    train, held = texts.split(documents, 0.25)
    assert held == documents[3::4]
    assert sorted(train + held) == documents
    train, held = texts.split(numbered(40, 20), 0.1)
    assert [len(e.ids) for e in train] == [36, 18]
    assert [e.ids[0] for e in held] == [136, 218]


def test_documents_of_files(words, tmp_path):
    paths = [tmp_path / name for name in ("a.txt", "b.txt")]
    for path in paths:
        Path(path).write_text("The name of it")
    one, other = texts.load(paths, False, words, print)
    assert one == other
    assert one.ids[-1] == words.eos_token_id
