"""Transformers models from tiny configs: values, PEFT's files, Trainer, checkpointing, generate."""

import copy
import json
import pickle

import pytest
import torch
from torch import nn

from lora_kernels import (
    adjust_rank,
    apply_lora,
    disable_adapters,
    fuse_peft,
    load_adapter,
    lora_parameters,
    merge_lora,
    remove_lora,
    save_adapter,
    unmerge_lora,
    warmup,
)
from lora_kernels.nn import FusedLoRAConv1D

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
tiny_models = pytest.importorskip("tiny_models")
build, inputs = tiny_models.build, tiny_models.inputs
C_ATTN = "transformer.h.0.attn.c_attn"


def adapted(name="llama", seed=1, **options):
    model = build(name)
    apply_lora(model, 4, **{"alpha": 8, **options})
    return fill(model, seed)


def fill(model, seed=1):
    torch.manual_seed(seed)
    for parameter in lora_parameters(model):
        nn.init.normal_(parameter, std=0.1)
    return model


def logits(model, name="llama"):
    with torch.no_grad():
        return model(**inputs(name)).logits


def gradients(model, name="llama", seed=3):
    """By name without PEFT's parts of it, of a training loss."""
    batch = inputs(name)
    labels = batch.get("input_ids", torch.tensor([0, 2]))
    if name in ("bert", "vit"):
        labels = torch.tensor([0, 2])
    torch.manual_seed(seed)
    model(**batch, labels=labels).loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return {
        n.removeprefix("base_model.model.")
        .replace(".modules_to_save.default", "")
        .replace(".default.weight", ""): grad
        for n, grad in found.items()
    }


def assert_close(ours, theirs, limit=1e-5):
    assert (ours - theirs).norm() <= limit * theirs.norm()


# -------------------------------------------------------------------------------- architectures


@pytest.mark.parametrize("name", tiny_models.MODELS)
def test_an_untrained_adapter_changes_nothing(name):
    model = build(name)
    before = logits(model, name)
    frozen = {id(p) for p in model.parameters()}
    report = apply_lora(model, 4)
    assert len(report.replaced) >= 8
    assert not report.other_linear_maps
    assert report.saved == report.new_heads == (["classifier"] if name in ("bert", "vit") else [])
    for head in report.saved:
        frozen -= {id(p) for p in model.get_submodule(head).parameters()}
    assert {id(p) for p in model.parameters() if not p.requires_grad} == frozen
    assert_close(logits(model, name), before, 1e-6)


@pytest.mark.parametrize("name", tiny_models.MODELS)
def test_gradients_are_peft_s_on_the_same_factors(name, tmp_path):
    model = adapted(name)
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(build(name), tmp_path, is_trainable=True).eval()
    assert_close(logits(model, name), logits(theirs, name))
    expected, got = gradients(theirs, name), gradients(model, name)
    theirs.zero_grad()
    assert len(fuse_peft(theirs).fused) == sum(name.endswith("lora_A") for name in got)
    for ours in (got, gradients(theirs, name)):
        assert ours.keys() == expected.keys()
        for key, grad in ours.items():
            assert_close(grad, expected[key], 1e-4)
            assert grad.any(), key


@pytest.mark.parametrize("name", tiny_models.MODELS)
def test_merged_models_compute_the_same(name):
    model = adapted(name)
    before, base = logits(model, name), {n: p.clone() for n, p in model.named_parameters()}
    merge_lora(model)
    assert_close(logits(model, name), before)
    unmerge_lora(model)
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters())
    with disable_adapters(model):
        assert_close(logits(model, name), logits(build(name), name), 1e-6)
    merge_lora(model, keep_base=False)
    remove_lora(model)
    assert type(model).__name__ == type(build(name)).__name__
    assert {n: type(m) for n, m in model.named_modules()} == {
        n: type(m) for n, m in build(name).named_modules()
    }
    assert_close(logits(model, name), before)


