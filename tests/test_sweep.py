"""The sweep of architectures, in short: one model of each kind, and a fault that it must see."""

import copy

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

import architectures
import sweep

KINDS = {
    "llama": "LlamaForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "t5": "T5ForConditionalGeneration",
    "vit": "ViTForImageClassification",
    "wav2vec2": "Wav2Vec2ForCTC",
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_fault_is_found(kind):
    row = sweep.examine(kind, KINDS[kind])
    assert row["layers"] > 0
    assert set(row["checks"]) >= set(sweep.CHECKS) - {"generate"}
    assert sweep.faults(row) == {}


def test_a_bypassed_adapter_is_named():
    found = sweep.examine("mamba", "MambaForCausalLM")
    if found["layers"] == 8:  # dt_proj, whose weight is read, is among the targets
        assert "dt_proj" in found["checks"]["acts"]
    else:
        assert sweep.faults(found).keys() <= {"to PEFT"}


def test_a_layer_that_no_output_reads_is_named():
    import lora_kernels as lk

    model = architectures.build("llama", KINDS["llama"])
    model.model.layers[0].mlp.unread = torch.nn.Linear(64, 64)
    given = architectures.inputs(model)
    plain = copy.deepcopy(model)
    lk.apply_lora(model, 2)
    sweep.randomise(lk.lora_parameters(model))
    found = sweep.adapters_that_do_not_act(model, plain, given)
    assert found == "(not reached by these inputs: 1, model.layers.*.mlp.unread)"


def test_the_gap_of_outputs_sees_values_shapes_and_infinities():
    one = [torch.tensor([1.0, 2.0])]
    other = copy.deepcopy(one)
    assert sweep.gap(one, other) == 0
    other[0][0] = 1.5
    assert sweep.gap(one, other) == pytest.approx(0.25)
    assert sweep.gap(one, [torch.zeros(3)]) == float("inf")
    assert sweep.gap(one, [torch.tensor([1.0, float("inf")])]) == float("inf")
