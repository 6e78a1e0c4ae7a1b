"""`tune` in a world whose ranks are nodes with a GPU and a cache folder each; for `worlds.run`."""

import contextlib
import json
import os
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import lora_kernels
from lora_kernels import backends, tuning
from lora_kernels.backends.cuda import tables


def _table(M, gpu="A Card"):
    bucket = {"op": "forward", "dtype": "bfloat16", "M": M, "N": 8, "K": 8, "r": 8,
              "dropout": False, "plan": "aten"}  # fmt: skip
    return {"gpu": gpu, "versions": {"triton": "3"}, "buckets": [bucket],
            "proven": [tables.proof("aten", "bfloat16", False)]}  # fmt: skip


@contextlib.contextmanager
def _node(supervise, card="A Card"):
    """Its cache folder; `supervise` takes the place of the workers."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        for owner, name, value in (
            (torch.cuda, "is_available", lambda: True),
            (torch.cuda, "is_current_stream_capturing", lambda: False),
            (torch.cuda, "get_device_name", lambda index=None: card),
            (torch.cuda, "current_device", lambda: 0),
            (tables, "key_of", lambda index: "key"),
            (tables, "_triton", lambda: "3"),
            (tables, "TUNED", Path(folder, "package")),
            (tables._env, "TUNED", None),
            (tuning, "supervise", supervise),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        given = {"XDG_CACHE_HOME": folder, "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
        stack.enter_context(mock.patch.dict(os.environ, given))
        backends.forget()
        yield Path(folder)
    backends.forget()


def _by_rank_0(path, *_):
    assert dist.get_rank() == 0, "only rank 0 tunes"
    path.write_text(json.dumps(_table(64)))
    return True


def _tune():
    return lora_kernels.tune(shapes=[(8, 8, 8)], rows=[64])


def _of_all(value):
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def check_all_use_and_keep_what_rank_0_made():
    with _node(_by_rank_0):
        path = tables.cache_path(0)
        if dist.get_rank() == 1:  # what was there before
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps(_table(1)))
        report = _tune()
        assert report.path == path
        assert report.adopted
        assert report.buckets == report.added == 1
        assert _of_all(tables.tuned(0)) == [_table(64)] * 2
        assert _of_all(path.read_text()) == [json.dumps(_table(64))] * 2
        assert "installed by tune" in tables.describe(0)[0]


def check_a_node_that_can_write_nothing_uses_it_too():
    refusing = mock.Mock(side_effect=PermissionError(13, "Permission denied"))
    with _node(_by_rank_0), mock.patch.object(tuning, "replace_text", refusing):
        report = _tune()
        assert refusing.called == (dist.get_rank() == 1)
        assert (str(report.path) == "(not kept)") == (dist.get_rank() == 1)
        assert _of_all(tables.tuned(0)) == [_table(64)] * 2


def check_another_card_does_not_use_it():
    card = ("A Card", "Another")[dist.get_rank()]
    with _node(_by_rank_0, card):
        _tune()
        assert (tables.tuned(0) is None) == (dist.get_rank() == 1)


def check_what_rank_0_raises_all_raise():
    for error, kind in (
        (ValueError("no such size"), ValueError),
        (RuntimeError("the worker ended"), RuntimeError),
        (OSError(28, "No space left on device"), (RuntimeError, OSError)),
        (KeyboardInterrupt("stopped"), (RuntimeError, KeyboardInterrupt)),
    ):

        def failing(*_, error=error):
            raise error

        with _node(failing):
            with pytest.raises(kind) as raised:
                _tune()
            assert str(error) in str(raised.value)
            if dist.get_rank() == 1:
                assert str(raised.value).startswith("on rank 0: ")
                assert not tables.cache_path(0).exists()
            assert tables.tuned(0) is None
        dist.barrier()


def check_a_rank_that_captured_keeps_what_serves_it():
    with _node(_by_rank_0):
        captured = dist.get_rank() == 1
        assert tables.tuned(0) is None  # as it looked before what it captured
        with mock.patch.object(backends.choice, "_captured", captured):
            assert _of_all(_tune().adopted) == [True, False]
            assert (tables.tuned(0) is None) == captured
