"""What a module's `forward` reads of weights that lie in others, as its source has it.

The functions that `forward` reaches are read for values of `self.<path>.weight`.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from types import FunctionType, MethodType
from typing import Any, NamedTuple

from torch import nn

# What a weight is asked for without its values being used.
_METADATA = {
    "device", "dtype", "shape", "ndim", "layout", "grad", "requires_grad", "itemsize", "nbytes",
    "size", "dim", "stride", "numel", "nelement", "element_size", "data_ptr", "get_device",
    "quant_state", "ds_id", "__class__",
}  # fmt: skip
_ASKING = {"isinstance", "issubclass", "hasattr", "getattr", "type", "id", "len", "print", "str"}
_LIKE = {"to", "type_as", "zeros_like", "ones_like", "empty_like", "full_like", "rand_like"}
_ITERATORS = {
    "enumerate",
    "zip",
    "reversed",
    "list",
    "tuple",
    "iter",
    "values",
    "items",
    "children",
}
ANY = "*"  # one of the children of a container
_UNKNOWN = object()
Path = tuple[str, ...]


class _Read(NamedTuple):
    """A weight whose values are used, and the conditions (test, outcome) around it."""

    path: Path
    guards: tuple[tuple[ast.expr, bool], ...]


class _Step(NamedTuple):
    """Where a function leads to: a member of `self`, of the next class (`super()`), or a function
    that gets `self` as an argument, at this position or under this name."""

    kind: str
    name: str
    argument: int | str
    guards: tuple[tuple[ast.expr, bool], ...]


def weights_read(module: nn.Module) -> Iterator[tuple[Path, FunctionType]]:
    """(path from `module` to one whose weight is read, function that does)."""
    forward = _member(module, "forward")
    todo: list[tuple[FunctionType, type | None, int | str]]
    todo, seen = [] if forward is None else [(*forward, 0)], set()
    while todo:
        function, owner, argument = todo.pop()
        # `bypass.update_fast_paths` makes torch's encoder layers call what they hold.
        handled = function.__module__ == nn.modules.transformer.__name__
        if handled or (function, argument) in seen:
            continue
        seen.add((function, argument))
        reads, steps = _parse(function, argument)
        for read in reads:
            if _may_run(module, read.guards):
                yield read.path, function
        for step in steps:
            if not _may_run(module, step.guards):
                continue
            if step.kind == "function":
                target = function.__globals__.get(step.name)
                target = inspect.unwrap(target) if callable(target) else None
                if isinstance(target, FunctionType):
                    todo.append((target, None, step.argument))
                continue
            member = _member(module, step.name, owner if step.kind == "super" else None)
            if member is not None:
                todo.append((*member, 0))


def _member(
    module: nn.Module, name: str, after: type | None = None
) -> tuple[FunctionType, type | None] | None:
    """A method or property of a module (of the classes `after` one, for super()), and its class."""
    if after is None and name in vars(module):
        method = vars(module)[name]
        return (inspect.unwrap(method.__func__), None) if isinstance(method, MethodType) else None
    classes = type(module).__mro__
    classes = classes[classes.index(after) + 1 :] if after in classes else classes
    for cls in classes:
        if cls is nn.Module:
            return None
        if name in vars(cls):
            member = vars(cls)[name]
            member = member.fget if isinstance(member, property) else member
            member = inspect.unwrap(member) if callable(member) else member
            return (member, cls) if isinstance(member, FunctionType) else None
    return None


def _may_run(module: nn.Module, guards: Iterable[tuple[ast.expr, bool]]) -> bool:
    for test, outcome in guards:
        value = _evaluate(module, test)
        if value is not _UNKNOWN and bool(value) != outcome:
            return False
    return True


def _evaluate(module: nn.Module, node: ast.expr) -> Any:
    """A condition over plain attributes of the module (options), which do not change."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        value = _evaluate(module, node.operand)
        return value if value is _UNKNOWN else not value
    if isinstance(node, ast.BoolOp):
        values = [_evaluate(module, value) for value in node.values]
        decides = isinstance(node.op, ast.Or)
        if any(value is not _UNKNOWN and bool(value) == decides for value in values):
            return decides
        return _UNKNOWN if _UNKNOWN in values else not decides
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        left, right = _evaluate(module, node.left), _evaluate(module, node.comparators[0])
        compare = _COMPARISONS.get(type(node.ops[0]))
        if compare is None or left is _UNKNOWN or right is _UNKNOWN:
            return _UNKNOWN
        try:
            return compare(left, right)
        except TypeError:
            return _UNKNOWN
    names = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    if not names or not isinstance(node, ast.Name) or node.id != "self" or names == ["training"]:
        return _UNKNOWN
    value = module
    for name in reversed(names):
        value = getattr(value, "__dict__", {}).get(name, _UNKNOWN)
    return value if isinstance(value, (bool, int, float, str, type(None))) else _UNKNOWN


_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: lambda a, b: a == b,
    ast.NotEq: lambda a, b: a != b,
    ast.Lt: lambda a, b: a < b,
    ast.LtE: lambda a, b: a <= b,
    ast.Gt: lambda a, b: a > b,
    ast.GtE: lambda a, b: a >= b,
    ast.Is: lambda a, b: a is b,
    ast.IsNot: lambda a, b: a is not b,
}


