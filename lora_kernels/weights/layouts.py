"""The layouts of quantised weights [N, K], each as those who made it hold it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lora_kernels.weights.record import FLOATS, QuantizedWeight, expect

_WORD = 8  # values of 4 bits in 32
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where column c of eight lies in AWQ's words


@dataclass(frozen=True, eq=False, repr=False)
class Int8(QuantizedWeight):
    """(codes - zero) * scale * factor: codes int8 [N,K], scale and zero [N]. LLM.int8 has a factor
    of 1/127 beside its absmax."""

    kind: ClassVar[str] = "int8"
    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None
    factor: float = 1.0

    def _check(self) -> None:
        N, K = self.shape
        expect("codes", self.codes, (N, K), torch.int8)
        expect("scale", self.scale, (N,), *FLOATS)
        if self.zero is not None:
            expect("zero", self.zero, (N,), torch.int8, torch.int32, torch.int64, *FLOATS)

    @property
    def scales(self) -> Sequence[Tensor]:
        return [self.scale] if self.zero is None else [self.scale, self.zero]

    def _values(self, rows: slice, columns: slice) -> Tensor:
        values = self.codes[rows, columns].float()
        if self.zero is not None:
            values = values - self.zero[rows, None].float()
        values = values * self.scale[rows, None].float()
        return values if self.factor == 1 else values * self.factor


@dataclass(frozen=True, eq=False, repr=False)
class Float8(QuantizedWeight):
    """codes * scale: codes float8 e4m3 [N,K], scale of one element, of rows [N,1], or of square
    blocks [ceil(N / block), ceil(K / block)]."""

    kind: ClassVar[str] = "fp8"
    codes: Tensor
    scale: Tensor
    block: int = 0
    """The side of a block in values; 0 where a row has one scale, or all."""

    def _check(self) -> None:
        N, K = self.shape
        expect("codes", self.codes, (N, K), torch.float8_e4m3fn)
        side = self.block
        if side < 0:
            raise ValueError(f"block: expected a number of values or 0, got {side}")
        if side:
            expect("scale", self.scale, (-(-N // side), -(-K // side)), *FLOATS)
        else:
            rows = 1 if isinstance(self.scale, Tensor) and self.scale.numel() == 1 else N
            expect("scale", self.scale, (rows, 1), *FLOATS)

    @property
    def scales(self) -> Sequence[Tensor]:
        return [self.scale]

    def _values(self, rows: slice, columns: slice) -> Tensor:
        values = self.codes[rows, columns].float()
        side = self.block
        if not side:
            scale = self.scale if self.scale.numel() == 1 else self.scale[rows]
            return values * scale.float()
        device = values.device
        down = torch.arange(rows.start, rows.stop, device=device) // side
        along = torch.arange(columns.start, columns.stop, device=device) // side
        return values * self.scale[down][:, along].float()


@dataclass(frozen=True, eq=False, repr=False)
class FourBit(QuantizedWeight):
    """(table[code] - zero) * scale, of blocks of values that follow each other in the rows of W,
    across their ends where K is no multiple of the block.

    codes uint8 [ceil(N * K / 2)], the first value in the high bits; table fp32 [16]; scale of
    each block, or where it is quantised in its turn uint8 codes for
    `outer_table[code] * outer_scale + offset`, outer_scale of each `outer_block` blocks; zero of
    each block, where there are such. NF4 and FP4 as bitsandbytes has them, and int4 in groups.
    """

    kind: ClassVar[str] = "4bit"
    codes: Tensor
    table: Tensor
    scale: Tensor
    zero: Tensor | None = None
    outer_table: Tensor | None = None
    outer_scale: Tensor | None = None
    offset: Tensor | None = None
    block: int = 64
    outer_block: int = 256

    def _check(self) -> None:
        N, K = self.shape
        if self.block < 2 or self.block % 2:
            raise ValueError(f"block: expected an even number of values, got {self.block}")
        blocks = -(-N * K // self.block)
        expect("codes", self.codes, (-(-N * K // 2),), torch.uint8)
        expect("table", self.table, (16,), torch.float32)
        if self.outer_table is None:
            expect("scale", self.scale, (blocks,), *FLOATS)
        else:
            if self.outer_block < 1:
                raise ValueError(f"outer_block: expected 1 or more, got {self.outer_block}")
            expect("scale", self.scale, (blocks,), torch.uint8)
            expect("outer_table", self.outer_table, (256,), torch.float32)
            outer = -(-blocks // self.outer_block)
            expect("outer_scale", self._given("outer_scale"), (outer,), torch.float32)
            expect("offset", self._given("offset"), (), torch.float32)
        if self.zero is not None:
            expect("zero", self.zero, (blocks,), *FLOATS)

    def _given(self, name: str) -> Tensor:
        tensor: Tensor | None = getattr(self, name)
        if tensor is None:
            raise ValueError(f"{name}: expected a tensor beside outer_table, got None")
        return tensor

    @property
    def scales(self) -> Sequence[Tensor]:
        given = (self.table, self.scale, self.zero, self.outer_table, self.outer_scale, self.offset)
        return [tensor for tensor in given if tensor is not None]

    @property
    def step(self) -> int:
        K = self.shape[1]
        return self.block if K % self.block == 0 else K

    def block_scales(self, first: int, last: int) -> Tensor:
        """Of the blocks from first to last, in fp32."""
        codes = self.scale[first:last]
        if self.outer_table is None:
            return codes.float()
        outer = torch.arange(first, last, device=codes.device) // self.outer_block
        values = self.outer_table[codes.int()] * self._given("outer_scale")[outer]
        return values + self._given("offset")

    def _values(self, rows: slice, columns: slice) -> Tensor:
        (_, K), block = self.shape, self.block
        if K % block:
            return self._flat(rows.start * K, rows.stop * K).view(-1, K)
        per_row = K // block
        some = slice(columns.start // block, columns.stop // block)
        count = rows.stop - rows.start
        codes = self.codes.view(-1, K // 2)[rows, columns.start // 2 : columns.stop // 2]
        blocks = slice(rows.start * per_row, rows.stop * per_row)
        scales = self.block_scales(blocks.start, blocks.stop).view(count, per_row)[:, some]
        zeros = None
        if self.zero is not None:
            zeros = self.zero[blocks].float().view(count, per_row)[:, some]
        return self._scaled(codes, scales, zeros).view(count, -1)

    def _flat(self, first: int, last: int) -> Tensor:
        """Values that follow each other, from one within a block to one within another."""
        blocks = slice(first // self.block, -(-last // self.block))
        begin, end = blocks.start * self.block, blocks.stop * self.block
        codes = self.codes[begin // 2 : end // 2]
        missing = (end - begin) // 2 - len(codes)  # of the last block
        if missing:
            codes = torch.cat([codes, codes.new_zeros(missing)])
        zeros = None if self.zero is None else self.zero[blocks].float()
        values = self._scaled(codes, self.block_scales(blocks.start, blocks.stop), zeros)
        return values.view(-1)[first - begin : last - begin]

    def _scaled(self, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        """[..., block] of codes of two values each."""
        pairs = torch.stack([codes >> 4, codes & 15], dim=-1)
        values = self.table[pairs.int()].view(*scales.shape, self.block)
        if zeros is not None:
            values = values - zeros[..., None]
        return values * scales[..., None]


@dataclass(frozen=True, eq=False, repr=False)
class Gptq(QuantizedWeight):
    """(code - zero) * scale of groups of rows of W^T: qweight int32 [K/8,N], the first of eight
    values in the low bits; scales [G,N]; qzeros int32 [G,N/8]; g_idx int32 [K], the group of each
    column of W, in any order ("act-order"). Zeros are stored less `less`: 1 in files of version 1.
    """

    kind: ClassVar[str] = "gptq"
    qweight: Tensor
    group_scales: Tensor
    qzeros: Tensor
    g_idx: Tensor
    less: int = 1

    def _check(self) -> None:
        N, K = self.shape
        if N % _WORD or K % _WORD:
            raise ValueError(f"shape: expected multiples of {_WORD} of GPTQ, got {self.shape}")
        groups = self.group_scales.shape[0]
        expect("qweight", self.qweight, (K // _WORD, N), torch.int32)
        expect("group_scales", self.group_scales, (groups, N), *FLOATS)
        expect("qzeros", self.qzeros, (groups, N // _WORD), torch.int32)
        expect("g_idx", self.g_idx, (K,), torch.int32, torch.int64)

    @property
    def scales(self) -> Sequence[Tensor]:
        return [self.group_scales]

    @property
    def step(self) -> int:
        return _WORD

    def _values(self, rows: slice, columns: slice) -> Tensor:
        words = self.qweight[columns.start // _WORD : columns.stop // _WORD, rows]
        codes = _unpacked(words).permute(1, 0, 2).reshape(rows.stop - rows.start, -1)
        group = self.g_idx[columns].long()
        some, wanted = _words(rows)
        zeros = _unpacked(self.qzeros[:, some]).flatten(1)[:, wanted][group] + self.less
        scales = self.group_scales[:, rows][group].float()
        return (codes - zeros.t()) * scales.t()


@dataclass(frozen=True, eq=False, repr=False)
class Awq(QuantizedWeight):
    """(code - zero) * scale of groups of `group` rows of W^T: qweight int32 [K,N/8] and qzeros
    int32 [K/group,N/8], eight columns in a word in AWQ's order; scales [K/group,N]."""

    kind: ClassVar[str] = "awq"
    qweight: Tensor
    group_scales: Tensor
    qzeros: Tensor
    group: int = 128

    def _check(self) -> None:
        N, K = self.shape
        if N % _WORD or self.group < 1 or K % self.group:
            raise ValueError(
                f"shape: expected (N, K) of multiples of {_WORD} and {self.group}, got {self.shape}"
            )
        expect("qweight", self.qweight, (K, N // _WORD), torch.int32)
        expect("group_scales", self.group_scales, (K // self.group, N), *FLOATS)
        expect("qzeros", self.qzeros, (K // self.group, N // _WORD), torch.int32)

    @property
    def scales(self) -> Sequence[Tensor]:
        return [self.group_scales]

    def _values(self, rows: slice, columns: slice) -> Tensor:
        words, wanted = _words(rows)
        order = torch.tensor(_AWQ_ORDER, device=self.device)
        codes = _unpacked(self.qweight[columns, words])[..., order].flatten(1)[:, wanted]
        group = torch.arange(columns.start, columns.stop, device=self.device) // self.group
        zeros = _unpacked(self.qzeros[:, words])[..., order].flatten(1)[:, wanted][group]
        scales = self.group_scales[:, rows][group].float()
        return ((codes - zeros) * scales).t()


def _words(rows: slice) -> tuple[slice, slice]:
    """The words of eight values each that hold some rows, and these among their values."""
    words = slice(rows.start // _WORD, -(-rows.stop // _WORD))
    begin = words.start * _WORD
    return words, slice(rows.start - begin, rows.stop - begin)


def _unpacked(words: Tensor) -> Tensor:
    """[..., 8] of words of eight values, the first in the low bits."""
    shifts = torch.arange(0, 4 * _WORD, 4, dtype=torch.int32, device=words.device)
    return (words[..., None] >> shifts) & 15
