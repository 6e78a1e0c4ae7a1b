"""Import is inert, optional packages are optional, and modules import only from floors below."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "lora_kernels"
OPTIONAL = ("triton", "transformers", "peft", "safetensors", "matplotlib")

# A module imports only from lower floors; a package's name stands for all that lies in it, and
# __init__ for what is taken from the library as its users do.
FLOORS = {
    "_env": -2,
    "branch": -3,
    "_contract": -2.5,
    "_checks": -2,
    "backends": -1,
    "_dispatch": -1,
    "rules": -1,
    "_ops": 0,
    "functional": 1,
    "sharding": -2,
    "offloading": -2,
    "bases": -1,
    "nn": 2,
    "files": -2,
    "patterns": -2,
    "adapter_files": -1.5,
    "peft_config": -1,
    "formats": 3.15,
    "options": -2,
    "names": -2,
    "bypass": 3,
    "adapters": 3.1,
    "targets": 3.1,
    "rank": 3.1,
    "peft_targets": 3.15,
    "checkpoint": 3.2,
    "ahead": 3,
    "convert": 3.3,
    "merged": 3.4,
    "check": 3.4,
    "distributed": 3.3,
    "recipes": 4,
    "__init__": 4.5,
    "integrations": 5,
    "doctor": 5,
    "__main__": 5.1,
}


def run(code):
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def loaded_after(statement):
    return set(run(f"import sys; {statement}; print(*set({OPTIONAL}) & sys.modules.keys())"))


def test_import_loads_no_optional_package_and_starts_no_cuda():
    assert loaded_after("import torch") == set()
    assert loaded_after("import lora_kernels") == set()
    out = run(
        "import lora_kernels, torch;"
        "print(torch.cuda.is_initialized(), lora_kernels.lora_linear.__module__)"
    )
    assert out == ["False", "lora_kernels.functional"]


@pytest.mark.parametrize("first", ["torch.utils.flop_counter", "lora_kernels"])
def test_flops_are_counted_whichever_is_imported_first(first):
    out = run(f"""
import importlib, sys
importlib.import_module({first!r})
finders = len(sys.meta_path)
import lora_kernels, torch
from torch.utils.flop_counter import FlopCounterMode
print(finders - len(sys.meta_path))
counter = FlopCounterMode(display=False)
with counter, torch.inference_mode():
    lora_kernels.lora_linear(torch.ones(3, 8), torch.ones(5, 8), torch.ones(2, 8), torch.ones(5, 2))
print(counter.get_total_flops())
""")
    waited = int(first == "lora_kernels")  # for the counter, with a finder that is gone now
    assert out == [str(waited), str(2 * 3 * (8 * 5 + 2 * (8 + 5)))]


def test_the_library_works_without_the_optional_packages():
    """safetensors is asked for only where a file is read or written, and says so itself."""
    out = run(f"""
import sys
for name in {OPTIONAL}:
    sys.modules[name] = None
import torch
from torch import nn
import lora_kernels
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
x = torch.randn(3, 8)
before = model(x)
report = lora_kernels.apply_lora(model, 2)
print(len(report.replaced), torch.equal(model(x), before))
model(x).sum().backward()
print(model[2].lora_B.grad.abs().sum().item() > 0)
try:
    lora_kernels.save_adapter(model, "nowhere")
except ImportError as error:
    print("safetensors" in str(error))
lora_kernels.merge_lora(model)
lora_kernels.remove_lora(model)
print(torch.equal(model(x), before))
""")
    assert out == ["2", "True", "True", "True", "True"]


def imports(tree, package, modules):
    """The parts of the library that a module imports, with line numbers; also within functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "lora_kernels":
                    yield [*alias.name.split("."), "__init__"][1], node.lineno
        elif isinstance(node, ast.ImportFrom):
            parts = (node.module or "").split(".")
            if node.level:
                parts = [*package[: len(package) - node.level + 1], *filter(None, parts)]
            if parts[0] != "lora_kernels":
                continue
            if len(parts) > 1:
                yield parts[1], node.lineno
            else:
                for alias in node.names:
                    name = alias.name if alias.name in modules else "__init__"
                    yield name, node.lineno


def floor_of(part):
    assert part in FLOORS, f"lora_kernels.{part} has no floor yet: give it one in FLOORS"
    return FLOORS[part]


def violations(path, source, modules):
    inside = path.relative_to(PACKAGE.parent).with_suffix("").parts
    part = inside[1]
    for imported, line in imports(ast.parse(source), list(inside[:-1]), modules):
        if imported != part and floor_of(imported) >= floor_of(part):
            yield f"{path.name}:{line}: {part} imports {imported}, which is not below it"


MODULES = {p.stem for p in PACKAGE.glob("*.py")} | {
    p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists()
}


@pytest.mark.parametrize(
    "path",
    sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py"),
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_a_module_imports_only_from_lower_floors(path):
    floor_of(path.relative_to(PACKAGE).with_suffix("").parts[0])
    assert not list(violations(path, path.read_text(), MODULES))


@pytest.mark.parametrize(
    "line",
    [
        "from lora_kernels.nn import FusedLoRALinear",
        "import lora_kernels.nn",
        "from lora_kernels import nn",
        "from . import nn",
        "from .nn import FusedLoRALinear",
        "def f():\n    from lora_kernels.convert import apply_lora",
        "from lora_kernels import apply_lora",
        "import lora_kernels",
    ],
)
def test_the_rule_on_floors_sees_every_form_of_import(line):
    assert len(list(violations(PACKAGE / "functional.py", line, MODULES))) == 1
    assert not list(violations(PACKAGE / "functional.py", "import torch.nn\nimport os", MODULES))
