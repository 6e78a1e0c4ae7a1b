"""What a case calls: tensors without memory, and the plan or kernel that it is of."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lora_kernels.backends import cuda
from lora_kernels.backends.codegen.cases import (
    CODED,
    COLUMNS,
    DECODER,
    GATING,
    MANY,
    MASK,
    PACKED,
    SCALED,
    Case,
)
from lora_kernels.backends.cuda import many, packed, scaled
from lora_kernels.backends.cuda.choice import use_plan
from lora_kernels.backends.scaling import split
from lora_kernels.backends.triton import columns, decoding, dropout, gating, masking
from lora_kernels.branch import Branch, Branches, Dense, Experts, Need
from lora_kernels.weights import QuantizedWeight, quantize


def run(case: Case) -> None:
    """Whoever intercepts the launches has them."""
    _OTHERS.get(case.plan, _plan)(case)


def _tensor(case: Case, rows: int, columns: int) -> Tensor:
    return torch.empty(rows, columns, dtype=case.dtype, device="meta")


def _seed(case: Case) -> Tensor | None:
    words = 3 if case.part else 1
    return torch.empty(words, dtype=torch.int64, device="meta") if case.dropout else None


def _bias(case: Case) -> Tensor | None:
    return _tensor(case, 1, case.N)[0] if case.bias else None


def _rows(case: Case) -> tuple[Tensor, Tensor]:
    """(x, dy)."""
    M, N, K = case.M, case.N, case.K
    if case.transposed:
        return _tensor(case, M, 2 * K)[:, :K], _tensor(case, M, 2 * N)[:, :N]
    return _tensor(case, M, K), _tensor(case, M, N)


def _plan(case: Case) -> None:
    N, K, r = case.N, case.K, case.r
    weight = _tensor(case, K, N).t() if case.transposed else _tensor(case, N, K)
    (x, dy), base, s = _rows(case), Dense(weight, _bias(case)), _tensor(case, case.M, r)
    pair = _tensor(case, r, K), _tensor(case, N, r)
    branch = Branch(*pair, case.scaling, case.dropout, _seed(case))
    with use_plan(case.plan, case.tiles):
        if "forward" in case.ops:
            cuda.forward(base, x, branch, True)
        if "backward" in case.ops:
            cuda.backward(base, dy, x, s, branch, Need(True, False, True, True))


def _mask(case: Case) -> None:
    """In the dtype of x, and added to what may be wider."""
    (x, _), seed = _rows(case), _seed(case)
    assert seed is not None
    masking.drop(x, seed, 0, case.dropout)
    for total in {case.dtype, torch.float32}:
        masking.add_kept(x.to(total), x, 2.0, seed, 0, case.dropout)


def _weight(case: Case) -> QuantizedWeight:
    """Of 128 rows it is in square blocks."""
    block = 128 if case.kind == "fp8" and case.M == 128 else None
    return quantize(torch.zeros(2, 256), case.kind, block=block).to("meta")


def _decode(case: Case) -> None:
    """A strip of a quantised weight."""
    out = _tensor(case, 2, 256)
    decoding.decode(_weight(case), slice(0, 2), slice(0, 256), out)


def _multiply(case: Case) -> None:
    """Few rows times all of a quantised weight."""
    pair = _tensor(case, case.r, 256), _tensor(case, 2, case.r)
    bias = _tensor(case, 1, 2)[0] if case.bias else None
    scale, drop = split(case.scaling, case.dtype), dropout.of(case.dropout, _seed(case))
    x = _tensor(case, case.M, case.K)[:, :256]
    decoding.multiply(x, _weight(case), bias, pair, scale, True, drop)


def _columns(case: Case) -> None:
    (_, dy), factor = _rows(case), torch.empty(case.N, device="meta")
    columns.forward(dy, factor, _bias(case))
    columns.backward(dy, dy, factor, True)


def _gating(case: Case) -> None:
    _, dy = _rows(case)
    gating.gated(dy, dy, case.kind)
    gating.gradients((dy, dy), dy, case.kind, (dy, dy))


def _many(case: Case) -> None:
    """The branches of many groups, whose rows lie in any order; of experts with their bases."""
    M, N, K, r, G = case.M, case.N, case.K, case.r, case.groups
    (x, dy), s = _rows(case), _tensor(case, M, r)
    order, offsets, seeds = (
        torch.empty(size, dtype=torch.int64, device="meta") for size in (M, G + 2, G)
    )
    a, b = [_tensor(case, r, K)] * G, [_tensor(case, N, r)] * G
    rows = order, range(G + 2), offsets
    branches = Branches(a, b, [case.scaling] * G, case.dropout, seeds, *rows)
    y, dx, base = _tensor(case, M, N), _tensor(case, M, K), None
    if case.kind:
        stored = _tensor(case, G * K, N) if case.transposed else _tensor(case, G * N, K)
        weight = stored.unflatten(0, (G, -1))
        weight, bias = weight.mT if case.transposed else weight, _tensor(case, G, N)
        base = Experts(weight, bias if case.bias else None, range(G))
        many.experts(y, x, base, branches, s)
    else:
        many.add_(y, x, branches, s)
    many.backward(dx, (dy, x, s), branches, ([*a], [*b]), base)


def _packed(case: Case) -> None:
    """Several layers of one x, narrower ones after the first."""
    M, N, K, r = case.M, case.N, case.K, case.r
    widths = [N, *[N // 4] * (case.groups - 1)]
    bases = [
        Dense(_tensor(case, n, K), _tensor(case, 1, n)[0] if case.bias else None) for n in widths
    ]
    (x, _), ranks = _rows(case), r * case.groups
    s, lora_a = _tensor(case, M, ranks), _tensor(case, ranks, K)
    bs: list[Tensor | None] = [_tensor(case, n, r) for n in widths]
    highs = [split(case.scaling, case.dtype)[1]] * case.groups
    packed.forward(x, s, bases, bs, highs)
    packed.dx([_tensor(case, M, n) for n in widths], bases, s, lora_a)


def _scaled(case: Case) -> None:
    N, K, r = case.N, case.K, case.r
    weight = _tensor(case, K, N).t() if case.transposed else _tensor(case, N, K)
    (x, dy), base = _rows(case), Dense(weight, _bias(case))
    branch = Branch(_tensor(case, r, K), _tensor(case, N, r), case.scaling, 0.0, None)
    factor = torch.empty(N, device="meta")
    y, s = scaled.forward(base, x, branch, factor)
    for known in (y, None):
        scaled.backward(base, (dy, x, s, known), branch, factor, True)


_OTHERS: dict[str, Callable[[Case], None]] = {
    MANY: _many, CODED: _multiply, MASK: _mask, DECODER: _decode, COLUMNS: _columns,
    GATING: _gating, PACKED: _packed, SCALED: _scaled,
}  # fmt: skip
