"""Device code shared by the kernels: tile order, masked tiles, dropout mask, low-rank step."""

import triton
import triton.language as tl


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
def tile_pointers(ptr, rows, cols, stride_r, stride_c):
    """Pointers of a tile, in 64 bits: a matrix may have more than 2^31 elements."""
    return ptr + rows.to(tl.int64)[:, None] * stride_r + cols.to(tl.int64)[None, :] * stride_c


@triton.jit
def load_tile(ptr, rows, cols, stride_r, stride_c, n_rows, n_cols):
    """The tile rows x cols of a [n_rows, n_cols] matrix, zero outside it."""
    return load_tile_hinted(ptr, rows, cols, stride_r, stride_c, n_rows, n_cols, "", "")


@triton.jit
def load_tile_hinted(
    ptr, rows, cols, stride_r, stride_c, n_rows, n_cols, EVICTION: tl.constexpr,
    CACHE: tl.constexpr,
):  # fmt: skip
    """`load_tile` with an eviction policy and a cache modifier."""
    inside = (rows[:, None] < n_rows) & (cols[None, :] < n_cols)
    pointers = tile_pointers(ptr, rows, cols, stride_r, stride_c)
    return tl.load(pointers, mask=inside, other=0.0, eviction_policy=EVICTION, cache_modifier=CACHE)


@triton.jit
def store_tile(ptr, tile, rows, cols, stride_r, stride_c, n_rows, n_cols):
    """Rounds the tile to the matrix's dtype and stores what lies inside it."""
    inside = (rows[:, None] < n_rows) & (cols[None, :] < n_cols)
    pointers = tile_pointers(ptr, rows, cols, stride_r, stride_c)
    tl.store(pointers, tile.to(ptr.dtype.element_ty), mask=inside)


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
def add_low_rank(
    acc, low, mat, seed, row, col, M, N, r, scale, threshold, stride_mr, stride_mc,
    R: tl.constexpr, RANKS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    DROP: tl.constexpr, HIGH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + HIGH * (low @ mat), or with DROP acc + scale * keep * (low @ mat); low [M,r] is
    contiguous, HIGH a power of two.

    low is read from memory, where it lies rounded: handed over in registers it would become the
    left operand of a register-form wgmma, which old ptxas releases miscompile. Past L1, because
    another program of the same launch may have written it.
    """
    rows, cols = row + tl.arange(0, BM), col + tl.arange(0, BN)
    term = tl.zeros((BM, BN), tl.float32) if DROP else acc
    if HIGH != 1.0:
        term *= 1.0 / HIGH
    for block in tl.range(RANKS, num_stages=1):
        rank = block * R + tl.arange(0, R)
        left = load_tile_hinted(low, rows, rank, r, 1, M, r, "", ".cg")
        right = load_tile(mat, rank, cols, stride_mr, stride_mc, r, N)
        term = tl.dot(left, right, term, input_precision=PRECISION)
    if DROP:
        keep = keep_tile(seed, rows, col, threshold, BN)
        term = acc + tl.where(keep, term * scale, 0.0)
    if HIGH != 1.0:
        term *= HIGH
    return term
