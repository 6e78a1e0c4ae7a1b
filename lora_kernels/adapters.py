"""The adapters of a whole model: its LoRA layers and the modules trained in full beside them.

A module trained in full (`modules_to_save`) keeps the originals of its parameters and of its
persistent buffers (running statistics) in non-persistent buffers `_lora_base_<name>`; that a tensor
has one is what marks it as part of the adapter. Within `disable_adapters` the two have changed
places; the module's `_lora_swapped` names the tensors, each with a stand-in of the trained values
for copies and pickles of the module, which are made as if nothing were disabled.
"""

import contextlib
import copy
import functools
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor, nn

from lora_kernels import names
from lora_kernels.bypass import update_fast_paths
from lora_kernels.nn import LoRALayer, NamedAdapter, TrainableTokens
from lora_kernels.nn.tensors import PISSA, Factors, note_frozen, thaw
from lora_kernels.nn.tokens import TOKENS, Tokens, move_into
from lora_kernels.offloading import OFFLOADED, is_offloaded, present
from lora_kernels.sharding import is_sharded

_BASE = "_lora_base_"
_SWAPPED = "_lora_swapped"
# Transformers' methods that put other modules in the place of a model's embeddings and head.
_REPLACING = ("resize_token_embeddings", "set_input_embeddings", "set_output_embeddings")


class Guard(NamedTuple):
    """What models of another library get with their first adapter, and what takes it away with the
    last."""

    put: Callable[[nn.Module], None]
    take: Callable[[nn.Module], None]


# Those of `integrations`, which lies above; the library's `__init__` fills it.
guards: list[Guard] = []


# A module, and what was prepared for it: its first adapter or a further one.
Prepared = tuple[nn.Module, LoRALayer | NamedAdapter]


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
        return self.tensor.detach() if self.swapped else self._other

    @property
    def trained(self) -> Tensor:
        return self._other if self.swapped else self.tensor.detach()

    @property
    def _other(self) -> Tensor:
        return self.module.get_buffer(_BASE + self.attribute)


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALayer]]:
    """(name in the plain model, layer) of every LoRA layer, shared ones once, in its order; of
    experts each parameter with adapters, by its name."""
    for name, module in names.named_modules(model):
        if isinstance(module, LoRALayer):
            yield name.removesuffix(module.suffix), module


def saved_tensors(model: nn.Module) -> Iterator[Saved]:
    """What is trained in full beside the LoRA layers: parameters, and buffers that go with them."""
    for name, module in names.named_modules(model):
        yield from saved_of(name, module)


def saved_of(name: str, module: nn.Module) -> Iterator[Saved]:
    """Those of one module of this name, without its submodules'."""
    if not any(key.startswith(_BASE) for key in module._buffers):
        return
    with present(module):
        for attribute, tensor in state_of(module).items():
            if _BASE + attribute in module._buffers:
                yield Saved(names.join(name, attribute), module, attribute, tensor)


def saved_modules(model: nn.Module) -> list[str]:
    """The names of the outermost modules that are trained in full, as PEFT takes them: it wraps
    no lists and dictionaries of modules."""
    found: list[str] = []
    inside: set[nn.Module] = set()
    for name, module in names.named_modules(model):
        if module in inside or isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            continue
        state = [(part, key) for part in module.modules() for key in state_of(part)]
        if name and state and all(_BASE + key in part._buffers for part, key in state):
            found.append(name)
            inside.update(module.modules())
    return found


def saved_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters among them, tied ones once."""
    tensors = (saved.tensor for saved in saved_tensors(model))
    yield from dict.fromkeys(t for t in tensors if isinstance(t, nn.Parameter))


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and persistent buffers of a module, without its submodules'."""
    found = {**module._parameters, **module._buffers}
    passing = module._non_persistent_buffers_set
    return {n: t for n, t in found.items() if t is not None and n not in passing}


@overload
def lora_parameters(model: nn.Module, *, adapter: str | None = None) -> Iterator[nn.Parameter]: ...


@overload
def lora_parameters(
    model: nn.Module, *, adapter: str | None = None, lr: float, loraplus_ratio: float
) -> list[dict[str, Any]]: ...


