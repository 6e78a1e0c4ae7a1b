"""Whether merging leaves the output as it is, which it does unless code reads past a layer."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels import targets
from lora_kernels.check.found import Adapter
from lora_kernels.check.runs import floating
from lora_kernels.check.training import UNCALLED

# How many layers are merged for one comparison, and how much weight, of which a copy is kept.
_GROUP, _GROUP_BYTES = 32, 1 << 30
_SMALL = 0.05  # a relative distance of outputs that rounding might explain


@torch.no_grad()
def check_merging(
    model: nn.Module, adapters: list[Adapter], run: Callable[..., Any], past: dict[nn.Module, str]
) -> None:
    """Merging must not move the output; where some code reads the weight past the layer it does."""
    owners = targets.owners(model)
    layers: dict[nn.Module, list[Adapter]] = {}
    for adapter in adapters:
        weight = getattr(adapter.base, "weight", None)
        tied = isinstance(weight, Tensor) and len(owners.get(weight, ())) > 1
        if adapter.off is None and adapter.merge is not None and adapter.scaling and not tied:
            layers.setdefault(adapter.layer, []).append(adapter)
    group: list[list[Adapter]] = []
    for layer in layers.values():
        weight = layer[0].weight
        held = sum(one[0].weight.numel() for one in group) + weight.numel()
        if group and (len(group) == _GROUP or held * weight.element_size() > _GROUP_BYTES):
            _find_moved(adapters, group, run, past)
            group = []
        group.append(layer)
    if group:
        _find_moved(adapters, group, run, past)


def _find_moved(
    adapters: list[Adapter],
    layers: list[list[Adapter]],
    run: Callable[..., Any],
    past: dict[nn.Module, str],
) -> None:
    """Halves the layers down to those whose merging moves the output."""
    same = _merges(adapters, layers, run)
    if same is False and len(layers) > 1:
        half = len(layers) // 2
        _find_moved(adapters, layers[:half], run, past)
        _find_moved(adapters, layers[half:], run, past)
        return
    for adapter in (one for layer in layers for one in layer):
        adapter.state.merges = same
        problem = adapter.state.problem
        if same is False and problem in (None, UNCALLED):
            adapter.state.problem = (
                f"{'acts, but' if problem is None else 'was never called, and'} merging it changes"
                " the output: "
                + past.get(adapter.layer, "in eval mode some code reads its weight past the layer")
                + "; exclude it (exclude_modules)"
            )


def _merges(
    adapters: list[Adapter], layers: list[list[Adapter]], run: Callable[..., Any]
) -> bool | None:
    """Whether merging these layers leaves the output as it is; None where two outputs of the same
    computation cannot be compared."""
    chosen = [adapter for layer in layers for adapter in layer]
    parameters = [p for a in chosen for p in (*a.A, *a.B, *a.base.parameters(recurse=False))]
    kept = [(p, p.data, p.detach().clone()) for p in dict.fromkeys(parameters)]

    def merge() -> None:
        for layer in layers:
            merge_all = layer[0].merge
            assert merge_all is not None  # of layers that are compared
            merge_all()

    eps = max(torch.finfo(a.weight.dtype).eps for a in chosen)
    kind = chosen[0].weight.device.type
    if torch.is_autocast_enabled(kind):
        eps = max(eps, torch.finfo(torch.get_autocast_dtype(kind)).eps)

    def round_weights() -> None:
        generator = torch.Generator().manual_seed(0)
        for weight in dict.fromkeys(a.weight for a in chosen):
            noise = torch.randn(weight.shape, generator=generator).to(weight)
            weight.mul_(noise.mul_(eps).add_(1))

    def outputs(change: Callable[..., Any] | None) -> list[Tensor]:
        output = run(adapters, evaluate=True, change=change)
        return [t.detach().to(torch.float64, copy=True) for t in floating(output)]

    def restore() -> None:
        for parameter, data, value in kept:
            parameter.data = data
            parameter.copy_(value)
        for layer in layers:
            getattr(layer[0].layer, "merged_adapters", []).clear()

    def enlarge() -> None:
        for adapter in chosen:
            _enlarge(adapter)

    try:
        enlarge()
        apart = outputs(None)
        merged = outputs(merge)
        if not apart or [t.shape for t in apart] != [t.shape for t in merged]:
            return None
        # Each merged weight is rounded once, independently of the others; the products around it
        # too.
        bound, moved = 8 * eps * math.sqrt(len(layers)), _distance(apart, merged)
        if bound < moved < _SMALL:  # a bypass, or a model that magnifies rounding
            restore()
            enlarge()
            rounded = outputs(round_weights)
            if [t.shape for t in apart] == [t.shape for t in rounded]:
                bound = 4 * _distance(apart, rounded)
        return moved <= bound
    finally:
        restore()


def _enlarge(adapter: Adapter) -> None:
    """An adapter as large as the weight: a zero one, or a small one, would merge unseen."""
    weight, (A,), (B,) = adapter.weight, adapter.A, adapter.B
    size = abs(adapter.scaling) * float(A.float().norm()) * B.shape[0] ** 0.5
    std = float(weight.float().norm()) / size if size else 0.0
    if 0 < std < float("inf"):
        generator = torch.Generator().manual_seed(0)
        B.copy_(torch.randn(B.shape, generator=generator) * std)


def _distance(one: list[Tensor], other: list[Tensor]) -> float:
    """The largest over tensors of the median over rows of the relative distance: a router that
    sends a few tokens elsewhere does not count."""
    largest = 0.0
    for a, b in zip(one, other, strict=True):
        if a.numel() == 0:
            continue
        a, b = (t.reshape(-1, t.shape[-1] if t.dim() > 1 else t.numel()) for t in (a, b))
        both = a.isfinite() & b.isfinite()
        a, b = a.masked_fill(~both, 0), b.masked_fill(~both, 0)
        size = a.norm(dim=1).clamp_min(1e-30 + float(a.norm()) / len(a) ** 0.5 * 1e-3)
        largest = max(largest, float(((a - b).norm(dim=1) / size).median()))
    return largest
