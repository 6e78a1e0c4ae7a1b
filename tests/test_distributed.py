"""Several processes against one: tensor parallelism, FSDP2, DDP (the checks are in checks_*.py)."""

import pytest
import worlds

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
