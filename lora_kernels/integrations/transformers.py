"""`save_pretrained` of Transformers' models, which writes their adapters too."""

import functools
import inspect
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lora_kernels import names
from lora_kernels.adapters import adapter_names, lora_layers, only_or_in_use
from lora_kernels.checkpoint import write_files
from lora_kernels.formats import CONFIG_NAME, WEIGHTS_NAME
from lora_kernels.nn import LoRALayer
from lora_kernels.nn.experts import frozen_forward
from lora_kernels.nn.tensors import MERGED
from lora_kernels.sharding import is_sharded
from lora_kernels.weights import QuantizedTensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def register_experts() -> str:
    """Registers the grouped kernels with Transformers as an implementation of experts, and returns
    its name: `model.set_experts_implementation(register_experts())`.

    It serves experts without adapters; those that `apply_lora` gave some compute by these kernels
    whichever implementation is set.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register("lora_kernels", frozen_forward)
    return "lora_kernels"


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
    layers = dict(lora_layers(model))
    result: object = None
    if any(isinstance(parameter, QuantizedTensor) for parameter in model.parameters()):
        _save_beside_quantised(model, directory, bool(layers))
    else:
        result = save(*call.args, **call.kwargs)
    known = adapter_names(model)
    # Relative to the base beside it, which for PiSSA is what is left of the weight.
    parts = {adapter: _parts(layers, adapter, given) for adapter in known}
    tensors = (t for of_layers in parts.values() for pair in of_layers.values() for t in pair)
    gathers = any(map(is_sharded, tensors))
    if not layers or not (call.arguments.get("is_main_process", True) or gathers):
        return result
    first = only_or_in_use(model)
    if len(first) != 1:
        warnings.warn(
            f"save_pretrained: of the adapters {', '.join(map(repr, known))} not exactly one is in"
            " use, so each is written to a folder of its own and from_pretrained loads none",
            stacklevel=2,
        )
    # Where from_pretrained looks, and beside it as PEFT does.
    places = {name: directory if (name,) == first else directory / name for name in known}
    for name, place in places.items():
        if parts[name]:
            write_files(model, place, parts[name], None, given, name)
    if not any(place == directory and parts[name] for name, place in places.items()):
        # The weights hold the adapter; files of an earlier save would add it a second time.
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            (directory / name).unlink(missing_ok=True)
    return result


def _save_beside_quantised(model: "PreTrainedModel", directory: Path, adapted: bool) -> None:
    """What Transformers can read of a model whose weights it cannot write: the config."""
    if not adapted:
        raise ValueError(
            "save_pretrained: the model holds quantised weights, which Transformers cannot write;"
            " lora_kernels.save_quantized(model, path) writes them"
        )
    warnings.warn(
        "save_pretrained: writes the config and the adapter; the quantised weights it leaves to"
        " lora_kernels.save_quantized(model, path)",
        stacklevel=3,
    )
    directory.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(directory)


def _parts(
    layers: Mapping[str, LoRALayer], adapter: str, given: Mapping[str, Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """name of the layer -> (A, B) of its adapter of this name, of what is given or its own."""
    found = {}
    for name, layer in layers.items():
        if adapter in layer.names and layer._merged != "final":
            one, prefix = layer.adapter(adapter), f"{name}{layer.suffix}.{layer.prefix(adapter)}"
            found[name] = one.low_rank(
                **{key: given.get(prefix + key, one.factor(key)) for key in one.adapter_parameters}
            )
    return found


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
    for name, layer in layers.items():
        base = state.pop(names.join(name, MERGED), None)
        if base is not None and base.numel():
            of_expert = name.removesuffix(layer.suffix)
            state[of_expert if layer.suffix else names.join(name, "weight")] = base
    return state
