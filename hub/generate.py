"""The tree of a Hugging Face Hub kernel, made of the package: `make hub`.

    python hub/generate.py [--out hub_output]

hub/package has what the kernel's package has in place of ours or beside it, hub/tree the files
around it. Everything else is copied: the modules that hub/package reaches by its imports, which
become relative, and the tests of the ops. What is there afterwards:

    build.toml, flake.nix, README.md, torch-ext/lora_kernels   what kernel-builder takes
    build/torch-cpu, build/torch-cuda                          what `kernels` loads
    tests                                                      `pytest` in the tree runs them
"""

import argparse
import ast
import base64
import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

HUB = Path(__file__).resolve().parent
ROOT = HUB.parent
PACKAGE = ROOT / "lora_kernels"
NAME = PACKAGE.name
# kernel-builder writes an _ops.py of its own into the package.
RENAMED = {"_ops": "_registration"}
ALSO = ("rules.dtensor", "testing")  # imported once DTensors are there; by the tests
BACKENDS = ("cpu", "cuda")
ARCHS = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")  # which docs/hardware.md has, as compiled
TUNED = "backends/cuda/tuned"
DIGESTS = "backends/cuda/digests.json"
TESTS = (
    "oracle.py", "elsewhere.py", "conftest.py", "test_ops.py", "test_ops_checks.py",
    "test_accuracy.py", "test_functional.py", "backends/test_dropout.py", "backends/test_masks.py",
    "grouped/test_grouped.py",
)  # fmt: skip
NAMESPACE = '''"""The namespace of this build; kernel-builder writes the same of its own."""

import torch

_NAME = "{name}"
ops = getattr(torch.ops, _NAME)


def add_op_namespace_prefix(op_name: str) -> str:
    return f"{{_NAME}}::{{op_name}}"
'''
# What older `kernels` look for within a variant: the same names, of the package around it.
WITHIN = '''"""The package around this folder, where older versions of `kernels` look for it."""

import importlib.util
import sys
from pathlib import Path

_name = "{name}"
if _name not in sys.modules:
    _spec = importlib.util.spec_from_file_location(_name, Path(__file__).parents[1] / "__init__.py")
    sys.modules[_name] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[_name])
globals().update({{k: v for k, v in vars(sys.modules[_name]).items() if not k.startswith("__")}})
'''


def file_of(module: str) -> Path | None:
    """Of a module within the package, "" for itself, without its name; None if there is none."""
    path = PACKAGE.joinpath(*module.split(".")) if module else PACKAGE
    return next((p for p in (path / "__init__.py", path.with_suffix(".py")) if p.exists()), None)


def inside(name: str) -> str | None:
    """A module's name within the package; None of what is another's."""
    first, _, rest = name.partition(".")
    return rest if first == NAME else None


