"""examples/extend.py: a plan, a backend and an adapter's tensor that the library has not."""

import copy
import runpy
from pathlib import Path

import pytest
import torch

import lora_kernels as lk
from lora_kernels import backends
from lora_kernels.backends.cuda import plans

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def example():
    # As on a machine with triton, not interpreted: this process may have imported it.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        return runpy.run_path(str(ROOT / "examples" / "extend.py"))


def test_a_backend_from_outside(example, monkeypatch):
    monkeypatch.setattr(backends, "BACKENDS", dict(backends.BACKENDS))
    counting = example["try_backend"]()
    assert counting.calls == {"forward": 1, "add_": 0, "backward": 1}
    assert "counting" in backends.names()
    with backends.use_backend("counting"), pytest.raises(RuntimeError, match="counts fp32 calls"):
        lk.lora_linear(*(t.double() for t in example["operands"](8, 8, 8, 2)))
    with pytest.raises(ValueError, match="'counting' is taken"):
        backends.register("counting", example["Counting"]())


@pytest.mark.parametrize(("M", "reason"), [(4096, None), (8, "the weight is not small beside x")])
def test_a_plan_from_outside(example, monkeypatch, M, reason):
    monkeypatch.setattr(plans, "PLANS", dict(plans.PLANS))
    plan = example["MERGED"]
    plans.register(plan)
    assert plans.known("merged", "here") is plan
    call = example["Call"]("forward", "float32", M, 32, 64, 4, False)
    assert reason in plan.refusal(call) if reason else plan.refusal(call) is None
    x, weight, a, b = example["operands"](M, 32, 64, 4)
    branch = example["Branch"](a, b, 0.5, 0.0, None)
    y, s = plan.forward.run(example["Dense"](weight), x, branch, True, {})
    exact = example["exact_y"](x, weight, a, b)
    unfused = x @ weight.t() + 0.5 * (x @ a.t()) @ b.t()
    ours, theirs = example["error"](y, exact), example["error"](unfused, exact)
    assert ours <= 2 * theirs + torch.finfo(x.dtype).eps
    torch.testing.assert_close(s, 0.5 * x @ a.t())


def test_an_adapters_tensor_from_outside(example, tmp_path):
    torch.manual_seed(1)
    GainedLinear = example["GainedLinear"]
    layer = GainedLinear.from_linear(torch.nn.Linear(12, 10), 3, alpha=6, init="random")
    layer.lora_gain.data.uniform_(0.5, 2.0)
    model = torch.nn.Sequential(layer)
    x = torch.randn(7, 12, requires_grad=True)
    A, B, gain = (t.detach().clone().requires_grad_() for t in (
        layer.lora_A, layer.lora_B, layer.lora_gain,
    ))  # fmt: skip
    y = model(x)
    expected = torch.nn.functional.linear(x, layer.weight, layer.bias)
    expected = expected + 2.0 * gain * (x @ A.t() @ B.t())
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    ours = torch.autograd.grad(y, [x, *lk.lora_parameters(model)], dy)
    theirs = torch.autograd.grad(expected, [x, A, B, gain], dy)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)

    assert set(lk.lora_state_dict(model)) == {"0.lora_A", "0.lora_B", "0.lora_gain"}
    other = copy.deepcopy(model)
    other[0].lora_gain.data.zero_()
    other.load_state_dict(lk.lora_state_dict(model), strict=False)
    assert torch.equal(other(x), y)
    with lk.disable_adapters(model):
        base = torch.nn.functional.linear(x, layer.weight, layer.bias)
        assert torch.equal(model(x), base)

    weight = layer.weight.detach().clone()
    lk.merge_lora(model)
    torch.testing.assert_close(model(x), y)
    lk.unmerge_lora(model)
    assert torch.equal(layer.weight, weight)
    lk.save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="a GainedLinear trains lora_gain too"):
        layer.set_factors(layer.lora_A, layer.lora_B)
    lk.remove_lora(model)
    assert type(model[0]) is torch.nn.Linear
    assert not hasattr(model[0], "lora_gain")
    lk.load_adapter(model, tmp_path)
    torch.testing.assert_close(model(x), y)
