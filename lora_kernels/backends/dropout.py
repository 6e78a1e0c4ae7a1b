"""The dropout mask of the library, in plain torch: the definition every backend must match bit for
bit.

Element (m, k) of the flattened input owns one 16-bit half-word of a Philox4x32 block with 7 rounds
(Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11):

    key      (low 32 bits of the seed, high 32 bits of the seed)
    counter  (k >> 3, m, 0, 0)
    half     word (k & 7) >> 1, low half first
    kept     iff half >= threshold(p)

so a block serves eight neighbouring elements and the mask depends on no tile or block size.
"""

import torch
from torch import Tensor

ROUNDS = 7
_MUL_0, _MUL_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


def threshold(p: float) -> int:
    """Number of the 65536 half-words that drop an element, at most 65535 so that some element is
    kept."""
    return min(round(65536 * p), 65535)


def keep_scale(p: float) -> float:
    """What kept elements are multiplied by: the inverse of the exact probability of being kept."""
    return 65536 / (65536 - threshold(p))


def _multiply(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low half of a 32 x 32 bit product; int64 wraps, but its 64 bits are the right
    ones."""
    product = word * constant
    return (product >> 32) & _LOW, product & _LOW


def philox(seed: Tensor, c0: Tensor, c1: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-7 of counters (c0, c1, 0, 0): four tensors of 32-bit words held in int64.

    The counters broadcast. A row of c0 against a column of c1 stays a row and a column for two of
    the seven rounds, which then cost next to nothing.
    """
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    c2 = c3 = torch.zeros((), dtype=torch.int64, device=seed.device)
    for _ in range(ROUNDS):
        high_0, low_0 = _multiply(_MUL_0, c0)
        high_1, low_1 = _multiply(_MUL_1, c2)
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0, k1 = (k0 + _WEYL_0) & _LOW, (k1 + _WEYL_1) & _LOW
    return c0, c1, c2, c3


def keep_mask(seed: Tensor, first_row: int, rows: int, columns: int, p: float) -> Tensor:
    """Mask [rows, columns] (bool, True = kept) of the rows from `first_row` on.

    `seed` is an int64 tensor of one element, or of three where x is a part of a larger matrix: the
    seed, then the row and the column (a multiple of 8) of x's first element there. The mask lies on
    its device. No host synchronisation.
    """
    block = torch.arange((columns + 7) // 8, dtype=torch.int64, device=seed.device)
    row = torch.arange(first_row, first_row + rows, dtype=torch.int64, device=seed.device)
    if seed.numel() == 3:
        seed, row_0, column_0 = seed.reshape(3)
        row, block = row + row_0, block + (column_0 >> 3)
    words = torch.stack(philox(seed.reshape(()), block[None, :], row[:, None]), dim=-1)
    halves = words.to(torch.int32).view(torch.int16).reshape(rows, 8 * len(block))[:, :columns]
    # int16 compares as signed: flipping the top bit on both sides gives the unsigned comparison.
    return (halves ^ -32768) >= threshold(p) - 32768
