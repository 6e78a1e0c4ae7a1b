"""What a result of the op must be, for tests of backends and plans and before anything is timed:
random tensors of a case, their fp64 outputs and gradients, and the library's rule of accuracy:

    error <= 2 x that of unfused torch + eps of the dtype, error = |out - exact| / |exact|.

    p = problem(Case(M=64, K=128, N=96, r=8, dtype="fp16"), device)
    expected(p).require("mine", [y, dx, d_a, d_b])
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lora_kernels.backends.dropout import keep_mask, keep_scale

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SCALING = 2.0
NAMES = ("y", "dx", "dA", "dB")
_ROWS = 512


# ATen ops that read and write nothing.
_FREE = {
    "view", "_unsafe_view", "t", "transpose", "detach", "slice", "select", "alias", "expand",
    "permute", "unsqueeze", "squeeze", "as_strided", "reshape", "split", "unbind",
    "_reshape_alias", "lift_fresh", "empty", "empty_like", "new_empty", "empty_strided",
    "new_empty_strided",
}  # fmt: skip


class Aten(TorchDispatchMode):
    """Within it, report(name, values) is called for every ATen op ("aten.mm.default") but views and
    allocations, with what it is handed to read, the `like` of new memory aside, and what it
    returns."""

    def __init__(self, report: Callable[[str, list[Any]], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own is not typed
        self._report = report

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        library, _, name = function.name().partition(".")[0].partition("::")
        if library == "aten" and name not in _FREE:
            read = [] if name.startswith("new_") else tree_leaves((args, kwargs))
            self._report(str(function), [*read, *tree_leaves(out)])
        return out


class Case(NamedTuple):
    """One layer, its input x [M,K] and weight [N,K], and its adapter of rank r; dtype is one of
    `DTYPES`."""

    M: int
    K: int
    N: int
    r: int
    dtype: str = "bf16"
    dropout: float = 0.0

    def __str__(self) -> str:
        drop = f" p={self.dropout:g}" if self.dropout else ""
        return f"{self.dtype} (M={self.M}, K={self.K}, N={self.N}, r={self.r}){drop}"


class Problem(NamedTuple):
    """x [M,K], which requires grad, weight [N,K], A [r,K], B [N,r] and the gradient dy [M,N] of the
    output: random, at realistic magnitudes."""

    case: Case
    x: Tensor
    weight: Tensor
    a: Tensor
    b: Tensor
    dy: Tensor


def problem(case: Case, device: torch.device) -> Problem:
    """The same values for the same sizes."""
    generator = torch.Generator(device).manual_seed(case.M + case.N + case.K + case.r)

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        values = torch.empty(shape, dtype=DTYPES[case.dtype], device=device)
        return values.normal_(0, scale, generator=generator)

    M, K, N, r = case[:4]
    return Problem(
        case,
        randn(M, K).requires_grad_(),
        randn(N, K, scale=K**-0.5),
        randn(r, K, scale=K**-0.5),
        randn(N, r, scale=r**-0.5),
        randn(M, N),
    )


class WrongResult(AssertionError):
    """It computes something else; its time would mean nothing."""


def _unfused(p: Problem, dtype: torch.dtype, drop: Tensor | None, rows: Tensor) -> list[Tensor]:
    """`rows` of y and dx, and dA and dB, computed in `dtype` (fp64: exact) and, where that is not
    fp64, rounded to the problem's dtype after every step. x is multiplied by `drop` in the
    branch."""

    def rounded(values: Tensor) -> Tensor:
        return values if dtype == torch.float64 else values.to(p.x.dtype).to(dtype)

    x, W, A, B, dy = (t.detach().to(dtype) for t in (p.x, p.weight, p.a, p.b, p.dy))
    kept = x if drop is None else rounded(x * drop.to(dtype))
    s, ds = rounded(SCALING * rounded(kept @ A.t())), rounded(SCALING * rounded(dy @ B))
    branch = rounded(ds[rows] @ A)
    branch = branch if drop is None else rounded(branch * drop[rows].to(dtype))
    return [
        rounded(rounded(x[rows] @ W.t()) + rounded(s[rows] @ B.t())),
        rounded(rounded(dy[rows] @ W) + branch),
        rounded(ds.t() @ kept),
        rounded(dy.t() @ s),
    ]


def error(out: Tensor, exact: Tensor) -> float:
    return float((out.detach().double() - exact).norm() / exact.norm())


def is_fatal(error: Exception) -> bool:
    """Whether nothing can run in this process any more."""
    text = str(error)
    return any(words in text for words in ("CUDA error", "illegal", "unspecified launch failure"))


class Expected(NamedTuple):
    """What is right for a problem: y and dx in some rows, the adapters' gradients whole."""

    rows: Tensor
    exact: list[Tensor]
    rival: list[Tensor]

    def errors(
        self, outs: list[Tensor], names: tuple[str, ...] = NAMES
    ) -> dict[str, tuple[float, float]]:
        """By name the error of an output, and that of unfused torch."""
        found = {}
        for what, out in zip(names, outs, strict=True):
            out = out[self.rows] if what in ("y", "dx") else out
            true, other = (of[NAMES.index(what)] for of in (self.exact, self.rival))
            found[what] = error(out, true), error(other, true)
        return found

    def require(self, name: str, outs: list[Tensor], names: tuple[str, ...] = NAMES) -> None:
        """Raises WrongResult unless the outputs `names`, some of y [M,N], dx [M,K], dA [r,K] and
        dB [N,r], are as near to fp64 as the rule demands."""
        for what, (mine, theirs) in self.errors(outs, names).items():
            out = outs[names.index(what)]
            if not mine <= 2 * theirs + torch.finfo(out.dtype).eps:
                raise WrongResult(
                    f"{name}: {what} has error {mine:.2e}, unfused torch {theirs:.2e}"
                )


def expected(p: Problem, seed: Tensor | None = None) -> Expected:
    """With the library's dropout mask of a seed, or without dropout."""
    drop = None
    if seed is not None and p.case.dropout:
        mask = keep_mask(seed, 0, p.case.M, p.case.K, p.case.dropout)
        drop = mask * keep_scale(p.case.dropout)
    count = min(p.case.M, _ROWS)
    rows = torch.linspace(0, p.case.M - 1, count, dtype=torch.float64).round().long()
    rows = rows.to(p.x.device)
    both = (_unfused(p, dtype, drop, rows) for dtype in (torch.float64, torch.float32))
    return Expected(rows, *both)
