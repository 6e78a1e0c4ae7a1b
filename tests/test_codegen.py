"""The short form of the code generation check; the full one is
`python -m lora_kernels.backends.codegen`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from lora_kernels.backends import codegen

ROOT = Path(__file__).parent.parent


def test_short_check_passes():
    """In a process of its own: it takes over Triton's driver."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for name in ("TRITON_INTERPRET", "LORA_KERNELS_BACKEND", "LORA_KERNELS_PLAN"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "lora_kernels.backends.codegen", "--short"]
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert {"gemm_tma_kernel", "dx_da_kernel"} <= set(run.stdout.split())
    assert "0 break a rule" in run.stdout


SOUND = codegen.Kernel(
    case="",
    arch=90,
    name="gemm_tma_kernel",
    constants={"BM": 128, "BN": 256, "dtype": "16 bit", "aligned": True},
    registers=168,
    spills=0,
    shared=180_000,
    tensor_memory=0,
    mma_sync=0,
    wgmma=5,
    register_form=0,
    pending=1,
    tcgen05=0,
    tma=6,
    cp_async=0,
    fma=0,
    waits=0,
    warnings=(),
)


def test_a_sound_kernel_breaks_no_rule():
    assert codegen.faults(SOUND) == []


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"spills": 8}, "spills"),
        ({"shared": 232_449}, "shared memory"),
        ({"arch": 80, "shared": 166_913}, "shared memory"),
        ({"tensor_memory": 513}, "tensor memory"),
        ({"warnings": ("C7515",)}, "ptxas warning"),
        ({"register_form": 1}, "register-form wgmma"),
        ({"tma": 0}, "no TMA"),
        ({"constants": SOUND.constants | {"PDL": True}}, "overlap"),
        ({"wgmma": 0}, "no wgmma"),
        ({"pending": 0}, "wgmma serialised"),
        ({"arch": 100}, "no tcgen05"),
        ({"wgmma": 0}, "no tensor cores"),
        ({"name": "gemm_kernel", "tma": 0}, "no asynchronous loads"),
        (
            {"constants": {"BM": 64, "BN": 64, "dtype": "fp32", "aligned": True}},
            "tensor cores in fp32",
        ),
        ({"constants": {"BM": 64, "BN": 64, "dtype": "fp32", "aligned": True}}, "no FMA"),
    ],
)
def test_each_rule_can_fail(change, rule):
    assert rule in codegen.faults(SOUND._replace(**change))
