"""Adapters as PEFT's two files: adapter_model.safetensors and adapter_config.json."""

import functools
import inspect
import json
import math
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lora_kernels import adapters, names, options, peft_targets, targets
from lora_kernels.adapters import lora_layers
from lora_kernels.bypass import bypassed
from lora_kernels.files import replace_together
from lora_kernels.layer import LoRALayer, copy_whole, features, is_sharded, whole
from lora_kernels.nn import layer_class

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Entries of the config without which the weights mean something else; the weights' metadata holds
# them too, so that files of two saves are told apart.
_DECISIVE = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
_PAIRED = "lora_kernels_config"
# Starts that leave PEFT's base weight as it is; "pissa", "olora" and others change it on loading.
_INITS_BESIDE_THE_BASE = ("gaussian", "eva", "orthogonal", "mica")
# Options of PEFT that change what an adapter computes and that this library does not have.
_UNSUPPORTED = (
    "use_dora", "use_qalora", "use_bdlora", "lora_bias", "alora_invocation_tokens", "arrow_config",
    "layer_replication", "trainable_token_indices", "kasa_config",
    "monteclora_config", "velora_config",
)  # fmt: skip


def save_adapter(
    model: nn.Module, directory: str | os.PathLike, *, base_model: str | None = None
) -> None:
    """Writes the adapter of a model in PEFT's format; PEFT's `PeftModel.from_pretrained` reads it.

    An interrupted save leaves the old adapter: both files are written before either is replaced,
    and `load_adapter` notices files of two saves. An adapter started with PiSSA is written relative
    to the original base, as plain LoRA of rank 2r. All ranks of a sharded model make the call: it
    gathers, and rank 0 writes. Names are the plain model's, without the parts that torch.compile,
    DistributedDataParallel and other wrappers put in.

    Warns (UserWarning) of parameters that train and are not in the files, and of layers that PEFT
    would compute differently.

    Args:
        directory: made if missing.
        base_model: name or path of the base, for the config; the model's own `name_or_path` by
            default.

    Raises:
        ValueError: the model has no LoRA layer. RuntimeError: it was merged with keep_base=False.
    """
    model = names.unwrapped(model)
    layers = adapters.require_layers(model)
    for name, layer in layers:
        if layer._merged == "final":
            raise RuntimeError(f"{name}: merged with keep_base=False, there is no adapter to save")
    _warn_of_unsaved(model)
    _write(model, Path(directory), {n: layer.delta_factors() for n, layer in layers}, base_model)


def _warn_of_unsaved(model: nn.Module) -> None:
    """Names the parameters that train and are no part of the adapter."""
    saved = set(adapters.saved_parameters(model))
    for _, layer in lora_layers(model):
        saved.update(layer.factor_parameters("lora_A", "lora_B"))
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


def _write(
    model: nn.Module,
    directory: Path,
    factors: dict[str, Sequence[Tensor]],
    base_model: str | None,
    given: Mapping[str, Tensor] | None = None,
) -> None:
    """The layers of `factors`, by name. Of what is `given`, by its name in the model, those
    tensors; the model's own otherwise."""
    from safetensors.torch import save_file

    tensors = {}
    for name, pair in factors.items():
        for part, tensor in zip("AB", pair, strict=True):
            tensors[f"{_PREFIX}{name}.lora_{part}.weight"] = tensor
    for saved in adapters.saved_tensors(model):
        tensors[_PREFIX + saved.name] = (given or {}).get(saved.name, saved.trained)
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
    config = _config(model, {name: a.shape[0] for name, (a, _) in factors.items()}, base_model)
    peft_targets.warn_of_differences(model, config, tensors)
    dropouts = {layer.dropout for name, layer in lora_layers(model) if name in factors}
    if config["target_parameters"] and any(dropouts):
        warnings.warn(
            "lora_dropout: written as 0, PEFT has none for layers that it takes for experts"
            f" ({targets.summary(config['target_parameters'])}); set it again to go on training",
            stacklevel=3,
        )
    directory.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", _PAIRED: json.dumps({key: config[key] for key in _DECISIVE})}
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    replace_together({
        directory / WEIGHTS_NAME: lambda path: save_file(tensors, path, metadata=metadata),
        directory / CONFIG_NAME: lambda path: Path(path).write_text(text),
    })  # fmt: skip


