"""Which modules of a model an adapter goes to."""

import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lora_kernels import bases
from lora_kernels.bypass import bypassed, idle, poolers, unread
from lora_kernels.names import all_names, join, named_modules, unwrapped
from lora_kernels.nn import LoRAExpertProduct, LoRALayer, layer_class
from lora_kernels.nn.experts import SUFFIX, layout_objection, products
from lora_kernels.nn.layer import reserved

if TYPE_CHECKING:
    from typing_extensions import TypeIs

    Linear = bases.Linear | LoRALayer
    Target = Linear | bases.Convolution

Names = str | Iterable[str] | None
_Predicate = Callable[[str], bool]
# What PEFT calls the default of `target_modules`.
ALL_LINEAR = "all-linear"
# Kinds of weights that carry no adapter.
LINEAR_MAPS = "linear maps that are no nn.Linear"
EMBEDDINGS, CONVOLUTIONS = "embeddings", "convolutions"
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
# Parts of the names of parameters that are tables or elementwise, whatever their shape.
_TABLES, _ELEMENTWISE = re.compile("embed|token|position|_table"), re.compile("bias|scale|_log$")
# Heads by name, where a model built from a config does not tell them from its body.
_HEAD_NAMES = ("classifier", "score", "qa_outputs")


def ends_in(part: str) -> _Predicate:
    return lambda name: f".{name}".endswith(f".{part}")


class _Patterns:
    """The names a user gave: one regular expression for whole names, or a list of names or their
    last parts ("q_proj" matches "layers.0.q_proj")."""

    def __init__(self, argument: str, names: Names) -> None:
        self.argument = argument
        self.is_expression = isinstance(names, str)
        self.predicates: dict[str, _Predicate] = {}
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
                self.predicates[part] = ends_in(part)

    def __bool__(self) -> bool:
        return bool(self.predicates)

    def match(self, *names: str) -> bool:
        """Whether one matches any of the names, which a module in several places has."""
        return any(predicate(name) for predicate in self.predicates.values() for name in names)

    def is_for(self, names: list[str], inside: set[str], others: Iterable[str]) -> bool:
        """Whether one is for a module: it matches a name, or of all modules only ones inside."""
        return self.match(*names) or any(
            any(map(predicate, inside)) and not any(map(predicate, others))
            for predicate in self.predicates.values()
        )

    def require_matches(
        self,
        names: Iterable[str],
        explain: Callable[[_Predicate], str | None] = lambda _: None,
    ) -> None:
        """ValueError for a pattern that matches none, with what `explain` knows of it."""
        names = [name for name in names if name]
        for pattern, predicate in self.predicates.items():
            if any(map(predicate, names)):
                continue
            reason = f"matches no module; there are {summary(names)}"
            if self.is_expression and any(f".{name}".endswith(f".{pattern}") for name in names):
                reason = (
                    f"matches no module; for a list write [{pattern!r}], a string is a regular"
                    " expression for the whole name"
                )
            raise ValueError(f"{self.argument}: {pattern!r} {explain(predicate) or reason}")


def summary(names: Iterable[str], limit: int = 40, *, fold: bool = True) -> str:
    """The names, by default with layer numbers folded: layers.*.q_proj."""
    if fold:
        names = dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) for name in names)
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more or "none"


def listed(argument: str, names: Names) -> str | list[str] | None:
    """The names as what can be read twice; TypeError for anything else."""
    if names is None or isinstance(names, str):
        return names
    if not isinstance(names, Iterable):
        raise TypeError(
            f"{argument}: expected a list of names or one regular expression, got {names!r}"
        )
    return list(names)


def is_linear(module: nn.Module) -> "TypeIs[Linear]":
    """Whether it is a linear layer, with an adapter or without."""
    own = isinstance(module, LoRALayer) and not isinstance(module, LoRAExpertProduct)
    own = own and not _is_to_be_named(module)
    return own or isinstance(module, nn.Linear) or bases.is_conv1d(module)


