"""The picture of the README has the numbers that are counted from the calls."""

import re
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytest.importorskip("peft")
from benchmarks import picture, traffic
from benchmarks.peers import OURS, PEFT
from benchmarks.traffic import calls
from lora_kernels.backends.cuda.plans import PLANS

ROOT = Path(__file__).parents[2]


def test_it_is_what_the_script_draws(tmp_path, capsys):
    picture.main(["--out", str(tmp_path / "traffic.svg")])
    drawn = (tmp_path / "traffic.svg").read_text()
    assert drawn == (ROOT / "docs" / "images" / "traffic.svg").read_text()
    totals = [int(n) for n in re.findall(r">(\d+) MiB, \d+ calls?<", drawn)]
    assert len(totals) == 4 * len(picture.ROWS)
    assert totals[0] == 160  # x, W and y of the frozen layer


def test_the_readme_says_these_numbers():
    def mib(name, plan=None):
        return [sum(m.bytes for m in of) / 2**20 for of in calls(name, picture.CASE, plan)]

    (words,) = re.findall(r"reads and writes (.*?)\)", (ROOT / "README.md").read_text())
    found = [round(n) for n in (mib(PEFT)[0], mib(OURS, picture.FUSED)[0])]
    assert [int(n) for n in re.findall(r"\d+", words)] == found


def test_the_page_of_kernels_has_the_table_of_plans():
    page = (ROOT / "docs" / "kernels.md").read_text()
    assert traffic.plans_table(picture.CASE) in page
    for plan in PLANS.values():
        assert f"| `{plan.name}` | {plan.summary} |" in page


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_every_call_has_its_kind(p):
    case = picture.CASE._replace(dropout=p)
    for _, name, plan in picture.ROWS:
        for moved in calls(name, case, plan):
            kinds = [picture.kind(one, case) for one in moved]
            with_w = [one for one, of in zip(moved, kinds, strict=True) if of == "product with W"]
            once = 2 * (case.M * case.K + case.N * case.K + case.M * case.N)
            assert len(with_w) in (1, 2)  # once, or once for each half of the rows
            assert once <= sum(one.bytes for one in with_w) <= 1.25 * once
