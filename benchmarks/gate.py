"""Nothing is timed before it is right: outputs and gradients against fp64, by the accuracy rule of
the library: error <= 2 x that of unfused torch + eps, error = |out - exact| / |exact|."""

import torch
from peers import SCALING, Peer, Problem
from torch import Tensor

from lora_kernels.backends.dropout import keep_mask, keep_scale

NAMES = ("y", "dx", "dA", "dB")
_SEED = 1234


class WrongResult(AssertionError):
    """A peer computes something else; its time would mean nothing."""


def unfused(p: Problem, dtype: torch.dtype, drop: Tensor | None, adapter: bool = True):
    """y, dx, dA and dB in one plain product each, computed in `dtype` (fp64: exact) and, where that
    is not fp64, rounded to the problem's dtype after every step. `drop` is what x is multiplied by
    in the branch."""

    def rounded(values: Tensor) -> Tensor:
        return values if dtype == torch.float64 else values.to(p.x.dtype).to(dtype)

    x, W, A, B, dy = (t.detach().to(dtype) for t in (p.x, p.weight, p.a, p.b, p.dy))
    y, dx = rounded(x @ W.t()), rounded(dy @ W)
    if not adapter:
        return [y, dx]
    kept = x if drop is None else rounded(x * drop.to(dtype))
    s, ds = rounded(SCALING * rounded(kept @ A.t())), rounded(SCALING * rounded(dy @ B))
    branch = rounded(ds @ A)
    branch = branch if drop is None else rounded(branch * drop.to(dtype))
    return [
        rounded(y + rounded(s @ B.t())),
        rounded(dx + branch),
        rounded(ds.t() @ kept),
        rounded(dy.t() @ s),
    ]


def error(out: Tensor, exact: Tensor) -> float:
    return float((out.detach().double() - exact).norm() / exact.norm())


def require(name: str, outs: list[Tensor], exact: list[Tensor], rival: list[Tensor]) -> None:
    """Raises WrongResult unless every output is as near to exact as the rule demands."""
    for what, out, true, other in zip(NAMES, outs, exact, rival, strict=False):
        mine, theirs = error(out, true), error(other, true)
        if not mine <= 2 * theirs + torch.finfo(out.dtype).eps:
            raise WrongResult(f"{name}: {what} has error {mine:.2e}, unfused torch {theirs:.2e}")


def drop_factor(p: Problem, seed: Tensor) -> Tensor | None:
    """[M, K] in fp32: what our dropout multiplies x by; None without dropout."""
    if not p.case.dropout:
        return None
    mask = keep_mask(seed, 0, p.case.M, p.case.K, p.case.dropout)
    return mask * keep_scale(p.case.dropout)


def check_ours(name: str, peer: Peer, p: Problem) -> None:
    """The whole problem in training mode, dropout mask included."""
    torch.manual_seed(_SEED)
    seed = torch.randint(2**63 - 1, (), dtype=torch.int64, device=p.x.device)  # as the layer draws
    drop = drop_factor(p, seed)
    exact, rival = unfused(p, torch.float64, drop), unfused(p, torch.float32, drop)
    torch.manual_seed(_SEED)
    require(name, peer.results(p), exact, rival)


def check_other(name: str, peer: Peer, p: Problem) -> None:
    """Without dropout, whose mask is the peer's own affair."""
    adapter = bool(peer.adapters)
    exact, rival = (unfused(p, dtype, None, adapter) for dtype in (torch.float64, torch.float32))
    peer.layer.eval()
    require(name, peer.results(p), exact, rival)
    peer.layer.train()
