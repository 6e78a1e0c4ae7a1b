"""Several processes against one: tensor parallelism, FSDP2, DDP (the checks are in checks_*.py)."""

import pytest
import worlds
from torch.distributed.tensor import Replicate, Shard

from lora_kernels import FusedLoRALinear
from lora_kernels.distributed import ColwiseParallelLoRA, RowwiseParallelLoRA

WORLDS = [
    ("checks_tensor_parallel", 2),
    ("checks_data_parallel", 2),
    ("checks_two_dimensional", 4),
]


@pytest.mark.parametrize(
    ("module", "size", "check"),
    [(module, size, check) for module, size in WORLDS for check in worlds.checks(module)],
)
def test_several_processes(module, size, check):
    wrong = worlds.run(module, size)[check]
    assert not wrong, "\n".join(wrong)


def test_placements_of_the_styles():
    rows, columns, whole = Shard(0), Shard(1), Replicate()
    assert ColwiseParallelLoRA._layouts(FusedLoRALinear) == {
        "weight": rows, "bias": rows,
        "lora_A": whole, "lora_B": rows, "pissa_A": whole, "pissa_B": rows,
    }  # fmt: skip
    assert RowwiseParallelLoRA._layouts(FusedLoRALinear) == {
        "weight": columns, "bias": whole,
        "lora_A": columns, "lora_B": whole, "pissa_A": columns, "pissa_B": whole,
    }  # fmt: skip
