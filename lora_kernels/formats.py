"""The files that people have adapters in, each read as PEFT's names and config; PEFT's written too.

PEFT:      adapter_config.json beside adapter_model.safetensors, .bin, or an index of shards
MLX:       adapter_config.json with lora_parameters beside adapters.safetensors; A and B transposed
Diffusers: one file, names begin with the component (unet., text_encoder.)
kohya:     one file, names begin with the component (lora_unet_, lora_te_), "_" stands for "."
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from lora_kernels import names, targets
from lora_kernels.adapter_files import (
    DIGEST,
    digest,
    naming,
    parse_json,
    read_json,
    read_pickled,
    read_safetensors,
    read_sharded,
    read_tensors,
    shown,
)
from lora_kernels.bases import is_convolution
from lora_kernels.files import replace_together
from lora_kernels.peft_config import PREFIX, Config, is_number

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
# Entries of the config without which the weights mean something else; the weights' metadata holds
# them too, so that files of two saves are told apart.
DECISIVE = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora")
PAIRED = "lora_kernels_config"
_READERS: dict[str, Callable[[Path], tuple[dict[str, Tensor], dict[str, str]]]] = {
    WEIGHTS_NAME: read_safetensors,
    "adapter_model.safetensors.index.json": read_sharded,
    "adapter_model.bin": lambda path: (read_pickled(path), {}),
}
MLX_WEIGHTS = "adapters.safetensors"
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
DIFFUSERS_METADATA = "lora_adapter_metadata"
# What ends the names of A, of B and of alpha in files of Diffusers and kohya.
_ROLES = {
    role: re.compile(rf"(?P<layer>.+?)(?:\.(?:{halves})\.weight|_lora\.{side}\.weight)")
    for role, side, halves in (
        ("A", "down", r"lora_A|lora_down|lora\.down|lora_linear_layer\.down"),
        ("B", "up", r"lora_B|lora_up|lora\.up|lora_linear_layer\.up"),
    )
} | {"alpha": re.compile(r"(?P<layer>.+)\.alpha")}
_COMPONENT = re.compile(
    r"(lora_(?:unet|te\d?|text_encoder|transformer|prior_unet)(?=_)"
    r"|(?:unet|transformer|text_encoder(?:_\d)?|prior)(?=\.))[_.]"
)


class Adapter(NamedTuple):
    """Tensors under PEFT's names, and the config; `left_out` says what is another model's, `own`
    whether this library wrote it."""

    file: Path
    tensors: dict[str, Tensor]
    config: Config
    left_out: tuple[str, ...] = ()
    own: bool = False


def read(path: Path, model: nn.Module) -> Adapter:
    """The adapter at a path; the model's names tell what belongs to it in files for several."""
    if not path.is_dir():
        return _read_one_file(path, model)
    if not (path / CONFIG_NAME).exists() and (path / DIFFUSERS_WEIGHTS).exists():
        return _read_one_file(path / DIFFUSERS_WEIGHTS, model)
    entries = read_json(path / CONFIG_NAME)
    if "peft_type" not in entries and "lora_parameters" in entries:
        return _read_mlx(path, entries)
    with naming(path / CONFIG_NAME):
        config = Config(entries)
    name = next((name for name in _READERS if (path / name).exists()), None)
    if name is None:
        raise FileNotFoundError(f"{path / WEIGHTS_NAME}: no such file, nor {', '.join(_READERS)}")
    tensors, metadata = _READERS[name](path / name)
    with naming(path / name):
        paired = parse_json(metadata.get(PAIRED, "{}"), f"metadata {PAIRED}")
        for key, value in paired.items():
            if entries.get(key) != value:
                raise ValueError(
                    f"was saved with {key} = {shown(value)}, but {CONFIG_NAME} has"
                    f" {shown(entries.get(key))}: the files are of two saves, or one was changed"
                    " since; save the adapter again, or bring the other file back"
                )
    return Adapter(path / name, tensors, config, own=PAIRED in metadata)


