"""Result files: {"machine": {...}, "rows": [...]}, on disk after every row, taken up where they
ended."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

from lora_kernels.tuning.table import replace_text, to_json


class Results:
    """The rows of one machine, versions and commit. A file of others is set aside, not mixed in."""

    def __init__(self, path: Path | None, machine: dict) -> None:
        self.path, self.machine, self.rows = path, machine, []
        if path is None or not path.exists():
            return
        found = json.loads(path.read_text())
        if found.get("machine") == machine:
            self.rows = found["rows"]
        else:
            number = 1
            while (aside := path.with_name(f"{path.stem}.{number}.json")).exists():
                number += 1
            os.replace(path, aside)
            print(f"{path} is of another machine, version or commit: now {aside.name}", flush=True)

    def done(self, key: dict) -> bool:
        return any(key.items() <= row.items() for row in self.rows)

    def add(self, rows: Iterable[dict]) -> None:
        self.rows += rows
        if self.path is not None:
            document = {"machine": self.machine, "rows": self.rows}
            replace_text(self.path, to_json(document))