def is_target(module: nn.Module) -> "TypeIs[Target]":
    """Whether it is a layer that can be named as a target: a linear one, a convolution, an
    embedding."""
    return is_linear(module) or _is_to_be_named(module)


def _is_to_be_named(module: nn.Module) -> bool:
    """Whether it is a target where it is named alone."""
    return bases.is_convolution(module) or isinstance(module, nn.Embedding)


def objection(module: nn.Module, adapter: str | None = None) -> str | None:
    """Why a module cannot carry an adapter, of this name beside others; None if it can."""
    if isinstance(module, LoRALayer):
        return "already carries an adapter" if adapter is None else module.why_no_other(adapter)
    return bases.objection(module, reserved())


def require_no_peft(model: nn.Module) -> None:
    """ValueError for a model with PEFT's adapters, whose own linear layers would look like
    targets."""
    for name, module in named_modules(model):
        kinds = (kind.__module__ for kind in type(module).__mro__)
        if hasattr(module, "base_layer") and any(k.startswith("peft.tuners.") for k in kinds):
            raise ValueError(
                f"model: {name} carries an adapter of PEFT; fuse_peft(model) moves those onto the"
                " fused op, model.unload() or model.merge_and_unload() takes them out"
            )


def require_shapes(model: nn.Module) -> None:
    """ValueError for a model with lazy layers that have not been called."""
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ValueError(
                f"model: {name} has no shape yet; call the model once, so that its lazy layers get"
                " theirs"
            )


def find_targets(
    model: nn.Module,
    target_modules: Names = None,
    exclude_modules: Names = None,
    adapter: str | None = None,
) -> tuple[dict[str, "Target"], dict[str, str]]:
    """(name -> layers to replace, name -> why others were not). Where the `adapter` of this
    name is to stand beside others, layers that carry adapters too.

    The default is every nn.Linear and Conv1D but output heads, which are `get_output_embeddings()`
    of the model or of one within it, and layers whose weight something else holds too.
    Convolutions and embeddings are targets where they are named.

    Raises:
        ValueError: a pattern matches nothing, only modules that cannot carry an adapter, or a layer
            that the model's code reads past; the model has adapters of PEFT.
    """
    if is_target(unwrapped(model)):
        itself = unwrapped(model)
        kind = "linear layer" if is_linear(itself) else type(itself).__name__
        raise ValueError(
            f"model: is itself a {kind}, nothing can be replaced in it; use"
            f" {layer_class(itself).__name__}.from_linear"
        )
    require_no_peft(model)
    require_shapes(model)
    if target_modules == ALL_LINEAR:
        target_modules = None
    places = all_names(model)
    wanted = _Patterns("target_modules", target_modules)
    linear = {
        names[0]: module
        for module, names in places.items()
        if is_target(module) and (wanted or is_linear(module))
    }
    excluded = _Patterns("exclude_modules", exclude_modules)
    if target_modules is not None and not wanted:
        raise ValueError("target_modules: got an empty list; None means every linear layer")
    wanted.require_matches(
        chain.from_iterable(places[module] for module in linear.values()),
        lambda predicate: _what_else(model, predicate),
    )
    excluded.require_matches(chain.from_iterable(places.values()))
    left_out = {} if wanted else _left_out(model, linear)
    targets: dict[str, Target] = {}
    skipped: dict[str, str] = {}
    past, behind = bypassed(model), unread(model)
    for name, module in linear.items():
        if wanted and not wanted.match(*places[module]):
            continue
        if excluded.match(*places[module]):
            skipped[name] = "excluded by exclude_modules"
        elif module in left_out:
            skipped[name] = left_out[module]
        elif module in behind:
            skipped[name] = behind[module]
        elif (reason := objection(module, adapter)) is not None:
            skipped[name] = reason
        elif module in past and wanted:
            raise ValueError(
                f"target_modules: an adapter on {name} would have no part in the output:"
                f" {past[module]}; leave it out (exclude_modules)"
            )
        elif module in past:
            skipped[name] = past[module]
        else:
            targets[name] = module
    if not targets:
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in skipped.items())
        raise ValueError(
            f"target_modules: no layer of {type(model).__name__} can carry an adapter"
            + (reasons or ": it holds no nn.Linear")
        )
    return targets, skipped