def write(directory: Path, entries: Mapping[str, Any], tensors: dict[str, Tensor]) -> Path:
    """PEFT's two files of an adapter, in a folder that is made if it is missing: both are written
    before either is replaced. Returns that of the weights."""
    from safetensors.torch import save

    paired = json.dumps({key: entries.get(key) for key in DECISIVE})
    metadata = {"format": "pt", PAIRED: paired, DIGEST: digest(tensors)}
    text = json.dumps(entries, indent=2, sort_keys=True) + "\n"
    directory.mkdir(parents=True, exist_ok=True)
    replace_together({
        directory / WEIGHTS_NAME: lambda path: Path(path).write_bytes(save(tensors, metadata)),
        directory / CONFIG_NAME: lambda path: Path(path).write_text(text),
    })  # fmt: skip
    return directory / WEIGHTS_NAME


def _read_mlx(path: Path, entries: dict[str, Any]) -> Adapter:
    """y += scale (x lora_a) lora_b, with lora_a [K, r] and lora_b [r, N]; m [N] of DoRA."""
    with naming(path / CONFIG_NAME):
        kind, options = entries.get("fine_tune_type", "lora"), entries["lora_parameters"]
        if kind not in ("lora", "dora") or not isinstance(options, dict):
            raise ValueError(
                f"fine_tune_type = {shown(kind)} is not supported, only 'lora' and 'dora'"
            )
        scale: object = options.get("scale")
        if not is_number(scale):
            raise ValueError(f"lora_parameters: scale: got {shown(scale)}, legal is a number")
    stored, _ = read_safetensors(path / MLX_WEIGHTS)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    with naming(path / MLX_WEIGHTS):
        for key, tensor in stored.items():
            if kind == "dora" and key.endswith(".m"):
                tensors[f"{PREFIX}{key.removesuffix('.m')}.lora_magnitude_vector"] = tensor
                continue
            layer, _, part = key.rpartition(".lora_")
            if part not in ("a", "b") or tensor.dim() != 2:
                raise ValueError(
                    f"{key}: has shape {tuple(tensor.shape)}, expected a matrix lora_a or lora_b"
                )
            tensors[f"{PREFIX}{layer}.lora_{part.upper()}.weight"] = tensor.mT
            ranks[layer] = min(tensor.shape) if part == "b" else ranks.get(layer, 0)
        ranks = {layer: _rank(tensors, layer) for layer in ranks}
        alphas = {n: scale * r for n, r in ranks.items()}
        config = config_of(ranks, alphas, options.get("dropout"), use_dora=kind == "dora")
    return Adapter(path / MLX_WEIGHTS, tensors, config)


def _rank(tensors: dict[str, Tensor], layer: str) -> int:
    """Rows of A; 1 where there is none, which is said when the halves are put together."""
    A = tensors.get(f"{PREFIX}{layer}.lora_A.weight")
    return max(A.shape[0], 1) if A is not None and A.dim() else 1


def config_of(
    ranks: dict[str, int],
    alphas: dict[str, float],
    dropout: float | None = None,
    use_dora: bool = False,
) -> Config:
    """PEFT's config of such layers; those that differ from the first go to the patterns."""
    if not ranks:
        raise ValueError("holds no LoRA tensor")
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    return Config({
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {_exactly(n): r for n, r in ranks.items() if r != rank},
        "alpha_pattern": {_exactly(n): a for n, a in alphas.items() if a != alpha},
        "lora_dropout": dropout,
        "use_dora": use_dora,
        "target_modules": sorted(ranks),
    })  # fmt: skip


def _exactly(name: str) -> str:
    return f"^{re.escape(name)}$"


