"""Result files: {"machine": {...}, "rows": [...]}, on disk after every row, taken up where they
ended."""

import json
import os
from collections.abc import Iterable
from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Write the file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    draft.write_text(text)
    os.replace(draft, path)


def to_json(document: dict) -> str:
    """JSON with one row or bucket a line, so that changes read well and files stay short."""
    lines = []
    for key, value in document.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            body = ",\n".join(f"  {json.dumps(entry, ensure_ascii=False)}" for entry in value)
            lines.append(f" {json.dumps(key)}: [\n{body}\n ]")
        else:
            lines.append(f" {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


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
