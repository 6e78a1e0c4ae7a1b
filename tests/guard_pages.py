"""Every launch again on copies of its tensors between protected pages: who reads or writes past an
end dies of it.

    TRITON_INTERPRET=1 python tests/guard_pages.py [--plan NAME ...] [--short]

Runs in Triton's interpreter, whose loads and stores go to the addresses that a kernel computes. A
launch runs as it is; then on copies of which the end, and then the start, lies at a protected page,
what it did not write lies in pages that cannot be written, and gaps between rows hold NaN; and must
give the same bits. Every case runs in a child process, which names each kernel before its launch:
of one that dies the last is reported, with the line that it was in. Kernels with faults come first:
where one of them is not found, nothing is reported of the others.
"""

import argparse
import ctypes
import faulthandler
import mmap
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from interpreted import AMPERE, HOPPER, Case, Problem, serves
from torch import Tensor

from lora_kernels.backends.cuda import many, scaled
from lora_kernels.backends.cuda.choice import use_plan
from lora_kernels.backends.cuda.plans import PLANS
from lora_kernels.backends.device import assume
from lora_kernels.backends.triton import columns, decoding, dropout, gating, masking, packed
from lora_kernels.backends.triton.launch import intercept, launch
from lora_kernels.branch import Branch, Branches, Dense, Experts
from lora_kernels.weights import quantize

F16, F32 = torch.float16, torch.float32
PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
NONE, READ = 0, 1
APART = ("aten", "decode_cuda", "gluon", "decode_coded")
PLANS_HERE = [name for name in PLANS if name not in APART]
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
    """What stands in for every launch. `behind` are tensors that kernels find by their addresses,
    which lie in a tensor of 64 bits."""

    def __init__(self, behind: Sequence[Tensor] = ()) -> None:
        self.behind, self.launches = behind, 0

    def __call__(self, kernel, grid, args, meta, run) -> None:
        print(f"{BEFORE}{getattr(kernel, 'fn', kernel).__name__}", flush=True)
        tensors = {key(arg): arg for arg in args if isinstance(arg, Tensor)}
        tables = [k for k, tensor in tensors.items() if self.addressed(tensor)]
        for table in tables:
            tensors |= {key(tensor): tensor for tensor in self.addressed(tensors[table])}
        before = {k: tensor.clone() for k, tensor in tensors.items()}
        run()
        written = [k for k, tensor in tensors.items() if not same(tensor, before[k])]
        for at_end in (True, False):
            guarded = {k: Guarded(tensor, at_end) for k, tensor in tensors.items()}
            for table in tables:
                words = guarded[table].tensor
                for tensor in self.addressed(tensors[table]):
                    words[words == tensor.data_ptr()] = guarded[key(tensor)].tensor.data_ptr()
            for k in tensors:
                if k in written:
                    guarded[k].tensor.copy_(before[k])
                else:
                    guarded[k].freeze()
            again = (guarded[key(arg)].tensor if isinstance(arg, Tensor) else arg for arg in args)
            kernel[grid](*again, **meta)
            for k in written:
                if not same(guarded[k].tensor, tensors[k]):
                    raise AssertionError("other bits between guards")
        self.launches += 1

    def addressed(self, tensor: Tensor) -> list[Tensor]:
        if tensor.dtype != torch.int64:
            return []
        words = set(tensor.flatten().tolist())
        return [other for other in self.behind if other.data_ptr() in words]


BEFORE = "launches "


def key(tensor: Tensor) -> tuple:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


# -------------------------------------------------------------------------------------------- cases


def of_plan(plan: str, target: object, case: Case, op: str) -> int:
    problem, checker = Problem(case), Checker()
    base = torch.randn(case.M, case.N).to(case.dtype)
    with assume(target), use_plan(plan), intercept(checker):
        problem.linear() if op == "linear" else problem.add(base)
    return checker.launches


def of_mask(p: float, words: int) -> int:
    seed, x, checker = torch.tensor([1, 3, 8][:words]), torch.randn(33, 70)[:, 3:], Checker()
    with intercept(checker):
        total = masking.drop(x, seed, 2, p)
        masking.add_kept(total, x, 2.0, seed, 2, p)
    return checker.launches


def of_decoder(kind: str, block: int | None, K: int) -> int:
    weight, checker = quantize(torch.randn(9, K), kind, block=block), Checker()
    with intercept(checker):
        decoding.decode(weight, slice(0, 9), slice(0, K), torch.empty(9, K))
        decoding.decode(weight, slice(8, 9), slice(32, K), torch.empty(1, K - 32))
    return checker.launches


