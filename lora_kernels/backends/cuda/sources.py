"""The sources that a plan's machine code is made of, and what compiles them.

A digest of a plan is of the definitions that its passes reach, by name, in the modules of
`_COUNTED` and in the plan's own: functions, classes, constants, without comments, docstrings and
blank lines. It is the same for every Python; what nothing of the plan reaches changes nothing. A
tree that is generated from the package, in which imports read otherwise, brings the digests along
that were taken there.
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
import os
import subprocess
import sys
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from lora_kernels.backends.cuda.plan import OPS
from lora_kernels.backends.cuda.plans import PLANS

_PACKAGE = Path(__file__).parents[2]
_OWN = __name__.removesuffix("backends.cuda.sources")
TAKEN_ALONG = "digests.json"
_COUNTED = tuple(
    f"lora_kernels.backends.{name}"
    for name in ("cuda.plans", "cuda.launches", "triton", "scaling", "dropout", "native.decode")
)
_BACKENDS = "lora_kernels.backends"
PTXAS = "Triton's own"
Node = tuple[str, str]  # a module, and a name that it defines


class _Module(NamedTuple):
    """Top-level statements by the names that they bind, and as text; where imported names are
    from: (module, None) or (module, name)."""

    definitions: dict[str, ast.stmt]
    texts: dict[ast.stmt, str]
    imports: dict[str, tuple[str, str | None]]


def kernel_files() -> list[Path]:
    """All files that machine code is made of, in order; the compiled library stands for csrc where
    that did not come with the package."""
    backends = _PACKAGE / "backends"
    found = [*backends.glob("cuda/plans/*.py"), *backends.glob("triton/*.py")]
    found += [backends / "cuda/launches.py", backends / "scaling.py", backends / "dropout.py"]
    return sorted(found) + (_csrc() or sorted(_PACKAGE.glob("_native_cuda*")))


def _csrc() -> list[Path]:
    return sorted((_PACKAGE.parent / "csrc" / "cuda").glob("decode.*"))


@cache
def _taken_along() -> dict[str, str]:
    """`of_plans` of the package that this tree was generated from."""
    path = Path(__file__).with_name(TAKEN_ALONG)
    taken: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
    return taken


@cache
def csrc() -> str | None:
    """Digest of the CUDA kernel's sources; None where they did not come with the package."""
    files = _csrc()
    return _digest(path.read_text() for path in files) if files else None


