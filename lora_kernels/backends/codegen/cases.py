"""The calls whose kernels the code generation check compiles.

A kernel depends on a call through its plan, its tiles, dtypes, rank, flags and alignment; of M, N
and K only what the tiles make of them. So these calls, few as they are, stand for all.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from lora_kernels.backends.cuda.choice import candidates
from lora_kernels.backends.cuda.plan import Call, Tiles
from lora_kernels.backends.cuda.plans import PLANS
from lora_kernels.backends.device import Target, assume
from lora_kernels.backends.triton import gating
from lora_kernels.weights import KINDS


class Case(NamedTuple):
    """One forward call and the backward one that follows, or either alone."""

    plan: str = "shrink_gemm"
    dtype: torch.dtype = torch.bfloat16
    M: int = 8192
    N: int = 4096
    K: int = 4096
    r: int = 16
    dropout: float = 0.0
    scaling: float = 1.0  # over 1 in fp16 a power of two of it goes to s B^T
    bias: bool = False
    transposed: bool = False  # a weight stored [K,N], x and dy with strided rows
    part: bool = False  # x is a part of a larger matrix: the dropout mask has an offset
    groups: int = 0  # whose branches are computed at once, or layers
    kind: str = ""  # of a weight that is decoded, the activation, or EXPERTS of many groups
    ops: tuple[str, ...] = ("forward", "backward")
    tiles: Tiles = {}  # noqa: RUF012 never changed

    def __str__(self) -> str:
        flags = f"{' dropout' * bool(self.dropout)}{' bias' * self.bias}"
        flags += f" scaling {self.scaling}" * (self.scaling != 1)
        dtype = str(self.dtype).removeprefix("torch.")
        shape = f"{self.M}x{self.N}x{self.K} r{self.r}"
        fields = "".join(
            f" {launch}({', '.join(f'{name} {value}' for name, value in tile.items())})"
            for launch, tile in self.tiles.items()
        )
        flags += f"{' strided' * self.transposed}{' part' * self.part}"
        flags += f" {self.groups} groups" * bool(self.groups) + f" {self.kind}" * bool(self.kind)
        return f"{self.plan} {dtype} {shape}{flags}{fields}"


# No plans of one branch: the products of many groups, of several layers of one x, of few rows with
# a quantised weight, and DoRA's; and elementwise, so for any card, the dropout mask, the decoder of
# quantised weights, the kernels of columns and of gated MLPs.
MANY, EXPERTS, PACKED, CODED, SCALED = "many", "experts", "packed", "coded", "scaled"
MASK, DECODER, COLUMNS, GATING = "mask", "decoder", "columns", "gating"
ELEMENTWISE = (MASK, DECODER, COLUMNS, GATING)
OTHERS = (MANY, PACKED, CODED, SCALED, *ELEMENTWISE)
# The cards as which the tests interpret the plans; what is no plan's has the tiles of every card.
INTERPRETED_CARDS = ("80", "90")
SHORT = (
    Case(plan=MASK, dropout=0.1, part=True),
    Case(plan=GATING, kind="silu"),
    Case(plan=COLUMNS, bias=True),
    Case(plan=DECODER, kind="nf4"),
    Case(plan=CODED, kind="nf4", M=16, bias=True),
    Case(plan=MANY, M=512, dropout=0.1, groups=16),
    Case(plan=MANY, groups=8, bias=True, kind=EXPERTS),
    Case(plan=PACKED, groups=3, bias=True),
    Case(plan=SCALED, bias=True),
    Case(bias=True),
    Case(r=64, dropout=0.1),
    Case(plan="grouped", ops=("backward",)),
    Case(ops=("forward",), tiles={"gemm": {"pdl": 1}}),
    Case(plan="gluon", bias=True, ops=("forward",)),
)


def analytic() -> Iterator[Case]:
    """What the analytic tiles give; the other plans share the backward of shrink_gemm."""
    yield from SHORT
    for r in (1, 8, 32, 128, 200):
        yield Case(r=r)
        yield Case(r=r, dropout=0.1)
    yield Case(bias=True, dropout=0.1)
    for plan in ("cublas", "shrink_gemm"):
        yield Case(plan=plan, dropout=0.1, part=True)
        yield Case(plan=plan, dropout=0.1, part=True, r=64)
    backward = Case(plan="grouped", ops=("backward",))
    for r in (1, 64, 128, 200):
        yield backward._replace(r=r)
        yield backward._replace(r=r, dropout=0.1)
    yield backward._replace(dropout=0.1)
    yield backward._replace(dropout=0.1, part=True)
    yield backward._replace(N=1543, K=1031, M=1000)
    yield backward._replace(transposed=True, r=64)
    yield backward._replace(dtype=torch.float32)
    yield backward._replace(M=512, r=64)
    for kind in KINDS:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            yield Case(plan=DECODER, kind=kind, dtype=dtype)
        few = Case(plan=CODED, kind=kind, M=16, bias=True)
        yield few
        yield few._replace(M=64, r=64, dropout=0.1)
        yield few._replace(r=64, M=32)
        yield few._replace(dtype=torch.float32)
        yield few._replace(dtype=torch.float16, scaling=32.0)
    yield Case(plan=DECODER, kind="fp8", M=128)  # in square blocks
    many = Case(plan=MANY, M=512, groups=16)
    for r in (1, 8, 64, 128, 200):
        yield many._replace(r=r)
        yield many._replace(r=r, dropout=0.1)
    yield many._replace(M=16)
    yield many._replace(M=8192, groups=64)
    yield many._replace(N=1543, K=1031, M=1000)
    yield many._replace(transposed=True, r=64)
    yield many._replace(dtype=torch.float32)
    yield many._replace(dtype=torch.float32, r=64, dropout=0.1)
    yield many._replace(dtype=torch.float16, scaling=32.0)
    experts = Case(plan=MANY, groups=8, bias=True, kind=EXPERTS)
    for r in (1, 8, 64, 128, 200):
        yield experts._replace(r=r)
        yield experts._replace(r=r, dropout=0.1)
    yield experts._replace(M=16, groups=64)
    yield experts._replace(M=512, dropout=0.1)
    yield experts._replace(N=1543, K=1031, M=1000)
    yield experts._replace(transposed=True, r=64)
    yield experts._replace(dtype=torch.float32)
    yield experts._replace(dtype=torch.float32, r=64, dropout=0.1)
    yield experts._replace(dtype=torch.float16, scaling=32.0)
    packed = Case(plan=PACKED, groups=3)
    for r in (1, 8, 64, 128):
        yield packed._replace(r=r)
    for M in (16, 512):
        yield packed._replace(M=M)
    yield packed._replace(N=1543, K=1031, M=1000)
    yield packed._replace(dtype=torch.float32)
    yield packed._replace(dtype=torch.float16, scaling=32.0)
    scaled = Case(plan=SCALED)
    for r in (1, 8, 64, 128, 200):
        yield scaled._replace(r=r)
    for M in (16, 512):
        yield scaled._replace(M=M, bias=True)
    yield scaled._replace(N=1543, K=1031, M=1000)
    yield scaled._replace(transposed=True, r=64)
    yield scaled._replace(dtype=torch.float32, bias=True)
    yield scaled._replace(dtype=torch.float16, scaling=32.0)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        mask = Case(plan=MASK, dtype=dtype, dropout=0.1)
        yield mask
        yield mask._replace(part=True, transposed=True)
        yield mask._replace(K=1031, M=1000)
        yield Case(plan=COLUMNS, dtype=dtype)
        yield Case(plan=COLUMNS, dtype=dtype, bias=True, N=1543, M=1000)
        for act in gating.ACTIVATIONS:
            yield Case(plan=GATING, dtype=dtype, kind=act)
    yield Case(plan=GATING, kind="silu", N=1543, M=1000)
    half = Case(dtype=torch.float16, bias=True)
    yield half
    for r in (16, 64):
        yield half._replace(scaling=32.0, r=r)
        yield half._replace(scaling=32.0, r=r, plan="dual", N=1024, ops=("forward",))
        if r == 16:  # at 64 the flag kernel spills 96 bytes on sm_100, whose tuner then decides
            yield half._replace(scaling=32.0, r=r, plan="flag", ops=("forward",))
        yield half._replace(scaling=32.0, r=r, plan="decode", M=16, ops=("forward",))
        yield half._replace(scaling=32.0, r=r, plan="grouped", ops=("backward",))
        yield half._replace(scaling=32.0, r=r, dropout=0.1)
    yield Case(plan="cublas", dropout=0.1)
    yield Case(plan="cublas", r=128)
    yield Case(M=512, bias=True)
    yield Case(M=512, r=64, dropout=0.1)
    yield Case(M=512, r=128)
    yield Case(M=512, N=1544, K=1032, r=8)
    yield Case(M=16, r=64)
    yield Case(N=1544, K=1032, M=1000)
    yield Case(N=1543, K=1031, M=1000, dropout=0.1)
    yield Case(transposed=True, r=64)
    yield Case(dtype=torch.float32, r=16, bias=True)
    yield Case(dtype=torch.float32, r=64, dropout=0.1)
    yield Case(dtype=torch.float32, r=128, M=512)
    forward = Case(ops=("forward",))
    for r in (1, 16, 64, 128):
        yield forward._replace(plan="dual", N=1024, r=r, bias=True)
        if r == 16:
            yield forward._replace(plan="decode", M=16, r=r, dropout=0.1, part=True)
        if r <= 32:
            yield forward._replace(plan="dual", N=1024, r=r, dropout=0.1)
        decode = forward._replace(plan="decode", r=r)
        yield decode._replace(M=1, bias=True)
        yield decode._replace(M=16)
        yield decode._replace(M=64, N=14336)
        yield forward._replace(plan="flag", r=r, bias=True)
    flag = forward._replace(plan="flag")
    yield flag._replace(M=64, r=64)
    yield flag._replace(N=1543, K=1031, M=1000)
    yield flag._replace(N=1544, K=1032, M=1000, r=8)
    yield flag._replace(transposed=True)
    yield flag._replace(transposed=True, r=128)
    yield flag._replace(dtype=torch.float32)
    for r in (8, 16, 64, 128, 200):
        yield Case(plan="gluon", r=r, bias=True)
        yield Case(plan="gluon", r=r, bias=True, M=512, N=1544, K=1032)
    decode = forward._replace(plan="decode", M=8)
    yield decode._replace(N=1543, K=1031, r=8)
    yield decode._replace(dtype=torch.float32, r=32)
    yield forward._replace(plan="dual", M=512, N=1024, dtype=torch.float32, r=16, dropout=0.1)


def _tuned(target: Target) -> Iterator[Case]:
    """What a tuned table may say: all candidates, at every rank that makes another kernel."""
    for r in (1, 8, 16, 32, 64, 128):
        for M in (16, 64, 512, 8192):
            for dropout in (0.0, 0.1):
                for op in ("forward", "backward"):
                    case = Case(M=M, r=r, dropout=dropout, ops=(op,), bias=True)
                    call = Call(op, "bfloat16", M, case.N, case.K, r, dropout > 0)
                    for plan, fields in candidates(call, target):
                        if fields and plan != "decode_cuda":  # that one nvcc compiles
                            yield case._replace(plan=plan, tiles=fields)
                            if r == 16 and M == 8192:
                                yield case._replace(plan=plan, tiles=fields, transposed=True)
                            if dropout and r in (16, 64) and M == 8192:
                                yield case._replace(plan=plan, tiles=fields, part=True)


def is_served(case: Case, target: Target) -> bool:
    """Whether its plan is for such a card."""
    if case.plan in OTHERS:
        return case.plan in ELEMENTWISE or target.has_tensor_cores
    dtype = str(case.dtype).removeprefix("torch.")
    sizes, dropout = (case.M, case.N, case.K, case.r), case.dropout > 0
    with assume(target):
        return not any(
            PLANS[case.plan].refusal(Call(op, dtype, *sizes, dropout)) for op in case.ops
        )


def cases(target: Target) -> Iterator[Case]:
    yield from analytic()
    yield from _tuned(target)
