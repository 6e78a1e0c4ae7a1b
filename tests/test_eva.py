"""`initialize_eva` does what PEFT's `initialize_lora_eva_weights` does."""

import copy

import pytest
import tiny_models
import torch
from torch import nn

import lora_kernels as lk
from lora_kernels.directions import Directions

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PREFIX = "base_model.model."


def batches(count=3, masked=True):
    generator = torch.Generator().manual_seed(3)
    found = []
    for _ in range(count):
        ids = torch.randint(64, (4, 16), generator=generator)
        batch = {"input_ids": ids, "labels": ids.clone()}
        if masked:
            batch["attention_mask"] = torch.ones_like(ids)
            batch["attention_mask"][0, 12:] = 0
            batch["labels"][1, :3] = -100
        found.append(batch)
    return found


def config(**eva):
    return peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=TARGETS,
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(**eva),
    )


def theirs(given, data):
    model = peft.get_peft_model(tiny_models.build(), given)
    peft.initialize_lora_eva_weights(model, copy.deepcopy(data), show_progress_bar=False)
    return model


def ours(given, data):
    model = tiny_models.build()
    lk.apply_lora(model, given)
    return model, lk.initialize_eva(model, data, given)


def layers_of(wrapped):
    return {
        name.removeprefix(PREFIX): module
        for name, module in wrapped.named_modules()
        if isinstance(module, peft.tuners.lora.Linear)
    }


@pytest.mark.parametrize(
    "eva",
    [
        {},
        {"rho": 1.0, "tau": 0.9},
        {"rho": 1.5, "tau": 0.9, "adjust_scaling_factors": False},
        {"use_label_mask": False, "tau": 0.9},
    ],
    ids=str,
)
def test_ranks_directions_scalings_and_loss_are_pefts(eva):
    data, given = batches(), config(**eva)
    other = theirs(config(**eva), data)
    model, report = ours(given, data)
    expected = layers_of(other)
    assert report.ranks == {name: layer.r["default"] for name, layer in expected.items()}
    assert sum(report.ranks.values()) == 4 * 14
    if eva.get("rho") != 1.0:
        assert len(set(report.ranks.values())) > 2
        assert max(report.ranks.values()) <= round(4 * eva.get("rho", 2.0))
    for name, layer in expected.items():
        mine, A = model.get_submodule(name), layer.lora_A["default"].weight
        assert mine.scaling == pytest.approx(layer.scaling["default"], rel=1e-12)
        # Each direction up to its sign.
        torch.testing.assert_close(
            (mine.lora_A @ A.t()).abs(), torch.eye(len(A)), atol=1e-4, rtol=0
        )
        assert not mine.lora_B.any()
    generator = torch.Generator().manual_seed(5)
    for name, layer in expected.items():
        mine, A, B = model.get_submodule(name), layer.lora_A["default"], layer.lora_B["default"]
        value = torch.randn(B.weight.shape, generator=generator) / 10
        signs = (mine.lora_A * A.weight).sum(1).sign()
        B.weight.data.copy_(value)
        mine.lora_B.data.copy_(value * signs)
    loss, theirs_loss = model(**data[0]).loss, other(**data[0]).loss
    torch.testing.assert_close(loss, theirs_loss, rtol=1e-5, atol=0)
    assert (loss - tiny_models.build()(**data[0]).loss).abs() > 1e-3


