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


@pytest.mark.parametrize("where", ["safetensors.torch.save_file", "os.replace"])
def test_an_interrupted_save_leaves_the_old_files(tmp_path, monkeypatch, where):
    save_adapter(adapted(), tmp_path)
    old = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(where, fail)
    with pytest.raises(OSError, match="disk full"):
        save_adapter(adapted(alpha=3), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == old


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
    (lambda t, c: c.update(use_dora=True), "use_dora = True is not supported"),
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


def test_an_interruption_between_the_two_files_keeps_a_loadable_pair(tmp_path, monkeypatch):
    old, new = adapted(), adapted()
    save_adapter(old, tmp_path)
    replace, calls = os.replace, []

    def second_fails(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError("disk full")
        replace(source, target)

    monkeypatch.setattr("os.replace", second_fails)
    with pytest.raises(OSError, match="disk full"):
        save_adapter(new, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, WEIGHTS]
    fresh = llama()
    load_adapter(fresh, tmp_path)
    assert torch.equal(logits(fresh), logits(new))


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