def _left_out(model: nn.Module, linear: Mapping[str, nn.Module]) -> dict[nn.Module, str]:
    """Linear layers that are no targets by default, with the reason."""
    reasons = idle(model)
    for _, module in named_modules(model):
        find_head = getattr(module, "get_output_embeddings", None)
        head = find_head() if callable(find_head) else None
        if isinstance(head, nn.Module):
            reasons |= dict.fromkeys(head.modules(), "the model's output head")
            reasons |= poolers(module)
    owning = owners(model, beside=True)
    for name, module in linear.items():
        weight = module._parameters.get("weight")
        holders = [] if weight is None else owning.get(weight, [])
        beside = [n for n in holders if n != f"{name}.weight"]
        if beside:
            reason = f"its weight is tied to {', '.join(beside)}, which merging would change too"
            reasons.setdefault(module, reason)
    return reasons


def _what_else(model: nn.Module, predicate: _Predicate) -> str | None:
    """What a pattern that matches no linear layer names instead."""
    for name, module in named_modules(model):
        if is_target(module):
            continue
        if name and predicate(name):
            return f"matches no linear layer: {name} is {_a(type(module).__name__)}"
        for attribute, parameter in module._parameters.items():
            full = f"{name}.{attribute}".lstrip(".")
            if parameter is not None and predicate(full):
                able = layout_objection(module) is None and attribute in products(module)
                return (
                    f"matches no module: {full} is a {list(parameter.shape)} parameter of"
                    f" {type(module).__name__}, not a torch.nn.Linear"
                    + ("; name it in target_parameters" if able else ", and carries no adapter")
                )
    return None


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'AEIOU' else 'a'} {noun}"


