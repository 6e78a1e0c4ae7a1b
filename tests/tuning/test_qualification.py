"""How often a candidate runs before it is proven, what is seen of its memory, what is taken."""

import pytest
import torch

from lora_kernels.backends import cuda
from lora_kernels.backends.cuda.plan import Call
from lora_kernels.testing import Expected, WrongResult
from lora_kernels.tuning import search
from lora_kernels.tuning.guards import GuardBands
from lora_kernels.tuning.table import Candidate

PDL = Candidate("shrink_gemm", {"gemm": {"pdl": 1}})


class _Right(Expected):
    """Of a work whose outputs are not asked for."""

    def require(self, *_):
        pass


class _OnGpu:
    device = torch.device("cuda", 0)


def work_of(outputs, rows=None):
    """Its runs give these one after the other."""
    call = Call("forward", "bfloat16", 16, 8, 8, 8, False)
    right = _Right(torch.ones(1) if rows is None else rows, [], [])
    return search.Work(call, lambda: [next(outputs)], right, ("y",))


def runs_of(candidate, again=False, rows=None):
    count = [0]

    def outputs():
        while True:
            count[0] += 1
            yield torch.zeros(1)

    search.qualify(candidate, work_of(outputs(), rows), again)
    return count[0]


@pytest.mark.parametrize(
    ("candidate", "first", "again"),
    [
        (Candidate("cublas", {}), 5, 2),
        (Candidate("shrink_gemm", {"gemm": {"bm": 64}}), 5, 2),
        (Candidate("flag", {}), 20, 2),
        (Candidate("grouped", {}), 20, 2),
        (Candidate("decode_cuda", {}), 20, 2),
        (PDL, 20, 20),  # of a plan that other tiles have proven
    ],
)
def test_how_often_it_runs(monkeypatch, candidate, first, again):
    assert runs_of(candidate) == first
    assert runs_of(candidate, again=True) == again

    # And on a GPU: beside a busy stream where it cooperates, and in a graph.
    seen = []
    stream = type("Stream", (), {"wait_stream": id, "synchronize": lambda _: seen.append("done")})
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: torch.no_grad())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    matrix = type("Matrix", (), {"__matmul__": lambda a, b: seen.append("busy")})()
    monkeypatch.setattr(search, "_matrix", lambda device: matrix)
    monkeypatch.setattr(search, "_in_a_graph", lambda *_: seen.append("graph"))
    assert runs_of(candidate, rows=_OnGpu) == first
    busy = ["busy"] * 4 * 19 + ["done"] if first == 20 else []
    assert seen == [*busy, "graph"]
    seen.clear()
    assert runs_of(candidate, again=True, rows=_OnGpu) == again
    assert ("graph" in seen) == (again == 20)


@pytest.mark.parametrize(("candidate", "last"), [(Candidate("cublas", {}), 5), (PDL, 20)])
def test_the_last_run_is_looked_at(candidate, last):
    def outputs():
        yield from (torch.zeros(1) for _ in range(last - 1))
        yield torch.ones(1)

    with pytest.raises(WrongResult, match=f"other bits in run {last}$"):
        search.qualify(candidate, work_of(outputs()))