def imported(source: str, package: str) -> Iterator[str]:
    """The modules within the package that a source imports, itself in `package`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            if any(inside(alias.name) is not None for alias in node.names):
                raise ValueError(f"line {node.lineno}: only `from {NAME}... import` can be moved")
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                kept = package.split(".")[: len(package.split(".")) - node.level + 1]
                parent = ".".join([*filter(None, kept), *filter(None, [module])])
            elif (parent := inside(module)) is None:
                continue
            for alias in node.names:
                whole = f"{parent}.{alias.name}" if parent else alias.name
                yield whole if file_of(whole) else parent


def reached() -> list[str]:
    """The modules that the kernel needs, less those of hub/package."""
    own = {path.stem: path.read_text() for path in (HUB / "package").glob("*.py")}
    todo = [*ALSO, *(module for source in own.values() for module in imported(source, ""))]
    found: set[str] = set()
    while todo:
        module = todo.pop()
        if module in found or module in own or module in ("", *RENAMED.values()):
            continue
        path = file_of(module)
        if path is None:
            continue  # of `from . import ops`, or of kernel-builder's module
        found.add(module)
        if "." in module:
            todo.append(module.rpartition(".")[0])
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        todo += imported(path.read_text(), package)
    return sorted(found - own.keys())


def moved(source: str, depth: int) -> str:
    """A source whose imports of the package are relative, from within `depth` folders of it."""
    lines, changes = source.splitlines(keepends=True), []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ImportFrom) or (module := inside(node.module or "")) is None:
            continue
        first, _, rest = module.partition(".")
        renamed = ".".join(filter(None, (RENAMED.get(first, first), rest)))
        before, after = f"from {node.module} ", f"from {'.' * (depth + 1)}{renamed} "
        changes.append((node.lineno, node.col_offset, before, after))
        for alias in node.names:
            if not module and alias.name in RENAMED:
                new = f"{RENAMED[alias.name]} as {alias.asname or alias.name}"
                old = f"{alias.name} as {alias.asname}" if alias.asname else alias.name
                changes.append((alias.lineno, alias.col_offset, old, new))
    for number, column, before, after in sorted(changes, reverse=True):
        line = lines[number - 1]
        if not line.startswith(before, column):
            raise ValueError(f"line {number}: expected {before!r} at column {column}, got {line!r}")
        lines[number - 1] = line[:column] + after + line[column + len(before) :]
    return "".join(lines)


def files() -> dict[str, str]:
    """The kernel's package: text by path, less the _ops.py that a build adds."""
    found = {path.name: path.read_text() for path in (HUB / "package").glob("*.py")}
    for module in reached():
        path = file_of(module)
        relative = path.relative_to(PACKAGE)
        depth = len(relative.parts) - 1
        renamed = relative.with_stem(RENAMED.get(relative.stem, relative.stem))
        name = relative if depth else renamed
        found[name.as_posix()] = moved(path.read_text(), depth)
    for table in sorted(PACKAGE.joinpath(TUNED).glob("*.json")):
        found[f"{TUNED}/{table.name}"] = table.read_text()
    found[DIGESTS] = json.dumps(digests(), indent=1) + "\n"
    return found


def digests() -> dict[str, str]:
    """Of the plans' sources as the package has them, by which tuned tables are known to hold."""
    sys.path.insert(0, str(ROOT))
    from lora_kernels.backends.cuda import sources

    return {name: each for name, each in sources.of_plans().items() if name != "csrc"}


def write(folder: Path, texts: dict[str, str]) -> None:
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def build(folder: Path, texts: dict[str, str], backend: str, unique: str) -> None:
    """A variant as `kernels` loads it."""
    name = f"_{NAME}_{backend}_{unique}"
    within = {
        "_ops.py": NAMESPACE.format(name=name),
        f"{NAME}/__init__.py": WITHIN.format(name=name),
    }
    whole = texts | within
    hashes = {
        path: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for path, text in sorted(whole.items())
    }
    metadata = {
        "name": NAME.replace("_", "-"),
        "id": name,
        "version": 0,
        "license": "apache-2.0",
        "python-depends": [],
        "backend": {"type": backend} | ({"archs": list(ARCHS)} if backend == "cuda" else {}),
        "digest": {"algorithm": "sha256", "files": hashes},
    }
    write(folder, whole | {"metadata.json": json.dumps(metadata, indent=2) + "\n"})


def generate(out: Path) -> str:
    """Writes the tree, into a folder that it replaces; what is unique to its builds."""
    texts = files()
    unique = hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()[:7]
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(HUB / "tree", out)
    shutil.copy(ROOT / "LICENSE", out / "LICENSE")
    source = out / "torch-ext" / NAME
    write(source, texts | {"_ops.py": NAMESPACE.format(name=f"_{NAME}_source_{unique}")})
    for backend in BACKENDS:
        build(out / "build" / f"torch-{backend}", texts, backend, unique)
    for test in TESTS:
        path = out / "tests" / test
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "tests" / test, path)
    return unique


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "hub_output")
    args = parser.parse_args()
    unique = generate(args.out)
    print(f"{args.out}: {len(list(args.out.rglob('*.py')))} Python files, builds {unique}")


if __name__ == "__main__":
    main()
