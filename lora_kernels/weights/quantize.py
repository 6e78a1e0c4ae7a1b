"""Quantised weights of weights: round to nearest, by the largest value of each row or block."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lora_kernels.weights.layouts import Float8, FourBit, Int8
from lora_kernels.weights.record import FLOATS, QuantizedWeight

KINDS = ("int8", "nf4", "fp8", "int4")
# Quantiles of a normal distribution, scaled to [-1, 1]: "NormalFloat" of Dettmers et al., QLoRA
# (2023), the values that bitsandbytes has.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
_OUTER = 256  # scales that are quantised together
_CHUNK = 1 << 20  # values that are worked on at a time, in fp32
_E4M3_MAX = 448.0


def quantize(weight: Tensor, kind: str, *, block: int | None = None) -> QuantizedWeight:
    """A weight in fewer bits, each value rounded to the nearest that its block can hold.

    Args:
        weight: [N, K], floating and finite, on any device.
        kind: ``"int8"``, a scale for each row, symmetric; ``"nf4"``, 16 quantiles of a normal
            distribution in blocks of 64 (`block`) with scales of 8 bits each; ``"fp8"``, e4m3, a
            scale for each row, or for square blocks if `block` says how long their sides are;
            ``"int4"``, 16 even steps from the least to the largest value of 128 (`block`)
            successive columns.
        block: another number of values, where `kind` has blocks.

    The memory needed beside the weight and the result is of a few MiB.

    Raises ValueError (an unknown kind, a shape that does not fit the blocks, values that are not
    finite) or TypeError (a dtype).
    """
    if kind not in KINDS:
        raise ValueError(f"kind: got {kind!r}, legal values are {', '.join(KINDS)}")
    if not isinstance(weight, Tensor) or weight.dtype not in FLOATS:
        got = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"weight: expected a floating Tensor, got {got}")
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"weight: expected shape [N, K], got {tuple(weight.shape)}")
    if block is not None and (isinstance(block, bool) or not isinstance(block, int) or block < 2):
        raise ValueError(f"block: expected a number of values, 2 or more, got {block!r}")
    if kind == "int8" and block is not None:
        raise ValueError(f"block: expected None of int8, which has one for each row, got {block}")
    makers: dict[str, Callable[[Tensor], QuantizedWeight]] = {
        "int8": _int8,
        "nf4": lambda weight: _nf4(weight, block or 64),
        "fp8": lambda weight: _fp8(weight, block or 0),
        "int4": lambda weight: _int4(weight, block or 128),
    }
    return makers[kind](weight.detach())


def like(record: QuantizedWeight, weight: Tensor) -> QuantizedWeight:
    """Another weight, quantised as one is. ValueError for layouts that `quantize` does not make."""
    if isinstance(record, Int8) and record.zero is None:
        return quantize(weight, "int8")
    if isinstance(record, Float8):
        return quantize(weight, "fp8", block=record.block or None)
    if isinstance(record, FourBit):
        table = torch.arange(16.0) if record.zero is not None else torch.tensor(NF4)
        if torch.equal(record.table.cpu(), table):
            kind = "nf4" if record.zero is None else "int4"
            return quantize(weight, kind, block=record.block)
    raise ValueError(f"record: {record!r} is of a layout that nothing here makes")


def _int8(weight: Tensor) -> Int8:
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(len(weight), device=weight.device)
    for rows, values in _chunks(weight):
        scale[rows] = values.abs().amax(1) / 127
        codes[rows] = (values / _divisor(scale[rows, None])).round_().clamp_(-127, 127)
    return Int8(_shape(weight), codes, scale)


def _fp8(weight: Tensor, side: int) -> Float8:
    (N, K), device = weight.shape, weight.device
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=device)
    if not side:
        scale = torch.empty(N, 1, device=device)
        for rows, values in _chunks(weight):
            scale[rows] = values.abs().amax(1, keepdim=True) / _E4M3_MAX
            codes[rows] = (values / _divisor(scale[rows])).to(codes.dtype)
        return Float8(_shape(weight), codes, scale)
    scale = torch.zeros(-(-N // side), -(-K // side), device=device)
    along = torch.arange(K, device=device) // side
    for rows, values in _chunks(weight, side):
        some = slice(rows.start // side, -(-rows.stop // side))
        down = torch.arange(rows.start, rows.stop, device=device) // side - some.start
        block = torch.zeros(some.stop - some.start, scale.shape[1], device=device)
        index = down[:, None] * scale.shape[1] + along
        block.view(-1).scatter_reduce_(0, index.view(-1), values.abs().view(-1), "amax")
        scale[some] = block / _E4M3_MAX
        codes[rows] = (values / _divisor(scale[some])[down][:, along]).to(codes.dtype)
    return Float8(_shape(weight), codes, scale, block=side)


def _nf4(weight: Tensor, block: int) -> FourBit:
    _require_even(weight, block)
    table = torch.tensor(NF4, device=weight.device)
    middles = (table[1:] + table[:-1]) / 2
    codes, largest = _codes_and(weight, block, 1)
    for at, values in _blocks(weight, block):
        largest[0, at] = values.abs().amax(1)
        found = torch.bucketize(values / _divisor(largest[0, at, None]), middles, out_int32=True)
        _pack(found, codes, at.start * block)
    scale, outer_table, outer_scale, offset = _in_turn(largest[0])
    return FourBit(
        _shape(weight), codes, table, scale, None, outer_table, outer_scale, offset, block, _OUTER
    )


def _in_turn(scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scales in 8 bits, 256 together, evenly between the largest deviations from their mean: as
    codes, values of the codes, a scale of each 256, and the mean."""
    offset = scale.mean()
    count = -(-len(scale) // _OUTER)
    padded = scale.new_zeros(count * _OUTER)
    padded[: len(scale)] = scale - offset
    outer = padded.view(count, _OUTER).abs().amax(1)
    table = torch.arange(-128, 128, device=scale.device) / 127
    steps = padded.view(count, _OUTER) / _divisor(outer[:, None]) * 127
    codes = (steps.round_().clamp_(-127, 127) + 128).to(torch.uint8).view(-1)[: len(scale)].clone()
    return codes, table, outer, offset


def _int4(weight: Tensor, block: int) -> FourBit:
    _require_even(weight, block)
    if weight.shape[1] % block:
        raise ValueError(
            f"weight: expected a number of columns that is a multiple of the block of {block},"
            f" got {tuple(weight.shape)}; give another block"
        )
    codes, (scale, zero) = _codes_and(weight, block, 2)
    for at, values in _blocks(weight, block):
        # Zero is among the steps, as what was pruned must stay so.
        low, high = values.amin(1).clamp_(max=0), values.amax(1).clamp_(min=0)
        scale[at] = (high - low) / 15
        zero[at] = (-low / _divisor(scale[at])).round_()
        steps = (values / _divisor(scale[at, None])).round_() + zero[at, None]
        _pack(steps.clamp_(0, 15).int(), codes, at.start * block)
    table = torch.arange(16.0, device=weight.device)
    return FourBit(_shape(weight), codes, table, scale, zero, block=block)


def _shape(weight: Tensor) -> tuple[int, int]:
    N, K = weight.shape
    return N, K


def _require_even(weight: Tensor, block: int) -> None:
    if block % 2 or weight.numel() % 2:
        raise ValueError(
            f"weight: expected an even number of values in blocks of an even number, two of which"
            f" are a byte, got {tuple(weight.shape)} and a block of {block}"
        )


def _divisor(scale: Tensor) -> Tensor:
    """What to divide by: any number where all values are zero."""
    return torch.where(scale == 0, 1.0, scale)


def _finite(values: Tensor) -> Tensor:
    if not bool(torch.isfinite(values).all()):
        raise ValueError("weight: expected finite values, got some that are not")
    return values


def _chunks(weight: Tensor, multiple: int = 1) -> Iterator[tuple[slice, Tensor]]:
    """Rows by their numbers, and in fp32."""
    N, K = weight.shape
    count = max(1, _CHUNK // (K * multiple)) * multiple
    for first in range(0, N, count):
        rows = slice(first, min(N, first + count))
        yield rows, _finite(weight[rows].float())


def _codes_and(weight: Tensor, block: int, tensors: int) -> tuple[Tensor, Tensor]:
    """Bytes for two values each, and tensors [tensors, blocks] for what blocks have."""
    codes = torch.empty(weight.numel() // 2, dtype=torch.uint8, device=weight.device)
    blocks = -(-weight.numel() // block)
    return codes, torch.empty(tensors, blocks, device=weight.device)


def _blocks(weight: Tensor, block: int) -> Iterator[tuple[slice, Tensor]]:
    """Blocks by their numbers, and their values [., block] in fp32, with zeros past the last."""
    flat = weight.reshape(-1)
    count = max(1, _CHUNK // block)
    for first in range(0, -(-len(flat) // block), count):
        values = flat[first * block : (first + count) * block].float()
        rest = -len(values) % block
        values = torch.nn.functional.pad(values, (0, rest)) if rest else values
        yield slice(first, first + len(values) // block), _finite(values.view(-1, block))


def _pack(values: Tensor, codes: Tensor, first: int) -> None:
    """Values of 4 bits that begin with the weight's value `first`, two to a byte."""
    pairs = values.view(-1, 2).to(torch.uint8)
    into = codes[first // 2 : first // 2 + len(pairs)]
    into.copy_((pairs[:, 0] << 4 | pairs[:, 1])[: len(into)])
