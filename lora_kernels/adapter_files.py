"""What an adapter's files hold: JSON and tensors, read from one opening each and checked there.

Every damage is a ValueError that names the file, the key, what stood there and what is legal.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_kernels.files import open_regular

DIGEST = "lora_kernels_digest"
_LARGEST_JSON = 1 << 26
_LARGEST_HEADER = 100_000_000  # safetensors' own bound
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_SHARD = re.compile(r"[\w.-]+-\d{5}-of-\d{5}\.safetensors")


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """ValueErrors within it begin with the file's name."""
    try:
        yield
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path}: {error}") from error


def shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:120] + "..."


def parse_json(text: bytes | str, what: str) -> dict[str, Any]:
    """A JSON object; a byte-order mark is passed over."""
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"{what}: nested too deeply") from None
    except ValueError as error:  # of decoding too
        raise ValueError(f"{what}: not a complete JSON file: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{what}: expected a JSON object, got {shown(value)}")
    return value


def read_json(path: Path) -> dict[str, Any]:
    file, size = open_regular(path)
    with file:
        if size > _LARGEST_JSON:
            raise ValueError(f"{path}: has {size} bytes, legal are {_LARGEST_JSON} at most")
        return parse_json(file.read(), str(path))


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Of names, dtypes, shapes and values."""
    found = hashlib.sha256()
    for key, tensor in sorted(tensors.items()):
        found.update(f"{key}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode(errors="replace"))
        if tensor.numel():
            found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata)."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    file, size = open_regular(path)
    with file, naming(path):
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(size - 8, _LARGEST_HEADER):
            raise ValueError("truncated or not a safetensors file")
        text = file.read(length)
        header = parse_json(text, "truncated or not a safetensors file, its header")
        metadata = header.pop("__metadata__", None) or {}
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise ValueError(f"metadata: expected text by name, got {shown(metadata)}")
        for key, entry in header.items():
            dtype = entry.get("dtype") if isinstance(entry, dict) else None
            if not isinstance(dtype, str) or dtype not in _DTYPES:
                raise ValueError(
                    f"{key}: has dtype {shown(dtype)}, legal are {', '.join(_DTYPES)}; convert it"
                    " with the program that wrote it"
                )
        rest = file.read(size - 8 - length)
        try:
            tensors = load(b"".join((start, text, rest)))
        except (SafetensorError, ValueError, RuntimeError, KeyError, TypeError) as error:
            raise ValueError(f"truncated or not a safetensors file: {error}") from error
        _require_finite(tensors)
        if DIGEST in metadata and metadata[DIGEST] != digest(tensors):
            raise ValueError(
                "its tensors are not those that were saved: their digest differs from the one in"
                " its metadata; the file was damaged or edited. Save or copy it again"
            )
    return tensors, metadata


def read_sharded(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of all files that an index names."""
    where = read_json(path).get("weight_map")
    if not isinstance(where, dict) or not all(
        isinstance(name, str) and _SHARD.fullmatch(name) for name in where.values()
    ):
        raise ValueError(
            f"{path}: weight_map: expected file names like"
            f" adapter_model-00001-of-00002.safetensors by key, got {shown(where)}"
        )
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(where.values())):
        part, _ = read_safetensors(path.parent / name)
        listed = {key for key, file in where.items() if file == name}
        if listed != part.keys():
            odd = sorted(listed ^ part.keys())[0]
            raise ValueError(f"{path.parent / name}: {odd} stands in the file or in {path} alone")
        tensors |= part
    return tensors, {}


def read_pickled(path: Path) -> dict[str, Tensor]:
    """What torch.save wrote, with weights_only=True: no code of the file is run."""
    file, _ = open_regular(path)
    with file:
        data = file.read()
    with naming(path):
        _require_not_larger(data)
        try:
            content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a damaged pickle brings about
            raise ValueError(
                f"truncated or not a file of tensors alone: {type(error).__name__}: {error}"
            ) from error
        if not isinstance(content, dict):
            raise ValueError(f"expected tensors by name, got {shown(type(content).__name__)}")
        for key, tensor in content.items():
            if not isinstance(key, str) or not isinstance(tensor, Tensor):
                raise ValueError(
                    f"{shown(key)}: expected a tensor by name, got {type(tensor).__name__}"
                )
            if tensor.layout is not torch.strided or tensor.is_meta:
                raise ValueError(f"{key}: expected a dense tensor with values")
            if tensor.dtype not in _DTYPES.values():
                raise ValueError(f"{key}: has dtype {tensor.dtype}, legal are {', '.join(_DTYPES)}")
            if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
                raise ValueError(f"{key}: has shape {tuple(tensor.shape)}, more than its values")
        content = {key: tensor.detach() for key, tensor in content.items()}
        _require_finite(content)
    return content


def _require_not_larger(data: bytes) -> None:
    """torch.save packs nothing, so an archive holds no more than its own size."""
    if zipfile.is_zipfile(io.BytesIO(data)):
        try:
            size = sum(one.file_size for one in zipfile.ZipFile(io.BytesIO(data)).infolist())
        except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError, EOFError) as error:
            raise ValueError(f"truncated or not a file of tensors: {error}") from error
        if size > len(data):
            raise ValueError(f"would unpack to {size} bytes from {len(data)}")


def _require_finite(tensors: Mapping[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{key}: holds non-finite values")


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of one file of either kind."""
    if os.fspath(path).endswith((".bin", ".pt", ".pth", ".ckpt")):
        return read_pickled(path), {}
    return read_safetensors(path)
