"""The directions in which rows vary most, found batch by batch."""

import math

import torch
from torch import Tensor

_TINY = torch.finfo(torch.float32).tiny


class Directions:
    """The leading right singular vectors of all rows seen, less their mean, of one layer (Ross et
    al., 2008: the vectors so far, times their singular values, stand for the rows before)."""

    def __init__(self, count: int, tau: float) -> None:
        self.count, self.tau = count, tau
        self.rows = 0
        self.settled = torch.zeros(count, dtype=torch.bool)

    def explained(self, rank: int) -> float:
        return float(self.ratios[:rank].sum())

    def directions(self, rank: int, whiten: bool) -> Tensor:
        A = self.vectors[:rank]
        return A / self.values[:rank].sqrt()[:, None] if whiten else A

    def add(self, X: Tensor) -> None:
        """X [rows, K] of at least `count` rows."""
        X, first, rows = X.float(), self.rows == 0, len(X)
        total = self.rows + rows
        sums = X.sum(0, dtype=torch.float64)
        deviations = X - sums / rows
        squares = deviations.square().sum(dtype=torch.float64)
        squares -= deviations.sum(0).square().sum() / rows
        if first:
            self.mean, self.squares = sums / total, squares
            stacked = (X - self.mean).float()
        else:
            mean = X.mean(0)
            apart = self.mean - mean
            weight = self.rows / total * rows
            self.squares += squares + weight * (self.mean - sums / rows).square().sum()
            known = self.values[:, None] * self.vectors
            stacked = torch.cat((known, X - mean, math.sqrt(weight) * apart[None]))
            self.mean = (self.mean * self.rows + sums) / total
        before = None if first else self.vectors
        self._decompose(stacked)
        self.ratios, self.rows = self.values.square() / self.squares.clamp_min(_TINY), total
        if before is not None:
            self.settled = (
                torch.nn.functional.cosine_similarity(self.vectors, before) >= self.tau
            ).cpu()

    def _decompose(self, X: Tensor) -> None:
        devices = [X.device] if X.is_cuda else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(42)  # PEFT's
            _, S, V = torch.svd_lowrank(X, q=min(2 * self.count, *X.shape), niter=4)
        V = V.t()
        largest = V.gather(1, V.abs().argmax(1, keepdim=True))
        self.values, self.vectors = S[: self.count], (V * largest.sign())[: self.count]
