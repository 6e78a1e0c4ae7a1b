"""The ops as data: their arguments, results, dimensions and dtypes, and when each is read.

Schemas, fakes, checks, autograd and the rules for vmap, flops and DTensors follow from here; the
schemas in docs/ops.md are compared with them by a test.
"""

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from lora_kernels.branch import Base, Branch, Dense, Given, Need

# The dimensions of every matrix by name: x [M,K] and so on. M may be 0.
DIMENSIONS = {
    "x": "MK", "weight": "NK", "lora_a": "rK", "lora_b": "Nr", "bias": "N", "base_out": "MN",
    "y": "MN", "s": "Mr", "dy": "MN", "dx": "MK", "dweight": "NK", "da": "rK", "db": "Nr",
}  # fmt: skip
TYPES = {
    **dict.fromkeys(DIMENSIONS, "Tensor"), "bias": "Tensor?", "scaling": "float",
    "dropout_p": "float", "seed": "Tensor?", "save_s": "bool", "need_x": "bool",
    "need_weight": "bool", "need_a": "bool", "need_b": "bool",
}  # fmt: skip
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Dtypes beside that of the first tensor: fp32 master copies, and what autocast leaves as it is.
ALSO = {
    "lora_a": DTYPES[:1], "lora_b": DTYPES[:1], "weight": DTYPES[:3], "bias": DTYPES[:3],
}  # fmt: skip
# Argument of a backward op -> what makes it be read; of size 0 it may be left out else.
READERS = {"x": ("need_weight", "need_a"), "s": ("need_b",)}
# Result -> (what asks for it, the argument whose dtype it has); it is of size 0 unasked.
ASKED = {
    "s": ("save_s", "x"), "dx": ("need_x", "dy"), "dweight": ("need_weight", "weight"),
    "da": ("need_a", "lora_a"), "db": ("need_b", "lora_b"),
}  # fmt: skip
Args = Sequence[Any]  # of an op, in its order
NOT_GIVEN = (0,)  # the shape of what is not given, not asked for
# A dimension -> what is a sum over it: partial where the dimension is split.
SUMS = {
    "M": {"dweight", "da", "db"},
    "N": {"dx", "da"},
    "K": {"y", "base_out", "bias", "s", "db"},
}
_BRANCH = Branch._fields[2:]
_NEED = {"x": "need_x", "weight": "need_weight", "lora_a": "need_a", "lora_b": "need_b"}
_GRADIENTS = {"x": "dx", "weight": "dweight", "lora_a": "da", "lora_b": "db"}


