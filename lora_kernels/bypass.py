"""Layers that a forward reads past: their weight is used and the layer is not called.

An adapter there has no part in the output. `forwards` tells most of them from the sources.
"""

import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from lora_kernels.forwards import ANY, Path, weights_read
from lora_kernels.names import named_modules
from lora_kernels.nn import LoRALayer

# Options without which torch's own forwards call their layers one by one; 0 switches both off.
_FAST_PATHS = {
    nn.TransformerEncoderLayer: "activation_relu_or_gelu",
    nn.TransformerEncoder: "use_nested_tensor",
}
# Class of a model or part -> what of it no output depends on but through a choice, and why.
_IDLE = {
    "CanineForMultipleChoice": ("canine.final_char_encoder", "the pooled output is made before it"),
    "CanineForSequenceClassification": (
        "canine.final_char_encoder", "the pooled output is made before it"
    ),
    "ColModernVBertForRetrieval": ("vlm.vision_model.head", "no embedding reads what it pools"),
    "LightGlueForKeypointMatching": ("token_confidence", "decides where to stop, as a yes or no"),
    "OwlViTForObjectDetection": ("owlvit.visual_projection", "boxes do not read it"),
    "Owlv2ForObjectDetection": ("owlv2.visual_projection", "boxes do not read it"),
    "Sam3LiteTextModel": ("text_encoder.projection", "reads what is not projected"),
    "Sam3Model": ("text_encoder.text_projection", "reads what is not projected"),
}  # fmt: skip
_KEPT = "_lora_kept_"
_SCANNED = 1024  # elements of a list that are looked at


def bypassed(model: nn.Module) -> dict[nn.Module, str]:
    """Submodules whose weight some forward uses without calling them, with the reason."""
    found: dict[nn.Module, str] = {}
    for parent in model.modules():
        for path, function in weights_read(parent):
            for child in _resolve(parent, path):
                if child is not parent and getattr(child, "weight", None) is not None:
                    reader = f"{type(parent).__name__}.{function.__name__}"
                    found.setdefault(child, f"{reader} reads its weight past the layer")
    return found


def unread(model: nn.Module) -> dict[nn.Module, str]:
    """What gets no gradient, with the reason: all that lies in a module whose forward is decorated
    with no_grad, and in a vision tower behind the last layer whose output the config says is read
    (LLaVA takes the last but one)."""
    found: dict[nn.Module, str] = {}
    for module in model.modules():
        if _without_gradient(type(module).forward):
            reason = f"{type(module).__name__}.forward runs under no_grad: it would never train"
            found |= dict.fromkeys(module.modules(), reason)
        wanted = getattr(getattr(module, "config", None), "vision_feature_layer", None)
        if wanted is None:
            continue
        indices = wanted if isinstance(wanted, (list, tuple)) else [wanted]
        for name, tower in named_modules(module):
            depth = getattr(getattr(tower, "config", None), "num_hidden_layers", None)
            if not name.endswith("_tower") or depth is None:
                continue
            # Hidden states are the embeddings and the output of each layer.
            read = max(index % (depth + 1) for index in indices)
            reason = f"config.vision_feature_layer = {wanted}: no output reads what it computes"
            for layers in tower.modules():
                if isinstance(layers, nn.ModuleList) and len(layers) == depth:
                    for layer in layers[read:]:
                        found |= dict.fromkeys(layer.modules(), reason)
    return found


def _without_gradient(function: Callable[..., Any]) -> bool:
    """Whether torch.no_grad or inference_mode decorate it."""
    held = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    contexts = (torch.no_grad, torch.inference_mode)
    return any(isinstance(getattr(one, "__self__", None), contexts) for one in held)


def poolers(model: nn.Module) -> dict[nn.Module, str]:
    """What pools the outputs of an encoder in a model that gives logits of tokens, which reads them
    one by one, with the reason; not where a head for whole sequences stands beside that one."""
    found: dict[nn.Module, str] = {}
    find_head = getattr(model, "get_output_embeddings", None)
    if not callable(find_head) or find_head() is None:
        return found
    parts = {name.rpartition(".")[2] for name, _ in named_modules(model)}
    for name, module in named_modules(model):
        kind = type(module).__name__
        pools = name.endswith(".pooler") and "seq_relationship" not in parts
        if pools or kind.endswith("AttentionPoolingHead"):
            found |= dict.fromkeys(module.modules(), "pools an output that no logits are made of")
    return found


