"""Adapters written as other programs keep them; the other way of `formats`.

What a format cannot hold is a ValueError that names it. rsLoRA is a number where a format has one:
the scaling, or the alpha that gives it.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels import formats, targets
from lora_kernels.files import replace_together
from lora_kernels.formats import (
    CONFIG_NAME,
    DIFFUSERS_METADATA,
    DIFFUSERS_WEIGHTS,
    MLX_WEIGHTS,
    Adapter,
)
from lora_kernels.peft_config import FACTOR_KEY, MAGNITUDE_KEY, PREFIX

# Components of a pipeline as Diffusers names them, and what kohya writes before their layers.
COMPONENTS = {
    "unet": "lora_unet",
    "transformer": "lora_transformer",
    "prior": "lora_prior_unet",
    "text_encoder": "lora_te",
    "text_encoder_2": "lora_te2",
}


class Layer(NamedTuple):
    """A [r, K] and B [N, r]; a magnitude [N] with DoRA.

    kind: "linear"; "embedding", whose update is (B A)ᵀ; "convolution", with its kernel in K.
    """

    A: Tensor
    B: Tensor
    alpha: float
    use_rslora: bool
    magnitude: Tensor | None = None
    kind: str = "linear"

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    @property
    def plain_alpha(self) -> float:
        """The alpha that gives the scaling without rsLoRA."""
        return self.scaling * self.rank if self.use_rslora else self.alpha


def layers_of(adapter: Adapter) -> tuple[dict[str, Layer], dict[str, Tensor]]:
    """(layers by the model's names, what else is in the file by its key: adapters of experts, rows
    of embeddings, modules_to_save).

    ValueError: half a layer, shapes that do not fit.
    """
    config = adapter.config
    halves: dict[str, dict[str, Tensor]] = {}
    embeddings: set[str] = set()
    magnitudes: dict[str, Tensor] = {}
    beside: dict[str, Tensor] = {}
    for key, tensor in adapter.tensors.items():
        name = key.removeprefix(PREFIX)
        if (found := FACTOR_KEY.fullmatch(name)) is not None:
            halves.setdefault(found["layer"], {})[found["part"]] = tensor
            embeddings |= {found["layer"]} if found["table"] else set()
        elif (found := MAGNITUDE_KEY.fullmatch(name)) is not None:
            magnitudes[found["layer"]] = tensor
        else:
            beside[key] = tensor
    layers = {}
    for name, pair in sorted(halves.items(), key=lambda item: _in_order(item[0])):
        for part in "AB":
            if part not in pair:
                raise ValueError(f"{adapter.file}: {name}: lora_{part} is missing")
        rank, alpha, use_rslora = config.layer(name)
        A, B = pair["A"], pair["B"]
        kind = "embedding" if name in embeddings else "linear"
        if A.dim() == B.dim() and A.dim() > 2 and B[0, 0].numel() == 1:
            A, B, kind = A.flatten(1), B.flatten(1), "convolution"
            if B.shape[1] and rank % B.shape[1] == 0:  # of a group the ranks that are its own
                B = torch.block_diag(*B.chunk(rank // B.shape[1]))
        if A.dim() != 2 or B.dim() != 2 or (A.shape[0], B.shape[1]) != (rank, rank):
            if config.target_parameters:  # one of experts, which the file does not tell apart
                beside |= {f"{name}.lora_{part}": pair[part] for part in "AB"}
                continue
            raise ValueError(
                f"{adapter.file}: {name}: A has shape {tuple(A.shape)} and B {tuple(B.shape)},"
                f" expected [{rank}, K] and [N, {rank}]"
            )
        layers[name] = Layer(A, B, alpha, use_rslora, magnitudes.get(name), kind)
    return layers, beside


def _in_order(name: str) -> list[tuple[int, str]]:
    """Layer 2 before layer 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def held_layers(adapter: Adapter, form: str, *, dora: bool = False) -> dict[str, Layer]:
    """The layers of an adapter that has nothing else. ValueError names what `form` cannot hold."""
    layers, beside = layers_of(adapter)
    config = adapter.config
    others = [f"{name} ({layer.kind})" for name, layer in layers.items() if layer.kind != "linear"]
    reasons = {
        "adapters of experts (target_parameters)": config.target_parameters,
        "layers that are not linear": others,
        "modules_to_save": config.modules_to_save,
        "tensors beside the adapter": beside,
        "DoRA (use_dora)": () if dora or not config.use_dora else ["use_dora"],
        "options that this library does not know": config.unknown,
    }
    for what, found in reasons.items():
        if found:
            raise ValueError(
                f"{adapter.file}: has {what}: {targets.summary(found)}, which files of {form}"
                " cannot hold"
            )
    if not layers:
        raise ValueError(f"{adapter.file}: holds no LoRA tensor")
    return layers


