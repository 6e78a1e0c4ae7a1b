"""The kernels of many groups on a card: values, gradients, equal bits, captured graphs."""

import copy

import pytest
import torch
from test_grouped import batch, randn

from lora_kernels import Groups, backends, lora_linear_grouped

pytestmark = pytest.mark.gpu
INDEX = [(7 * m) % 5 - 1 for m in range(700)]
SIZES = {"K": 1024, "N": 768, "ranks": (8, 16, 64, 3)}


def on_device(case):
    moved = copy.copy(case)
    moved.x, moved.weight, moved.bias = (t.cuda() for t in (case.x, case.weight, case.bias))
    moved.a, moved.b = ([t.cuda() for t in ts] for ts in (case.a, case.b))
    moved.groups = case.groups.to("cuda")
    return moved


def results(case, dy):
    leaves = case.leaves()
    x, _, _, a, b = leaves
    y = case.call(leaves)
    return [y, *torch.autograd.grad(y, [x, *a, *b], dy)]


OF_EXPERTS = {
    "tenants": {},
    "experts": {"experts": 4},
    "tenants of experts": {"experts": 2, "weight_of": [1, 0, 1, 0]},
    "odd sizes": {"experts": 4, "K": 1031, "N": 771},
}


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("index", [INDEX, sorted(INDEX), INDEX[:16]], ids=["any", "sorted", "few"])
@pytest.mark.parametrize("experts", OF_EXPERTS)
def test_values_and_gradients(experts, dtype, p, index):
    case = batch(index, dtype=dtype, p=p, **{**SIZES, **OF_EXPERTS[experts]})
    dy = randn(len(index), case.weight.shape[-2], dtype=dtype, scale=0.1)
    y, leaves = case.by_hand(torch.float64)
    exact = [y, *torch.autograd.grad(y, [leaves[0], *leaves[3:]], dy.double())]
    y, leaves = case.by_hand(dtype)
    unfused = [y, *torch.autograd.grad(y, [leaves[0], *leaves[3:]], dy)]
    moved = on_device(case)
    with backends.use_backend("triton"):
        ours = results(moved, dy.cuda())
        again = results(moved, dy.cuda())
    for mine, twin, right, other in zip(ours, again, exact, unfused, strict=True):
        assert torch.equal(mine, twin)
        norm = right.norm()
        error = (mine.cpu().double() - right).norm()
        assert error <= 1.5 * (other.double() - right).norm() + 2e-6 * norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_stored_transposed_and_rows_of_nobody(dtype):
    """As GPT-OSS has them; what lies past the last segment is never read."""
    lengths, M, (K, N) = [300, 0, 1, 130], 500, (512, 640)
    case = on_device(
        batch([], groups=Groups.from_segments(lengths), dtype=dtype, experts=4, K=K, N=N,
              ranks=(16,) * 4, bias=True)
    )  # fmt: skip
    x = torch.full((M, 2 * K), float("nan"), dtype=dtype, device="cuda")
    x[: sum(lengths), :K] = randn(sum(lengths), K, dtype=dtype).cuda()
    rows = x[:, :K].detach().requires_grad_()
    weight = case.weight.transpose(1, 2).contiguous().transpose(1, 2)
    options = {"scaling": list(case.scaling)}

    def call():
        y = lora_linear_grouped(rows, weight, case.a, case.b, case.groups, case.bias, **options)
        return y, torch.autograd.grad(y, rows, torch.ones_like(y))[0]

    with backends.use_backend("triton"):
        found = call()
    for mine, loop in zip(found, call(), strict=True):
        assert not mine[sum(lengths) :].any()
        tolerance = 2e-5 if dtype == torch.float32 else 2e-2
        assert (mine - loop).norm() <= tolerance * loop.norm()


@pytest.mark.parametrize("experts", [0, 4])
def test_captured(experts):
    """Each group is a call of its own there."""
    case = on_device(batch(INDEX, experts=experts, **SIZES))
    options = {"scaling": list(case.scaling)}

    def call():
        return lora_linear_grouped(
            case.x, case.weight, case.a, case.b, case.groups, case.bias, **options
        )

    with backends.use_backend("triton"):
        expected = call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = call()
        graph.replay()
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
