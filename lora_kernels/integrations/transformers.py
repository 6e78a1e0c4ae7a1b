"""`save_pretrained` of Transformers' models, which writes their adapters too."""

import functools
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lora_kernels import names
from lora_kernels.adapters import lora_layers
from lora_kernels.checkpoint import write_files
from lora_kernels.formats import CONFIG_NAME, WEIGHTS_NAME
from lora_kernels.nn import LoRALayer
from lora_kernels.nn.tensors import MERGED
from lora_kernels.sharding import is_sharded

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def guard(model: nn.Module) -> None:
    """Makes `save_pretrained(d)` of the model, and of models within it, write the adapter too.

    Without the adapter's files in d `from_pretrained(d)` would drop it as unexpected keys; with
    them Transformers loads base and adapter (through PEFT).
    """
    module: Any
    for module in model.modules():
        save = getattr(type(module), "save_pretrained", None)
        if callable(save) and "save_directory" in inspect.signature(save).parameters:
            # A partial is copied and pickled with the model, and then holds the copy.
            module.save_pretrained = functools.partial(_save_pretrained, module)


def release(model: nn.Module) -> None:
    """Undoes `guard`."""
    for module in model.modules():
        saving = module.__dict__.get("save_pretrained")
        if getattr(saving, "func", None) is _save_pretrained:
            del module.save_pretrained


def _save_pretrained(model: "PreTrainedModel", *args: Any, **kwargs: Any) -> object:
    """Given the state of a sharded model, as Trainer gives it, one rank may call; otherwise all."""
    save = type(model).save_pretrained
    call = inspect.signature(save).bind(model, *args, **kwargs)
    call.apply_defaults()
    directory = Path(call.arguments["save_directory"])
    given = _base_state(model, call.arguments.get("state_dict"))
    if given:
        call.arguments["state_dict"] = dict(given)  # Transformers takes out what it writes
    result = save(*call.args, **call.kwargs)
    layers = dict(lora_layers(model))
    parts = {
        name: layer.low_rank(
            **{
                key: given.get(f"{name}.{key}", layer.factor(key))
                for key in layer.adapter_parameters
            }
        )
        for name, layer in layers.items()
        if layer._merged != "final"
    }
    gathers = any(is_sharded(tensor) for pair in parts.values() for tensor in pair)
    if not layers or not (call.arguments.get("is_main_process", True) or gathers):
        return result
    if parts:
        # Relative to the base beside it, which for PiSSA is what is left of the weight.
        write_files(model, directory, parts, None, given)
    else:
        # The weights hold the adapter; files of an earlier save would add it a second time.
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            (directory / name).unlink(missing_ok=True)
    return result


def _base_state(model: nn.Module, given: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The state to write beside the adapter's files: the plain model's names, and the bases of
    merged layers. Empty where the model's own state is that already."""
    modules = list(names.keyed_modules(model, remove_duplicate=False))
    layers = {name: module for name, _, module in modules if isinstance(module, LoRALayer)}
    wrapped = any(name != key for name, key, _ in modules)
    if given is None and not wrapped and not any(layer.merged for layer in layers.values()):
        return {}
    plain = {key: name for name, key, _ in modules}
    state = {}
    for key, tensor in (model.state_dict() if given is None else given).items():
        owner, _, attribute = key.rpartition(".")
        state[names.join(plain.get(owner, owner), attribute)] = tensor
    for name in layers:
        base = state.pop(names.join(name, MERGED), None)
        if base is not None and base.numel():
            state[names.join(name, "weight")] = base
    return state
