"""Regular expressions of downloaded files, matched in a bounded time.

Python's engine backtracks: `([a-z_]+)+!` on a name of thirty letters never ends. Here an expression
is followed through its parsed tree with the set of places that it can have reached, so that no
place is visited twice for one step; what is left of cost is counted. References to groups need
backtracking and are refused.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any

try:
    from re import _constants as ops  # type: ignore[attr-defined]  # private
    from re import _parser as parser  # type: ignore[attr-defined]  # private
except ImportError:  # Python 3.10
    import sre_constants as ops
    import sre_parse as parser

Tree = Any  # of Python's parser, which has no types: (kind, argument) after (kind, argument)
_STEPS = 2_000_000
_LONGEST = 200_000
# Of these alone an expression never backtracks.
_STRAIGHT = (ops.LITERAL, ops.NOT_LITERAL, ops.ANY, ops.IN, ops.AT)
_CATEGORIES: dict[object, Callable[[str], bool]] = {
    ops.CATEGORY_DIGIT: str.isdecimal,
    ops.CATEGORY_SPACE: str.isspace,
    ops.CATEGORY_WORD: lambda c: c.isalnum() or c == "_",
    ops.CATEGORY_NOT_DIGIT: lambda c: not c.isdecimal(),
    ops.CATEGORY_NOT_SPACE: lambda c: not c.isspace(),
    ops.CATEGORY_NOT_WORD: lambda c: not (c.isalnum() or c == "_"),
}


class Matcher:
    """Expressions of one file, which share a number of steps.

    ValueError for what is no expression, what cannot be followed so, and when the steps are spent.
    """

    def __init__(self) -> None:
        self._left = _STEPS
        self._parsed: dict[str, Tree] = {}

    def ends_with(self, pattern: str, name: str) -> bool:
        """PEFT's rule for `rank_pattern`: the whole name or its last parts."""
        starts = [0, *(i + 1 for i, c in enumerate(name) if c == ".")]
        return self._matches(pattern, name, starts)

    def matches(self, pattern: str, name: str) -> bool:
        """PEFT's rule for `target_modules` given as a string: the whole name."""
        return self._matches(pattern, name, [0])

    def _matches(self, pattern: str, name: str, starts: Iterable[int]) -> bool:
        tree = self._parsed.get(pattern)
        if tree is None:
            tree = self._parsed[pattern] = _parse(pattern)
        if isinstance(tree, re.Pattern):
            return any(tree.fullmatch(name, start) for start in starts)
        try:
            return len(name) in self._after(tree, name, set(starts))
        except (ValueError, RecursionError) as error:
            reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
            raise ValueError(f"{_shown(pattern)}: {reason}") from None

    def _after(self, tree: Tree, name: str, places: set[int]) -> set[int]:
        """Where the expression can have ended that began at one of the places."""
        for kind, argument in tree:
            if not places:
                break
            self._left -= len(places) + 1
            if self._left < 0:
                raise ValueError("matching it takes too long; write the names out")
            places = self._step(kind, argument, name, places)
        return places

    def _step(self, kind: object, argument: Any, name: str, places: set[int]) -> set[int]:
        if kind is ops.AT:
            return {i for i in places if _at(argument, name, i)}
        if kind is ops.BRANCH:
            return set[int]().union(*(self._after(tree, name, places) for tree in argument[1]))
        if kind is ops.SUBPATTERN:
            _, added, removed, tree = argument
            if added or removed:
                raise ValueError("flags within it are not supported")
            return self._after(tree, name, places)
        if kind in (ops.MAX_REPEAT, ops.MIN_REPEAT):
            least, most, tree = argument
            return self._repeated(least, most, tree, name, places)
        if kind in (ops.ASSERT, ops.ASSERT_NOT):
            direction, tree = argument
            back = tree.getwidth()[0] if direction < 0 else 0
            held = {i for i in places if self._holds(tree, name, i, back)}
            return held if kind is ops.ASSERT else places - held
        return {i + 1 for i in places if i < len(name) and _is_one(kind, argument, name[i])}

    def _holds(self, tree: Tree, name: str, place: int, back: int) -> bool:
        ends = self._after(tree, name, {place - back}) if place >= back else set()
        return place in ends if back else bool(ends)

    def _repeated(self, least: int, most: int, tree: Tree, name: str, places: set[int]) -> set[int]:
        # More rounds than characters reach nothing new.
        for _ in range(min(least, len(name) + 1)):
            places = self._after(tree, name, places)
        found, new = set(places), places
        for _ in range(min(most - least, len(name) + 1)):
            new = self._after(tree, name, new) - found
            if not new:
                break
            found |= new
        return found


def _parse(pattern: str) -> Tree:
    """Its tree, or Python's own where that cannot backtrack."""
    try:
        if len(pattern) > _LONGEST:
            raise ValueError(f"has {len(pattern)} characters, more than {_LONGEST}")
        tree = parser.parse(pattern)
        if tree.state.flags & ~re.UNICODE:
            raise ValueError("flags within it are not supported")
        _require_followed(tree)
        return re.compile(pattern) if all(kind in _STRAIGHT for kind, _ in tree) else tree
    except re.error as error:
        raise ValueError(f"{_shown(pattern)} is no regular expression: {error}") from None
    except (ValueError, OverflowError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"{_shown(pattern)}: {reason}") from None


def _require_followed(tree: Tree) -> None:
    for kind, argument in tree:
        if kind is ops.BRANCH:
            inner = argument[1]
        elif kind in (ops.SUBPATTERN, ops.MAX_REPEAT, ops.MIN_REPEAT, ops.ASSERT, ops.ASSERT_NOT):
            inner = argument[-1:]
        elif kind in _STRAIGHT:
            inner = ()
        else:
            raise ValueError(f"{str(kind).lower()} within it is not supported")
        for part in inner:
            _require_followed(part)


def _at(kind: object, name: str, i: int) -> bool:
    if kind in (ops.AT_BEGINNING, ops.AT_BEGINNING_STRING):
        return i == 0
    if kind in (ops.AT_END, ops.AT_END_STRING):
        return i == len(name)
    is_word = _CATEGORIES[ops.CATEGORY_WORD]
    inside = [0 <= j < len(name) and is_word(name[j]) for j in (i - 1, i)]
    return (inside[0] != inside[1]) == (kind is ops.AT_BOUNDARY)


def _is_one(kind: object, argument: Any, c: str) -> bool:
    """Whether this part of an expression takes the character."""
    if kind is ops.LITERAL:
        return bool(ord(c) == argument)
    if kind is ops.NOT_LITERAL:
        return bool(ord(c) != argument)
    if kind is ops.ANY:
        return c != "\n"
    if kind is ops.RANGE:
        return bool(argument[0] <= ord(c) <= argument[1])
    if kind is ops.CATEGORY:
        return _CATEGORIES[argument](c)
    negated = argument[0][0] is ops.NEGATE  # IN, a set of these
    return any(_is_one(kind, item, c) for kind, item in argument[negated:]) != negated


def _shown(pattern: str) -> str:
    return repr(pattern if len(pattern) <= 200 else pattern[:200] + "...")