def idle(model: nn.Module) -> dict[nn.Module, str]:
    """What gets a gradient from losses of one's own alone, with the reason: scores by which tokens
    are chosen, and parts of models of Transformers that are known for it."""
    found: dict[nn.Module, str] = {}
    for module in model.modules():
        kind = type(module).__name__
        if kind.endswith("Indexer"):
            reason = f"{kind} chooses tokens: no gradient passes a choice"
            found |= dict.fromkeys(module.modules(), reason)
        path, reason = _IDLE.get(kind, ("", ""))
        for part in _resolve(module, tuple(path.split("."))) if path else ():
            found |= dict.fromkeys(part.modules(), f"in {kind} no output needs it: {reason}")
    return found


def unregistered_linears(model: nn.Module) -> list[str]:
    """Linear layers that only a plain list, tuple or dict of a module holds: `model.modules()`
    does not have them, nothing trains, moves or saves them."""
    registered, found = set(model.modules()), []
    for name, module in named_modules(model):
        for attribute, value in vars(module).items():
            if attribute.startswith("_") or not isinstance(value, (list, tuple, dict)):
                continue
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, item in itertools.islice(items, _SCANNED):
                inner = item.named_modules() if isinstance(item, nn.Module) else ()
                for path, layer in inner:
                    if isinstance(layer, nn.Linear) and layer not in registered:
                        found.append(".".join(filter(None, (name, attribute, str(key), path))))
    return found


def update_fast_paths(model: nn.Module) -> None:
    """Keeps torch's encoder layers off the C++ kernel that takes their weights while a layer of
    theirs holds an adapter, and gives it back afterwards."""
    for module in model.modules():
        for kind, option in _FAST_PATHS.items():
            if not isinstance(module, kind):
                continue
            if any(isinstance(inner, LoRALayer) for inner in module.modules()):
                _leave_fast_path(module, option)
            elif _KEPT + option in vars(module):
                setattr(module, option, vars(module).pop(_KEPT + option))


def fast_paths(model: nn.Module) -> dict[nn.Module, str]:
    """The layers in torch's encoder layers that a fast path bypasses in eval mode, with the
    reason."""
    option = _FAST_PATHS[nn.TransformerEncoderLayer]
    return {
        inner: f"in eval mode {type(module).__name__}'s fast path hands its weight to one kernel"
        f" ({option} = 0 on the encoder layer keeps it off that)"
        for module in model.modules()
        if isinstance(module, nn.TransformerEncoderLayer) and getattr(module, option)
        for inner in module.modules()
    }


def _leave_fast_path(module: nn.Module, option: str) -> None:
    if _KEPT + option not in vars(module):
        vars(module)[_KEPT + option] = getattr(module, option)
    setattr(module, option, 0)


def _leave_on_assignment(module: nn.Module, name: str, child: nn.Module | None) -> None:
    """A layer with an adapter that is put into an encoder layer by hand."""
    if isinstance(child, LoRALayer) and isinstance(module, nn.TransformerEncoderLayer):
        _leave_fast_path(module, _FAST_PATHS[nn.TransformerEncoderLayer])


nn.modules.module.register_module_module_registration_hook(_leave_on_assignment)


def _resolve(module: Any, path: Path) -> Iterator[nn.Module]:
    """The modules that a path leads to; nothing where it leads elsewhere."""
    if not path:
        if isinstance(module, nn.Module):
            yield module
        return
    if path[0] != ANY:
        try:
            inner = inspect.getattr_static(module, path[0], None)
            if isinstance(module, nn.Module) and path[0] in module._modules:
                inner = module._modules[path[0]]
        except AttributeError:
            return
        yield from _resolve(inner, path[1:])
    elif isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        for child in module._modules.values():
            yield from _resolve(child, path[1:])
    elif isinstance(module, (list, tuple)):
        for child in module:
            yield from _resolve(child, path[1:])
