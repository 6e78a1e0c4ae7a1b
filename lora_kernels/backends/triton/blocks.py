"""Device code shared by the kernels: tile order, masked tiles, dropout mask, low-rank step.

What travels together from one device function to the next is a NamedTuple, which Triton takes as
its fields, compiling and interpreting. It is built where it is passed on: under a name of its own
its constants would become tensors. Parameters of kernels stay flat, as the driver takes them.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Matrix(NamedTuple):
    """A matrix in memory: element (i, j) lies at ptr + i * stride_r + j * stride_c."""

    ptr: Any
    stride_r: Any
    stride_c: Any
    rows: Any
    cols: Any


class Place(NamedTuple):
    """The tile [BM, BN] of a matrix whose first element is (row, col)."""

    row: Any
    col: Any
    BM: tl.constexpr
    BN: tl.constexpr


class Mask(NamedTuple):
    """Dropout: the seed in DROP words, 0 without dropout; what is kept is multiplied by scale."""

    seed: Any
    threshold: Any
    scale: Any
    DROP: tl.constexpr


class Ranks(NamedTuple):
    """How a low-rank product is formed: COUNT blocks of R ranks each, times HIGH, a power of
    two."""

    R: tl.constexpr
    COUNT: tl.constexpr
    HIGH: tl.constexpr
    PRECISION: tl.constexpr


class Term(NamedTuple):
    """The low-rank term of a product: low [M,r] contiguous times mat [r,N]."""

    low: Matrix
    mat: Matrix
    mask: Mask
    ranks: Ranks


@triton.jit
def loop_steps(extent, BLOCK: tl.constexpr):
    """Trip count of a reduction loop, at least 1: ptxas serialises the wgmma of a loop that may not
    run (C7515). The surplus trip reads zeros."""
    return tl.maximum(tl.cdiv(extent, BLOCK), 1)


@triton.jit
def tile_order(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Tile id -> (row tile, column tile); GROUP row tiles sweep the columns together and share them
    in L2. Within a group the tiles of column 0 come first."""
    per_group = GROUP * tiles_n
    first = (tile // per_group) * GROUP
    rows = tl.minimum(tiles_m - first, GROUP)
    inside = tile % per_group
    return first + inside % rows, inside // rows


@triton.jit
def tile_pointers(matrix, rows, cols):
    """Pointers of a tile, in 64 bits: a matrix may have more than 2^31 elements."""
    down = matrix.ptr + rows.to(tl.int64)[:, None] * matrix.stride_r
    return down + cols.to(tl.int64)[None, :] * matrix.stride_c


@triton.jit
def load_tile(matrix, rows, cols):
    """The tile rows x cols of a matrix, zero outside it."""
    return load_tile_hinted(matrix, rows, cols, "", "")


@triton.jit
def load_tile_hinted(matrix, rows, cols, EVICTION: tl.constexpr, CACHE: tl.constexpr):
    """`load_tile` with an eviction policy and a cache modifier."""
    inside = (rows[:, None] < matrix.rows) & (cols[None, :] < matrix.cols)
    pointers = tile_pointers(matrix, rows, cols)
    return tl.load(pointers, mask=inside, other=0.0, eviction_policy=EVICTION, cache_modifier=CACHE)


@triton.jit
def store_tile(matrix, tile, rows, cols):
    """Rounds the tile to the matrix's dtype and stores what lies inside it."""
    inside = (rows[:, None] < matrix.rows) & (cols[None, :] < matrix.cols)
    pointers = tile_pointers(matrix, rows, cols)
    tl.store(pointers, tile.to(matrix.ptr.dtype.element_ty), mask=inside)


@triton.jit
def multiply_add(left, right, acc, PRECISION: tl.constexpr):
    """acc + left @ right, of one step of a loop.

    In fp32 the sum of a step is formed by itself. One FMA after the other down a whole row has
    four times cuBLAS's error at 4096 columns, which sums in shares.
    """
    if PRECISION == "ieee" and left.dtype == tl.float32:
        # Any value but 0 keeps Triton from joining the two again; it means something in fp8 alone.
        return acc + tl.dot(left, right, input_precision=PRECISION, max_num_imprecise_acc=1)
    else:
        return tl.dot(left, right, acc, input_precision=PRECISION)


@triton.jit
def load_seed(ptr, DROP: tl.constexpr):
    """(seed, first row, first block of columns) of x in the mask, from DROP words."""
    if DROP == 3:
        row, col = tl.load(ptr + 1).to(tl.int32), tl.load(ptr + 2).to(tl.int32)
        return tl.load(ptr), row, col // 8
    else:
        return tl.load(ptr), 0, 0


@triton.jit
def keep_tile(seed, rows, first_col, threshold, COLS: tl.constexpr):
    """Mask (True = kept) of rows x [first_col, first_col + COLS), defined in backends/dropout.py.

    first_col is a multiple of 8. The counters are 32 bits wide; 64-bit ones select another Philox.
    """
    key, row_0, block_0 = seed
    blocks = block_0 + first_col // 8 + tl.arange(0, COLS // 8)
    rows = row_0 + rows
    w0, w1, w2, w3 = tl.philox(key, blocks[None, :], rows[:, None], 0, 0, n_rounds=7)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    halves = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(halves, (rows.shape[0], COLS)).to(tl.int32) >= threshold


@triton.jit
def column_halves(tile, ROWS: tl.constexpr, COLS: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLS // 2)), (0, 2, 1)))


@triton.jit
def add_low_rank(acc, term, seed, place):
    """acc + HIGH * (low @ mat), or with dropout, whose seed is loaded, acc + scale * keep *
    (low @ mat).

    low is read from memory, where it lies rounded: handed over in registers it would become the
    left operand of a register-form wgmma, which old ptxas releases miscompile. Past L1, because
    another program of the same launch may have written it.
    """
    rows, cols = place.row + tl.arange(0, place.BM), place.col + tl.arange(0, place.BN)
    R: tl.constexpr = term.ranks.R
    HIGH: tl.constexpr = term.ranks.HIGH
    total = tl.zeros((place.BM, place.BN), tl.float32) if term.mask.DROP else acc
    if HIGH != 1.0:
        total *= 1.0 / HIGH
    for block in tl.range(term.ranks.COUNT, num_stages=1):
        rank = block * R + tl.arange(0, R)
        left = load_tile_hinted(term.low, rows, rank, "", ".cg")
        right = load_tile(term.mat, rank, cols)
        total = tl.dot(left, right, total, input_precision=term.ranks.PRECISION)
    if term.mask.DROP:
        keep = keep_tile(seed, rows, place.col, term.mask.threshold, place.BN)
        total = acc + tl.where(keep, total * term.mask.scale, 0.0)
    if HIGH != 1.0:
        total *= HIGH
    return total