def test_new_memory_is_poisoned():
    with search.poisoned():
        assert torch.empty(1000).isnan().all()
        assert torch.ones(10).new_empty(10).isnan().all()
    assert not torch.utils.deterministic.fill_uninitialized_memory or (
        torch.get_deterministic_debug_mode() == 0
    )
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32])
@pytest.mark.parametrize("size", [(3, 5), (1,), (2, 0)])
def test_bands(dtype, size):
    made = {
        "empty": lambda: torch.empty(size, dtype=dtype),
        "new": lambda: torch.ones(7, dtype=dtype).new_empty(size),
        "like": lambda: torch.empty_like(torch.ones(size, dtype=dtype)),
        "strided": lambda: torch.empty_strided(size, [1] * len(size), dtype=dtype),
        "zeros": lambda: torch.zeros(size, dtype=dtype),
        "full": lambda: torch.full(size, 3, dtype=dtype),
    }
    for name, make in made.items():
        with GuardBands() as bands:
            out = make()
        assert (out.shape, out.dtype, out.stride()) == (size, dtype, make().stride())
        if name in ("zeros", "full"):
            assert torch.equal(out, make())
        elif dtype.is_floating_point:
            assert out.isnan().all()
        out.fill_(1)
        bands.require_whole("x")
        if out.numel():
            last = sum((n - 1) * step for n, step in zip(out.shape, out.stride(), strict=True))
            for where, at in (("past", last + 1), ("before", -1)):
                out.as_strided((1,), (1,), out.storage_offset() + at).fill_(1)
                with pytest.raises(WrongResult, match=f"^x: wrote {where} the memory"):
                    bands.require_whole("x")
                out.as_strided((1,), (1,), out.storage_offset() + at).view(torch.uint8).fill_(255)


def test_every_entry_of_the_backend_is_guarded(monkeypatch):
    """Also what is allocated before a plan is asked: the output on top of one that is given."""
    served = {}

    def entry(name):
        def run(*_):
            served[name] = torch.empty(4)

        return run

    for name in ("forward", "add_", "backward"):
        monkeypatch.setattr(cuda, name, entry(name))
    plain = cuda.forward
    with search.guarded("c"):
        for name in ("forward", "add_", "backward"):
            getattr(cuda, name)(None)
            assert served[name].isnan().all(), name
    assert cuda.forward is plain

    def writes_past():
        with search.guarded("c"):
            cuda.backward(None)
            served["backward"].as_strided((5,), (1,))[4] = 0

    with pytest.raises(WrongResult, match=r"^c: wrote past"):
        writes_past()
    assert cuda.forward is plain


def test_what_is_taken():
    gemm, shrink = {"gemm": {"bm": 64}}, {"shrink": {"split": 2}}
    found = [Candidate(*c) for c in (("aten", {}), ("shrink_gemm", {}), ("shrink_gemm", gemm),
             ("shrink_gemm", shrink), ("shrink_gemm", {"gemm": {"bm": 128}}))]  # fmt: skip
    assert search.joined(found, [1.0, 0.8, 0.6, 0.7, 0.76]) == [("shrink_gemm", gemm | shrink)]
    assert search.joined(found, [1.0, 0.8, 0.6, 0.9, 0.76]) == []
    assert search.simplest(found, [1.0, 0.8, 0.6, 0.7, 0.76]) == 2
    assert search.simplest(found, [1.0, 0.605, 0.6, 0.7, 0.76]) == 1
    assert search.simplest(found, [1.0, 0.998, 0.991, 1.2, 1.3]) == 0
    assert search.simplest(found, [1.0, 0.99, 0.99, 1.2, 1.3]) == 0
    assert search.simplest(found, [1.0, 0.992, 0.985, 1.2, 1.3]) == 2


def test_what_counts_is_the_ratio_within_a_round():
    """The second is faster in all rounds but one, in which the machine was busy: a median of its
    own times would be slower than ATen's."""
    found = [Candidate("aten", {}), Candidate("cublas", {}), Candidate("dual", {})]
    times = [[3.0, 1.0, 2.0], [2.7, 2.5, 1.8], [3.3, 0.5, 2.2]]
    ratios = search.ratios_to_aten(found, times)
    assert ratios == pytest.approx([1.0, 0.9, 1.1])
    assert search.simplest(found, ratios) == 1


def test_what_may_hang_is_tried_last():
    call = Call("forward", "float16", 16, 512, 512, 8, False)
    for variants in (True, False):
        found = search.listed(call, torch.device("cpu"), variants)
        cooperates = [search.PLANS[candidate.plan].cooperates for candidate in found]
        assert found[0] == ("aten", {})
        assert cooperates == sorted(cooperates)
        assert {"flag", "shrink_gemm"} < {candidate.plan for candidate in found}
        assert any(candidate.tiles for candidate in found) == variants