def new_heads(
    model: nn.Module, target_modules: Names = None, exclude_modules: Names = None
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """(name -> modules that no checkpoint holds, to be trained in full, linear layers in others of
    them -> why they stay frozen).

    Transformers marks the parameters that it loads. What stands beside a model's body without any
    is a new head; in a model built from a config everything beside the body is, unless the model
    has output embeddings. Heads that `target_modules` names get the adapters asked for, those that
    `exclude_modules` names stay as they are.
    """
    if target_modules == ALL_LINEAR:
        target_modules = None
    wanted = _Patterns("target_modules", target_modules)
    excluded = _Patterns("exclude_modules", exclude_modules)
    places = all_names(model)
    linear = {module: set(names) for module, names in places.items() if is_linear(module)}
    heads: dict[str, nn.Module] = {}
    skipped: dict[str, str] = {}
    for name, module in _all_new_parts(model).items():
        layers = [linear[part] for part in module.modules() if part in linear]
        inside = set().union(*layers)
        if excluded.match(*places[module]) or (
            layers and all(excluded.match(*names) for names in layers)
        ):
            skipped |= dict.fromkeys(inside, "excluded by exclude_modules")
        elif not wanted.is_for(places[module], inside, set().union(*linear.values()) - inside):
            heads[name] = module
    return heads, skipped


def unloaded_heads(model: nn.Module) -> list[str]:
    """The new heads of a model that is from a checkpoint otherwise. One that is built from a config
    may have got all its values since."""
    loaded = any(map(_is_loaded, model.parameters()))
    return list(new_heads(model)[0]) if loaded else []


def _all_new_parts(model: nn.Module) -> dict[str, nn.Module]:
    """The new parts of every Transformers model that is this one or lies in it, but in no other."""
    parts: dict[str, nn.Module] = {}
    inside: set[nn.Module] = set()
    for name, module in named_modules(model):
        prefix = getattr(module, "base_model_prefix", None)
        if module not in inside and isinstance(prefix, str):
            inside.update(module.modules())
            parts |= {join(name, part): new for part, new in _new_parts(module, prefix).items()}
    return parts


def _new_parts(model: nn.Module, prefix: str) -> dict[str, nn.Module]:
    """The new ones among the children of a Transformers model and of its body, the child that
    `prefix` names."""
    find_output = getattr(model, "get_output_embeddings", None)
    if not callable(find_output):
        return {}
    children, output = _children(model), find_output()
    body = children.pop(prefix, None)
    loaded = any(map(_is_loaded, model.parameters()))
    if output is not None and not loaded:
        return {}
    # Beside the body, a part that was loaded but for a layer of another size is new too.
    parts = {n: c for n, c in children.items() if _is_new(c, all if body is None else any)}
    if loaded and body is not None:
        parts |= {f"{prefix}.{n}": c for n, c in _children(body).items() if _is_new(c, all)}
    elif not loaded and body is None:
        parts = {name: part for name, part in parts.items() if name in _HEAD_NAMES}
    shared = {parameter for parameter, names in owners(model).items() if len(names) > 1}
    return {
        name: part
        for name, part in parts.items()
        if shared.isdisjoint(part.parameters()) and output not in part.modules()
    }


def _children(module: nn.Module) -> dict[str, nn.Module]:
    return {name: unwrapped(child) for name, child in module.named_children()}


def _is_loaded(parameter: nn.Parameter) -> bool:
    return getattr(parameter, "_is_hf_initialized", False)


def _is_new(module: nn.Module, quantifier: Callable[[Iterable[bool]], bool]) -> bool:
    """Whether it can be trained, and any or all of its parameters are from no checkpoint.
    Embeddings are left to the user, whose new ones may be large."""
    parameters = list(module.parameters())
    return (
        bool(parameters)
        and quantifier(not _is_loaded(p) for p in parameters)
        and all(p.is_floating_point() for p in parameters)
        and not any(isinstance(part, (*_EMBEDDINGS, LoRALayer)) for part in module.modules())
    )


def find_saved(model: nn.Module, modules_to_save: Names) -> dict[str, nn.Module]:
    """Modules to be trained in full and saved with the adapter; ValueError for a name that is not
    there, or a module that carries an adapter."""
    patterns = _Patterns("modules_to_save", modules_to_save)
    places = all_names(model)
    patterns.require_matches(chain.from_iterable(places.values()))
    saved = {n[0]: module for module, n in places.items() if n[0] and patterns.match(*n)}
    for name, module in saved.items():
        if any(isinstance(part, LoRALayer) for part in module.modules()):
            raise ValueError(
                f"modules_to_save: {name} carries an adapter already, of an earlier call; take that"
                " out first (remove_lora)"
            )
    return saved


def submodules(modules: dict[str, nn.Module]) -> set[nn.Module]:
    """These modules and all that lie in them, whatever other places they stand in."""
    return {module for outer in modules.values() for module in outer.modules()}


def owners(model: nn.Module, beside: bool = False) -> dict[Tensor, list[str]]:
    """Every parameter with all the names its memory goes by; a tied one has several.

    `beside` counts buffers and tensors in plain attributes too. Tensors that share a storage are
    tied where they overlap in it, not where each has a part of its own.
    """
    found: dict[Tensor, list[str]] = {}
    for module_name, module in named_modules(model):
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
    spans: list[tuple[int, int, int, Tensor]] = []
    for tensor in tensors:
        if type(tensor) in (Tensor, nn.Parameter, nn.Buffer) and _has_memory(tensor):
            steps = zip(tensor.shape, tensor.stride(), strict=True)
            length = 1 + sum((size - 1) * stride for size, stride in steps)
            start = tensor.data_ptr()
            spans.append((start, start + length * tensor.element_size(), len(spans), tensor))
    reaching: list[tuple[int, int, int, Tensor]] = []
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
    trained, modules = submodules(saved), dict(named_modules(model))
    for names in owners(model).values():
        inside = [name for name in names if modules[name.rpartition(".")[0]] in trained]
        outside = [name for name in names if name not in inside]
        if inside and outside:
            raise ValueError(
                f"modules_to_save: {inside[0]} is tied to {', '.join(outside)};"
                " name all of its owners or untie them"
            )


def expert_parameters(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """name -> (module of experts, parameter of it), of all that can carry adapters."""
    return {
        join(name, parameter): (module, parameter)
        for name, module in named_modules(model)
        if layout_objection(module) is None
        for parameter in products(module)
    }


def find_parameters(model: nn.Module, target_parameters: Names) -> dict[str, tuple[nn.Module, str]]:
    """Those of `expert_parameters` that are named.

    ValueError: a pattern matches none of them, or one that has adapters already.
    """
    wanted, able = _Patterns("target_parameters", target_parameters), expert_parameters(model)
    wanted.require_matches(able, lambda predicate: _what_parameter(model, predicate))
    found = {name: place for name, place in able.items() if wanted.match(name)}
    for name, (module, parameter) in found.items():
        if parameter + SUFFIX in module._modules:
            raise ValueError(f"target_parameters: {name} already carries adapters")
    return found


def _what_parameter(model: nn.Module, predicate: _Predicate) -> str | None:
    """What a pattern that matches no product of experts names instead."""
    for name, module in named_modules(model):
        for attribute, parameter in module._parameters.items():
            full = join(name, attribute)
            if parameter is None or not predicate(full):
                continue
            if is_linear(module):
                return f"matches {full}, of a linear layer: name {name} in target_modules"
            why = layout_objection(module) or "it is none of their two products"
            return f"matches {full}, which cannot carry adapters of experts: {why}"
    return None


def others(
    model: nn.Module, trained: set[nn.Module], adapted: Container[nn.Parameter] = ()
) -> dict[str, dict[str, nn.Parameter]]:
    """The weights outside linear layers and modules `trained` in full, and not `adapted`
    otherwise, by kind, "name [shape]" -> parameter: convolutions, embeddings, and linear maps that
    are no nn.Linear (fused experts, packed projections)."""
    kinds: dict[str, dict[str, nn.Parameter]] = {}
    for name, module in named_modules(model):
        if isinstance(module, LoRALayer) or is_linear(module) or module in trained:
            continue
        own = {n: p for n, p in module._parameters.items() if p is not None}
        stacked = {p.shape[0] for p in own.values() if p.dim() == 3}
        for attribute, parameter in own.items():
            kind = _kind(module, attribute, parameter, stacked)
            if kind is not None and parameter not in adapted:
                full = f"{name}.{attribute}".lstrip(".")
                kinds.setdefault(kind, {})[f"{full} {list(parameter.shape)}"] = parameter
    return kinds


def _kind(
    module: nn.Module, attribute: str, parameter: nn.Parameter, stacked: set[int]
) -> str | None:
    """What a parameter outside linear layers is; None for vectors. Of a module with `stacked`
    matrices [E, N, K], a parameter [E, N] holds vectors."""
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):  # of several dimensions
        return None
    if isinstance(module, nn.modules.conv._ConvNd):
        return CONVOLUTIONS if attribute == "weight" else None
    if isinstance(module, _EMBEDDINGS) or (parameter.dim() > 1 and _TABLES.search(attribute)):
        return EMBEDDINGS
    matrix = parameter.dim() in (2, 3) and min(parameter.shape) > 1
    vectors = parameter.dim() == 2 and parameter.shape[0] in stacked
    if not matrix or vectors or _ELEMENTWISE.search(attribute):
        return None
    return LINEAR_MAPS