@cache
def _parse(function: FunctionType, argument: int | str) -> tuple[list[_Read], list[_Step]]:
    """What a function reads and where it leads to; nothing where no source is to be had."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        return [], []
    if not isinstance(tree, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return [], []
    parameters = [arg.arg for arg in (*tree.args.posonlyargs, *tree.args.args)]
    if isinstance(argument, int):
        argument = parameters[argument] if argument < len(parameters) else ""
    visitor = _Visitor(argument)
    for statement in tree.body:
        visitor.visit(statement)
    return visitor.reads, visitor.steps


class _Visitor(ast.NodeVisitor):
    """Walks a function with the paths that its local names stand for."""

    def __init__(self, owner: str) -> None:
        self.paths: dict[str, Path] = {owner: ()}
        self.reads: list[_Read] = []
        self.steps: list[_Step] = []
        self.guards: tuple[tuple[ast.expr, bool], ...] = ()

    def path(self, node: ast.AST) -> Path | None:
        """The attribute path below `self` that an expression stands for."""
        if isinstance(node, ast.Name):
            return self.paths.get(node.id)
        if isinstance(node, (ast.Attribute, ast.Subscript)):
            outer = self.path(node.value)
            if outer is None or outer[-1:] == ("weight",):
                return None
            return (*outer, node.attr if isinstance(node, ast.Attribute) else ANY)
        return None

    def visit(self, node: ast.AST) -> None:
        path = self.path(node) if isinstance(getattr(node, "ctx", None), ast.Load) else None
        if path is None:
            super().visit(node)
            return
        if path[-1:] == ("weight",):
            self.reads.append(_Read(path[:-1], self.guards))
        elif len(path) == 1:
            self.steps.append(_Step("member", path[0], 0, self.guards))
        if isinstance(node, ast.Subscript):
            self.visit(node.slice)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        inner = self.path(node.value) or ()
        asked = node.attr in _METADATA or node.attr.startswith(("is_", "_"))
        if inner[-1:] == ("weight",) and asked:
            return
        if (
            isinstance(node.value, ast.Call)
            and isinstance(node.value.func, ast.Name)
            and node.value.func.id == "super"
        ):
            self.steps.append(_Step("super", node.attr, 0, self.guards))
        self.visit(node.value)

    def visit_Call(self, node: ast.Call) -> None:
        name = getattr(node.func, "id", None) or getattr(node.func, "attr", None)
        arguments = [*enumerate(node.args), *((k.arg, k.value) for k in node.keywords)]
        self.visit(node.func)
        for place, value in arguments:
            path = self.path(value)
            if path == () and isinstance(node.func, ast.Name) and place is not None:
                self.steps.append(_Step("function", node.func.id, place, self.guards))
            if path is not None and path[-1:] == ("weight",) and name in _ASKING | _LIKE:
                continue
            self.visit(value)

    def visit_Compare(self, node: ast.Compare) -> None:
        if not all(isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops):
            self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            self.bind(target, node.value)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.bind(node.target, node.value)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self.bind(node.target, node.value)

    def bind(self, target: ast.expr, value: ast.expr) -> None:
        """An assignment: a name for a path reads nothing."""
        if (
            isinstance(target, ast.Tuple)
            and isinstance(value, ast.Tuple)
            and len(target.elts) == len(value.elts)
        ):
            for one, other in zip(target.elts, value.elts, strict=True):
                self.bind(one, other)
            return
        path = self.path(value)
        if isinstance(target, ast.Name):
            if path is not None:
                self.paths[target.id] = path
                return
            self.visit(value)
            self.paths.pop(target.id, None)
            return
        self.visit(value)
        self.visit(target)

    def visit_For(self, node: ast.For) -> None:
        self.visit(node.iter)
        self.iterate(node.target, node.iter)
        for statement in (*node.body, *node.orelse):
            self.visit(statement)

    def iterate(self, target: ast.expr, source: ast.expr) -> None:
        """Names the elements of what is iterated over, through enumerate and zip too."""
        path = self.path(source)
        if path is not None:
            for name in ast.walk(target):
                if isinstance(name, ast.Name):
                    self.paths[name.id] = (*path, ANY)
            return
        if not isinstance(source, ast.Call):
            return
        called = getattr(source.func, "id", None) or getattr(source.func, "attr", None)
        if called not in _ITERATORS:
            return
        inner = [*source.args] or [getattr(source.func, "value", source)]
        parts = target.elts if isinstance(target, ast.Tuple) else [target]
        if called in ("enumerate", "items"):
            parts = parts[1:]
        for part, one in zip(parts, inner, strict=False):
            self.iterate(part, one)

    def visit_comprehension_of(self, node: Any) -> None:
        for generator in node.generators:
            self.visit(generator.iter)
            self.iterate(generator.target, generator.iter)
            for test in generator.ifs:
                self.visit(test)
        for part in ("key", "value", "elt"):
            if hasattr(node, part):
                self.visit(getattr(node, part))

    visit_ListComp = visit_SetComp = visit_GeneratorExp = visit_DictComp = visit_comprehension_of

    def visit_If(self, node: ast.If | ast.IfExp) -> None:
        self.visit(node.test)
        around = self.guards
        for branch, outcome in ((node.body, True), (node.orelse, False)):
            self.guards = (*around, (node.test, outcome))
            for part in branch if isinstance(branch, list) else [branch]:
                self.visit(part)
        self.guards = around

    visit_IfExp = visit_If
