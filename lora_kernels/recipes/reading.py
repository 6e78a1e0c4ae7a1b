"""A checkpoint file: read once, whole or not at all, and of values of the right kinds."""

import math
import os
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor


def read(path: str | os.PathLike[str]) -> Any:
    """What `torch.save` wrote. FileNotFoundError, or ValueError for a file that is not as written.

    Takes no more memory than the file is large: its records have to be stored as they are.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: no such file")
    if not Path(path).is_file():
        raise ValueError("is no regular file")
    with open(path, "rb") as file:
        try:
            _require_intact(file)
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise ValueError(f"is damaged, or no checkpoint of train_model ({reason})") from error


def _require_intact(file: BinaryIO) -> None:
    """torch.load does not compare the checksums that torch.save writes."""
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        size = os.fstat(file.fileno()).st_size
        if any(r.compress_type != zipfile.ZIP_STORED for r in records):
            raise ValueError("a record is compressed")
        if sum(r.file_size for r in records) > size:
            raise ValueError("its records are larger than the file")
        if (name := archive.testzip()) is not None:
            raise ValueError(f"the checksum of {name} is another")


def require(condition: object, message: str) -> None:
    if not condition:
        raise ValueError(message)


def is_number(value: Any) -> bool:
    """A float, or an integer that tensors can hold."""
    return isinstance(value, float) or is_integer(value)


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def require_count(where: str, value: Any, low: int = 0) -> None:
    legal = is_integer(value) and value >= low
    require(legal, f"{where}: expected an integer of at least {low}, got {_shown(value)}")


def require_tensor(where: str, value: Any, like: Tensor) -> None:
    """One with the dtype and shape of another."""
    legal = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized
    require(legal, f"{where}: expected a tensor, got {_shown(value)}")
    for what, got, expected in (
        ("shape", tuple(value.shape), tuple(like.shape)),
        ("dtype", value.dtype, like.dtype),
    ):
        require(got == expected, f"{where} has {what} {got} there, {expected} in this run")


def require_like(where: str, value: Any, like: Any) -> None:
    """A value of the kind of another: what the same object holds in a run that is made the same.

    More keys are legal, and anything in place of None or of a kind not known here.
    """
    if isinstance(like, Tensor):
        require_tensor(where, value, like)
    elif isinstance(like, bool):
        legal = value is None or isinstance(value, bool)
        require(legal, f"{where}: expected a bool, got {_shown(value)}")
    elif is_number(like):
        legal = is_number(value) and (math.isfinite(value) or not math.isfinite(like))
        require(legal, f"{where}: expected a finite number, got {_shown(value)}")
    elif isinstance(like, str):
        require(isinstance(value, str), f"{where}: expected a string, got {_shown(value)}")
    elif isinstance(like, dict):
        require(isinstance(value, dict), f"{where}: expected a mapping, got {_shown(value)}")
        for key, item in like.items():
            require(key in value, f"{where}: has no {key!r}")
            require_like(f"{where}[{key!r}]", value[key], item)
    elif isinstance(like, (list, tuple)):
        legal = isinstance(value, (list, tuple)) and len(value) == len(like)
        require(legal, f"{where}: expected {len(like)} values, got {_shown(value)}")
        for index, (got, item) in enumerate(zip(value, like, strict=True)):
            require_like(f"{where}[{index}]", got, item)


def _shown(value: Any) -> str:
    if isinstance(value, (Tensor, dict, list, tuple)):
        return type(value).__name__
    return repr(value)[:60]
