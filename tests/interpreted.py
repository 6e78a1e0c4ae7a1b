"""What the cases in Triton's interpreter share: problems of odd shapes and layouts on the CPU."""

import math
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
import triton.language as tl
from triton.runtime import interpreter

from lora_kernels.backends.cuda.plan import Call
from lora_kernels.backends.cuda.plans import PLANS
from lora_kernels.backends.device import CARDS
from lora_kernels.backends.dropout import keep_mask, keep_scale
from lora_kernels.backends.scaling import split
from lora_kernels.branch import Branch, Dense

ops = torch.ops.lora_kernels
NAMES = ("y", "s", "dx", "da", "db")
SCALING = 1.5


def _patch_once(fn, patch=interpreter._patch_lang):
    """Patches Triton's language for a launch and everything it calls. Triton does so again in every
    call of a device function, for a third of the time that a launch takes."""
    if not tl.core.is_builtin(tl.core.load):
        return None  # a launch is running
    return patch(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))


interpreter._patch_lang = _patch_once


class Case(NamedTuple):
    M: int
    N: int
    K: int
    r: int
    dtype: torch.dtype = torch.float16
    p: float = 0.0
    bias: bool = False
    layout: str = "contiguous"
    wide_adapters: bool = False  # fp32 masters beside a 16-bit x


# Pointers; TMA descriptors where operands allow.
AMPERE, HOPPER = CARDS["80"]._replace(sms=2), CARDS["90"]._replace(sms=3)
CASES = (
    Case(1, 1, 1, 1, torch.float32),
    Case(1, 130, 72, 8, bias=True),
    Case(3, 17, 129, 3, p=0.5),
    Case(17, 129, 127, 17, torch.float32, bias=True),
    Case(33, 264, 136, 16, p=0.25, bias=True),
    Case(40, 48, 200, 8, layout="transposed", p=0.1),
    Case(40, 48, 200, 3, torch.float32, layout="expanded", bias=True),
    Case(50, 33, 65, 16, layout="sliced", p=0.3, wide_adapters=True),
    Case(64, 136, 160, 64, p=0.1, bias=True, wide_adapters=True),
    Case(70, 72, 80, 200, bias=True),
    Case(127, 40, 96, 64, torch.float32, p=0.2),
    Case(129, 304, 72, 16, bias=True),
    Case(150, 264, 264, 24, p=0.4),
    Case(260, 32, 48, 1, wide_adapters=True),
)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty and its kin hand out NaN, so that an element that nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.ones(2).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def laid_out(rows: int, columns: int, layout: str, dtype: torch.dtype) -> torch.Tensor:
    if layout == "transposed":
        return torch.randn(columns, rows).to(dtype).t()
    if layout == "expanded":
        return torch.randn(1, columns).to(dtype).expand(rows, columns)
    if layout == "sliced":
        return torch.randn(rows, columns + 3).to(dtype)[:, 1 : columns + 1]
    return torch.randn(rows, columns).to(dtype)


class Problem:
    """Inputs of a case and a gradient of its output."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(1000 * case.M + case.r)
        M, N, K, r = case[:4]
        adapters = torch.float32 if case.wide_adapters else case.dtype
        self.case = case
        self.x = laid_out(M, K, case.layout, case.dtype)
        weights = "transposed" if case.layout == "transposed" else "contiguous"
        self.weight = (laid_out(N, K, weights, case.dtype) / math.sqrt(K)).to(case.dtype)
        self.a = (torch.randn(r, K) / math.sqrt(K)).to(adapters)
        self.b = (torch.randn(N, r) / math.sqrt(r)).to(adapters)
        self.bias = torch.randn(N).to(case.dtype) if case.bias else None
        self.dy = laid_out(M, N, case.layout, case.dtype)
        # Cases with an odd number of rows are parts of a larger matrix.
        place = [5 * case.M, 8 * case.K] if case.M % 2 else []
        self.seed = torch.tensor([-(3 << 40) - case.M, *place]) if case.p else None
        self.branch = (SCALING, case.p, self.seed)
        self.base, self.low_rank = (
            Dense(self.weight, self.bias),
            Branch(self.a, self.b, *self.branch),
        )

    def keep(self) -> torch.Tensor | float:
        if not self.case.p:
            return 1.0
        mask = keep_mask(self.seed, 0, self.case.M, self.case.K, self.case.p)
        return mask * keep_scale(self.case.p)

    def unfused(self, dtype: torch.dtype, base: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """Plain torch in `dtype`, adapters rounded to x's: in fp64 the oracle, else the rival."""
        low = self.case.dtype
        x, w, dy = (t.to(dtype) for t in (self.x, self.weight, self.dy))
        a, b = (t.to(low).to(dtype) for t in (self.a, self.b))
        x, a, b = (t.detach().requires_grad_() for t in (x, a, b))
        keep = self.keep()
        dropped = x * (keep if isinstance(keep, float) else keep.to(dtype))
        s = F.linear(dropped, a) * SCALING
        if base is None:
            bias = None if self.bias is None else self.bias.to(dtype)
            y = F.linear(x, w, bias) + F.linear(s, b)
        else:
            y = base.to(dtype) + F.linear(s, b)
        dx, da, db = torch.autograd.grad(y, (x, a, b), dy)
        s = s / split(SCALING, low)[1]
        return dict(zip(NAMES, (y.detach(), s.detach(), dx, da, db), strict=True))

    def linear(self, needed=(True, False, True, True)) -> dict[str, torch.Tensor]:
        y, s = ops.lora_linear(self.x, self.weight, self.a, self.b, self.bias, *self.branch, True)
        dx, _, da, db = ops.lora_linear_backward(
            self.dy, self.x, self.weight, self.a, self.b, s, *self.branch, *needed
        )
        return dict(zip(NAMES, (y, s, dx, da, db), strict=True))

    def add(self, base: torch.Tensor) -> dict[str, torch.Tensor]:
        y, s = ops.lora_add(base, self.x, self.a, self.b, *self.branch, True)
        dx, da, db = ops.lora_add_backward(
            self.dy, self.x, self.a, self.b, s, *self.branch, True, True, True
        )
        return dict(zip(NAMES, (y, s, dx, da, db), strict=True))


def error(out: torch.Tensor, exact: torch.Tensor) -> float:
    assert out.isfinite().all()
    return ((out.double() - exact).norm() / exact.norm().clamp_min(1e-300)).item()


def serves(plan: str, case: Case) -> bool:
    dtype = str(case.dtype).removeprefix("torch.")
    return PLANS[plan].refusal(Call("forward", dtype, *case[:4], case.p > 0)) is None


def ratios(problem: Problem, outputs: dict, base: torch.Tensor | None = None) -> dict[str, float]:
    """Error over the error of unfused torch, having checked the rule for each case."""
    exact = problem.unfused(torch.float64, base)
    rival = problem.unfused(problem.case.dtype, base)
    eps = torch.finfo(problem.case.dtype).eps
    found = {}
    for name, out in outputs.items():
        assert out.shape == exact[name].shape
        ours, theirs = error(out, exact[name]), error(rival[name], exact[name])
        assert ours <= 2 * theirs + eps, (problem.case, name, ours, theirs)
        if min(ours, theirs) > 0:
            found[name] = ours / theirs
    return found


def geometric_means(found: list[dict[str, float]]) -> dict[str, float]:
    return {
        name: math.exp(sum(math.log(f[name]) for f in found if name in f) / len(found))
        for name in NAMES
    }
