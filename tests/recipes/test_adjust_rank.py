"""Changing ranks: of a layer, and of a model that trains on the way."""

import copy
import re

import interrupted
import pytest
import torch
from recipe_problem import (
    CROSS_ENTROPY,
    Net,
    adam,
    batched,
    equal,
    llama,
    net,
    pairs,
    state,
    text_batches,
)
from torch import nn

from lora_kernels import (
    FusedLoRALinear,
    add_adaptor_layer,
    adjust_rank,
    evaluate_model,
    load_adapter,
    lora_parameters,
    merge_lora,
    save_adapter,
    train_model,
)
from lora_kernels.adapters import lora_layers
from lora_kernels.recipes import ranks as ranks_module

# -------------------------------------------------------------------------------------- set_factors


@pytest.mark.parametrize("alpha", [None, 5, 16, 1 / 3])
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("rank", [1, 3, 4, 49])
def test_set_factors_keeps_the_scaling(alpha, use_rslora, rank):
    layer = FusedLoRALinear(
        6, 5, 4, alpha=alpha, use_rslora=use_rslora, dtype=torch.bfloat16,
        adapter_dtype=torch.bfloat16,
    )  # fmt: skip
    scaling, old = layer.scaling, layer.lora_A
    A, B = torch.randn(rank, 6), torch.randn(5, rank)
    layer.set_factors(A, B)
    assert layer.rank == rank
    assert layer.scaling == pytest.approx(scaling, rel=3e-16)
    assert (layer.alpha is None) == (alpha is None)
    assert layer.lora_A is not old
    assert layer.lora_A.requires_grad
    assert torch.equal(layer.lora_A, A.bfloat16())
    assert layer.lora_B.dtype == torch.bfloat16
    A.zero_()
    assert layer.lora_A.any()


def test_set_factors_bad_input():
    layer = FusedLoRALinear(6, 5, 4)
    for A, B, name in (
        (torch.ones(2, 5), torch.ones(5, 2), "A"),
        (torch.ones(2, 6), torch.ones(5, 3), "B"),
        (torch.ones(0, 6), torch.ones(5, 0), "A"),
        (torch.ones(6), torch.ones(5, 1), "A"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"{name}: expected A [r, 6] and B [5, r]")):
            layer.set_factors(A, B)
    layer.merge()
    with pytest.raises(RuntimeError, match="set_factors: the layer is merged"):
        layer.set_factors(torch.ones(2, 6), torch.ones(5, 2))


def test_pissa_buffers_of_another_rank_load():
    torch.manual_seed(0)
    linear = nn.Linear(12, 9)
    layer = FusedLoRALinear.from_linear(copy.deepcopy(linear), 4, init="pissa")
    layer.set_factors(torch.randn(2, 12), torch.randn(9, 2))
    other = FusedLoRALinear(12, 9, 2)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 12)
    assert torch.equal(other(x), layer(x))
    assert [t.shape for t in other.delta_factors()] == [(6, 12), (9, 6)]


# -------------------------------------------------------------------------------------- adjust_rank


def products(model):
    return {
        name: layer.scaling * layer.lora_B.detach().double() @ layer.lora_A.detach().double()
        for name, layer in lora_layers(model)
    }


def test_compressing_a_trained_adapter_is_the_best_approximation():
    model = add_adaptor_layer(llama(), 8, alpha=16)
    optimizer, data = adam(model), text_batches(10)
    train_model(model, data, None, optimizer, epochs=2)
    before = products(model)
    report = adjust_rank(model, 8, 3, data, None, optimizer, ranks=[3], epochs=0)
    for name, product in products(model).items():
        U, S, Vh = torch.linalg.svd(before[name])
        best = U[:, :3] * S[:3] @ Vh[:3]
        assert float((product - best).norm() / best.norm()) <= 1e-5
        kept = float(S[:3].square().sum() / S.square().sum())
        assert report.steps[0].kept_energy[name] == pytest.approx(kept, abs=1e-5)
        assert kept < 0.999
    assert report.steps[0].loss == report.steps[0].loss_refactored == report.loss


