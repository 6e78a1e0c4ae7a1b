"""h = act(g) * u and its gradients, by one elementwise kernel each, on any GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.backends.triton.blocks import Matrix, tile_pointers
from lora_kernels.backends.triton.launch import launch
from lora_kernels.backends.triton.tiles import cdiv

_ROWS, _COLS = 8, 256
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")
_SILU, _GELU, _GELU_TANH, _RELU, _RELU2 = (tl.constexpr(i) for i in range(5))


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    # exp(-2 |x|) cannot overflow.
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def activation(x, ACT: tl.constexpr):
    """(act(x), its derivative) in fp32."""
    if ACT == _SILU:
        s = sigmoid(x)
        value = x * s
        slope = s * (1.0 + x * (1.0 - s))
    elif ACT == _GELU:
        cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        value = x * cdf
        slope = cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACT == _GELU_TANH:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        t = tanh(inner)
        value = 0.5 * x * (1.0 + t)
        slope = 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * 0.7978845608028654 * (
            1.0 + 0.134145 * x * x
        )
    elif ACT == _RELU:
        value = tl.where(x > 0, x, 0.0)
        slope = tl.where(x > 0, 1.0, 0.0)
    else:
        value = tl.where(x > 0, x * x, 0.0)
        slope = tl.where(x > 0, 2.0 * x, 0.0)
    return value, slope


@triton.jit
def load_wide(matrix, row, col):
    inside = (row[:, None] < matrix.rows) & (col[None, :] < matrix.cols)
    return tl.load(tile_pointers(matrix, row, col), mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_narrow(matrix, row, col, values):
    inside = (row[:, None] < matrix.rows) & (col[None, :] < matrix.cols)
    pointers = tile_pointers(matrix, row, col)
    tl.store(pointers, values.to(matrix.ptr.dtype.element_ty), mask=inside)


@triton.jit
def gate_kernel(
    g, u, h, rows, cols, stride_gr, stride_gc, stride_ur, stride_uc,
    ACT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """h = act(g) * u, contiguous."""
    strips = tl.cdiv(cols, COLS)
    pid = tl.program_id(0)
    row = (pid // strips) * ROWS + tl.arange(0, ROWS)
    col = (pid % strips) * COLS + tl.arange(0, COLS)
    value, _ = activation(load_wide(Matrix(g, stride_gr, stride_gc, rows, cols), row, col), ACT)
    up = load_wide(Matrix(u, stride_ur, stride_uc, rows, cols), row, col)
    store_narrow(Matrix(h, cols, 1, rows, cols), row, col, value * up)


@triton.jit
def gate_backward_kernel(
    g, u, dh, dg, du, rows, cols, stride_gr, stride_gc, stride_ur, stride_uc, stride_hr, stride_hc,
    stride_dgr, stride_dgc, stride_dur, stride_duc,
    ACT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """dg = dh * u * act'(g) and du = dh * act(g); one of them may be dh."""
    strips = tl.cdiv(cols, COLS)
    pid = tl.program_id(0)
    row = (pid // strips) * ROWS + tl.arange(0, ROWS)
    col = (pid % strips) * COLS + tl.arange(0, COLS)
    gradient = load_wide(Matrix(dh, stride_hr, stride_hc, rows, cols), row, col)
    up = load_wide(Matrix(u, stride_ur, stride_uc, rows, cols), row, col)
    gate = load_wide(Matrix(g, stride_gr, stride_gc, rows, cols), row, col)
    value, slope = activation(gate, ACT)
    of_g = Matrix(dg, stride_dgr, stride_dgc, rows, cols)
    store_narrow(of_g, row, col, gradient * up * slope)
    store_narrow(Matrix(du, stride_dur, stride_duc, rows, cols), row, col, gradient * value)


def gated(g: Tensor, u: Tensor, act: str) -> Tensor:
    """act(g) * u [M,I], rounded once."""
    (M, N), h = g.shape, g.new_empty(g.shape)
    launch(
        gate_kernel, (cdiv(M, _ROWS) * cdiv(N, _COLS),), g, u, h, M, N, *g.stride(), *u.stride(),
        ACT=ACTIVATIONS.index(act), ROWS=_ROWS, COLS=_COLS, num_warps=4,
    )  # fmt: skip
    return h


def gradients(of: tuple[Tensor, Tensor], dh: Tensor, act: str, out: tuple[Tensor, Tensor]) -> None:
    """out = (dg, du) of dh, of = (g, u); one of them may be dh."""
    (M, N), strides = dh.shape, (n for t in (*of, dh, *out) for n in t.stride())
    launch(
        gate_backward_kernel, (cdiv(M, _ROWS) * cdiv(N, _COLS),), *of, dh, *out, M, N, *strides,
        ACT=ACTIVATIONS.index(act), ROWS=_ROWS, COLS=_COLS, num_warps=4,
    )  # fmt: skip


def deviation(
    device: torch.device,
    plain: Callable[[Tensor, Tensor, str], Tensor],
    plain_gradients: Callable[..., None],
) -> str | None:
    """What of a small matrix is not what the plain calls make of it on a device; None if all is."""
    generator = torch.Generator().manual_seed(0)
    matrices = [4 * torch.randn(70, 300, generator=generator).to(device) for _ in range(3)]
    for dtype in (torch.float32, torch.bfloat16):
        g, u, dh = (matrix.to(dtype) for matrix in matrices)
        close = 1e-5 if dtype == torch.float32 else 1e-2  # of one rounding
        for act in ACTIVATIONS:
            out, other = ([torch.empty_like(dh), dh.clone()] for _ in range(2))
            gradients((g, u), out[1], act, (out[0], out[1]))
            plain_gradients((g, u), other[1], act, (other[0], other[1]))
            found, right = (gated(g, u, act), *out), (plain(g, u, act), *other)
            for one, two in zip(found, right, strict=True):
                error = (one.double() - two.double()).norm() / two.double().norm()
                if not error <= close:
                    return f"{act}: an error of {float(error):.1e} in {dtype}"
    return None