def of_product(kind: str, block: int | None, K: int, case: Case) -> int:
    """Of few rows with a quantised weight."""
    (M, N, _, r), dtype, checker = case[:4], case.dtype, Checker()
    weight = quantize(torch.randn(N, K), kind, block=block)
    x, a, b = torch.randn(M, K + 3)[:, 1 : K + 1].to(dtype), torch.randn(r, K), torch.randn(N, r)
    bias = torch.randn(N).to(dtype) if case.bias else None
    drop = dropout.of(case.p, torch.tensor([7]) if case.p else None)
    with intercept(checker):
        decoding.multiply(x, weight, bias, (a.to(dtype), b.to(dtype)), (1.5, 1.0), True, drop)
    return checker.launches


def of_many(
    N: int, K: int, ranks: Sequence[int], p: float, dtype: torch.dtype, experts: int = 0
) -> int:
    """Of groups of 5, 0 and 40 rows in mixed order, and of 2 rows of nobody; of so many experts
    with their bases, stored [out,in] or of two [in,out]."""
    lengths, checker = (5, 0, 40), Checker()
    M, places = sum(lengths) + 2, [0, 5, 5, 45]
    order, offsets = torch.randperm(M), torch.tensor([*places, M])
    a = [torch.randn(r, K).to(dtype) for r in ranks]
    b = [torch.randn(N, r).to(dtype) for r in ranks]
    gradients = tuple([torch.zeros_like(t) for t in matrices] for matrices in (a, b))
    checker.behind = (*a, *b, *gradients[0], *gradients[1])
    seeds = torch.tensor([3, 4, 5]) if p else None
    branches = Branches(a, b, [1.5, 2.0, 1.0], p, seeds, order, [*places, M], offsets)
    x, dy = torch.randn(M, K + 3)[:, 1 : K + 1].to(dtype), torch.randn(M, N).to(dtype)
    s, y = torch.zeros(M, max(ranks), dtype=dtype), torch.randn(M, N).to(dtype)
    base = None
    if experts:
        weight = torch.randn(experts, *((K, N) if experts == 2 else (N, K))).to(dtype)
        bias = torch.randn(experts, N).to(dtype)
        base = Experts(weight.mT if experts == 2 else weight, bias, [experts - 1, 0, 1])
    with intercept(checker):
        if base is None:
            many.add_(y, x, branches, s)
        else:
            many.experts(y, x, base, branches, s)
        many.backward(torch.randn(M, K).to(dtype), (dy, x, s), branches, gradients, base)
    return checker.launches


def of_packed(M: int, K: int, layers: Sequence[tuple[int, int]], dtype: torch.dtype) -> int:
    """Of layers (N, r) of one x, a part of wider rows; r 0 is a layer without a branch."""
    checker, ranks = Checker(), sum(r for _, r in layers)
    x, low = torch.randn(M, K + 3)[:, 1 : K + 1].to(dtype), torch.randn(M, ranks).to(dtype)
    given = [
        packed.Layer(
            torch.randn(N, K).to(dtype),
            torch.randn(N, r).to(dtype) if r else None,
            torch.randn(N).to(dtype) if r != 3 else None,
            torch.full((M, N), torch.nan, dtype=dtype),
            1.0,
        )
        for N, r in layers
    ]
    checker.behind = tuple(t for layer in given for t in layer if isinstance(t, torch.Tensor))
    dys = [torch.randn(M, N).to(dtype) for N, _ in layers]
    with intercept(checker):
        packed.packed_forward(x, low, given)
        weights, mat = [layer.weight for layer in given], torch.randn(ranks, K).to(dtype)
        packed.packed_dx(dys, weights, low, mat, torch.empty(M, K, dtype=dtype))
    assert not any(layer.y.isnan().any() for layer in given)
    return checker.launches


def of_columns_and_gates() -> int:
    (z, dy, other), checker = (torch.randn(33, 70)[:, 3:] for _ in range(3)), Checker()
    with intercept(checker):
        for added in (None, other, other[0]):
            columns.forward(z, torch.rand(67), added)
        columns.backward(dy, z, torch.rand(67), True)
        for act in gating.ACTIVATIONS:
            gating.gated(z, other, act)
            gating.gradients((z, other), dy, act, tuple(torch.empty(33, 134).chunk(2, 1)))
    return checker.launches


def of_scaled(target: object, case: Case) -> int:
    """DoRA's layer, backward with y and without."""
    problem, checker, factor = Problem(case), Checker(), torch.randn(case.N)
    factor[::3] = 0
    branch = Branch(problem.a, problem.b, 1.5, 0.0, None)
    with assume(target), intercept(checker):
        y, s = scaled.forward(problem.base, problem.x, branch, factor)
        for known in (y, None):
            rows = problem.dy, problem.x, s, known
            scaled.backward(Dense(problem.weight, problem.bias), rows, branch, factor, True)
    return checker.launches


