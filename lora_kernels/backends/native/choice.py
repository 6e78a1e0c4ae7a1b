"""Which kernels compute a call on this CPU: one table, of what was measured.

    python -m benchmarks.native --few        up to how many rows, dense weights
    python -m benchmarks.quantized --few     quantised ones
    python -m benchmarks.native              all of it, beside unfused torch and PEFT

Up to so many rows one native call computes the layer: it reads the weight once, as it lies. Beyond,
torch's product reuses what it has in registers for more rows than these kernels do; but where its
products of fp32 are slow (AMD's processors with AVX-512), the native ones go on, some rows at a
time. Where a CPU has no instructions for products of 16 bits (of fp16 nearly none has), torch forms
them in fp32 too, and slower. A layer whose product is torch's has its low-rank half by native
passes where those win, with dropout always.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from lora_kernels.backends.native import extension
from lora_kernels.backends.native.extension import ISA_NAMES

ANY = 1 << 32  # rows
# Of 16 bits under a weight in fp32 (autocast): beyond, a copy of it is the faster factor, but for
# those that pack it, which round what they copy.
_MOST_WIDENED = 256
_SMALL = 1 << 20  # elements of a weight


class Few(NamedTuple):
    """Up to how many rows one call computes a layer of a dtype, forward and backward; so many times
    as many of a small weight, whose layer is bound by the host, which one call keeps less busy; of
    a weight of 4 bits, and of int8, forward."""

    forward: int
    backward: int
    of_small: int
    four_bit: int
    int8: int


class LowRank(NamedTuple):
    """From how many rows on, and below which rank, native passes are the faster low-rank half
    without dropout; on a base output that is given, whether at any rank."""

    rows: int
    ranks: int
    any_on_given: bool = False


class Choice(NamedTuple):
    """Of an instruction set, by the dtype of the weight (fp32, bf16, fp16), which may be fp32 under
    rows of 16 bits."""

    few: tuple[Few, Few, Few]
    low_rank: tuple[LowRank | None, LowRank | None, LowRank | None]


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NEVER, _LEAST = Few(0, 0, 1, 0, 0), Few(4, 4, 1, 4, 4)  # the latter where memory is waited for
_PASSES, _PAIRS = LowRank(128, 64), LowRank(1, 64, any_on_given=True)
CHOICES = {
    # torch's own loops are as good
    "plain C++": Choice((_NEVER,) * 3, (None,) * 3),
    # measured on an EPYC of AMD's
    "AVX2": Choice(
        (Few(1024, 1024, 1, 16, 64), Few(ANY, ANY, 1, 16, 64), Few(ANY, ANY, 1, 16, 64)),
        (_PASSES, None, None),
    ),
    # not measured: less than those beside it
    "AVX-512": Choice(
        (Few(48, 48, 2, 48, 48), Few(16, 8, 1, 8, 8), Few(48, 48, 2, 48, 48)),
        (_PASSES, None, None),
    ),
    # measured on an EPYC of AMD's
    "AVX-512 BF16": Choice(
        (Few(ANY, ANY, 1, 256, 256), Few(64, 96, 1, 24, 24), Few(ANY, ANY, 1, 256, 256)),
        (_PASSES, _PAIRS, None),
    ),
    # measured on a Xeon of Intel's; quantised weights on none
    "AMX": Choice(
        (Few(48, 48, 2, 48, 48), Few(192, 128, 1, 8, 8), Few(48, 48, 2, 48, 48)),
        (_PASSES, _PAIRS, None),
    ),
    # not measured
    "NEON": Choice((_LEAST,) * 3, (_PASSES, None, None)),
    "NEON BF16": Choice((_LEAST,) * 3, (_PASSES, None, None)),
}
# Of other makers than AMD, Intel's where tiles are not to be had: torch's products are faster.
OTHER_MAKERS = {
    # not measured: less than beside it, in fp32 as with tiles
    "AVX-512 BF16": Choice(
        (Few(48, 48, 2, 48, 48), Few(16, 8, 1, 8, 8), Few(48, 48, 2, 48, 48)),
        (_PASSES, _PAIRS, None),
    ),
}


def widened(rows: int, dtype: torch.dtype, isa: int) -> torch.dtype | None:
    """The dtype whose choice is that of so many rows of a dtype under a weight in fp32; None where
    that is to be copied."""
    if extension.packed_from(isa) != extension.NEVER:
        return dtype
    return torch.float32 if rows <= _MOST_WIDENED else None


def few(dtype: torch.dtype, isa: int) -> Few:
    """For a weight of a dtype, or rows of it where the weight is quantised; isa: an index of
    `extension.ISA_NAMES`."""
    return of(isa).few[_DTYPES.index(dtype)] if dtype in _DTYPES else _NEVER


def low_rank(dtype: torch.dtype, isa: int) -> LowRank | None:
    """For rows of a dtype; None where ATen's calls are the faster ones."""
    return of(isa).low_rank[_DTYPES.index(dtype)] if dtype in _DTYPES else None


def of(isa: int) -> Choice:
    name = ISA_NAMES[isa]
    if name in OTHER_MAKERS and not extension.is_amd():
        return OTHER_MAKERS[name]
    return CHOICES[name]


def is_small(weight: torch.Tensor) -> bool:
    return weight.numel() <= _SMALL


def rows(most: int) -> str:
    """How many, as it is read."""
    return "any number of rows" if most >= ANY else f"up to {most} rows"
