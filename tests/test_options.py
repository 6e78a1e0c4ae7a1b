"""The options of apply_lora: numbers, names, patterns for single layers, PEFT's LoraConfig."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from lora_kernels import FusedLoRALinear, apply_lora, load_adapter, save_adapter

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
TOKENS = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(1))
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}


def llama():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()


def adapters(model):
    """name -> (rank, scaling, dropout) of every layer with an adapter."""
    return {
        name: (m.rank, m.scaling, m.dropout)
        for name, m in model.named_modules()
        if isinstance(m, FusedLoRALinear)
    }


def theirs(model, config):
    """The same of PEFT's layers."""
    wrapped = peft.get_peft_model(model, config)
    return {
        name.removeprefix("base_model.model."): (
            m.r["default"], m.scaling["default"], getattr(m.lora_dropout["default"], "p", 0.0),
        )
        for name, m in wrapped.named_modules()
        if isinstance(m, peft.tuners.lora.Linear)
    }  # fmt: skip


# ------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize(
    "options",
    [
        {"rank": np.int64(4), "alpha": np.float32(8), "dropout": np.float16(0.25)},
        {"rank": torch.tensor(4), "alpha": torch.tensor(8.0), "dropout": torch.tensor(0.25)},
        {"rank": np.array(4), "alpha": np.array(8), "dropout": np.float64(0.25)},
    ],
)
def test_scalars_of_numpy_and_torch_are_numbers(options):
    model = nn.Sequential(nn.Linear(8, 8))
    apply_lora(model, **options)
    layer = model[0]
    assert (layer.rank, layer.alpha, layer.dropout) == (4, 8, 0.25)
    assert type(layer.alpha) in (int, float)
    assert type(layer.dropout) is float
    model(torch.randn(2, 8)).sum().backward()
    with pytest.raises(ValueError, match="legal values are"):
        FusedLoRALinear.from_linear(nn.Linear(8, 8), np.int32(2), init="nope")


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"alpha": np.float32("nan")}, ValueError, "alpha: expected a finite number or None"),
        ({"alpha": torch.tensor(-math.inf)}, ValueError, "alpha: expected a finite number"),
        ({"alpha": torch.ones(2)}, TypeError, "alpha: expected a number or None, got tensor"),
        ({"rank": np.bool_(True)}, ValueError, "rank: expected an integer of at least 1"),
        ({"rank": [8]}, TypeError, r"rank: expected an integer of at least 1, got \[8\]"),
        ({"dropout": "0.1"}, TypeError, "dropout: expected a probability"),
        ({"rank": None}, TypeError, "apply_lora: rank is missing"),
        ({"r": 8}, TypeError, "apply_lora: r is called rank here"),
        ({"lora_alpha": 8}, TypeError, "lora_alpha is called alpha here"),
        ({"lora_dropout": 0.1}, TypeError, "lora_dropout is called dropout here"),
        ({"init_lora_weights": True}, TypeError, "init_lora_weights is called init here"),
        ({"bias": "all"}, TypeError, "apply_lora: got an unexpected keyword argument 'bias'"),
        ({"target_modules": 3}, TypeError, "target_modules: expected a list of names or one"),
        ({"target_modules": "q_proj"}, ValueError,
         r"target_modules: 'q_proj' matches no module; for a list write \['q_proj'\]"),
        ({"rank_pattern": {"nope": 3}}, ValueError, "rank_pattern: 'nope' matches no target"),
        ({"rank_pattern": {"lm_head": 3}}, ValueError, "rank_pattern: 'lm_head' matches no targ"),
        ({"rank_pattern": {"q_proj": 0}}, ValueError, r"rank_pattern\['q_proj'\]: expected an int"),
        ({"alpha_pattern": {"q_proj": "8"}}, TypeError, r"alpha_pattern\['q_proj'\]: expected"),
        ({"alpha_pattern": {"(": 8}}, ValueError, r"alpha_pattern: '\(' is no regular expression"),
        ({"rank_pattern": ["q_proj"]}, TypeError, "rank_pattern: expected {expression: value}"),
    ],
)  # fmt: skip
def test_what_cannot_be_understood_is_answered(options, kind, message):
    model = llama()
    with pytest.raises(kind, match=message):
        apply_lora(model, **{"rank": 2, **options})
    assert not adapters(model)
    assert all(p.requires_grad for p in model.parameters())


