"""Every plan and backward kernel in Triton's interpreter, on CPU tensors, against fp64.

Collected by `test_triton_interpreter.py` in a process of its own: the interpreter is chosen by
TRITON_INTERPRET=1 before triton is imported. fp32 and fp16 only; its bf16 products are wrong.
"""

import math

import oracle
import pytest
import torch
from interpreted import NAMES, SCALING, Case, Problem, error, laid_out, ops, serves

import lora_kernels
from lora_kernels.backends import choose, reference
from lora_kernels.backends import cuda as backend
from lora_kernels.backends.cuda.choice import candidates, use_plan
from lora_kernels.backends.cuda.plan import Call
from lora_kernels.backends.device import Target, assume
from lora_kernels.backends.dropout import keep_mask, keep_scale
from lora_kernels.backends.triton.launch import intercept

AMPERE, HOPPER = Target(80, 2), Target(90, 3)  # pointers; TMA descriptors where operands allow
F32 = torch.float32
CASES = (
    Case(1, 1, 1, 1, F32),
    Case(1, 130, 72, 8, bias=True),
    Case(3, 17, 129, 3, p=0.5),
    Case(17, 129, 127, 17, F32, bias=True),
    Case(33, 264, 136, 16, p=0.25, bias=True),
    Case(40, 48, 200, 8, layout="transposed", p=0.1),
    Case(40, 48, 200, 3, F32, layout="expanded", bias=True),
    Case(50, 33, 65, 16, layout="sliced", p=0.3, wide_adapters=True),
    Case(64, 136, 160, 64, p=0.1, bias=True, wide_adapters=True),
    Case(70, 72, 80, 200, bias=True),
    Case(127, 40, 96, 64, F32, p=0.2),
    Case(129, 304, 72, 16, bias=True),
    Case(150, 264, 264, 24, p=0.4),
    Case(260, 32, 48, 1, wide_adapters=True),
)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty and its kin hand out NaN, so that an element that nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.ones(2).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def ratios(problem: Problem, outputs: dict, base: torch.Tensor | None = None) -> dict[str, float]:
    """Error over the error of unfused torch, having checked the rule for each case."""
    exact = problem.unfused(torch.float64, base)
    rival = problem.unfused(problem.case.dtype, base)
    eps = torch.finfo(problem.case.dtype).eps
    found = {}
    for name, out in outputs.items():
        assert out.shape == exact[name].shape
        ours, theirs = error(out, exact[name]), error(rival[name], exact[name])
        assert ours <= 2 * theirs + eps, (problem.case, name, ours, theirs)
        if min(ours, theirs) > 0:
            found[name] = ours / theirs
    return found


def geometric_means(found: list[dict[str, float]]) -> dict[str, float]:
    return {
        name: math.exp(sum(math.log(f[name]) for f in found if name in f) / len(found))
        for name in NAMES
    }


@pytest.mark.parametrize(
    ("plan", "target"),
    [
        ("cublas", HOPPER),
        ("shrink_gemm", AMPERE),
        ("shrink_gemm", HOPPER),
        ("grouped", AMPERE),
        ("grouped", HOPPER),
        ("dual", AMPERE),
        ("decode", HOPPER),
        ("flag", AMPERE),
        ("flag", HOPPER),
    ],
)
def test_linear_and_gradients(entering, plan, target):
    entering(use_plan(plan))
    assert choose("cpu").module is backend
    found = []
    with assume(target):
        for case in filter(lambda case: serves(plan, case), CASES):
            problem = Problem(case)
            outputs = problem.linear()
            assert outputs["da"].dtype == problem.a.dtype
            assert outputs["db"].dtype == problem.b.dtype
            assert all(out.is_contiguous() for out in outputs.values())
            found.append(ratios(problem, outputs))
    means = geometric_means(found)
    assert all(mean <= 1.02 for mean in means.values()), means
    if plan != "cublas":
        assert means["y"] < 1
        assert means["dx"] < 1


@pytest.mark.parametrize(
    ("plan", "r", "p"),
    [("cublas", 8, 0.25), ("cublas", 64, 0.0), ("shrink_gemm", 8, 0.0), ("grouped", 8, 0.25)],
)
def test_sums_over_as_many_rows_as_a_batch_has(plan, r, p):
    """On a device of 132 SMs: dA in 19 shares, dB in 40 or 19, masks past row 4096."""
    partials = []

    def record(kernel, grid, args, meta, launch) -> None:
        if kernel.fn.__name__ == "reduce_kernel":
            partials.extend(args[i] for i in (2, 7) if args[i])
        launch()

    problem = Problem(Case(5000, 16, 16, r, p=p))
    with assume(Target(80, 132)), use_plan(plan), intercept(record):
        ratios(problem, problem.linear())
    assert sum(count > 16 for count in partials) == 2, partials


