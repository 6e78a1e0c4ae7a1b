"""Adapters as llama.cpp's GGUF files, both ways; with the package gguf.

general.type is "adapter", adapter.type "lora"; one adapter.lora.alpha scales every layer by alpha /
rank. Tensors are called as the base's: blk.0.attn_q.weight.lora_a [r, K] and .lora_b [N, r]. Where
llama.cpp rotates adjacent pairs and Transformers the two halves of a head, the rows of query and
key are in another order.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_kernels import names, targets
from lora_kernels.adapter_files import naming
from lora_kernels.files import replace_atomically
from lora_kernels.format_writers import held_layers, one_value
from lora_kernels.formats import Adapter, config_of
from lora_kernels.peft_config import PREFIX

# model_type of Transformers -> (architecture of gguf, whether query and key are permuted). Those
# whose weights llama.cpp's converter takes over as they are otherwise.
_ARCHITECTURES = {
    "llama": ("LLAMA", True),
    "mistral": ("LLAMA", True),
    "qwen2": ("QWEN2", False),
    "qwen3": ("QWEN3", False),
    "gemma": ("GEMMA", False),
    "gemma2": ("GEMMA2", False),
    "phi3": ("PHI3", False),
}


def _package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ImportError(f"GGUF: pip install gguf ({error})") from error
    return gguf


class _Base(NamedTuple):
    """What the file's names and orders depend on."""

    architecture: str
    permuted: bool
    heads: dict[str, int]
    tied: bool
    map: Any

    @classmethod
    def of(cls, config: Any) -> "_Base":
        """ValueError: an architecture that is not known here."""
        gguf = _package()
        if config.model_type not in _ARCHITECTURES:
            raise ValueError(
                f"model: {config.model_type!r} has no GGUF form here, legal are"
                f" {', '.join(_ARCHITECTURES)}"
            )
        name, permuted = _ARCHITECTURES[config.model_type]
        kind = gguf.MODEL_ARCH[name]
        heads = config.num_attention_heads
        return cls(
            gguf.MODEL_ARCH_NAMES[kind],
            permuted,
            {"q_proj": heads, "k_proj": getattr(config, "num_key_value_heads", None) or heads},
            bool(config.tie_word_embeddings),
            gguf.get_tensor_name_map(kind, config.num_hidden_layers),
        )

    def name(self, layer: str) -> str | None:
        """A layer's weight in the file; None where the architecture has none."""
        found = self.map.get_name(f"{layer}.weight", try_suffixes=(".weight",))
        return None if found is None or (self.tied and found == "output.weight") else found

    def stored(self, layer: str, B: Tensor) -> Tensor:
        """B [N, r] with the file's order of rows."""
        heads = self.heads.get(layer.rpartition(".")[2]) if self.permuted else None
        return B if heads is None else permute(B, heads)

    def loaded(self, layer: str, B: Tensor) -> Tensor:
        heads = self.heads.get(layer.rpartition(".")[2]) if self.permuted else None
        return B if heads is None else unpermute(B, heads)


def permute(rows: Tensor, heads: int) -> Tensor:
    """Of each head's rows [N, r] row i and row i + half next to each other."""
    halves = rows.reshape(heads, 2, -1, rows.shape[1])
    return halves.transpose(1, 2).reshape(rows.shape)


def unpermute(rows: Tensor, heads: int) -> Tensor:
    """The other way of `permute`."""
    pairs = rows.reshape(heads, -1, 2, rows.shape[1])
    return pairs.transpose(1, 2).reshape(rows.shape)


def write(adapter: Adapter, out: Path, config: Any) -> Path:
    """A GGUF file in fp32. `config` is that of the base, of Transformers.

    ValueError: what the format cannot hold, a layer that the architecture has not, a path that does
    not end in .gguf.
    """
    if out.suffix != ".gguf":
        raise ValueError(f"out: got {out}, legal for GGUF is a file that ends in .gguf")
    gguf, base = _package(), _Base.of(config)
    layers = held_layers(adapter, "GGUF")
    alpha = one_value(layers, "plain_alpha", "GGUF")
    if alpha == 0:
        raise ValueError(f"{adapter.file}: alpha is 0, which llama.cpp takes for a scaling of 1")
    tensors = {}
    for name, layer in layers.items():
        key = base.name(name)
        if key is None:
            tied = " (its output is tied to the embedding)" if base.tied else ""
            raise ValueError(
                f"{adapter.file}: {name}: {base.architecture} has no such layer in GGUF{tied}"
            )
        tensors[f"{key}.lora_a"] = layer.A
        tensors[f"{key}.lora_b"] = base.stored(name, layer.B)

    def save(path: str) -> None:
        writer = gguf.GGUFWriter(path, base.architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
        for key, tensor in tensors.items():
            writer.add_tensor(key, tensor.to(torch.float32).contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    out.parent.mkdir(parents=True, exist_ok=True)
    replace_atomically(out, save)
    return out


def read(path: Path, model: nn.Module) -> Adapter:
    """The adapter of a file, under the names of a Transformers model.

    ValueError: not such a file, or of another model.
    """
    gguf, base = _package(), _Base.of(model.config)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with naming(path):
        try:
            reader = gguf.GGUFReader(path)
            found = {key: _value(reader, key) for key in _entries(gguf)}
        except (ValueError, IndexError, KeyError, OverflowError) as error:
            raise ValueError(f"damaged, or not a GGUF file: {error}") from error
        for key, legal in _entries(gguf).items():
            if legal is not None and found[key] != legal:
                raise ValueError(f"{key}: got {found[key]!r}, legal is {legal!r}")
        alpha = found[gguf.Keys.Adapter.LORA_ALPHA]
        if alpha is None:
            raise ValueError(f"{gguf.Keys.Adapter.LORA_ALPHA}: is missing")
        if found[gguf.Keys.General.ARCHITECTURE] != base.architecture:
            raise ValueError(
                f"is of {found[gguf.Keys.General.ARCHITECTURE]!r}, the model of"
                f" {base.architecture!r}"
            )
        return _adapter(path, reader.tensors, base, model, alpha)


def _entries(gguf: Any) -> dict[str, str | None]:
    """Keys of the file, and the value that is legal."""
    keys = gguf.Keys
    return {
        keys.General.TYPE: gguf.GGUFType.ADAPTER,
        keys.Adapter.TYPE: "lora",
        keys.General.ARCHITECTURE: None,
        keys.Adapter.LORA_ALPHA: None,
    }


def _value(reader: Any, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _adapter(
    path: Path, stored: Iterable[Any], base: _Base, model: nn.Module, alpha: float
) -> Adapter:
    by_key = {
        key: name
        for name, module in names.named_modules(model)
        if targets.is_linear(module) and (key := base.name(name)) is not None
    }
    tensors, ranks = {}, {}
    for one in stored:
        key, _, part = one.name.rpartition(".lora_")
        if key not in by_key or part not in ("a", "b"):
            raise ValueError(f"{one.name}: is no adapter of a linear layer of the model")
        if one.data.dtype.kind != "f":
            raise ValueError(f"{one.name}: is of {one.tensor_type.name}, legal are F32 and F16")
        name, tensor = by_key[key], torch.tensor(one.data)
        tensors[f"{PREFIX}{name}.lora_{part.upper()}.weight"] = (
            base.loaded(name, tensor) if part == "b" else tensor
        )
        if part == "a":
            ranks[name] = tensor.shape[0]
    return Adapter(path, tensors, config_of(ranks, dict.fromkeys(ranks, alpha)))