class Op:
    """One op: its arguments by name, in order, and what it returns.

    leading: the arguments of which the first that is split decides how a DTensor call is.
    """

    def __init__(
        self, name: str, arguments: Sequence[str], returns: Sequence[str], leading: Sequence[str]
    ) -> None:
        self.name, self.arguments, self.returns = name, tuple(arguments), tuple(returns)
        self.leading = tuple(leading)
        self.index = {argument: i for i, argument in enumerate(arguments)}
        self.branch = _branch(self.index)
        """The branch among the arguments."""
        self.has_weight = "weight" in self.index
        self.is_backward = arguments[0] == "dy"
        needs = [name for name in _NEED.values() if name in self.index]
        if needs:
            self._flags = itemgetter(*(self.index[name] for name in needs))
        tensors = [name for name in arguments if TYPES[name].startswith("Tensor")]
        self.tensors = tuple(self.index[name] for name in tensors)
        """The places of tensors, those that may be None too."""
        self.numbers = itemgetter(*(i for i in range(len(arguments)) if i not in self.tensors))
        """The other arguments."""
        self.likes = tuple(self.index[ASKED.get(n, (None, arguments[0]))[1]] for n in returns)
        """The places of the arguments whose dtypes the results have."""
        self.rows = tuple(self.index[n] for n in arguments if DIMENSIONS.get(n, "")[:1] == "M")
        """The places of what has the rows of x."""

    @property
    def writes(self) -> str | None:
        """The argument that it writes in place of returning something."""
        return None if self.returns else self.arguments[0]

    @property
    def schema(self) -> str:
        """What torch.library takes, without a default anywhere."""
        types = {**TYPES, **({self.writes: "Tensor(a!)"} if self.writes else {})}
        given = ", ".join(f"{types[name]} {name}" for name in self.arguments)
        results = ", ".join(f"{TYPES[name]} {name}" for name in self.returns)
        return f"{self.name}({given}) -> ({results})"

    def base(self, args: Args) -> Base:
        """What the branch stands on."""
        if self.has_weight:
            bias = None if self.is_backward else args[self.index["bias"]]
            return Dense(args[self.index["weight"]], bias)
        return Given(None if self.is_backward else args[0])

    def need(self, args: Args) -> Need:
        """The gradients that a backward op is asked for."""
        flags = self._flags(args)
        return Need(*flags) if self.has_weight else Need(flags[0], False, *flags[1:])

    def sizes(self, args: Args) -> dict[str, int]:
        """M, N, K and r, of arguments (or of their shapes) that fit together."""
        found: dict[str, int] = {}
        for name, i in self.index.items():
            arg = args[i]
            if name in DIMENSIONS and arg is not None:
                shape: Any = getattr(arg, "shape", arg)
                if len(shape) == len(DIMENSIONS[name]):
                    found.update(zip(DIMENSIONS[name], shape, strict=True))
        return found

    def given(self, args: Args) -> Args:
        """Arguments with tensors of size 0 for those that nothing reads and that may be None in
        calls within the library."""
        unread = [self.index[name] for name in READERS if name in self.index]
        if not self.is_backward or all(args[i] is not None for i in unread):
            return args
        return [
            args[0].new_empty(NOT_GIVEN) if i in unread and a is None else a
            for i, a in enumerate(args)
        ]

    def filled(
        self, args: Args, results: Sequence[Tensor | None] | None
    ) -> tuple[Tensor, ...] | None:
        """Results with tensors of size 0 for what is not asked for."""
        if results is None:
            return None
        return tuple(
            args[like].new_empty(NOT_GIVEN) if value is None else value
            for value, like in zip(results, self.likes, strict=True)
        )

    def fake(self, args: Args) -> tuple[Tensor, ...] | None:
        """Results without values."""
        if self.writes:
            return None
        sizes, results = self.sizes(args), []
        for name, like in zip(self.returns, self.likes, strict=True):
            asked, _ = ASKED.get(name, (None, None))
            wanted = asked is None or args[self.index[asked]]
            shape = tuple(sizes[letter] for letter in DIMENSIONS[name]) if wanted else NOT_GIVEN
            results.append(args[like].new_empty(shape))
        return tuple(results)


def _branch(index: dict[str, int]) -> Callable[[Args], Branch]:
    take = itemgetter(*(index[name] for name in Branch._fields))
    return lambda args: Branch._make(take(args))


_ADAPTER = Branch._fields[:2]
OPS = {
    op.name: op
    for op in (
        Op(
            "lora_linear",
            ("x", "weight", *_ADAPTER, "bias", *_BRANCH, "save_s"),
            ("y", "s"),
            leading=("weight", "x"),
        ),
        Op(
            "lora_add",
            ("base_out", "x", *_ADAPTER, *_BRANCH, "save_s"),
            ("y", "s"),
            leading=("x", "base_out", "lora_b", "lora_a"),
        ),
        Op("lora_add_", ("base_out", "x", *_ADAPTER, *_BRANCH), (), leading=("base_out",)),
        Op(
            "lora_linear_backward",
            ("dy", "x", "weight", *_ADAPTER, "s", *_BRANCH, *_NEED.values()),
            tuple(_GRADIENTS.values()),
            leading=("weight", "dy", "x"),
        ),
        Op(
            "lora_add_backward",
            ("dy", "x", *_ADAPTER, "s", *_BRANCH, "need_x", "need_a", "need_b"),
            ("dx", "da", "db"),
            leading=("dy", "x", "lora_b", "lora_a"),
        ),
    )
}
