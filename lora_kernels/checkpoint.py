"""Adapters as PEFT's two files: adapter_model.safetensors and adapter_config.json."""

import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lora_kernels import adapters, formats, names, peft_targets, targets
from lora_kernels.adapter_files import naming, shown
from lora_kernels.adapters import lora_layers
from lora_kernels.bases import computed, features, is_convolution
from lora_kernels.bypass import bypassed
from lora_kernels.nn import (
    DEFAULT,
    AdapterOptions,
    LoRAExpertProduct,
    LoRALayer,
    check_name,
    conv,
    layer_class,
)
from lora_kernels.nn.experts import from_peft, matrices, to_peft
from lora_kernels.nn.tensors import FACTORS, MAGNITUDE, Factors
from lora_kernels.nn.tokens import TOKENS
from lora_kernels.peft_config import FACTOR_KEY, MAGNITUDE_KEY, PREFIX, Config
from lora_kernels.sharding import copy_whole, is_sharded, whole
from lora_kernels.tokens import read_rows, token_rows

_ROWS = re.compile(r"(.+)\.token_adapter\.trainable_tokens_delta")
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def save_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    base_model: str | None = None,
    adapter: str | None = None,
) -> None:
    """Writes the adapter of a model in PEFT's format; PEFT's `PeftModel.from_pretrained` reads it.

    An interrupted save leaves the old adapter: both files are written before either is replaced,
    and `load_adapter` notices files of two saves. An adapter started with PiSSA or OLoRA is written
    relative to the original base, as plain LoRA of rank 2r. All ranks of a sharded model make the
    call: it gathers, and rank 0 writes. Names are the plain model's, without the parts that
    torch.compile, DistributedDataParallel and other wrappers put in.

    Warns (UserWarning) of parameters that train and are not in the files, and of layers that PEFT
    would compute differently.

    Args:
        directory: made if missing.
        base_model: name or path of the base, for the config; the model's own `name_or_path` by
            default.
        adapter: the name of one of several; by default the only one, or the only one in use.

    Raises:
        ValueError: the model has no LoRA layer, or several adapters and none is named, or none of
            this name. RuntimeError: it was merged with keep_base=False.
    """
    model = names.unwrapped(model)
    layers = adapters.require_layers(model)
    for name, layer in layers:
        if layer._merged == "final":
            raise RuntimeError(f"{name}: merged with keep_base=False, there is no adapter to save")
    chosen = adapters.choose(model, adapter)
    _warn_of_unsaved(model)
    factors = {
        name: layer.delta_factors() if one is layer else one.factors()
        for name, (layer, one) in adapters.adapters_of(model, chosen).items()
    }
    write_files(model, Path(directory), factors, base_model, adapter=chosen)


def _warn_of_unsaved(model: nn.Module) -> None:
    """Names the parameters that train and are no part of the adapter."""
    saved = set(adapters.saved_parameters(model))
    for _, layer in lora_layers(model):
        for adapter in layer.names:
            saved.update(layer.adapter(adapter).factor_parameters())
    left_out = [
        names.join(name, attribute)
        for name, module in names.named_modules(model)
        for attribute, parameter in module._parameters.items()
        if parameter is not None
        and parameter.requires_grad
        and not parameter.is_meta
        and parameter not in saved
    ]
    if left_out:
        warnings.warn(
            f"{targets.summary(left_out)}: trainable, but no part of the adapter and not in its"
            " files; name their modules in modules_to_save of apply_lora, or freeze them",
            stacklevel=3,
        )


