"""Three things added to the library from outside of it: a plan, a backend, an adapter's tensor.

    python examples/extend.py

Each is one object in one file, this one; the registries that it goes into are what the library
itself reads. The results are held against plain torch and fp64.
"""

import copy
import os
import tempfile
from dataclasses import replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if not torch.cuda.is_available():  # plans are of CUDA calls; here Triton's interpreter stands in
    os.environ.setdefault("TRITON_INTERPRET", "1")

import lora_kernels as lk
from lora_kernels import backends
from lora_kernels.backends import reference
from lora_kernels.backends.cuda import plans
from lora_kernels.backends.cuda.choice import use_plan
from lora_kernels.backends.cuda.plan import Call, Pass, Tiles
from lora_kernels.branch import Base, Branch, Dense, Need

# --------------------------------------------------------------------------------------- a backend


class Counting:
    """A backend that serves fp32 calls on the CPU, by the reference, and counts them.

    It is a default of no device: `use_backend("counting")` or LORA_KERNELS_BACKEND takes it. What
    `refusal` names goes to the reference, or raises where the backend is forced.
    """

    def __init__(self) -> None:
        self.calls = {"forward": 0, "add_": 0, "backward": 0}

    def lacks(self, device: torch.device) -> str | None:
        return None if device.type == "cpu" else f"counts on the CPU, got {device.type} tensors"

    def default(self, device: torch.device) -> tuple[bool, str]:
        return False, ""

    def refusal(self, rows: Tensor) -> str | None:
        return None if rows.dtype == torch.float32 else f"counts fp32 calls, got {rows.dtype}"

    def leaves(self, base: Base, rows: Tensor, branch: Branch) -> str | None:
        return None

    def forward(
        self, base: Base, x: Tensor, branch: Branch, save_s: bool
    ) -> tuple[Tensor, Tensor | None]:
        self.calls["forward"] += 1
        return reference.forward(base, x, branch, save_s)

    def add_(self, base_out: Tensor, x: Tensor, branch: Branch) -> None:
        self.calls["add_"] += 1
        reference.add_(base_out, x, branch)

    def backward(
        self, base: Base, dy: Tensor, x: Tensor, s: Tensor, branch: Branch, need: Need
    ) -> reference.Gradients:
        self.calls["backward"] += 1
        return reference.backward(base, dy, x, s, branch, need)


# ------------------------------------------------------------------------------------------ a plan


def _merged(
    base: Dense, x: Tensor, branch: Branch, save_s: bool, tiles: Tiles
) -> tuple[Tensor, Tensor | None]:
    """y = x (W + scaling B A)^T + bias: one product, for a weight that is small beside x."""
    weight, a, b = base.weight.to(x.dtype), branch.lora_a.to(x.dtype), branch.lora_b.to(x.dtype)
    y = F.linear(x, torch.addmm(weight, b, a, alpha=branch.scaling), base.bias)
    return y, branch.scaling * F.linear(x, a) if save_s else None


def _is_small(call: Call) -> str | None:
    """Why the plan is not for a call."""
    if 8 * call.N * call.K > call.M * (call.N + call.K):
        return f"the weight is not small beside x: M = {call.M}, N = {call.N}, K = {call.K}"
    return None


# The other passes are those of ATen's calls.
MERGED = replace(
    plans.PLANS["aten"],
    name="merged",
    summary="the weight and the adapter summed first, for many rows of few columns",
    forward=Pass(_merged, dtypes=("float32",), dropout=False, needs=_is_small),
)

# ----------------------------------------------------------------------------- an adapter's tensor


class GainedLinear(lk.FusedLoRALinear):
    """A LoRA layer with a trained gain for every output of its branch: lora_gain [N].

    State dicts, optimizers, merging, disabling and removing know the tensor from this declaration;
    `save_adapter` writes the product that acts, which PEFT then reads as plain LoRA.
    """

    adapter_parameters: ClassVar = {**lk.FusedLoRALinear.adapter_parameters, "lora_gain": "N"}

    def reset_lora_parameters(self) -> None:
        super().reset_lora_parameters()
        nn.init.ones_(self.lora_gain)

    def low_rank(
        self, lora_A: Tensor, lora_B: Tensor, lora_gain: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        gain = self.lora_gain if lora_gain is None else lora_gain
        return lora_A, lora_B * gain[:, None]


# -------------------------------------------------------------------------------------------- main


def operands(M: int, N: int, K: int, r: int) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return torch.randn(M, K), torch.randn(N, K) / K**0.5, torch.randn(r, K), torch.randn(N, r)


def error(out: Tensor, exact: Tensor) -> float:
    return float((out.detach().double() - exact).norm() / exact.norm())


def exact_y(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    x, weight, a, b = (t.detach().double() for t in (x, weight, a, b))
    return x @ weight.t() + 0.5 * x @ a.t() @ b.t()


def try_backend() -> Counting:
    counting = Counting()
    backends.register("counting", counting)
    x, weight, a, b = operands(64, 48, 32, 4)
    with backends.use_backend("counting"):
        y = lk.lora_linear(x, weight, a.requires_grad_(), b, scaling=0.5)
        y.sum().backward()
    print(f"backend: {counting.calls}, error of y {error(y, exact_y(x, weight, a, b)):.1e}")
    return counting


def try_plan() -> tuple[Tensor, Tensor]:
    plans.register(MERGED)
    x, weight, a, b = operands(4096, 32, 64, 4)
    if torch.cuda.is_available():
        x, weight, a, b = (t.cuda() for t in (x, weight, a, b))
    with use_plan("merged"):
        y = lk.lora_linear(x, weight, a, b, scaling=0.5)
        try:
            lk.lora_linear(x[:8], weight, a, b)
        except RuntimeError as refused:
            print(f"plan: refused: {refused}")
    exact = exact_y(x, weight, a, b)
    print(f"plan: error of y {error(y, exact):.1e}")
    return y, exact


def try_adapter() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8)).requires_grad_(False)
    model[0] = GainedLinear.from_linear(model[0], 4, alpha=8)
    x, targets = torch.randn(256, 32), torch.randint(8, (256,))
    optimizer = torch.optim.AdamW(lk.lora_parameters(model), 1e-2)
    history = lk.train_model(model, [(x, targets)], F.cross_entropy, optimizer, epochs=30)
    print(f"adapter: trains {', '.join(lk.lora_state_dict(model))}")
    print(f"adapter: loss {history.loss[0]:.3f} -> {history.loss[-1]:.3f}")
    before = model(x).detach()
    lk.merge_lora(model)
    print(f"adapter: merged, outputs move by {error(model(x), before.double()):.1e}")
    lk.unmerge_lora(model)
    with tempfile.TemporaryDirectory() as folder:
        lk.save_adapter(model, folder)
        plain = copy.deepcopy(model)
        lk.remove_lora(plain)
        lk.load_adapter(plain, folder)
    print(f"adapter: read from PEFT's files, {error(plain(x), before.double()):.1e} apart")
    return plain


def main() -> None:
    try_backend()
    try_plan()
    try_adapter()


if __name__ == "__main__":
    main()