def lora_parameters(
    model: nn.Module,
    *,
    adapter: str | None = None,
    lr: float | None = None,
    loraplus_ratio: float | None = None,
) -> Iterator[nn.Parameter] | list[dict[str, Any]]:
    """What to give an optimizer: lora_A and lora_B of every layer, then the modules trained in
    full; or lora_A and lora_B of the adapter of this name alone. A lora_A of `freeze_a` is none.

    With lr and loraplus_ratio the groups of LoRA+ (Hayou et al., 2024, arXiv:2402.12354), as PEFT
    makes them: lora_B and vectors (biases, DoRA's magnitude) learn at lr * loraplus_ratio, all
    others at lr.

    Where pruning or a parametrization computes lora_A or lora_B, the parameters it computes them
    from. ValueError: accelerate has offloaded them, no adapter has this name, or one of lr and
    loraplus_ratio is missing or not positive.
    """
    if adapter is not None:
        require_name(model, adapter)
    require_loaded(model)
    if lr is None and loraplus_ratio is None:
        return _trained(model, adapter)
    for name, value in (("lr", lr), ("loraplus_ratio", loraplus_ratio)):
        if value is None or not 0 < value < math.inf:
            raise ValueError(f"{name}: expected a positive number beside the other, got {value!r}")
    assert lr is not None
    assert loraplus_ratio is not None
    fast = {
        parameter
        for _, layer in lora_layers(model)
        for one in layer.names
        for parameter in layer.adapter(one).factor_parameters("lora_B")
    }
    groups: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    for parameter in _trained(model, adapter):
        groups[parameter in fast or parameter.dim() == 1].append(parameter)
    rates = {False: lr, True: lr * loraplus_ratio}
    return [{"params": found, "lr": rates[key]} for key, found in groups.items() if found]


def _trained(model: nn.Module, adapter: str | None) -> Iterator[nn.Parameter]:
    for _, layer in lora_layers(model):
        for name in layer.names:
            if adapter in (None, name):
                yield from layer.adapter(name).trained_parameters()
    if adapter is None:
        yield from saved_parameters(model)


def frozen_factors(model: nn.Module, adapter: str | None) -> Iterator[nn.Parameter]:
    """The lora_A of `freeze_a`, of all adapters or of that of this name."""
    for _, layer in lora_layers(model):
        for name in layer.names:
            if adapter in (None, name) and layer.adapter(name).freeze_a:
                yield from layer.adapter(name).factor_parameters("lora_A")


def adapter_names(model: nn.Module) -> tuple[str, ...]:
    """The names of a model's adapters, in the order in which its layers have them."""
    return tuple(dict.fromkeys(name for _, layer in lora_layers(model) for name in layer.names))


def require_name(model: nn.Module, adapter: object) -> None:
    """ValueError for a name that no adapter of the model has; it lists those that there are."""
    known = adapter_names(model)
    if adapter not in known:
        there = ", ".join(map(repr, known)) or "none"
        raise ValueError(f"adapter: got {adapter!r}, the model's adapters are {there}")


def choose(model: nn.Module, adapter: str | None) -> str:
    """The adapter of this name; by default the only one, or the only one in use. ValueError where
    there is no such one."""
    if adapter is not None:
        require_name(model, adapter)
        return adapter
    found = only_or_in_use(model)
    if len(found) != 1:
        known, in_use = (", ".join(map(repr, names)) for names in (adapter_names(model), found))
        raise ValueError(f"adapter: the model has {known}, in use {in_use or 'none'}; name one")
    return found[0]


def only_or_in_use(model: nn.Module) -> tuple[str, ...]:
    """The only adapter of a model, or of several those in use."""
    known = adapter_names(model)
    if len(known) == 1:
        return known
    return tuple(dict.fromkeys(name for _, layer in lora_layers(model) for name in layer.active))


def adapters_of(model: nn.Module, adapter: str) -> dict[str, tuple[LoRALayer, Factors]]:
    """name of the layer -> (the layer, its adapter of this name), where it has it."""
    return {
        name: (layer, layer.adapter(adapter))
        for name, layer in lora_layers(model)
        if adapter in layer.names
    }


