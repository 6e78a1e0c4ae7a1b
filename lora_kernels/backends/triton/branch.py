"""What the calls of several plans share: the adapters as kernels take them, the branch on a given
output, and the backward around the product that makes dx.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lora_kernels.backends.scaling import split
from lora_kernels.backends.triton import dropout, tiles
from lora_kernels.backends.triton.gradients import ds_db, tall
from lora_kernels.backends.triton.low_rank import LowRank, expand, shrink
from lora_kernels.branch import Base, Branch, Dense, Need

Tiles = Mapping[str, Mapping[str, int]]
Product = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]


def pad(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """The rank-sized matrix with zeros around it up to [rows, columns]; itself if it needs none."""
    if matrix.shape == (rows, columns):
        return matrix
    return torch.nn.functional.pad(
        matrix, (0, columns - matrix.shape[1], 0, rows - matrix.shape[0])
    )


def adapters(x: Tensor, branch: Branch) -> tuple[Tensor, Tensor]:
    """Both adapters in x's dtype and of a rank that suits the kernels, in rank-sized copies."""
    lora_a, lora_b = branch.lora_a, branch.lora_b
    rank = tiles.padded_rank(lora_a.shape[0])
    a = pad(lora_a.to(x.dtype), rank, lora_a.shape[1])
    return a, pad(lora_b.to(x.dtype), lora_b.shape[0], rank)


def unpadded(s: Tensor, branch: Branch) -> Tensor:
    """s of the branch's own rank, from one of the padded rank."""
    return s[:, : branch.lora_a.shape[0]].contiguous()


def add(base_out: Tensor, x: Tensor, branch: Branch, out: Tensor, tile: Tiles) -> Tensor:
    """out = base_out + the branch, both may be one tensor; returns s of the padded rank."""
    a, b = adapters(x, branch)
    low, high = split(branch.scaling, x.dtype)
    drop = dropout.of(branch.dropout_p, branch.seed)
    s = shrink(x, a, low, drop, tile.get("shrink"))
    expand(base_out, LowRank(s, b.t(), high), out, tile.get("expand"))
    return s


def weight_gradient(base: Base, dy: Tensor, x: Tensor, need: Need) -> Tensor | None:
    """dweight, None where it is not needed."""
    if not need.weight:
        return None
    assert isinstance(base, Dense)
    return torch.mm(dy.t(), x).to(base.weight.dtype)


def gradients(
    dy: Tensor, x: Tensor, s: Tensor, branch: Branch, need: Need, product: Product, tile: Tiles
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dA, dB). `product` makes dx of ds and A, and may make dA with it."""
    r = branch.lora_a.shape[0]
    a, b = adapters(dy, branch)
    _, high = split(branch.scaling, dy.dtype)
    need_ds = need.x or need.a
    dx = d_a = d_b = None
    if need.b:
        s = pad(s, dy.shape[0], a.shape[0])
    if need_ds and need.b and tiles.fuses_ds_db(b.dtype, b.shape[1]):
        fields = tile.get("ds_db")
        ds, d_b = ds_db(dy, b, s, branch.scaling, high, branch.lora_b.dtype, fields)
    else:
        if need_ds:
            ds = shrink(dy, b.t(), branch.scaling, None, tile.get("ds"))
        if need.b:
            d_b = tall(s, dy, branch.lora_b.dtype, True, None, tile.get("db"), high)
    if need.x:
        dx, d_a = product(ds, a)
    if d_a is None and need.a:
        drop = dropout.of(branch.dropout_p, branch.seed)
        d_a = tall(ds, x, branch.lora_a.dtype, False, drop, tile.get("da"))
    return (
        dx,
        None if d_a is None else d_a[:r],
        None if d_b is None else d_b[:, :r].contiguous(),
    )
