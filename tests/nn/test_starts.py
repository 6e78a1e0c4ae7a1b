"""How adapters start, and the groups of parameters that LoRA+ trains, as PEFT has them."""

import pytest
import torch
from torch import nn

import lora_kernels as lk

peft = pytest.importorskip("peft")


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 8))


def adapted(**options):
    found = model()
    lk.apply_lora(found, 4, **{"target_modules": ["0", "2"], "alpha": 8, **options})
    return found


@pytest.mark.parametrize("init", ["gaussian", "orthogonal", "olora"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_the_output_is_the_bases(init, use_dora):
    x = torch.randn(5, 24)
    found = adapted(init=init, use_dora=use_dora)
    torch.testing.assert_close(found(x), model()(x), rtol=1e-4, atol=1e-5)
    loss = found(x).square().sum()
    loss.backward()
    assert all(layer.lora_B.grad.any() for layer in (found[0], found[2]))


def test_gaussian_is_pefts():
    torch.manual_seed(1)
    config = peft.LoraConfig(r=32, target_modules=["0"], init_lora_weights="gaussian")
    wide = nn.Sequential(nn.Linear(4000, 8))
    theirs = peft.get_peft_model(wide, config).base_model.model[0].lora_A["default"].weight
    other = nn.Sequential(nn.Linear(4000, 8))
    lk.apply_lora(other, config)
    for A in (theirs, other[0].lora_A):
        assert A.std().item() == pytest.approx(1 / 32, rel=0.02)
        assert A.mean().abs() < 1e-3
    assert not other[0].lora_B.any()


def test_orthogonal_is_pefts():
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights="orthogonal")
    theirs = peft.get_peft_model(model(), config).base_model.model[0]
    ours = model()
    torch.manual_seed(1)
    lk.apply_lora(ours, config)
    layer = ours[0]
    for A, B in (
        (theirs.lora_A["default"].weight, theirs.lora_B["default"].weight),
        (layer.lora_A, layer.lora_B),
    ):
        assert (B @ A).abs().max() < 1e-6
        assert A.abs().mean() > 1e-3
        assert B.abs().mean() > 1e-3
        assert torch.linalg.matrix_rank(A) == torch.linalg.matrix_rank(B) == 2
    with pytest.raises(ValueError, match="rank: 'orthogonal' needs an even one, got 3"):
        lk.apply_lora(model(), 3, init="orthogonal", target_modules=["0"])


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}])
def test_olora_is_pefts(options):
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["0", "2"], init_lora_weights="olora", **options
    )
    theirs = peft.get_peft_model(model(), config).base_model.model
    ours = model()
    lk.apply_lora(ours, config)
    for one, other in ((ours[0], theirs[0]), (ours[2], theirs[2])):
        # One LAPACK, so the signs too.
        assert torch.equal(one.lora_A, other.lora_A["default"].weight)
        assert torch.equal(one.lora_B, other.lora_B["default"].weight)
        torch.testing.assert_close(one.weight, other.base_layer.weight, rtol=1e-5, atol=1e-6)
    x = torch.randn(5, 24)
    torch.testing.assert_close(ours(x), model()(x), rtol=1e-5, atol=1e-5)


def test_olora_is_saved_as_plain_lora_and_gives_the_weight_back(tmp_path):
    ours, x = adapted(init="olora"), torch.randn(5, 24)
    for layer in (ours[0], ours[2]):
        layer.lora_A.data += 0.1
        layer.lora_B.data -= 0.1
    lk.save_adapter(ours, tmp_path)
    loaded = model()
    lk.load_adapter(loaded, tmp_path)
    assert loaded[0].rank == 8
    read = peft.PeftModel.from_pretrained(model(), tmp_path)
    for other in (loaded, read):
        torch.testing.assert_close(other(x), ours(x), rtol=1e-4, atol=1e-4)
    assert (ours(x) - model()(x)).abs().max() > 0.1
    with lk.disable_adapters(ours):
        torch.testing.assert_close(ours(x), model()(x), rtol=1e-4, atol=1e-5)
    copied = adapted()
    copied.load_state_dict(ours.state_dict())
    torch.testing.assert_close(copied(x), ours(x))
    with pytest.raises(ValueError, match="was started with PiSSA or OLoRA and no longer holds"):
        lk.add_adapter(ours, "other", 2)
    lk.remove_lora(ours)
    torch.testing.assert_close(ours(x), model()(x), rtol=1e-5, atol=1e-5)


def test_pefts_files_of_olora(tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=True)
    base = model()
    wrapped = peft.get_peft_model(base, config)
    wrapped.save_pretrained(tmp_path / "start")
    config = peft.LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights="olora")
    theirs = peft.get_peft_model(model(), config)
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = "olora"
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1
    theirs.save_pretrained(
        tmp_path / "done", path_initial_model_for_weight_conversion=tmp_path / "start"
    )
    ours, x = model(), torch.randn(5, 24)
    lk.load_adapter(ours, tmp_path / "done")
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
    theirs.save_pretrained(tmp_path / "as it is")
    with pytest.raises(ValueError, match="'olora' stands on a changed base"):
        lk.load_adapter(model(), tmp_path / "as it is")


def test_olora_needs_a_weight_that_it_may_change():
    with pytest.raises(
        ValueError, match=r"rank: 'olora' takes at most min\(N, K\) = 8 of 2, got 9"
    ):
        lk.apply_lora(model(), 9, init="olora")
    found = adapted()
    with pytest.raises(ValueError, match="legal values beside another adapter are kaiming, random"):
        lk.add_adapter(found, "other", 4, init="olora")


