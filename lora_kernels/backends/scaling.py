"""Where a branch is scaled: before s is rounded, and in fp16 in part after."""

import math

import torch


def split(scaling: float, dtype: torch.dtype) -> tuple[float, float]:
    """(factor of s, factor of s B^T), whose product is `scaling`; s of this dtype.

    The first alone but in fp16: there scaling x A^T may lie beyond 65504 where x A^T and the result
    do not (a new adapter then would give inf * 0). So the first stays below 1 and the second is a
    power of two, with which sums in fp32 are multiplied exactly. dB = dy^T s takes it too.
    """
    if dtype != torch.float16 or abs(scaling) <= 1:
        return scaling, 1.0
    below_one, exponent = math.frexp(scaling)
    return below_one, 2.0**exponent
