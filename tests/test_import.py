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
# __init__ for what is taken from a package as its users do. The insides of packages come after.
FLOORS = {}
FLOORS[""] = {
    "_namespace": -4,
    "_version": -3,
    "_env": -2,
    "branch": -3,
    "weights": -3,
    "_contract": -2.5,
    "_checks": -2,
    "backends": -1,
    "testing": -0.5,
    "_dispatch": -1,
    "rules": -1,
    "_ops": 0,
    "direct": 0.5,
    "quantized": 0.5,
    "norms": 0,
    "packed": 1.2,
    "packs": 1.3,
    "mlp": 1.4,
    "blocks": 3.4,
    "columns": 0.5,
    "scaled": 0.5,
    "embedding": 1,
    "convolution": 1,
    "functional": 1,
    "grouped": 1,
    "sharding": -2,
    "offloading": -2,
    "bases": -1,
    "nn": 2,
    "files": -2,
    "patterns": -2,
    "adapter_files": -1.5,
    "peft_config": -1,
    "formats": 3.15,
    "format_writers": 3.16,
    "gguf_adapters": 3.17,
    "options": -2,
    "names": -2,
    "progress": -2,
    "forwards": -2,
    "bypass": 3,
    "adapters": 3.1,
    "targets": 3.1,
    "tokens": 3.15,
    "rank": 3.1,
    "directions": 3.1,
    "peft_targets": 3.15,
    "checkpoint": 3.2,
    "ahead": 3,
    "tuning": 3.2,
    "convert": 3.3,
    "several": 3.4,
    "reference_model": 3.4,
    "merged": 3.4,
    "check": 3.4,
    "distributed": 3.3,
    "recipes": 4,
    "quantizing": 3.25,
    "eva": 4.2,
    "__init__": 4.5,
    "integrations": 5,
    "doctor": 5,
    "commands": 5.1,
    "__main__": 5.2,
}

FLOORS["tuning"] = {
    "cases": 0, "clock": 0, "guards": 0, "launched": 0, "machine": 0, "ranks": 0, "table": 0,
    "search": 1, "stamp": 1, "workers": 1, "worker": 2, "__init__": 2,
}  # fmt: skip
FLOORS["commands"] = {
    "__init__": 0,
    "texts": 0,
    "loading": 1,
    "folder": 1,
    "doctor": 1,
    "tune": 1,
    "evaluate": 2,
    "merge": 2,
    "convert": 2,
    "finetune": 3,
    "inspect": 3,
}
FLOORS["nn"] = {
    "tensors": 0,
    "named": 0.5,
    "merging": 1,
    "pissa": 2,
    "state": 3,
    "layer": 4,
    "linear": 5,
    "conv1d": 5,
    "embedding": 5,
    "tokens": 0,
    "conv": 5,
    "dora": 5.5,
    "experts": 5,
    "__init__": 6,
}
FLOORS["weights"] = {
    "record": 0,
    "layouts": 1,
    "quantize": 2,
    "kinds": 3,
    "owners": 2,
    "tensor": 3,
    "__init__": 4,
}
FLOORS["grouped"] = {
    "groups": 0, "composite": 0, "ops": 1, "direct": 2, "functional": 3, "__init__": 4,
}  # fmt: skip
FLOORS["check"] = {"report": 0, "found": 1, "runs": 2, "training": 3, "merging": 4, "__init__": 5}
FLOORS["backends"] = {
    "device": 0,
    "dropout": 0,
    "forced": 0,
    "scaling": 0,
    "trial": 0,
    "triton": 1,
    "masks": 2,
    "columns": 3.3,
    "blocked": 3,
    "reference": 3.1,
    "native": 3.2,
    "dequantized": 3.3,
    "gating": 3.3,
    "cuda": 5,
    "codegen": 6,
    "__init__": 7,
    "packed": 8,
}
FLOORS["backends.native"] = {
    "extension": 0, "choice": 0.5, "decode": 1, "few_rows": 1, "grouped": 1.5, "quantized": 1.5,
    "__init__": 2,
}  # fmt: skip
FLOORS["backends.triton"] = {
    "__init__": 0,
    "blocks": 0,
    "dropout": 0,
    "launch": 0,
    "tiles": 0,
    "reduce": 1,
    "many": 2,
    "dual": 2,
    "gradients": 2,
    "low_rank": 2,
    "masking": 2,
    "packed": 2,
    "columns": 2,
    "decoding": 2,
    "gating": 2,
    "branch": 3,
    "experts": 3,
    "gemm": 3,
    "flag": 4,
    "grouped": 4,
    "scaled": 4,
    "specialised": 4,
}
FLOORS["backends.cuda"] = {
    "plan": 0,
    "launches": 1,
    "needs": 1,
    "plans": 2,
    "sources": 2.5,
    "tables": 3,
    "background": 3.5,
    "unseen": 3.5,
    "choice": 4,
    "many": 4,
    "packed": 4,
    "scaled": 4,
    "coded": 4.5,
    "__init__": 5,
}
FLOORS["backends.cuda.plans"] = {
    "aten": 0,
    "cublas": 0,
    "decode_coded": 0,
    "decode_cuda": 1,
    "shrink_gemm": 1,
    "dual": 2,
    "gluon": 2,
    "grouped": 2,
    "decode": 3,
    "flag": 3,
    "__init__": 4,
}
FLOORS["backends.codegen"] = {"cases": 0, "calls": 1, "__init__": 2, "__main__": 3}


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
print(len(report.replaced), torch.allclose(model(x), before, atol=1e-6))
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


