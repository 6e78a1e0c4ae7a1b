"""Which layers are targets by default: ties, heads of inner models, plain names, unread layers."""

import pytest
import torch
from torch import nn

from lora_kernels import apply_lora

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0,
}  # fmt: skip


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.body, self.out = nn.Embedding(6, 4), nn.Linear(4, 4), nn.Linear(4, 6)
        self.out.weight = self.table.weight

    def forward(self, tokens):
        return self.out(self.body(self.table(tokens)))


def test_a_tied_layer_is_no_target_by_default():
    report = apply_lora(Tied(), 2)
    assert report.replaced == ["body"]
    assert "tied to table.weight" in report.skipped["out"]
    assert apply_lora(Tied(), 2, target_modules=["out"]).replaced == ["out"]


def test_a_layer_tied_by_storage_or_to_another_layer_is_none_either():
    model = Tied()
    model.out.weight = nn.Parameter(model.table.weight.detach())
    model.twin = nn.Linear(4, 4)
    model.twin.weight = model.body.weight
    model.alone = nn.Linear(4, 4)
    report = apply_lora(model, 2)
    assert report.replaced == ["alone"]
    assert "table.weight" in report.skipped["out"]
    assert "tied to body.weight" in report.skipped["twin"]


def test_heads_of_models_within_a_module():
    wrapper = nn.Module()
    wrapper.causal = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    config = transformers.BertConfig(**SIZES, num_labels=3)
    wrapper.labels = transformers.BertForSequenceClassification(config)
    report = apply_lora(wrapper, 2)
    assert report.skipped["causal.lm_head"] == "the model's output head"
    assert report.new_heads == ["labels.classifier"]
    assert "causal.model.layers.0.mlp.up_proj" in report.replaced


@pytest.mark.parametrize("wrap", ["blocks", "whole"])
def test_names_of_a_compiled_model_are_the_plain_ones(wrap):
    def compiled(module):
        return torch.compile(module, backend="eager")

    model = nn.Sequential(Tied(), nn.Sequential(nn.Linear(4, 4)))
    expected = ["0.body", "1.0"]
    if wrap == "whole":
        model = compiled(model)
    else:
        model[0], model[1] = compiled(model[0]), compiled(model[1])
    report = apply_lora(model, 2, target_modules=r"0\.(body|out)|1\.0", exclude_modules=r"0\.out")
    assert report.replaced == expected
    assert report.skipped == {"0.out": "excluded by exclude_modules"}


def llava(**options):
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2,
              "image_size": 8, "patch_size": 4, "num_hidden_layers": 3}  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision),
        text_config=transformers.LlamaConfig(**SIZES),
        **options,
    )
    return transformers.LlavaForConditionalGeneration(config)


@pytest.mark.parametrize(("layer", "unread"), [(-2, {"2"}), (1, {"1", "2"}), ([-3, -2], {"2"})])
def test_layers_behind_the_one_a_config_reads(layer, unread):
    report = apply_lora(llava(vision_feature_layer=layer), 2)
    skipped = {n for n, why in report.skipped.items() if "vision_feature_layer" in why}
    assert {name.split("layers.")[1][0] for name in skipped} == unread
    assert len(skipped) == 6 * len(unread)
    assert not skipped & set(report.replaced)


def test_a_layer_without_weights_is_skipped():
    softmax = nn.AdaptiveLogSoftmaxWithLoss(4, 10, [2, 4])
    report = apply_lora(softmax, 2)
    assert report.skipped["tail.1.0"] == "its weight is empty, [0, 4]"
    assert torch.isfinite(softmax.log_prob(torch.ones(2, 4))).any()


def test_a_pooler_beside_a_head_for_tokens_is_no_target_by_default():
    config = transformers.BertConfig(**SIZES, is_decoder=False)
    decoder = transformers.BertConfig(**SIZES, is_decoder=True, add_cross_attention=True)
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(config, decoder)
    model = transformers.EncoderDecoderModel(config)
    report = apply_lora(model, 2)
    assert "no logits are made of" in report.skipped["encoder.pooler.dense"]
    assert not any("pooler" in name for name in report.replaced)
    named = apply_lora(transformers.EncoderDecoderModel(config), 2, target_modules=["dense"])
    assert "encoder.pooler.dense" in named.replaced


@pytest.mark.parametrize(
    "kind", ["BertForPreTraining", "BertModel", "BertForSequenceClassification"]
)
def test_a_pooler_that_is_read_is_a_target(kind):
    model = getattr(transformers, kind)(transformers.BertConfig(**SIZES))
    assert any(name.endswith("pooler.dense") for name in apply_lora(model, 2).replaced)


class Scores(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    @torch.no_grad()
    def forward(self, x):
        return self.inner(x)


def test_what_runs_under_no_grad_is_no_target():
    model = nn.ModuleDict({"scores": Scores(), "body": nn.Linear(4, 4)})
    report = apply_lora(model, 2)
    assert report.replaced == ["body"]
    assert report.skipped["scores.inner"].startswith("Scores.forward runs under no_grad")
    with pytest.raises(ValueError, match=r"scores\.inner: Scores\.forward runs under no_grad"):
        apply_lora(nn.ModuleDict({"scores": Scores()}), 2, target_modules=["inner"])


class TopIndexer(Scores):
    def forward(self, x):
        return self.inner(x).topk(2).indices


class Owlv2ForObjectDetection(nn.Module):
    """By its class's name: what is known of the real one."""

    def __init__(self):
        super().__init__()
        self.owlv2 = nn.ModuleDict({"visual_projection": nn.Linear(4, 4), "body": nn.Linear(4, 4)})


@pytest.mark.parametrize(
    ("build", "path", "reason"),
    [
        (TopIndexer, "inner", "TopIndexer chooses tokens"),
        (Owlv2ForObjectDetection, "owlv2.visual_projection", "boxes do not read it"),
    ],
)
def test_what_no_output_needs_is_a_target_by_name_alone(build, path, reason):
    report = apply_lora(nn.ModuleDict({"part": build(), "body": nn.Linear(4, 4)}), 2)
    assert reason in report.skipped[f"part.{path}"]
    assert "body" in report.replaced
    named = apply_lora(nn.ModuleDict({"part": build()}), 2, target_modules=f"part.{path}")
    assert named.replaced == [f"part.{path}"]