def write_files(
    model: nn.Module,
    directory: Path,
    factors: Mapping[str, Sequence[Tensor]],
    base_model: str | None,
    given: Mapping[str, Tensor] | None = None,
    adapter: str = DEFAULT,
) -> None:
    """Writes both files of an adapter, with the layers of `factors`, by name. Of what is `given`,
    by its name in the model, those tensors; the model's own otherwise."""
    tensors = {}
    places = targets.expert_parameters(model)
    of_experts = {name: places[name] for name in factors if name in places}
    wrapped = _wrapped(of_experts)
    of_layers = adapters.adapters_of(model, adapter)
    found = {name: one for name, (_, one) in of_layers.items() if name in factors}
    for name, pair in factors.items():
        layer, _ = of_layers[name]
        if name in of_experts:
            pair = to_peft(*map(whole, pair))
        elif is_convolution(layer):
            pair = conv.to_peft(layer, *map(whole, pair))
        magnitude = found[name].magnitude()
        if magnitude is not None:
            own = names.join(name, MAGNITUDE)
            tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = (given or {}).get(own, magnitude)
        key = "lora_embedding_{}" if isinstance(layer, nn.Embedding) else "lora_{}.weight"
        for part, tensor in zip("AB", pair, strict=True):
            tensors[f"{PREFIX}{wrapped.get(name, name)}.{key.format(part)}"] = tensor
    rows = token_rows(model)
    for saved in adapters.saved_tensors(model):
        if saved.attribute != TOKENS:
            tensors[PREFIX + saved.name] = (given or {}).get(saved.name, saved.trained)
        elif saved.name.rpartition(".")[0] in rows:
            key = saved.name.removesuffix(TOKENS) + "token_adapter.trainable_tokens_delta"
            tensors[PREFIX + key] = (given or {}).get(saved.name, saved.trained)
    # Safetensors takes no two tensors in one storage: tied modules_to_save are written twice.
    for key, tensor in tensors.items():
        if tensor.is_meta:
            raise ValueError(f"model: {key} is on the meta device, there are no values to save")
    sharded = any(map(is_sharded, tensors.values()))
    tensors = {
        key: whole(t.detach()).to("cpu", copy=True).contiguous() for key, t in tensors.items()
    }
    if sharded and dist.get_rank() != 0:
        return
    config = _config(model, found, {n: a.shape[found[n].rank_dim] for n, (a, _) in factors.items()})
    config["base_model_name_or_path"] = base_model or getattr(model, "name_or_path", None) or None
    peft_targets.warn_of_differences(model, config, tensors)
    dropouts = {one.dropout for one in found.values()}
    if config["target_parameters"] and any(dropouts):
        warnings.warn(
            "lora_dropout: written as 0, PEFT has none for experts and what it takes for them"
            f" ({targets.summary(config['target_parameters'])}); set it again to go on training",
            stacklevel=3,
        )
    formats.write(directory, config, tensors)


def _config(
    model: nn.Module, layers: Mapping[str, Factors], ranks: Mapping[str, int]
) -> dict[str, Any]:
    """PEFT's LoraConfig as JSON, of one adapter of each layer and the ranks that are written;
    layers that differ from the first go to rank_pattern, alpha_pattern."""
    first = next(iter(layers))
    dora = [name for name, layer in layers.items() if layer.magnitude() is not None]
    if dora and len(dora) < len(layers):
        others = targets.summary(name for name in layers if name not in dora)
        raise ValueError(
            f"model: {targets.summary(dora)} have DoRA and {others} have not, which PEFT's config"
            " cannot say"
        )
    rslora = layers[first].use_rslora and all(
        layer.use_rslora and layer.alpha is not None and ranks[name] == layer.rank
        for name, layer in layers.items()
    )
    turned = {name for name, layer in lora_layers(model) if layer.fan_in_fan_out}

    def alpha(name: str) -> float:
        """The alpha from which PEFT computes the layer's scaling."""
        layer = layers[name]
        stored = rslora or (
            layer.alpha is not None and not layer.use_rslora and ranks[name] == layer.rank
        )
        own = layer.alpha if stored else None
        value = layer.scaling * ranks[name] if own is None else own
        return int(value) if value == int(value) else value

    experts = set(targets.expert_parameters(model)).intersection(layers)
    linear = [name for name in layers if name not in experts]
    as_parameters = peft_targets.taken_for_experts(model, linear)

    def whole(name: str) -> str:
        """A pattern for this name alone: PEFT takes others as last parts of names."""
        return "^" + re.escape(name) + (r"(\.weight)?" if name in as_parameters else "")

    return {
        "peft_type": "LORA",
        "bias": "none",
        "fan_in_fan_out": not turned.isdisjoint(layers),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha(first),
        # PEFT has no dropout for adapters of parameters, and refuses a config with both.
        "lora_dropout": 0.0 if as_parameters or experts else layers[first].dropout,
        "modules_to_save": peft_targets.saved_names(model) or None,
        "r": ranks[first],
        "rank_pattern": {whole(n): r for n, r in ranks.items() if r != ranks[first]},
        "alpha_pattern": {whole(n): alpha(n) for n in layers if alpha(n) != alpha(first)},
        "target_modules": peft_targets.target_names(
            model, [name for name in linear if name not in as_parameters]
        ),
        "target_parameters": [
            *(f"{name}.weight" for name in as_parameters),
            *peft_targets.parameter_names(model, experts),
        ]
        or None,
        "task_type": None,
        "trainable_token_indices": token_rows(model) or None,
        "use_dora": bool(dora),
        "use_rslora": rslora,
    }