def test_rank_may_come_by_either_way_and_must_come():
    with pytest.raises(TypeError, match=r"rank is missing, apply_lora\(model, 8\)"):
        apply_lora(llama())
    assert apply_lora(llama(), rank=2).replaced == apply_lora(llama(), 2).replaced


def test_names_may_be_any_iterable_and_all_linear_is_the_default():
    expected = apply_lora(llama(), 2).replaced
    assert apply_lora(llama(), 2, target_modules="all-linear").replaced == expected
    queries = apply_lora(llama(), 2, target_modules=["q_proj"]).replaced
    assert apply_lora(llama(), 2, target_modules=iter(["q_proj"])).replaced == queries
    assert apply_lora(llama(), 2, target_modules={"q_proj"}).replaced == queries


def test_a_lazy_layer_is_named():
    model = nn.Sequential(nn.Linear(8, 8), nn.LazyLinear(4))
    with pytest.raises(ValueError, match=r"1\.weight has no shape yet; call the model once"):
        apply_lora(model, 2)
    assert model[0].weight.requires_grad


# ----------------------------------------------------------------------------------- patterns


PATTERNS = {
    "rank_pattern": {r"layers\.0\.self_attn\.q_proj": 2, "q_proj": 6, "^model.layers.1.+v_proj": 3},
    "alpha_pattern": {"v_proj": 5, r"layers\.[12]\..*": 16},
}


@pytest.mark.parametrize("use_rslora", [False, True])
def test_patterns_mean_what_they_mean_to_peft(use_rslora, tmp_path):
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], use_rslora=use_rslora, **PATTERNS
    )
    model = llama()
    apply_lora(
        model, 4, alpha=8, target_modules=["q_proj", "v_proj"], use_rslora=use_rslora, **PATTERNS
    )
    expected = theirs(llama(), config)
    assert adapters(model) == expected
    assert len({rank for rank, *_ in expected.values()}) == 4
    for layer in (m for m in model.modules() if isinstance(m, FusedLoRALinear)):
        nn.init.normal_(layer.lora_B)
    save_adapter(model, tmp_path)
    other = llama()
    load_adapter(other, tmp_path)
    assert adapters(other) == expected
    with torch.no_grad():
        ours = model(TOKENS).logits
        assert torch.equal(other(TOKENS).logits, ours)
        read = peft.PeftModel.from_pretrained(llama(), tmp_path)(TOKENS).logits
    assert (read - ours).norm() <= 1e-5 * ours.norm()


def test_pissa_is_checked_with_each_layer_s_rank():
    with pytest.raises(ValueError, match=r"rank: 'pissa' .* = 16 of .*k_proj, got 17"):
        apply_lora(llama(), 2, init="pissa", rank_pattern={"k_proj": 17})
    model = llama()
    apply_lora(model, 2, init="pissa", rank_pattern={"k_proj": 3})
    assert model.model.layers[0].self_attn.k_proj.pissa_A.shape == (3, 32)


# -------------------------------------------------------------------------- PEFT's LoraConfig


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": "all-linear", "lora_dropout": 0.1, "fan_in_fan_out": True},
        {"target_modules": ["q_proj"], "use_rslora": True, "lora_alpha": 16, "r": 2},
        {"target_modules": r".*\.(q|v)_proj", "exclude_modules": r".*\.1\..*"},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 2], **PATTERNS,
         "rank_pattern": {"q_proj": 6}},
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": 1,
         "layers_pattern": "layers"},
        {"target_modules": ["q_proj"], "bias": "none", "task_type": "CAUSAL_LM"},
    ],
)  # fmt: skip
def test_a_config_means_what_it_means_to_peft(options):
    model = llama()
    apply_lora(model, peft.LoraConfig(**options))
    assert adapters(model)
    assert adapters(model) == theirs(llama(), peft.LoraConfig(**options))


def test_layers_to_transform_by_any_name():
    second = nn.ModuleDict({"fc": nn.Linear(8, 8)})
    model = nn.Sequential(nn.ModuleDict({"fc": nn.Linear(8, 8)}), second, second)
    model = nn.ModuleDict({"layers": model})
    config = peft.LoraConfig(target_modules=["fc"], layers_to_transform=[2])
    assert apply_lora(model, config).replaced == ["layers.1.fc"]


