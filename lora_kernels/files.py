"""Files that are replaced whole or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def replace_atomically(path: Path, write: Callable[[str], object]) -> None:
    """Writes beside `path`, flushes to disk, then renames over it."""
    replace_together({path: write})


def replace_together(writers: dict[Path, Callable[[str], object]]) -> None:
    """`replace_atomically` for files that belong together.

    All are on disk before the first is renamed, in the order given; where a rename fails the old
    ones come back. Only a machine that stops between two renames leaves old beside new.
    """
    with contextlib.ExitStack() as cleanup:
        new = {path: _temporary(path, cleanup) for path in writers}
        for path, write in writers.items():
            write(new[path])
            _settle(new[path])
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


def _temporary(path: Path, cleanup: contextlib.ExitStack) -> str:
    """The name of a file beside `path` that is gone in the end."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    cleanup.callback(Path(name).unlink, missing_ok=True)
    return name


def _settle(name: str) -> None:
    """Flushes to disk, with the permissions of an ordinary new file."""
    with open(name, "rb+") as file:
        os.fsync(file.fileno())
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(name, 0o666 & ~umask)


def _keep(path: Path, cleanup: contextlib.ExitStack) -> str:
    """A second name for a file's content, a copy where the file system has no links."""
    name = _temporary(path, cleanup)
    os.unlink(name)
    try:
        os.link(path, name)
    except OSError:
        shutil.copy2(path, name)
    return name
