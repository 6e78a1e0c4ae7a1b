"""save_adapter and load_adapter against PEFT's files, damaged files and interrupted saving."""

import copy
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_kernels
from lora_kernels import apply_lora, load_adapter, save_adapter

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
tiny_models = pytest.importorskip("tiny_models")
TOKENS = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(1))
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def adapted(**options):
    model = llama()
    apply_lora(model, 4, **{"alpha": 8, **options})
    for parameter in lora_kernels.lora_parameters(model):
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def close(left, right):
    return (left - right).norm() / right.norm() < 1e-5


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"modules_to_save": ["lm_head"]},
                                     {"init": "pissa"}])  # fmt: skip
def test_peft_and_a_fresh_base_read_what_was_saved(tmp_path, options):
    model = adapted(**options)
    save_adapter(model, tmp_path)
    fresh = llama()
    load_adapter(fresh, tmp_path)
    assert close(logits(fresh), logits(model))
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path)
    assert close(logits(theirs), logits(model))
    state = peft.get_peft_model_state_dict(theirs)
    assert state.keys() == load_file(tmp_path / WEIGHTS).keys()


def test_a_file_of_peft_with_patterns(tmp_path):
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], init_lora_weights=False,
        rank_pattern={"layers.0.self_attn.q_proj": 2}, alpha_pattern={"up_proj": 3},
    )  # fmt: skip
    theirs = peft.get_peft_model(llama(), config).eval()
    theirs.save_pretrained(tmp_path)
    ours = llama()
    load_adapter(ours, tmp_path)
    assert close(logits(ours), logits(theirs))
    save_adapter(ours, tmp_path / "again")
    first, second = load_file(tmp_path / WEIGHTS), load_file(tmp_path / "again" / WEIGHTS)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("where", ["safetensors.torch.save", "os.replace"])
def test_an_interrupted_save_leaves_the_old_files(tmp_path, monkeypatch, where):
    save_adapter(adapted(), tmp_path)
    old = read(tmp_path)

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(where, fail)
    with pytest.raises(OSError, match="disk full"):
        save_adapter(adapted(alpha=3), tmp_path)
    assert read(tmp_path) == old


def damage(key, change):
    return lambda tensors, config: tensors.__setitem__(key, change(tensors[key]))


