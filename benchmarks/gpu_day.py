"""GPU tests, tuner, benchmarks and report in order, within a time budget, losing nothing.

    python -m benchmarks.gpu_day --minutes 9 --out DIR     # again and again with the same DIR

Each call gives every step its share of the minutes and stops it when they are over; what a step has
is in DIR at once, and the next call goes on from there. The tests' files run side by side, and the
tuner compiles in as many processes as there are CPUs; what is timed runs alone. Where calls run on
fresh machines, `--state FILE` keeps DIR in one archive that goes there and comes back. A machine
without git, environment or compiled kernels will do: the CUDA kernel is built first, where nvcc is.
Without a GPU the same steps run at tiny sizes in Triton's interpreter.
"""

import argparse
import ast
import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lora_kernels.tuning.table import replace_text

ROOT = Path(__file__).parents[1]
_TRIES = 4  # a tuner that died goes on past the candidate it died in
_TUNED = (("bf16", 0.6), ("fp16", 0.66), ("fp32", 0.7))  # and until when
_GRACE = 5.0  # seconds for a step to notice that its minutes are over


class Step(NamedTuple):
    commands: dict[str, list[str]]  # by name, side by side; "{minutes}": what they may take
    until: float  # share of the budget that is gone when they must end
    once: bool = False  # not again in a later call what has succeeded
    tries: int = 1
    environment: dict[str, str] = {}  # noqa: RUF012
    needs: tuple[str, ...] = ()  # packages, without which it is skipped

    def lacks(self) -> str:
        return ", ".join(name for name in self.needs if importlib.util.find_spec(name) is None)


_BUILD = {"LORA_KERNELS_BUILD_CUDA": "1", "LORA_KERNELS_BUILD_CPU": "0"}


def lacks_kernels() -> bool:
    """Whether the CUDA kernels could be built here and are not."""
    from lora_kernels.backends.native import extension

    return shutil.which("nvcc") is not None and has_gpu() and not extension.cuda_available()


