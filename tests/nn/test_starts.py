"""How adapters start beside PiSSA, and the groups of parameters that LoRA+ trains, as PEFT has
them."""

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


@pytest.mark.parametrize("init", ["gaussian", "orthogonal"])
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
