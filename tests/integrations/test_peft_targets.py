"""PEFT computes from our file what we do, or saving says that it will not."""

import copy
import json
import warnings

import pytest
import torch
from torch import nn

from lora_kernels import apply_lora, load_adapter, lora_parameters, save_adapter
from lora_kernels.adapters import lora_layers

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
TOKENS = torch.arange(1, 9)[None]
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "moe_intermediate_size": 24,
    "num_experts_per_tok": 2, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip
ROUTED = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
          "n_shared_experts": 1}  # fmt: skip
COUNTED = {"num_experts": 4, "shared_expert_intermediate_size": 16}
MIXTURES = {
    "DeepseekV3": {**LATENT, **ROUTED},
    "Glm4Moe": {**ROUTED, "head_dim": 8},
    "Qwen3Next": {
        **COUNTED, "head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "Qwen2Moe": COUNTED,
    "Qwen3Moe": {"num_experts": 4, "mlp_only_layers": [0], "head_dim": 8},
    "Mixtral": {"num_local_experts": 4},
}  # fmt: skip


def build(name):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **MIXTURES[name]})
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def adapted(model, **options):
    apply_lora(model, 4, **options)
    torch.manual_seed(1)
    for parameter in lora_parameters(model):
        nn.init.normal_(parameter, std=0.3)
    return model


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def close(left, right):
    return (left - right).norm() / right.norm() < 1e-5


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_of_experts_is_the_same_in_peft(tmp_path, name):
    base = build(name)
    model = adapted(copy.deepcopy(base), alpha=6)
    save_adapter(model, tmp_path)
    fresh = copy.deepcopy(base)
    load_adapter(fresh, tmp_path)
    assert torch.equal(logits(fresh), logits(model))
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert close(logits(theirs), logits(model))
    keys = peft.get_peft_model_state_dict(theirs).keys()
    assert len(keys) == len(list(lora_parameters(model)))


@pytest.mark.parametrize("name", ["DeepseekV3", "Qwen3Next"])
def test_from_pretrained_reads_a_mixture_with_its_adapter(tmp_path, name):
    model = adapted(build(name), alpha=6)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert close(logits(again), logits(model))


@pytest.mark.parametrize("options", [
    {"target_modules": r".*shared_experts\.\w+"},
    {"target_modules": ["q_b_proj", "1.mlp.shared_experts.up_proj"], "use_rslora": True},
])  # fmt: skip
def test_a_part_of_the_shared_experts(tmp_path, options):
    base = build("DeepseekV3")
    model = adapted(copy.deepcopy(base), alpha=6, **options)
    model.model.layers[1].mlp.shared_experts.up_proj.alpha = 3
    save_adapter(model, tmp_path)
    fresh = copy.deepcopy(base)
    load_adapter(fresh, tmp_path)
    assert torch.equal(logits(fresh), logits(model))
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert close(logits(theirs), logits(model))


def test_dropout_that_peft_has_no_place_for_is_said(tmp_path):
    model = adapted(build("DeepseekV3"), dropout=0.1)
    with pytest.warns(UserWarning, match=r"lora_dropout: written as 0.*mlp.gate_proj.weight"):
        save_adapter(model, tmp_path)
    peft.PeftModel.from_pretrained(build("DeepseekV3"), tmp_path)


