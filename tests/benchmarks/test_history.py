"""Result files over a repository's history."""

import json
import os
import shutil
import subprocess

import pytest

from benchmarks import history

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
MACHINE = {"cpu": "one", "cpu_capability": "AVX2", "threads": 2, "gpu": None}


def commit(root, day, results, **machine):
    path = root / history.RESULTS / "layer.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"M": M, "dtype": "fp32", "peer": peer, "forward": {"ratio": ratio}}
        for peer, M, ratio in results
    ]
    path.write_text(json.dumps({"machine": MACHINE | machine, "rows": rows}))
    names = ("AUTHOR_NAME", "AUTHOR_EMAIL", "COMMITTER_NAME", "COMMITTER_EMAIL")
    who = {f"GIT_{name}": "a" for name in names}
    kept = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    dates = {"GIT_AUTHOR_DATE": day, "GIT_COMMITTER_DATE": day}
    for words in (("init", "-q"), ("add", "."), ("commit", "-qm", day)):
        subprocess.run(["git", *words], cwd=root, env=kept | who | dates, check=True)


def test_ratios_of_ours_by_machine_and_call(tmp_path):
    ours, frozen = history.OURS, "frozen nn.Linear"
    first = [(frozen, 1, 1.0), (ours, 1, 1.5), (ours, 8, 1.2)]
    commit(tmp_path, "2026-01-01T00:00:00Z", first, commit="a")
    commit(tmp_path, "2026-01-02T00:00:00Z", [(frozen, 1, 1.0), (ours, 1, 1.4)], commit="b")
    commit(tmp_path, "2026-01-03T00:00:00Z", [(ours, 1, 1.3)], commit="c", cpu="two")
    commit(tmp_path, "2026-01-04T00:00:00Z", [(ours, 1, 1.4), (ours, 9, 2.0)], commit="b")
    lines = history.series(tmp_path)
    assert list(lines) == [("one, AVX2, 2 threads", "forward: M=1 dtype=fp32")]
    (values,) = lines.values()
    assert [(f"{day:%d}", ratio) for day, ratio in values] == [("01", 1.5), ("02", 1.4)]
    picture = tmp_path / "out" / "history.png"
    history.draw(lines, picture)
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_rows_that_have_the_peers_by_name():
    timings = {"frozen nn.Linear": {"ratio": 1.0}, history.OURS: {"ratio": 1.1}}
    row = {"M": 1, "mode": "training", **timings}
    (point,) = history.points(None, {"machine": MACHINE, "rows": [row]})
    assert point[1:] == ("call: mode=training M=1", None, 1.1)
