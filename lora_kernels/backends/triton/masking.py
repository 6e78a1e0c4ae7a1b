"""The dropout mask applied by one elementwise kernel, on any GPU: no product, no descriptor, and
the bits of backends/dropout.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.backends.device import target
from lora_kernels.backends.dropout import keep_mask, threshold
from lora_kernels.backends.triton.blocks import Matrix, keep_tile, load_seed, tile_pointers
from lora_kernels.backends.triton.launch import launch
from lora_kernels.backends.triton.tiles import cdiv

_ROWS, _COLS = 16, 256


@triton.jit(do_not_specialize=["first_row", "rows", "threshold"])
def mask_kernel(
    x, out, seed, first_row, rows, cols, threshold, scale,
    stride_xr, stride_xc, stride_or, stride_oc,
    DROP: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """out = x where it is kept and 0 elsewhere, or with ADD out += scale * that; out and x
    [rows, cols], the first row of both being row first_row of the mask."""
    strips = tl.cdiv(cols, COLS)
    pid = tl.program_id(0)
    row, col = (pid // strips) * ROWS + tl.arange(0, ROWS), (pid % strips) * COLS
    keep = keep_tile(load_seed(seed, DROP), first_row + row, col, threshold, COLS)
    cols_here = col + tl.arange(0, COLS)
    inside = (row[:, None] < rows) & (cols_here[None, :] < cols)
    source = tile_pointers(Matrix(x, stride_xr, stride_xc, rows, cols), row, cols_here)
    kept = tl.where(keep, tl.load(source, mask=inside, other=0.0), 0.0)
    target = tile_pointers(Matrix(out, stride_or, stride_oc, rows, cols), row, cols_here)
    if ADD:
        kept = tl.load(target, mask=inside, other=0.0) + kept * scale
    tl.store(target, kept.to(out.dtype.element_ty), mask=inside)


def _apply(
    x: Tensor, out: Tensor, seed: Tensor, first_row: int, p: float, scale: float | None = None
) -> None:
    rows, cols = x.shape
    grid = (cdiv(rows, _ROWS) * cdiv(cols, _COLS),)
    # Four were measured on Hopper; Ampere's compiler spills registers of so few.
    warps = 4 if target(x.device).is_hopper else 8
    launch(
        mask_kernel, grid, x, out, seed, first_row, rows, cols, threshold(p),
        1.0 if scale is None else scale, *x.stride(), *out.stride(),
        DROP=seed.numel(), ADD=scale is not None, ROWS=_ROWS, COLS=_COLS, num_warps=warps,
    )  # fmt: skip


def drop(x: Tensor, seed: Tensor, first_row: int, p: float) -> Tensor:
    """x [rows, columns] with 0 where the mask of the rows from `first_row` on drops."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _apply(x, out, seed, first_row, p)
    return out


def add_kept(
    total: Tensor, term: Tensor, scale: float, seed: Tensor, first_row: int, p: float
) -> None:
    """total += scale * term where the mask keeps; summed in the wider of both dtypes, rounded
    once."""
    _apply(term, total, seed, first_row, p, scale)


def deviation(device: torch.device) -> str | None:
    """What of a small mask is not the definition's on a device; None if all is."""
    p, rows, cols = 0.3, 40, 300
    ones = torch.ones(rows, cols, device=device)
    for words in ([0x0123456789ABCDEF], [-5, 2**31 - 35, 8]):
        seed = torch.tensor(words, device=device)
        right = keep_mask(seed, 7, rows, cols, p)
        added = ones.clone()
        add_kept(added, ones, 2.0, seed, 7, p)
        found = (drop(ones, seed, 7, p), (added - 1) / 2)
        if not all(torch.equal(each, right.to(ones.dtype)) for each in found):
            return f"it computes another mask for the seed {words}"
    return None