def gpu_tests() -> list[str]:
    """Files with tests that need a GPU."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(file.relative_to(ROOT)) for file in files if "mark.gpu" in file.read_text()]


_LONG = "tests/backends/triton/test_gpu_triton.py"  # a process for each of its tests
_TESTS = ("pytest", "hypothesis")
# Reads and writes of the kernels that no compiler of ours lays out.
HAND_WRITTEN = "tests/backends/cuda/test_gpu_decode.py"
SANITIZER = ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "1")


def parts(file: str) -> list[str]:
    """What a process each is given of a file of tests."""
    if file != _LONG:
        return [file]
    found = [node for node in ast.parse((ROOT / file).read_text()).body
             if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]  # fmt: skip
    return [f"{file}::{node.name}" for node in found]


def steps(out: Path, gpu: bool) -> list[Step]:
    python, kind = sys.executable, "gpu" if gpu else "cpu"

    def script(name: str, *options: str) -> list[str]:
        return [python, "-m", f"benchmarks.{name}", *options]

    table = out / "tuned.json"
    timed = ("--minutes", "{minutes}")
    small = {
        "tune": ("--jobs", str(os.cpu_count())), "layer": (), "model": (),
        "grouped": ("--device", "cuda"),
    } if gpu else {
        "tune": ("--quick", "--rows", "16", "--shapes", "32,32,8", "--rounds", "1", "2"),
        "layer": ("--scale", "64", "--seconds", "0.02", "--dtypes", "fp32"),
        "model": ("--size", "smoke", "--seconds", "0.1", "--new-tokens", "2"),
        "grouped": ("--rows", "16", "--tenants", "4", "--experts", "4", "--seconds", "0.02",
                    "--rounds", "1", "2", "--dtypes", "fp32"),
    }  # fmt: skip
    interpreter = {} if gpu else {"TRITON_INTERPRET": "1"}
    # Few rows among the first: decoding is what a short day would lack.
    first = ("--rows", "8192", "16", "1", "2048", "512", "64") if gpu else ()
    tests = {f"test {part}": [python, "-m", "pytest", "-q", "-m", "gpu", part]
             for file in gpu_tests() for part in parts(file)}  # fmt: skip
    tune = [
        python,
        "-m",
        "lora_kernels",
        "tune",
        "--out",
        str(table),
        *timed,
        *first,
        *small["tune"],
    ]
    layer = script("layer", "--out", str(out / f"layer-{kind}.json"), *timed, *small["layer"])
    model = script("model", "--out", str(out / f"model-{kind}.json"), *timed, *small["model"])
    groups = script("grouped", "--out", str(out / f"grouped-{kind}.json"), *timed,
                    *small["grouped"])  # fmt: skip
    report = script("report", "--results", str(out), "--page", str(out / "report.md"))
    build = [python, "setup.py", "build_ext", "--inplace"]
    ecosystem = "tests/backends/cuda/test_gpu_ecosystem.py"
    forced = [python, "-m", "pytest", "-q", "-m", "gpu", ecosystem]
    checked = [*SANITIZER, python, "-m", "pytest", "-q", "-m", "gpu", HAND_WRITTEN]
    return [
        *([Step({"build": build}, 0.15, once=True, environment=_BUILD)] if lacks_kernels() else []),
        Step(tests, 0.35, once=True, needs=_TESTS),
        Step(
            {"ecosystem, forced": forced},
            0.4,
            once=True,
            environment={"LORA_KERNELS_BACKEND": "cuda"} if gpu else {},
            needs=(*_TESTS, "peft"),
        ),
        *(
            Step(
                {f"tune {dtype}": [*tune, "--dtype", dtype]},
                until,
                tries=_TRIES,
                environment=interpreter,
            )
            for dtype, until in _TUNED
        ),
        Step({"layer": layer}, 0.8, needs=("peft",)),
        Step({"grouped": groups}, 0.84, needs=("peft", "transformers")),
        Step({"model": model}, 0.9, needs=("peft", "transformers")),
        Step({"report": report}, 0.93, needs=("matplotlib",)),
        *(
            [Step({"sanitizer": checked}, 0.96, once=True, needs=_TESTS)]
            if gpu and shutil.which(SANITIZER[0])
            else []
        ),
        Step({"ecosystem, with the table": forced}, 1.0, once=True, needs=(*_TESTS, "peft")),
    ]


def stop(child: subprocess.Popen) -> None:
    """Asked first: the tuner then knows that the candidate it is at is not to blame."""
    child.terminate()
    try:
        child.wait(_GRACE)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


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

    def _together(self, step: Step, names: Sequence[str], left: float) -> dict[str, int | None]:
        """The exit statuses; None for what had to be stopped."""
        minutes = f"{max(0.0, left - 3 * _GRACE) / 60:.3f}"
        environment = {**os.environ, **step.environment}
        path = os.pathsep.join([str(ROOT), *filter(None, [environment.get("PYTHONPATH")])])
        deadline = time.monotonic() + left
        with (self.out / "log.txt").open("a") as log, contextlib.ExitStack() as stack:
            running = {}
            for name in names:
                command = [part.replace("{minutes}", minutes) for part in step.commands[name]]
                said = stack.enter_context(tempfile.TemporaryFile("w+"))
                child = subprocess.Popen(
                    command, cwd=ROOT, env={**environment, "PYTHONPATH": path}, stdout=said,
                    stderr=subprocess.STDOUT,
                )  # fmt: skip
                running[name] = (command, said, child)
            found: dict[str, int | None] = {}
            for name, (command, said, child) in running.items():
                try:
                    found[name] = child.wait(max(0.0, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    stop(child)
                    found[name] = None
                said.seek(0)
                log.write(f"\n== {name}: {' '.join(command)}\n{said.read()}")
                log.flush()
        return found

    def run(self, step: Step) -> None:
        lacking = step.lacks()
        if lacking:
            for name in step.commands:
                self.state[name] = {"status": None, "skipped": f"{lacking}: not installed"}
                print(f"{name}: skipped, {lacking}: not installed", flush=True)
            replace_text(self.file, json.dumps(self.state, indent=1) + "\n")
            return
        done = {name for name in step.commands if step.once and self.status(name) == 0}
        for name in done:
            print(f"{name}: done before")
        names = [name for name in step.commands if name not in done]
        begin = self.spent()
        tried: dict[str, int | None] = {}
        for _ in range(step.tries):
            left = step.until * self.budget - self.spent()
            if left <= _GRACE or not names:
                break
            tried |= self._together(step, names, left)
            names = [name for name in names if tried[name] != 0]
        seconds = round(self.spent() - begin, 1)
        for name in step.commands:
            if name in tried:
                status = tried[name]
                self.state[name] = {"status": status, "seconds": seconds}
                said = {0: "ok", None: "stopped: its time was over"}
                print(f"{name}: {said.get(status, f'exit status {status}')}, {seconds} s")
            elif name not in done:
                print(f"{name}: no time left")
        sys.stdout.flush()
        replace_text(self.file, json.dumps(self.state, indent=1) + "\n")

    def status(self, name: str) -> int | None:
        """Of its last run; None if it was stopped or never ran."""
        return self.state.get(name, {}).get("status")

    def failed(self, name: str) -> bool:
        """Or was stopped, or never ran; what was skipped did not."""
        return self.status(name) != 0 and "skipped" not in self.state.get(name, {})


def pack(out: Path, state: Path) -> None:
    draft = state.with_name(state.name + ".part")
    with tarfile.open(draft, "w:gz") as archive:
        for path in sorted(out.iterdir()):
            if path.resolve() not in (state.resolve(), draft.resolve()):
                archive.add(path, path.name)
    os.replace(draft, state)


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
    """Returns 0 if all has succeeded, in this call or (the tests) before."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9, help="budget of this call")
    parser.add_argument("--out", type=Path, required=True, help="folder of everything it makes")
    parser.add_argument("--state", type=Path, help="an archive of that folder, read and written")
    parser.add_argument("--dry-run", action="store_true", help="say what would run")
    args = parser.parse_args(arguments)
    out, gpu = args.out.resolve(), has_gpu()
    out.mkdir(parents=True, exist_ok=True)
    if args.state and args.state.exists():
        with tarfile.open(args.state) as archive:
            archive.extractall(out, filter="data")
    day = Day(out, args.minutes)
    planned = steps(out, gpu)
    if args.dry_run:
        for step in planned:
            for command in step.commands.values():
                print(f"until {step.until * args.minutes:5.2f} min  {' '.join(command)}")
        return 0
    for step in planned:
        day.run(step)
        if gpu and any(name.startswith("tune") for name in step.commands):
            install(out)
        if args.state:  # after every step: the next may outlive the machine
            pack(out, args.state)
    print(f"{day.spent():.0f} s; everything is in {args.out}")
    return int(any(day.failed(name) for step in planned for name in step.commands))


if __name__ == "__main__":
    raise SystemExit(main())
