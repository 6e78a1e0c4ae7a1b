"""How the factor of a branch is split between s and what is added."""

import math

import pytest
import torch

from lora_kernels.backends.scaling import split


@pytest.mark.parametrize("scaling", [1.0000001, 1.5, 2.0, -2.0, 3.0, -48.5, 64.0, 1e30])
def test_fp16_rounds_s_at_most_as_large_as_unscaled(scaling):
    low, high = split(scaling, torch.float16)
    assert low * high == scaling
    assert 0.5 <= abs(low) < 1
    assert high > 1
    assert math.frexp(high)[0] == 0.5  # a power of two: what it multiplies is not rounded again


@pytest.mark.parametrize("scaling", [0.0, 1e-8, 0.3, -0.5, 1.0, -1.0])
def test_fp16_takes_small_factors_whole(scaling):
    assert split(scaling, torch.float16) == (scaling, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scaling", [0.5, 1.0, -3.0, 64.0])
def test_other_dtypes_take_all_factors_whole(dtype, scaling):
    assert split(scaling, dtype) == (scaling, 1.0)
