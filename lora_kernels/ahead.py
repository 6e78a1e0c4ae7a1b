"""`warmup`: kernels compiled and loaded before the first real call needs them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lora_kernels import backends
from lora_kernels.functional import lora_linear
from lora_kernels.nn import LoRALayer
from lora_kernels.weights import QuantizedTensor


def warmup(model: nn.Module, rows: int | Iterable[int], *, backward: bool = True) -> int:
    """Compile and load the kernels of a model's LoRA layers, before a request, a timed step or the
    capture of a CUDA graph waits for them.

    Every distinct layer computes once on zeros for each number of rows: as in inference, and with
    `backward` also forward and backward as in training. Parameters, their gradients and torch's
    generators stay as they are. Call it under the autocast that the model will run under.

    Args:
        model: a `FusedLoRALinear` or a model that has LoRA layers; merged layers are passed over.
        rows: the number, or numbers, of rows of x (batch x tokens) to expect. Kernels depend on it
            by a few size classes only, the choice of plan by the buckets of the GPU's tuned table.
        backward: False for a model that only infers.

    Returns:
        How many calls were made. 0 where nothing is ever compiled: CPU, a GPU without a tuned
        table, the reference backend; the call costs nothing there.

    Raises:
        TypeError: rows are not integers.
        ValueError: rows below 1, or no LoRA layer in the model.
    """
    counts = [rows] if isinstance(rows, int) else list(rows)
    for count in counts:
        if type(count) is not int:
            raise TypeError(f"rows: expected integers, got {type(count).__name__}")
        if count < 1:
            raise ValueError(f"rows: expected numbers >= 1, got {count}")
    layers = [module for module in model.modules() if isinstance(module, LoRALayer)]
    if not layers:
        raise ValueError(f"model: {type(model).__name__} has no LoRA layer")
    # A quantised weight has no plan that is compiled.
    linear = [
        layer
        for layer in layers
        if layer.weight.dim() == 2
        and not isinstance(layer.weight, QuantizedTensor)
        and not isinstance(layer, nn.Embedding)
    ]
    distinct = {_signature(layer): layer for layer in linear if not layer.merged}
    calls = 0
    for layer in distinct.values():
        if backends.choose(layer.weight.device).name == "cuda":
            for count in counts:
                calls += _call(layer, count, backward)
    return calls


def _signature(layer: LoRALayer) -> tuple[Any, ...]:
    """What kernels depend on."""
    weight, bias = layer.matrix, layer.bias is not None
    tensors = [
        (tensor.device, tensor.dtype, tuple(tensor.shape), tensor.stride())
        for tensor in (weight, layer.lora_A, layer.lora_B)
    ]
    return (*tensors, bias, layer.dropout > 0)


def _call(layer: LoRALayer, rows: int, backward: bool) -> int:
    """One call for inference and one for training; returns their number."""
    bias = None if layer.bias is None else layer.bias.detach()
    x = layer.weight.new_zeros(rows, layer.in_features)
    weight, a, b = (t.detach() for t in (layer.matrix, layer.lora_A, layer.lora_B))
    with torch.no_grad():
        y = lora_linear(x, weight, a, b, bias, scaling=layer.scaling)
    if not backward:
        return 1
    leaves = [t.requires_grad_() for t in (x, a, b)]
    with torch.enable_grad():
        y = lora_linear(
            x, weight, a, b, bias, scaling=layer.scaling, dropout_p=layer.dropout, seed=0
        )
        torch.autograd.grad(y, leaves, torch.zeros_like(y))
    return 2
