"""Homes that cannot be read or written, or are not there: calls go on, `tune` says what to set."""

import json
import os
from pathlib import Path

import pytest
import torch

import lora_kernels
from lora_kernels import __main__ as command_line
from lora_kernels import backends, tuning
from lora_kernels.backends.cuda import background, tables


def write(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"gpu": "A Card", "versions": {"triton": "3"}, "buckets": [],
               "proven": [tables.proof("aten", "bfloat16", False)]}  # fmt: skip
    path.write_text(json.dumps(content))


def refuse(monkeypatch, name: str, folder: Path) -> None:
    """Makes a method of Path one that this user may not call within a folder."""
    plain = getattr(Path, name)

    def method(self, *args, **options):
        if folder in (self, *self.parents):
            raise PermissionError(13, "Permission denied", str(self))
        return plain(self, *args, **options)

    monkeypatch.setattr(Path, name, method)


def no_home(monkeypatch) -> None:
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", home)


@pytest.fixture
def on_gpu(gpu, monkeypatch):
    """Where `tune` would begin."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(tuning, "supervise", lambda *_: pytest.fail("a worker was begun"))
    return gpu


@pytest.mark.parametrize("home", ["unreadable file", "unreadable folder", "none"])
@pytest.mark.parametrize("packaged", [True, False])
def test_the_first_call_takes_the_next_table(on_gpu, monkeypatch, home, packaged):
    write(tables.cache_path(0))
    if packaged:
        write(on_gpu / "package" / "a_card.json")
    if home == "none":
        no_home(monkeypatch)
    else:
        refuse(monkeypatch, "read_text", on_gpu / "cache")
    if home == "unreadable folder":
        refuse(monkeypatch, "stat", on_gpu / "cache")
    backends.forget()
    chosen = backends.choose("cuda:0")
    assert chosen.name == ("cuda" if packaged else "reference")
    assert (tables.tuned(0) is not None) == packaged
    line = tables.describe(0)[0]
    assert ("package" in line) if packaged else line.startswith("no tuned table for this GPU")


def test_an_unreadable_table_is_named(on_gpu, monkeypatch, caplog):
    write(tables.cache_path(0))
    refuse(monkeypatch, "read_text", on_gpu / "cache")
    backends.forget()
    assert tables.tuned(0) is None
    (message,) = caplog.messages
    assert str(tables.cache_path(0)) in message
    assert "cannot be read: [Errno 13]" in message


def test_one_that_was_asked_for_must_be_readable(on_gpu, monkeypatch):
    write(on_gpu / "given.json")
    monkeypatch.setattr(tables._env, "TUNED", str(on_gpu / "given.json"))
    refuse(monkeypatch, "read_text", on_gpu / "given.json")
    backends.forget()
    with pytest.raises(ValueError, match=r"LORA_KERNELS_TUNED: .*given.json cannot be read"):
        tables.tuned(0)


@pytest.mark.parametrize("home", ["read-only", "a file", "none"])
def test_tune_says_where_it_cannot_write(on_gpu, monkeypatch, capsys, home):
    if home == "none":
        no_home(monkeypatch)
        where = "this user has no cache folder (Could not determine home directory.)"
    elif home == "read-only":
        refuse(monkeypatch, "mkdir", on_gpu / "cache")
        where = f"cannot be written to {on_gpu}/cache/lora_kernels/v1 (Permission denied)"
    else:
        (on_gpu / "cache").write_text("")
        where = f"cannot be written to {on_gpu}/cache/lora_kernels/v1 (Not a directory)"
    with pytest.raises(RuntimeError, match="set XDG_CACHE_HOME to a folder") as raised:
        lora_kernels.tune(shapes=[(8, 8, 2)])
    assert where in str(raised.value)
    assert "set LORA_KERNELS_TUNED to that file" in str(raised.value)
    assert command_line.main(["tune", "--shapes", "8,8,2"]) == 1
    assert capsys.readouterr().err == f"{raised.value}\n"


def test_a_lock_that_cannot_be_made(on_gpu, monkeypatch):
    """The folder is there, and takes no new file."""
    tables.cache_path(0).parent.mkdir(parents=True)
    plain = os.open

    def refusing(path, flags, *mode, **options):
        if str(path).endswith(".lock"):
            raise OSError(30, "Read-only file system", str(path))
        return plain(path, flags, *mode, **options)

    monkeypatch.setattr(os, "open", refusing)
    with pytest.raises(RuntimeError, match=r"v1 \(Read-only file system\); set XDG_CACHE_HOME"):
        lora_kernels.tune(shapes=[(8, 8, 2)])


def test_a_check_that_cannot_be_spawned_harms_no_call(on_gpu, monkeypatch, caplog):
    def popen(*_, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tables._env, "TUNE", "check")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(background.subprocess, "Popen", popen)
    backends.forget()
    assert backends.choose("cuda:0").name == "reference"
    assert "tuning could not be begun: [Errno 13]" in caplog.text
