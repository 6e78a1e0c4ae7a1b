"""The rank of a matrix product: best low-rank approximations, re-factoring an adapter, budgets."""

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Method = Literal["exact", "randomized"]
_METHODS = ("exact", "randomized")
# Up to this many elements LAPACK is quick (0.1 s on one core), so nothing is gained by estimating.
_EXACT_ELEMENTS = 1 << 18


@torch.no_grad()
def low_rank_approximation(
    M: Tensor,
    k: int,
    *,
    method: Method | None = None,
    power_iterations: int = 2,
    oversampling: int = 16,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """The best approximation of a matrix by one of rank k: M ≈ U @ V.

    By Eckart and Young it is the truncated SVD, whose error in the Frobenius norm is the root of
    the sum of squares of the singular values left out. Each factor carries the square roots of the
    singular values kept. "randomized" finds the range by subspace iteration (Halko, Martinsson and
    Tropp, 2011, arXiv:0909.4061, algorithms 4.4 and 5.1) in 2 * power_iterations + 2 products of M
    with k + oversampling vectors; with the default settings its error is within 1 % of the best one
    on spectra that decay and on flat ones (tests/test_rank.py).

    Args:
        M: [..., m, n] of any real floating dtype on any device; computed in fp32, fp64 for fp64.
        k: between 1 and min(m, n).
        method: "exact", "randomized", or None to choose by size: exact for up to 2^18 elements a
            matrix and where k is not small against min(m, n).
        power_iterations: of the randomised method, at least 0; more bring it nearer to the best.
        oversampling: vectors beyond k, at least 0.
        seed: of the random start. Equal seeds give equal results on a device; torch's generators
            are neither read nor moved.

    Returns:
        U [..., m, k] and V [..., k, n] in M's dtype, without gradient.

    Raises:
        TypeError: M is no real floating tensor, or an argument is no integer.
        ValueError: a shape or value out of range, or M holds non-finite values.
    """
    _check_matrix("M", M)
    m, n = M.shape[-2:]
    _check_integer("k", k, 1, min(m, n), f"min(m, n) of M {tuple(M.shape)}")
    _check_integer("power_iterations", power_iterations, 0)
    _check_integer("oversampling", oversampling, 0)
    _check_integer("seed", seed, -(2**63), 2**64 - 1)
    if method is not None and method not in _METHODS:
        raise ValueError(f"method: got {method!r}, legal values are None, {', '.join(_METHODS)}")
    size = min(k + oversampling, m, n)
    if method is None:
        method = "exact" if m * n <= _EXACT_ELEMENTS or 4 * size > min(m, n) else "randomized"
    # Autocast would form the products in half precision.
    with torch.autocast(M.device.type, enabled=False):
        X = M.to(_compute_dtype(M))
        largest = _largest("M", X)
        if method == "exact":
            U, S, Vh = torch.linalg.svd(X, full_matrices=False)
        else:
            U, S, Vh = _randomized_svd(X, largest, size, power_iterations, seed)
        root = S[..., :k].sqrt()
        return (
            (U[..., :k] * root.unsqueeze(-2)).to(M.dtype),
            (root.unsqueeze(-1) * Vh[..., :k, :]).to(M.dtype),
        )


def _randomized_svd(
    X: Tensor, largest: Tensor, size: int, power_iterations: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(X.device).manual_seed(seed)
    sketch = torch.randn(
        *X.shape[:-2], X.shape[-1], size, generator=generator, device=X.device, dtype=X.dtype
    )
    # The thin side of every product is divided by the largest element, so that no sum overflows and
    # no scaled copy of X is made.
    scale = largest.clamp_min(1e-30)
    Q = torch.linalg.qr(X @ (sketch / scale)).Q
    for _ in range(power_iterations):
        # Orthonormalised after each product: otherwise rounding leaves the leading direction alone.
        Q = torch.linalg.qr(X.mT @ (Q / scale)).Q
        Q = torch.linalg.qr(X @ (Q / scale)).Q
    # The thin X^T Q is reduced to size x size before its SVD.
    P, R = torch.linalg.qr(X.mT @ (Q / scale))
    U, S, Vh = torch.linalg.svd(R.mT)
    return Q @ U, S * scale.squeeze(-1), Vh @ P.mT


class Refactored(NamedTuple):
    """What `refactor` gives. `singular_values` [min(r, N, K)] are those of B A before it."""

    A: Tensor
    B: Tensor
    singular_values: Tensor
    kept_energy: float


@torch.no_grad()
def refactor(A: Tensor, B: Tensor, k: int) -> Refactored:
    """The best rank-k adapter for the product of another: B' A' is the truncated SVD of B A.

    Works on the factors alone: QR of B and of A^T, then the SVD of an r x r matrix; the N x K
    product is never formed. A direction whose singular value is null gets a row of A and a zero
    column of B, as a new adapter has, for two zeros would never train again.

    Args:
        A: [r, K].  B: [N, r], of the same real floating dtype and device.
        k: between 1 and r.

    Returns:
        A' [k, K] and B' [N, k] in the dtype of A and B (computed in fp32, fp64 for fp64), all
        singular values of B A, and the kept energy: the share of their squares that stays, 1 for a
        product of zero.

    Raises:
        TypeError: a wrong type or dtype.  ValueError: shapes or devices that do not match, a k out
        of range, non-finite values.
    """
    _check_pair(A, B)
    (rank, K), N = A.shape, B.shape[0]
    _check_integer("k", k, 1, rank, f"the rank of A {tuple(A.shape)}")
    with torch.autocast(A.device.type, enabled=False):
        Qb, U, S, Vh, Qa = _factored_svd(A, B)
        kept = min(k, *S.shape)
        root = S[:kept].sqrt()
        null = S[:kept] <= S[:1] * max(N, K) * torch.finfo(S.dtype).eps
        # A row of a new adapter is uniform within 1 / sqrt(K): of norm 1 / sqrt(3).
        rows = torch.where(null, 3**-0.5, root)
        columns = torch.where(null, 0.0, root)
        new_A = (rows[:, None] * (Vh[:kept] @ Qa.mT)).to(A.dtype)
        new_B = (Qb @ U[:, :kept] * columns).to(B.dtype)
        total = S.double().square().sum()
        energy = float(S[:kept].double().square().sum() / total) if total > 0 else 1.0
    if kept < k:
        new_A, new_B = widen(new_A, new_B, k)
    return Refactored(new_A, new_B, S, energy)


@torch.no_grad()
def spectrum(A: Tensor, B: Tensor) -> Tensor:
    """Singular values of B A, [min(r, N, K)] and descending, from its factors as in `refactor`."""
    _check_pair(A, B)
    with torch.autocast(A.device.type, enabled=False):
        return _factored_svd(A, B)[2]


def _factored_svd(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Qb, U, S, Vh, Qa with B A = (Qb U) diag(S) (Vh Qa^T)."""
    dtype = _compute_dtype(A)
    Qb, Rb = torch.linalg.qr(B.to(dtype))
    Qa, Ra = torch.linalg.qr(A.to(dtype).mT)
    U, S, Vh = torch.linalg.svd(Rb @ Ra.mT, full_matrices=False)
    return Qb, U, S, Vh, Qa


@torch.no_grad()
def widen(A: Tensor, B: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The same product at a higher rank: new rows of A as in a new adapter, new columns of B zero.

    A [r, K] and B [N, r] become [k, K] and [N, k]; k is at least r (ValueError). The rows are drawn
    from torch's generator, uniform within 1 / sqrt(K), as Kaiming's rule has it in PEFT.
    """
    _check_pair(A, B)
    _check_integer("k", k, A.shape[0])
    added = k - A.shape[0]
    rows = torch.empty(added, A.shape[1], dtype=A.dtype, device=A.device)
    rows.uniform_(-1 / math.sqrt(A.shape[1]), 1 / math.sqrt(A.shape[1]))
    return torch.cat((A, rows)), torch.cat((B, B.new_zeros(B.shape[0], added)), dim=1)


def allocate_ranks(
    spectra: Mapping[str, Tensor], costs: Mapping[str, int], budget: int
) -> dict[str, int]:
    """Ranks per layer that keep the most energy within one budget for all.

    Singular values are taken in the order of their squares per unit of cost; each layer keeps at
    least 1 and at most all of its own. (AdaLoRA, arXiv:2303.10512, moves a budget between layers by
    singular values during training; this is the same idea for adapters that have been trained.)

    Args:
        spectra: name -> singular values [r], descending and non-negative.
        costs: name -> what one unit of rank costs, N + K for a count of parameters.
        budget: for the sum of rank * cost.

    Raises:
        ValueError: the budget does not cover rank 1 in every layer.
    """
    left = budget - sum(costs[name] for name in spectra)
    if left < 0:
        raise ValueError(
            f"budget: rank 1 in every layer costs {budget - left}, more than the {budget} given"
        )
    ranks = dict.fromkeys(spectra, 1)
    # Equal energies, as of adapters not yet trained, go round the layers by direction.
    order = sorted(
        (-value * value / costs[name], direction, name)
        for name, values in spectra.items()
        for direction, value in enumerate(values.tolist())
        if direction > 0
    )
    full = set()
    for _, _, name in order:
        if costs[name] > left:
            full.add(name)
        if name not in full:
            ranks[name] += 1
            left -= costs[name]
    return ranks


# ------------------------------------------------------------------------------------------- checks


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _check_integer(
    name: str, value: int, low: int, high: int | None = None, reason: str = ""
) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if value < low or (high is not None and value > high):
        legal = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(
            f"{name}: expected an integer {legal}{reason and f' ({reason})'}, got {value}"
        )


def _check_matrix(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}")
    if tensor.dim() < 2 or 0 in tensor.shape[-2:]:
        raise ValueError(
            f"{name}: expected shape [..., m, n] with m, n >= 1, got {tuple(tensor.shape)}"
        )
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: expected a real floating dtype, got {tensor.dtype}")
    if tensor.layout is not torch.strided or tensor.is_meta:
        what = "the meta device" if tensor.is_meta else str(tensor.layout)
        raise ValueError(f"{name}: expected a dense tensor with values, got one of {what}")


def _largest(name: str, tensor: Tensor) -> Tensor:
    """The largest magnitude of each matrix, [..., 1, 1]; refuses values that are not finite."""
    # Both pass on a NaN. A mask of finite elements, or a norm, costs tens of times as much.
    high, low = tensor.amax((-2, -1), keepdim=True), tensor.amin((-2, -1), keepdim=True)
    largest = torch.maximum(high, -low)
    if not largest.isfinite().all():
        bad = tensor.numel() - int(tensor.isfinite().sum())
        raise ValueError(f"{name}: expected finite values, got {bad} that are inf or nan")
    return largest


def _check_pair(A: Tensor, B: Tensor) -> None:
    for name, tensor in (("A", A), ("B", B)):
        _check_matrix(name, tensor)
        if tensor.dim() != 2:
            raise ValueError(f"{name}: expected a matrix, got shape {tuple(tensor.shape)}")
    if A.shape[0] != B.shape[1]:
        raise ValueError(
            f"B: expected shape [N, r] with r = {A.shape[0]} of A {tuple(A.shape)},"
            f" got {tuple(B.shape)}"
        )
    if A.dtype != B.dtype:
        raise TypeError(f"B: expected A's dtype {A.dtype}, got {B.dtype}")
    if A.device != B.device:
        raise ValueError(f"B: expected A's device {A.device}, got {B.device}")
    for name, tensor in (("A", A), ("B", B)):
        _largest(name, tensor)
