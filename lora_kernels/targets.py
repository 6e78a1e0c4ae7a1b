"""Which modules of a model an adapter goes to."""

import re
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lora_kernels.layer import LoRALayer, is_conv1d, refusal

Names = str | Iterable[str] | None
# Matrices of these are no linear maps of activations.
_NOT_LINEAR_MAPS = (nn.Embedding, nn.EmbeddingBag, nn.modules.conv._ConvNd)


class _Patterns:
    """The names a user gave: one regular expression for whole names, or a list of names or their
    last parts ("q_proj" matches "layers.0.q_proj")."""

    def __init__(self, argument: str, names: Names) -> None:
        self.argument = argument
        self.predicates: dict[str, Callable[[str], bool]] = {}
        if isinstance(names, str):
            try:
                expression = re.compile(names)
            except re.error as error:
                raise ValueError(
                    f"{argument}: {names!r} is no regular expression: {error}"
                ) from error
            self.predicates[names] = lambda name: expression.fullmatch(name) is not None
        elif names is not None:
            for part in names:
                if not isinstance(part, str) or not part:
                    raise TypeError(f"{argument}: expected names as strings, got {part!r}")
                self.predicates[part] = lambda name, part=part: f".{name}".endswith(f".{part}")

    def __bool__(self) -> bool:
        return bool(self.predicates)

    def match(self, name: str) -> bool:
        return any(predicate(name) for predicate in self.predicates.values())

    def require_matches(self, names: Iterable[str]) -> None:
        names = [name for name in names if name]
        for pattern, predicate in self.predicates.items():
            if not any(map(predicate, names)):
                raise ValueError(
                    f"{self.argument}: {pattern!r} matches no module; there are {summary(names)}"
                )


def summary(names: Iterable[str], limit: int = 40) -> str:
    """The names with layer numbers folded: layers.*.q_proj."""
    folded = list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) for name in names))
    more = f" and {len(folded) - limit} more" if len(folded) > limit else ""
    return ", ".join(folded[:limit]) + more or "none"


def is_linear(module: nn.Module) -> bool:
    """Whether it is a linear layer, with an adapter or without."""
    return isinstance(module, (nn.Linear, LoRALayer)) or is_conv1d(module)


def objection(module: nn.Module) -> str | None:
    """Why a module cannot carry an adapter; None if it can."""
    if isinstance(module, LoRALayer):
        return "already carries an adapter"
    if not is_linear(module):
        return f"{type(module).__name__} is not a torch.nn.Linear"
    known = type(module) is nn.Linear or is_conv1d(module)
    if not known and not is_parametrized(module):
        return f"{type(module).__name__} is a subclass of nn.Linear with behaviour of its own"
    return refusal(module)


def require_no_peft(model: nn.Module) -> None:
    """ValueError for a model with PEFT's adapters, whose own linear layers would look like
    targets."""
    for name, module in model.named_modules():
        kinds = (kind.__module__ for kind in type(module).__mro__)
        if hasattr(module, "base_layer") and any(k.startswith("peft.tuners.") for k in kinds):
            raise ValueError(
                f"model: {name} carries an adapter of PEFT; fuse_peft(model) moves those onto the"
                " fused op, model.unload() or model.merge_and_unload() takes them out"
            )


def find_targets(
    model: nn.Module, target_modules: Names = None, exclude_modules: Names = None
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """(name -> linear layers to replace, name -> why others were not).

    The default is every nn.Linear and Conv1D but the model's output head, which is
    `get_output_embeddings()`.

    Raises:
        ValueError: a pattern matches nothing, or only modules that cannot carry an adapter; the
            model has adapters of PEFT.
    """
    if is_linear(model):
        raise ValueError(
            "model: is itself a linear layer, nothing can be replaced in it;"
            " use FusedLoRALinear.from_linear"
        )
    require_no_peft(model)
    linear = {name: module for name, module in model.named_modules() if is_linear(module)}
    wanted = _Patterns("target_modules", target_modules)
    excluded = _Patterns("exclude_modules", exclude_modules)
    if target_modules is not None and not wanted:
        raise ValueError("target_modules: got an empty list; None means every linear layer")
    wanted.require_matches(linear)
    excluded.require_matches(name for name, _ in model.named_modules())
    find_head = getattr(model, "get_output_embeddings", None)
    head = find_head() if callable(find_head) and not wanted else None
    targets, skipped = {}, {}
    for name, module in linear.items():
        if wanted and not wanted.match(name):
            continue
        if excluded.match(name):
            skipped[name] = "excluded by exclude_modules"
        elif module is head:
            skipped[name] = "the model's output head"
        elif (reason := objection(module)) is not None:
            skipped[name] = reason
        else:
            targets[name] = module
    if not targets:
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in skipped.items())
        raise ValueError(
            f"target_modules: no layer of {type(model).__name__} can carry an adapter"
            + (reasons or ": it holds no nn.Linear")
        )
    return targets, skipped


