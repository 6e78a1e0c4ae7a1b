"""How PEFT reads the names in our files: names that it keeps apart, and a word where it cannot."""

import re
import sys
import warnings
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from typing import Any

from torch import Tensor, nn

from lora_kernels import adapters, names, targets
from lora_kernels.bases import is_convolution
from lora_kernels.nn.conv import why_not_in_peft
from lora_kernels.peft_config import PREFIX

# Projections that stood in a mixture's experts before Transformers 5 fused those. PEFT takes any
# target of these last names, dense and shared MLPs included, for experts and moves it to the fused
# parameters; by family, which is what Transformers calls the conversion of a model type.
_EXPERTS: dict[str, tuple[str, ...]] = {
    "mixtral": ("gate", "w1", "w2", "w3"),
    "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj"),
}


def taken_for_experts(model: nn.Module, layers: Iterable[str]) -> list[str]:
    """Those layers whose names PEFT takes for fused experts. It adapts them where their weights are
    given as `target_parameters`, which it does not move."""
    kind: str = getattr(getattr(model, "config", None), "model_type", "")
    conversions = sys.modules.get("transformers.conversion_mapping")
    families = getattr(conversions, "_MODEL_TO_CONVERSION_PATTERN", {})
    family = "mixtral" if kind == "mixtral" else families.get(kind, "")
    moved = _EXPERTS.get(family, ())
    return [name for name in layers if name.rpartition(".")[2] in moved]


def target_names(model: nn.Module, layers: list[str]) -> list[str] | str:
    """The last parts of the names where they stand for exactly these modules, else the whole
    names; an expression where those are last parts of other modules' names."""
    modules = [name for name, _ in names.named_modules(model)]
    parts = {name.rpartition(".")[2] for name in layers}
    by_part = {name for name in modules if name.rpartition(".")[2] in parts}
    if by_part == set(layers) and not any(part.isdigit() for part in parts):
        return sorted(parts)
    endings = tuple(f".{name}" for name in layers)
    if any(f".{name}".endswith(endings) for name in set(modules) - set(layers)):
        return "|".join(map(re.escape, sorted(layers)))
    return sorted(layers)


def parameter_names(model: nn.Module, experts: set[str]) -> list[str]:
    """The last two parts of the names of parameters of experts where they stand for exactly these,
    else the whole names."""
    parts = {".".join(name.split(".")[-2:]) for name in experts}
    of_model = [names.join(n, key) for n, m in names.named_modules(model) for key in m._parameters]
    by_part = {name for name in of_model if f".{name}".endswith(tuple(f".{p}" for p in parts))}
    return sorted(parts if by_part == experts else experts)


def saved_names(model: nn.Module) -> list[str]:
    """The names of the modules trained in full; with what PEFT puts before names where a name is
    the end of another module's, since PEFT takes every module whose name ends so."""
    saved = adapters.saved_modules(model)
    others = {name for name, _ in names.named_modules(model)} - set(saved)
    return sorted(PREFIX + n if any(o.endswith(n) for o in others) else n for n in saved)


def warn_of_differences(
    model: nn.Module, config: dict[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """A UserWarning where PEFT would not compute from the file what the model computes."""
    for places in _shared(model):
        warnings.warn(
            f"{' and '.join(places)} are one module with one adapter; PEFT will put it into"
            f" {places[0]} alone and compute something else. load_adapter puts it into both; for"
            " PEFT give each place a module of its own before apply_lora",
            stacklevel=4,
        )
    for name, layer in adapters.lora_layers(model):
        reason = why_not_in_peft(layer) if is_convolution(layer) else None
        if reason and f"{PREFIX}{name}.lora_A.weight" in tensors:
            warnings.warn(
                f"{name}: PEFT's adapter of a convolution does not have its {reason}, and will fail"
                " or compute something else from this file. load_adapter reads it as it is",
                stacklevel=4,
            )
    reason = _conversion(model, config, tensors)
    if reason:
        warnings.warn(
            f"PEFT will not compute from this file what the model does: {reason}. load_adapter"
            " reads it as it is; for PEFT leave these layers out by exclude_modules",
            stacklevel=4,
        )


def _shared(model: nn.Module) -> list[list[str]]:
    """The names of each adapted module that is held in several places itself, rather than by a
    shared parent: PEFT replaces it in the first."""
    adapted: set[nn.Module] = {layer for _, layer in adapters.lora_layers(model)}
    adapted |= {saved.module for saved in adapters.saved_tensors(model)}
    places: dict[nn.Module, list[str]] = {}
    for name, parent in names.named_modules(model):
        for attribute, child in parent._modules.items():
            child = child if child is None else names.unwrapped(child)
            if child in adapted:
                places.setdefault(child, []).append(names.join(name, attribute))
    return [found for found in places.values() if len(found) > 1]


def _conversion(
    model: nn.Module, config: dict[str, Any], tensors: Mapping[str, Tensor]
) -> str | None:
    """What PEFT's conversion of older checkpoints of this architecture changes, asked of PEFT."""
    kind: str = getattr(getattr(model, "config", None), "model_type", "")
    conversions = sys.modules.get("transformers.conversion_mapping")
    known = getattr(conversions, "get_checkpoint_conversion_mapping", lambda kind: None)
    if kind is None or known(kind) is None or find_spec("peft") is None:
        return None
    import peft

    try:
        from peft.utils import transformers_weight_conversion as conversion
    except ImportError:  # an older PEFT converts nothing
        return None
    theirs = peft.LoraConfig(**{k: v for k, v in config.items() if k != "peft_type"})
    wanted = theirs.target_modules, set(theirs.target_parameters or ())
    try:
        conversion.convert_peft_config_for_transformers(theirs, model=model, conversions=None)
        converted = conversion.convert_peft_adapter_state_dict_for_transformers(
            model=model, peft_config=theirs, adapter_state_dict=dict(tensors)
        )
    except Exception as error:
        return f"it refuses the names, {error}"
    if (theirs.target_modules, set(theirs.target_parameters or ())) != wanted:
        return f"it moves targets to {targets.summary(sorted(theirs.target_parameters or ()))}"
    moved = sorted(tensors.keys() - converted.keys())
    return f"it renames {targets.summary(moved)}" if moved else None
