"""Replacing files: what is left of killed saves, permissions, and what is no regular file."""

import os
import subprocess
import sys

import pytest

from lora_kernels.files import open_regular, replace_together

KILLED = """
import os, signal, sys
from pathlib import Path
from lora_kernels.files import replace_together
def write(path):
    Path(path).write_bytes(b"half")
    print(path, flush=True)
    sys.stdin.read(1)
replace_together({Path(sys.argv[1]): write})
"""


def saver(path):
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    return process, process.stdout.readline().strip()


def test_a_save_takes_away_what_dead_savers_left_and_nothing_else(tmp_path):
    target, foreign = tmp_path / "file", tmp_path / ".file.swp"
    foreign.write_text("an editor's")
    dead, left = saver(target)
    live, held = saver(target)
    dead.kill()
    dead.wait()
    assert os.path.exists(left)
    replace_together({target: lambda path: open(path, "wb").close()})
    assert {path.name for path in tmp_path.iterdir()} == {
        "file", ".file.swp", os.path.basename(held)
    }  # fmt: skip
    live.communicate("x")
    assert live.returncode == 0
    assert target.read_bytes() == b"half"
    assert {path.name for path in tmp_path.iterdir()} == {"file", ".file.swp"}


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_permissions_are_those_of_a_new_file(tmp_path, mask, monkeypatch):
    before = os.umask(mask)
    monkeypatch.setattr(os, "umask", None)  # another thread would make its files under it
    try:
        for _ in range(2):
            replace_together({tmp_path / "file": lambda path: open(path, "wb").close()})
            assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~mask
    finally:
        monkeypatch.undo()
        os.umask(before)


def test_the_folder_is_flushed_too(tmp_path, monkeypatch):
    flushed, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda d: (flushed.append(os.fstat(d).st_ino), fsync(d)))
    replace_together({tmp_path / "file": lambda path: open(path, "wb").close()})
    assert flushed == [(tmp_path / "file").stat().st_ino, tmp_path.stat().st_ino]


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", "/dev/null"):
        with pytest.raises(ValueError, match=f"{path}: not a regular file"):
            open_regular(path)
    with pytest.raises(FileNotFoundError, match="nowhere: no such file"):
        open_regular(tmp_path / "nowhere")