class Two(nn.Module):
    """Of the inputs of `narrow` two directions explain all, those of `spread` vary in all alike."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.spread, self.narrow = nn.Linear(32, 8), nn.Linear(8, 8)

    def forward(self, x):
        z = self.spread(x)
        return self.narrow(torch.nn.functional.pad(z[:, :2], (0, 6))) + z


ROWS = [torch.randn(200, 32, generator=torch.Generator().manual_seed(i)) for i in range(3)]
BOTH = ["spread", "narrow"]


def test_a_layer_of_rank_zero_loses_its_adapter_as_pefts_and_files_go_both_ways(tmp_path):
    given = peft.LoraConfig(r=1, lora_alpha=2, target_modules=BOTH, init_lora_weights="eva")
    model, plain = Two(), Two()
    lk.apply_lora(model, given)
    assert not model.spread.lora_A.any()
    report = lk.initialize_eva(model, ROWS, given)
    assert report.ranks == {"narrow": 2}
    assert report.removed == ["spread"]
    assert report.explained["narrow"] == pytest.approx(1, abs=1e-3)
    assert "rank 0, no adapter any more: spread" in str(report)
    assert type(model.spread) is nn.Linear
    assert [p.shape for p in model.parameters() if p.requires_grad] == [(2, 8), (8, 2)]
    assert list(lk.lora_parameters(model)) == [model.narrow.lora_A, model.narrow.lora_B]
    assert (model.narrow.alpha, model.narrow.scaling) == (4, 2)

    other = peft.get_peft_model(Two(), given)
    peft.initialize_lora_eva_weights(
        other, ROWS, forward_fn=lambda m, x: m(x), prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None, show_progress_bar=False,
    )  # fmt: skip
    assert list(layers_of(other)) == ["narrow"]
    A = other.base_model.model.narrow.lora_A["default"].weight
    torch.testing.assert_close((model.narrow.lora_A @ A.t()).abs(), torch.eye(2), atol=1e-4, rtol=0)

    nn.init.normal_(model.narrow.lora_B)
    nn.init.normal_(other.base_model.model.narrow.lora_B["default"].weight)
    lk.save_adapter(model, tmp_path / "ours")
    read = peft.PeftModel.from_pretrained(Two(), tmp_path / "ours")
    torch.testing.assert_close(read(ROWS[0]), model(ROWS[0]))
    other.save_pretrained(tmp_path / "theirs")
    loaded = Two()
    lk.load_adapter(loaded, tmp_path / "theirs")
    torch.testing.assert_close(loaded(ROWS[0]), other(ROWS[0]))
    lk.load_adapter(model, tmp_path / "theirs")
    torch.testing.assert_close(model(ROWS[0]), other(ROWS[0]))

    lk.remove_lora(model)
    assert all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(model(ROWS[0]), plain(ROWS[0]), rtol=0, atol=0)


def test_the_files_of_a_model_have_pefts_rank_pattern(tmp_path):
    data, given = batches(), config()
    model, report = ours(given, data)
    nn.init.normal_(model.model.layers[0].mlp.down_proj.lora_B, std=0.1)
    lk.save_adapter(model, tmp_path)
    read = peft.PeftModel.from_pretrained(tiny_models.build(), tmp_path)
    assert {n: layer.r["default"] for n, layer in layers_of(read).items()} == report.ranks
    torch.testing.assert_close(read(**data[0]).logits, model(**data[0]).logits)
    other = tiny_models.build()
    lk.load_adapter(other, tmp_path)
    torch.testing.assert_close(other(**data[0]).logits, model(**data[0]).logits)


def test_layers_with_equal_inputs_share_one_svd_and_the_model_is_as_before_but_for_its_adapters():
    data = batches()
    model = tiny_models.build().train()
    lk.apply_lora(model, 4, target_modules=TARGETS, init="eva", use_dora=True, freeze_a=True)
    state = torch.get_rng_state()
    report = lk.initialize_eva(model, data)
    assert torch.equal(state, torch.get_rng_state())
    assert all(module.training for module in model.modules())
    for i in (0, 1):
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        assert report.shared[f"{attention}.k_proj"] == f"{attention}.q_proj"
        assert report.shared[f"{attention}.v_proj"] == f"{attention}.q_proj"
        assert report.shared[f"{mlp}.up_proj"] == f"{mlp}.gate_proj"
    assert len(report.shared) == 6
    for name in report.ranks:
        layer = model.get_submodule(name)
        assert (layer.lora_A.requires_grad, layer.lora_B.requires_grad) == (False, True)
        assert not layer._forward_pre_hooks
    torch.testing.assert_close(model(**data[0]).loss, tiny_models.build()(**data[0]).loss)
    assert lk.check_adapters(model, **data[0]).ok


def test_whitening_divides_by_the_root_of_the_singular_values():
    """PEFT divides a shared input's directions once for each layer that has it; here once."""
    found = []
    for whiten in (False, True):
        model = Two()
        lk.apply_lora(model, 1, init="eva", target_modules=BOTH)
        lk.initialize_eva(model, ROWS, whiten=whiten, rho=1.0)
        found.append(model.spread.lora_A.detach())
    length = found[1].norm()
    torch.testing.assert_close(found[1] / length, found[0], rtol=1e-4, atol=1e-6)
    assert 1 / length**2 == pytest.approx(600**0.5, rel=0.3)