@pytest.mark.parametrize("name", ["DeepseekV3", "Qwen3Next"])
def test_a_file_of_peft_for_a_mixture(tmp_path, name):
    base = build(name)
    config = peft.LoraConfig(r=4, target_modules=["q_a_proj", "o_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    theirs.save_pretrained(tmp_path)
    load_adapter(base, tmp_path)
    assert close(logits(base), logits(theirs))


@pytest.mark.parametrize("trained", [False, True])
def test_projections_that_peft_moves_to_fused_experts(tmp_path, trained):
    """It takes gate_proj and up_proj for halves of the experts' one parameter, of twice the
    rank."""
    base = build("DeepseekV3")
    config = peft.LoraConfig(
        r=4, target_modules=["q_a_proj", "gate_proj", "up_proj"], init_lora_weights=not trained
    )
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    theirs.save_pretrained(tmp_path)
    load_adapter(base, tmp_path, strict=True)
    assert close(logits(base), logits(theirs))
    loaded = dict(lora_layers(base))
    assert loaded["model.layers.1.mlp.experts.gate_up_proj"].rank == 8
    for name in ("model.layers.0.self_attn.q_a_proj", "model.layers.1.self_attn.q_a_proj"):
        other = theirs.base_model.model.get_submodule(name)
        assert torch.equal(loaded[name].lora_B, other.lora_B["default"].weight)


class Experts(nn.Module):
    """Of one's own, which nothing of Transformers marks."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 8, 8))

    def forward(self, x):
        return torch.einsum("mk,enk->mn", x, self.w)


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.experts = nn.Linear(8, 8), Experts()

    def forward(self, x):
        return self.experts(self.first(x))


@pytest.mark.parametrize("trained", [False, True])
def test_adapters_of_other_parameters_are_said(tmp_path, trained):
    """The rest is loaded; strict refuses."""
    base = Stack()
    config = peft.LoraConfig(
        r=4, target_modules=["first"], target_parameters=["experts.w"],
        init_lora_weights=not trained,
    )  # fmt: skip
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"strict: .*'experts.w' is not the weight of"):
        load_adapter(base, tmp_path, strict=True)
    assert not list(lora_parameters(base))
    with pytest.warns(UserWarning, match="not loaded") as said:
        load_adapter(base, tmp_path)
    said = [str(one.message) for one in said]
    assert any("'experts.w' is not the weight of" in one for one in said)
    (experts,) = [one for one in said if "experts: is no linear layer" in one]
    assert ("which is not zero, is not loaded" in experts) == trained
    if not trained:
        x = torch.randn(5, 8)
        torch.testing.assert_close(base(x), theirs(x))
    other = theirs.base_model.model.first
    assert torch.equal(base.first.lora_B, other.lora_B["default"].weight)


def test_a_conversion_that_changes_names_is_said(tmp_path, monkeypatch):
    """What PEFT does to files of architectures that nobody has looked at yet."""
    from peft.utils import transformers_weight_conversion as conversion

    model = adapted(build("DeepseekV3"))

    def rename(model, peft_config, adapter_state_dict):
        return {key.replace("q_a", "z"): t for key, t in adapter_state_dict.items()}

    monkeypatch.setattr(conversion, "convert_peft_adapter_state_dict_for_transformers", rename)
    with pytest.warns(UserWarning, match=r"PEFT will not compute .*renames .*q_a_proj.*exclude_mo"):
        save_adapter(model, tmp_path)


class Shared(nn.Module):
    def __init__(self, inner):
        super().__init__()
        torch.manual_seed(0)
        self.encode = nn.Sequential(nn.Linear(8, 8)) if inner else nn.Linear(8, 8)
        self.decode = self.encode

    def forward(self, x):
        return self.decode(torch.relu(self.encode(x)))


def test_a_module_in_two_places(tmp_path):
    """PEFT replaces a module in one of its places; within a shared parent both see it."""
    x = torch.randn(3, 8)
    model = adapted(Shared(True))
    save_adapter(model, tmp_path)
    with pytest.warns(UserWarning, match="missing adapter keys .*decode.0"):  # its second name
        theirs = peft.PeftModel.from_pretrained(Shared(True), tmp_path).eval()
    assert close(theirs(x), model(x))
    model = adapted(Shared(False))
    message = r"encode and decode are one module .*PEFT will put it into encode alone"
    with pytest.warns(UserWarning, match=message):
        save_adapter(model, tmp_path)
    fresh = Shared(False)
    load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(x), model(x))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_parameters"] is None


class Ends(nn.Module):
    """Names that end as others' do: PEFT takes every module that a name is the end of."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.body = nn.ModuleDict({"post_norm": nn.LayerNorm(8), "proj": nn.Linear(8, 8)})
        self.up = nn.Sequential()
        self.up.up = nn.Linear(8, 8)

    def forward(self, x):
        return self.up.up(self.norm(self.body["post_norm"](self.body["proj"](x))))


def test_a_saved_module_whose_name_ends_others(tmp_path):
    plain, x = Ends(), torch.randn(3, 8)
    model = adapted(
        copy.deepcopy(plain), target_modules="body.proj", modules_to_save=["norm", "up"]
    )
    with torch.no_grad():
        model.norm.bias.add_(1)
        model.up.up.bias.add_(1)
    save_adapter(model, tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"]
    assert written == ["base_model.model.norm", "base_model.model.up"]
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    torch.testing.assert_close(theirs(x), model(x))
    ours = copy.deepcopy(plain)
    load_adapter(ours, tmp_path, strict=True)
    torch.testing.assert_close(ours(x), model(x))
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