def test_going_down_in_steps_with_training_between():
    model = add_adaptor_layer(llama(), 8)
    optimizer, data = adam(model), text_batches(10)
    before = state(model)
    train_model(model, data, None, optimizer)
    initial = evaluate_model(model, data, None)["loss"]
    report = adjust_rank(model, 8, 3, data, None, optimizer)
    assert [step.rank for step in report.steps] == [4, 3]
    assert (report.rank, report.loss_initial) == (3, initial)
    assert set(report.ranks.values()) == {layer.rank for _, layer in lora_layers(model)} == {3}
    assert [len(step.history) for step in report.steps] == [10, 10]
    assert report.steps[0].loss_before == initial
    assert report.steps[1].loss_before == report.steps[0].loss
    assert report.steps[1].loss == report.loss == evaluate_model(model, data, None)["loss"]
    assert report.loss < initial
    assert report.stopped is None
    assert all(step.accepted for step in report.steps)
    after = state(model)
    assert all(torch.equal(before[n], after[n]) for n in before if "lora" not in n)
    text = str(report)
    assert text.startswith(f"rank 8 -> 3, loss {initial:.4f} -> {report.loss:.4f}\n  rank 4: loss")


@pytest.mark.parametrize(
    ("alpha", "use_rslora"), [(None, False), (None, True), (12, False), (12, True)]
)
@pytest.mark.parametrize("k_final", [2, 7])
def test_scaling_and_dtype_stay(alpha, use_rslora, k_final):
    options = {"alpha": alpha, "use_rslora": use_rslora, "adapter_dtype": torch.float32}
    model = net(dtype=torch.bfloat16, **options)
    scaling = {name: layer.scaling for name, layer in lora_layers(model)}
    data = batched(4, dtype=torch.bfloat16)
    adjust_rank(model, 4, k_final, data, CROSS_ENTROPY, adam(model))
    for name, layer in lora_layers(model):
        assert layer.scaling == pytest.approx(scaling[name], rel=3e-16)
        assert layer.rank == k_final
        assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
        assert layer.weight.dtype == torch.bfloat16


def grouped(model):
    a = [layer.lora_A for _, layer in lora_layers(model)]
    b = [layer.lora_B for _, layer in lora_layers(model)]
    bias = [model.outer.bias]
    return torch.optim.AdamW(
        [
            {"params": a, "lr": 1e-3, "weight_decay": 0.1},
            {"params": b + bias, "lr": 1e-2, "betas": (0.8, 0.9)},
        ]
    )


def with_bias(**options):
    model = net(target_modules=["inner"], modules_to_save=["outer"], **options)
    return model


