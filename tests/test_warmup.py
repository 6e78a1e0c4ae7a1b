"""warmup where nothing is compiled; with kernels, in test_interpreted_ops.py."""

import pytest
from torch import nn

import lora_kernels


def layer(**options):
    return lora_kernels.FusedLoRALinear(24, 16, 4, **options)


def test_nothing_to_compile_on_the_cpu():
    assert lora_kernels.warmup(nn.Sequential(layer(), layer(dropout=0.1)), (1, 8)) == 0


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (0, ValueError, "rows: expected numbers >= 1, got 0"),
        ((8, -1), ValueError, "rows: expected numbers >= 1, got -1"),
        ((8, 2.5), TypeError, "rows: expected integers, got float"),
        (True, TypeError, "rows: expected integers, got bool"),
    ],
)
def test_bad_rows(rows, error, message):
    with pytest.raises(error, match=message):
        lora_kernels.warmup(layer(), rows)


def test_a_model_without_adapters():
    with pytest.raises(ValueError, match="model: Linear has no LoRA layer"):
        lora_kernels.warmup(nn.Linear(3, 4), 8)