def _config(model: nn.Module, ranks: dict[str, int], base_model: str | None) -> dict:
    """PEFT's LoraConfig as JSON; layers that differ from the first go to rank_pattern,
    alpha_pattern."""
    layers = {name: layer for name, layer in lora_layers(model) if name in ranks}
    first = next(iter(layers))
    rslora = layers[first].use_rslora and all(
        layer.use_rslora and layer.alpha is not None and layer.pissa_A is None
        for layer in layers.values()
    )

    def alpha(name: str) -> float:
        """The alpha from which PEFT computes the layer's scaling."""
        layer = layers[name]
        stored = rslora or (
            layer.alpha is not None and not layer.use_rslora and ranks[name] == layer.rank
        )
        value = layer.alpha if stored else layer.scaling * ranks[name]
        return int(value) if value == int(value) else value

    as_parameters = peft_targets.taken_for_experts(model, layers)

    def whole(name: str) -> str:
        """A pattern for this name alone: PEFT takes others as last parts of names."""
        return "^" + re.escape(name) + (r"(\.weight)?" if name in as_parameters else "")

    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model or getattr(model, "name_or_path", None) or None,
        "bias": "none",
        "fan_in_fan_out": any(layer.fan_in_fan_out for layer in layers.values()),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha(first),
        # PEFT has no dropout for adapters of parameters, and refuses a config with both.
        "lora_dropout": 0.0 if as_parameters else layers[first].dropout,
        "modules_to_save": sorted(adapters.saved_modules(model)) or None,
        "r": ranks[first],
        "rank_pattern": {whole(n): r for n, r in ranks.items() if r != ranks[first]},
        "alpha_pattern": {whole(n): alpha(n) for n in layers if alpha(n) != alpha(first)},
        "target_modules": peft_targets.target_names(
            model, [name for name in layers if name not in as_parameters]
        ),
        "target_parameters": [f"{name}.weight" for name in as_parameters] or None,
        "task_type": None,
        "use_dora": False,
        "use_rslora": rslora,
    }


# ------------------------------------------------------------------------------------------ loading


@torch.no_grad()
def load_adapter(model: nn.Module, directory: str | os.PathLike) -> None:
    """Reads PEFT's two files into a model: into its LoRA layers, or into a model that has none yet.

    Everything is checked first; on an error nothing in the model has changed. A model that has its
    LoRA layers may be sharded: every rank reads the files and takes its part.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is truncated, is not of the same save as the other, uses an option of
            PEFT that this library lacks, or holds a tensor (named) that is non-finite or does not
            fit the model.
    """
    model, directory = names.unwrapped(model), Path(directory)
    config = _read_config(directory / CONFIG_NAME)
    tensors = _read_tensors(directory / WEIGHTS_NAME, config)
    targets.require_no_peft(model)
    targets.require_shapes(model)
    _require_linear_parameters(model, config, directory / CONFIG_NAME)
    pairs, saved = _sort(model, tensors, _origin(config))
    present = dict(lora_layers(model))
    if present and set(present) != set(pairs):
        extra, missing = sorted(set(pairs) - set(present)), sorted(set(present) - set(pairs))
        raise ValueError(
            "the adapter's layers are not the model's:"
            + (f" the file alone has {targets.summary(extra)};" if extra else "")
            + (f" the model alone has {targets.summary(missing)};" if missing else "")
            + " remove_lora(model) first to take them from the file"
        )
    modules = dict(names.named_modules(model))
    saved_modules = {n.rpartition(".")[0]: modules[n.rpartition(".")[0]] for n in saved}
    targets.require_whole_ties(model, saved_modules)
    past = bypassed(model)
    idle = [name for name in pairs if modules[name] in past]
    if idle:
        warnings.warn(
            f"adapters on {targets.summary(idle)} may have no part in the output:"
            f" {past[modules[idle[0]]]}; check_adapters(model, ...) with a batch tells",
            stacklevel=3,
        )
    layers, values = {}, {}
    with adapters.all_or_nothing(model) as before:
        for name, (A, B) in pairs.items():
            rank, alpha, use_rslora = _layer_config(config, name)
            _check_pair(name, modules[name], A, B, rank, _origin(config))
            layer = modules[name]
            if name in present:
                _check_present(name, layer, A)
                before.keep(layer.lora_A)
                before.keep(layer.lora_B)
            else:
                layers[layer] = layer_class(layer)._prepare(
                    layer, rank, None, 0.0, use_rslora, None, "kaiming"
                )
            values[name] = (layer, A, B, alpha, use_rslora)

        if layers or saved_modules:
            adapters.attach(model, layers, saved_modules, before.trainable)
        guard_save_pretrained(model)
        for layer, A, B, alpha, use_rslora in values.values():
            copy_whole(layer.lora_A, A)
            copy_whole(layer.lora_B, B)
            layer.alpha, layer.use_rslora = alpha, use_rslora
            layer.dropout = config.get("lora_dropout") or 0.0
        for name, tensor in saved.items():
            owner, _, attribute = name.rpartition(".")
            target = getattr(modules[owner], attribute)
            before.keep(target)
            copy_whole(target, tensor)