def is_module(*parts):
    path = PACKAGE.joinpath(*parts)
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def imports(tree, package):
    """The places in the library that a module imports, with line numbers; also within functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "lora_kernels":
                    yield alias.name.split(".")[1:], node.lineno
        elif isinstance(node, ast.ImportFrom):
            parts = (node.module or "").split(".")
            if node.level:
                parts = [*package[: len(package) - node.level + 1], *filter(None, parts)]
            if parts[0] == "lora_kernels":
                for alias in node.names:
                    whole = [*parts[1:], alias.name]
                    yield whole if is_module(*whole) else parts[1:], node.lineno


def floor_of(package, part):
    floors = FLOORS[".".join(package)]
    assert part in floors, f"{'.'.join(package)}.{part} has no floor yet: give it one in FLOORS"
    return floors[part]


def violations(path, source):
    inside = path.relative_to(PACKAGE.parent).with_suffix("").parts
    for imported, line in imports(ast.parse(source), list(inside[:-1])):
        imported, own, package = [*imported, "__init__"], [*inside[1:], ""], []
        while imported[0] == own[0] != "__init__":
            package.append(own.pop(0))
            imported.pop(0)
        if ".".join(package) not in FLOORS or imported[0] == own[0]:
            continue
        if floor_of(package, imported[0]) >= floor_of(package, own[0]):
            yield f"{path.name}:{line}: {own[0]} imports {imported[0]}, which is not below it"


@pytest.mark.parametrize(
    "path",
    sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py"),
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_a_module_imports_only_from_lower_floors(path):
    package = []
    for part in path.relative_to(PACKAGE).with_suffix("").parts:
        if ".".join(package) in FLOORS:
            floor_of(package, part)
        package.append(part)
    assert not list(violations(path, path.read_text()))


def test_the_insides_of_some_packages_have_floors_throughout():
    for top in ("backends", "nn"):
        for path in PACKAGE.joinpath(top).rglob("__init__.py"):
            assert ".".join(path.parent.relative_to(PACKAGE).parts) in FLOORS


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
    assert len(list(violations(PACKAGE / "functional.py", line))) == 1
    assert not list(violations(PACKAGE / "functional.py", "import torch.nn\nimport os"))


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("backends/reference.py", "from lora_kernels.backends import native"),
        ("backends/native/decode.py", "from lora_kernels.backends.cuda.plan import Call"),
        ("backends/cuda/plan.py", "from lora_kernels.backends import use_backend"),
        ("backends/cuda/plans/aten.py", "from lora_kernels.backends.cuda import tables"),
        ("backends/cuda/plans/aten.py", "from . import PLANS"),
        ("backends/cuda/plans/dual.py", "from lora_kernels.backends.cuda.plans import flag"),
        ("backends/triton/gemm.py", "import lora_kernels.backends.codegen.cases"),
        ("nn/tensors.py", "from .layer import LoRALayer"),
    ],
)
def test_the_rule_on_floors_holds_inside_packages(file, line):
    assert len(list(violations(PACKAGE / file, line))) == 1
    assert not list(violations(PACKAGE / file, "from lora_kernels.branch import Branch"))
