"""`adjust_rank`: another rank for every adapter, by measured loss."""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_kernels.adapters import require_layers
from lora_kernels.nn import LoRALayer
from lora_kernels.rank import allocate_ranks, refactor, spectrum, widen
from lora_kernels.recipes.batches import Criterion
from lora_kernels.recipes.evaluation import evaluate_model
from lora_kernels.recipes.history import History
from lora_kernels.recipes.stepping import needs_closure
from lora_kernels.recipes.training import train_model
from lora_kernels.recipes.undo import Undo

_SHARED = ("count", "autocast_dtype", "progress")
_REFUSED = ("checkpoint", "checkpoint_every", "resume_from", "callbacks")
_EVALUATING = ("eval_every", "metrics", "keep_best")
# A, B and the kept energy of a layer.
_New = tuple[Tensor, Tensor, float]


@dataclass
class RankStep:
    """One change of rank.

    rank: asked for; per layer it is the mean that the budget allows. ranks: of each layer.
    kept_energy: per layer, the share of the squared singular values of B A that stayed, in [0, 1].
    loss_before: at the rank before. loss_refactored: right after the change. loss: after training.
    accepted: False if the loss broke the tolerance; the step is then undone.
    """

    rank: int
    ranks: dict[str, int]
    kept_energy: dict[str, float]
    loss_before: float
    loss_refactored: float
    loss: float
    accepted: bool
    history: History


@dataclass
class RankReport:
    """What `adjust_rank` did; prints as a short text. `rank`, `ranks` and `loss` are those reached;
    `stopped` says why that is not `k_final`, where it is not."""

    k_initial: int
    k_final: int
    rank: int
    ranks: dict[str, int]
    loss_initial: float
    loss: float
    stopped: str | None = None
    steps: list[RankStep] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"rank {self.k_initial} -> {self.rank}, loss {self.loss_initial:.4f} -> "]
        lines[0] += f"{self.loss:.4f}"
        for step in self.steps:
            worst = min(step.kept_energy, key=step.kept_energy.__getitem__)
            lines.append(
                f"  rank {step.rank}: loss {step.loss_before:.4f} -> {step.loss_refactored:.4f},"
                f" trained {step.loss:.4f}; kept energy at least {step.kept_energy[worst]:.1%}"
                f" ({worst}){'' if step.accepted else '; undone'}"
            )
        return "\n".join(lines + ([self.stopped] if self.stopped else []))