@pytest.mark.parametrize(
    ("op", "case"),
    [
        ("forward", Case(40, 48, 1024, 16, bias=True)),
        ("forward", Case(513, 272, 64, 16, bias=True)),
        ("backward", Case(513, 48, 80, 16, p=0.2)),
    ],
)
def test_candidates_of_a_tuner(op, case):
    """Whatever tiles a tuned table may name compute the same."""
    problem = Problem(case)
    call = Call(op, "float16", *case[:4], case.p > 0)
    listed = candidates(call, HOPPER)
    saved = problem.linear()["s"]

    def compute() -> dict[str, torch.Tensor]:
        tensors = (problem.x, problem.weight, problem.a, problem.b)
        if op == "forward":
            y, _ = ops.lora_linear(*tensors, problem.bias, *problem.branch, True)
            return {"y": y}
        dx, _, da, db = ops.lora_linear_backward(
            problem.dy, *tensors, saved, *problem.branch, True, False, True, True
        )
        return {"dx": dx, "da": da, "db": db}

    with assume(HOPPER):
        for plan, fields in listed:
            if fields:
                with use_plan(plan, fields):
                    ratios(problem, compute())
    varied = {launch for _, fields in listed for launch in fields}
    assert varied >= ({"shrink", "gemm", "expand"} if op == "forward" else {"da", "dx", "dx_da"})


@pytest.mark.parametrize("plan", ["cublas", "shrink_gemm", "grouped", "dual", "decode", "flag"])
def test_large_values_in_fp16(entering, plan):
    entering(use_plan(plan))
    for case in oracle.LARGE:
        problem = Case(case.M, case.N, case.K, case.r, p=case.p)
        if not case.add and serves(plan, problem):
            oracle.assert_fp16_range(case, lora_kernels.lora_linear)


def test_large_values_in_fp16_on_top_of_a_base():
    for case in filter(lambda case: case.add, oracle.LARGE):
        oracle.assert_fp16_range(case, lora_kernels.lora_add)


def test_add_and_gradients():
    found = []
    for case in CASES[1::2]:
        problem = Problem(case)
        base = laid_out(case.M, case.N, case.layout, case.dtype)
        before = base.clone()
        outputs = problem.add(base)
        assert torch.equal(base, before)
        found.append(ratios(problem, outputs, base))
        in_place = base.clone(memory_format=torch.preserve_format)
        ops.lora_add_(in_place, problem.x, problem.a, problem.b, *problem.branch)
        assert torch.equal(in_place, outputs["y"])
    means = geometric_means(found)
    assert all(mean <= 1.02 for mean in means.values()), means


@pytest.mark.parametrize("needed", [(True, False), (False, True), (False, False)])
def test_only_what_is_needed(needed):
    """dx and dB, or dA alone, or nothing; a gradient nobody asked for is of size 0."""
    problem = Problem(CASES[4])
    need_x, need_a = needed
    outputs = problem.linear((need_x, False, need_a, need_x))
    for name, need in (("dx", need_x), ("da", need_a), ("db", need_x)):
        out = outputs.pop(name)
        if need:
            ratios(problem, {name: out})
        else:
            assert out.numel() == 0


def test_weight_gradient_and_autograd():
    """Through functional code: x, weight, bias and both adapters trained."""
    case = Case(20, 24, 40, 8, p=0.25, bias=True)
    problem = Problem(case)
    leaves = [problem.x, problem.weight, problem.a, problem.b, problem.bias]
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    y = lora_kernels.lora_linear(*leaves, scaling=SCALING, dropout_p=case.p, seed=problem.seed)
    y.backward(problem.dy)
    exact = problem.unfused(torch.float64, None)
    for leaf, name in ((leaves[0], "dx"), (leaves[2], "da"), (leaves[3], "db")):
        assert error(leaf.grad, exact[name]) < 2 * torch.finfo(case.dtype).eps
    dw = problem.dy.double().t() @ problem.x.double()
    assert error(leaves[1].grad, dw) < 2 * torch.finfo(case.dtype).eps


