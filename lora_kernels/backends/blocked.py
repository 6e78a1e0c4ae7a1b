"""The ATen composite in blocks of rows, for dropout and for wide arithmetic.

Dropout needs a dropped copy of x and a mask, wide arithmetic fp32 copies of its operands: a few MiB
of them at a time, never one of the size of x, W or y. Sums over the blocks are kept in fp32.

Wide arithmetic: a CPU without bf16/fp16 matrix instructions multiplies such matrices in scalar
loops, up to 200 times slower than fp32. Widening the operands to fp32 block by block is faster than
the frozen layer itself there, and rounds every output once.
"""

import logging
from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels.backends.dropout import keep_scale
from lora_kernels.backends.masks import Mask, mask
from lora_kernels.backends.scaling import split
from lora_kernels.branch import Asked, Base, Branch, Dense, Layer, Need, Pairs, Rows, Wanted

_CPU_BLOCK_BYTES = 8 << 20
_ACCELERATOR_BLOCK_BYTES = 64 << 20
# Up to here ATen's dot products of half-precision rows beat widening the whole weight.
_NARROW_FORWARD_ROWS = 8


_logger = logging.getLogger("lora_kernels")


@cache
def _multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has a fast matrix product for `dtype`."""
    if dtype not in (torch.bfloat16, torch.float16):
        return True
    name = "bf16" if dtype == torch.bfloat16 else "fp16"
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", None)
    if supported is None:  # a private op
        _logger.warning(
            "torch %s does not say whether this CPU has fast %s products: they are formed in fp32,"
            " which is slower where it has; tell the authors of lora_kernels, or take a torch that"
            " says it",
            torch.__version__,
            name,
        )
        return False
    fast: bool = supported()
    return fast


def is_wide(rows: Tensor, forward: bool = False) -> bool:
    """Whether products with these rows are formed in fp32 although they are 16 bits wide."""
    if rows.device.type != "cpu" or _multiplies(rows.dtype):
        return False
    return not forward or rows.shape[0] > _NARROW_FORWARD_ROWS


def _compute_dtype(rows: Tensor) -> torch.dtype:
    return torch.float32 if is_wide(rows) else rows.dtype


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _step(like: Tensor, K: int, N: int = 0) -> int:
    """How many rows are a block, whose copies are counted as fp32. An accelerator makes none of
    what is N wide; there more blocks would read the weight more often."""
    if like.device.type == "cpu":
        return max(1, _CPU_BLOCK_BYTES // (4 * max(K, N)))
    return max(1, _ACCELERATOR_BLOCK_BYTES // (4 * K))


def blocks(count: int, step: int) -> Iterator[slice]:
    """So many rows or columns, a step of them at a time."""
    for first in range(0, count, step):
        yield slice(first, min(first + step, count))


def forward(base: Dense, x: Tensor, branch: Branch) -> tuple[Tensor, Tensor]:
    """(y, s), as in `reference`."""
    (y,), (s,) = forward_all(x, [Layer(base, branch)])
    assert s is not None  # of a branch
    return y, s


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + bias."""
    (y,), _ = forward_all(x, [Layer(Dense(weight, bias), None)])
    return y


def forward_all(x: Tensor, layers: Sequence[Layer]) -> tuple[list[Tensor], list[Tensor | None]]:
    """(y, s) of each layer, s None without a branch; a block of x is read for all."""
    (M, K), dtype = x.shape, _compute_dtype(x)
    pairs = [None if branch is None else _adapters(x, branch) for _, branch in layers]
    ys = [x.new_empty(M, base.weight.shape[0]) for base, _ in layers]
    kept = [None if pair is None else x.new_empty(M, pair[0].shape[0]) for pair in pairs]
    for block in blocks(M, _step(x, K, max(y.shape[1] for y in ys))):
        rows = x[block].to(dtype)
        for (base, branch), pair, y, s in zip(layers, pairs, ys, kept, strict=True):
            if branch is None or pair is None or s is None:
                term = _Product(rows.new_empty(len(rows), 0), rows.new_empty(0, y.shape[1]), 1.0)
            else:
                a, b = pair
                _shrink(rows, block, a, branch, s[block])
                term = _Product(s[block].to(dtype), b.t(), split(branch.scaling, x.dtype)[1])
            _multiply(rows, base.weight.t(), base.bias, term, y[block])
    return ys, kept


def add_product(out: Tensor, rows: Tensor, matrix: Tensor) -> None:
    """out += rows @ matrix, rounded once."""
    dtype = _compute_dtype(rows)
    for block in blocks(len(rows), _step(rows, *matrix.shape)):
        total = out[block].to(dtype)
        out[block] = total.addmm_(rows[block].to(dtype), matrix.to(dtype))