def test_directions_are_those_of_all_rows_at_once():
    """Exactly, where no more vary than are sought."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(300, 4, generator=generator) * torch.tensor([8.0, 4, 2, 1])
    rows = rows @ torch.linalg.qr(torch.randn(12, 4, generator=generator)).Q.t() + 5
    found = Directions(4, 0.99)
    for part in rows.split(60):
        found.add(part)
    _, S, Vh = torch.linalg.svd((rows - rows.mean(0)).double(), full_matrices=False)
    torch.testing.assert_close(found.values, S[:4], rtol=1e-4, atol=0)
    same = (found.vectors @ Vh[:4].t()).abs()
    torch.testing.assert_close(same, torch.eye(4).double(), rtol=0, atol=1e-4)
    assert found.settled.all()
    assert found.explained(4) == pytest.approx(1, abs=1e-4)
    assert found.explained(1) == pytest.approx(float(S[0] ** 2 / (S**2).sum()), abs=1e-4)
    constant = Directions(2, 0.99)
    constant.add(torch.ones(60, 12))
    assert not constant.ratios.any()


def test_bad_input_is_refused_and_changes_nothing():
    def fresh(**options):
        model = Two()
        lk.apply_lora(model, 2, target_modules=BOTH, **{"init": "eva", **options})
        return model

    for data, options, words in (
        (ROWS, {"rho": 0.5}, "rho: expected a finite number of at least 1, got 0.5"),
        (ROWS, {"tau": 1.5}, r"tau: expected a number in \[0, 1\], got 1.5"),
        (ROWS, {"max_batches": 1}, "max_batches: expected an integer of at least 2"),
        ([], {}, "batches: has no batch"),
        (iter(ROWS), {}, "is used up by the first reading"),
        ([torch.randn(3, 32)], {}, "batches: none has as many rows as spread, narrow needs, 4"),
        ([ROWS[0] * float("nan")], {}, "the input of spread holds values that are not finite"),
        (ROWS, {"config": peft.LoraConfig()}, "config: expected a LoraConfig with an eva_config"),
    ):
        model = fresh()
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=words):
            lk.initialize_eva(model, data, **options)
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
        assert not any(layer._forward_pre_hooks for layer in (model.spread, model.narrow))
    for model, words in (
        (Two(), "has no LoRA layer"),
        (fresh(init="random"), "narrow.*: its adapter is not new, lora_B is not zero"),
        (fresh(init="olora"), "was started with PiSSA or OLoRA"),
    ):
        with pytest.raises(ValueError, match=words):
            lk.initialize_eva(model, ROWS)
    model = fresh()
    model.unused = nn.Linear(8, 8)
    lk.apply_lora(model, 2, target_modules=["unused"], init="eva")
    with pytest.raises(ValueError, match="unused: never called in the first batch"):
        lk.initialize_eva(model, ROWS)
    model = fresh(init="kaiming")
    lk.add_adapter(model, "other", 2)
    with pytest.raises(ValueError, match="carries other adapters too, 'other'"):
        lk.initialize_eva(model, ROWS)
    with pytest.raises(ValueError, match="legal values beside another adapter are"):
        lk.add_adapter(model, "third", 2, init="eva")


def test_training_without_it_is_warned_of():
    model = Two()
    lk.apply_lora(model, 2, target_modules=BOTH, init="eva")
    optimizer = torch.optim.AdamW(lk.lora_parameters(model))
    data = [(ROWS[0], ROWS[0][:, :8])]
    with pytest.warns(UserWarning, match="both zero.* initialize_eva"):
        lk.train_model(model, data, nn.functional.mse_loss, optimizer)
    assert "initialize_eva" in lk.check_adapters(model, ROWS[0]).problems["narrow"]


def test_directions_that_go_on_turning_are_taken_in_the_end():
    model = Two()
    lk.apply_lora(model, 2, target_modules=BOTH, init="eva")
    report = lk.initialize_eva(model, ROWS, tau=1.0, max_batches=2, rho=1.0)
    assert report.batches == 2
    assert "spread" in report.unsettled
    assert "not settled: " in str(report)
    assert model.spread.lora_A.any()
