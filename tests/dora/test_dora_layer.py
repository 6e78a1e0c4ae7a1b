"""`FusedDoRALinear`: its life in a model, beside PEFT's DoRA, and as PEFT's files."""

import copy
import io
import json
import pickle
import warnings

import pytest
import tiny_models
import torch
from torch import nn

import lora_kernels as lk
from lora_kernels.norms import HELD, weight_norms

peft = pytest.importorskip("peft")
Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D


class Toy(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.first = nn.Linear(24, 40, dtype=dtype)
        self.second = nn.Linear(40, 17, bias=False, dtype=dtype)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def toy(dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = Toy(dtype)
    lk.apply_lora(model, 4, **{"alpha": 6, "use_dora": True, **options})
    return model


def disturb(model):
    """Adapters as after some training."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
                parameter.add_(noise * (0.05 if "magnitude" in name else 0.2))
    return model


def rows(dtype=torch.float32):
    return torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(1)).to(dtype)


def of_peft(**options):
    torch.manual_seed(0)
    config = {"r": 4, "lora_alpha": 6, "target_modules": ["first", "second"], "use_dora": True}
    return peft.get_peft_model(Toy(), peft.LoraConfig(**config | options))


def test_it_starts_as_its_base():
    torch.manual_seed(0)
    base = Toy()
    model = toy()
    assert type(model.first) is lk.nn.FusedDoRALinear
    assert [*lk.lora_state_dict(model)] == [
        f"{layer}.lora_{part}" for layer in ("first", "second") for part in ("A", "B", "magnitude")
    ]
    assert torch.equal(model.first.lora_magnitude, model.first.weight.norm(dim=1))
    torch.testing.assert_close(model(rows()), base(rows()))
    assert len([*lk.lora_parameters(model)]) == 6


@pytest.mark.parametrize("mode", ["training", "evaluation"])
def test_as_pefts_dora(mode, tmp_path):
    theirs = disturb(of_peft()).train(mode == "training")
    theirs.save_pretrained(tmp_path)
    torch.manual_seed(0)
    model = Toy().train(mode == "training")
    lk.load_adapter(model, tmp_path)
    x, y = rows().requires_grad_(), rows().requires_grad_()
    ours, right = model(x), theirs(y)
    torch.testing.assert_close(ours, right)
    dy = torch.randn_like(ours)
    ours.backward(dy)
    right.backward(dy)
    torch.testing.assert_close(x.grad, y.grad)
    found = {k: p.grad for k, p in model.named_parameters() if p.requires_grad}
    for name, parameter in theirs.named_parameters():
        if not parameter.requires_grad:
            continue
        own = name.removeprefix("base_model.model.").replace(".default", "").removesuffix(".weight")
        own = own.replace("lora_magnitude_vector", "lora_magnitude")
        torch.testing.assert_close(found.pop(own), parameter.grad)
    assert not found


@pytest.mark.parametrize("rslora", [False, True])
def test_files_of_peft(tmp_path, rslora):
    model = disturb(toy(use_rslora=rslora))
    lk.save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["use_dora"] is True
    torch.manual_seed(0)
    theirs = peft.PeftModel.from_pretrained(Toy(), tmp_path)
    torch.testing.assert_close(theirs(rows()), model(rows()))
    torch.manual_seed(0)
    again = Toy()
    lk.load_adapter(again, tmp_path)
    assert torch.equal(again(rows()), model(rows()))
    other = disturb(toy(use_rslora=rslora))
    disturb(other)
    lk.load_adapter(other, tmp_path)  # into the layers that there are
    assert torch.equal(other(rows()), model(rows()))


def test_files_that_do_not_fit(tmp_path):
    lk.save_adapter(disturb(toy()), tmp_path / "dora")
    lk.save_adapter(disturb(toy(use_dora=False)), tmp_path / "lora")
    model = toy()
    before = model(rows())
    with pytest.raises(ValueError, match="has lora_magnitude and the file is not of DoRA"):
        lk.load_adapter(model, tmp_path / "lora")
    assert torch.equal(model(rows()), before)
    with pytest.raises(ValueError, match="has no lora_magnitude and the file is of DoRA"):
        lk.load_adapter(toy(use_dora=False), tmp_path / "dora")
    from safetensors.torch import load_file, save_file

    path = tmp_path / "dora" / "adapter_model.safetensors"
    whole = load_file(path)
    key = "base_model.model.first.lora_magnitude_vector"
    for change, words in (
        (None, "missing from the adapter file, whose config has use_dora"),
        (torch.ones(39), r"shape \[40\]"),
        (torch.ones(40, dtype=torch.int64), "expected a floating dtype"),
    ):
        stored = {k: v for k, v in whole.items() if k != key}
        save_file(stored if change is None else {**stored, key: change}, path)
        torch.manual_seed(0)
        plain = Toy()
        with pytest.raises(ValueError, match=words):
            lk.load_adapter(plain, tmp_path / "dora")
        assert type(plain.first) is nn.Linear
    config = tmp_path / "dora" / "adapter_config.json"
    save_file(whole, path)
    config.write_text(config.read_text().replace('"use_dora": true', '"use_dora": false'))
    with pytest.raises(ValueError, match="lora_magnitude_vector"):
        lk.load_adapter(Toy(), tmp_path / "dora")


def test_layers_with_and_without_in_one_model(tmp_path):
    torch.manual_seed(0)
    model = Toy()
    model.first = lk.FusedLoRALinear.from_linear(model.first, 2, use_dora=True)
    model.second = lk.FusedLoRALinear.from_linear(model.second, 2)
    with pytest.raises(ValueError, match=r"first have DoRA and second have not"):
        lk.save_adapter(model, tmp_path)


@pytest.mark.parametrize("keep", [True, "cpu", False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging(keep, dtype):
    model = disturb(toy(dtype)).eval()
    with torch.no_grad():
        model.first.lora_magnitude[3] *= -1  # as training may leave it: no length any more
    x, tolerance = rows(dtype), {torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    before, base = model(x).detach(), model.first.weight.detach().clone()
    merged = lk.merged_state_dict(model)["first.weight"]
    lk.merge_lora(model, keep)
    assert torch.equal(model.first.weight, merged)
    torch.testing.assert_close(model(x), before, rtol=tolerance, atol=tolerance)
    length = merged.float().norm(dim=1)
    right = model.first.lora_magnitude.float().abs()
    torch.testing.assert_close(length, right, rtol=tolerance, atol=tolerance)
    if keep:
        with lk.disable_adapters(model):
            torch.testing.assert_close(
                model.first(x), nn.functional.linear(x, base, model.first.bias)
            )
        lk.unmerge_lora(model)
        assert torch.equal(model.first.weight, base)
        assert torch.equal(model(x), before)
    else:
        # The merged weight, loaded as a base, is what the layer computes: its adapter adds nothing.
        state = {"first.weight": merged, "second.weight": model.second.weight.detach().clone()}
        model.load_state_dict(state, strict=False)
        assert not model.first.merged
        torch.testing.assert_close(model(x), before, rtol=tolerance, atol=tolerance)
        state = {"first.weight": base, "second.weight": model.second.weight.detach().clone()}
        model.load_state_dict(state, strict=False)
        lk.remove_lora(model)
        assert type(model.first) is nn.Linear
        assert torch.equal(model.first.weight, base)


def test_norms_of_evaluation_follow_every_change():
    model = disturb(toy()).eval()
    layer, x = model.first, rows()
    with torch.no_grad():
        layer(x)
        held = vars(layer)[HELD]
        layer(x)
        assert vars(layer)[HELD] is held
        for tensor in (layer.weight, layer.lora_A, layer.lora_B):
            tensor.mul_(1.5)
            y = layer(x)
            assert vars(layer)[HELD] is not held
            held = vars(layer)[HELD]
            assert torch.equal(y, copy.deepcopy(layer).train()(x))
        layer.alpha = 1.0
        assert torch.equal(layer(x), copy.deepcopy(layer).train()(x))
        layer.lora_magnitude.mul_(2)  # no part of the norms
        assert torch.equal(layer(x), copy.deepcopy(layer).train()(x))
        layer.weight.data.mul_(3)  # which torch does not count
        layer.eval()
        assert HELD not in vars(layer)
        assert torch.equal(layer(x), copy.deepcopy(layer).train()(x))
        layer(x)
    assert HELD in vars(layer)
    assert HELD not in vars(pickle.loads(pickle.dumps(layer)))
    assert HELD not in vars(copy.deepcopy(layer))
    layer.train()(x)
    assert HELD not in vars(layer)


def test_copies_states_and_removal():
    model = disturb(toy())
    x = rows()
    y = model(x)
    assert torch.equal(copy.deepcopy(model)(x), y)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), y)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = toy()
    other.load_state_dict(torch.load(file))
    assert torch.equal(other(x), y)
    torch.manual_seed(0)
    base = Toy()
    with lk.disable_adapters(model):
        torch.testing.assert_close(model(x), base(x))
    lk.remove_lora(model)
    assert [*model.state_dict()] == [*base.state_dict()]
    assert type(model.first) is nn.Linear
    assert torch.equal(model(x), base(x))


def test_made_by_the_class():
    layer = lk.FusedLoRALinear(24, 40, 4, alpha=8, use_dora=True)
    assert isinstance(layer, lk.FusedLoRALinear)
    assert type(layer) is lk.nn.FusedDoRALinear
    torch.testing.assert_close(
        layer(rows()), nn.functional.linear(rows(), layer.weight, layer.bias)
    )
    direct = lk.nn.FusedDoRALinear(24, 40, 4)
    assert torch.equal(direct.lora_magnitude, direct.weight.norm(dim=1))
    with torch.device("meta"):
        empty = lk.FusedLoRALinear(24, 40, 4, use_dora=True)
    empty = empty.to_empty(device="cpu")
    empty.reset_parameters()
    assert torch.equal(empty.lora_magnitude, empty.weight.norm(dim=1))

    class Own(lk.FusedLoRALinear):
        pass

    for call in (
        lambda: Own(3, 4, 2, use_dora=True),
        lambda: Own.from_linear(nn.Linear(3, 4), 2, use_dora=True),
    ):
        with pytest.raises(TypeError, match="use_dora: Own has no class with DoRA"):
            call()
    for call in (lambda: lk.FusedLoRALinear(3, 4, 2, use_dora="yes"), lambda: toy(use_dora=1)):
        with pytest.raises(TypeError, match="use_dora: expected True or False"):
            call()


def test_random_and_pissa_starts(tmp_path):
    model = toy(init="random")
    for layer in (model.first, model.second):
        norms = weight_norms(layer.weight, layer.lora_A, layer.lora_B, layer.scaling)
        assert layer.lora_B.any()
        assert torch.equal(layer.lora_magnitude, norms)
    torch.manual_seed(0)
    base = Toy()
    model = toy(init="pissa")
    torch.testing.assert_close(model(rows()), base(rows()))
    disturb(model)
    before = model(rows())
    lk.save_adapter(model, tmp_path)  # of rank 8 on the original base
    other = copy.deepcopy(base)
    lk.load_adapter(other, tmp_path)
    assert other.first.rank == 8
    torch.testing.assert_close(other(rows()), before)


def test_conv1d(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(40, 24))
    base = copy.deepcopy(model)
    lk.apply_lora(model, 4, use_dora=True, target_modules=["0"])
    assert type(model[0]) is lk.nn.FusedDoRAConv1D
    torch.testing.assert_close(model(rows()), base(rows()))
    disturb(model)
    before = model(rows())
    lk.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(theirs(rows()), before)
    lk.merge_lora(model)
    torch.testing.assert_close(model(rows()), before)


def test_what_a_layer_with_dora_does_not_do():
    model = toy()
    with pytest.raises(ValueError, match="trains lora_magnitude too"):
        lk.add_adapter(model, "other", 2)
    with (
        pytest.raises(ValueError, match="trains lora_magnitude too"),
        lk.adapter_rows(model, ["default"]),
    ):
        pass
    plain = toy(use_dora=False)
    with pytest.raises(ValueError, match="use_dora: is of a layer's only adapter"):
        lk.add_adapter(plain, "other", 2, use_dora=True)
    assert lk.adapter_names(plain) == ("default",)


def test_options_of_a_lora_config():
    torch.manual_seed(0)
    model = Toy()
    config = peft.LoraConfig(r=4, target_modules=["first"], use_dora=True, init_lora_weights=False)
    lk.apply_lora(model, config)
    assert type(model.first) is lk.nn.FusedDoRALinear
    assert type(model.second) is nn.Linear


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_on_a_quantised_base(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lk.quantize_base(model, kind)
    x = torch.randn(7, 128)
    base = model(x)
    lk.apply_lora(model, 4, use_dora=True, target_modules=["0", "2"])
    torch.testing.assert_close(model(x), base, rtol=1e-4, atol=1e-4)
    disturb(model)
    loss = model(x).square().sum()
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in lk.lora_parameters(model))
    model.eval()
    with torch.no_grad():
        y = model(x)
        held = vars(model[0])[HELD]
        assert torch.equal(model(x), y)
        assert vars(model[0])[HELD] is held
    lk.merge_lora(model, keep_base=False, into="dequantised")
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4)


def test_a_real_model_learns_and_generates(tmp_path):
    torch.manual_seed(0)
    model = tiny_models.llama()
    lk.apply_lora(model, 4, alpha=8, use_dora=True, dropout=0.1)
    model.gradient_checkpointing_enable()
    tokens = torch.randint(0, model.config.vocab_size, (2, 16))
    optimizer = torch.optim.AdamW(lk.lora_parameters(model), 3e-2)
    losses = []
    for _ in range(40):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.2
    model.eval()
    with torch.no_grad():
        out = model.generate(tokens[:, :4], max_new_tokens=5, do_sample=False, pad_token_id=0)
        lk.save_adapter(model, tmp_path)
        lk.merge_lora(model)
        merged = model.generate(tokens[:, :4], max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(out, merged)


def test_compiled_training_is_one_graph():
    model = disturb(toy())
    x = rows()
    expected = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