def find_saved(model: nn.Module, modules_to_save: Names) -> dict[str, nn.Module]:
    """Modules to be trained in full and saved with the adapter; ValueError for a name that is not
    there."""
    patterns = _Patterns("modules_to_save", modules_to_save)
    modules = dict(model.named_modules())
    patterns.require_matches(modules)
    return {n: module for n, module in modules.items() if n and patterns.match(n)}


def submodules(modules: dict[str, nn.Module]) -> set[nn.Module]:
    """These modules and all that lie in them, whatever other places they stand in."""
    return {module for outer in modules.values() for module in outer.modules()}


def owners(model: nn.Module, beside: bool = False) -> dict[Tensor, list[str]]:
    """Every parameter with all the names its memory goes by; a tied one has several.

    `beside` counts buffers and tensors in plain attributes too. Tensors that share a storage are
    tied where they overlap in it, not where each has a part of its own.
    """
    found: dict[Tensor, list[str]] = {}
    for module_name, module in model.named_modules():
        held = {**vars(module), **module._buffers} if beside else {}
        for attribute, tensor in {**held, **module._parameters}.items():
            if isinstance(tensor, Tensor):
                found.setdefault(tensor, []).append(f"{module_name}.{attribute}".lstrip("."))
    tied = {tensor: {tensor} for tensor in found}
    for one, other in _overlaps(found):
        tied[one].add(other)
        tied[other].add(one)
    return {
        tensor: [name for t in found if t in tied[tensor] for name in found[t]]
        if len(tied[tensor]) > 1
        else names
        for tensor, names in found.items()
    }


def _overlaps(tensors: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """The pairs of tensors that have memory in common."""
    spans = []
    for tensor in tensors:
        if type(tensor) in (Tensor, nn.Parameter, nn.Buffer) and _has_memory(tensor):
            steps = zip(tensor.shape, tensor.stride(), strict=True)
            length = 1 + sum((size - 1) * stride for size, stride in steps)
            start = tensor.data_ptr()
            spans.append((start, start + length * tensor.element_size(), len(spans), tensor))
    reaching: list[tuple] = []
    for start, end, index, tensor in sorted(spans):
        reaching = [span for span in reaching if span[1] > start]
        for span in reaching:
            if span[3].device == tensor.device and _meet(span[3], tensor):
                yield span[3], tensor
        reaching.append((start, end, index, tensor))


def _has_memory(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_meta and tensor.numel() > 0


def _meet(one: Tensor, other: Tensor) -> bool:
    """Whether tensors whose spans overlap have an element in common: columns of one matrix do not,
    although each reaches across the others."""
    if one.is_contiguous() and other.is_contiguous():
        return True
    if one.element_size() != other.element_size():
        return True
    size = one.element_size()
    start = min(one.data_ptr(), other.data_ptr())
    steps = [(t, (t.data_ptr() - start) // size) for t in (one, other)]
    length = max(
        offset + 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
        for t, offset in steps
    )
    seen = torch.zeros(length, dtype=torch.bool)
    first, second = (seen.as_strided(t.shape, t.stride(), offset) for t, offset in steps)
    first.fill_(True)
    return bool(second.any())


def require_whole_ties(model: nn.Module, saved: dict[str, nn.Module]) -> None:
    """A parameter trained in full must not be tied to one that stays frozen."""
    trained, modules = submodules(saved), dict(model.named_modules())
    for names in owners(model).values():
        inside = [name for name in names if modules[name.rpartition(".")[0]] in trained]
        outside = [name for name in names if name not in inside]
        if inside and outside:
            raise ValueError(
                f"modules_to_save: {inside[0]} is tied to {', '.join(outside)};"
                " name all of its owners or untie them"
            )


def other_linear_maps(model: nn.Module) -> list[str]:
    """Parameters that hold matrices but belong to no nn.Linear (fused experts, packed
    projections)."""
    return [
        f"{name}.{attribute} {list(parameter.shape)}".lstrip(".")
        for name, module in model.named_modules()
        if not is_linear(module) and not isinstance(module, _NOT_LINEAR_MAPS)
        for attribute, parameter in module.named_parameters(recurse=False)
        if parameter.dim() in (2, 3) and min(parameter.shape) > 1
    ]
