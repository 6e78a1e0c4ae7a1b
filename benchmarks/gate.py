"""Nothing is timed before it is right: outputs and gradients against fp64, by the accuracy rule of
the library: error <= 2 x that of unfused torch + eps, error = |out - exact| / |exact|."""

from typing import NamedTuple

import torch
from peers import SCALING, Problem
from torch import Tensor

from lora_kernels.backends.dropout import keep_mask, keep_scale

NAMES = ("y", "dx", "dA", "dB")
_ROWS = 512
_SEED = 1234


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

    def require(self, name: str, outs: list[Tensor], names: tuple[str, ...] = NAMES) -> None:
        """Raises WrongResult unless the outputs `names` are as near to fp64 as the rule demands."""
        for what, out in zip(names, outs, strict=True):
            out = out[self.rows] if what in ("y", "dx") else out
            true, other = (of[NAMES.index(what)] for of in (self.exact, self.rival))
            mine, theirs = error(out, true), error(other, true)
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


def drawn_seed(device: torch.device) -> Tensor:
    """The next seed that a call of ours will draw; the generator is put back."""
    torch.manual_seed(_SEED)
    seed = torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)
    torch.manual_seed(_SEED)
    return seed
