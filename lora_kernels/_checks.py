"""Whether the arguments of an op fit together, for callers that come past `functional`: a wrong one
must not read foreign memory or give, silently, the result of another call.
"""

import math
import sys
from collections.abc import Callable, Sequence
from operator import itemgetter

import torch
from torch import Tensor

from lora_kernels._contract import ALSO, DIMENSIONS, DTYPES, NOT_GIVEN, READERS, Args, Op

_STRIDED = torch.strided
ROWS, COLUMNS = 1 << 32, 1 << 35  # of the dropout mask


def checker(op: Op) -> Callable[[Args], None]:
    """The check of an op's arguments: it raises ValueError (shape, device, value) or TypeError
    (dtype), naming the argument; all must fit the first."""
    names = op.arguments
    tensors = [(i, DIMENSIONS[key], key) for key, i in op.index.items() if key in DIMENSIONS]
    values: Callable[[Args], tuple[float, float, Tensor | None]] = itemgetter(
        *map(names.index, ("scaling", "dropout_p", "seed"))
    )
    backward = op.is_backward

    def check(args: Args) -> None:
        sizes: dict[str, int] = {}
        leading = args[0]
        dtype, device = leading.dtype, leading.device
        if dtype not in DTYPES:
            raise TypeError(
                f"{names[0]}: expected float32, float16, bfloat16 or float64, got {dtype}"
            )
        for i, letters, key in tensors:
            tensor = args[i]
            if tensor is None and key == "bias":
                continue
            check_layout(key, tensor)
            shape = tensor.shape
            if len(shape) != len(letters):
                if backward and shape == NOT_GIVEN and not _is_read(key, names, args):
                    continue
                raise ValueError(f"{key}: expected {_layout(letters)}, got {tuple(shape)}")
            for letter, size in zip(letters, shape):  # noqa: B905, of one length; strict costs
                if sizes.setdefault(letter, size) != size:
                    _refuse(key, letters, f"{letter} = {sizes[letter]}", shape)
            if tensor.dtype is not dtype:
                _check_other_dtype(names[0], dtype, key, tensor)
            if tensor.device != device:
                raise ValueError(
                    f"{key}: expected {names[0]}'s device {device}, got {tensor.device}"
                )
        if 0 in (sizes["N"], sizes["K"], sizes["r"]):
            raise ValueError(f"{names[0]}: expected N, K and r of at least 1, got {sizes}")
        _check_values(*values(args), device)
        _check_place(*values(args)[1:], sizes["M"], sizes["K"])

    return check


def are_sound(
    x: Tensor, lora_a: Tensor, lora_b: Tensor, base: Tensor, bias: Tensor | None, linear: bool
) -> bool:
    """Whether the tensors are such as they nearly always are, told at one look: a tenth of the time
    of the checks by name, which decide about all others."""
    if not isinstance(x, Tensor):
        return False
    dtype, device = x.dtype, x.device
    for tensor in (x, base, lora_a, lora_b) if bias is None else (x, base, lora_a, lora_b, bias):
        if not isinstance(tensor, Tensor) or tensor.device != device:
            return False
        if tensor.dtype != dtype and not (
            tensor.dtype is torch.float32
            and dtype is not torch.float64
            and (tensor is lora_a or tensor is lora_b)
        ):
            return False
        if tensor.layout is not _STRIDED or tensor.is_nested:
            return False
    leading, a, b = x.shape, lora_a.shape, lora_b.shape
    if len(leading) == 0 or len(a) != 2 or len(b) != 2 or 0 in a or 0 in b:
        return False
    (rank, K), N = a, b[0]
    if leading[-1] != K or b[1] != rank or (bias is not None and bias.shape != (N,)):
        return False
    if base.shape != ((N, K) if linear else (*leading[:-1], N)):
        return False
    return dtype in DTYPES and (x.is_meta or not torch.is_autocast_enabled(device.type))


def check_layout(name: str, tensor: Tensor) -> None:
    if tensor.is_nested:
        raise ValueError(
            f"{name}: expected a dense tensor, got a nested one; convert it with"
            " torch.nested.to_padded_tensor, or give contiguous jagged x to lora_linear"
        )
    if tensor.layout is not torch.strided:
        raise ValueError(
            f"{name}: expected a dense tensor, got layout {tensor.layout}; convert it with"
            " to_dense()"
        )


def check_written(base_out: Tensor, x: Tensor) -> None:
    """For writing in place: an element that is met twice, or read once more, is a wrong sum."""
    if not base_out.is_contiguous() and _overlaps_itself(base_out):
        raise ValueError(
            "base_out: expected elements apart in memory, it is written in place, got strides"
            f" {base_out.stride()} for shape {tuple(base_out.shape)}; call lora_add, or clone it"
        )
    if _share_memory(base_out, x):
        raise ValueError(
            "base_out: expected memory apart from x's, it is written in place, got some of the"
            " same; call lora_add, or clone one"
        )


