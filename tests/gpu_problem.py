"""What the GPU tests share: one call with its gradients, in fused and in plain torch."""

import pytest
import torch
import torch.nn.functional as F

import lora_kernels
from lora_kernels.backends import use_backend
from lora_kernels.backends.cuda.plan import Call
from lora_kernels.backends.cuda.plans import PLANS as ALL
from lora_kernels.backends.dropout import keep_mask, keep_scale

DEVICE = "cuda"
PLANS = tuple(name for name, plan in ALL.items() if name != "aten" and plan.forward is not None)
SCALING = 1.5


@pytest.fixture(autouse=True)
def triton_backend():
    """Forced."""
    with use_backend("triton"):
        yield


def most_rows(plan: str, rows: int) -> int:
    """As many of these rows as the plan serves."""
    return min(rows, ALL[plan].forward.most_rows or rows)


def refused(plan: str, dtype: torch.dtype, shape: tuple[int, ...], p: float) -> str | None:
    call = Call("forward", str(dtype).removeprefix("torch."), *shape, p > 0)
    return ALL[plan].refusal(call)


class Problem:
    """Inputs on the GPU, leaves that require grad, and a gradient of the output."""

    def __init__(self, M, N, K, r, dtype=torch.bfloat16, p=0.0, adapters=None) -> None:
        generator = torch.Generator(DEVICE).manual_seed(M + N + K + r)

        def randn(*shape, dtype=dtype, scale=1.0):
            values = torch.randn(*shape, device=DEVICE, generator=generator) * scale
            return values.to(dtype)

        adapters = adapters or dtype
        self.dtype, self.p = dtype, p
        self.x = randn(M, K).requires_grad_()
        self.weight = randn(N, K, scale=K**-0.5)
        self.bias = randn(N)
        self.a = randn(r, K, dtype=adapters, scale=K**-0.5).requires_grad_()
        self.b = randn(N, r, dtype=adapters, scale=r**-0.5).requires_grad_()
        self.dy = randn(M, N)
        self.seed = torch.tensor([1234567890123], device=DEVICE)

    def forward(self) -> torch.Tensor:
        return lora_kernels.lora_linear(
            self.x, self.weight, self.a, self.b, self.bias,
            scaling=SCALING, dropout_p=self.p, seed=self.seed,
        )  # fmt: skip

    def outputs(self, y: torch.Tensor) -> list[torch.Tensor]:
        """y, dx, dA, dB."""
        return [y.detach(), *torch.autograd.grad(y, (self.x, self.a, self.b), self.dy)]

    def run(self) -> list[torch.Tensor]:
        return self.outputs(self.forward())

    def unfused(self, dtype: torch.dtype) -> list[torch.Tensor]:
        x, w, bias, dy = (t.detach().to(dtype) for t in (self.x, self.weight, self.bias, self.dy))
        a, b = (t.detach().to(self.dtype).to(dtype) for t in (self.a, self.b))
        leaves = [t.requires_grad_() for t in (x, a, b)]
        dropped = x
        if self.p:
            mask = keep_mask(self.seed, 0, *x.shape, self.p)
            dropped = x * (mask * keep_scale(self.p)).to(dtype)
        y = F.linear(x, w, bias) + F.linear(F.linear(dropped, a) * SCALING, b)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def error(out: torch.Tensor, exact: torch.Tensor) -> float:
    assert out.isfinite().all()
    return ((out.double() - exact).norm() / exact.norm().clamp_min(1e-300)).item()
