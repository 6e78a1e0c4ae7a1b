"""examples/quickstart.ipynb runs from top to bottom; what it shows it asserts itself.

In a Jupyter kernel where nbclient and ipykernel are installed, else as one script."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "examples" / "quickstart.ipynb"
CELLS = json.loads(NOTEBOOK.read_text())["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
SECONDS = 600
for package in ("transformers", "peft", "tokenizers", "matplotlib"):
    pytest.importorskip(package)


def by_script(folder):
    script = folder / "quickstart.py"
    script.write_text("\n".join("".join(cell["source"]) for cell in CODE))
    result = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=SECONDS
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def by_kernel():
    import nbclient
    import nbformat

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    place = {"metadata": {"path": str(NOTEBOOK.parent)}}
    nbclient.NotebookClient(notebook, timeout=SECONDS, resources=place).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    return "".join(output.text for output in outputs if output.output_type == "stream")


def test_the_quickstart_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("QUICKSTART_STEPS", "8")
    monkeypatch.setenv("PYTHONPATH", f"{NOTEBOOK.parents[1]}{os.pathsep}{NOTEBOOK.parent}")
    if all(importlib.util.find_spec(package) for package in ("nbclient", "ipykernel")):
        shown = by_kernel()
    else:
        monkeypatch.setenv("MPLBACKEND", "Agg")
        shown = by_script(tmp_path)
    for words in (
        "held-out loss", "adapter_model.safetensors", "PEFT's logits differ", "merged, the logits",
        "times as long as the fused one", "self-check",
    ):  # fmt: skip
        assert words in shown


def test_it_is_kept_without_outputs():
    assert not any(cell["outputs"] or cell["execution_count"] for cell in CODE)