def add_branch(y: Tensor, x: Tensor, branch: Branch) -> Tensor:
    """y += s B^T; returns s."""
    (M, K), N = x.shape, y.shape[1]
    a, b = _adapters(x, branch)
    _, high = split(branch.scaling, x.dtype)
    s = x.new_empty(M, a.shape[0])
    for block in blocks(M, _step(x, K, N)):
        _shrink(x[block].to(a.dtype), block, a, branch, s[block])
        y[block] = y[block].to(a.dtype).addmm_(s[block].to(a.dtype), b.t(), alpha=high)
    return s


def backward(
    base: Base, dy: Tensor, x: Tensor, s: Tensor, branch: Branch, need: Need
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dA, dB), None where not needed; without a weight dx is the branch's alone."""
    M, K = len(dy), branch.lora_a.shape[1]
    weight = base.weight if isinstance(base, Dense) else None
    dx = dy.new_empty(M, K) if need.x else None
    sums = _Sums(dy, branch, Wanted(need.a, need.b))
    for block in blocks(M, _step(dy, K, dy.shape[1])):
        rows, of_x = dy[block].to(sums.a.dtype), x[block] if need.a else None
        term = sums.add((rows, of_x, s[block] if need.b else None), block, need.x)
        if dx is not None and term is not None:
            _multiply(rows, weight, None, term, dx[block])
    return dx, *sums.gradients()


def backward_all(rows: Rows, layers: Sequence[Layer], asked: Asked) -> tuple[Tensor | None, Pairs]:
    """(dx, (dA, dB) of each layer), all dys given. A block of x is read for all, and a block of dx
    summed over all layers before it is rounded."""
    like, K = rows.first, layers[0].base.weight.shape[1]
    M, dtype, precise = len(like), _compute_dtype(like), _sum_dtype(like.dtype)
    dx = like.new_empty(M, K) if asked.x else None
    sums = [
        None if branch is None else _Sums(like, branch, wanted)
        for (_, branch), wanted in zip(layers, asked.of, strict=True)
    ]
    for block in blocks(M, _step(like, K, max(dy.shape[1] for dy in rows.given))):
        total = None
        if dx is not None:
            out = dx[block]
            whole = out.dtype == precise
            total = out.zero_() if whole else torch.zeros_like(out, dtype=precise)
        of_x = None if rows.x is None else rows.x[block]
        for dy, s, (base, _), own in zip(rows.given, rows.kept, layers, sums, strict=True):
            some, term = dy[block].to(dtype), None
            if own is not None:
                term = own.add((some, of_x, None if s is None else s[block]), block, asked.x)
            if total is not None:
                _accumulate(total, some, base.weight, term, like.dtype)
        if total is not None and not whole:
            out.copy_(total)
    return dx, [(None, None) if own is None else own.gradients() for own in sums]


class _Sums:
    """What a branch gets in a backward, block after block."""

    def __init__(self, dy: Tensor, branch: Branch, wanted: Wanted) -> None:
        self._branch, self._wanted, self._dtype = branch, wanted, dy.dtype
        self.a, self._b = _adapters(dy, branch)
        self._d_a: Tensor | None = None
        self._d_b: Tensor | None = None

    def add(
        self, of: tuple[Tensor, Tensor | None, Tensor | None], block: slice, need_x: bool
    ) -> "_Product | None":
        """Adds a block's share, of = (dy as products are formed, x, s), and returns what it gives
        dx, None where neither that nor dA is wanted."""
        (rows, x, s), branch = of, self._branch
        if self._wanted.b:
            assert s is not None
            _, high = split(branch.scaling, self._dtype)
            self._d_b = _summed(self._d_b, s.t(), rows, high)
        if not need_x and not self._wanted.a:
            return None
        # ds is rounded to the compute dtype, as any other backend stores it.
        ds = _scaled(rows, self._b, branch.scaling).to(self._dtype).to(rows.dtype)
        p, keep = branch.dropout_p, None
        if p:
            keep = _mask(branch, block.start, len(rows), self.a.shape[1])
        scale = keep_scale(p) if p else 1.0
        if self._wanted.a:
            assert x is not None
            self._d_a = _summed(self._d_a, ds.t(), x if keep is None else keep.drop(x), scale)
        return _Product(ds, self.a, scale, keep)

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """(dA, dB), None where not wanted."""
        (r, K), N = self.a.shape, self._b.shape[0]
        d_a, d_b = self._d_a, self._d_b
        if self._wanted.a and d_a is None:  # no term
            d_a = self.a.new_zeros(r, K)
        if self._wanted.b and d_b is None:
            d_b = self.a.new_zeros(r, N)
        return (
            None if d_a is None else d_a.to(self._branch.lora_a.dtype),
            None if d_b is None else d_b.t().to(self._branch.lora_b.dtype).contiguous(),
        )


