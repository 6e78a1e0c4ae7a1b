"""Every launch again on copies of its tensors between protected pages: who reads or writes past an
end dies of it.

    TRITON_INTERPRET=1 python tests/guard_pages.py [--plan NAME ...] [--short] [--fault KIND]

Runs in Triton's interpreter, whose loads and stores go to the addresses that a kernel computes. A
launch runs as it is; then on copies of which the end, and then the start, lies at a protected page,
what it did not write lies in pages that cannot be written, and gaps between rows hold NaN; and must
give the same bits. Before each launch its kernel and case are printed: what a dead process printed
last is to blame. `--fault` launches a kernel with that fault, to see that it is found.
"""

import argparse
import ctypes
import faulthandler
import mmap
import sys
from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from interpreted import AMPERE, HOPPER, Case, Problem, serves
from torch import Tensor

from lora_kernels.backends.cuda.choice import use_plan
from lora_kernels.backends.cuda.plans import PLANS
from lora_kernels.backends.device import assume
from lora_kernels.backends.triton import columns, decoding, gating, masking
from lora_kernels.backends.triton.launch import intercept, launch
from lora_kernels.weights import quantize

F16, F32 = torch.float16, torch.float32
PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
NONE, READ = 0, 1
PLANS_HERE = [name for name in PLANS if name not in ("aten", "decode_cuda", "gluon")]
CASES = (
    Case(1, 1, 1, 1, F32),
    Case(1, 65, 33, 8, p=0.5),
    Case(3, 17, 129, 3, F16, p=0.5, bias=True),
    Case(17, 129, 33, 17, F32, bias=True),
    Case(33, 72, 136, 16, p=0.25),
    Case(40, 48, 80, 8, layout="transposed", bias=True),
    Case(50, 33, 65, 16, layout="sliced", p=0.3, wide_adapters=True),
    Case(65, 136, 160, 64, bias=True),
    Case(70, 72, 80, 130),
    Case(127, 40, 96, 64, F32, p=0.2),
    Case(129, 65, 72, 3, layout="sliced"),
)
SHORT = (CASES[2], CASES[3], CASES[6])


def protect(address: int, size: int, access: int) -> None:
    if _libc.mprotect(address, size, access):
        raise OSError(ctypes.get_errno(), "mprotect")


class Guarded:
    """A copy of a tensor, with its gaps, beside a protected page."""

    def __init__(self, tensor: Tensor, at_end: bool) -> None:
        sizes, strides = tensor.shape, tensor.stride()
        last = sum((n - 1) * step for n, step in zip(sizes, strides, strict=True))
        self.count = last + 1 if tensor.numel() else 0
        self.size = max(1, self.count) * tensor.element_size()
        self.pages = -(-self.size // PAGE)
        self.region = mmap.mmap(-1, (self.pages + 2) * PAGE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.region))
        offset = PAGE + (self.pages * PAGE - self.size if at_end else 0)
        span = torch.frombuffer(
            self.region, dtype=tensor.dtype, count=max(1, self.count), offset=offset
        )
        if tensor.dtype.is_floating_point:
            span.fill_(float("nan"))
        self.tensor = span.as_strided(sizes, strides)
        # Of what an expanded tensor has once, one.
        once = tuple(slice(0, 1) if step == 0 else slice(None) for step in strides)
        self.tensor[once].copy_(tensor[once])
        for page in (0, self.pages + 1):
            protect(self.address + page * PAGE, PAGE, NONE)

    def freeze(self) -> None:
        protect(self.address + PAGE, self.pages * PAGE, READ)


def same(one: Tensor, other: Tensor) -> bool:
    one, other = one.contiguous().view(-1), other.contiguous().view(-1)
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8)) if one.numel() else True


class Checker:
    """What stands in for every launch."""

    def __init__(self, what: str) -> None:
        self.what, self.launches = what, 0

    def __call__(self, kernel, grid, args, meta, run) -> None:
        name = getattr(kernel, "fn", kernel).__name__
        print(f"{name} in {self.what}", flush=True)
        tensors = {key(arg): arg for arg in args if isinstance(arg, Tensor)}
        before = {k: tensor.clone() for k, tensor in tensors.items()}
        run()
        written = [k for k, tensor in tensors.items() if not same(tensor, before[k])]
        for at_end in (True, False):
            guarded = {k: Guarded(tensor, at_end) for k, tensor in tensors.items()}
            for k in tensors:
                if k in written:
                    guarded[k].tensor.copy_(before[k])
                else:
                    guarded[k].freeze()
            again = (guarded[key(arg)].tensor if isinstance(arg, Tensor) else arg for arg in args)
            kernel[grid](*again, **meta)
            for k in written:
                if not same(guarded[k].tensor, tensors[k]):
                    raise AssertionError(f"{name} in {self.what}: other bits between guards")
        self.launches += 1


