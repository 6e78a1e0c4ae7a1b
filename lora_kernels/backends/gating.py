"""h = act(g) * u and its gradients: one elementwise kernel each on a GPU that has shown to compute
what ATen's calls do, these elsewhere, a few rows at a time and in fp32.

The activations are torch's: silu, gelu, gelu_tanh (the approximation), relu and relu2 (its square).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_kernels._namespace import ops
from lora_kernels.backends import blocked, native, trial
from lora_kernels.backends.native import extension

_aten = torch.ops.aten
# What a call of an activation is, and its gradient of (dy, g).
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": (F.silu, lambda dy, g: _aten.silu_backward(dy, g)),
    "gelu": (F.gelu, lambda dy, g: _aten.gelu_backward(dy, g, approximate="none")),
    "gelu_tanh": (
        lambda g: F.gelu(g, approximate="tanh"),
        lambda dy, g: _aten.gelu_backward(dy, g, approximate="tanh"),
    ),
    "relu": (F.relu, lambda dy, g: dy * (g > 0)),
    "relu2": (lambda g: F.relu(g).square(), lambda dy, g: 2 * dy * F.relu(g)),
}
_BLOCK_ELEMENTS = 1 << 16


def gated(g: Tensor, u: Tensor, act: str) -> Tensor:
    """act(g) * u [M,I], rounded once."""
    if g.is_cuda and g.numel() and _vouched(g.device):
        from lora_kernels.backends.triton import gating

        with torch.cuda.device_of(g):
            return gating.gated(g, u, act)
    if _by_kernels(act, g, u):
        h = g.new_empty(g.shape)
        ops._gate_cpu(g, u, None, _number(act), extension.best_isa(), h, None, None)
        return h
    return _gated(g, u, act)


Pair = tuple[Tensor, Tensor]


def gradients(of: Pair, dh: Tensor, act: str, out: Pair) -> None:
    """out = (dg, du) [M,I] of dh, of = (g, u); where one of them is dh, it is written over."""
    if dh.is_cuda and dh.numel() and _vouched(dh.device):
        from lora_kernels.backends.triton import gating

        with torch.cuda.device_of(dh):
            return gating.gradients(of, dh, act, out)
    if _by_kernels(act, *of, dh, *out):
        isa = extension.best_isa()
        ops._gate_cpu(*of, dh, _number(act), isa, None, *out)
        return None
    return _gradients(of, dh, act, out)


def _by_kernels(act: str, *tensors: Tensor) -> bool:
    """Whether the compiled CPU kernels compute it: of contiguous rows."""
    return (
        act in extension.ACTIVATIONS
        and native.drops(tensors[0])
        and all(t.stride(1) == 1 and t.data_ptr() % t.element_size() == 0 for t in tensors)
    )


def _number(act: str) -> int:
    return extension.ACTIVATIONS.index(act)


def _gated(g: Tensor, u: Tensor, act: str) -> Tensor:
    function, _ = ACTIVATIONS[act]
    h = g.new_empty(g.shape)
    wide = _wide(g)
    for block in _blocks(g):
        torch.mul(function(g[block].to(wide)), u[block], out=h[block])
    return h


def _gradients(of: Pair, dh: Tensor, act: str, out: Pair) -> None:
    function, derivative = ACTIVATIONS[act]
    (g, u), (dg, du), wide = of, out, _wide(dh)
    for block in _blocks(g):
        gate, gradient = g[block].to(wide), dh[block].to(wide)
        dg_here = derivative(gradient * u[block], gate)
        torch.mul(gradient, function(gate), out=du[block])
        dg[block] = dg_here


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _blocks(rows: Tensor) -> Iterator[slice]:
    return blocked.blocks(
        len(rows), max(1, _BLOCK_ELEMENTS * torch.get_num_threads() // max(1, rows.shape[1]))
    )


_right: dict[torch.device, bool] = {}


def _vouched(device: torch.device) -> bool:
    """Whether the kernel computes what ATen's calls do there."""
    return trial.passes(
        _right, device, _deviation,
        f"activations on {device} are computed by ATen's calls, which are many: the kernel fails",
    )  # fmt: skip


def _deviation(device: torch.device) -> str | None:
    from lora_kernels.backends.triton import gating

    return gating.deviation(device, _gated, _gradients)
