"""The ops on DTensors: every rank computes its part with the same op.

Over one dimension of the device mesh at most one of the products' dimensions is split:

    N  column-parallel: weight, lora_b and bias Shard(0), y Shard(1)
    K  row-parallel: x, weight and lora_a Shard(1); y and s are partial sums, and base_out and bias
       go into one of them
    M  data-parallel: x and y Shard(0)

The leading argument of an op decides which; the others are redistributed to match it, so that any
placements give the result of one process. Dropout masks are those of the global rows and columns.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.distributed.tensor import DeviceMesh, DTensor, Partial, Placement, Replicate, Shard

from lora_kernels._contract import DIMENSIONS, NOT_GIVEN, OPS, SUMS
from lora_kernels._namespace import qualified


def register(library: torch.library.Library) -> None:
    for name in OPS:
        torch.library.register_torch_dispatch(qualified(name), DTensor, _run, lib=library)


def _run(
    cls: type[DTensor],
    func: OpOverload,
    types: Sequence[type],
    args: Sequence[Any],
    kwargs: dict[str, Any] | None = None,
) -> tuple[DTensor, ...] | None:
    schema = func._schema
    given = dict(zip((a.name for a in schema.arguments), args, strict=False), **(kwargs or {}))
    name = schema.name.partition("::")[2]
    tensors = {
        key: value
        for key, value in given.items()
        if key in DIMENSIONS and value is not None and value.shape != NOT_GIVEN
    }
    mesh = _require_one_mesh(tensors)
    sizes = {
        letter: size
        for key, tensor in tensors.items()
        for letter, size in zip(DIMENSIONS[key], tensor.shape, strict=True)
    }
    split = [_split(name, tensors, i) for i in range(mesh.ndim)]
    for letter in "NK":
        parts = [mesh.size(i) for i, one in enumerate(split) if one == letter]
        if not _can_split(sizes[letter], parts, letter == "K" and given["dropout_p"] > 0):
            split = [None if one == letter else one for one in split]
    if name == "lora_add_":
        _require_in_place(tensors["base_out"], split)
    local = {
        key: value.to_local() if isinstance(value, DTensor) else value
        for key, value in given.items()
    }
    local |= {key: _local(key, tensor, split) for key, tensor in tensors.items()}
    if given["dropout_p"]:
        local["seed"] = _place_seed(local["seed"], mesh, split, sizes)
    results = func(*local.values())
    if name == "lora_add_":
        return None
    return tuple(
        _wrap(returned.name, result, mesh, split, sizes)
        for returned, result in zip(schema.returns, results, strict=True)
    )


def _require_one_mesh(tensors: dict[str, Tensor]) -> DeviceMesh:
    leading, first = next((k, t) for k, t in tensors.items() if isinstance(t, DTensor))
    mesh = first.device_mesh
    for key, tensor in tensors.items():
        got = f"a DTensor on {tensor.device_mesh}" if isinstance(tensor, DTensor) else "a Tensor"
        if not isinstance(tensor, DTensor) or tensor.device_mesh != mesh:
            raise ValueError(
                f"{key}: expected a DTensor on {mesh} as {leading} is, got {got}; shard a layer"
                " with all its parameters, after apply_lora: parallelize_module with"
                " lora_kernels.distributed's styles, or distribute_tensor each of them"
            )
    return mesh


def _is_shard(placement: Placement) -> bool:
    return type(placement) is Shard  # not its subclasses, which order the elements otherwise


def _split(name: str, tensors: dict[str, DTensor], mesh_dim: int) -> str | None:
    """The dimension that is split over a mesh dimension."""
    for key in (key for key in OPS[name].leading if key in tensors):
        placement = tensors[key].placements[mesh_dim]
        # Not subclasses of Shard, which order the elements otherwise; the rank is never split.
        if type(placement) is Shard and DIMENSIONS[key][placement.dim] != "r":
            return DIMENSIONS[key][placement.dim]
        if name == "lora_add_" and placement == Partial():
            return "K"
    return None


def _can_split(size: int, parts: list[int], masked: bool) -> bool:
    """Whether every rank gets something, and of a mask whole blocks of eight columns."""
    if masked and size % (8 * math.prod(parts)):
        return False
    for count in parts:
        size -= -(-size // count) * (count - 1)  # what the last rank has
    return size > 0


def _placement(key: str, letter: str | None) -> Placement:
    if letter is not None and letter in DIMENSIONS[key]:
        return Shard(DIMENSIONS[key].index(letter))
    return Partial() if letter is not None and key in SUMS[letter] else Replicate()


def _require_in_place(base_out: DTensor, split: list[str | None]) -> None:
    expected = tuple(_placement("base_out", letter) for letter in split)
    if base_out.placements != expected:
        raise ValueError(
            f"base_out: expected Shard, Replicate or Partial('sum') placements, which an in-place"
            f" sum can keep, got {base_out.placements}; use lora_add"
        )


def _local(key: str, tensor: DTensor, split: list[str | None]) -> Tensor:
    """This rank's part of an argument."""
    wanted = [_placement(key, letter) for letter in split]
    # What is no partial sum yet becomes one by being zero on all ranks but the first.
    once = [
        i for i, want in enumerate(wanted) if want.is_partial() and tensor.placements[i] != want
    ]
    for i in once:
        wanted[i] = Replicate()
    if tensor.placements != tuple(wanted):
        # Detached: torch 2.11 would detach the result in place, which no DTensor can.
        detached: DTensor = tensor.detach()  # type: ignore[assignment]  # it stays a DTensor
        tensor = detached.redistribute(placements=wanted)
    local = tensor.to_local()
    first = all(tensor.device_mesh.get_local_rank(i) == 0 for i in once)
    return local if first else torch.zeros_like(local)


def _place_seed(
    seed: Tensor, mesh: DeviceMesh, split: list[str | None], sizes: dict[str, int]
) -> Tensor:
    """The seed with the first row and column that this rank has of x, where it has a part."""
    if "M" not in split and "K" not in split:
        return seed
    first = {"M": 0, "K": 0}
    for letter in first:
        size = sizes[letter]
        for i in (i for i, one in enumerate(split) if one == letter):
            chunk = -(-size // mesh.size(i))
            start = min(mesh.get_local_rank(i) * chunk, size)
            first[letter] += start
            size = min(chunk, size - start)
    offsets = [seed.new_full((1,), offset) for offset in first.values()]
    return torch.cat([seed.reshape(1), *offsets])


def _wrap(
    key: str, result: Tensor, mesh: DeviceMesh, split: list[str | None], sizes: dict[str, int]
) -> DTensor:
    if result.shape == NOT_GIVEN:
        return DTensor.from_local(result, mesh, [Replicate()] * mesh.ndim, run_check=False)
    shape = torch.Size(sizes[letter] for letter in DIMENSIONS[key])
    return DTensor.from_local(
        result,
        mesh,
        [_placement(key, letter) for letter in split],
        run_check=False,
        shape=shape,
        stride=(shape[1], 1),
    )
