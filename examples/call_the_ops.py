"""The ops in somebody else's module: own parameter names, any base, the caller's autograd.

    python examples/call_the_ops.py                              # compares with plain torch
    python examples/call_the_ops.py --compile-backend aot_eager  # on a machine without a compiler

What the library takes over is one function call; the module, its parameters, its checkpoints and
its training loop stay the caller's. Every result is held against the same module in plain torch,
and both against fp64. docs/ops.md is the reference of what is called here.
"""

import argparse
import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora_kernels


class Int8Linear(nn.Module):
    """A stand-in for a quantised layer: whatever computes its output, the ops never see it."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("levels", (linear.weight.detach() / scale).round().to(torch.int8))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.levels.to(x.dtype) * self.scale, self.bias)


class LowRankUpdate(nn.Module):
    """base(x) + factor * up(down(drop(x))), with `method` as the only difference to plain torch."""

    def __init__(self, base: nn.Module, rank: int, factor: float, p: float, method: str):
        super().__init__()
        wide, narrow = (base.levels if isinstance(base, Int8Linear) else base.weight).shape
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, narrow) / narrow**0.5)
        self.up = nn.Parameter(torch.randn(wide, rank) / rank**0.5)
        self.factor, self.p, self.method = factor, p, method

    def forward(self, x: Tensor, seed: int = 0) -> Tensor:
        p = self.p if self.training else 0.0
        if self.method == "plain torch":
            dropped = x * mask_of(x, p, seed)
            return self.base(x) + self.factor * F.linear(F.linear(dropped, self.down), self.up)
        branch = {"scaling": self.factor, "dropout_p": p, "seed": seed}
        if isinstance(self.base, nn.Linear):
            if self.method == "raw op":
                return self.forward_raw(x, p, seed)
            weight, bias = self.base.weight, self.base.bias
            return lora_kernels.lora_linear(x, weight, self.down, self.up, bias, **branch)
        return lora_kernels.lora_add(self.base(x), x, self.down, self.up, **branch)

    def forward_raw(self, x: Tensor, p: float, seed: int) -> Tensor:
        """The op itself: matrices, a seed tensor, and what backward will need, said beforehand."""
        train = torch.is_grad_enabled()
        y, _ = torch.ops.lora_kernels.lora_linear(
            x.reshape(-1, x.shape[-1]), self.base.weight, self.down, self.up, self.base.bias,
            self.factor, p, torch.tensor(seed, device=x.device), train,
        )  # fmt: skip
        return y.view(*x.shape[:-1], -1)


def mask_of(x: Tensor, p: float, seed: int) -> Tensor:
    """The dropout mask of the ops, of x's shape: 0 or 1/(1-p). With identities for the adapter the
    branch is the mask itself."""
    K = x.shape[-1]
    ones, eye = torch.ones(x.numel() // K, K), torch.eye(K)
    mask = lora_kernels.lora_add(torch.zeros_like(ones), ones, eye, eye, dropout_p=p, seed=seed)
    return mask.to(x).view(x.shape)


def results(module: nn.Module, x: Tensor, call: Callable | None = None) -> dict[str, Tensor]:
    """Output and gradients at one seed."""
    x = x.detach().requires_grad_()
    y = (module if call is None else call)(x, 7)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view_as(y)
    named = {"x": x, "down": module.down, "up": module.up}
    gradients = torch.autograd.grad((y * weights).sum(), list(named.values()))
    return {"y": y.detach(), **dict(zip(named, gradients, strict=True))}


def require_as_plain(what: str, ours: dict, plain: dict, exact: dict) -> None:
    """No result may be further from fp64 than twice what plain torch is."""
    for name, truth in exact.items():
        one, two = ((r[name].double() - truth).norm() / truth.norm() for r in (ours, plain))
        assert one <= 2 * two + torch.finfo(torch.float32).eps, (what, name, one, two)
        print(f"{what:34} {name:5} error {one:.1e}, plain torch {two:.1e}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--compile-backend", default="inductor")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 48), torch.randn(2, 20, 64)

    for base in (linear, Int8Linear(linear)):
        kind = type(base).__name__
        module = LowRankUpdate(base, rank=4, factor=2.0, p=0.25, method="functional")
        plain, doubled, raw = (copy.deepcopy(module) for _ in range(3))
        plain.method = doubled.method = "plain torch"
        raw.method = "raw op"
        for train in (False, True):
            for one in (module, plain, doubled, raw):
                one.train(train)
            mode = "with dropout" if train else "without"
            expected = results(plain, x), results(doubled.double(), x.double())
            require_as_plain(f"{kind}, {mode}", results(module, x), *expected)
            if base is linear:
                require_as_plain(f"{kind}, {mode}, raw op", results(raw, x), *expected)

        again = results(module, x)
        assert all(map(torch.equal, again.values(), results(module, x).values()))
        assert not torch.equal(module(x, seed=7), module(x, seed=8))
        recomputed = results(
            module, x, lambda v, seed, m=module: checkpoint(m, v, seed, use_reentrant=False)
        )
        assert all(map(torch.equal, again.values(), recomputed.values()))
        print(f"{kind}: equal bits at an equal seed, also recomputed in backward")

        compiled = torch.compile(module, fullgraph=True, backend=options.compile_backend)
        require_as_plain(f"{kind}, compiled", results(module, x, compiled), *expected)

    with torch.no_grad():
        module.eval()
        y = module.base(x)
        address = y.data_ptr()
        lora_kernels.lora_add_(y, x, module.down, module.up, scaling=module.factor)
        assert y.data_ptr() == address
        assert torch.equal(y, module(x))
        print("lora_add_: in place, for inference")


if __name__ == "__main__":
    main()
