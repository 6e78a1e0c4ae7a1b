"""examples/finetune_distributed.py under torchrun: workers killed in the middle, restarted by
torchrun and by hand, with the very results of a run that nobody touched."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from lora_kernels import apply_lora, load_adapter

EXAMPLES = Path(__file__).parents[2] / "examples"
STEPS, SAVE_EVERY = 80, 8  # so many that a slow reader still finds the workers at work


def run(out, *options, kill_at=()):
    """(exit status, output) of a torchrun of two workers; rank 1 is killed where these steps are
    reported, one a start."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        *options, "finetune_distributed.py", "--out", str(out), "--steps", str(STEPS),
        "--save-every", str(SAVE_EVERY), "--documents", "60", "--length", "32",
    ]  # fmt: skip
    path = os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    process = subprocess.Popen(
        command, cwd=EXAMPLES, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    # On SIGTERM it takes its workers along, which are in sessions of their own.
    watchdog = threading.Timer(240, process.terminate)
    watchdog.start()
    lines, worker, due = [], None, list(kill_at)
    for line in process.stdout:
        lines.append(line)
        if found := re.search(r"rank 1 of 2: process (\d+)", line):
            worker = int(found[1])
        found = re.search(r"step (\d+):", line)
        if found and due and worker and int(found[1]) >= due[0]:
            os.kill(worker, signal.SIGKILL)
            due.pop(0)
            worker = None
    status = process.wait()
    watchdog.cancel()
    assert not due, "".join(lines)
    return status, "".join(lines)


def result(folder):
    return json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    status, output = run(folder)
    assert status == 0, output
    return folder


def test_killed_workers_change_nothing(undisturbed, tmp_path):
    shutil.copy(undisturbed / "sequences.pt", tmp_path)
    status, output = run(tmp_path, "--max-restarts", "1", kill_at=(10, 44))
    assert status != 0, output
    assert not (tmp_path / "result.json").exists()
    starts = [int(n) for n in re.findall(r"rank 1 of 2: process \d+, from step (\d+)", output)]
    assert starts[0] == 0, output
    assert len(starts) == 2
    assert SAVE_EVERY <= starts[1] < STEPS

    cut_short = tmp_path / f"step-{STEPS - 1:06}"
    cut_short.mkdir()
    (cut_short / "__0_0.distcp").write_bytes(b"half a")
    status, output = run(tmp_path)
    assert status == 0, output
    (start,) = re.findall(r"resumed from .*step-(\d+)", output)
    assert starts[1] <= int(start) < STEPS - 1
    assert result(tmp_path) == result(undisturbed)
    one, two = (
        load_file(p / "adapter" / "adapter_model.safetensors") for p in (tmp_path, undisturbed)
    )
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_what_a_run_leaves_behind(undisturbed, monkeypatch):
    """A checkpoint without the base; an adapter that one process loads, as PEFT does."""
    from peft import PeftModel

    last = undisturbed / f"step-{STEPS:06}"
    keys = dcp.FileSystemReader(last).read_metadata().state_dict_metadata
    assert {"progress", "losses", "generator of rank 0", "generator of rank 1"} <= keys.keys()
    tensors = [key for key in keys if key.startswith("model.")]
    assert tensors
    assert all(key.endswith(("lora_A", "lora_B")) for key in tensors)
    kept = sorted(path.name for path in undisturbed.glob("step-*"))
    assert kept == [f"step-{STEPS - SAVE_EVERY:06}", last.name]

    losses = result(undisturbed)["losses"]
    assert sum(losses[-4:]) < sum(losses[:4])
    monkeypatch.syspath_prepend(EXAMPLES)
    import finetune_distributed as example

    _, test = torch.load(undisturbed / "sequences.pt")
    models = [example.build_model(512, 32).eval() for _ in range(3)]
    apply_lora(models[0], 8, alpha=16)
    load_adapter(models[0], undisturbed / "adapter")
    models[1] = PeftModel.from_pretrained(models[1], undisturbed / "adapter").eval()
    with torch.no_grad():
        ours, peft, base = (float(example.loss_of(model, test)) for model in models)
    expected = result(undisturbed)["held-out loss"]
    assert abs(ours - expected) <= 1e-6 * expected
    assert abs(peft - expected) <= 1e-6 * expected
    assert base - expected > 1e-3