@pytest.mark.parametrize("present", [False, True])
@pytest.mark.parametrize(("change", "message"), [
    (damage(Q0 + "A.weight", lambda t: t * torch.nan), "q_proj.lora_A.weight: holds non-finite"),
    (damage(Q0 + "B.weight", lambda t: t[:-1]), "q_proj.lora_B.weight: has shape"),
    (lambda t, c: t.pop(Q0 + "B.weight"), "q_proj.lora_B.weight: missing"),
    (lambda t, c: t.update({Q0.replace("q_p", "z_p") + "A.weight": torch.ones(4, 32)}), "z_proj"),
    (lambda t, c: c.update(r=5), "lora_A.weight: has shape"),
    (lambda t, c: c.update(peft_type="LOHA"), "expected peft_type 'LORA', got 'LOHA'"),
    (lambda t, c: c.update(use_dora=True), "lora_magnitude"),
    (lambda t, c: c.update(init_lora_weights="pissa"), "init_lora_weights = 'pissa'"),
    (lambda t, c: c.update(lora_alpha=float("nan")), "lora_alpha: got nan"),
])  # fmt: skip
def test_a_damaged_file_is_named_and_changes_nothing(tmp_path, change, message, present):
    save_adapter(adapted(), tmp_path)
    tensors, config = load_file(tmp_path / WEIGHTS), json.loads((tmp_path / CONFIG).read_text())
    change(tensors, config)
    save_file(tensors, tmp_path / WEIGHTS)
    (tmp_path / CONFIG).write_text(json.dumps(config))
    model = adapted() if present else llama()
    before = {n: (id(p), p.requires_grad, p.clone()) for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        load_adapter(model, tmp_path)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    for name, (identity, flag, value) in before.items():
        assert (id(after[name]), after[name].requires_grad) == (identity, flag), name
        assert torch.equal(after[name], value), name


def test_save_pretrained_takes_the_given_state(tmp_path):
    """Trainer hands over a state that it gathered; positional arguments are as in Transformers."""
    model = llama()
    apply_lora(model, 4, target_modules=["q_proj"])
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    name = next(key for key in state if key.endswith("lora_B"))
    state[name].fill_(0.5)
    model.save_pretrained(tmp_path, True, state)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    key = "base_model.model." + name.replace("lora_B", "lora_B.weight")
    assert torch.equal(saved[key], torch.full_like(saved[key], 0.5))
    assert not model.get_parameter(name).any()
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other" / "adapter_config.json").exists()


def test_save_pretrained_keeps_the_adapters(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert close(logits(again), logits(model))


def state_of(model):
    types = [(name, type(module)) for name, module in model.named_modules()]
    return types, {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(("name", "keep", "error", "message"), [
    (WEIGHTS, 200, ValueError, "truncated or not a safetensors file"),
    (WEIGHTS, None, FileNotFoundError, WEIGHTS),
    (CONFIG, 40, ValueError, "not a complete JSON file"),
    (CONFIG, None, FileNotFoundError, CONFIG),
])  # fmt: skip
@pytest.mark.parametrize("present", [False, True])
def test_a_truncated_or_missing_file(tmp_path, name, keep, error, message, present):
    save_adapter(adapted(), tmp_path)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).unlink()
    if keep is not None:
        (tmp_path / name).write_bytes(content[:keep])
    model = adapted(alpha=5) if present else llama()
    types, values = state_of(model)
    with pytest.raises(error, match=message):
        load_adapter(model, tmp_path)
    after_types, after = state_of(model)
    assert after_types == types
    assert after.keys() == values.keys()
    assert all(torch.equal(after[key], value) for key, value in values.items())


def test_a_file_of_another_rank_is_refused_by_adapters_that_are_there(tmp_path):
    save_adapter(adapted(), tmp_path)
    model = llama()
    apply_lora(model, 3)
    with pytest.raises(ValueError, match=r"lora_A.weight: has rank 4, .* has rank 3"):
        load_adapter(model, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_goes_into_adapters_that_are_there(tmp_path, dtype):
    model, other = adapted().to(dtype), adapted(alpha=1).to(dtype)
    torch.nn.init.zeros_(other.model.layers[0].self_attn.q_proj.lora_B)
    save_adapter(model, tmp_path)
    load_adapter(other, tmp_path)
    assert torch.equal(logits(other), logits(model))
    assert other.model.layers[0].self_attn.q_proj.scaling == 2


@pytest.mark.parametrize(("name", "options", "message"), [
    ("bert", {}, "no module .*; its linear layers are bert.encoder.layer"),
    ("llama", {"hidden_size": 16}, r"lora_[AB].weight: has shape \(.*32.*\), expected \(.*16.*\)"),
    ("llama", {"vocab_size": 60}, r"lm_head.weight: has shape \(64, 32\), .* has \(60, 32\)"),
    ("llama", {"num_hidden_layers": 1}, "no module 'model.layers.1.*linear layers are model.layer"),
    ("gpt2", {}, "has no module .*; its linear layers are transformer.h.*.attn.c_attn"),
])  # fmt: skip
def test_an_adapter_of_another_architecture(tmp_path, name, options, message):
    saved = ["lm_head"] if "vocab_size" in options else None
    save_adapter(adapted(modules_to_save=saved), tmp_path, base_model="some/llama")
    other = tiny_models.build(name, **options)
    types, values = state_of(other)
    flags = [p.requires_grad for p in other.parameters()]
    with pytest.raises(ValueError, match=f"{message}.*the model it was trained on, some/llama"):
        load_adapter(other, tmp_path)
    after_types, after = state_of(other)
    assert after_types == types
    assert [p.requires_grad for p in other.parameters()] == flags
    assert after.keys() == values.keys()
    assert all(torch.equal(after[key], value) for key, value in values.items())


def test_a_model_of_peft_is_not_given_a_second_adapter(tmp_path):
    save_adapter(adapted(), tmp_path)
    for fused in (False, True):
        model = peft.PeftModel.from_pretrained(llama(), tmp_path)
        if fused:
            lora_kernels.fuse_peft(model)
        types, _ = state_of(model)
        for call in (lambda m: apply_lora(m, 2), lambda m: load_adapter(m, tmp_path)):
            with pytest.raises(ValueError, match=r"q_proj carries an adapter of PEFT; fuse_peft\("):
                call(model)
        assert state_of(model)[0] == types
        apply_lora(model.unload(), 2)


def read(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("first_save", [False, True])
@pytest.mark.parametrize("links", [True, False])
def test_a_rename_that_fails_brings_the_old_pair_back(tmp_path, monkeypatch, first_save, links):
    if not first_save:
        save_adapter(adapted(), tmp_path)
    before, replace, calls = read(tmp_path), os.replace, []

    def second_fails(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError("disk full")
        replace(source, target)

    def no_links(source, target):
        raise OSError("not supported")

    monkeypatch.setattr("os.replace", second_fails)
    if not links:
        monkeypatch.setattr("os.link", no_links)
    with pytest.raises(OSError, match="disk full"):
        save_adapter(adapted(alpha=3), tmp_path)
    assert len(calls) == (2 if first_save else 4)
    assert read(tmp_path) == before


@pytest.mark.parametrize(("options", "key"), [
    ({"alpha": 3}, "lora_alpha = 8.* has 3"), ({"use_rslora": True}, "use_rslora = False"),
])  # fmt: skip
def test_files_of_two_saves_are_told_apart(tmp_path, options, key):
    """What a machine that stops between the two renames leaves."""
    save_adapter(adapted(), tmp_path)
    save_adapter(adapted(**options), tmp_path / "other")
    os.replace(tmp_path / "other" / CONFIG, tmp_path / CONFIG)
    model = llama()
    types, values = state_of(model)
    with pytest.raises(ValueError, match=f"was saved with {key}.*of two saves.*save the adapter a"):
        load_adapter(model, tmp_path)
    after_types, after = state_of(model)
    assert after_types == types
    assert after.keys() == values.keys()


def test_the_config_s_other_entries_may_be_edited(tmp_path):
    save_adapter(adapted(), tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    config.update(base_model_name_or_path="elsewhere", inference_mode=False)
    (tmp_path / CONFIG).write_text(json.dumps(config))
    load_adapter(llama(), tmp_path)


def test_after_a_final_merge_nothing_is_left_to_save(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    before = logits(model)
    lora_kernels.merge_lora(model, keep_base=False)
    with pytest.raises(RuntimeError, match="merged with keep_base=False"):
        save_adapter(model, tmp_path / "adapter")
    model.save_pretrained(tmp_path)
    assert not (tmp_path / CONFIG).exists()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert close(logits(again), before)


def test_a_copy_saves_itself(tmp_path):
    model = adapted()
    twin = copy.deepcopy(model)
    torch.nn.init.normal_(twin.model.layers[0].self_attn.q_proj.lora_B)
    twin.save_pretrained(tmp_path)
    fresh = llama()
    load_adapter(fresh, tmp_path)
    assert torch.equal(logits(fresh), logits(twin))
    assert not torch.equal(logits(fresh), logits(model))


class Normed(torch.nn.Module):
    """Batch normalisation, whose running statistics are buffers that training moves."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.norm = torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8)
        self.head = torch.nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.norm(self.inner(x)).relu())


ROWS = torch.randn(16, 6, generator=torch.Generator().manual_seed(2))


def trained_with_its_norm():
    model = Normed()
    apply_lora(model, 2, target_modules=["inner"], modules_to_save=["norm"])
    optimizer = torch.optim.SGD(lora_kernels.lora_parameters(model), lr=0.1)
    for _ in range(3):
        model.train()(ROWS).square().mean().backward()
        optimizer.step()
    return model.eval()


def test_buffers_of_modules_to_save_are_part_of_the_adapter(tmp_path):
    model = trained_with_its_norm()
    y, base = model(ROWS), Normed().eval()
    assert not torch.equal(model.norm.running_mean, base.norm.running_mean)
    save_adapter(model, tmp_path)
    ours = Normed().eval()
    load_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(Normed().eval(), tmp_path).eval()
    fresh = Normed().eval()
    apply_lora(fresh, 2, target_modules=["inner"], modules_to_save=["norm"])
    fresh.load_state_dict(lora_kernels.lora_state_dict(model), strict=False)
    assert torch.equal(ours(ROWS), y)
    assert torch.equal(fresh(ROWS), y)
    assert close(theirs(ROWS), y)
    assert ours.norm.num_batches_tracked == 3
    theirs.save_pretrained(tmp_path / "again")
    back = Normed().eval()
    load_adapter(back, tmp_path / "again")
    assert torch.equal(back(ROWS), y)


def test_buffers_of_modules_to_save_go_back_with_them():
    model, base = trained_with_its_norm(), Normed().eval()
    y, expected = model(ROWS), base(ROWS)
    with lora_kernels.disable_adapters(model):
        torch.testing.assert_close(model(ROWS), expected)
        saved = lora_kernels.lora_state_dict(model)["norm.running_mean"]
    assert torch.equal(model(ROWS), y)
    assert torch.equal(model.norm.running_mean, saved)
    lora_kernels.remove_lora(model)
    assert torch.equal(model(ROWS), expected)
    assert model.state_dict().keys() == base.state_dict().keys()
    kept = trained_with_its_norm()
    lora_kernels.merge_lora(kept, keep_base=False)
    lora_kernels.remove_lora(kept)
    assert close(kept(ROWS), y)
