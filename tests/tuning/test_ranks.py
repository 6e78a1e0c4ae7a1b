"""`tune` in several processes."""

import pytest
import torch
import worlds

import lora_kernels

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch without distributed"
)


@pytest.mark.parametrize("name", worlds.checks("checks_tune"))
def test_two_nodes(name):
    outcome = worlds.run("checks_tune", 2)[name]
    assert not outcome, "\n".join(outcome)


def test_several_processes_that_do_not_know_of_each_other(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="one of WORLD_SIZE = 2 processes, which do not know"):
        lora_kernels.tune(shapes=[(8, 8, 2)])
