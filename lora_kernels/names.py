"""Names of modules as the plain model has them, whatever stands around its parts.

`torch.compile` (of a model, or of single blocks), DistributedDataParallel, DataParallel, FSDP,
AveragedModel and activation checkpointing put a module into a wrapper, whose attribute for it
becomes a part of every name below. A file is read by models that are wrapped in other ways, so its
names leave the wrappers out. Wrappers are told by their classes: a module of one's own that is
called `module` is a part of the model like any other.
"""

import sys
from collections.abc import Iterator

from torch import nn
from torch.optim.swa_utils import AveragedModel

_PARALLEL = (nn.parallel.DistributedDataParallel, nn.DataParallel, AveragedModel)
# Classes are looked up where they are defined, if that was imported: else nothing is wrapped so.
_ELSEWHERE = {
    ("torch._dynamo.eval_frame", "OptimizedModule"): "_orig_mod",
    ("deepspeed", "DeepSpeedEngine"): "module",
}
# Those that take themselves out of the names of state dicts.
_HIDDEN = {
    ("torch.distributed.fsdp", "FullyShardedDataParallel"): "_fsdp_wrapped_module",
    ("torch.distributed.algorithms._checkpoint.checkpoint_wrapper", "ActivationWrapper"): (
        "_checkpoint_wrapped_module"
    ),
}


def _attribute(module: nn.Module) -> str | None:
    """Where a wrapper holds the module that it stands for; None for another module."""
    if isinstance(module, _PARALLEL):
        return "module"
    for (home, kind), attribute in {**_ELSEWHERE, **_HIDDEN}.items():
        if isinstance(module, getattr(sys.modules.get(home), kind, ())):
            return attribute
    return None


def unwrapped(model: nn.Module) -> nn.Module:
    """The plain model, whose own parts may still be wrapped."""
    while (attribute := _attribute(model)) is not None:
        model = model.get_submodule(attribute)
    return model


def require_module(model: object) -> None:
    """TypeError for what is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def join(name: str, attribute: str) -> str:
    return f"{name}.{attribute}" if name else attribute


def keyed_modules(
    model: nn.Module, *, remove_duplicate: bool = True
) -> Iterator[tuple[str, str, nn.Module]]:
    """(name in the plain model, name in `model.state_dict()`, module), no wrapper among them.

    With its duplicates a module is given in every place but those within itself.
    """
    require_module(model)
    seen: set[nn.Module] = set()

    def walk(name: str, key: str, module: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
        while (attribute := _attribute(module)) is not None:
            if attribute not in _HIDDEN.values():
                key = join(key, attribute)
            module = module.get_submodule(attribute)
        if module in seen:
            return
        seen.add(module)
        yield name, key, module
        for attribute, child in module._modules.items():
            if child is not None:
                yield from walk(join(name, attribute), join(key, attribute), child)
        if not remove_duplicate:
            seen.remove(module)

    yield from walk("", "", model)


def named_modules(
    model: nn.Module, *, remove_duplicate: bool = True
) -> Iterator[tuple[str, nn.Module]]:
    """`model.named_modules()` as of the plain model."""
    for name, _, module in keyed_modules(model, remove_duplicate=remove_duplicate):
        yield name, module


def all_names(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every module, with its name in each of its places, that of `named_modules` first."""
    found: dict[nn.Module, list[str]] = {}
    for name, module in named_modules(model, remove_duplicate=False):
        found.setdefault(module, []).append(name)
    return found
