"""The second half of every split sum: fp32 partials added in a fixed order, scaled and
rounded once."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.backends.triton import tiles
from lora_kernels.backends.triton.launch import launch

_BLOCK = 256
_LANES = 8


class Job(NamedTuple):
    """out [size] = scale * the sum of part [parts,size] over its first dimension."""

    part: Any
    out: Any
    parts: Any
    size: Any
    scale: Any


@triton.jit
def sum_partials(job, block, LANES: tl.constexpr, BLOCK: tl.constexpr):
    """One block of a job. LANES partials are added side by side, for more loads in flight; the
    order depends on nothing but their count."""
    offsets = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    lane = tl.arange(0, LANES)
    acc = tl.zeros((LANES, BLOCK), tl.float32)
    for i in range(tl.cdiv(job.parts, LANES)):
        index = i * LANES + lane
        inside = (index[:, None] < job.parts) & (offsets[None, :] < job.size)
        places = index.to(tl.int64)[:, None] * job.size + offsets[None, :]
        acc += tl.load(job.part + places, mask=inside, other=0.0)
    total = tl.sum(acc, axis=0) * job.scale
    tl.store(job.out + offsets, total.to(job.out.dtype.element_ty), mask=offsets < job.size)


@triton.jit(do_not_specialize=["count_0", "size_0", "count_1", "size_1"])
def reduce_kernel(
    part_0, out_0, count_0, size_0, scale_0, part_1, out_1, count_1, size_1, scale_1,
    LANES: tl.constexpr, BLOCK: tl.constexpr, FREE: tl.constexpr,
):  # fmt: skip
    """One launch for one or two sets of partials; the second may be None. With FREE the next kernel
    may begin already."""
    if FREE:
        tl.extra.cuda.gdc_launch_dependents()
    pid = tl.program_id(0)
    blocks = tl.cdiv(size_0, BLOCK)
    if pid < blocks:
        sum_partials(Job(part_0, out_0, count_0, size_0, scale_0), pid, LANES, BLOCK)
    elif part_1 is not None:
        sum_partials(Job(part_1, out_1, count_1, size_1, scale_1), pid - blocks, LANES, BLOCK)


def reduce_partials(
    first: tuple[Tensor, Tensor, float],
    second: tuple[Tensor, Tensor, float] | None = None,
    free: bool = False,
) -> None:
    """For one or two of (part [count,...], out [...], scale): out = scale * part.sum(0)."""

    def arguments(job: tuple[Tensor, Tensor, float]) -> tuple[Any, ...]:
        part, out, scale = job
        return part, out, part.shape[0], out.numel(), scale

    jobs = [first] if second is None else [first, second]
    blocks = sum(tiles.cdiv(out.numel(), _BLOCK) for _, out, _ in jobs)
    other = (None, None, 0, 0, 1.0) if second is None else arguments(second)
    launch(
        reduce_kernel, (blocks,), *arguments(first), *other,
        LANES=_LANES, BLOCK=_BLOCK, FREE=free, num_warps=4,
    )  # fmt: skip
