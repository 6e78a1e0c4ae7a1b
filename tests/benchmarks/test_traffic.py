"""What a GPU without a table does for a call, counted without one: never more bytes than PEFT."""

import pytest

pytest.importorskip("triton")
pytest.importorskip("peft")
from benchmarks import traffic
from benchmarks.peers import FROZEN, OURS, PEFT
from lora_kernels.testing import Case

CASES = [Case(8192, 4096, 4096, 16), Case(2048, 4096, 14336, 16), Case(512, 4096, 1024, 64)]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_no_more_bytes_than_peft(case, p):
    """Backward drops x anew, where PEFT keeps the dropped copy since forward: a layer with far more
    columns of x than of y moves a few percent more in backward, and less in both."""
    case = case._replace(dropout=p)
    ours, theirs = (traffic.count(name, case) for name in (OURS, PEFT))
    assert 0 < ours[0].bytes <= theirs[0].bytes
    assert 0 < ours[1].bytes <= 1.07 * theirs[1].bytes
    assert sum(t.bytes for t in ours) <= sum(t.bytes for t in theirs)


def test_the_mask_is_one_kernel():
    """Beside the products, per block of rows; a mask of ATen's calls is 122 of them."""
    case = Case(4096, 4096, 4096, 16)
    plain, dropped = (traffic.count(OURS, case._replace(dropout=p)) for p in (0.0, 0.1))
    assert dropped[0].kernels - plain[0].kernels <= 3
    assert dropped[1].kernels <= 20
    # x is read once more for the dropped copy, which is written and read: no mask in memory.
    assert dropped[0].bytes - plain[0].bytes <= 2 * 3 * case.M * case.K


def test_what_is_counted():
    case = Case(64, 32, 16, 4)
    forward, backward = traffic.count(FROZEN, case)
    sizes = case.M * case.K + case.N * case.K + case.M * case.N
    assert forward == backward == (1, 2 * sizes)


def test_the_table(capsys):
    traffic.main(["--size", "4096", "4096", "4096", "16"])
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| ") for line in lines) == 8
    assert any(line.startswith("| frozen nn.Linear | 0 | 1 kernels, 6.0 B") for line in lines)
