"""`reference_model`: the base, in the model's own memory."""

import copy

import pytest
import torch
from torch import nn

from lora_kernels import apply_lora, lora_parameters, merge_lora, reference_model

transformers = pytest.importorskip("transformers")
tiny_models = pytest.importorskip("tiny_models")
build, inputs = tiny_models.build, tiny_models.inputs


def trained(name="llama", **options):
    model = build(name)
    apply_lora(model, 4, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.train()


def close(left, right, limit=1e-6):
    return (left - right).norm() <= limit * right.norm()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {}),
        ("llama", {"init": "pissa"}),
        ("llama", {"use_dora": True}),
        ("llama", {"modules_to_save": ["lm_head"]}),
        ("bert", {}),  # with dropout of its own and a head that is trained in full
    ],
)
def test_it_computes_the_base_in_the_model_s_memory(name, options):
    base = build(name)
    model = trained(name, **options)
    reference = reference_model(model)
    assert isinstance(reference, type(model))
    assert type(reference).__name__ == type(model).__name__
    assert all(a is b for a, b in zip(reference.parameters(), model.parameters(), strict=True))
    given = inputs(name)
    expected = base(**given).logits.detach()
    logits = reference(**given).logits
    assert not logits.requires_grad
    assert close(logits, expected, 1e-5 if "init" in options else 1e-6)
    assert not close(model.eval()(**given).logits, expected, 1e-2)


def test_the_model_keeps_its_mode_flags_and_gradients():
    model = trained(dropout=0.5)
    reference = reference_model(model)
    flags = [p.requires_grad for p in model.parameters()]
    reference.eval().requires_grad_(False)
    reference(**inputs())
    assert all(module.training for module in model.modules())
    assert [p.requires_grad for p in model.parameters()] == flags
    model(**inputs(), labels=inputs()["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in lora_parameters(model))


def test_it_follows_the_model_and_survives_errors():
    model = trained()
    reference = reference_model(model)
    before = reference(**inputs()).logits
    nn.init.normal_(next(lora_parameters(model)))
    assert torch.equal(reference(**inputs()).logits, before)
    merge_lora(model)
    assert close(reference(**inputs()).logits, before)
    with pytest.raises(ValueError, match="exactly one of input_ids"):
        reference()
    assert not close(model(**inputs()).logits, before, 1e-2)
    assert close(copy.deepcopy(reference)(**inputs()).logits, before)


def test_a_forward_of_the_reference_alone_is_replaced():
    """As trainers do, which give a model another forward."""
    model = trained()
    reference = reference_model(model)
    reference.forward = lambda **given: "another"
    assert reference(**inputs()) == "another"
    assert model(**inputs()).logits is not None


def test_a_model_without_adapters_is_refused():
    with pytest.raises(ValueError, match="LlamaForCausalLM has no LoRA layer"):
        reference_model(build())
