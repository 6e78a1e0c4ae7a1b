"""Which rows belong to which group: one value that is made once a batch and read by every layer."""

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from numbers import Integral, Real
from operator import index as as_int
from typing import Any, NoReturn

import torch
from torch import Tensor


class Groups:
    """Which group each row of a batch belongs to: its adapter, its expert. Immutable.

    Made by `from_rows`, `from_segments` or `from_names`, on the device of the rows. Making one from
    a tensor of another device than the CPU waits for its values, to check them; using it waits for
    nothing. Where values cannot be waited for (torch.compile, a CUDA graph's capture) they are
    checked on the device.

    Attributes:
        count: G, the number of groups.
        rows: M, the number of rows of a batch that it fits, or None where rows may lie past its
            last segment.
        order: int64 [T], the rows from the first group's to the last's, then those of no group,
            each group's in the order of the batch; None where that is all rows as they lie.
        offsets: int64 [G + 2], where in `order` the rows of each group begin, those of no group
            begin, and all end.
        bounds: `offsets` as numbers, None where they are not known.
        in_order: whether rows are known to lie as `order` has them.
    """

    __slots__ = ("count", "rows", "order", "offsets", "bounds", "in_order")  # noqa: RUF023

    count: int
    rows: int | None
    order: Tensor | None
    offsets: Tensor
    bounds: tuple[int, ...] | None
    in_order: bool

    def __init__(self) -> None:
        raise TypeError("Groups: made by from_rows, from_segments or from_names")

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"Groups are immutable: {name} cannot be set")

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return _made, tuple(getattr(self, name) for name in Groups.__slots__)

    def __repr__(self) -> str:
        if self.bounds is None:
            return f"Groups(count={self.count}, rows={self.rows}, device={self.offsets.device})"
        sizes = [end - begin for begin, end in pairwise(self.bounds)]
        return f"Groups(rows of each={sizes[:-1]}, of none={sizes[-1]})"

    @staticmethod
    def from_rows(index: Tensor | Sequence[int], count: int) -> "Groups":
        """Groups of rows in any order.

        Args:
            index: the group of each row, 0 to count - 1, or -1 for none: an integer tensor, whose
                shape is that of x without its last dimension, or numbers.
            count: G, the number of groups.

        Raises ValueError for a group out of range, TypeError for what is not an integer.
        """
        if not isinstance(index, Tensor):
            index = torch.tensor(whole_numbers("index", index), dtype=torch.int64)
        _check_integers("index", index)
        _check_count(count)
        index = index.reshape(-1).long()
        wrong = ((index < -1) | (index >= count)).any()
        if not _waits(index):
            torch._assert_async(~wrong, f"index: expected groups of -1 to {count - 1}")
        elif wrong:
            raise ValueError(
                f"index: expected groups of -1 to {count - 1},"
                f" got {int(index.min())} to {int(index.max())}"
            )
        # Those of no group come last.
        groups, order = torch.where(index < 0, count, index).sort(stable=True)
        edges = torch.arange(count + 2, device=index.device)
        offsets = torch.searchsorted(groups, edges)
        if not _waits(index):
            return _made(count, index.numel(), order, offsets)
        in_order = torch.equal(order, torch.arange(len(order), device=order.device))
        return _made(count, index.numel(), order, offsets, tuple(offsets.tolist()), in_order)

    @staticmethod
    def from_segments(
        lengths: Tensor | Sequence[int],
        groups: Sequence[int] | None = None,
        count: int | None = None,
    ) -> "Groups":
        """Groups of rows that lie one segment after the other; rows past the last segment are
        nobody's: of them y and dx are zero.

        Args:
            lengths: the number of rows of each segment, which may be 0: numbers, or an integer
                tensor [S] on the device of x, as a router counts its tokens.
            groups: the group of each segment, -1 for none; segment i is group i if not given.
            count: G, the number of groups; as many as there are segments if not given.

        Raises ValueError for a negative length, a group out of range or lists of other lengths,
        TypeError for what is not an integer.
        """
        if isinstance(lengths, Tensor):
            _check_integers("lengths", lengths)
            if lengths.dim() != 1:
                raise ValueError(f"lengths: expected shape [S], got {tuple(lengths.shape)}")
        else:
            lengths = whole_numbers("lengths", lengths)
        given = lengths.tolist() if isinstance(lengths, Tensor) and _waits(lengths) else lengths
        count = len(lengths) if count is None else count
        _check_count(count)
        segments = [*range(len(lengths))] if groups is None else whole_numbers("groups", groups)
        if len(segments) != len(lengths):
            raise ValueError(
                f"groups: expected one of each of {len(lengths)} segments, got {len(segments)}"
            )
        wrong = [group for group in segments if not -1 <= group < count]
        if wrong:
            raise ValueError(f"groups: expected groups of -1 to {count - 1}, got {wrong[0]}")
        if not isinstance(given, Tensor):
            negative = [length for length in given if length < 0]
            if negative:
                raise ValueError(f"lengths: expected at least 0, got {negative[0]}")
        if segments == [*range(count)]:
            return _consecutive(lengths, given)
        if isinstance(given, Tensor):
            raise ValueError(
                "groups: segments of other groups than their own need lengths that are known on"
                " the host"
            )
        device = lengths.device if isinstance(lengths, Tensor) else None
        rows = [g for g, length in zip(segments, given, strict=True) for _ in range(length)]
        made = Groups.from_rows(torch.tensor(rows, dtype=torch.int64, device=device), count)
        return _made(count, None, made.order, made.offsets, made.bounds, made.in_order)

    @staticmethod
    def from_names(
        names: Sequence[str | None],
        table: Sequence[str] | Mapping[str, int],
        rows_per_sample: int | Sequence[int] = 1,
    ) -> "Groups":
        """Groups of the samples of a batch, each named by its adapter.

        Args:
            names: the name of each sample's adapter, None for none.
            table: the names in the order of their groups, or name -> group.
            rows_per_sample: the rows of each sample, or of one each.

        Raises ValueError for an unknown name, listing the known, TypeError for numbers of rows that
        are not integers.
        """
        table = table if isinstance(table, Mapping) else {name: i for i, name in enumerate(table)}
        unknown = [name for name in names if name is not None and name not in table]
        if unknown:
            known = ", ".join(map(repr, table)) or "none"
            raise ValueError(f"names: got {unknown[0]!r}, known adapters are {known}")
        single = isinstance(rows_per_sample, Real)
        given: Any = [rows_per_sample] * len(names) if single else rows_per_sample
        each = whole_numbers("rows_per_sample", given)
        if len(each) != len(names):
            raise ValueError(
                f"rows_per_sample: expected one of each of {len(names)} samples, got {len(each)}"
            )
        of_samples = [-1 if name is None else table[name] for name in names]
        rows = [group for group, rows in zip(of_samples, each, strict=True) for _ in range(rows)]
        return Groups.from_rows(rows, len(table))

    def select(self, groups: Sequence[int]) -> "Groups":
        """The rows of these groups, which become 0, 1, …; those of other groups are of none.

        Raises ValueError for a group out of range or given twice, and where the numbers of rows are
        not known on the host.
        """
        if self.bounds is None:
            raise ValueError("select: the numbers of rows are not known on the host")
        if len(set(groups)) != len(groups) or not all(0 <= g < self.count for g in groups):
            raise ValueError(
                f"groups: expected different ones of 0 to {self.count - 1}, got {[*groups]}"
            )
        _check_count(len(groups))
        if [*groups] == [*range(self.count)]:
            return self
        others = [g for g in range(self.count + 1) if g not in groups]  # and of none
        order = self.order
        if order is None:
            order = torch.arange(self.bounds[-1], device=self.offsets.device)
        parts = [order[self.bounds[g] : self.bounds[g + 1]] for g in (*groups, *others)]
        bounds = (0, *accumulate(len(part) for part in parts[: len(groups)]), self.bounds[-1])
        # Those of none in the order of the batch.
        none = torch.cat(parts[len(groups) :]).sort().values
        order = torch.cat([*parts[: len(groups)], none])
        offsets = torch.tensor(bounds, dtype=torch.int64).to(order.device, non_blocking=True)
        return _made(len(groups), self.rows, order, offsets, bounds)

    def to(self, device: torch.device | str) -> "Groups":
        """The same on another device; itself if it is there."""
        if self.offsets.device == torch.device(device):
            return self
        order = None if self.order is None else self.order.to(device, non_blocking=True)
        offsets = self.offsets.to(device, non_blocking=True)
        return _made(self.count, self.rows, order, offsets, self.bounds, self.in_order)