@pytest.mark.parametrize("k_final", [2, 6])
def test_the_optimizer_goes_on(k_final):
    model = with_bias()
    optimizer = grouped(model)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    train_model(model, batched(4), CROSS_ENTROPY, optimizer)
    old = model.inner.lora_A, model.inner.lora_B
    bias = copy.deepcopy(optimizer.state[model.outer.bias])
    options = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    adjust_rank(model, 4, k_final, batched(4), CROSS_ENTROPY, optimizer, epochs=0)
    assert optimizer.param_groups[0]["params"][0] is model.inner.lora_A
    assert optimizer.param_groups[1]["params"][0] is model.inner.lora_B
    assert optimizer.param_groups[1]["params"][1] is model.outer.bias
    assert [
        {k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups
    ] == options
    assert set(optimizer.state) == {model.outer.bias}
    assert all(torch.equal(bias[k], optimizer.state[model.outer.bias][k]) for k in bias)
    assert not any(parameter in optimizer.state for parameter in old)

    before = state(model)
    train_model(model, batched(24), CROSS_ENTROPY, optimizer, scheduler=scheduler)
    after = state(model)
    # The first step of Adam with bias correction: the learning rate, whatever the gradient.
    step = (after["inner.lora_B"] - before["inner.lora_B"]).abs()
    assert float(step.max()) == pytest.approx(1e-2 + 1e-4, rel=0.05)
    assert float(optimizer.state[model.inner.lora_A]["step"]) == 1
    assert float(optimizer.state[model.outer.bias]["step"]) == 7
    assert [group["lr"] for group in optimizer.param_groups] == [5e-4, 5e-3]


def test_going_up_leaves_the_output_and_then_trains():
    model = net(rank=2, dropout=0.0)
    x, _ = pairs()
    before, expected = state(model), model(x)
    optimizer = adam(model)
    report = adjust_rank(model, 2, 9, batched(4), CROSS_ENTROPY, optimizer, epochs=0)
    assert [step.rank for step in report.steps] == [9]
    assert torch.allclose(model(x), expected, rtol=1e-12, atol=1e-14)
    assert torch.equal(model.inner.lora_A[:2], before["inner.lora_A"])
    assert report.steps[0].kept_energy == {"inner": 1.0, "outer": 1.0}
    train_model(model, batched(4), CROSS_ENTROPY, optimizer)
    assert model.inner.lora_B[:, 2:].abs().min() > 0


def test_an_untrained_adapter_can_be_compressed_and_trained():
    model = net(trained=False)
    optimizer = adam(model)
    adjust_rank(model, 4, 2, batched(4), CROSS_ENTROPY, optimizer, epochs=0)
    assert torch.equal(model.inner.lora_B, torch.zeros(10, 2, dtype=torch.float64))
    train_model(model, batched(4), CROSS_ENTROPY, optimizer)
    assert model.inner.lora_B.abs().min() > 0


def losses_by_rank(monkeypatch, losses):
    monkeypatch.setattr(
        ranks_module,
        "evaluate_model",
        lambda model, *_, **__: {"loss": losses[next(lora_layers(model))[1].rank]},
    )


@pytest.mark.parametrize(
    ("smallest", "tried"),
    [
        (1, [8, 4, 2, 1]),
        (2, [8, 4, 2, 1]),
        (3, [8, 4, 2, 3]),
        (5, [8, 4, 6, 5]),
        (6, [8, 4, 6, 5]),
        (7, [8, 4, 6, 7]),
        (16, [8, 12, 14, 15]),
    ],
)
def test_a_tolerance_finds_the_smallest_rank(monkeypatch, smallest, tried):
    losses_by_rank(monkeypatch, {k: 1.0 if k >= smallest else 1.2 for k in range(1, 17)})
    model = net(rank=16)
    optimizer = adam(model)
    report = adjust_rank(model, 16, 1, batched(4), CROSS_ENTROPY, optimizer, tolerance=0.1)
    assert [step.rank for step in report.steps] == tried
    assert [step.accepted for step in report.steps] == [k >= smallest for k in tried]
    assert report.rank == smallest
    assert set(report.ranks.values()) == {layer.rank for _, layer in lora_layers(model)}
    assert report.ranks["inner"] == smallest
    assert report.loss == 1.0
    if smallest == 1:
        assert report.stopped is None
    else:
        assert report.stopped == (
            f"stopped at rank {smallest}: rank {smallest - 1} gave a loss of 1.2, above the 1.1"
            " that a tolerance of 0.1 over 1 at rank 16 allows"
        )
        assert report.stopped in str(report)


def test_only_the_ranks_given_are_tried(monkeypatch):
    losses_by_rank(monkeypatch, {16: 1.0, 10: 1.0, 5: 2.0, 3: 1.0})
    model = net(rank=16)
    report = adjust_rank(
        model, 16, 3, batched(4), CROSS_ENTROPY, adam(model), ranks=[10, 5, 3], tolerance=0.1
    )
    assert [step.rank for step in report.steps] == [10, 5]
    assert report.rank == model.inner.rank == 10


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
@pytest.mark.parametrize("per_layer", [False, True])
def test_a_step_that_breaks_the_tolerance_is_undone(monkeypatch, init, per_layer):
    losses = iter([1.0, 9.0, 9.0])
    monkeypatch.setattr(ranks_module, "evaluate_model", lambda *_, **__: {"loss": next(losses)})
    model = net(rank=3, trained=False, target_modules=["inner"], modules_to_save=["outer"],
                alpha=5, init=init)  # fmt: skip
    optimizer = grouped(model)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    train_model(model, batched(4), CROSS_ENTROPY, optimizer, scheduler=scheduler)
    before, saved = state(model), copy.deepcopy(optimizer.state_dict())
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    report = adjust_rank(
        model, 3, 1, batched(4), CROSS_ENTROPY, optimizer, ranks=[1], tolerance=0.5,
        scheduler=scheduler, per_layer=per_layer,
    )  # fmt: skip
    assert [step.accepted for step in report.steps] == [False]
    assert report.rank == 3
    assert model.inner.alpha == 5
    assert equal(before, state(model))
    after = optimizer.state_dict()
    assert after["param_groups"] == saved["param_groups"]
    for key, value in saved["state"].items():
        assert all(torch.equal(value[k], after["state"][key][k]) for k in value)
    # It trains on as if nothing had happened.
    train_model(model, batched(4), CROSS_ENTROPY, optimizer)
    train_model(twin, batched(4), CROSS_ENTROPY, twin_optimizer)
    assert equal(state(model), state(twin))


def test_ranks_per_layer_share_one_budget():
    model = net(rank=6)
    with torch.no_grad():
        model.inner.lora_B *= 100
    spectra = {n: torch.linalg.svdvals(p) for n, p in products(model).items()}
    report = adjust_rank(
        model, 6, 3, batched(4), CROSS_ENTROPY, adam(model), epochs=0, per_layer=True
    )
    # inner costs 16 a rank, outer 13: a budget of 3 * 29, of which outer needs at least 13.
    assert report.ranks == {"inner": 4, "outer": 1}
    assert {name: layer.rank for name, layer in lora_layers(model)} == report.ranks
    for name, singular in spectra.items():
        kept = singular[: report.ranks[name]].square().sum() / singular.square().sum()
        assert report.steps[0].kept_energy[name] == pytest.approx(float(kept))
    report = adjust_rank(
        model, 3, 2, batched(4), CROSS_ENTROPY, adam(model), epochs=0, per_layer=True
    )
    assert report.ranks == {"inner": 2, "outer": 1}


def test_layers_that_keep_their_rank_keep_their_state():
    model = net(rank=3)
    with torch.no_grad():
        model.outer.lora_B *= 100
    optimizer = adam(model)
    train_model(model, batched(4), CROSS_ENTROPY, optimizer)
    inner, outer = model.inner.lora_A, model.outer.lora_A
    report = adjust_rank(
        model, 3, 2, batched(4), CROSS_ENTROPY, optimizer, epochs=0, per_layer=True
    )
    assert report.ranks == {"inner": 1, "outer": 3}
    for layer, old in ((model.inner, inner), (model.outer, outer)):
        assert (layer.lora_A is old) == (layer.rank == 3)
        assert (layer.lora_A in optimizer.state) == (layer.rank == 3)


def test_pissa_is_compressed_relative_to_the_original_base():
    torch.manual_seed(0)
    base = Net()
    model = add_adaptor_layer(copy.deepcopy(base), 3, init="pissa", alpha=6)
    optimizer = adam(model)
    train_model(model, batched(4), CROSS_ENTROPY, optimizer)
    factors = {name: layer.delta_factors() for name, layer in lora_layers(model)}
    delta = {name: 2 * (B @ A).detach() for name, (A, B) in factors.items()}
    report = adjust_rank(model, 3, 2, batched(4), CROSS_ENTROPY, optimizer, epochs=0)
    for name, layer in lora_layers(model):
        assert layer.pissa_A is None
        assert layer.rank == 2
        assert layer.scaling == 2
        assert torch.allclose(layer.weight, base.get_submodule(name).weight, atol=1e-14)
        U, S, Vh = torch.linalg.svd(delta[name], full_matrices=False)
        assert torch.allclose(products(model)[name], U[:, :2] * S[:2] @ Vh[:2], atol=1e-12)
        assert report.steps[0].kept_energy[name] == pytest.approx(
            float(S[:2].square().sum() / S.square().sum())
        )


def test_pissa_going_up_keeps_the_output():
    torch.manual_seed(0)
    model = add_adaptor_layer(Net(), 2, init="pissa")
    expected = model(pairs()[0])
    adjust_rank(model, 2, 3, batched(4), CROSS_ENTROPY, adam(model), epochs=0)
    assert torch.allclose(model(pairs()[0]), expected, atol=1e-14)
    assert model.inner.rank == 3
    assert len(model.inner.pissa_A) == 2


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_an_adjusted_adapter_is_saved_and_loaded(tmp_path, per_layer, use_rslora):
    options = {"alpha": 6, "use_rslora": use_rslora}
    model = net(rank=4, **options)
    adjust_rank(model, 4, 2, batched(4), CROSS_ENTROPY, adam(model), per_layer=per_layer)
    save_adapter(model, tmp_path)
    torch.manual_seed(0)
    other = Net()
    load_adapter(other, tmp_path)
    x, _ = pairs()
    assert torch.allclose(other(x), model(x), rtol=1e-12, atol=1e-14)
    assert {n: l.rank for n, l in lora_layers(other)} == {n: l.rank for n, l in lora_layers(model)}


def test_losses_are_measured_on_the_eval_loader():
    model = net()
    held_out = batched(6, seed=9)
    expected = evaluate_model(model, held_out, CROSS_ENTROPY)["loss"]
    report = adjust_rank(
        model, 4, 3, batched(4), CROSS_ENTROPY, adam(model), eval_loader=held_out, max_steps=2
    )
    assert report.loss_initial == expected
    assert report.loss == evaluate_model(model, held_out, CROSS_ENTROPY)["loss"]
    assert [len(step.history) for step in report.steps] == [2]


def test_nothing_to_do():
    model = net()
    before = state(model)
    report = adjust_rank(model, 4, 4, batched(4), CROSS_ENTROPY, adam(model))
    assert report.steps == []
    assert equal(before, state(model))


@pytest.mark.parametrize(
    ("error", "message", "k", "options"),
    [
        (ValueError, "k_initial: inner has rank 4, got 5 (2 of 2 layers differ)", (5, 2), {}),
        (ValueError, "k_initial: the layers' mean rank is 4.00, got 5", (5, 2),
         {"per_layer": True}),
        (ValueError, "k_initial: expected an integer of at least 1, got 4.0", (4.0, 2), {}),
        (ValueError, "k_final: expected an integer of at least 1, got 0", (4, 0), {}),
        (ValueError, "tolerance: is for going down, got 4 -> 5", (4, 5), {"tolerance": 0.1}),
        (ValueError, "per_layer: is for going down, got 4 -> 5", (4, 5), {"per_layer": True}),
        (ValueError, "tolerance: expected a finite number of at least 0, got -0.1", (4, 2),
         {"tolerance": -0.1}),
        (ValueError, "ranks: expected ranks that lead from 4 to 2, got [3, 1]", (4, 2),
         {"ranks": [3, 1]}),
        (ValueError, "ranks: expected ranks that lead from 4 to 2, got [5, 2]", (4, 2),
         {"ranks": [5, 2]}),
        (ValueError, "ranks: expected ranks that lead from 4 to 2, got []", (4, 2), {"ranks": []}),
        (TypeError, "checkpoint: adjust_rank writes and reads no checkpoints", (4, 2),
         {"checkpoint": "file"}),
        (TypeError, "unexpected keyword argument 'learning_rate'", (4, 2), {"learning_rate": 1}),
        (ValueError, "accumulation_steps: expected an integer of at least 1", (4, 2),
         {"accumulation_steps": 0}),
    ],
)  # fmt: skip
def test_bad_adjustments_leave_the_model_alone(error, message, k, options):
    model = net()
    before = state(model)
    with pytest.raises(error, match=re.escape(message)):
        adjust_rank(model, *k, batched(4), CROSS_ENTROPY, adam(model), **options)
    assert equal(before, state(model))


def test_adapters_that_cannot_be_adjusted():
    model = net()
    arguments = batched(4), CROSS_ENTROPY, adam(model)
    with pytest.raises(ValueError, match="model: Net has no LoRA layer; call apply_lora first"):
        adjust_rank(Net(), 4, 2, *arguments)
    with torch.no_grad():
        model.outer.lora_B[0, 0] = torch.nan
    before = state(model)
    with pytest.raises(ValueError, match=r"model: outer\.lora_B holds values that are inf or nan"):
        adjust_rank(model, 4, 2, *arguments)
    assert model.inner.rank == model.outer.rank == 4
    assert all(torch.equal(before[n], p) for n, p in state(model).items() if n != "outer.lora_B")
    merge_lora(model)
    with pytest.raises(ValueError, match="model: inner is merged; unmerge_lora"):
        adjust_rank(model, 4, 2, *arguments)


# ------------------------------------------------------------------------------------ interruptions


@pytest.mark.parametrize("run", interrupted.RUNS)
def test_an_exception_at_any_line_leaves_a_completed_rank(run):
    """A sample of the lines; `python tests/interrupted.py` is all of them."""
    tried, wrong = interrupted.inconsistent(run, visits=1, every=40)
    assert tried > 50
    assert not wrong


@pytest.mark.parametrize("failing", [2, 3, 4])
def test_memory_that_runs_out_in_a_swap_undoes_it(monkeypatch, failing):
    model = net(alpha=6)
    optimizer = adam(model)
    train_model(model, batched(4), CROSS_ENTROPY, optimizer)
    before, groups = state(model), copy.copy(optimizer.param_groups[0])
    held, scaling = list(groups["params"]), model.inner.scaling
    original, calls = nn.Parameter.__new__, []

    def allocate(cls, *args, **options):
        calls.append(cls)
        if len(calls) == failing:
            raise torch.OutOfMemoryError("out of memory")
        return original(cls, *args, **options)

    monkeypatch.setattr(nn.Parameter, "__new__", allocate)
    with pytest.raises(torch.OutOfMemoryError):
        adjust_rank(model, 4, 2, batched(4), CROSS_ENTROPY, optimizer)
    monkeypatch.undo()
    assert equal(before, state(model))
    assert model.inner.rank == model.outer.rank == 4
    assert model.inner.scaling == scaling
    # The very objects: whoever holds them goes on.
    params = optimizer.param_groups[0]["params"]
    assert all(a is b for a, b in zip(params, held, strict=True))
    assert set(optimizer.state) == set(params) == set(lora_parameters(model))


def test_training_that_fails_keeps_the_ranks_before_it():
    """Loss is nan in the training after the second of three steps."""
    model, calls = net(rank=8), []
    optimizer = adam(model)

    def criterion(prediction, targets):
        calls.append(model.inner.rank)
        factor = torch.nan if calls.count(2) == 8 else 1.0
        return nn.functional.cross_entropy(prediction, targets) * factor

    with pytest.raises(FloatingPointError):
        adjust_rank(model, 8, 1, batched(4), criterion, optimizer)
    twin = net(rank=8)
    adjust_rank(twin, 8, 4, batched(4), CROSS_ENTROPY, adam(twin))
    assert equal(state(model), state(twin))
    assert set(optimizer.state) == set(lora_parameters(model))