def test_a_config_s_start_and_what_is_trained_in_full():
    model = llama()
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    report = apply_lora(model, config, adapter_dtype=torch.float32)
    assert report.saved == ["lm_head"]
    assert not any(m.lora_B.any() for m in model.modules() if isinstance(m, FusedLoRALinear))
    model = llama()
    apply_lora(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    assert all(m.lora_B.any() for m in model.modules() if isinstance(m, FusedLoRALinear))
    model = llama()
    apply_lora(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"))
    assert model.model.layers[0].self_attn.q_proj.pissa_A is not None


def test_a_config_for_classification_names_the_head(tmp_path):
    config = transformers.LlamaConfig(**SIZES)
    transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    for modules_to_save in (None, ["norm", "classifier", "score"]):
        model = transformers.LlamaForSequenceClassification.from_pretrained(tmp_path)
        report = apply_lora(
            model,
            peft.LoraConfig(
                task_type="SEQ_CLS", target_modules=["q_proj"], modules_to_save=modules_to_save
            ),
        )
        assert report.saved == (["model.norm"] if modules_to_save else []) + ["score"]


@pytest.mark.parametrize(
    ("config", "kind", "message"),
    [
        ({"use_qalora": True}, ValueError, r"use_qalora = True is not supported; .* fuse_peft"),
        ({"bias": "all"}, ValueError, "bias = 'all' is not supported"),
        (
            {"init_lora_weights": "mica"},
            ValueError,
            "init_lora_weights = 'mica' is not supp.* 'eva'",
        ),
        ({"inference_mode": True}, ValueError, "inference_mode = True freezes the adapter"),
        ({"target_parameters": ["experts"]}, ValueError, "target_parameters: 'experts' matches no"),
        ({"lora_bias": True}, ValueError, "lora_bias = True is not supported"),
        ({"layers_to_transform": [7]}, ValueError, r"layers_to_transform: no target .* \[7\]"),
    ],
)
def test_options_of_a_config_that_are_not_ours_are_refused(config, kind, message):
    model = llama()
    with pytest.raises(kind, match=message):
        apply_lora(model, peft.LoraConfig(target_modules=["q_proj"], **config))
    assert not adapters(model)


def test_other_configs_and_options_beside_one_are_refused():
    with pytest.raises(TypeError, match=r"expected an integer or a peft\.LoraConfig, got LoHaCo"):
        apply_lora(llama(), peft.LoHaConfig(target_modules=["q_proj"]))
    with pytest.raises(TypeError, match="alpha is given beside a LoraConfig; set it there"):
        apply_lora(llama(), peft.LoraConfig(target_modules=["q_proj"]), alpha=3)
    with pytest.raises(ValueError, match="target_modules is not given and PEFT has no default"):
        apply_lora(nn.Sequential(nn.Linear(8, 8)), peft.LoraConfig())


@pytest.mark.parametrize("value", ["no", None, 2, torch.tensor(1.0)])
def test_use_rslora_is_a_bool(value):
    with pytest.raises(TypeError, match="use_rslora: expected True or False, got"):
        FusedLoRALinear(8, 8, 4, alpha=4, use_rslora=value)
    assert FusedLoRALinear(8, 8, 4, alpha=4, use_rslora=np.bool_(True)).scaling == 2.0


def test_a_number_without_a_value_is_refused():
    with pytest.raises(TypeError, match="alpha: expected a number or None, got tensor"):
        FusedLoRALinear(8, 8, 4, alpha=torch.tensor(4.0, device="meta"))


@pytest.mark.parametrize("model", [None, "model", [nn.Linear(8, 8)], nn.Linear])
def test_what_is_no_module_is_refused(model):
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got"):
        apply_lora(model, 4)
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got"):
        save_adapter(model, "unused")


def test_what_is_trained_in_full_and_what_is_adapted_do_not_overlap(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    apply_lora(model, 2, target_modules=["0"], modules_to_save=["2"])
    with pytest.raises(ValueError, match="no layer is left for an adapter: 2 are trained in full"):
        apply_lora(model, 2, target_modules=["2"])
    assert apply_lora(model, 2).replaced == ["1"]
    with pytest.raises(ValueError, match="modules_to_save: 1 carries an adapter already"):
        apply_lora(model, 2, target_modules=["2"], modules_to_save=["1"])
    save_adapter(model, tmp_path)
    fresh = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    load_adapter(fresh, tmp_path)
    torch.testing.assert_close(fresh[2].weight, model[2].weight)
