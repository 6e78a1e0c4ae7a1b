"""`check_adapters`: whether every adapter of a model acts, trains and merges."""

import sys
from functools import partial
from typing import Any

import torch
from torch import nn

from lora_kernels.bypass import bypassed, fast_paths
from lora_kernels.check.found import find_adapters, nonzero
from lora_kernels.check.merging import check_merging
from lora_kernels.check.report import AdapterReport, AdapterState, folded
from lora_kernels.check.runs import run, unchanged
from lora_kernels.check.training import BOTH_ZERO, check_training, name_uncalled
from lora_kernels.sharding import is_sharded

__all__ = ["AdapterReport", "AdapterState", "check_adapters", "first_step_problems", "folded"]


def check_adapters(model: nn.Module, *inputs: Any, **kwargs: Any) -> AdapterReport:
    """Runs a batch forward and backward and tells of every adapter whether it acts.

    Of every adapter: was its layer called, is its gradient there, finite and not zero (where B is
    zero, A has none to get), and does merging it leave the output as it is, so that no code reads
    the weight past the layer. The loss is the output's `loss` if it has one, otherwise a fixed
    random projection of its floating tensors. The backward runs in the mode that the model is in:
    call `model.train()` first to see it with activation checkpointing; merging is compared in eval
    mode, on adapters enlarged for the moment, to 8 eps of the dtype times the root of the number of
    layers merged, or to what rounding the weights does where the model magnifies that (tied
    weights, quantised bases and PEFT's variants are left out).

    The model is bit-identical afterwards, buffers included; `.grad`, modes and random states are
    what they were, also after an error. Beside one forward and backward it costs two
    forwards for every 32 layers, or GiB of weights, of which a copy is held meanwhile.

    Args:
        model: with layers of this library or of PEFT, fused by `fuse_peft` or not.
        inputs, kwargs: one batch, as the model's forward takes it.

    Raises:
        ValueError: the model has no adapter, is sharded or on the meta device, or gives no floating
            tensor.
        Whatever the model's forward or backward raises.
    """
    adapters = list(find_adapters(model))
    if not adapters:
        raise ValueError(
            f"model: {type(model).__name__} has no LoRA layer; call apply_lora or PEFT's"
            " get_peft_model first"
        )
    _require_here(model)
    with (
        torch.inference_mode(False),
        unchanged(model, inputs, kwargs) as rewind,
        torch.compiler.set_stance("force_eager"),
    ):
        run_once = partial(run, model, inputs, kwargs, rewind)
        check_training(adapters, run_once)
        past = {**fast_paths(model), **bypassed(model)}
        name_uncalled(adapters, past)
        check_merging(model, adapters, run_once, past)
    return AdapterReport([adapter.state for adapter in adapters])


def first_step_problems(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """After a backward: the adapters that are to train and will not, with the likely reason.

    It looks at gradients only, so it costs nothing; `check_adapters` finds out more.
    """
    held = {p for group in optimizer.param_groups for p in group["params"]}
    found, past = {}, None
    for adapter in find_adapters(model):
        trained = [p for p in (*adapter.A, *adapter.B) if p.requires_grad]
        if not trained or adapter.off is not None:
            continue
        if held.isdisjoint(trained):
            found[adapter.state.name] = (
                "is not in the optimizer; make it over lora_parameters(model)"
            )
        elif any(p.grad is None for p in trained):
            past = bypassed(model) if past is None else past
            reason = past.get(adapter.layer) or past.get(adapter.base)
            found[adapter.state.name] = f"got no gradient: {reason or _NO_GRADIENT}"
        elif held.isdisjoint(p for p in adapter.B if p.requires_grad) and not nonzero(adapter.B):
            found[adapter.state.name] = (
                "lora_B is zero and is not trained, so the adapter stays without effect; give the"
                " optimizer lora_parameters(model)"
            )
        elif not nonzero(adapter.B) and not nonzero(adapter.A):
            found[adapter.state.name] = BOTH_ZERO
    return found


_NO_GRADIENT = (
    "no rows in this step (an expert, a dropped layer), or the loss does not depend on its output"
)


def _require_here(model: nn.Module) -> None:
    distributed = sys.modules.get("torch.distributed.fsdp")
    kinds = [getattr(distributed, n, ()) for n in ("FSDPModule", "FullyShardedDataParallel")]
    managed = any(isinstance(m, kind) for kind in kinds for m in model.modules())
    for name, parameter in model.named_parameters():
        if managed or is_sharded(parameter) or hasattr(parameter, "ds_id"):
            raise ValueError(
                f"model: {name} is sharded; check the model before it is sharded (fully_shard,"
                " parallelize_module)"
            )
        if parameter.is_meta:
            raise ValueError(
                f"model: {name} is on the meta device (offloaded?), it has no values to compute"
                " with; load the model whole for the check"
            )