def _wrapped(places: Mapping[str, tuple[nn.Module, str]]) -> dict[str, str]:
    """Where PEFT has the adapters of these parameters, by their names: it wraps a module for the
    first of them that it holds, and the wrapper for the next."""
    found = {}
    for name, (module, parameter) in places.items():
        after = [*module._parameters][[*module._parameters].index(parameter) + 1 :]
        outside = sum(place[0] is module and place[1] in after for place in places.values())
        found[name] = name.removesuffix(f".{parameter}") + ".base_layer" * outside
    return found


# ------------------------------------------------------------------------------------------ loading


@torch.no_grad()
def load_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    strict: bool = False,
    adapter: str | None = None,
) -> None:
    """Reads an adapter's files into a model: into its LoRA layers, or into a model that has none
    yet; or as one of several, with a name.

    Everything is checked first; on an error nothing in the model has changed. A model that has its
    LoRA layers may be sharded: every rank reads the files and takes its part.

    Warns (UserWarning) of what is not loaded: layers of the config and modules trained in full that
    the file lacks, adapters that compute nothing and have no place in the model, options of the
    config that are unknown; and of a new head that neither it nor the model's checkpoint holds.

    Args:
        directory: with PEFT's two files (adapter_model.bin and sharded files too), or MLX's
            (adapters.safetensors); or a file of Diffusers or kohya, or a directory with
            pytorch_lora_weights.safetensors, of which a model takes its own part.
        strict: what is not loaded is an error.
        adapter: the name of the adapter that takes what is read; a new one is added to those of the
            model, which go on being used. By default the only one, "default" if there is none.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file (named) is truncated, damaged, is not of the same save as the other, uses
            an option of PEFT that this library lacks, or holds a tensor (named) that is non-finite
            or does not fit the model.
    """
    model = names.unwrapped(model)
    targets.require_no_peft(model)
    targets.require_shapes(model)
    known = adapters.adapter_names(model)
    if adapter is None and len(known) > 1:
        raise ValueError(
            f"adapter: the model has several, {', '.join(map(repr, known))}; name one of them, or"
            " a new one"
        )
    name = next(iter(known), DEFAULT) if adapter is None else check_name(adapter)
    read = formats.read(Path(directory), model)
    with adapters.all_or_nothing(model) as before, naming(read.file):
        _load(model, name, read, strict, before)