@pytest.mark.parametrize("name", tiny_models.MODELS)
def test_peft_s_files_are_read(name, tmp_path):
    targets = sorted({n.rpartition(".")[2] for n in apply_lora(build(name), 1).replaced})
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False,
        fan_in_fan_out=name == "gpt2",
    )  # fmt: skip
    theirs = peft.get_peft_model(build(name), config).eval()
    theirs.save_pretrained(tmp_path)
    ours = build(name)
    load_adapter(ours, tmp_path)
    assert_close(logits(ours, name), logits(theirs, name))


# ------------------------------------------------------------------------------ GPT-2's Conv1D


def test_a_conv1d_shares_its_parameters_under_their_names():
    model = build("gpt2")
    base, keys = model.get_submodule(C_ATTN), set(model.state_dict())
    apply_lora(model, 4)
    layer = model.get_submodule(C_ATTN)
    assert type(layer) is FusedLoRAConv1D
    assert not isinstance(layer, nn.Linear)
    assert layer.weight is base.weight
    assert layer.bias is base.bias
    assert (layer.weight.shape, layer.lora_A.shape, layer.lora_B.shape) == (
        (32, 96), (4, 32), (96, 4),
    )  # fmt: skip
    assert {k for k in model.state_dict() if "lora" not in k} == keys
    assert repr(layer).startswith("FusedLoRAConv1D(in_features=32, out_features=96, bias=True, ra")
    model.load_state_dict(build("gpt2").state_dict(), strict=True)
    remove_lora(model)
    plain = model.get_submodule(C_ATTN)
    assert type(plain) is Conv1D
    assert repr(plain) == repr(base)
    assert plain.weight is base.weight


@pytest.mark.parametrize("keep", [True, "cpu"])
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_merged_conv1d_is_copied_and_unmerged(keep, clone):
    torch.manual_seed(0)
    base, x = Conv1D(24, 40), torch.randn(3, 40)
    layer = FusedLoRAConv1D.from_linear(base, 4, alpha=8)
    nn.init.normal_(layer.lora_B)
    weight, y = base.weight.detach().clone(), layer(x)
    expected = base(x) + 2.0 * (x @ layer.lora_A.T) @ layer.lora_B.T
    assert_close(y, expected, 1e-6)
    layer.merge(keep)
    assert_close(layer(x), y)
    assert torch.equal(layer.state_dict()["weight"], layer.weight)
    twin = clone(layer)
    twin.unmerge()
    assert torch.equal(twin(x), y)
    assert torch.equal(twin.weight, weight)
    assert layer.merged


def test_pissa_of_gpt2_is_saved_for_the_original_base(tmp_path):
    model = build("gpt2")
    before = logits(model, "gpt2")
    apply_lora(model, 4, alpha=8, init="pissa")
    assert_close(logits(model, "gpt2"), before)
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.add_(0.1 * torch.randn_like(parameter))
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    theirs = peft.PeftModel.from_pretrained(build("gpt2"), tmp_path)
    assert_close(logits(theirs, "gpt2"), logits(model, "gpt2"))


def test_the_rank_of_gpt2_is_adjusted():
    batch = inputs("gpt2")
    model = adapted("gpt2").train()
    loader = [{**batch, "labels": batch["input_ids"]}] * 2
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=1e-2)
    adjust_rank(model, 4, 2, loader, None, optimizer)
    layer = model.get_submodule(C_ATTN)
    assert (layer.lora_A.shape, layer.lora_B.shape) == ((2, 32), (96, 2))
    before = logits(model, "gpt2")
    merge_lora(model)
    assert_close(logits(model, "gpt2"), before)


def test_a_conv1d_says_what_it_is_made_from():
    with pytest.raises(TypeError, match="linear: expected Transformers' Conv1D itself, got Linear"):
        FusedLoRAConv1D.from_linear(nn.Linear(4, 4), 2)
    with pytest.raises(TypeError, match="is made from a Conv1D, by from_linear or apply_lora"):
        FusedLoRAConv1D(4, 4, 2)
    hooked = Conv1D(4, 4)
    hooked.register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match="_forward_hooks"):
        FusedLoRAConv1D.from_linear(hooked, 2)
    with pytest.raises(ValueError, match="is itself a linear layer"):
        apply_lora(Conv1D(4, 4), 2)
    assert warmup(adapted("gpt2"), 3) == 0


