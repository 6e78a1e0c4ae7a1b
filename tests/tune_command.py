"""The command `tune` in Triton's interpreter, with plans of a plugin."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SMALL = ("--rows", "16", "--shapes", "32,32,8", "--dtype", "fp16", "--rounds", "1", "2",
         "--seconds", "0", "--minutes", "15")  # fmt: skip


def run(code: list[str], *paths: Path | None, folder: Path, **variables: str):
    """Python in a folder, with the package and other paths; its output. Elsewhere than here: the
    folder that it runs in comes before the path."""
    path = [*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT)]
    path += [str(one) for one in paths if one is not None]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path),
        "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1", **variables,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, *code], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def tune(table: Path, *options: str, plugins: Path | None = None, **variables: str):
    """What the command printed."""
    if plugins is not None:
        options += ("--plugins", "standin")
    command = ["-m", "lora_kernels", "tune", *SMALL, "--out", str(table), *options]
    return run(command, plugins, folder=table.parent, **variables)