def key(tensor: Tensor) -> tuple:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def calls(case: Case) -> Iterator[tuple[str, object]]:
    problem = Problem(case)
    yield "linear", problem.linear
    base = torch.randn(case.M, case.N).to(case.dtype)
    yield "add", lambda: problem.add(base)


def check(plans: Sequence[str], cases: Sequence[Case]) -> int:
    torch.use_deterministic_algorithms(True)  # new memory holds NaN
    launches = 0
    for plan in plans:
        for case in cases:
            if not serves(plan, case):
                continue
            for card, target in (("pointers", AMPERE), ("descriptors", HOPPER)):
                for op, call in calls(case):
                    checker = Checker(f"{plan} {op} by {card}: {case}")
                    with assume(target), use_plan(plan), intercept(checker):
                        call()
                    launches += checker.launches
    for p, words in ((0.3, 1), (0.7, 3)):
        seed = torch.tensor([1, 3, 8][:words])
        x = torch.randn(33, 70)[:, 3:]
        checker = Checker("the mask")
        with intercept(checker):
            total = masking.drop(x, seed, 2, p)
            masking.add_kept(total, x, 2.0, seed, 2, p)
        launches += checker.launches
    dense = torch.randn(9, 128)
    for kind, block in (("nf4", None), ("int4", 32), ("int8", None), ("fp8", None), ("fp8", 48)):
        weight = quantize(dense, kind, block=block)
        checker = Checker(f"decoding {kind}")
        with intercept(checker):
            decoding.decode(weight, slice(0, 9), slice(0, 128), torch.empty(9, 128))
            decoding.decode(weight, slice(8, 9), slice(32, 128), torch.empty(1, 96))
        launches += checker.launches
    z, dy, other = (torch.randn(33, 70)[:, 3:] for _ in range(3))
    checker = Checker("columns and gates")
    with intercept(checker):
        for added in (None, other, other[0]):
            columns.forward(z, torch.rand(67), added)
        columns.backward(dy, z, torch.rand(67), True)
        for act in gating.ACTIVATIONS:
            gating.gated(z, other, act)
            gating.gradients((z, other), dy, act, tuple(torch.empty(33, 134).chunk(2, 1)))
    return launches + checker.launches


# ----------------------------------------------------------------------------------- faulty kernels


@triton.jit
def copy_kernel(x, y, n, stride, past, BLOCK: tl.constexpr):
    """y[i] = x[i * stride], `past` elements too many."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i * stride, mask=i < n + past, other=0.0), mask=i < n)


@triton.jit
def first_kernel(x, y, n, BLOCK: tl.constexpr):
    """Reads before the start."""
    i = tl.arange(0, BLOCK) - 1
    tl.store(y + i + 1, tl.load(x + i, mask=i < n - 1, other=0.0), mask=i < n - 1)


@triton.jit
def beyond_kernel(x, y, n, BLOCK: tl.constexpr):
    """Writes one element too many."""
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n, other=0.0), mask=i <= n)


@triton.jit
def writer_kernel(x, y, n, BLOCK: tl.constexpr):
    """Writes its input, what is there already."""
    i = tl.arange(0, BLOCK)
    values = tl.load(x + i, mask=i < n, other=0.0)
    tl.store(y + i, values, mask=i < n)
    tl.store(x + i, values, mask=i < n)


def fault(kind: str) -> None:
    n = 100
    # Room on both sides, so that the plain run survives.
    room, out = torch.randn(3 * n), torch.zeros(3 * n)
    x, y = room[n : 2 * n], out[n : 2 * n]
    with intercept(Checker(f"the fault {kind}")):
        if kind == "none":
            launch(copy_kernel, (1,), x, y, n, 1, 0, BLOCK=128)
        elif kind == "past the end":
            launch(copy_kernel, (1,), x, y, n, 1, 1, BLOCK=128)
        elif kind == "before the start":
            launch(first_kernel, (1,), x, y, n, BLOCK=128)
        elif kind == "written past the end":
            launch(beyond_kernel, (1,), x, y, n, BLOCK=128)
        elif kind == "input written":
            launch(writer_kernel, (1,), x, y, n, BLOCK=128)
        elif kind == "gap":
            # The stride is taken for one less: what lies between the elements is read.
            launch(copy_kernel, (1,), room[::3][:n], y, n, 2, 0, BLOCK=128)


FAULTS = (
    "none",
    "past the end",
    "before the start",
    "written past the end",
    "input written",
    "gap",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plan", nargs="+", choices=PLANS_HERE, default=PLANS_HERE)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--fault", choices=FAULTS)
    args = parser.parse_args()
    faulthandler.enable()
    if args.fault:
        fault(args.fault)
    else:
        launches = check(args.plan, SHORT if args.short else CASES)
        print(f"{launches} launches between guards, none out of bounds")
        return 0 if launches else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