def test_save_pretrained_of_gpt2_keeps_the_adapters(tmp_path):
    model = adapted("gpt2")
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert_close(logits(again, "gpt2"), logits(model, "gpt2"))


# ------------------------------------------------------------- Trainer, checkpointing, generate


def trainer(model, folder, **options):
    data = [{"input_ids": row, "labels": row} for row in torch.arange(192).reshape(24, 8) % 64]
    arguments = transformers.TrainingArguments(
        output_dir=folder, report_to=[], disable_tqdm=True, use_cpu=True, logging_steps=1,
        **{"max_steps": 4, "learning_rate": 1e-2, "per_device_train_batch_size": 4,
           "save_strategy": "no", **options},
    )  # fmt: skip
    return transformers.Trainer(model, arguments, train_dataset=data)


def losses(run):
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def test_accumulated_gradients_are_those_of_a_larger_batch(tmp_path):
    whole, parts = adapted(), adapted()
    first = trainer(whole, tmp_path)
    first.train()
    second = trainer(parts, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    second.train()
    assert losses(first) == pytest.approx(losses(second), rel=1e-4)
    for one, two, start in zip(*map(lora_parameters, (whole, parts, adapted())), strict=True):
        assert (one - two).norm() <= 1e-3 * (one - start).norm()


def test_bf16_training_moves_the_adapters_alone(tmp_path):
    model, before = adapted("gpt2"), dict(adapted("gpt2").named_parameters())
    run, exact = trainer(model, tmp_path, bf16=True), trainer(adapted("gpt2"), tmp_path)
    run.train()
    exact.train()
    assert losses(run) == pytest.approx(losses(exact), rel=1e-2)
    assert losses(run) != losses(exact)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, before[name]) != ("lora_" in name), name


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_gradients_are_identical(name, use_reentrant, kernel_calls):
    plain, kept = (adapted(name, dropout=0.2).train() for _ in range(2))
    expected = gradients(plain, name)
    forwards = [call for call in kernel_calls if call[0] == "lora_linear"]
    kernel_calls.clear()
    kept.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    kept.enable_input_require_grads()  # frozen embeddings; reentrant checkpoints need it
    got = gradients(kept, name)
    assert len([call for call in kernel_calls if call[0] == "lora_linear"]) > len(forwards)
    assert got.keys() == expected.keys()
    for key, grad in got.items():
        assert torch.equal(grad, expected[key]), key


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_trainer_with_checkpointing_takes_the_same_steps(tmp_path, use_reentrant):
    plain, kept = adapted(dropout=0.2), adapted(dropout=0.2)
    first = trainer(plain, tmp_path)
    first.train()
    kept.enable_input_require_grads()
    second = trainer(
        kept, tmp_path, gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": use_reentrant},
    )  # fmt: skip
    second.train()
    assert losses(first) == losses(second)
    for one, two in zip(lora_parameters(plain), lora_parameters(kept), strict=True):
        assert torch.equal(one, two)


def test_trainer_resumes_with_identical_losses(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5}
    whole = trainer(adapted(dropout=0.1), tmp_path, **options)
    whole.train()
    resumed = trainer(adapted(seed=9, dropout=0.1), tmp_path, **options)
    resumed.train(str(tmp_path / "checkpoint-2"))
    assert losses(resumed) == losses(whole)
    for one, two in zip(*(lora_parameters(r.model) for r in (whole, resumed)), strict=True):
        assert torch.equal(one, two)
    assert not torch.equal(logits(whole.model.eval()), logits(adapted()))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_generate_with_a_cache(name):
    model = adapted(name)

    def tokens(**options):
        torch.manual_seed(0)
        return model.generate(
            **inputs(name), max_new_tokens=12, min_new_tokens=12, pad_token_id=0, **options
        )

    greedy, sampled = tokens(do_sample=False), tokens(do_sample=True)
    assert torch.equal(tokens(do_sample=False, use_cache=False), greedy)
    assert torch.equal(tokens(num_beams=1, do_sample=True), sampled)
    with disable_adapters(model):
        assert not torch.equal(tokens(do_sample=False), greedy)
    merge_lora(model)
    assert torch.equal(tokens(do_sample=False), greedy)
    assert torch.equal(tokens(do_sample=True), sampled)
