"""Kept results over time: `make history`.

    python -m benchmarks.history [--out bench_output/history.png]

Each result file as every commit of it has it. A line is one machine, versions aside, and one
call: what `lora_kernels` takes over what the frozen layer takes in the same run, by the day of the
commit. Only what was measured more than once is drawn; a clone without history has nothing.
"""

import argparse
import json
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from benchmarks.peers import OURS

ROOT = Path(__file__).resolve().parents[1]
RESULTS = "benchmarks/results"
SHAPE = ("layer", "what", "mode", "M", "K", "N", "r", "dtype", "dropout")


class Point(NamedTuple):
    machine: str
    call: str
    day: datetime
    ratio: float


def git(*words: str, root: Path) -> str:
    done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True)
    return done.stdout


def versions(root: Path) -> Iterator[tuple[datetime, dict]]:
    """Every result file that a commit wrote, from the oldest on."""
    log = git("log", "--reverse", "--format=@%H %cI", "--name-only", "--diff-filter=AM", "--",
              f"{RESULTS}/*.json", root=root)  # fmt: skip
    for line in filter(None, log.splitlines()):
        if line.startswith("@"):
            commit, day = line[1:].split()
        else:
            content = json.loads(git("show", f"{commit}:{line}", root=root))
            if "rows" in content and "machine" in content:
                yield datetime.fromisoformat(day), content


def points(day: datetime, content: dict) -> Iterator[Point]:
    """Of one result file: a row is of one peer, or has the peers' timings by name."""
    machine = content["machine"]
    name = machine.get("gpu") or f"{machine['cpu']}, {machine['cpu_capability']}"
    name = f"{name}, {machine['threads']} threads" if not machine.get("gpu") else name
    for row in content["rows"]:
        shape = " ".join(f"{key}={row[key]}" for key in SHAPE if row.get(key) is not None)
        if row.get("peer") == OURS:
            timings = {key: v for key, v in row.items() if isinstance(v, dict) and "ratio" in v}
            if "ratio" in row:
                timings["step"] = row
        else:
            timings = {"call": row[OURS]} if isinstance(row.get(OURS), dict) else {}
        for key, timing in timings.items():
            yield Point(name, f"{key}: {shape}", day, timing["ratio"])


def series(root: Path) -> dict[tuple[str, str], list[tuple[datetime, float]]]:
    """{(machine, call): its ratios by day}, of what has more than one; a file that a commit left
    as it was measured before counts once."""
    found: dict[tuple[str, str], dict[datetime, float]] = defaultdict(dict)
    measured = set()
    for day, content in versions(root):
        for point in points(day, content):
            key = (*point[:2], content["machine"].get("commit"), point.ratio)
            if key not in measured:
                measured.add(key)
                found[point.machine, point.call][point.day] = point.ratio
    return {key: sorted(by_day.items()) for key, by_day in found.items() if len(by_day) > 1}


def draw(lines: dict[tuple[str, str], list[tuple[datetime, float]]], path: Path) -> None:
    """A panel for each machine."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    machines = sorted({machine for machine, _ in lines})
    figure, panels = pyplot.subplots(
        len(machines), figsize=(9, 3.6 * len(machines)), layout="constrained", squeeze=False
    )
    for axes, machine in zip(panels[:, 0], machines, strict=True):
        for (of, call), values in lines.items():
            if of == machine:
                days, ratios = zip(*values, strict=True)
                axes.plot(days, ratios, marker="o", markersize=3, linewidth=1, label=call)
        axes.axhline(1, color="#8a8f98", linewidth=0.6)
        axes.set(title=machine, ylabel="time / frozen layer")
        axes.spines[["top", "right"]].set_visible(False)
        if len(axes.get_lines()) <= 13:
            axes.legend(frameon=False, fontsize=6)
    figure.autofmt_xdate()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "bench_output" / "history.png")
    args = parser.parse_args()
    lines = series(ROOT)
    for (machine, call), values in sorted(lines.items()):
        print(f"{machine} | {call}: {' '.join(f'{day:%Y-%m-%d} {r:.3f}' for day, r in values)}")
    if not lines:
        print("no call was measured twice on one machine in this clone's history")
        return
    draw(lines, args.out)
    print(f"{args.out}: {len(lines)} calls measured more than once")


if __name__ == "__main__":
    main()
