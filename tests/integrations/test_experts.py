"""PEFT's `target_parameters` on experts: fused against PEFT's own, family by family."""

import copy
import pickle

import pytest
import torch
from tiny_models import MIXTURES, SMALL
from torch.utils._python_dispatch import TorchDispatchMode

from lora_kernels import fuse_peft, unfuse_peft

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
moe = pytest.importorskip("transformers.integrations.moe")

BOTH = ("gate_up_proj", "down_proj")


def build(family, parameters=BOTH, adapters=("default",), **options):
    torch.manual_seed(0)
    name, sizes = MIXTURES[family]
    config = getattr(transformers, name)(**{**SMALL, **sizes})
    base = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # some experts have no values of their own
        for parameter in base.parameters():
            parameter.normal_(0, 0.2)
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=["o_proj"], init_lora_weights=False,
        target_parameters=[f"experts.{name}" for name in parameters], **options,
    )  # fmt: skip
    model = peft.get_peft_model(base, config)
    for adapter in adapters[1:]:
        model.add_adapter(adapter, config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.normal_(0, 0.2)
    return model


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "lora_kernels" and "grouped" in func.__name__:
            self.calls.append(func.__name__)
        return func(*args, **(kwargs or {}))


TOKENS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1))


def results(model):
    model.zero_grad()
    with Count() as count:
        logits = model(TOKENS).logits
        logits.square().sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **grads}, count.calls


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).norm() <= 2e-4 * tensor.norm() + 1e-5, name


@pytest.mark.parametrize("parameters", [BOTH, BOTH[:1], BOTH[1:]])
@pytest.mark.parametrize("family", MIXTURES)
def test_a_family(family, parameters):
    plain = build(family, parameters)
    fused = copy.deepcopy(plain)
    report = fuse_peft(fused)
    assert not report.left
    sparse = sum("experts" in name for name in report.fused)
    layers = 1 if family == "deepseek_v3" else 2
    assert sparse == len(parameters) * layers
    ours, calls = results(fused)
    theirs, _ = results(plain)
    assert_equal(ours, theirs)
    assert calls.count("lora_linear_grouped.default") == 2 * layers
    assert calls.count("lora_linear_grouped_backward.default") == 2 * layers


def test_sixteen_bits():
    plain = build("mixtral").to(torch.bfloat16)
    plain.config._experts_implementation = "eager"  # the others take no fp64, nor such sizes
    exact, _ = results(copy.deepcopy(plain).double())
    fused = copy.deepcopy(plain)
    fuse_peft(fused)
    ours, calls = results(fused)
    theirs, _ = results(plain)
    assert calls
    for name, truth in exact.items():
        error, rival = ((of[name].double() - truth).norm() for of in (ours, theirs))
        assert error <= 2 * rival + 2**-8 * truth.norm(), name


def test_states_that_are_peft_s_own():
    plain = build("mixtral", adapters=("default", "other"))
    fused = copy.deepcopy(plain)
    fuse_peft(fused)
    assert_equal(results(fused)[0], results(plain)[0])
    for model in (fused, plain):
        model.set_adapter("other")
    ours, calls = results(fused)
    assert calls
    assert_equal(ours, results(plain)[0])
    with fused.disable_adapter(), plain.disable_adapter():
        torch.testing.assert_close(results_of(fused), results_of(plain), rtol=1e-4, atol=1e-4)
    for model in (fused, plain):
        model.merge_adapter()
    with Count() as count:
        merged = results_of(fused)
    assert not count.calls
    torch.testing.assert_close(merged, results_of(plain), rtol=1e-4, atol=1e-4)
    for model in (fused, plain):
        model.unmerge_adapter()
    assert_equal(results(fused)[0], results(plain)[0])


def test_a_hook_within_is_heard():
    plain = build("mixtral")
    fused = copy.deepcopy(plain)
    heard = []
    experts = next(m for n, m in fused.named_modules() if n.endswith("base_layer.base_layer"))
    experts.register_forward_hook(lambda *args: heard.append(1))
    report = fuse_peft(fused)
    assert any("hooks" in reason for reason in report.left.values())
    assert_equal(results(fused)[0], results(plain)[0])
    assert heard


def test_saved_copied_and_given_back(tmp_path):
    plain = build("mixtral")
    fused = copy.deepcopy(plain)
    fuse_peft(fused)
    fused.save_pretrained(tmp_path)
    base = build("mixtral").unload()
    again = peft.PeftModel.from_pretrained(base, tmp_path)
    fuse_peft(again)
    copied = pickle.loads(pickle.dumps(fused))
    expected = results(plain)[0]["logits"]
    for model in (again, copied):
        assert (results_of(model) - expected).norm() <= 2e-4 * expected.norm()
    unfuse_peft(fused)
    assert not any("Fused" in type(m).__name__ for m in fused.modules())
    assert torch.equal(results_of(fused), expected)


@torch.no_grad()
def results_of(model):
    return model(TOKENS).logits


@torch.no_grad()
def test_tokens_of_no_expert_are_not_computed():
    """Under expert parallelism the router marks what other ranks compute by an id past all."""
    model = build("mixtral")
    fuse_peft(model)
    wrapper = next(m for n, m in model.named_modules() if n.endswith("0.mlp.experts"))
    x = torch.randn(3, 24)
    index, weights = torch.tensor([[0, 4], [4, 4], [2, 1]]), torch.ones(3, 2)
    y = wrapper(x, index, weights)
    assert not y[1].any()
    alone = wrapper(x[:1], index[:1, :1], weights[:1, :1])
    torch.testing.assert_close(y[:1], alone)


def test_a_parameter_of_another_kind_is_left():
    model = build("mixtral")
    other = peft.get_peft_model(
        build("mixtral").unload(),
        peft.LoraConfig(r=3, target_modules=[], target_parameters=["gate.weight"]),
    )
    report = fuse_peft(other)
    assert report.left
    assert all("not one of Transformers' modules" in reason for reason in report.left.values())
    assert results_of(other).shape == results_of(model).shape
