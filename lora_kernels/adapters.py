"""The adapters of a whole model: its LoRA layers and the modules trained in full beside them.

A module trained in full (`modules_to_save`) keeps the originals of its parameters and of its
persistent buffers (running statistics) in non-persistent buffers `_lora_base_<name>`; that a tensor
has one is what marks it as part of the adapter. Within `disable_adapters` the two have changed
places, and the module's `_lora_swapped` names it.
"""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_kernels.bypass import update_fast_paths
from lora_kernels.layer import LoRALayer

_BASE = "_lora_base_"
_SWAPPED = "_lora_swapped"


class Saved(NamedTuple):
    """A parameter, or a buffer, of a module trained in full, and where its original lies."""

    name: str
    module: nn.Module
    attribute: str
    tensor: Tensor

    @property
    def swapped(self) -> bool:
        return self.attribute in self.module.__dict__.get(_SWAPPED, ())

    @property
    def base(self) -> Tensor:
        buffer = self.module._buffers[_BASE + self.attribute]
        return self.tensor.detach() if self.swapped else buffer

    @property
    def trained(self) -> Tensor:
        buffer = self.module._buffers[_BASE + self.attribute]
        return buffer if self.swapped else self.tensor.detach()


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALayer]]:
    """(name, layer) of every LoRA layer, shared ones once, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALayer):
            yield name, module


def saved_tensors(model: nn.Module) -> Iterator[Saved]:
    """What is trained in full beside the LoRA layers: parameters, and buffers that go with them."""
    for module_name, module in model.named_modules():
        for attribute, tensor in state_of(module).items():
            if _BASE + attribute in module._buffers:
                name = f"{module_name}.{attribute}".lstrip(".")
                yield Saved(name, module, attribute, tensor)


def saved_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters among them, tied ones once."""
    tensors = (saved.tensor for saved in saved_tensors(model))
    yield from dict.fromkeys(t for t in tensors if isinstance(t, nn.Parameter))


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and persistent buffers of a module, without its submodules'."""
    found = {**module._parameters, **module._buffers}
    passing = module._non_persistent_buffers_set
    return {n: t for n, t in found.items() if t is not None and n not in passing}


def lora_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """What to give an optimizer: lora_A and lora_B of every layer, then the modules trained in
    full."""
    for _, layer in lora_layers(model):
        yield layer.lora_A
        yield layer.lora_B
    yield from saved_parameters(model)


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's part of `model.state_dict()`: load it with `load_state_dict(...,
    strict=False)`."""
    state = {}
    for name, layer in lora_layers(model):
        prefix = f"{name}." if name else ""
        for key in ("lora_A", "lora_B", "pissa_A", "pissa_B"):
            tensor = getattr(layer, key)
            if tensor is not None:
                state[prefix + key] = tensor.detach()
    for saved in saved_tensors(model):
        state[saved.name] = saved.trained
    return state


def require_layers(model: nn.Module) -> list[tuple[str, LoRALayer]]:
    """The LoRA layers; ValueError where there is none."""
    layers = list(lora_layers(model))
    if not layers:
        raise ValueError(f"model: {type(model).__name__} has no LoRA layer; call apply_lora first")
    return layers


def attach(
    model: nn.Module,
    layers: dict[nn.Module, LoRALayer],
    saved: dict[str, nn.Module],
    trainable_before: list[str],
) -> None:
    """Puts ready-made layers where their linear ones stand, and leaves only adapters trainable."""
    model.__dict__.setdefault("_lora_trainable_before", trainable_before)
    for parent in list(model.modules()):
        for attribute, child in parent._modules.items():
            if child in layers:
                parent._modules[attribute] = layers[child]
    update_fast_paths(model)
    for outer in saved.values():
        for module in outer.modules():
            for attribute, tensor in state_of(module).items():
                if _BASE + attribute not in module._buffers:
                    base = tensor.detach().clone()
                    module.register_buffer(_BASE + attribute, base, persistent=False)
    model.requires_grad_(False)
    for parameter in lora_parameters(model):
        parameter.requires_grad_(True)


@contextlib.contextmanager
def rollback_on_error(model: nn.Module) -> Iterator[list[str]]:
    """Gives the trainable parameters' names; making layers freezes some, an error undoes that."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    try:
        yield list(trainable)
    except BaseException:
        for parameter in trainable.values():
            parameter.requires_grad_(True)
        raise


@torch.no_grad()
def detach(model: nn.Module) -> None:
    """Undoes `attach`: plain layers that share the same weights, gradients as they were."""
    plain = {layer: layer.to_linear() for _, layer in lora_layers(model)}
    for parent in list(model.modules()):
        for attribute, child in parent._modules.items():
            if child in plain:
                parent._modules[attribute] = plain[child]
    update_fast_paths(model)
    release_saved(model, keep_saved=False)
    before = model.__dict__.pop("_lora_trainable_before", None)
    if before is not None:  # None where the layers were made by hand: nothing to restore
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in before)


@torch.no_grad()
def release_saved(model: nn.Module, keep_saved: bool) -> None:
    """Ends full training of `modules_to_save`, with their trained or their original values."""
    for saved in list(saved_tensors(model)):
        saved.tensor.copy_(saved.trained if keep_saved else saved.base)
        saved.module.__dict__.get(_SWAPPED, set()).discard(saved.attribute)
        del saved.module._buffers[_BASE + saved.attribute]
        saved.module._non_persistent_buffers_set.discard(_BASE + saved.attribute)
        saved.tensor.requires_grad_(False)


def swap_saved(tensors: list[Saved]) -> None:
    """Exchanges the trained and the original values of what is trained in full, tied ones once.

    Those released in the meantime are left alone.
    """
    replaced: dict[Tensor, Tensor] = {}
    for saved in tensors:
        buffers, name = saved.module._buffers, _BASE + saved.attribute
        if name not in buffers:
            continue
        if saved.tensor not in replaced:
            replaced[saved.tensor] = saved.tensor.data
            saved.tensor.data = buffers[name]
        buffers[name] = replaced[saved.tensor]
        saved.module.__dict__.setdefault(_SWAPPED, set()).symmetric_difference_update(
            {saved.attribute}
        )
