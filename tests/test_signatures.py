"""What travels together is one thing: no function takes a long list of arguments by hand, and no
list of names is written down twice."""

import ast
import inspect
from collections import defaultdict
from pathlib import Path

import lora_kernels
from lora_kernels.backends import Backend

PACKAGE = Path(lora_kernels.__file__).parent
MOST, REPEATED = 7, 6
# Signatures that somebody else wrote: of the contract of a backend, and torch's of a module.
INTERFACES = {"backward": Backend.backward, "_load_from_state_dict": None}
# Gluon hands each of its groups of warps one flat list.
FLAT = {"specialised.py"}


def functions():
    """(file, definition) of the package's functions but for kernels, whose parameters are the
    driver's, and for public names, whose parameters are the user's."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and not is_kernel(node) and not is_public(node):
                yield path.relative_to(PACKAGE), node


def is_kernel(node: ast.FunctionDef) -> bool:
    return node.name.endswith("_kernel") and "jit" in "".join(map(ast.unparse, node.decorator_list))


def is_public(node: ast.FunctionDef) -> bool:
    return node.name in {*lora_kernels.__all__, "from_linear", "__init__"}


def parameters(node: ast.FunctionDef) -> list[str]:
    given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return [argument.arg for argument in given if argument.arg not in ("self", "cls")]


def test_no_function_takes_more_than_seven():
    long = [
        f"{path}: {node.name} takes {len(parameters(node))}"
        for path, node in functions()
        if len(parameters(node)) > MOST and path.name not in FLAT
    ]
    assert not long, "\n".join(long)


def test_no_list_of_six_names_stands_twice():
    found = defaultdict(set)
    for path, node in functions():
        names = parameters(node)
        if node.name in INTERFACES or implements_a_run(names) or path.name in FLAT:
            continue
        for i in range(len(names) - REPEATED + 1):
            found[tuple(names[i : i + REPEATED])].add(f"{path}: {node.name}")
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Tuple | ast.List):
                names = [getattr(each, "value", None) for each in node.elts]
                for i in range(len(names) - REPEATED + 1):
                    window = tuple(names[i : i + REPEATED])
                    if all(isinstance(name, str) for name in window):
                        found[window].add(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    twice = [f"{names}: {sorted(places)}" for names, places in found.items() if len(places) > 1]
    assert not twice, "\n".join(twice)


def implements_a_run(names: list[str]) -> bool:
    """A plan's backward: that of a backend, and tiles."""
    of_a_backend = list(inspect.signature(Backend.backward).parameters)[1:]
    return names == [*of_a_backend, "tiles"]
