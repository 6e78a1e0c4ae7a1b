"""`train_model(..., tune=True)`: a GPU proves its kernels before the first step."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.backends.cuda import tables
from lora_kernels.recipes import batches
from lora_kernels.testing import DTYPES
from lora_kernels.tuning import ranks, tune

_MINUTES, _LIMIT = 0.75, 15.0  # and the seconds that a candidate may take beyond them


def prove(
    model: nn.Module,
    group: Sequence[Any],
    autocast_dtype: torch.dtype | None,
    progress: bool | None,
) -> None:
    """Tunes with the analytic tiles where the model lies on a GPU that no table is of, for as many
    rows as these batches have. What hinders it is a warning."""
    device = batches.device_of(model)
    if device.type != "cuda":
        return
    # The same on all ranks, whatever lies on their disks: tune() is for all of them.
    if not ranks.made_by_rank_0(lambda: tables.why_none(tables.index_of(device)) is not None):
        return
    rows = sorted({rows_of(batch) for batch in group})[-2:]
    names = {value: name for name, value in DTYPES.items()}
    dtype = None if autocast_dtype is None else names[autocast_dtype]
    try:
        tune(
            model, rows, dtype=dtype, minutes=_MINUTES, limit=_LIMIT, variants=False,
            progress=progress,
        )  # fmt: skip
    except (ValueError, RuntimeError) as error:
        warnings.warn(f"tune: {error}; training goes on without", stacklevel=3)


def rows_of(batch: Any) -> int:
    """Of the calls that a batch leads to: its tokens, or all but the last of the dimensions of its
    inputs, at most two."""
    tokens = batches.token_count(batch)
    inputs = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if isinstance(inputs, Mapping):
        inputs = next((v for v in inputs.values() if isinstance(v, Tensor)), None)
    if tokens or not isinstance(inputs, Tensor) or not inputs.dim():
        return max(1, tokens)
    return max(1, inputs.shape[: min(2, inputs.dim() - 1)].numel())