WEIGHTS = (
    ("nf4", None, 128), ("int4", 32, 160), ("int8", None, 71), ("fp8", None, 129), ("fp8", 48, 100),
)  # fmt: skip
FEW = (Case(1, 9, 0, 3, F32), Case(5, 33, 0, 17, p=0.3, bias=True), Case(35, 40, 0, 64))
GROUPS = (
    (20, 24, (3, 1, 2), 0.0, F32),
    (65, 71, (17, 40, 3), 0.3, F16),
    (80, 64, (16, 16, 16), 0.3, F32),
    (65, 71, (17, 40, 3), 0.3, F16, 2),
    (20, 24, (3, 1, 2), 0.0, F32, 3),
    (80, 64, (16, 16, 16), 0.0, F16, 3),
)

PACKED = (
    (5, 17, ((40, 4), (3, 0), (16, 3)), F32),
    (33, 64, ((130, 20), (64, 16)), F16),
)


def named_cases(plans: Sequence[str], short: bool) -> Iterator[tuple[str, Callable[[], int]]]:
    for plan in plans:
        for case in SHORT if short else CASES:
            for card, target in (("pointers", AMPERE), ("descriptors", HOPPER)):
                for op in ("linear", "add") if serves(plan, case) else ():
                    name = f"{plan} {op} by {card}: {case}"
                    yield name, partial(of_plan, plan, target, case, op)
    for p, words in ((0.3, 1), (0.7, 3)):
        yield f"the mask of p = {p}", partial(of_mask, p, words)
    for weight in WEIGHTS:
        yield f"decoding {weight}", partial(of_decoder, *weight)
        for case in FEW[1:2] if short else FEW:
            yield f"few rows of {weight}: {case}", partial(of_product, *weight, case)
    for groups in GROUPS[1:4:2] if short else GROUPS:
        yield f"many groups {groups}", partial(of_many, *groups)
    for layers in PACKED:
        yield f"packed {layers}", partial(of_packed, *layers)
    for case in SHORT if short else CASES:
        for card, target in (("pointers", AMPERE), ("descriptors", HOPPER)):
            yield f"scaled by {card}: {case}", partial(of_scaled, target, case)
    yield "columns and gates", of_columns_and_gates


# --------------------------------------------------------------------------------------- child each


def in_child(run: Callable[[], int]) -> tuple[int, str | None]:
    """(launches, None) of a call in a child process, or (0, what it died of)."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if child == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # noqa: SIM115 the child's last
            faulthandler.enable(2)
            status = 1
            try:
                print(f"{run()} launches", flush=True)
                status = 0
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0)
        err.seek(0)
        lines, errors = out.read().splitlines(), err.read()
    if status == 0:
        return int(lines[-1].split()[0]), None
    kernel = next((line.removeprefix(BEFORE) for line in reversed(lines)), "before any launch")
    if status > 0:
        return 0, f"{kernel}: {errors.strip().splitlines()[-1]}"
    frames = re.findall(r'File "([^"]+)", line (\d+) in (\w+)', errors)
    ours = [f for f in frames if "lora_kernels/backends/triton" in f[0] or f[2].endswith("_kernel")]
    where = ", ".join(f"{name} line {line}" for _, line, name in ours[:1])
    return 0, f"{kernel}: signal {-status}{' in ' * bool(where)}{where}"


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


def fault(kind: str) -> int:
    n = 100
    # Room on both sides, so that the plain run survives.
    room, out = torch.randn(3 * n), torch.zeros(3 * n)
    x, y = room[n : 2 * n], out[n : 2 * n]
    checker = Checker()
    with intercept(checker):
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
    return checker.launches


# What is found of each.
FAULTS: Mapping[str, str | None] = {
    "none": None,
    "past the end": "copy_kernel: signal 11",
    "before the start": "first_kernel: AssertionError: other bits between guards",
    "written past the end": "beyond_kernel: signal 11",
    "input written": "writer_kernel: signal 11",
    "gap": "copy_kernel: AssertionError: other bits between guards",
}


def missed() -> list[str]:
    """Faults of which something else is found than is true."""
    found = {kind: in_child(partial(fault, kind)) for kind in FAULTS}
    return [
        f"{kind}: {died}"
        for kind, (launches, died) in found.items()
        if not (died or "").startswith(FAULTS[kind] or "") or (died is None) != (launches == 1)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plan", nargs="+", choices=PLANS_HERE, default=PLANS_HERE)
    parser.add_argument("--short", action="store_true")
    args = parser.parse_args()
    torch.use_deterministic_algorithms(True)  # new memory holds NaN
    torch.set_num_threads(1)  # others would be missing in a child
    wrong = missed()
    if wrong:
        print("the check does not find what is there, so it says nothing:", *wrong, sep="\n  ")
        return 2
    total, died = 0, 0
    for name, run in named_cases(args.plan, args.short):
        launches, reason = in_child(run)
        total += launches
        if reason is not None:
            died += 1
            print(f"{name}: {reason}", flush=True)
    print(f"{total} launches between guards, {died or 'none'} out of bounds")
    return 0 if total and not died else 1


if __name__ == "__main__":
    sys.exit(main())
