"""DoRA on a card: the kernel of columns, values, gradients, a captured graph."""

import pytest
import torch

from lora_kernels import FusedLoRALinear, lora_linear
from lora_kernels.backends import columns, use_backend

pytestmark = pytest.mark.gpu
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def test_the_kernel_is_vouched_for():
    assert columns._vouched(torch.device("cuda", torch.cuda.current_device()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", [1, 33, 4097])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("backend", [None, "triton"])  # which has the factor in the product
def test_values_and_gradients(entering, dtype, M, p, backend):
    entering(use_backend(backend))
    N, K, r = 1000, 768, 16
    generator = torch.Generator("cuda").manual_seed(M)

    def leaf(std, *shape):
        values = torch.randn(*shape, device="cuda", generator=generator) * std
        return values.to(dtype).requires_grad_()

    leaves = (
        leaf(1, M, K), leaf(K**-0.5, N, K), leaf(K**-0.5, r, K), leaf(0.2, N, r), leaf(1, N),
        (1 + leaf(0.1, N).detach()).requires_grad_(),
    )  # fmt: skip
    *given, magnitude = leaves
    options = {"scaling": 2.0, "dropout_p": p, "seed": 5}
    dy = torch.randn(M, N, device="cuda", generator=generator).to(dtype)
    y = lora_linear(*given, magnitude=magnitude, **options)
    ours = [y, *torch.autograd.grad(y, leaves, dy)]
    exact = [leaf.detach().double().cpu().requires_grad_() for leaf in leaves]
    *given, magnitude = exact
    y = lora_linear(*given, magnitude=magnitude, **options)
    theirs = [y, *torch.autograd.grad(y, exact, dy.double().cpu())]
    tolerance = {torch.float32: 2e-3, torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype]
    for one, other in zip(ours, theirs, strict=True):
        assert (one.double().cpu() - other).norm() <= tolerance * other.norm()
    again = lora_linear(*leaves[:-1], magnitude=leaves[-1], **options)
    assert torch.equal(again, ours[0])


def test_a_captured_graph_follows_its_adapters():
    layer = FusedLoRALinear(256, 512, 8, use_dora=True, device="cuda").eval()
    x = torch.randn(16, 256, device="cuda")
    with torch.no_grad():
        for _ in range(3):
            layer(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        layer.lora_B.normal_()
        graph.replay()
        torch.testing.assert_close(y, layer(x), rtol=1e-3, atol=1e-3)