def _load(
    model: nn.Module, adapter: str, read: formats.Adapter, strict: bool, before: adapters.Before
) -> None:
    config, left_out = read.config, list(read.left_out)
    places = targets.expert_parameters(model)
    pairs, magnitudes, saved, rows = _sort(model, adapter, read, left_out)
    tokens, values_of_rows = read_rows(model, config.entries.get("trainable_token_indices"), rows)
    in_full = saved.keys()
    saved = saved | values_of_rows
    others = dict(lora_layers(model))
    present = adapters.adapters_of(model, adapter)
    further = bool(others) and not present
    if further and saved:
        raise ValueError(
            f"{targets.summary(saved)}: trained in full, which all adapters of a model share; load"
            " this adapter as the model's first"
        )
    if present and set(present) != set(pairs):
        extra = [name for name in pairs if name not in present]
        for name in [name for name in extra if _is_idle(pairs[name])]:
            del pairs[name]
            left_out.append(f"{name}: its adapter is zero, and the model has none there")
        extra, missing = sorted(set(pairs) - set(present)), sorted(set(present) - set(pairs))
        if extra or missing:
            raise ValueError(
                "the adapter's layers are not the model's:"
                + (f" the file alone has {targets.summary(extra)};" if extra else "")
                + (f" the model alone has {targets.summary(missing)};" if missing else "")
                + " remove_lora(model) first to take them from the file"
            )
    _say(model, config, pairs, saved, left_out, strict)
    modules = dict(names.named_modules(model))
    saved_modules = {n.rpartition(".")[0]: modules[n.rpartition(".")[0]] for n in in_full}
    targets.require_whole_ties(model, saved_modules)
    past = bypassed(model)
    idle = [name for name in pairs if modules.get(name) in past]
    if idle:
        warnings.warn(
            f"adapters on {targets.summary(idle)} may have no part in the output:"
            f" {past[modules[idle[0]]]}; check_adapters(model, ...) with a batch tells",
            stacklevel=4,
        )
    made: list[adapters.Prepared] = []
    values = {}
    for name, (A, B) in pairs.items():
        rank, alpha, use_rslora = config.layer(name)
        base, parameter = places.get(name, (modules.get(name), None))
        assert base is not None  # of `_sort`
        options = AdapterOptions(
            rank, use_rslora=use_rslora, name=adapter, use_dora=config.use_dora
        )
        if parameter is None and not is_convolution(base):
            _check_pair(name, base, A, B, rank, config.origin)
        elif parameter is not None and A.shape[1] != rank:
            raise ValueError(f"{name}: has rank {A.shape[1]} in the file, {rank} in its config")
        if name in present:
            layer, one = present[name]
            _check_present(name, layer, one, A, config.use_dora)
            for trained in one.factor_parameters():
                before.keep(trained)
        elif name in others:
            made.append((base, others[name].prepare_other(options)))
        elif parameter is not None:
            made.append((base, LoRAExpertProduct.prepare(base, parameter, options)))
        else:
            made.append((base, layer_class(base, config.use_dora)._prepare(base, options)))
        values[name] = (A, B, alpha, use_rslora)

    if further:
        adapters.attach_other(model, adapter, made, before.trainable)
    elif made or saved_modules or tokens:
        adapters.attach(model, made, saved_modules, before.trainable, tokens)
    adapters.guard(model)
    attached = adapters.adapters_of(model, adapter)
    for name, (A, B, alpha, use_rslora) in values.items():
        _, one = attached[name]
        copy_whole(one.lora_A, A)
        copy_whole(one.lora_B, B)
        if name in magnitudes:
            copy_whole(getattr(one, MAGNITUDE), magnitudes[name])
        one.alpha, one.use_rslora = alpha, use_rslora
        one.dropout = config.dropout
    for name, tensor in saved.items():
        owner, _, attribute = name.rpartition(".")
        target = getattr(modules[owner], attribute)
        before.keep(target)
        copy_whole(target, tensor)