def _read_config(path: Path) -> dict:
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not a complete JSON file: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{path}: expected peft_type 'LORA', got {kind!r}")
    for option in _UNSUPPORTED:
        if config.get(option):
            raise ValueError(
                f"{path}: {option} = {config[option]!r} is not supported; load it with PEFT"
            )
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init not in _INITS_BESIDE_THE_BASE:
        raise ValueError(
            f"{path}: init_lora_weights = {init!r} stands on a changed base; save it from PEFT with"
            " path_initial_model_for_weight_conversion"
        )
    dropout = config.get("lora_dropout") or 0.0
    if not _is_number(dropout) or not 0 <= dropout < 1:
        raise ValueError(f"{path}: lora_dropout: expected a probability in [0, 1), got {dropout}")
    for name, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        patterns = config.get(pattern) or {}
        for value in (config.get(name, 8), *patterns.values()):
            if not _is_number(value) or (name == "r" and (value < 1 or value != int(value))):
                raise ValueError(f"{path}: {name}: got {value!r}, which is no usable number")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{path}: bias = {config['bias']!r} is not supported, only 'none'")
    return config


def _require_linear_parameters(model: nn.Module, config: dict, path: Path) -> None:
    weights = [f".{n}.weight" for n, m in names.named_modules(model) if targets.is_linear(m)]
    for parameter in config.get("target_parameters") or ():
        if not any(weight.endswith(f".{parameter}") for weight in weights):
            raise ValueError(
                f"{path}: target_parameters: {parameter!r} is not the weight of a linear layer of"
                " the model, and no other parameter can carry an adapter; load it with PEFT"
            )


def _is_number(value: object) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value)


def _read_tensors(path: Path, config: dict) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        tensors = load_file(path)
        with safe_open(path, "pt") as file:
            paired = json.loads((file.metadata() or {}).get(_PAIRED, "{}"))
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated or not a safetensors file: {error}") from error
    for key, value in paired.items():
        if config.get(key) != value:
            raise ValueError(
                f"{path}: was saved with {key} = {value!r}, but {CONFIG_NAME} has"
                f" {config.get(key)!r}: the files are of two saves, or one was changed since;"
                " save the adapter again, or bring the other file back"
            )
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name}: holds non-finite values ({path})")
    return tensors


def _origin(config: dict) -> str:
    """Where an adapter that does not fit belongs."""
    base = config.get("base_model_name_or_path")
    return f"; load it into the model it was trained on{f', {base}' if base else ''}"


