"""The kernels of many groups on a card: values, gradients, equal bits, captured graphs."""

import copy

import pytest
import torch
from test_grouped import batch, randn

from lora_kernels import backends, lora_linear_grouped

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


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("index", [INDEX, sorted(INDEX), INDEX[:16]], ids=["any", "sorted", "few"])
def test_values_and_gradients(dtype, p, index):
    case = batch(index, dtype=dtype, p=p, **SIZES)
    dy = randn(len(index), SIZES["N"], dtype=dtype, scale=0.1)
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


def test_captured():
    """Each group is a call of its own there."""
    case = on_device(batch(INDEX, **SIZES))
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