def adjust_rank(
    model: nn.Module,
    k_initial: int,
    k_final: int,
    train_loader: Iterable[Any],
    criterion: Criterion,
    optimizer: torch.optim.Optimizer,
    *,
    ranks: Sequence[int] | None = None,
    tolerance: float | None = None,
    per_layer: bool = False,
    eval_loader: Iterable[Any] | None = None,
    epochs: int = 1,
    **training: Any,
) -> RankReport:
    """Moves every adapter of a model from one rank to another, training on the way.

    Going down, B A is replaced by its best approximation at the smaller rank (`rank.refactor`),
    halving the rank until `k_final`; after each step the model is trained and its loss measured.
    Going up, new directions leave the output as it is, in one step. An adapter started with PiSSA
    or OLoRA is compressed relative to the original base, which gets back what that took out.

    Each layer's `scaling`, dtype and device stay. The optimizer gets the new lora_A and lora_B in
    place of the old ones, in the same groups with the same options; their state starts anew and
    that of every other parameter stays.

    Each rank is all or nothing. Whatever stops the call, an error, an interrupt or memory running
    out, undoes the rank it was at, with the training for it: ranks, factors, scaling, optimizer and
    scheduler are those of the last rank completed, before the first one those of the call. That
    takes a copy of adapters and optimizer state.

    Args:
        model, train_loader, criterion, optimizer: as in `train_model`.
        k_initial: the rank the adapters have. With `per_layer` their mean, rounded up, weighted by
            their numbers of parameters.
        k_final: the rank to reach, at least 1.
        ranks: the ranks to go through instead, ending with k_final.
        tolerance: going down, how much the loss may grow relative to the loss at k_initial, e.g.
            0.01. A step that breaks it is undone, and the smallest rank that keeps it is sought
            between the last two (only among `ranks`, if given).
        per_layer: going down, k stands for the budget that rank k in every layer would use; layers
            share it so as to keep the most energy (`rank.allocate_ranks`).
        eval_loader: what losses are measured on by `evaluate_model`; the train_loader by default.
        epochs: of training after each step; 0 only compresses.
        training: other options of `train_model`, but for checkpoints, resuming and callbacks;
            `max_steps` counts anew in each step.

    Returns:
        `RankReport`, with ranks and kept energy per layer and the losses of each step.

    Raises:
        ValueError: no LoRA layer, a rank that is not the model's or out of range, a layer that is
            merged, or whose lora_A or lora_B is pruned, parametrized or offloaded.
        FloatingPointError: from `train_model`.
    """
    layers = dict(require_layers(model))
    path = _check(layers, _Way(k_initial, k_final, ranks, tolerance, per_layer), epochs, training)
    if hasattr(optimizer, "param_groups") and needs_closure(optimizer):
        raise TypeError(
            f"optimizer: {type(optimizer).__name__} holds all parameters in one flat state, which"
            " no other rank fits; adjust the rank with another optimizer"
        )
    if any(name in training for name in _EVALUATING):
        training = training | {"eval_loader": eval_loader}
    # Checks the other arguments and moves the model, before any rank has changed.
    quiet = training | {"progress": False}
    train_model(model, train_loader, criterion, optimizer, epochs=0, **quiet)
    shared = {name: training[name] for name in _SHARED if name in training}
    loader = train_loader if eval_loader is None else eval_loader

    def measure() -> float:
        return evaluate_model(model, loader, criterion, **shared)["loss"]

    loss = measure()
    report = RankReport(k_initial, k_final, k_initial, _ranks(layers), loss, loss)
    limit = math.inf if tolerance is None else loss + tolerance * abs(loss)
    # The smallest rank that no loss has ruled out.
    goal = k_final
    while (k := _next_rank(path, report.rank, goal, k_final)) is not None:
        down = k < report.rank
        weights = [layer.weight for layer in layers.values() if down and layer.pissa_A is not None]
        with Undo(model, optimizer, training.get("scheduler"), weights) as undo:
            new = _compress(layers, k, per_layer) if down else _widen(layers, k)
            _apply(layers, new, optimizer, original_base=down)
            refactored = measure()
            history = train_model(
                model, train_loader, criterion, optimizer, epochs=epochs, **training
            )
            loss = measure() if len(history) else refactored
            accepted = tolerance is None or loss <= limit
            energy = {name: kept for name, (_, _, kept) in new.items()}
            report.steps.append(
                RankStep(
                    k, _ranks(layers), energy, report.loss, refactored, loss, accepted, history
                )
            )
            if accepted:
                report.rank, report.ranks, report.loss = k, _ranks(layers), loss
            else:
                undo()
                goal = k + 1
    if goal > k_final:
        broke = next(step for step in reversed(report.steps) if not step.accepted)
        report.stopped = (
            f"stopped at rank {report.rank}: rank {broke.rank} gave a loss of {broke.loss:.6g},"
            f" above the {limit:.6g} that a tolerance of {tolerance:g} over"
            f" {report.loss_initial:.6g} at rank {k_initial} allows"
        )
    return report