def _sort(
    model: nn.Module, tensors: dict[str, Tensor], origin: str
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """(layer name -> (A, B), name -> tensor of modules_to_save), each found in the
    model."""
    modules = dict(names.named_modules(model))
    tensors_there = {
        names.join(prefix, name): tensor
        for prefix, module in modules.items()
        for name, tensor in adapters.state_of(module).items()
    }
    halves: dict[str, dict[str, Tensor]] = {}
    saved = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(_PREFIX)
        if (found := re.fullmatch(r"(.+)\.lora_([AB])\.weight", name)) is not None:
            layer, part = found.groups()
            if layer not in modules:
                known = targets.summary(n for n, m in modules.items() if targets.is_linear(m))
                raise ValueError(
                    f"{key}: the model has no module {layer!r}; its linear layers are"
                    f" {known}{origin}"
                )
            halves.setdefault(layer, {})[part] = tensor
        elif name in tensors_there:
            if tensor.shape != tensors_there[name].shape:
                raise ValueError(
                    f"{key}: has shape {tuple(tensor.shape)}, the model's {name} has"
                    f" {tuple(tensors_there[name].shape)}{origin}"
                )
            saved[name] = tensor
        else:
            raise ValueError(f"{key}: the model has no parameter or buffer {name!r}{origin}")
    if not halves:
        raise ValueError(f"the adapter file holds no LoRA tensor, only {targets.summary(tensors)}")
    for layer, parts in halves.items():
        for part in "AB":
            if part not in parts:
                raise ValueError(
                    f"{_PREFIX}{layer}.lora_{part}.weight: missing from the adapter file"
                )
    return {layer: (parts["A"], parts["B"]) for layer, parts in halves.items()}, saved


def _layer_config(config: dict, name: str) -> tuple[int, float, bool]:
    """(rank, alpha, use_rslora) of one layer."""
    return (
        options.of_layer(config.get("rank_pattern"), name, config.get("r", 8)),
        options.of_layer(config.get("alpha_pattern"), name, config.get("lora_alpha", 8)),
        bool(config.get("use_rslora")),
    )


def _check_pair(name: str, module: nn.Module, A: Tensor, B: Tensor, rank: int, origin: str) -> None:
    key = f"{_PREFIX}{name}.lora_"
    if not isinstance(module, LoRALayer):
        reason = targets.objection(module)
        if reason is not None:
            raise ValueError(f"{key}A.weight: cannot go to {name}: {reason}")
    K, N = features(module)
    for part, tensor, shape in (("A", A, (rank, K)), ("B", B, (N, rank))):
        if tensor.shape != shape:
            raise ValueError(
                f"{key}{part}.weight: has shape {tuple(tensor.shape)}, expected {shape}"
                f" for rank {rank} of the config and {name}"
                f" ({K} -> {N}){origin}"
            )
        if not tensor.is_floating_point():
            raise ValueError(
                f"{key}{part}.weight: has dtype {tensor.dtype}, expected a floating one"
            )


def _check_present(name: str, layer: LoRALayer, A: Tensor) -> None:
    key = f"{_PREFIX}{name}.lora_A.weight"
    if layer.merged:
        raise ValueError(f"{key}: {name} is merged; unmerge_lora(model) first")
    if (reason := layer.why_fixed()) is not None:
        raise ValueError(f"{key}: cannot go to {name}: {reason}")
    if layer.pissa_A is not None:
        raise ValueError(
            f"{key}: {name} was started with PiSSA and no longer holds its original base;"
            " remove_lora(model) first"
        )
    if A.shape[0] != layer.rank:
        raise ValueError(f"{key}: has rank {A.shape[0]}, the model's layer has rank {layer.rank}")


# -------------------------------------------------------------------- Transformers' save_pretrained


def guard_save_pretrained(model: nn.Module) -> None:
    """Makes `save_pretrained(d)` of the model, and of models within it, write the adapter too.

    Without the adapter's files in d `from_pretrained(d)` would drop it as unexpected keys; with
    them Transformers loads base and adapter (through PEFT).
    """
    for module in model.modules():
        save = getattr(type(module), "save_pretrained", None)
        if callable(save) and "save_directory" in inspect.signature(save).parameters:
            # A partial is copied and pickled with the model, and then holds the copy.
            module.save_pretrained = functools.partial(_save_pretrained, module)


def release_save_pretrained(model: nn.Module) -> None:
    for module in model.modules():
        guard = module.__dict__.get("save_pretrained")
        if getattr(guard, "func", None) is _save_pretrained:
            del module.save_pretrained


def _save_pretrained(model: nn.Module, *args, **kwargs) -> object:
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
        name: [given.get(f"{name}.{key}", layer.factor(key)) for key in ("lora_A", "lora_B")]
        for name, layer in layers.items()
        if layer._merged != "final"
    }
    gathers = any(is_sharded(tensor) for pair in parts.values() for tensor in pair)
    if not layers or not (call.arguments.get("is_main_process", True) or gathers):
        return result
    if parts:
        # Relative to the base beside it, which for PiSSA is what is left of the weight.
        _write(model, directory, parts, None, given)
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
        base = state.pop(names.join(name, "merged_base"), None)
        if base is not None and base.numel():
            state[names.join(name, "weight")] = base
    return state