@cache
def ptxas() -> str:
    """What assembles for Triton: the release that a variable names, as Triton reads it, or its
    own, which its version tells."""
    releases = []
    for variable in ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH"):
        path = os.environ.get(variable)
        if not path:
            continue
        try:
            done = subprocess.run([path, "--version"], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            continue  # Triton falls back to its own
        releases.append(" ".join(done.stdout.split()[-2:]))
    return ", ".join(releases) or PTXAS


@cache
def files() -> str:
    """Digest of the kernels' Python files as they are: quickly told, where nothing has changed."""
    if "files" in _taken_along():
        return _taken_along()["files"]
    python = [path for path in kernel_files() if path.suffix == ".py"]
    return _digest(path.read_text() for path in python)


def of_plans() -> dict[str, str]:
    """The digest of every plan, "files" of all, and "csrc" where that is there."""
    found = {name: of_plan(name) for name in PLANS} | {"files": files()}
    ours = csrc()
    return found if ours is None else found | {"csrc": ours}


def changed(plans: Iterable[str], kernels: Mapping[str, str]) -> tuple[str, ...]:
    """Which of some plans are not those of which `of_plans` once gave these digests."""
    ours = csrc()
    found = {"decode_cuda"} if ours is not None and kernels.get("csrc") != ours else set()
    same = kernels.get("files") == files()
    for plan in plans:
        packaged = all(run.__module__.startswith(_OWN) for run in _runs(plan))
        if not (same and packaged) and kernels.get(plan) != of_plan(plan):
            found.add(plan)
    return tuple(plan for plan in plans if plan in found)


@cache
def of_plan(name: str) -> str:
    """The digest of a registered plan."""
    if name in _taken_along():
        return _taken_along()[name]
    starts: set[Node] = set()
    for run in _runs(name):
        module, function = type(run).__module__, type(run).__name__  # of an object that is called
        if hasattr(run, "__qualname__"):
            module, function = run.__module__, run.__qualname__
        defined = _parsed(module).definitions
        starts |= {(module, each) for each in ([function] if function in defined else defined)}
    return _digest(_reached(starts))


def _runs(name: str) -> list[Any]:
    """What runs the passes of a registered plan."""
    passes = (PLANS[name].serving(op) for op in OPS)
    return [serving.run for serving in passes if serving is not None]


def _digest(texts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:12]


def _reached(starts: set[Node]) -> Iterator[str]:
    own = {module for module, _ in starts}
    todo, seen = list(starts), set(starts)
    statements: dict[tuple[str, str], None] = {}
    while todo:
        module, name = todo.pop()
        parsed = _parsed(module)
        statement = parsed.definitions.get(name)
        if statement is None:
            found = [parsed.imports[name]] if name in parsed.imports else []
            nodes = [(m, n) for m, n in found if n is not None]
        else:
            statements[module, parsed.texts[statement]] = None
            nodes = list(_names(module, parsed, statement))
        for node in nodes:
            counted = node[0] in own or node[0].startswith(_COUNTED)
            if counted and node not in seen:
                seen.add(node)
                todo.append(node)
    return (f"{module}\n{text}" for module, text in sorted(statements))


def _names(module: str, parsed: _Module, statement: ast.stmt) -> Iterator[Node]:
    """What a statement speaks of: names of its module, imported ones, those of imported modules,
    and all of a module that it speaks of as a whole."""
    of_modules = set()
    for node in ast.walk(statement):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            origin, name = parsed.imports.get(node.value.id, ("", ""))
            if origin and name is None:
                of_modules.add(node.value)
                yield origin, node.attr
    for node in ast.walk(statement):
        if not isinstance(node, ast.Name) or node in of_modules:
            continue
        if node.id in parsed.definitions:
            yield module, node.id
        elif node.id in parsed.imports:
            origin, name = parsed.imports[node.id]
            if name is not None:
                yield origin, name
            elif origin.startswith(_COUNTED):
                yield from ((origin, each) for each in _parsed(origin).definitions)


@cache
def _parsed(module: str) -> _Module:
    path = _path(module)
    if path is None and module in sys.modules:
        file = sys.modules[module].__file__
        path = None if file is None else Path(file)
    source = path.read_text() if path is not None and path.exists() else ""
    tree, lines = ast.parse(source), _without_comments(source)
    found = _Module({}, {}, {})
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                is_module = whole.startswith(_BACKENDS) and _path(whole) is not None
                origin = (whole, None) if is_module else (node.module, alias.name)
                found.imports[alias.asname or alias.name] = origin
    for statement in tree.body:
        if isinstance(statement, (ast.Import, ast.ImportFrom)):
            continue
        first = min(
            [statement.lineno, *(d.lineno for d in getattr(statement, "decorator_list", ()))]
        )
        kept = lines[first - 1 : statement.end_lineno]
        found.texts[statement] = "\n".join(line for line in kept if line)
        for name in _bound(statement):
            found.definitions[name] = statement
    return found


def _path(module: str) -> Path | None:
    """Of a module of this package."""
    first, *rest = module.split(".")
    path = _PACKAGE.joinpath(*rest).with_suffix(".py")
    package = path.with_suffix("") / "__init__.py"
    if first != "lora_kernels":
        return None
    return next((each for each in (path, package) if each.exists()), None)


def _bound(statement: ast.stmt) -> Iterator[str]:
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        yield statement.name
        return
    for node in ast.walk(statement):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name


def _without_comments(source: str) -> list[str]:
    """Its lines, bare of comments and docstrings; one of nothing else is empty."""
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            lines[token.start[0] - 1] = lines[token.start[0] - 1][: token.start[1]]
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        if not isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) or not body:
            continue
        first = body[0]
        if not isinstance(first, ast.Expr) or not isinstance(first.value, ast.Constant):
            continue
        if isinstance(first.value.value, str):
            for number in range(first.lineno, (first.end_lineno or first.lineno) + 1):
                lines[number - 1] = ""
    return [line.rstrip() for line in lines]