def one_value(layers: Mapping[str, Layer], attribute: str, form: str) -> Any:
    """What all layers have in common. ValueError where they differ, which `form` cannot hold."""
    values = {name: getattr(layer, attribute) for name, layer in layers.items()}
    first, called = next(iter(values)), attribute.removeprefix("plain_")
    for name, value in values.items():
        if not math.isclose(value, values[first], rel_tol=1e-6):
            raise ValueError(
                f"{called}: {first} has {values[first]:g} and {name} has {value:g}"
                f" (rank_pattern, alpha_pattern), files of {form} hold one for all layers"
            )
    return values[first]


def write_peft(adapter: Adapter, out: Path) -> Path:
    """adapter_config.json and adapter_model.safetensors, in a folder."""
    return formats.write(out, adapter.config.entries, _stored(adapter.tensors))


def write_mlx(adapter: Adapter, out: Path) -> Path:
    """adapter_config.json and adapters.safetensors, in a folder: one rank and one scale."""
    layers = held_layers(adapter, "MLX", dora=True)
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"] = layer.A.mT, layer.B.mT
        if layer.magnitude is not None:
            tensors[f"{name}.m"] = layer.magnitude
    config = {
        "fine_tune_type": "dora" if adapter.config.use_dora else "lora",
        # Of all layers: one that the file lacks starts at zero and stays there.
        "num_layers": -1,
        "lora_parameters": {
            "rank": one_value(layers, "rank", "MLX"),
            "scale": one_value(layers, "scaling", "MLX"),
            "dropout": adapter.config.dropout,
            "keys": sorted({re.sub(r"^.*?\blayers\.\d+\.", "", name) for name in layers}),
        },
    }
    text = json.dumps(config, indent=2) + "\n"
    return _write(out / MLX_WEIGHTS, _stored(tensors), {"format": "mlx"}, {out / CONFIG_NAME: text})


def write_diffusers(adapter: Adapter, out: Path, component: str) -> Path:
    """One file, with PEFT's config in its metadata; pytorch_lora_weights.safetensors in a folder
    where the path does not end in .safetensors."""
    layers = held_layers(adapter, "Diffusers")
    tensors = {
        f"{component}.{name}.lora_{part}.weight": tensor
        for name, layer in layers.items()
        for part, tensor in zip("AB", layer[:2], strict=True)
    }
    entries = {
        f"{component}.{key}": value
        for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora",
                    "target_modules", "lora_dropout")
        if (value := adapter.config.entries.get(key)) is not None
    }  # fmt: skip
    path = out if out.suffix == ".safetensors" else out / DIFFUSERS_WEIGHTS
    metadata = {"format": "pt", DIFFUSERS_METADATA: json.dumps(entries, sort_keys=True)}
    return _write(path, _stored(tensors), metadata)


def write_kohya(adapter: Adapter, out: Path, component: str) -> Path:
    """One file, with an alpha for each layer."""
    _require_file(out, ".safetensors", "kohya")
    tensors: dict[str, Tensor] = {}
    for name, layer in held_layers(adapter, "kohya").items():
        key = f"{COMPONENTS[component]}_{name.replace('.', '_')}"
        if f"{key}.alpha" in tensors:
            raise ValueError(f"{adapter.file}: {key} stands for two layers, one of them {name}")
        tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"] = layer[:2]
        tensors[f"{key}.alpha"] = torch.tensor(layer.plain_alpha)
    return _write(out, _stored(tensors), {"format": "pt"})


def _require_file(out: Path, suffix: str, form: str) -> None:
    if out.suffix != suffix or out.is_dir():
        raise ValueError(f"out: got {out}, legal for {form} is a file that ends in {suffix}")


def _stored(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.detach().contiguous().clone() for key, tensor in tensors.items()}


def _write(
    path: Path,
    tensors: dict[str, Tensor],
    metadata: dict[str, str],
    texts: Mapping[Path, str] | None = None,
) -> Path:
    from safetensors.torch import save

    path.parent.mkdir(parents=True, exist_ok=True)
    contents = {path: save(tensors, metadata)}
    contents |= {other: text.encode() for other, text in (texts or {}).items()}
    replace_together({place: _writer(content) for place, content in contents.items()})
    return path


def _writer(content: bytes) -> Callable[[str], object]:
    return lambda temporary: Path(temporary).write_bytes(content)
