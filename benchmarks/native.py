"""What the compiled CPU kernels gain: frozen layer, PEFT, the ATen path and the native path, forward
+ backward, interleaved in one process.

    python benchmarks/native.py --out benchmarks/results/native-cpu.json

Every round times every peer once, in turn; a ratio is the median over the rounds of a peer's time
over the frozen layer's in the same round. Each peer is checked against fp64 before anything is timed.
"""

import argparse
import copy
import json
from contextlib import contextmanager
from pathlib import Path

import torch
from layer import DTYPES, FROZEN, OURS, PEFT, check, measure, peers, rows_of
from machine import machine, machine_line
from torch import Tensor, nn

from lora_kernels import _env, backends
from lora_kernels.backends.native import extension

# (M, K, N, r)
SHAPES = [
    (1024, 2048, 2048, 16),
    (4096, 768, 768, 8),
    (64, 2048, 2048, 16),
    (256, 2048, 2048, 16),
    (1024, 2048, 2048, 64),
    (1024, 2048, 8192, 16),
    (512, 768, 3072, 8),
]
ATEN, NATIVE = f"{OURS}, ATen", f"{OURS}, native"


@contextmanager
def backend(name: str):
    """The backend of every call inside, forward and backward."""
    before = _env.BACKEND
    _env.BACKEND = name
    try:
        yield
    finally:
        _env.BACKEND = before


class On(nn.Module):
    """A layer whose forward and backward run on one backend."""

    def __init__(self, layer: nn.Module, name: str) -> None:
        super().__init__()
        self.layer, self.name = layer, name

    @property
    def scaling(self) -> float:
        return self.layer.scaling

    def __getattr__(self, name: str):
        return getattr(super().__getattr__("layer"), name) if name[0] != "_" else super().__getattr__(name)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def main() -> None:
    raise SystemExit("wip")
