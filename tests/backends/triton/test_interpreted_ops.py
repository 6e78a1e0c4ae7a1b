"""Each op and rule of the kernels in Triton's interpreter, on CPU tensors, against fp64.

fp32 and fp16 only; the interpreter's bf16 products are wrong.
"""

import oracle
import pytest
import torch
from interpreted import (
    AMPERE,
    CASES,
    HOPPER,
    NAMES,
    SCALING,
    Case,
    Problem,
    error,
    geometric_means,
    laid_out,
    ops,
    poisoned_memory,
    ratios,
    serves,
)  # fmt: skip

import lora_kernels
from lora_kernels.backends import reference
from lora_kernels.backends.cuda.choice import use_plan
from lora_kernels.backends.device import assume
from lora_kernels.backends.dropout import keep_mask, keep_scale
from lora_kernels.backends.triton import masking
from lora_kernels.backends.triton.launch import intercept

__all__ = ["poisoned_memory"]  # a fixture of every test
pytestmark = pytest.mark.interpreted


@pytest.mark.parametrize("plan", ["cublas", "shrink_gemm", "grouped", "dual", "decode", "flag"])
def test_large_values_in_fp16(entering, plan):
    """Each size with and without dropout, each at one of the scalings: what is made of a scaling
    does not depend on the plan, and `test_accuracy.py` has them all."""
    entering(use_plan(plan))
    linear = [case for case in oracle.LARGE if not case.add]
    for case in linear[::8] + linear[5:14:4]:
        if serves(plan, Case(case.M, case.N, case.K, case.r, p=case.p)):
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
    M, K, p = 70, 73, 0.3
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


@pytest.mark.parametrize("seed", [[77], [-1, 70_001, 4096]], ids=("whole", "part"))
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_the_elementwise_mask(dtype, seed):
    """Odd extents, strided operands, rows that begin in the middle of the mask."""
    M, K, p, first, seed = 35, 301, 0.3, 6, torch.tensor(seed)
    keep = keep_mask(seed, first, M, K, p)
    x, total = (torch.randn(M, K).to(dtype) for _ in range(2))
    x[0, 0] = float("nan")
    for matrix in (x, x.t().contiguous().t(), torch.cat([x, x], 1)[:, :K]):
        dropped = masking.drop(matrix, seed, first, p)
        assert torch.equal(dropped.nan_to_num(9), x.masked_fill(~keep, 0).nan_to_num(9))
    term = torch.randn(M, K).to(torch.promote_types(dtype, torch.float32))
    expected = (total + (2 * term).masked_fill(~keep, 0)).to(dtype)
    masking.add_kept(total, term, 2.0, seed, first, p)
    assert torch.equal(total, expected)
    assert masking.deviation(torch.device("cpu")) is None


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