def require_loaded(model: nn.Module, layers: bool = True) -> None:
    """ValueError where accelerate has offloaded what is trained, in LoRA `layers` or in full: a
    change of it would be lost."""
    for name, module in model.named_modules():
        in_full = any(key.startswith(_BASE) for key in module._buffers)
        of_layer = layers and isinstance(module, (LoRALayer, NamedAdapter))
        if (in_full or of_layer) and is_offloaded(module):
            raise ValueError(f"model: {name} is {OFFLOADED}")


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's part of `model.state_dict()`: load it with `load_state_dict(...,
    strict=False)` into a model that is wrapped (compiled, DDP) in the same way.

    Pruned or parametrized factors are given as they act, for layers that are not.
    """
    state: dict[str, Tensor] = {}
    saved: dict[str, Tensor] = {}
    for _, name, module in names.keyed_modules(model):
        if isinstance(module, LoRALayer):
            tensors: dict[str, Tensor | None] = {}
            for adapter in module.names:
                prefix, one = module.prefix(adapter), module.adapter(adapter)
                with present(one):
                    tensors |= {prefix + key: one.factor(key) for key in one.adapter_parameters}
            tensors |= {key: getattr(module, key) for key in PISSA}
            found = {names.join(name, k): t.detach() for k, t in tensors.items() if t is not None}
            state |= found
        saved |= {one.name: one.trained for one in saved_of(name, module)}
    return state | saved


def require_layers(model: nn.Module) -> list[tuple[str, LoRALayer]]:
    """The LoRA layers; ValueError where there is none."""
    layers = list(lora_layers(model))
    if not layers:
        raise ValueError(f"model: {type(model).__name__} has no LoRA layer; call apply_lora first")
    return layers


def attach_other(
    model: nn.Module,
    adapter: str,
    prepared: Iterable[Prepared],
    trainable: set[nn.Parameter],
) -> None:
    """Gives layers of a model that has adapters one more, which is not in use; what else is trained
    stays as it is."""
    for module, other in prepared:
        if isinstance(other, NamedAdapter):
            assert isinstance(module, LoRALayer)  # for which it was prepared
            module.put_other(adapter, other)
        else:
            other.activate(())
            note_frozen(module, {name for name, p in module._parameters.items() if p in trainable})
            other.move_into(module)
    update_fast_paths(model)
    _guard_embeddings(model)


def attach(
    model: nn.Module,
    layers: Iterable[Prepared],
    saved: dict[str, nn.Module],
    trainable: set[nn.Parameter],
    tokens: Iterable[Tokens] = (),
) -> None:
    """Gives linear layers the adapters prepared for them, and tables rows to be trained, and leaves
    only those and what is `saved` trainable.

    Each module notes which of its `trainable` parameters that freezes.
    """
    for linear, layer in layers:
        assert isinstance(layer, LoRALayer)  # the module's first
        layer.move_into(linear)
    update_fast_paths(model)
    _guard_embeddings(model)
    for outer in saved.values():
        for module in outer.modules():
            for attribute, tensor in state_of(module).items():
                if _BASE + attribute not in module._buffers:
                    base = tensor.detach().clone()
                    module.register_buffer(_BASE + attribute, base, persistent=False)
    for of_one in tokens:
        move_into(of_one)
        for module in of_one.modules:
            base = module.get_parameter(TOKENS).detach().clone()
            module.register_buffer(_BASE + TOKENS, base, persistent=False)
    for module in model.modules():
        note_frozen(module, {name for name, p in module._parameters.items() if p in trainable})
    model.requires_grad_(False)
    for parameter in lora_parameters(model):
        parameter.requires_grad_(True)


def guard(model: nn.Module) -> None:
    """Has the model, and those within it, heed their adapters in what other libraries do."""
    for one in guards:
        one.put(model)


def unguard(model: nn.Module) -> None:
    """Undoes `guard`."""
    for one in guards:
        one.take(model)


class Before:
    """All there is to a model but its values, to be brought back: modules, their classes, whatever
    they hold, flags of parameters; and the values of what is given to `keep`."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = {m: (type(m), dict(vars(m)), _contents(m)) for m in model.modules()}
        self.flags = {p: p.requires_grad for p in model.parameters()}
        self.values: list[tuple[Tensor, Tensor]] = []

    @property
    def trainable(self) -> set[nn.Parameter]:
        return {parameter for parameter, flag in self.flags.items() if flag}

    def keep(self, tensor: Tensor) -> None:
        """Copies a tensor that is about to be changed in place, to host memory if it is whole."""
        device = tensor.device if is_sharded(tensor) else "cpu"
        self.values.append((tensor, tensor.detach().to(device, copy=True)))

    @torch.no_grad()
    def restore(self) -> None:
        for tensor, value in self.values:
            tensor.copy_(value)
        for module, (kind, held, contents) in self.modules.items():
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(held)
            for key, content in contents.items():
                held[key].clear()
                (held[key].extend if isinstance(content, list) else held[key].update)(content)
        for parameter, flag in self.flags.items():
            parameter.requires_grad_(flag)


def _contents(module: nn.Module) -> dict[str, dict[str, Any] | set[Any] | list[Any]]:
    """Copies of a module's registries, parameters, buffers, submodules, hooks, and of its own."""
    held = vars(module).items()
    return {k: copy.copy(v) for k, v in held if type(v) in (dict, set, list, OrderedDict)}


@contextlib.contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[Before]:
    """Whatever ends what is done within it early, Ctrl-C too, leaves the model as it was.

    ValueError: accelerate has offloaded what is trained.
    """
    require_loaded(model)
    before = Before(model)
    try:
        yield before
    except BaseException:
        before.restore()
        raise


@torch.no_grad()
def detach(model: nn.Module) -> None:
    """Undoes `attach`, in a part of a model too: plain layers that hold the same weights, gradients
    as they were; what was added since stays as it is."""
    for _, layer in list(lora_layers(model)):
        layer.move_out()
    update_fast_paths(model)
    release_saved(model, keep_saved=False)
    for module in model.modules():
        for method in _REPLACING:
            module.__dict__.pop(method, None)
        thaw(module)


@torch.no_grad()
def release_saved(model: nn.Module, keep_saved: bool) -> None:
    """Ends full training of `modules_to_save` and of rows of tables, with their trained or their
    original values."""
    for saved in list(saved_tensors(model)):
        saved.tensor.copy_(saved.trained if keep_saved else saved.base)
        _end_swap(saved)
        del saved.module._buffers[_BASE + saved.attribute]
        saved.module._non_persistent_buffers_set.discard(_BASE + saved.attribute)
        saved.tensor.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, TrainableTokens):
            module.move_out(keep_saved)


def swap_saved(tensors: list[Saved]) -> None:
    """Exchanges the trained and the original values of what is trained in full, tied ones once.

    Those released in the meantime are left alone.
    """
    replaced: dict[Tensor, tuple[Tensor, Tensor]] = {}
    for saved in tensors:
        buffers, name = saved.module._buffers, _BASE + saved.attribute
        if name not in buffers:
            continue
        if saved.tensor not in replaced:
            replaced[saved.tensor] = saved.tensor.data, copy.copy(saved.tensor)
            saved.tensor.data = saved.module.get_buffer(name)
        buffers[name], trained = replaced[saved.tensor]
        if saved.swapped:
            _end_swap(saved)
        else:
            held = vars(saved.module)
            held.setdefault(_SWAPPED, {})[saved.attribute] = trained
            held["__getstate__"] = functools.partial(_state_of_copy, saved.module)


def _end_swap(saved: Saved) -> None:
    held = vars(saved.module)
    held.get(_SWAPPED, {}).pop(saved.attribute, None)
    if not held.get(_SWAPPED):
        held.pop("__getstate__", None)


def _state_of_copy(module: nn.Module) -> dict[str, Any]:
    """What a copy or pickle gets of a module whose trained and original values have changed
    places. Tied parameters stay one: all modules hold the same stand-in."""
    state = {k: v for k, v in vars(module).items() if k not in (_SWAPPED, "__getstate__")}
    for kind in ("_parameters", "_buffers"):
        state[kind] = dict(state[kind])
    for name, stand_in in vars(module)[_SWAPPED].items():
        kind = "_parameters" if name in module._parameters else "_buffers"
        original = state[kind][name]
        stand_in.data, stand_in.grad = state["_buffers"][_BASE + name], original.grad
        stand_in.requires_grad_(original.requires_grad)
        state[kind][name] = stand_in
        state["_buffers"][_BASE + name] = original.detach()
    return state


def _guard_embeddings(model: nn.Module) -> None:
    """Makes Transformers' models refuse to replace an embedding or a head that holds something
    trained: they would put a plain one there and say nothing."""
    for module in model.modules():
        for method in _REPLACING:
            if callable(getattr(type(module), method, None)):
                setattr(module, method, functools.partial(_replace, module, method))


def _replace(module: nn.Module, method: str, *args: Any, **kwargs: Any) -> object:
    resizes = method == "resize_token_embeddings"
    for kind in ("input", "output"):
        if not resizes and kind not in method:
            continue
        find = getattr(module, f"get_{kind}_embeddings", None)
        old = find() if callable(find) else None
        if old is None or old in args or old in kwargs.values():
            continue
        trained = isinstance(old, LoRALayer) or next(saved_tensors(old), None) is not None
        if trained and not (resizes and _keeps_size(old, *args, **kwargs)):
            name = next(name for name, other in module.named_modules() if other is old)
            raise ValueError(
                f"{method}: would replace {name}, which carries an adapter or is trained in full;"
                " call it before apply_lora, or save_adapter and remove_lora(model) first"
            )
    return getattr(type(module), method)(module, *args, **kwargs)


def _keeps_size(
    old: nn.Embedding | nn.Linear,
    new_num_tokens: int | None = None,
    pad_to_multiple_of: int | None = None,
    mean_resizing: bool = True,
) -> bool:
    size = old.weight.shape[0]
    return new_num_tokens in (None, size) and size % (pad_to_multiple_of or 1) == 0
