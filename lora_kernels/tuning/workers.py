"""The process that runs candidates, as who started it sees it: hangs, deaths, progress."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from lora_kernels.progress import is_shown
from lora_kernels.tuning.table import Candidate, replace_text, to_json, touch_lock

_MOST_CRASHES = 2  # outside of any candidate


class Told:
    """What the user sees meanwhile: a bar, or `lines`."""

    def __init__(self, bar: Any, lines: bool) -> None:
        self.lines, self._bar = lines, bar
        self._known: int | None = None

    def see(self, path: Path) -> None:
        """What the table says now."""
        if not is_shown(self._bar):
            return
        content = _content(path)
        known, trying = len(content.get("buckets", ())), content.get("trying", {})
        if self._known is not None:
            self._bar.update(known - self._known)
        self._known = known
        self._bar.set_postfix_str(trying.get("plan", ""))


def supervise(
    path: Path, minutes: float, limit: float, options: dict[str, Any], told: Told
) -> bool:
    """Workers one after the other until one ends well; whether all was done."""
    end = time.monotonic() + 60 * minutes
    command = [sys.executable, "-m", "lora_kernels.tuning.worker", "--out", str(path)]
    for name, value in options.items():
        command += [f"--{name}", *_texts(value)]
    command += [] if told.lines else ["--quiet"]
    crashes = 0
    while True:
        minutes = max(0.0, end - time.monotonic()) / 60
        child = subprocess.Popen([*command, "--minutes", str(minutes)])
        try:
            status, hung = _watch(child, path, limit, max(limit, 30 * minutes), told)
        except BaseException:  # Ctrl-C: the candidate is not to blame
            child.terminate()
            child.wait()
            raise
        if status == 0:
            break
        content = _content(path)
        mark = content.get("trying")
        if mark is None:
            crashes += 1
            if crashes == _MOST_CRASHES:
                raise RuntimeError(f"tune: the worker ended with {status} twice; see its output")
            continue
        if hung:
            mark["why"] = f"it hung: no result in {limit:g} s"
            replace_text(path, to_json(content))
        candidate = Candidate(mark["plan"], mark["tiles"])
        why = "hung" if hung else f"took its process along (exit status {status})"
        if told.lines:
            print(f"{candidate} {why}: struck out", flush=True)
    finished: bool = end > time.monotonic()
    return finished


def _texts(value: object) -> list[str]:
    return [str(each) for each in (value if isinstance(value, (tuple, list)) else (value,))]


def _watch(
    child: "subprocess.Popen[bytes]", path: Path, limit: float, compiling: float, told: Told
) -> tuple[int, bool]:
    """(exit status, whether it was killed because nothing came of a candidate in time). Before the
    first candidate others may be compiled ahead."""
    seen, since = None, time.monotonic()
    while child.poll() is None:
        time.sleep(0.1)
        touch_lock(path)
        try:
            now = path.stat().st_mtime_ns
        except FileNotFoundError:
            now = None
        if now != seen:
            seen, since = now, time.monotonic()
            told.see(path)
            continue
        idle = time.monotonic() - since
        if idle > limit and (idle > compiling + limit or "trying" in _content(path)):
            child.kill()
            return child.wait(), True
    return child.returncode, False


def _content(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text())) if path.exists() else {}