def _say(
    model: nn.Module,
    config: Config,
    pairs: Mapping[str, object],
    saved: Mapping[str, Tensor],
    left_out: list[str],
    strict: bool,
) -> None:
    """Warns of everything that is not loaded and that the config speaks of; raises if strict."""
    modules = dict(names.named_modules(model))
    can = targets.is_target if config.names_targets else targets.is_linear
    linear = [n for n, m in modules.items() if can(m)]
    head = getattr(model, "get_output_embeddings", lambda: None)()
    head = next((name for name, module in modules.items() if module is head), None)
    able = [
        name
        for name in linear
        if isinstance(modules[name], LoRALayer) or targets.objection(modules[name]) is None
    ]
    experts = targets.expert_parameters(model)
    targeted = [*config.targeted(able, head), *config.parameters(experts)]
    missing = sorted(set(targeted) - set(pairs))
    if missing:
        left_out.append(f"{targets.summary(missing)}: targets of the config, not in the file")
    for parameter in config.target_parameters:
        able_ones = [*(f"{name}.weight" for name in linear), *experts]
        if not any(f".{name}".endswith(f".{parameter}") for name in able_ones):
            left_out.append(
                f"target_parameters: {parameter!r} is not the weight of a linear layer or of"
                " experts of the model, and no other parameter can carry an adapter"
            )
    there = list(adapters.saved_tensors(model))
    read = {one.tensor for one in there if one.name in saved}
    kept = [one.name for one in there if one.tensor not in read]
    for wanted in config.modules_to_save:
        places = [n for n, m in modules.items() if f".{n}".endswith(f".{wanted}")]
        held = any(
            f"{name}.".startswith(f"{place}.") for name in (*saved, *kept) for place in places
        )
        if places and not held and any(adapters.state_of(modules[n]) for n in places):
            left_out.append(f"modules_to_save: {wanted!r} is not in the file")
    if config.entries.get("trainable_token_indices") and not any(n.endswith(TOKENS) for n in saved):
        left_out.append("trainable_token_indices: their rows are not in the file")
    if kept:
        left_out.append(
            f"{targets.summary(kept)}: trained in full in the model but not in the file, it keeps"
            " its values"
        )
    if config.unknown:
        entries = ", ".join(f"{n} = {shown(config.entries[n])}" for n in config.unknown)
        left_out.append(f"options that this library does not know: {entries}")
    if left_out and strict:
        raise ValueError(f"strict: not all of it can be loaded: {'; '.join(left_out)}")
    for one in left_out:
        warnings.warn(f"load_adapter: not loaded: {one}", stacklevel=4)
    fresh = [
        name
        for name in targets.unloaded_heads(model)
        if not any(f"{one}.".startswith(f"{name}.") for one in (*saved, *kept))
    ]
    if fresh:
        warnings.warn(
            f"load_adapter: {targets.summary(fresh)}: a new head, in neither the model's checkpoint"
            " nor the adapter's file; unless you have set its values they are random",
            stacklevel=4,
        )


