"""The fine-tuning recipe: add adapters, train, evaluate, adjust their rank."""

from typing import Any

from torch import nn

from lora_kernels.convert import apply_lora
from lora_kernels.recipes.evaluation import evaluate_model
from lora_kernels.recipes.history import History
from lora_kernels.recipes.ranks import RankReport, RankStep, adjust_rank
from lora_kernels.recipes.training import train_model

__all__ = [
    "History",
    "RankReport",
    "RankStep",
    "add_adaptor_layer",
    "adjust_rank",
    "evaluate_model",
    "train_model",
]


def add_adaptor_layer(model: nn.Module, k: int, **options: Any) -> nn.Module:
    """Gives a model rank-k adapters in place, by `apply_lora(model, k, **options)`; returns it.

    The options, default targets (every nn.Linear but the output head) and errors are those of
    `apply_lora`, which returns a report on what it did instead.
    """
    apply_lora(model, k, **options)
    return model