@pytest.mark.parametrize(("bits", "kind"), [(4, "nf4"), (8, "int8")])
def test_loftq_of_a_config_is_pefts_one_step(monkeypatch, bits, kind):
    """PEFT asks for scipy, which it does not use then, and has a GPU alone quantise the weight."""
    from peft.utils.loftq_utils import _low_rank_decomposition

    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    options = {"target_modules": ["0"], "init_lora_weights": "loftq"}
    config = peft.LoraConfig(
        r=4, lora_alpha=4, loftq_config=peft.LoftQConfig(loftq_bits=bits), **options
    )
    ours, plain = model(), model()
    assert lk.apply_lora(ours, config).replaced == ["0"]
    lk.quantize_base(plain, kind, target_modules=["0"])
    weight, kept = model()[0].weight.detach(), plain[0].weight.dequantize()
    assert torch.equal(ours[0].weight.dequantize(), kept)
    found = _low_rank_decomposition(weight - kept, reduced_rank=4)
    product = ours[0].scaling * ours[0].lora_B @ ours[0].lora_A
    torch.testing.assert_close(product, found["L"] @ found["R"], rtol=1e-4, atol=1e-6)
    assert (weight - kept - product).norm() < 0.9 * (weight - kept).norm()
    for given, words in (
        ({"loftq_bits": 2}, "loftq_bits=2, loftq_iter=1, legal are 4 or 8 bits and one step"),
        ({"loftq_bits": 4, "loftq_iter": 5}, "loftq_iter=5"),
    ):
        other = model()
        with pytest.raises(ValueError, match=words):
            lk.apply_lora(other, peft.LoraConfig(r=4, loftq_config=given, **options))
        assert type(other[0]) is nn.Linear


def test_loftq_by_name_is_quantize_bases():
    ours, theirs, x = adapted(init="loftq"), adapted(), torch.randn(5, 24)
    lk.quantize_base(theirs, "nf4", loftq=True)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)
    with pytest.raises(
        ValueError, match=r"beside another adapter are kaiming, random, gaussian, orthogonal$"
    ):
        lk.add_adapter(adapted(), "other", 4, init="loftq")
    before = model()
    with pytest.raises(ValueError, match="loftq: 0: a FusedDoRALinear trains lora_magnitude too"):
        lk.apply_lora(before, 4, target_modules=["0"], init="loftq", use_dora=True)
    assert type(before[0]) is nn.Linear
    assert before[0].weight.requires_grad
    odd = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    odd[1].weight = odd[0].weight
    odd.register_parameter("seen", odd[0].weight)
    with pytest.raises(ValueError, match="tied to"):
        lk.apply_lora(odd, 4, init="loftq", target_modules=["0", "1"])
    assert type(odd[0]) is nn.Linear


def test_a_further_adapter_and_an_unknown_start():
    found = adapted()
    lk.add_adapter(found, "other", 4, init="gaussian")
    assert not found[0].adapters["other"].lora_B.any()
    with pytest.raises(
        ValueError, match="legal values are kaiming, pissa, random, gaussian, ortho"
    ):
        adapted(init="zeros")


@pytest.mark.parametrize("use_dora", [False, True])
def test_groups_of_lora_plus_are_pefts(use_dora):
    from peft.optimizers import create_loraplus_optimizer

    config = peft.LoraConfig(
        r=4, target_modules=["0"], modules_to_save=["2"], use_dora=use_dora, lora_alpha=8
    )
    theirs = create_loraplus_optimizer(
        peft.get_peft_model(model(), config), torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16
    )
    rates = {}
    for group in theirs.param_groups:
        for parameter in group["params"]:
            rates.setdefault(group["lr"], []).append(tuple(parameter.shape))
    found = adapted(target_modules=["0"], modules_to_save=["2"], use_dora=use_dora)
    groups = lk.lora_parameters(found, lr=1e-3, loraplus_ratio=16)
    ours = {group["lr"]: [tuple(p.shape) for p in group["params"]] for group in groups}
    assert {rate: sorted(shapes) for rate, shapes in ours.items()} == {
        rate: sorted(shapes) for rate, shapes in rates.items()
    }
    assert {p for group in groups for p in group["params"]} == set(lk.lora_parameters(found))
    torch.optim.AdamW(groups)


def test_groups_of_one_adapter_and_bad_rates():
    found = adapted()
    lk.add_adapter(found, "other", 2)
    groups = lk.lora_parameters(found, adapter="other", lr=1.0, loraplus_ratio=4)
    assert [group["lr"] for group in groups] == [1.0, 4.0]
    assert [len(group["params"]) for group in groups] == [2, 2]
    for options, words in (
        ({"lr": 1e-3}, "loraplus_ratio: expected a positive number"),
        ({"loraplus_ratio": 4}, "lr: expected a positive number"),
        ({"lr": 0.0, "loraplus_ratio": 4}, "lr: expected a positive number"),
        ({"lr": 1.0, "loraplus_ratio": float("inf")}, "loraplus_ratio: expected a positive"),
    ):
        with pytest.raises(ValueError, match=words):
            lk.lora_parameters(found, **options)
    with pytest.raises(ValueError, match="adapter: got 'nobody'"):
        lk.lora_parameters(found, adapter="nobody")