def _overlaps_itself(matrix: Tensor) -> bool:
    """Whether some steps down the columns lead where some steps along the rows do."""
    (rows, columns), (down, along) = matrix.shape, matrix.stride()
    step = math.gcd(down, along) or 1
    return matrix.numel() > 1 and along // step < rows and down // step < columns


def _share_memory(left: Tensor, right: Tensor) -> bool:
    """Whether the bytes from first to last meet, unless they are columns side by side."""
    begin, other = left.data_ptr(), right.data_ptr()
    if begin + _extent(left) <= other if begin < other else other + _extent(right) <= begin:
        return False
    pitch = left.stride(0) * left.element_size()
    if (
        left.stride(1) != 1
        or right.stride(1) != 1
        or right.stride(0) != left.stride(0)
        or not pitch
    ):
        return True
    gap = (other - begin) % pitch
    width, reach = (t.shape[1] * t.element_size() for t in (left, right))
    return gap < width or gap + reach > pitch


def _extent(matrix: Tensor) -> int:
    (rows, columns), (down, along) = matrix.shape, matrix.stride()
    if not rows or not columns:
        return 0
    return ((rows - 1) * down + (columns - 1) * along + 1) * matrix.element_size()


def _is_read(key: str, names: Sequence[str], args: Args) -> bool:
    return key not in READERS or any(
        args[names.index(reader)] for reader in READERS[key] if reader in names
    )


def _layout(letters: str) -> str:
    return f"shape [{', '.join(letters)}]"


def _refuse(key: str, letters: str, wanted: str, shape: torch.Size) -> None:
    raise ValueError(f"{key}: expected {_layout(letters)} with {wanted}, got {tuple(shape)}")


def _check_other_dtype(first: str, dtype: torch.dtype, key: str, tensor: Tensor) -> None:
    legal = [t for t in ALSO.get(key, ()) if t != dtype and dtype != torch.float64]
    if tensor.dtype not in legal:
        expected = " or ".join([f"{first}'s dtype {dtype}", *map(str, legal)])
        raise TypeError(f"{key}: expected {expected}, got {tensor.dtype}")


def under_autocast(x: Tensor, adapters: Sequence[Tensor]) -> tuple[Tensor, list[Tensor], bool]:
    """x in the autocast dtype where autocast is on, which the last says; fp32 adapters stay, an op
    rounds them at use."""
    device = x.device.type
    if (
        x.is_meta
        or not torch.is_autocast_enabled(device)
        or not x.is_floating_point()
        or x.dtype == torch.float64
    ):
        return x, list(adapters), False
    dtype = torch.get_autocast_dtype(device)
    half = (torch.float16, torch.bfloat16)
    return x.to(dtype), [t.to(dtype) if t.dtype in half else t for t in adapters], True


def check_range(scaling: float, dropout_p: float) -> None:
    if not abs(scaling) <= sys.float_info.max:
        raise ValueError(f"scaling: expected a finite number, got {scaling}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p: expected a probability in [0, 1), got {dropout_p}")


def _check_values(
    scaling: float, dropout_p: float, seed: Tensor | None, device: torch.device
) -> None:
    check_range(scaling, dropout_p)
    if seed is None:
        if dropout_p:
            raise ValueError(f"seed: expected an int64 tensor with dropout_p {dropout_p}, got None")
    elif seed.dtype != torch.int64 or seed.numel() not in (1, 3):
        raise ValueError(
            "seed: expected an int64 tensor of one element, or of three (seed, row, column),"
            f" got {seed.dtype} {tuple(seed.shape)}"
        )
    elif seed.device != device:
        raise ValueError(f"seed: expected the tensors' device {device}, got {seed.device}")


def _check_place(dropout_p: float, seed: Tensor | None, rows: int, columns: int) -> None:
    """Rows and blocks of eight columns are counted in 32 bits. What other devices hold is not read,
    it would be waited for; nor are the values that stand for others while a graph is traced."""
    if (
        not dropout_p
        or seed is None
        or seed.numel() != 3
        or type(seed) is not Tensor
        or not seed.is_cpu
    ):
        return
    _, row, column = seed.tolist()
    if not 0 <= row <= ROWS - rows:
        raise ValueError(
            f"seed: expected a row from which x's {rows} rows end at 2^32 or before, got {row}"
        )
    if column % 8 or not 0 <= column <= COLUMNS - columns:
        raise ValueError(
            f"seed: expected a column that is a multiple of 8 and from which x's {columns} columns"
            f" end at 2^35 or before, got {column}"
        )
