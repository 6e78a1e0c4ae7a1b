"""The layers that are compared: one problem, equal weights, each peer with its own copy of them."""

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_kernels import FusedLoRALinear, fuse_peft
from lora_kernels.backends import use_backend
from lora_kernels.backends.cuda.choice import use_plan
from lora_kernels.testing import SCALING, Problem
from lora_kernels.tuning.clock import Turn

FROZEN = "frozen nn.Linear"
# Ours is measured as PEFT is: with adapters of the base's dtype, and beside 16 bits with fp32 ones,
# which both make by default.
OURS, OURS_FP32 = "lora_kernels", "lora_kernels, fp32 adapters"
UNFUSED, ADDMM = "unfused torch", "addmm autograd"
PEFT, PEFT_FP32, PEFT_COMPILED = "PEFT, same dtype", "PEFT, fp32 adapters", "PEFT, torch.compile"
PEFT_FUSED = "PEFT, fuse_peft"
BLOCKS = "lora_kernels, fuse_blocks"
PEERS = (FROZEN, UNFUSED, ADDMM, PEFT, PEFT_FP32, PEFT_COMPILED, OURS_FP32, OURS)
_PLAN = f"{OURS}, plan "


def of_plan(plan: str) -> str:
    """The name of our layer with its plan forced."""
    return _PLAN + plan


class Peer(NamedTuple):
    layer: nn.Module
    adapters: tuple[nn.Parameter, ...]  # A and B; none where the layer is frozen
    plan: str | None = None  # forced, or a backend, or neither
    backend: str | None = None

    def context(self) -> contextlib.AbstractContextManager:
        if self.plan is not None:
            return use_plan(self.plan)
        return contextlib.nullcontext() if self.backend is None else use_backend(self.backend)

    def turn(self, p: Problem) -> Turn:
        """Forward, mark, backward, mark."""
        leaves = (p.x, *self.adapters)

        def run(mark: Callable[[], None]) -> None:
            with self.context():
                y = self.layer(p.x)
                mark()
                torch.autograd.grad(y, leaves, p.dy)
                mark()

        return run

    def results(self, p: Problem) -> list[Tensor]:
        """y, dx and, where there are adapters, dA and dB."""
        with self.context():
            y = self.layer(p.x)
            return [y.detach(), *torch.autograd.grad(y, (p.x, *self.adapters), p.dy)]


class _Addmm(torch.autograd.Function):
    """LoRA by cuBLAS calls alone, as few as there can be; s is computed again in backward.

    `dropped` is x after dropout, None where there is none.
    """

    @staticmethod
    def forward(ctx, x, dropped, weight, a, b):
        ctx.save_for_backward(x if dropped is None else dropped, weight, a, b)
        ctx.dropout = dropped is not None
        y = x @ weight.t()
        return y.addmm_((x if dropped is None else dropped) @ a.t(), b.t(), alpha=SCALING)

    @staticmethod
    def backward(ctx, dy):
        x, weight, a, b = ctx.saved_tensors
        ds = dy @ b
        d_a = torch.addmm(a, ds.t(), x, beta=0, alpha=SCALING)
        d_b = torch.addmm(b, dy.t(), x @ a.t(), beta=0, alpha=SCALING)
        dx = dy @ weight
        if ctx.dropout:
            return dx, torch.addmm(dx, ds, a, beta=0, alpha=SCALING), None, d_a, d_b
        return dx.addmm_(ds, a, alpha=SCALING), None, None, d_a, d_b


class _Handwritten(nn.Module):
    """LoRA as one writes it by hand: by autograd (`unfused`), or by `_Addmm`."""

    def __init__(self, p: Problem, unfused: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(p.weight.clone(), requires_grad=False)
        self.lora_A, self.lora_B = nn.Parameter(p.a.clone()), nn.Parameter(p.b.clone())
        self.dropout, self.unfused = p.case.dropout, unfused

    def forward(self, x: Tensor) -> Tensor:
        drops = self.dropout and self.training
        dropped = F.dropout(x, self.dropout) if drops else None
        if not self.unfused:
            return _Addmm.apply(x, dropped, self.weight, self.lora_A, self.lora_B)
        low = F.linear(dropped if drops else x, self.lora_A)
        return F.linear(x, self.weight) + F.linear(low, self.lora_B) * SCALING


def _linear(p: Problem) -> nn.Linear:
    linear = nn.Linear(p.case.K, p.case.N, bias=False, device="meta")
    linear.weight = nn.Parameter(p.weight.clone(), requires_grad=False)
    return linear


def _frozen(p: Problem) -> Peer:
    return Peer(_linear(p), ())


def _handwritten(p: Problem, unfused: bool) -> Peer:
    layer = _Handwritten(p, unfused)
    return Peer(layer, (layer.lora_A, layer.lora_B))


@torch.no_grad()
def _ours(p: Problem, plan: str | None = None, fp32: bool = False) -> Peer:
    r = p.case.r
    layer = FusedLoRALinear.from_linear(
        _linear(p), r, alpha=SCALING * r, dropout=p.case.dropout,
        adapter_dtype=torch.float32 if fp32 else p.weight.dtype,
    )  # fmt: skip
    layer.lora_A.copy_(p.a)
    layer.lora_B.copy_(p.b)
    return Peer(layer, (layer.lora_A, layer.lora_B), plan)


@torch.no_grad()
def _peft(p: Problem, fp32: bool = False, compiled: bool = False, fused: bool = False) -> Peer:
    from peft import LoraConfig, get_peft_model

    r = p.case.r
    config = LoraConfig(
        r=r, lora_alpha=SCALING * r, lora_dropout=p.case.dropout, target_modules=["0"]
    )
    model = get_peft_model(nn.Sequential(_linear(p)), config, autocast_adapter_dtype=fp32)
    if fused:
        fuse_peft(model)
    layer = model.base_model.model[0]
    adapters = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    for parameter, values in zip(adapters, (p.a, p.b), strict=True):
        parameter.copy_(values)
    return Peer(torch.compile(layer, dynamic=False) if compiled else layer, adapters)


_BUILDERS: dict[str, Callable[[Problem], Peer]] = {
    FROZEN: _frozen,
    UNFUSED: lambda p: _handwritten(p, unfused=True),
    ADDMM: lambda p: _handwritten(p, unfused=False),
    PEFT: _peft,
    PEFT_FP32: lambda p: _peft(p, fp32=True),
    PEFT_COMPILED: lambda p: _peft(p, compiled=True),
    PEFT_FUSED: lambda p: _peft(p, fused=True),
    OURS: _ours,
    OURS_FP32: lambda p: _ours(p, fp32=True),
}


def build(name: str, p: Problem) -> Peer:
    """The named peer, in training mode."""
    peer = _ours(p, name.removeprefix(_PLAN)) if name.startswith(_PLAN) else _BUILDERS[name](p)
    peer.layer.train()
    return peer