def _sort(
    model: nn.Module, adapter: str, read: formats.Adapter, left_out: list[str]
) -> tuple[
    dict[str, tuple[Tensor, Tensor]], dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]
]:
    """(layer name -> (A, B), with DoRA -> magnitude, name -> tensor of modules_to_save, table ->
    rows of it), each found in the model, whose adapter of this name they are to be.

    Adapters without effect where no adapter can be are noted in `left_out`."""
    modules, config = dict(names.named_modules(model)), read.config
    tensors_there = {
        names.join(prefix, name): tensor
        for prefix, module in modules.items()
        for name, tensor in adapters.state_of(module).items()
    }
    halves: dict[str, dict[str, Tensor]] = {}
    magnitudes, saved, rows = {}, {}, {}
    for key, tensor in read.tensors.items():
        name = key.removeprefix(PREFIX)
        if config.use_dora and (found := MAGNITUDE_KEY.fullmatch(name)) is not None:
            magnitudes[found["layer"]] = tensor
            continue
        if (found := _ROWS.fullmatch(name)) is not None:
            rows[found.group(1)] = tensor
            continue
        if (found := FACTOR_KEY.fullmatch(name)) is not None:
            layer, part = found["layer"], found["part"]
            if layer.replace(".base_layer", "") not in modules:
                known = targets.summary(n for n, m in modules.items() if targets.is_linear(m))
                raise ValueError(
                    f"{key}: the model has no module {layer!r}; its linear layers are"
                    f" {known}{config.origin}"
                )
            if tensor.dtype not in _FLOATS:
                raise ValueError(f"{key}: has dtype {tensor.dtype}, expected a floating one")
            halves.setdefault(layer, {})[part] = tensor
            continue
        name = name.replace(".base_layer.", ".")
        if name not in tensors_there:
            raise ValueError(f"{key}: the model has no parameter or buffer {name!r}{config.origin}")
        _check_beside(key, name, tensor, tensors_there[name], config.origin)
        if ".base_layer." not in key and config.is_saved(name.rpartition(".")[0]):
            saved[name] = tensor
        elif not _is_same(tensor, tensors_there[name]):
            raise ValueError(
                f"{key}: differs from the model's {name}, and modules_to_save of the config does"
                " not name it: the adapter was trained on other base weights. Copy it into the"
                " model first, if that is what you want"
            )
    if not halves:
        raise ValueError(
            f"the adapter file holds no LoRA tensor, only {targets.summary(read.tensors)}"
        )
    for layer, parts in halves.items():
        for part in "AB":
            if part not in parts:
                raise ValueError(
                    f"{PREFIX}{layer}.lora_{part}.weight: missing from the adapter file"
                )
    pairs = {layer: (parts["A"], parts["B"]) for layer, parts in halves.items()}
    places = targets.expert_parameters(model)
    # PEFT wraps what else of the same modules it names too.
    held = {
        names.join(name.rpartition(".")[0], key): (module, key)
        for name, (module, _) in places.items()
        for key in module._parameters
    }
    of_experts = {name: held[name] for name in config.parameters(held)}
    for name, layer in _wrapped(of_experts).items():
        if layer in pairs and name in places:
            weight, _ = matrices(*places[name])
            try:
                pairs[name] = from_peft(*pairs.pop(layer), weight)
            except ValueError as error:
                key = f"{PREFIX}{layer}.lora_A.weight"
                raise ValueError(f"{key}: {error} for {name}{config.origin}") from None
    for layer in list(pairs):
        if layer in places:
            continue
        # None for a second adapter of one module, which is one of a parameter.
        module = modules.get(layer)
        if module is not None and targets.is_target(module):
            there = isinstance(module, LoRALayer) and adapter in module.names
            why = None if there else targets.objection(module, adapter)
            # PEFT computes nothing from an adapter there: attention reads the weight itself.
            unused = isinstance(modules[layer.rpartition(".")[0]], nn.MultiheadAttention)
            parameter = False
        else:
            why, unused, parameter = "is no linear layer", False, True
        if why is None:
            continue
        if unused or _is_idle(pairs[layer]):
            left_out.append(f"{layer}: {why}; its adapter has no effect")
        elif parameter:
            left_out.append(
                f"{layer}: {why} (fused experts, an embedding); its adapter, which is not zero, is"
                " not loaded and the model computes without it: PEFT and fuse_peft have it"
            )
        else:
            raise ValueError(
                f"{PREFIX}{layer}.lora_A.weight: cannot go to {layer}: {why}, and its adapter is"
                " not zero"
            )
        del pairs[layer]
    if not pairs:
        raise ValueError(f"no adapter of the file can go to the model: {'; '.join(left_out)}")
    _take_convolutions(modules, pairs, read)
    if config.use_dora:
        _check_magnitudes(pairs, magnitudes)
    return pairs, magnitudes, saved, rows


def _take_convolutions(
    modules: Mapping[str, nn.Module], pairs: dict[str, tuple[Tensor, Tensor]], read: formats.Adapter
) -> None:
    """Makes of PEFT's A and B of convolutions this library's."""
    for name, pair in pairs.items():
        module = modules.get(name)
        if module is None or not is_convolution(module):
            continue
        key = f"{PREFIX}{name}.lora_A.weight"
        if read.config.use_dora:
            raise ValueError(f"{key}: use_dora on convolutions is not supported, only PEFT has it")
        reason = conv.why_not_in_peft(module)
        if reason is not None and not read.own:
            raise ValueError(
                f"{key}: was trained without the {reason} of {name}, which PEFT's adapter does not"
                " have; here it would compute something else"
            )
        try:
            pairs[name] = conv.from_peft(module, *pair, read.config.layer(name)[0])
        except ValueError as error:
            raise ValueError(f"{key}: {error}{read.config.origin}") from None


