"""Launching without Triton's search for the compiled kernel."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from lora_kernels.backends.triton import launch
from lora_kernels.backends.triton.low_rank import expand_kernel

INTEGERS = (0, 1, 2, 15, 16, 17, 48, 4096, 2**31 - 16, 2**31 - 1, 2**31, 2**40)
MEMORY = torch.zeros(64)
TENSORS = tuple(
    MEMORY.view(torch.int8)[offset:].view(dtype)
    for offset in (0, 4, 8, 16, 32)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64)
    if offset % dtype.itemsize == 0
)
CONSTANTS = {"R": 16, "RANKS": 1, "BM": 64, "BN": 64, "DROP": 0, "HIGH": 1.0, "PRECISION": "ieee"}

bind = create_function_from_signature(
    expand_kernel.signature, expand_kernel.params, make_backend(GPUTarget("cuda", 90, 32))
)
arguments = st.tuples(
    st.one_of(st.none(), st.sampled_from(TENSORS)),
    *[st.sampled_from(TENSORS)] * 3,
    st.one_of(st.none(), st.sampled_from(TENSORS)),
    *[st.sampled_from(INTEGERS)] * 3,
    st.floats(allow_nan=False),
    *[st.sampled_from(INTEGERS)] * 7,
)


def specialised(args: tuple) -> str:
    """What Triton compiles for."""
    _, specialization, _ = bind(*args, **CONSTANTS)
    return str(specialization)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(arguments, arguments, st.sets(st.integers(0, 15), max_size=2))
def test_equal_keys_mean_equal_code(args, others, changed):
    """Of two calls that differ in few arguments."""
    changed = tuple(o if i in changed else a for i, (a, o) in enumerate(zip(args, others)))  # noqa: B905
    if launch._key(expand_kernel, args, CONSTANTS) == launch._key(
        expand_kernel, changed, CONSTANTS
    ):
        assert specialised(args) == specialised(changed)


def test_the_number_of_rows_makes_no_new_key():
    """M is not specialised on, so a batch of another size launches the same kernel."""
    at = expand_kernel.arg_names.index("M")
    args = [None, *TENSORS[:3], None, 1, 16, 16, 1.0, *[16] * 7]
    keys = set()
    for args[at] in (1, 2, 16, 2**31 - 1):
        keys.add(launch._key(expand_kernel, args, CONSTANTS))
    assert len(keys) == 1
    args[at] = 2**31
    assert launch._key(expand_kernel, args, CONSTANTS) not in keys


class Compiled:
    function, packed_metadata = "function", "metadata"

    def __init__(self) -> None:
        self.started = []

    def run(self, *args) -> None:
        self.started.append(args)


class Kernel:
    """What of a Triton kernel is used; indexing it is Triton's own, slow launch."""

    arg_names = ("x", "M", "scale", "BM", "BN")
    params = tuple(SimpleNamespace(do_not_specialize=name == "M") for name in arg_names)

    def __init__(self) -> None:
        self.pre_run_hooks, self.slow, self.compiled = [], [], Compiled()

    def __getitem__(self, grid):
        def run(*args, **meta):
            self.slow.append((grid, args, meta))
            return self.compiled

        return run


@pytest.fixture
def kernel(monkeypatch) -> Kernel:
    driver = SimpleNamespace(
        get_current_device=lambda: 0, get_current_stream=lambda device: f"stream of {device}"
    )
    monkeypatch.setattr(type(triton.runtime.driver), "active", driver)
    monkeypatch.setattr(launch, "_compiled", {})
    return Kernel()


def test_from_the_second_time_on_the_compiled_kernel_is_started(kernel):
    x, y = TENSORS[0], TENSORS[0].clone()
    launch.launch(kernel, (3, 2), x, 5, 1.0, BN=32, BM=16, num_warps=4)
    assert kernel.slow == [((3, 2), (x, 5, 1.0), {"BN": 32, "BM": 16, "num_warps": 4})]
    launch.launch(kernel, (7,), y, 6, 0.5, BN=32, BM=16, num_warps=4)
    assert len(kernel.slow) == 1
    (started,) = kernel.compiled.started
    assert started[:9] == (7, 1, 1, "stream of 0", "function", "metadata", None, None, None)
    assert started[9] is y
    assert started[10:] == (6, 0.5, 16, 32)


def test_hooks_see_every_launch(kernel, monkeypatch):
    """A profiler's: Triton itself launches then."""
    args, meta = (TENSORS[0], 5, 1.0), {"BM": 16, "BN": 32}
    launch.launch(kernel, (1,), *args, **meta)
    monkeypatch.setattr(triton.knobs.runtime, "launch_enter_hook", lambda metadata: None)
    launch.launch(kernel, (1,), *args, **meta)
    assert len(kernel.slow) == 2
    assert not kernel.compiled.started


def test_the_store_is_bounded(kernel, monkeypatch):
    monkeypatch.setattr(launch, "_MOST_COMPILED", 2)
    for BM in (16, 32, 64):
        launch.launch(kernel, (1,), TENSORS[0], 5, 1.0, BM=BM, BN=32)
    assert len(launch._compiled) == 1
