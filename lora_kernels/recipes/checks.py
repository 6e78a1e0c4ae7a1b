"""What `train_model` refuses of its arguments."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lora_kernels.adapters import lora_layers, require_loaded
from lora_kernels.recipes import batches, resume
from lora_kernels.recipes.callbacks import Callback
from lora_kernels.recipes.evaluation import Metric, check_metrics
from lora_kernels.sharding import is_sharded, whole


def check_numbers(
    epochs: int,
    max_steps: int | None,
    accumulation_steps: int,
    max_grad_norm: float | None,
    checkpoint_every: int | None,
    eval_every: int | None,
) -> None:
    for name, value, low in (
        ("epochs", epochs, 0),
        ("max_steps", max_steps, 1),
        ("accumulation_steps", accumulation_steps, 1),
        ("checkpoint_every", checkpoint_every, 1),
        ("eval_every", eval_every, 1),
    ):
        if value is None and name in ("max_steps", "checkpoint_every", "eval_every"):
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ValueError(f"{name}: expected an integer of at least {low}, got {value!r}")
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm: expected a positive number or None, got {max_grad_norm}")


def measured_names(
    eval_loader: Iterable[Any] | None, eval_every: int | None, metrics: Mapping[str, Metric] | None
) -> tuple[str, ...]:
    """The names of what evaluations give."""
    if eval_loader is None:
        for name, value in (("eval_every", eval_every), ("metrics", metrics)):
            if value is not None:
                raise ValueError(f"{name}: needs eval_loader, the batches to evaluate on")
        return ()
    if isinstance(eval_loader, Iterator):
        raise ValueError(
            f"eval_loader: a {type(eval_loader).__name__} is used up by the first evaluation; give"
            " a list or a DataLoader"
        )
    if batches.length(eval_loader) == 0:
        raise ValueError("eval_loader: has no batch")
    return ("loss", *check_metrics(metrics))


def check_callbacks(callbacks: Sequence[Callback], run: resume.Run) -> None:
    for index, callback in enumerate(callbacks):
        if not isinstance(callback, Callback):
            what = callback.__name__ if isinstance(callback, type) else type(callback).__name__
            raise TypeError(
                f"callbacks: expected objects of lora_kernels.recipes.callbacks.Callback, got"
                f" {what} at {index}"
            )
        callback.check(run)


def require_whole_for_files(model: nn.Module, **paths: str | os.PathLike[str] | None) -> None:
    for name, path in paths.items():
        if path is not None and any(map(is_sharded, model.parameters())):
            raise ValueError(
                f"{name}: the model is sharded, its parts belong in torch.distributed.checkpoint;"
                " see examples/finetune_distributed.py"
            )


def check_trainable(
    model: nn.Module, optimizer: torch.optim.Optimizer, autocast_dtype: torch.dtype | None
) -> None:
    require_loaded(model)
    for name, layer in lora_layers(model):
        if layer.merged or layer._disabled:
            what = "merged; unmerge_lora(model) first" if layer.merged else "disabled"
            raise ValueError(f"model: {name} is {what}")
    trained = {p: name for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise ValueError(
            "model: no parameter requires a gradient; call add_adaptor_layer(model, k) first"
        )
    if not hasattr(optimizer, "param_groups"):
        raise TypeError(f"optimizer: expected a torch optimizer, got {type(optimizer).__name__}")
    held = {p for group in optimizer.param_groups for p in group["params"]}
    if not held & trained.keys():
        raise ValueError(
            "optimizer: holds none of the parameters to train; make it after the adapters, over"
            " lora_parameters(model)"
        )
    for parameter in held & trained.keys():
        if not whole(parameter.isfinite().all()):
            raise ValueError(f"model: {trained[parameter]} holds values that are inf or nan")
    if autocast_dtype == torch.float16:
        for parameter, name in trained.items():
            if parameter.dtype == torch.float16:
                raise TypeError(
                    f"autocast_dtype: torch.float16 scales losses, which needs fp32 gradients, but"
                    f" {name} is fp16; add adapters with adapter_dtype=torch.float32"
                )
