"""Blocks on a card: the kernel of activations, packed projections, the gated MLP."""

import pytest
import torch
from torch.nn import functional as F

from lora_kernels import Projection, lora_linear_packed, lora_swiglu_mlp
from lora_kernels.backends import gating

pytestmark = pytest.mark.gpu
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def leaf(std, dtype, *shape):
    values = torch.randn(*shape, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    return (values * std).to(dtype).requires_grad_()


def projection(N, K, dtype, p, seed):
    weight = leaf(K**-0.5, dtype, N, K).detach()
    pair = leaf(K**-0.5, dtype, 16, K), leaf(0.2, dtype, N, 16)
    return Projection(weight, *pair, None, 2.0, p, seed)


def close(ours, theirs, dtype):
    tolerance = {torch.float32: 5e-3, torch.bfloat16: 3e-2, torch.float16: 5e-3}[dtype]
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).float().norm() <= tolerance * other.float().norm()


def test_the_kernel_is_vouched_for():
    assert gating._vouched(torch.device("cuda", torch.cuda.current_device()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("M", [8, 1030])
def test_packed(dtype, p, M):
    x = leaf(1, dtype, M, 512)
    parts = [projection(N, 512, dtype, p, N) for N in (512, 128, 128)]
    leaves = [x, *(t for one in parts for t in (one.lora_a, one.lora_b))]
    weights, a, b, *_ = zip(*parts, strict=True)
    ys = lora_linear_packed(
        x, weights, a, b, scalings=2.0, dropout_p=p, seeds=[one.seed for one in parts]
    )
    dys = [torch.randn_like(y) for y in ys]
    ours = [*ys, *torch.autograd.grad(ys, leaves, dys)]
    zs = [one(x) for one in parts]
    close(ours, [*zs, *torch.autograd.grad(zs, leaves, dys)], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh"])
def test_mlp(dtype, p, act):
    x = leaf(1, dtype, 1030, 256)
    gate, up = (projection(704, 256, dtype, p, seed) for seed in (1, 2))
    down = projection(256, 704, dtype, p, 3)
    leaves = [x, *(t for one in (gate, up, down) for t in (one.lora_a, one.lora_b))]
    y = lora_swiglu_mlp(x, gate, up, down, act)
    dy = torch.randn_like(y)
    ours = [y, *torch.autograd.grad(y, leaves, dy)]
    function, _ = gating.ACTIVATIONS[act]
    z = down(function(gate(x)) * up(x))
    close(ours, [z, *torch.autograd.grad(z, leaves, dy)], dtype)


def test_less_memory_is_kept():
    x = leaf(1, torch.bfloat16, 4096, 1024)
    gate, up = (projection(4096, 1024, torch.bfloat16, 0.0, seed) for seed in (1, 2))
    down = projection(1024, 4096, torch.bfloat16, 0.0, 3)

    def kept(call):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        y = call()
        return torch.cuda.memory_allocated() - before - y.nbytes

    kept(lambda: lora_swiglu_mlp(x, gate, up, down))
    ours = kept(lambda: lora_swiglu_mlp(x, gate, up, down))
    theirs = kept(lambda: down(F.silu(gate(x)) * up(x)))
    assert ours < 0.55 * theirs