def _read_one_file(path: Path, model: nn.Module) -> Adapter:
    stored, metadata = read_tensors(path)
    with naming(path):
        parts = _by_component(stored)
        own = {c: found for c, keys in parts.items() if (found := _resolve(c, keys, model))}
        if len(own) != 1:
            known = targets.summary(
                n for n, m in names.named_modules(model) if targets.is_target(m)
            )
            raise ValueError(
                f"{'several' if own else 'no'} parts of it ({', '.join(parts)}) fit the model,"
                f" whose linear layers are {known}; give the model of one part, as pipeline.unet"
            )
        (component, layers), = own.items()  # fmt: skip
        tensors, ranks, alphas = {}, {}, {}
        modules = dict(names.named_modules(model))
        for layer, roles in layers.items():
            for part in "AB":
                if part in roles:
                    _, tensor = roles[part]
                    # A 1 x 1 convolution, as kohya writes linear layers of some models.
                    as_one = tensor.dim() == 4 and tensor.shape[2:] == (1, 1)
                    flat = as_one and not is_convolution(modules[layer])
                    tensors[f"{PREFIX}{layer}.lora_{part}.weight"] = (
                        tensor[..., 0, 0] if flat else tensor
                    )
            ranks[layer] = _rank(tensors, layer)
            alphas[layer] = _alpha(*roles["alpha"]) if "alpha" in roles else ranks[layer]
        described = _described(metadata, component)
        config = config_of(ranks, alphas) if described is None else Config(described)
    others = tuple(
        f"{other}: another model's part of the file" for other in parts.keys() - own.keys()
    )
    return Adapter(path, tensors, config, others)


def _alpha(key: str, tensor: Tensor) -> float:
    if tensor.numel() != 1 or tensor.is_complex():
        raise ValueError(f"{key}: has shape {tuple(tensor.shape)}, expected one number")
    return tensor.item()


def _described(metadata: dict[str, str], component: str) -> dict[str, Any] | None:
    """PEFT's config of a component, as newer versions of Diffusers write it."""
    if DIFFUSERS_METADATA not in metadata:
        return None
    entries = parse_json(metadata[DIFFUSERS_METADATA], f"metadata {DIFFUSERS_METADATA}")
    mine = {
        key.removeprefix(f"{component}."): value
        for key, value in entries.items()
        if key.startswith(f"{component}.")
    }
    return {"peft_type": "LORA", **mine} if mine else None


def _by_component(stored: dict[str, Tensor]) -> dict[str, dict[str, dict[str, Any]]]:
    """component -> layer as the file writes it -> role -> (key, tensor)."""
    parts: dict[str, dict[str, dict[str, Any]]] = {}
    for key, tensor in stored.items():
        role, found = next(
            ((role, found) for role, form in _ROLES.items() if (found := form.fullmatch(key))),
            (None, None),
        )
        if found is None or role is None:
            raise ValueError(
                f"{key}: is no part of a LoRA adapter of PEFT, Diffusers or kohya; legal are"
                " lora_A and lora_B, lora_down and lora_up, alpha"
            )
        layer = found["layer"]
        component = _COMPONENT.match(layer)
        name = component[1] if component else ""
        layer = layer[component.end() :] if component else layer.removeprefix(PREFIX)
        if ".processor." in f"{layer}.":  # of attention processors, before Diffusers used PEFT
            layer = layer.replace(".processor.", ".")
            layer = f"{layer}.0" if layer.endswith("to_out") else layer
        roles = parts.setdefault(name, {}).setdefault(layer, {})
        if role in roles:
            raise ValueError(f"{key}: stands for the same as {roles[role][0]}")
        roles[role] = (key, tensor)
    return parts


def _resolve(
    component: str, layers: dict[str, dict[str, Any]], model: nn.Module
) -> dict[str, dict[str, Any]]:
    """The layers under the model's names; empty where none is the model's. ValueError where some
    alone are, or a name stands for two."""
    modules = [name for name, _ in names.named_modules(model) if name]
    by_name: dict[str, list[str]] = {}
    for name in modules:
        by_name.setdefault(_written(component, name), []).append(name)
    found = {layer: by_name.get(layer, []) for layer in layers}
    unknown = [layer for layer, places in found.items() if not places]
    if len(unknown) == len(found):
        return {}
    for layer, places in found.items():
        key = next(iter(layers[layer].values()))[0]
        if len(places) != 1:
            what = " and ".join(places) or "no module of the model"
            raise ValueError(f"{key}: {layer!r} stands for {what}")
    return {found[layer][0]: roles for layer, roles in layers.items()}


def _written(component: str, name: str) -> str:
    return name.replace(".", "_") if component.startswith("lora_") else name