def _made(*values: object) -> Groups:
    """Of the attributes in their order; the last two, if not given, are not known."""
    groups: Groups = object.__new__(Groups)
    values = (*values, None, False)[: len(Groups.__slots__)]
    for name, value in zip(Groups.__slots__, values, strict=True):
        object.__setattr__(groups, name, value)
    return groups


def _consecutive(lengths: Tensor | Sequence[int], given: Tensor | Sequence[int]) -> Groups:
    """Segments that are each other group's, in the order of the batch."""
    bounds = None
    if not isinstance(given, Tensor):
        ends = [*accumulate(given)]
        bounds = (0, *ends, ends[-1])
    if isinstance(lengths, Tensor):
        ends_there = lengths.long().cumsum(0)
        offsets = torch.cat([ends_there.new_zeros(1), ends_there, ends_there[-1:]])
    else:
        offsets = torch.tensor(bounds, dtype=torch.int64)
    return _made(len(lengths), None, None, offsets, bounds, True)


def whole_numbers(name: str, values: Sequence[Any]) -> list[int]:
    """As ints; TypeError, naming the argument, for others, which int() would cut off."""
    found = []
    for value in values:
        try:
            if isinstance(value, bool):
                raise TypeError
            found.append(as_int(value))
        except TypeError:
            raise TypeError(
                f"{name}: expected integers, got {value!r} of type {type(value).__name__}"
            ) from None
    return found


def _check_integers(name: str, tensor: Tensor) -> None:
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{name}: expected an integer tensor, got {tensor.dtype}")


def _check_count(count: int) -> None:
    if isinstance(count, bool) or not isinstance(count, Integral):
        raise TypeError(f"count: expected an integer, got {type(count).__name__}")
    if count < 1:
        raise ValueError(f"count: expected at least one group, got {count}")


def _waits(tensor: Tensor) -> bool:
    """Whether the values of a tensor can be read by the host now."""
    if torch.compiler.is_compiling() or tensor.is_meta:
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
