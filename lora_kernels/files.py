"""Files that are replaced whole or not at all, and files that are read from one opening."""

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows, where leftovers of killed saves stay
    fcntl = None  # type: ignore[assignment]  # looked at before use

_LEFTOVER = r"\.{}\.[0-9a-f]{{16}}\.saving"


def open_regular(path: Path) -> tuple[BinaryIO, int]:
    """(the open file, its size). ValueError for what is no regular file: a pipe would be waited
    for."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except OSError as error:
        if error.errno not in (errno.ENXIO, errno.EISDIR, errno.ENOTDIR):
            raise
        raise ValueError(f"{path}: not a regular file") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise ValueError(f"{path}: not a regular file")
    return os.fdopen(descriptor, "rb"), status.st_size


def replace_atomically(path: Path, write: Callable[[str], object]) -> None:
    """Writes beside `path`, flushes to disk, then renames over it."""
    replace_together({path: write})


def replace_together(writers: dict[Path, Callable[[str], object]]) -> None:
    """`replace_atomically` for files that belong together.

    All are on disk before the first is renamed, in the order given; where a rename fails the old
    ones come back. Only a machine that stops between two renames leaves old beside new. What
    earlier saves of these files left when they were killed is taken away.
    """
    _sweep(writers)
    with contextlib.ExitStack() as cleanup:
        new = {path: _temporary(path, cleanup) for path in writers}
        for path, write in writers.items():
            write(new[path])
            _hold(new[path], cleanup)  # a writer may have put another file there
            _flush(new[path])
        old = {path: _keep(path, cleanup) for path in writers if path.exists()}
        renamed = []
        try:
            for path, source in new.items():
                renamed.append(path)
                os.replace(source, path)
        except BaseException:
            for path in renamed:  # the last one perhaps not, then this changes nothing
                if path in old:
                    os.replace(old[path], path)
                else:
                    path.unlink(missing_ok=True)
            raise
        if hasattr(os, "O_DIRECTORY"):
            for folder in {path.parent for path in writers}:
                _flush(folder, os.O_RDONLY | os.O_DIRECTORY)


def _sweep(paths: Iterable[Path]) -> None:
    """Takes away the hidden files beside these that no living saver holds."""
    for path in paths:
        pattern = re.compile(_LEFTOVER.format(re.escape(path.name)))
        for other in path.parent.iterdir() if fcntl else ():
            if pattern.fullmatch(other.name):
                with contextlib.suppress(OSError), open(other, "rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    other.unlink()


def _name(path: Path) -> str:
    return str(path.with_name(f".{path.name}.{secrets.token_hex(8)}.saving"))


def _temporary(path: Path, cleanup: contextlib.ExitStack) -> str:
    """The name of a new file beside `path`, with an ordinary file's permissions, that is gone in
    the end."""
    while True:
        name = _name(path)
        os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        cleanup.callback(Path(name).unlink, missing_ok=True)
        with contextlib.suppress(FileNotFoundError):  # a sweep came before the lock
            _hold(name, cleanup)
            return name


def _hold(name: str, cleanup: contextlib.ExitStack) -> None:
    """Marks a file as a living saver's, so that no sweep takes it. FileNotFoundError where one
    was faster."""
    if fcntl is None:
        return
    descriptor = os.open(name, os.O_RDONLY)
    cleanup.callback(os.close, descriptor)
    with contextlib.suppress(OSError):  # a file system without locks: nothing is swept there
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    os.stat(name)


def _flush(path: str | Path, flags: int = os.O_RDWR) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _keep(path: Path, cleanup: contextlib.ExitStack) -> str:
    """A second name for a file's content, a copy where the file system has no links."""
    name = _name(path)
    cleanup.callback(Path(name).unlink, missing_ok=True)
    try:
        os.link(path, name)
    except OSError:
        shutil.copy2(path, name)
    with contextlib.suppress(FileNotFoundError):  # swept at once: there is nothing to go back to
        _hold(name, cleanup)
    return name