def _check_magnitudes(
    pairs: Mapping[str, tuple[Tensor, Tensor]], magnitudes: Mapping[str, Tensor]
) -> None:
    """Of DoRA: one [N] of every layer."""
    for layer, (_, B) in pairs.items():
        key = f"{PREFIX}{layer}.lora_magnitude_vector"
        if B.dim() != 2:
            raise ValueError(f"{key}: use_dora on experts is not supported")
        if layer not in magnitudes:
            raise ValueError(f"{key}: missing from the adapter file, whose config has use_dora")
        tensor = magnitudes[layer]
        if tensor.dtype not in _FLOATS or tensor.shape != B.shape[:1]:
            raise ValueError(
                f"{key}: has {tensor.dtype} {tuple(tensor.shape)}, expected a floating dtype and"
                f" shape [{B.shape[0]}]"
            )


def _is_idle(pair: tuple[Tensor, Tensor]) -> bool:
    return not all(tensor.any() for tensor in pair)


def _check_beside(key: str, name: str, tensor: Tensor, there: Tensor, origin: str) -> None:
    """A tensor of the model itself, stored beside the adapter."""
    if tensor.shape != there.shape:
        resized = (
            "; was its vocabulary resized? Call model.resize_token_embeddings first"
            if tensor.dim() == 2 and tensor.shape[1:] == there.shape[1:]
            else ""
        )
        raise ValueError(
            f"{key}: has shape {tuple(tensor.shape)}, the model's {name} has"
            f" {tuple(there.shape)}{resized}{origin}"
        )
    alike = tensor.dtype in _FLOATS if there.is_floating_point() else tensor.dtype == there.dtype
    if not alike:
        raise ValueError(f"{key}: has dtype {tensor.dtype}, the model's {name} has {there.dtype}")


def _is_same(tensor: Tensor, there: Tensor) -> bool:
    """Whether they are equal in the narrower of their dtypes."""
    there = whole(there.detach()).to(tensor.device)
    if there.is_meta:
        return False
    return torch.equal(tensor.to(there.dtype), there) or torch.equal(there.to(tensor.dtype), tensor)


def _check_pair(name: str, module: nn.Module, A: Tensor, B: Tensor, rank: int, origin: str) -> None:
    key = f"{PREFIX}{name}.lora_"
    K, N = features(module)
    for part, tensor, shape in (("A", A, (rank, K)), ("B", B, (N, rank))):
        if tensor.shape != shape:
            raise ValueError(
                f"{key}{part}.weight: has shape {tuple(tensor.shape)}, expected {shape}"
                f" for rank {rank} of the config and {name}"
                f" ({K} -> {N}){origin}"
            )


def _check_present(
    name: str, layer: LoRALayer, adapter: Factors, A: Tensor, use_dora: bool
) -> None:
    key = f"{PREFIX}{name}.lora_A.weight"
    if layer.merged:
        raise ValueError(f"{key}: {name} is merged; unmerge_lora(model) first")
    reason = layer.why_fixed() or computed(adapter, FACTORS)
    with_dora = MAGNITUDE in adapter.adapter_parameters
    if reason is None and with_dora != use_dora:
        have = ("has" if with_dora else "has no", "is" if use_dora else "is not")
        reason = f"it {have[0]} lora_magnitude and the file {have[1]} of DoRA"
    elif reason is None and not with_dora:
        reason = layer.why_more_than_factors()
    if reason is not None:
        raise ValueError(f"{key}: cannot go to {name}: {reason}; remove_lora(model) first")
    if layer.pissa_A is not None:
        raise ValueError(
            f"{key}: {name} was started with PiSSA or OLoRA and no longer holds its original"
            " base; remove_lora(model) first"
        )
    rank = A.shape[adapter.rank_dim]
    if rank != adapter.rank:
        raise ValueError(f"{key}: has rank {rank}, the model's layer has rank {adapter.rank}")
