"""The Hub kernel that `make hub` generates: relative imports, no other package, an op namespace of
its own, which lives beside ours in one process. `make hub` tries the whole tree."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "hub"))
import check  # noqa: E402
import generate  # noqa: E402


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    out = tmp_path_factory.mktemp("hub") / "tree"
    generate.generate(out)
    return out


def test_what_it_imports(tree):
    allowed = {*sys.stdlib_module_names, "torch", "triton"}
    sources = list(tree.joinpath("torch-ext").rglob("*.py"))
    assert len(sources) > 80
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            assert {name.split(".")[0] for name in names} <= allowed, (path, node.lineno)


@pytest.mark.parametrize(
    ("source", "depth", "wanted"),
    [
        ("from lora_kernels import a, _ops\n", 0, "from . import a, _registration as _ops\n"),
        ("from lora_kernels import _ops as o\n", 1, "from .. import _registration as o\n"),
        ("from lora_kernels._ops import f\n", 0, "from ._registration import f\n"),
        ("if a:\n    from lora_kernels.a.b import c\n", 2, "if a:\n    from ...a.b import c\n"),
        ("from lora_kernels_too import f\n", 0, "from lora_kernels_too import f\n"),
    ],
)  # fmt: skip
def test_imports_become_relative(source, depth, wanted):
    assert generate.moved(source, depth) == wanted


def test_a_form_of_import_that_cannot_be_moved_is_refused():
    with pytest.raises(ValueError, match="line 2"):
        list(generate.imported("import os\nimport lora_kernels.branch\n", ""))


def test_both_in_one_process(tree):
    """With equal results, and with the digests that say for which kernels a tuned table holds."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", check.BESIDE, str(tree / "build" / "torch-cpu")],
        env=environment, capture_output=True, text=True, cwd=tree,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    assert "_lora_kernels_cpu_" in run.stdout
