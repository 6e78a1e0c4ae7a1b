"""The ops under torch.func: grad, vjp, vmap and what stacks of them give, or refuse."""

import itertools

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp, vmap

from lora_kernels import FusedLoRALinear, lora_add, lora_add_, lora_linear

B, M, K, N, R = 5, 3, 20, 12, 4
DROPOUT = {"scaling": 2.0, "dropout_p": 0.4}


def operands():
    generator = torch.Generator().manual_seed(1)
    shapes = {"weight": (N, K), "a": (R, K), "b": (N, R), "bias": (N,)}
    return {k: torch.randn(s, generator=generator, dtype=torch.float64) for k, s in shapes.items()}


def samples(*shape):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def linear(x, t, **options):
    return lora_linear(x, t["weight"], t["a"], t["b"], t["bias"], **options)


def plain(x, t):
    return x @ t["weight"].T + t["bias"] + (x @ t["a"].T) @ t["b"].T


def close(one, two):
    return torch.allclose(one, two, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("wanted", ["a", "b", "weight", "bias", "x"])
def test_grad(wanted):
    t = {**operands(), "x": samples(M, K)}

    def loss(layer, value):
        values = {**t, wanted: value}
        return layer(values.pop("x"), values).square().sum()

    ours = grad(lambda v: loss(linear, v))(t[wanted])
    assert close(ours, grad(lambda v: loss(plain, v))(t[wanted]))


def test_vjp_beside_a_graph_of_autograd_s_own():
    t, x = operands(), samples(M, K)
    b = t["b"].requires_grad_()
    y, pull = vjp(lambda a: linear(x, {**t, "a": a}), t["a"])
    expected, pull_plain = vjp(lambda a: plain(x, {**t, "a": a}), t["a"])
    assert close(pull(torch.ones_like(y))[0], pull_plain(torch.ones_like(y))[0])
    assert close(*(torch.autograd.grad(v.square().sum(), b)[0] for v in (y, expected)))


@pytest.mark.parametrize("x_dim", [0, 1, 2])
def test_vmap_over_rows_is_one_call(x_dim, kernel_calls):
    t, x = operands(), samples(B, M, K)
    y = vmap(lambda x: linear(x, t), in_dims=x_dim)(x.movedim(0, x_dim))
    assert kernel_calls == [("lora_linear", B * M)]
    assert close(y, plain(x, t))
    kernel_calls.clear()
    base = samples(M, N)
    y = vmap(lambda x: lora_add(base, x, t["a"], t["b"]))(x)
    assert len(kernel_calls) == 1
    assert close(y, base + (x @ t["a"].T) @ t["b"].T)


def test_vmap_of_vmap_and_of_nothing():
    t, x = operands(), samples(2, B, M, K)
    assert close(vmap(vmap(lambda x: linear(x, t)))(x), plain(x, t))
    assert vmap(lambda x: linear(x, t))(x[0, :0]).shape == (0, M, N)
    with pytest.raises(ValueError, match="a batch of size 0"):
        vmap(lambda a: linear(x[0, 0], {**t, "a": a}))(t["a"][None][:0])


def test_vmap_over_adapters():
    t, x = operands(), samples(M, K)
    a, b = samples(B, R, K), samples(N, B, R)
    y = vmap(lambda a, b: linear(x, {**t, "a": a, "b": b}), in_dims=(0, 1))(a, b)
    for i in range(B):
        assert close(y[i], plain(x, {**t, "a": a[i], "b": b[:, i]}))


def test_a_graph_of_autograd_goes_through_vmap(kernel_calls):
    t, x = operands(), samples(B, M, K).requires_grad_()
    leaves = [x, t["a"].requires_grad_(), t["b"].requires_grad_()]
    ours = torch.autograd.grad(vmap(lambda x: linear(x, t))(x).square().sum(), leaves)
    exact = torch.autograd.grad(plain(x, t).square().sum(), leaves)
    assert all(map(close, ours, exact))
    assert [name for name, _ in kernel_calls] == ["lora_linear", "lora_linear_backward"]


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_per_sample(compiled):
    torch.manual_seed(0)
    layer = FusedLoRALinear(K, N, R, alpha=8, dtype=torch.float64)
    nn.init.normal_(layer.lora_B)
    x = samples(B, M, K)
    adapter = {"lora_A": layer.lora_A.detach(), "lora_B": layer.lora_B.detach()}

    def loss(adapter, x):
        return functional_call(layer, adapter, (x,)).square().sum()

    function = vmap(grad(loss), in_dims=(None, 0))
    if compiled:
        function = torch.compile(function, backend="aot_eager", fullgraph=True)
    got = function(adapter, x)
    for i in range(B):
        one = torch.autograd.grad(layer(x[i]).square().sum(), [layer.lora_A, layer.lora_B])
        assert close(got["lora_A"][i], one[0])
        assert close(got["lora_B"][i], one[1])


def test_gradients_of_rows_are_folded_too(kernel_calls):
    t, x = operands(), samples(B, M, K)
    got = vmap(grad(lambda x: linear(x, t).square().sum()))(x)
    x.requires_grad_()
    assert close(got, torch.autograd.grad(plain(x, t).square().sum(), x)[0])
    assert kernel_calls == [("lora_linear", B * M), ("lora_linear_backward", B * M)]


@pytest.mark.parametrize("with_grad", [False, True])
def test_dropout_follows_vmap_s_randomness(with_grad):
    t, x = operands(), samples(M, K).expand(B, M, K)

    def function(x, **seed):
        y = linear(x, t, **DROPOUT, **seed)
        return y if not with_grad else y.square().sum()

    def mapped(x, **options):
        return vmap(grad(function) if with_grad else function, **options)(x)

    with pytest.raises(RuntimeError, match="randomness"):
        mapped(x)
    same, different = (mapped(x, randomness=kind) for kind in ("same", "different"))
    for i, j in itertools.combinations(range(B), 2):
        assert torch.equal(same[i], same[j])
        assert not torch.equal(different[i], different[j])
    seeds = torch.arange(B)
    seeded = vmap(lambda x, seed: linear(x, t, **DROPOUT, seed=seed))(x, seeds)
    for i in range(B):
        assert torch.equal(seeded[i], linear(x[i], t, **DROPOUT, seed=i))


def test_vmap_in_place():
    t, x, base = operands(), samples(B, M, K), samples(B, M, N)
    expected = lora_add(base, x, t["a"], t["b"])
    result = vmap(lambda base, x: lora_add_(base, x, t["a"], t["b"]))(base, x)
    assert close(base, expected)
    assert torch.equal(result, base)
    with pytest.raises(ValueError, match="base_out: is not batched by vmap"):
        vmap(lambda x: lora_add_(base[0], x, t["a"], t["b"]))(x)


def test_jacrev():
    t, x = operands(), samples(M, K)
    ours, exact = (jacrev(lambda a, f=f: f(x, {**t, "a": a}))(t["a"]) for f in (linear, plain))
    assert close(ours, exact)


SECOND_ORDER = {
    "jvp of grad": (lambda f, a: jvp(grad(f), (a,), (a,)), "forward-mode AD"),
    "grad of jvp": (lambda f, a: grad(lambda v: jvp(f, (v,), (v,))[1])(a), "forward-mode AD"),
    "hessian": (lambda f, a: hessian(f)(a), "forward-mode AD"),
    "vmap of jvp": (lambda f, a: vmap(lambda v: jvp(f, (a,), (v,)))(a[None]), "forward-mode AD"),
    "grad of grad": (lambda f, a: grad(lambda v: grad(f)(v).sum())(a), "double backward"),
    "backward of grad": (
        lambda f, a: grad(f)(a.clone().requires_grad_()).sum().backward(), "double backward",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SECOND_ORDER)
def test_second_derivatives_and_tangents_raise(name):
    t, x = operands(), samples(M, K)
    transform, message = SECOND_ORDER[name]
    with pytest.raises(NotImplementedError, match=message):
        transform(lambda a: linear(x, {**t, "a": a}).square().sum(), t["a"])
