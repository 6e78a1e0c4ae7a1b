"""Several adapters of one layer, by name, and batches whose rows have adapters of their own.

A layer's first adapter is its lora_A and lora_B; the others lie in `adapters`, by name. Those in
use add up.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_kernels._dispatch import in_backward
from lora_kernels.grouped import Groups
from lora_kernels.nn.tensors import FACTORS, Factors, LayerTensors
from lora_kernels.sharding import is_sharded

# Of the adapter that `apply_lora` gives, as PEFT calls it.
DEFAULT = "default"


def check_name(name: object) -> str:
    """A name that an adapter can have in a state dict."""
    if not isinstance(name, str):
        raise TypeError(f"name: expected a string, got {type(name).__name__}")
    if not name or "." in name or hasattr(nn.ModuleDict, name):
        raise ValueError(
            f"name: got {name!r}, expected one without a dot that nn.ModuleDict does not use itself"
        )
    return name


class NamedAdapter(Factors):
    """An adapter beside a layer's first: lora_A [rank, in_features], lora_B [out_features,
    rank]. Called, it gives both."""

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.lora_A, self.lora_B

    def _load_from_state_dict(
        self, state_dict: dict[str, object], prefix: str, *others: object
    ) -> None:
        # As with a layer's first adapter, what has none of it leaves it alone.
        if any(prefix + name in state_dict for name in FACTORS):
            super()._load_from_state_dict(state_dict, prefix, *others)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scaling={self.scaling:g}, dropout={self.dropout:g}"


class Acting(NamedTuple):
    """An adapter as the next forward has it."""

    A: Tensor
    B: Tensor
    scaling: float
    dropout: float


class Rows:
    """Which adapter each row of a batch has, of those of the names in `table`.

    Made of names, one of each sample, whose rows lie together and are as many for each; or of
    `Groups`, whose numbers stand for the names of the table.

    Attributes:
        again: whether a forward is computed again, in a backward, with the rows it first had.
    """

    def __init__(
        self, given: Sequence[str | None] | Groups, table: Sequence[str], device: torch.device
    ) -> None:
        self.table, self.again = tuple(table), False
        self._made: dict[object, Groups] = {}
        self._first: dict[int, tuple[str, ...]] = {}
        self._groups = given if isinstance(given, Groups) else None
        self._names = () if isinstance(given, Groups) else tuple(given)
        if self._groups is None:
            Groups.from_names(self._names, self.table)  # checks them
            numbers = [-1 if n is None else self.table.index(n) for n in self._names]
            self._index = torch.tensor(numbers, device=device)  # what compiled graphs read
            self._per_sample = {1}
        elif self._groups.count != len(self.table):
            raise ValueError(
                f"rows: expected groups of the {len(self.table)} adapters"
                f" {', '.join(map(repr, self.table))}, got {self._groups.count} groups"
            )

    def recomputed(self) -> "Rows":
        """The same, for a forward that is computed again."""
        rows = copy.copy(self)
        rows.again = True
        return rows

    def there(self, layer: "OfRows") -> tuple[str, ...]:
        """Of a layer's adapters those that rows may have.

        RuntimeError where the layer had one more when these rows first came to it.
        """
        if torch.compiler.is_compiling():
            return tuple(name for name in layer.names if name in self.table)
        found = self._first.get(id(layer))
        if found is None:
            named = set(self.table if self._groups is not None else self._names)
            found = self._first[id(layer)] = tuple(n for n in layer.names if n in named)
        gone = [name for name in found if not layer.carries(name)]
        if gone:
            raise RuntimeError(
                f"adapter_rows: the adapter {gone[0]!r} was deleted, and a forward with rows of it"
                " is computed again"
            )
        return found

    def groups(self, x: Tensor, names: tuple[str, ...]) -> Groups:
        """The rows of x [..., K] by the adapters of these names; others are of none."""
        if torch.compiler.is_compiling():
            return self._traced(x, names)
        key = names, x.shape[:-1], x.device
        if key not in self._made:
            self._made[key] = self._make(x, names)
        return self._made[key]

    def _make(self, x: Tensor, names: tuple[str, ...]) -> Groups:
        if self._groups is not None:
            return self._groups.select([self.table.index(name) for name in names]).to(x.device)
        here = [name if name in names else None for name in self._names]
        return Groups.from_names(here, names, self._rows_per_sample(x)).to(x.device)

    def _rows_per_sample(self, x: Tensor) -> int:
        """x is [samples, ..., K], or [rows, K] with the rows of each sample together, as many as in
        another layer or one. Samples that generation repeats (beams) lie together."""
        samples = len(self._names)
        each, rest = divmod(x.shape[:-1].numel(), samples)
        if x.dim() > 2 and x.shape[0] % samples == 0:
            self._per_sample.add(each)
        elif rest or each not in self._per_sample:
            raise ValueError(
                f"adapter_rows: a layer gets x {tuple(x.shape)}, whose rows are not those of"
                f" {samples} samples one after the other; give Groups in place of names"
            )
        return each

    def _traced(self, x: Tensor, names: tuple[str, ...]) -> Groups:
        """Of a compiled graph, which other contents use again: the numbers are a tensor in it."""
        if self._groups is not None:
            if names != self.table:
                raise ValueError(
                    "adapter_rows: a compiled layer that lacks adapters of the groups needs names"
                    " in their place"
                )
            return self._groups
        here = [names.index(name) if name in names else -1 for name in self.table]
        index = torch.tensor([*here, -1], device=x.device)[self._index]
        each = x.shape[:-1].numel() // self._index.shape[0]
        return Groups.from_rows(index.repeat_interleave(each), len(names))


class OfRows:
    """A layer that computes rows of several adapters; mixed in before nn.Module."""

    _rows: Rows | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the layer's adapters."""
        raise NotImplementedError

    def carries(self, name: str) -> bool:
        """Whether one of the layer's adapters has this name."""
        return name in self.names

    def why_no_rows(self) -> str | None:
        """Why rows cannot have adapters of their own as the layer is now; None if they can."""
        raise NotImplementedError

    def rows_now(self) -> Rows | None:
        """The rows of the forward at hand: one that is computed again in a backward has those, if
        any, that it first had."""
        rows = self._rows
        if rows is None or torch.compiler.is_compiling() or rows.again or not in_backward():
            return rows
        return None


