"""`evaluate_model`: losses and metrics over a loader."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.progress import progress_bar
from lora_kernels.recipes import batches
from lora_kernels.recipes.batches import Count, Criterion

Metric = Callable[[Any, Any], float | Tensor]


@torch.no_grad()
def evaluate_model(
    model: nn.Module,
    test_loader: Iterable[Any],
    criterion: Criterion,
    *,
    metrics: Mapping[str, Metric] | None = None,
    count: Count = None,
    device: torch.device | str | None = None,
    autocast_dtype: torch.dtype | None = None,
    progress: bool | None = None,
) -> dict[str, float]:
    """The mean loss over a loader, and other metrics: `{'loss': ..., name: ...}`.

    Every number is the mean over samples: a batch's value counts for as many samples as it holds,
    so a smaller last batch does not weigh more. No gradients; every module's train/eval mode is
    afterwards what it was.

    Args:
        model, criterion, device, autocast_dtype, progress: as in `train_model`.
        test_loader: any iterable of batches, as in `train_model`.
        metrics: name -> callable (prediction, targets) -> number, a mean over the batch.
        count: batch -> what it counts for, its first dimension by default. For a mean over tokens:
            `lambda batch: int((batch["labels"][:, 1:] != -100).sum())`.

    Raises:
        ValueError: an empty loader, or one whose batches count for nothing; no scalar loss.
        TypeError: a batch of another form.
    """
    batches.check_arguments(model, criterion, autocast_dtype)
    metrics = check_metrics(metrics)
    device = batches.place(model, device)
    values: dict[str, list[Tensor]] = {name: [] for name in ("loss", *metrics)}
    weights = []
    bar = progress_bar(progress, batches.length(test_loader), "evaluate")
    with batches.mode(model, training=False), bar:
        for batch in test_loader:
            batch = batches.to_device(batch, device)
            with batches.autocast(device, autocast_dtype):
                loss, prediction, targets = batches.forward_loss(model, batch, criterion)
                values["loss"].append(loss)
                for name, metric in metrics.items():
                    values[name].append(_scalar(name, metric(prediction, targets)))
            weights.append(batches.weigh(batch, count))
            bar.update()
    total = sum(weights)
    if not total > 0:
        raise ValueError(
            "test_loader: gave no batch" if not weights else "count: all batches count for nothing"
        )
    # A batch that counts for nothing may have no loss: a mean over no tokens is nan.
    return {
        name: sum(w * float(v) for w, v in zip(weights, of_name, strict=True) if w) / total
        for name, of_name in values.items()
    }


def check_metrics(metrics: Mapping[str, Metric] | None) -> dict[str, Metric]:
    metrics = dict(metrics or {})
    if "loss" in metrics:
        raise ValueError("metrics: 'loss' is the criterion's own name, choose another")
    if "step" in metrics:
        raise ValueError("metrics: 'step' is what History calls the step, choose another")
    return metrics


def _scalar(name: str, value: float | Tensor) -> Tensor:
    value = torch.as_tensor(value, dtype=torch.float32 if isinstance(value, bool) else None)
    if value.numel() != 1:
        raise ValueError(f"metrics: {name!r} gave shape {tuple(value.shape)}, expected one number")
    return value.detach()
