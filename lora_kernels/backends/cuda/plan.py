"""What a plan is: one declaration. The choice, tables, tuner, code generation check, documentation
and tests read it from the registry (`cuda.plans.PLANS`) and know of plans nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

from torch import Tensor

from lora_kernels.backends.device import Target
from lora_kernels.backends.reference import Gradients
from lora_kernels.branch import Base, Branch, Dense, Need
from lora_kernels.weights import CODED, QuantizedWeight

# Of a dense weight; of a base output that is given, lora_add and its kin; the forward of a
# quantised weight, whose backward is that of what is given beside strips of the weight.
OPS = ("forward", "backward", "add", "add_backward", "coded")
WEIGHTS = ("dense", *CODED)
DTYPES = ("float32", "float16", "bfloat16")

Fields = Mapping[str, int]
Tiles = Mapping[str, Fields]


class Coded(NamedTuple):
    """x deq(W)^T + bias: a quantised weight [N,K] and bias [N]."""

    weight: QuantizedWeight
    bias: Tensor | None


ForwardRun = Callable[[Dense, Tensor, Branch, bool, Tiles], tuple[Tensor, Tensor | None]]
BackwardRun = Callable[[Base, Tensor, Tensor, Tensor, Branch, Need, Tiles], Gradients]
# out = base_out + the branch, both may be one tensor; returns s, whose last columns may be padding.
AddRun = Callable[[Tensor, Tensor, Branch, Tensor, Tiles], Tensor]
CodedRun = Callable[[Coded, Tensor, Branch, bool, Tiles], tuple[Tensor, Tensor | None]]
Run = TypeVar("Run", ForwardRun, BackwardRun, AddRun, CodedRun)


class Call(NamedTuple):
    """What a plan depends on; op is one of OPS."""

    op: str
    dtype: str
    M: int
    N: int
    K: int
    r: int
    dropout: bool
    aligned: bool = True  # rows and bases of x, the weight and dy allow loads in wide words
    readable: bool = True  # x, the weight and lora_a have the rows that decode_cuda reads
    weight: str = "dense"  # one of WEIGHTS, another of the op coded alone


class Launch(NamedTuple):
    """One launch of a pass, whose tile has an analytic value beside its kernel, which knows how the
    operands lie. `variants` gives the fields worth timing for an aligned 16-bit call beside that
    tile; where `serves` is false of a call, the pass goes without this launch."""

    name: str
    tile: type[NamedTuple]
    variants: Callable[[Call, Target], Iterator[Fields]]
    serves: Callable[[Call], bool] = lambda call: True

    def check(self, fields: Fields, where: str) -> None:
        """ValueError where these cannot be fields of the tile."""
        legal = self.tile._fields
        for name, value in fields.items():
            if name not in legal:
                raise ValueError(
                    f"{where}: {self.name}: got the field {name!r}, legal ones are"
                    f" {', '.join(legal)}"
                )
            if type(value) is not int or value <= 0:
                raise ValueError(
                    f"{where}: {self.name}: {name}: expected a positive integer, got {value!r}"
                )
            if name not in _ANY_NUMBER and value & (value - 1):
                raise ValueError(
                    f"{where}: {self.name}: {name}: expected a power of two, got {value}"
                )


_BASES = dict.fromkeys(("forward", "backward"), "dense weight") | {
    "add": "base output that is given (lora_add)",
    "add_backward": "base output that is given (lora_add)",
    "coded": "quantised weight",
}
_ANY_NUMBER = ("group", "split", "stages")


@dataclass(frozen=True)
class Pass(Generic[Run]):
    """One op of a plan: what runs it, and which calls it serves. `run` imports its kernels when it
    is called, so that a plan can be declared where they cannot run; `needs` says why a call lacks
    something beside the limits, None if nothing."""

    run: Run
    launches: tuple[Launch, ...] = ()
    dtypes: tuple[str, ...] = DTYPES
    most_rows: int | None = None
    most_rank: Callable[[Call], int] | None = None
    dropout: bool = True
    needs: Callable[[Call], str | None] = lambda call: None

    def refusal(self, call: Call) -> str | None:
        """Why it cannot serve a call, None if it can."""
        if self.most_rows is not None and self.most_rows < call.M:
            return f"the plan serves M <= {self.most_rows}, got M = {call.M}"
        if call.dropout and not self.dropout:
            return "the plan serves no dropout"
        if call.dtype not in self.dtypes:
            return f"the plan serves {' and '.join(self.dtypes)}, got {call.dtype}"
        most = None if self.most_rank is None else self.most_rank(call)
        if most is not None and call.r > most:
            kind = call.dtype + " with dropout" * call.dropout
            return f"the plan serves r <= {most} in {kind}, got r = {call.r}"
        return self.needs(call)


@dataclass(frozen=True)
class Plan:
    """A way to compute the op. Passes that two plans share are one object: a tuner times them for
    the first of both. One of quantised weights alone has None for forward and backward, which
    nobody finds who asks for its `refusal` first."""

    name: str
    summary: str  # one line of what it is
    forward: Pass[ForwardRun]
    backward: Pass[BackwardRun]
    add: Pass[AddRun] | None = None
    add_backward: Pass[BackwardRun] | None = None
    coded: Pass[CodedRun] | None = None
    # Programs of a launch wait for or follow one another: more runs must prove it.
    cooperates: bool = False

    @property
    def bases(self) -> tuple[str, ...]:
        """What it stands on."""
        found = {"dense": self.forward, "given": self.add, "quantised": self.coded}
        return tuple(base for base, serving in found.items() if serving is not None)

    def serving(self, op: str) -> Pass[Any] | None:
        """What serves one of OPS."""
        found: Pass[Any] | None = getattr(self, op)
        return found

    def refusal(self, call: Call) -> str | None:
        """Why the plan cannot serve a call, None if it can."""
        found = self.serving(call.op)
        if found is None:
            return f"the plan serves no {_BASES[call.op]}"
        return found.refusal(call)

    def launches(self, ops: tuple[str, ...] = OPS) -> dict[str, Launch]:
        """By name, of these ops."""
        passes = [found for op in ops if (found := self.serving(op)) is not None]
        return {launch.name: launch for found in passes for launch in found.launches}

    def check(self, tiles: Tiles, where: str, ops: tuple[str, ...] = OPS) -> None:
        """ValueError where these cannot be tiles of the plan's launches for these ops."""
        legal = self.launches(ops)
        for name, fields in tiles.items():
            if name not in legal:
                raise ValueError(
                    f"{where}: got {name!r}, launches of the plan {self.name} are"
                    f" {', '.join(legal) or 'none'}"
                )
            legal[name].check(fields, where)