def _next_rank(path: list[int] | None, current: int, goal: int, k_final: int) -> int | None:
    """The rank to try next: half the current one, or halfway to the smallest not ruled out."""
    ruled_out = goal > k_final
    if path is not None:
        return path.pop(0) if path and not ruled_out else None
    if current <= goal:
        return None
    return max(goal, (current + goal) // 2 if ruled_out else current // 2)


def _ranks(layers: dict[str, LoRALayer]) -> dict[str, int]:
    return {name: layer.rank for name, layer in layers.items()}


def _widen(layers: dict[str, LoRALayer], k: int) -> dict[str, _New]:
    return {n: (*widen(layer.lora_A, layer.lora_B, k), 1.0) for n, layer in layers.items()}


def _compress(layers: dict[str, LoRALayer], k: int, per_layer: bool) -> dict[str, _New]:
    """All are made before the first layer changes: an error leaves the model as it was."""
    ranks = _share(layers, k) if per_layer else dict.fromkeys(layers, k)
    new = {}
    for name, layer in layers.items():
        A, B, _, energy = refactor(*layer.delta_factors(), ranks[name])
        new[name] = A, B, energy
    return new


def _apply(
    layers: dict[str, LoRALayer],
    new: dict[str, _New],
    optimizer: torch.optim.Optimizer,
    original_base: bool,
) -> None:
    """Gives layers and optimizer their new factors; layers that keep their rank stay alone."""
    exchanged: dict[nn.Parameter, nn.Parameter] = {}
    for name, layer in layers.items():
        old = layer.lora_A, layer.lora_B
        if original_base:
            layer.to_original_base()
        A, B, _ = new[name]
        if layer.lora_A is old[0] and len(A) == layer.rank:
            continue
        layer.set_factors(A, B)
        exchanged.update(zip(old, (layer.lora_A, layer.lora_B), strict=True))
    exchange_parameters(optimizer, exchanged)


def _costs(layers: dict[str, LoRALayer]) -> dict[str, int]:
    """Parameters of one unit of rank."""
    return {name: layer.in_features + layer.out_features for name, layer in layers.items()}


def _share(layers: dict[str, LoRALayer], k: int) -> dict[str, int]:
    costs = _costs(layers)
    spectra = {
        name: abs(layer.scaling) * spectrum(*layer.delta_factors())
        for name, layer in layers.items()
    }
    return allocate_ranks(spectra, costs, k * sum(costs.values()))


def exchange_parameters(
    optimizer: torch.optim.Optimizer, new: dict[nn.Parameter, nn.Parameter]
) -> None:
    """Puts new parameters where an optimizer holds old ones; the state of those is dropped.

    An old second moment means nothing after re-factoring, and a step count kept over zeroed moments
    would make the first steps many times too large. Groups and their options stay the same objects,
    so that schedulers go on.
    """
    for group in optimizer.param_groups:
        group["params"][:] = [new.get(parameter, parameter) for parameter in group["params"]]
    for parameter in new:
        optimizer.state.pop(parameter, None)


# ------------------------------------------------------------------------------------------- checks


class _Way(NamedTuple):
    """From which rank to which, through which, and what a step may cost."""

    k_initial: int
    k_final: int
    ranks: Sequence[int] | None
    tolerance: float | None
    per_layer: bool


def _check(
    layers: dict[str, LoRALayer], way: _Way, epochs: int, training: dict[str, Any]
) -> list[int] | None:
    """The ranks to go through; None where they are to be halved."""
    k_initial, k_final, ranks, tolerance, per_layer = way
    for name, k in (("k_initial", k_initial), ("k_final", k_final)):
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ValueError(f"{name}: expected an integer of at least 1, got {k!r}")
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 0:
        raise ValueError(f"epochs: expected an integer of at least 0, got {epochs!r}")
    for name, layer in layers.items():
        if (reason := layer.why_fixed() or layer.why_not_two()) is not None:
            raise ValueError(f"model: {name}: {reason}")
    present = _ranks(layers)
    if per_layer:
        costs = _costs(layers)
        mean = sum(present[name] * costs[name] for name in layers) / sum(costs.values())
        if math.ceil(mean) != k_initial:
            raise ValueError(f"k_initial: the layers' mean rank is {mean:.2f}, got {k_initial}")
    elif wrong := [name for name in layers if present[name] != k_initial]:
        raise ValueError(
            f"k_initial: {wrong[0]} has rank {present[wrong[0]]}, got {k_initial}"
            f" ({len(wrong)} of {len(layers)} layers differ)"
        )
    if refused := [name for name in _REFUSED if name in training]:
        what = "takes none" if refused[0] == "callbacks" else "writes and reads no checkpoints"
        raise TypeError(f"{refused[0]}: adjust_rank {what}, as it trains once for each rank")
    if k_final > k_initial:
        for name, given in (("tolerance", tolerance is not None), ("per_layer", per_layer)):
            if given:
                raise ValueError(f"{name}: is for going down, got {k_initial} -> {k_final}")
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance: expected a finite number of at least 0, got {tolerance}")
    if ranks is None:
        return [k_final] if k_final > k_initial else None
    path = [k_initial, *ranks]
    sign = 1 if k_final > k_initial else -1
    if path[-1] != k_final or any(sign * (b - a) <= 0 for a, b in itertools.pairwise(path)):
        raise ValueError(
            f"ranks: expected ranks that lead from {k_initial} to {k_final}, got {list(ranks)}"
        )
    return path[1:]
