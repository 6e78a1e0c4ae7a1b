"""merged_state_dict: what merge_lora would leave, with the model left as it is."""

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import lora_kernels
from lora_kernels import apply_lora, disable_adapters, merge_lora, merged_state_dict

tiny_models = pytest.importorskip("tiny_models")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.norm = nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8)
        self.register_buffer("passing", torch.ones(1), persistent=False)

    def forward(self, x):
        return self.norm(self.inner(x)).relu()


def plain():
    torch.manual_seed(0)
    return nn.Sequential(Block(), nn.Linear(8, 4))


def adapted(base=None, **options):
    model = plain() if base is None else base
    apply_lora(model, 2, alpha=4, **options)
    with torch.no_grad():
        for parameter in lora_kernels.lora_parameters(model):
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def snapshot(model):
    held = [*model.named_parameters(), *model.named_buffers()]
    return {name: (id(tensor), tensor._version, tensor.clone()) for name, tensor in held}


STATES = {
    "unmerged": lambda model: contextlib.nullcontext(),
    "merged": merge_lora,
    "merged in host memory": lambda model: merge_lora(model, "cpu"),
    "merged for good": lambda model: merge_lora(model, keep_base=False),
    "disabled": disable_adapters,
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("options", [
    {}, {"init": "pissa"}, {"target_modules": ["inner"], "modules_to_save": ["1", "norm"]},
])  # fmt: skip
def test_it_holds_what_a_merge_leaves(options, state):
    model = adapted(**options)
    merged = copy.deepcopy(model)
    merge_lora(merged)
    expected = {
        name: tensor for name, tensor in merged.state_dict().items()
        if name in plain().state_dict()
    }  # fmt: skip
    with STATES[state](model) or contextlib.nullcontext():
        before = snapshot(model)
        found = dict(merged_state_dict(model).items())
        after = snapshot(model)
    assert before.keys() == after.keys()
    for name, (identity, version, value) in before.items():
        assert after[name][:2] == (identity, version), name
        assert torch.equal(after[name][2], value), name
    assert list(found) == list(plain().state_dict())
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
        assert found[name].dtype == tensor.dtype
        assert not found[name].requires_grad


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plain_model_loads_it(name, dtype):
    model = adapted(tiny_models.build(name).to(dtype))
    engine = tiny_models.build(name).to(dtype)
    engine.load_state_dict(merged_state_dict(model))
    merge_lora(model)
    with torch.no_grad():
        logits = model(**tiny_models.inputs(name)).logits
        torch.testing.assert_close(engine(**tiny_models.inputs(name)).logits, logits)


def test_one_layer_is_held_at_a_time():
    model = adapted()
    state = merged_state_dict(model)
    assert state["1.weight"] is not state["1.weight"]
    assert state["1.weight"].is_contiguous()
    assert len(state) == len(plain().state_dict())
    assert "1.lora_A" not in state
    assert "0.passing" not in state
    model[1].lora_B.data.mul_(2)
    later = state["1.weight"]
    merge_lora(model)
    assert torch.equal(later, model[1].weight)


def test_what_it_refuses():
    with pytest.raises(ValueError, match="has no LoRA layer; call apply_lora first"):
        merged_state_dict(plain())
    tied = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    tied[1].weight = tied[0].weight
    apply_lora(tied, 2, target_modules=["0"])
    with pytest.raises(ValueError, match=r"merged_state_dict: .*0.weight and 1.weight share"):
        merged_state_dict(tied)
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(plain(), peft.LoraConfig(target_modules=["inner"]))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"inner carries an adapter of PEFT.*merge_and_unload"):
            merged_state_dict(theirs)
        lora_kernels.fuse_peft(theirs)


def test_shared_modules_and_wrappers_have_the_plain_model_s_names():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.encode = nn.Linear(6, 6)
            self.decode = self.encode

    model = Shared()
    apply_lora(model, 2)
    assert list(merged_state_dict(model)) == list(Shared().state_dict())
    model = adapted()
    model[0] = torch.compile(model[0], backend="eager")
    assert list(merged_state_dict(nn.DataParallel(model))) == list(plain().state_dict())


@pytest.mark.parametrize("change", ["prune", "weight_norm"])
def test_adapters_that_are_computed_leave_no_keys(change):
    model, x = plain().eval(), torch.randn(5, 6)
    apply_lora(model, 2, init="random")
    if change == "prune":
        prune.random_unstructured(model[1], "lora_A", amount=0.5)
    else:
        parametrizations.weight_norm(model[1], "lora_A")
    rollout = plain().eval()
    rollout.load_state_dict(dict(merged_state_dict(model)))
    torch.testing.assert_close(rollout(x), model(x))


def test_weights_that_are_computed_are_refused():
    model = plain()
    apply_lora(model, 2, init="random")
    prune.random_unstructured(model[1], "weight", amount=0.5)
    with pytest.raises(ValueError, match=r"merged_state_dict: 1: its weight is computed from"):
        merged_state_dict(model)
