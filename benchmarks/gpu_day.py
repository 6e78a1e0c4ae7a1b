"""GPU tests, tuner, benchmarks and report in order, within a time budget, losing nothing.

    python benchmarks/gpu_day.py --minutes 9 --out DIR     # again and again with the same DIR

Each call gives every step its share of the minutes and stops it when they are over; what a step has
is in DIR at once, and the next call goes on from there. Where calls run on fresh machines, copy the
last DIR there first. Without a GPU the same steps run at tiny sizes in Triton's interpreter.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from store import replace_text

ROOT = Path(__file__).parents[1]
HERE = Path(__file__).parent
_TRIES = 4  # a tuner that died goes on past the candidate it died in
_GRACE = 5.0  # seconds for a step to notice that its minutes are over


class Step(NamedTuple):
    name: str
    command: list[str]  # "{minutes}" stands for what it may take
    until: float  # share of the budget that is gone when it must end
    once: bool = False  # not again in a later call when it has succeeded
    tries: int = 1
    environment: dict[str, str] = {}  # noqa: RUF012


def gpu_tests() -> list[str]:
    """Files with tests that need a GPU."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    return [f"tests/{file.name}" for file in files if "mark.gpu" in file.read_text()]


def steps(out: Path, gpu: bool) -> list[Step]:
    python, kind = sys.executable, "gpu" if gpu else "cpu"

    def script(name: str, *options: str) -> list[str]:
        return [python, str(HERE / name), *options]

    table = out / "tuned.json"
    timed = ("--minutes", "{minutes}")
    small = {"tune": (), "layer": (), "model": ()} if gpu else {
        "tune": ("--dtype", "fp16", "--sizes", "16,32,32,8", "--rounds", "1", "2"),
        "layer": ("--scale", "64", "--seconds", "0.02", "--dtypes", "fp32"),
        "model": ("--size", "smoke", "--seconds", "0.1", "--new-tokens", "2"),
    }  # fmt: skip
    interpreter = {} if gpu else {"TRITON_INTERPRET": "1"}
    tests = gpu_tests()
    return [
        *(
            Step(f"test {file}", [python, "-m", "pytest", "-q", "-m", "gpu", file],
                 0.3 * (index + 1) / len(tests), once=True)
            for index, file in enumerate(tests)
        ),
        Step("tune", script("tune.py", "--out", str(table), *timed, *small["tune"]), 0.58,
             tries=_TRIES, environment=interpreter),
        Step("layer", script("layer.py", "--out", str(out / f"layer-{kind}.json"), *timed,
                             *small["layer"]), 0.86),
        Step("model", script("model.py", "--out", str(out / f"model-{kind}.json"), *timed,
                             *small["model"]), 0.95),
        Step("report", script("report.py", "--results", str(out), "--readme",
                              str(out / "report.md")), 1.0),
    ]  # fmt: skip


class Day:
    """What ran so far, in `day.json`; what it said, in `log.txt`."""

    def __init__(self, out: Path, minutes: float) -> None:
        self.out, self.budget = out, 60 * minutes
        self.begin = time.monotonic()
        self.file = out / "day.json"
        self.state: dict[str, dict] = {}
        if self.file.exists():
            self.state = json.loads(self.file.read_text())

    def spent(self) -> float:
        return time.monotonic() - self.begin

    def _once(self, step: Step, left: float) -> int | None:
        """The exit status; None if it had to be stopped."""
        minutes = f"{max(0.0, left - 3 * _GRACE) / 60:.3f}"
        command = [part.replace("{minutes}", minutes) for part in step.command]
        environment = {**os.environ, **step.environment}
        path = os.pathsep.join([str(ROOT), *filter(None, [environment.get("PYTHONPATH")])])
        with (self.out / "log.txt").open("a") as log:
            log.write(f"\n== {step.name}: {' '.join(command)}\n")
            log.flush()
            try:
                return subprocess.run(
                    command, cwd=ROOT, env={**environment, "PYTHONPATH": path}, stdout=log,
                    stderr=subprocess.STDOUT, timeout=left, check=False,
                ).returncode  # fmt: skip
            except subprocess.TimeoutExpired:
                return None

    def run(self, step: Step) -> None:
        if step.once and self.state.get(step.name, {}).get("status") == 0:
            print(f"{step.name}: done before")
            return
        status, tried, begin = None, False, self.spent()
        for _ in range(step.tries):
            left = step.until * self.budget - self.spent()
            if left <= _GRACE:
                break
            tried, status = True, self._once(step, left)
            if status == 0:
                break
        if not tried:
            print(f"{step.name}: no time left")
            return
        seconds = round(self.spent() - begin, 1)
        self.state[step.name] = {"status": status, "seconds": seconds}
        replace_text(self.file, json.dumps(self.state, indent=1) + "\n")
        said = {0: "ok", None: "stopped: its time was over"}.get(status, f"exit status {status}")
        print(f"{step.name}: {said}, {seconds} s", flush=True)


def install(out: Path) -> None:
    """The table where the package looks for it, so that what follows is measured with it."""
    import torch

    from lora_kernels.backends.cuda import tables

    if (out / "tuned.json").exists():
        tables.TUNED.mkdir(exist_ok=True)
        name = tables.file_name(torch.cuda.get_device_name())
        shutil.copyfile(out / "tuned.json", tables.TUNED / name)


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 unless a step that ended by itself failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9, help="budget of this call")
    parser.add_argument("--out", type=Path, required=True, help="folder of everything it makes")
    parser.add_argument("--dry-run", action="store_true", help="say what would run")
    args = parser.parse_args(arguments)
    out, gpu = args.out.resolve(), has_gpu()
    out.mkdir(parents=True, exist_ok=True)
    day = Day(out, args.minutes)
    planned = steps(out, gpu)
    if args.dry_run:
        for step in planned:
            print(f"until {step.until * args.minutes:5.2f} min  {' '.join(step.command)}")
        return 0
    for step in planned:
        day.run(step)
        if step.name == "tune" and gpu:
            install(out)
    print(f"{day.spent():.0f} s; everything is in {args.out}")
    return int(any(day.state.get(step.name, {}).get("status") for step in planned))


if __name__ == "__main__":
    raise SystemExit(main())