def weight_gradient(dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """dy^T x in the weight's dtype, one strip of its rows after the other."""
    (M, N), K = dy.shape, x.shape[1]
    step = _step(dy, K, N)
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    for columns in blocks(N, step):
        strip = None
        for block in blocks(M, step):
            strip = _summed(strip, dy[block, columns].t(), x[block], 1.0)
        dweight[columns] = 0 if strip is None else strip
    return dweight


def _mask(branch: Branch, first_row: int, rows: int, columns: int) -> Mask:
    assert branch.seed is not None  # of a branch with dropout
    return mask(branch.seed, first_row, rows, columns, branch.dropout_p)


def _adapters(x: Tensor, branch: Branch) -> tuple[Tensor, Tensor]:
    """Both rounded to x's dtype, in the dtype that products are formed in."""
    dtype = _compute_dtype(x)
    return branch.lora_a.to(x.dtype).to(dtype), branch.lora_b.to(x.dtype).to(dtype)


def _scaled(rows: Tensor, matrix: Tensor, scale: float) -> Tensor:
    """scale * rows @ matrix, scaled before it is rounded."""
    return torch.addmm(rows.new_zeros(()), rows, matrix, beta=0, alpha=scale)


def _mixes(rows: Tensor) -> bool:
    """Whether the device multiplies such rows into fp32 sums without copies of them in fp32."""
    if not rows.is_cuda or torch.version.hip is not None:
        return False
    return rows.dtype in (torch.bfloat16, torch.float16)


def forms_sums(rows: Tensor) -> bool:
    """Whether `precise_product` of these rows makes no copy of them."""
    return rows.dtype == _sum_dtype(rows.dtype) or _mixes(rows)


def precise_product(rows: Tensor, matrix: Tensor) -> Tensor:
    """rows @ matrix in the dtype of sums."""
    precise = _sum_dtype(rows.dtype)
    if _mixes(rows):
        return torch.mm(rows, matrix, out_dtype=precise)
    return torch.mm(rows.to(precise), matrix.to(precise))


def _summed(total: Tensor | None, left: Tensor, right: Tensor, scale: float) -> Tensor:
    """total + scale * left @ right in the dtype of sums, in place; the first term where there is no
    total yet."""
    dtype = _sum_dtype(left.dtype)
    if left.dtype == right.dtype and _mixes(left):
        product = torch.mm(left, right, out_dtype=dtype)
        if total is None:
            return product if scale == 1 else product.mul_(scale)
        return total.add_(product, alpha=scale)
    left, right = left.to(dtype), right.to(dtype)
    if total is None:
        return _scaled(left, right, scale)
    return total.addmm_(left, right, alpha=scale)


def _shrink(rows: Tensor, block: slice, lora_a: Tensor, branch: Branch, s: Tensor) -> None:
    """s = scaling * drop(rows) A^T for one block, as far as `split` scales before rounding."""
    scaling, _ = split(branch.scaling, s.dtype)
    if branch.dropout_p:
        keep = _mask(branch, block.start, *rows.shape)
        rows, scaling = keep.drop(rows), scaling * keep_scale(branch.dropout_p)
    s.copy_(_scaled(rows, lora_a.t(), scaling))


class _Product(NamedTuple):
    """scale * low @ lora, masked where a mask is given."""

    low: Tensor
    lora: Tensor
    scale: float
    keep: Mask | None = None


def _multiply(
    rows: Tensor, matrix: Tensor | None, bias: Tensor | None, product: _Product, out: Tensor
) -> None:
    """out = rows @ matrix + bias + the product.

    Column strips keep the widened part of the matrix small; where nothing is widened one strip is
    all, and formed in place.
    """
    low, lora, scale, keep = product
    wide = rows.dtype != out.dtype
    width = lora.shape[1]
    for columns in blocks(width, _step(rows, rows.shape[1]) if wide else width):
        total = rows.new_empty(len(rows), columns.stop - columns.start) if wide else out
        if matrix is None:
            total.zero_()
        else:
            strip = matrix[:, columns].to(out.dtype).to(rows.dtype)
            if bias is None:
                torch.mm(rows, strip, out=total)
            else:
                some = bias[columns].to(out.dtype).to(rows.dtype)
                torch.addmm(some, rows, strip, out=total)
        if keep is None:
            total.addmm_(low, lora[:, columns], alpha=scale)
        else:
            keep.add_kept(total, precise_product(low, lora[:, columns]), scale, columns)
        if wide:
            out[:, columns] = total


def _accumulate(
    total: Tensor, rows: Tensor, weight: Tensor, term: _Product | None, dtype: torch.dtype
) -> None:
    """total, in the dtype of sums, += rows @ weight + the term; the weight rounded to dtype. Where
    a CPU multiplies 16 bits its product alone is rounded."""
    width, wide = total.shape[1], rows.dtype != dtype
    for columns in blocks(width, _step(rows, rows.shape[1]) if wide else width):
        part, strip = total[:, columns], weight[:, columns].to(dtype).to(rows.dtype)
        if rows.dtype == total.dtype:
            part.addmm_(rows, strip)
        elif _mixes(rows):
            part += torch.mm(rows, strip, out_dtype=total.dtype)
        else:
            part += torch.mm(rows, strip)
        if term is None:
            continue
        product = precise_product(term.low, term.lora[:, columns])
        if term.keep is None:
            part.add_(product, alpha=term.scale)
        else:
            term.keep.add_kept(part, product, term.scale, columns)