@pytest.mark.parametrize(
    "seed",
    [
        [0],
        [2**31 + 5],
        [-1],
        [0x0123456789ABCDEF],
        [77, 0, 0],
        [-1, 70_001, 4096],
        [5, 2**31 - 35, 8],
    ],
)
def test_mask_is_the_references(seed):
    """All kernels that drop: each computes ones times the mask."""
    M, K, p = 70, 137, 0.3
    seed = torch.tensor(seed)
    kept = keep_mask(seed, 0, M, K, p) * keep_scale(p)
    ones, eye = torch.ones, torch.eye
    _, s = ops.lora_add(ones(M, 1), ones(M, K), eye(K), ones(1, K), 1.0, p, seed, True)
    dx, _, _ = ops.lora_add_backward(
        ones(M, 1), ones(0), ones(1, K), ones(1, 1), ones(0), 1.0, p, seed,
        True, False, False,
    )  # fmt: skip
    _, da, _ = ops.lora_add_backward(
        eye(M), ones(M, K), ones(M, K), eye(M), ones(0), 1.0, p, seed, False, True, False
    )
    for found in (s, dx, da):
        assert torch.equal(found, kept.float())


@pytest.mark.parametrize("seed", [[77], [77, 150, 264]], ids=("whole", "part"))
@pytest.mark.parametrize("target", [AMPERE, HOPPER], ids=("sm_80", "sm_90"))
def test_mask_of_the_fused_gradient(entering, target, seed):
    entering(use_plan("shrink_gemm"))
    M, K, p, seed = 150, 264, 0.3, torch.tensor(seed)
    kept = (keep_mask(seed, 0, M, K, p) * keep_scale(p)).half()
    one, none = torch.ones(8, K).half(), torch.ones(0).half()
    with assume(target):
        dx, *_ = ops.lora_linear_backward(
            torch.ones(M, 8).half(), none, one * 0, one[:1], one[:, :1] / 8,
            none, 1.0, p, seed, True, False, False, False,
        )  # fmt: skip
    assert torch.equal(dx, kept)


def test_same_bits_every_time():
    problem = Problem(CASES[-2])
    first, second = problem.linear(), problem.linear()
    assert all(torch.equal(first[name], second[name]) for name in NAMES)


def test_empty_batch():
    problem = Problem(Case(0, 24, 40, 8, bias=True))
    outputs = problem.linear()
    assert [tuple(outputs[n].shape) for n in ("y", "s", "dx")] == [(0, 24), (0, 8), (0, 40)]
    assert not outputs["da"].any()
    assert not outputs["db"].any()
    assert problem.add(torch.empty(0, 24).half())["y"].shape == (0, 24)


def kernels_of(run) -> set[tuple]:
    """What has to be compiled for a call: kernels, dtypes and constants."""
    found = set()

    def record(kernel, grid, args, meta, launch) -> None:
        kinds = tuple(getattr(arg, "dtype", None) for arg in args)
        found.add((kernel.fn.__name__, kinds, tuple(sorted(meta.items()))))
        launch()

    with intercept(record):
        run()
    return found


def test_warmup_compiles_what_calls_need():
    """Once for equal layers, not for merged ones; torch's state is as before."""

    def layer(N: int, **options) -> lora_kernels.FusedLoRALinear:
        return lora_kernels.FusedLoRALinear(72, N, 8, dtype=torch.float16, **options)

    layers = [layer(40), layer(40), layer(40, dropout=0.1), layer(24, bias=False), layer(56)]
    model = torch.nn.Sequential(*layers)
    layers[-1].merge()
    before, state = torch.get_rng_state(), {k: v.clone() for k, v in model.state_dict().items()}
    made = []
    compiled = kernels_of(lambda: made.append(lora_kernels.warmup(model, (3, 40))))
    assert made == [3 * 2 * 2]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert lora_kernels.warmup(layers[3], 40, backward=False) == 1

    def train_and_infer() -> None:
        for one in layers[:-1]:
            x = torch.randn(40, 72).half().requires_grad_()
            one.requires_grad_(False)
            one.lora_A.requires_grad_()
            one.lora_B.requires_grad_()
            one.train()(x).sum().backward()
            with torch.no_grad():
                one.eval()(x)

    assert kernels_of(train_and_infer) <= compiled


def test_forced_backend_refuses_what_it_cannot_serve():
    for dtype in (torch.float64, torch.bfloat16):
        with pytest.raises(RuntimeError, match=r"fp16|interpreter"):
            Problem(Case(2, 3, 4, 1, dtype)).linear()


def test_aten_plan_is_the_reference(entering):
    entering(use_plan("aten"))
    problem = Problem(CASES[4])
    y, s = reference.forward(problem.base, problem.x, problem.low_rank, True)
    outputs = problem.linear()
    assert torch.equal(outputs["y"], y)
    assert torch.equal(outputs["s"], s)
