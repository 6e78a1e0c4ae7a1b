"""Which layers of others can carry an adapter, and why not."""

from collections.abc import Container, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lora_kernels.sharding import is_sharded
from lora_kernels.weights import QuantizedTensor

if TYPE_CHECKING:
    from transformers.pytorch_utils import Conv1D
    from typing_extensions import TypeIs

    Linear = nn.Linear | Conv1D | nn.Embedding

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d

# What a base may hold; beside the first two adapters are fp32 by default, or most steps round away.
HALVES = (torch.float16, torch.bfloat16)
_DTYPES = (*HALVES, torch.float32, torch.float64)
_KINDS = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
    "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)  # fmt: skip


def is_conv1d(module: nn.Module) -> "TypeIs[Conv1D]":
    """Whether it is Transformers' Conv1D, a linear layer whose weight is [in, out]."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")


def is_convolution(module: nn.Module) -> "TypeIs[Convolution]":
    """Whether it is one of torch's convolutions, none that is transposed; with an adapter or
    without."""
    return isinstance(module, Convolution)


def features(module: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of a linear layer or a convolution, with an adapter or
    without."""
    linear: Any = module  # of several classes that have nothing in common but these
    if is_convolution(module):
        return module.in_channels, module.out_channels
    if is_conv1d(module):
        return linear.nx, linear.nf
    if isinstance(module, nn.Embedding):
        return linear.num_embeddings, linear.embedding_dim
    return linear.in_features, linear.out_features


def stores(
    module: nn.Module,
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Where a module's attributes live."""
    return module._parameters, module._buffers, module._modules, module.__dict__


def objection(module: nn.Module, reserved: Container[str]) -> str | None:
    """Why a module cannot carry an adapter, whose layer needs the `reserved` names; None if it
    can."""
    if not isinstance(module, _KINDS) and not is_conv1d(module):
        return f"{type(module).__name__} is not a torch.nn.Linear"
    known = type(module) in _KINDS or is_conv1d(module)
    if not known and not is_parametrized(module):
        plain = next(kind.__name__ for kind in _KINDS if isinstance(module, kind))
        return f"{type(module).__name__} is a subclass of nn.{plain} with behaviour of its own"
    if isinstance(module, nn.Embedding) and (reason := embedding_objection(module)) is not None:
        return reason
    if (reason := refusal(module, reserved)) is not None:
        return reason
    shape = list(module.weight.shape)
    return f"its weight is empty, {shape}" if 0 in shape else None


def names_of(module: nn.Module) -> tuple[str, ...]:
    """The parameters that a layer of its kind has."""
    return ("weight",) if isinstance(module, nn.Embedding) else ("weight", "bias")


def embedding_objection(embedding: nn.Embedding) -> str | None:
    """Why the table of an embedding is more than a frozen weight; None if it is that."""
    for option in ("max_norm", "scale_grad_by_freq", "sparse"):
        if getattr(embedding, option):
            value = getattr(embedding, option)
            return f"has {option}={value}, with which an adapter's rows would not be its base's"
    return None


def refusal(linear: "Linear | Convolution", reserved: Container[str]) -> str | None:
    """Why a layer cannot be replaced without changing what it does; None if it can."""
    if is_parametrized(linear):
        names = (n for n, _ in linear.get_submodule("parametrizations").named_children())
        return f"has parametrizations on {', '.join(names)}; remove them first"
    if (reason := computed(linear, names_of(linear))) is not None:
        return reason
    weight = linear.weight
    if is_sharded(weight):
        return (
            f"its weight is sharded already, {weight.placements}; give it an adapter before"
            " parallelize_module or fully_shard"
        )
    if (odd := odd_type(weight, quantised=not is_convolution(linear))) is not None:
        return f"its weight is {odd}"
    K, N = features(linear)
    expected: tuple[int, ...] = (N, K) if isinstance(linear, nn.Linear) else (K, N)
    if is_convolution(linear):
        expected = (N, K // linear.groups, *linear.kernel_size)
    if weight.shape != expected:
        return f"its weight has shape {tuple(weight.shape)}, expected {expected} of its features"
    if (reason := foreign_forward(linear)) is not None:
        return reason
    taken = sorted({name for store in stores(linear) for name in store if name in reserved})
    if taken:
        return f"has attributes that a layer with an adapter needs: {', '.join(taken)}; rename them"
    return None


def hooked(linear: nn.Module) -> str | None:
    """Why a second layer cannot share what a linear layer does; None if it can."""
    hooks = [name for name in _HOOKS if getattr(linear, name, None)]
    if not hooks:
        return None
    return (
        f"carries hooks ({', '.join(hooks)}), which stay with it; remove them first, or let"
        " apply_lora give the layer itself an adapter"
    )


def foreign_forward(layer: nn.Module) -> str | None:
    """Why the forward of a layer's class is not what is called; None if it is."""
    if hasattr(layer, "_hf_hook"):
        return (
            "carries a hook of accelerate (_hf_hook), bound to the layer's forward; call"
            " accelerate.hooks.remove_hook_from_module(model, recurse=True) first"
        )
    if "forward" in vars(layer):
        return "has its forward overridden on the instance; remove that first"
    return None


def sources(module: nn.Module, name: str) -> list[str]:
    """The parameter of this name, or those it is computed from."""
    if name in module._parameters:
        return [name]
    starts = (f"{name}_", f"parametrizations.{name}.")
    return [key for key, _ in module.named_parameters() if key.startswith(starts)]


def computed(module: nn.Module, names: Iterable[str]) -> str | None:
    """Which of these tensors of a layer something makes anew for every forward, so that a change
    of it is lost; None if none is."""
    for name in names:
        if name in module._parameters or name in module._buffers:
            continue
        found = sources(module, name)
        if not found:
            return f"its {name} is no parameter"
        return (
            f"its {name} is computed from {', '.join(found)} (pruning, weight norm or another"
            " parametrization); make it a parameter again first, with torch.nn.utils.prune.remove,"
            " remove_weight_norm, parametrize.remove_parametrizations"
        )
    return None


def odd_type(tensor: Tensor, quantised: bool = False) -> str | None:
    """What a weight is that no adapter's kernel can read; None for ordinary tensors, and quantised
    ones where those are asked for, which are read but not changed."""
    kind = type(tensor)
    if isinstance(tensor, QuantizedTensor):
        return None if quantised else f"quantised ({tensor.record.kind})"
    decides = kind.__torch_dispatch__ is not Tensor.__torch_dispatch__
    if decides and not is_sharded(tensor) and not kind.__module__.startswith("torch._subclasses"):
        return (
            f"of type {kind.__name__}, a tensor subclass that decides itself what operations do, as"
            " torchao's quantised ones; dequantise it, or use PEFT's adapter and fuse_peft, which"
            " leave the base's own forward in place"
        )
    if tensor.dtype not in _DTYPES:
        legal = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        return f"{tensor.dtype}; an adapter stands beside a weight of {legal}"
    return None