class Named(OfRows, LayerTensors):
    """The adapters of `LoRALayer` by name."""

    # Of a layer that was given one adapter and no name for it.
    _first: str = DEFAULT
    _active: tuple[str, ...] = (DEFAULT,)
    adapters: nn.ModuleDict

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the layer's adapters, its first's first."""
        others = self._modules.get("adapters")
        return (self._first, *(() if others is None else others._modules))

    def carries(self, name: str) -> bool:
        others = self._modules.get("adapters")
        return name == self._first or (others is not None and name in others._modules)

    @property
    def active(self) -> tuple[str, ...]:
        """The adapters in use, which add up."""
        return self._active

    def adapter(self, name: str) -> Factors:
        """The adapter of this name: the layer itself where it is its first."""
        if name == self._first:
            return self
        found: Factors = self._modules["adapters"]._modules[name]  # type: ignore[union-attr,assignment]
        return found

    def prefix(self, name: str) -> str:
        """What stands before the names of an adapter's tensors in the layer's state dict."""
        return "" if name == self._first else f"adapters.{name}."

    def acting(self) -> Iterator[Acting]:
        """The adapters in use as the next forward has them."""
        for adapter in map(self.adapter, self._active):
            yield Acting(*adapter.factors(), adapter.scaling, adapter.dropout)

    def _in_forward(self, name: str) -> Acting:
        """An adapter in the layer's own forward, whose hooks have run."""
        adapter = self.adapter(name)
        of_self = adapter is self
        A, B = self.low_rank(self.lora_A, self.lora_B) if of_self else adapter()
        return Acting(A, B, adapter.scaling, adapter.dropout if self.training else 0.0)

    def activate(self, names: Sequence[str]) -> None:
        """Uses these adapters alone; those that the layer does not have are passed over.

        RuntimeError: the layer is merged.
        """
        active = tuple(name for name in names if name in self.names)
        if active != self._active:
            self._require_unmerged("set_adapter")
            self._active = active

    def why_no_rows(self) -> str | None:
        if self._merged:
            return "is merged; call unmerge_lora first"
        if self.pissa_A is not None:
            return "was started with PiSSA or OLoRA, rows of other adapters need its original base"
        return self.why_more_than_factors()

    def why_no_other(self, name: str) -> str | None:
        """Why the layer cannot be given an adapter of this name; None if it can."""
        if name in self.names:
            return f"already carries an adapter {name!r}"
        if self._merged:
            return "is merged; call unmerge_lora first"
        if self.pissa_A is not None:
            return (
                "was started with PiSSA or OLoRA and no longer holds its original base;"
                " save_adapter, remove_lora and load_adapter make it a plain one"
            )
        if is_sharded(self.weight) or is_sharded(self.lora_A):
            return "is sharded; add adapters before parallelize_module or fully_shard"
        return self.why_more_than_factors()

    def put_other(self, name: str, adapter: NamedAdapter) -> None:
        """Gives the layer a further adapter, which is not in use."""
        if self._modules.get("adapters") is None:
            self.adapters = nn.ModuleDict()
        self.adapters[name] = adapter

    def why_undeletable(self, name: str) -> str | None:
        """Why the adapter of this name cannot be taken out; None if it can."""
        if self._merged:
            return "is merged; call unmerge_lora first"
        if self._rows is not None and name in self._rows.there(self):
            return f"computes rows of {name!r} within adapter_rows"
        if name == self._first and len(self.names) > 1:
            return self.why_fixed()
        return None

    def delete(self, name: str) -> None:
        """Takes out one of several adapters. Where it is the first, the next becomes that: its
        parameters stay the same objects."""
        others = self.get_submodule("adapters")
        assert isinstance(others, nn.ModuleDict)
        if name == self._first:
            self._first = next(iter(others))
            adapter = others[self._first]
            for key in (*FACTORS, "alpha", "dropout", "use_rslora", "freeze_a"):
                setattr(self, key, getattr(adapter, key))
            del others[self._first]
        else:
            del others[name]
        if not others:
            del self.adapters
        self._active = tuple(one for one in self._active if one != name)
