"""What `tune` shows: a bar, lines, or nothing."""

import json

import pytest
import torch

import lora_kernels
from lora_kernels import tuning
from lora_kernels.backends.cuda import tables
from lora_kernels.tuning.workers import Told


class Bar:
    disable = False

    def __init__(self):
        self.seen = []

    def update(self, n=1):
        self.seen.append(n)

    def set_postfix_str(self, text):
        self.seen.append(text)


def table(path, buckets, trying=None):
    mark = {} if trying is None else {"trying": {"plan": trying}}
    path.write_text(json.dumps({"buckets": [{}] * buckets, **mark}))


def test_a_bar_follows_the_table(tmp_path):
    path, bar = tmp_path / "t.json", Bar()
    told = Told(bar, lines=False)
    for buckets, trying in ((3, None), (3, "dual"), (4, "flag"), (6, None)):
        table(path, buckets, trying)
        told.see(path)
    assert bar.seen == ["", 0, "dual", 1, "flag", 2, ""]
    bar.disable = True
    path.unlink()
    told.see(path)  # and does not read what is not shown


@pytest.mark.parametrize(
    ("progress", "shown", "lines"),
    [(True, True, False), (False, False, False), (None, False, True)],
)
def test_bar_lines_or_nothing(gpu, monkeypatch, progress, shown, lines):
    """Not in a terminal. The bar is as long as what is missing."""
    pytest.importorskip("tqdm")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    seen = []

    def supervise(path, minutes, limit, options, told):
        seen.append((told.lines, not getattr(told._bar, "disable", True)))
        total = getattr(told._bar, "total", None)
        assert not shown or total == 8 - 2 * path.exists()
        bucket = {"op": "forward", "dtype": "float16", "M": 16, "N": 8, "K": 8, "r": 2,
                  "plan": "aten"}  # fmt: skip
        content = {"gpu": "A Card", "versions": {"triton": "3"},
                   "proven": [tables.proof("aten", "float16", False)],
                   "buckets": [{**bucket, "dropout": p} for p in (False, True)]}  # fmt: skip
        path.write_text(json.dumps(content))
        return True

    monkeypatch.setattr(tuning, "supervise", supervise)
    for added in (2, 0):
        report = lora_kernels.tune(shapes=[(8, 8, 2)], rows=[16], dtype="fp16", progress=progress)
        assert (report.buckets, report.added) == (2, added)
    assert seen == [(lines, shown)] * 2


def test_a_quick_bucket_is_made_again_with_all_tiles():
    _, case = tuning.cases_of(None, (16,), [(8, 8, 2)], "fp16")[0]
    quick = [{**tuning.table.key_of(case, op), "variants": False} for op in ("forward", "backward")]
    missing = tuning.table.missing
    assert missing(quick, "dense", case) == ["forward", "backward"]
    assert missing(quick, "dense", case, variants=False) == []
    assert missing([], "dense", case, backward=False) == ["forward"]
    whole = [{**quick[0], "variants": True}, quick[1]]
    assert missing(whole, "dense", case) == ["backward"]
