"""Checkpoints of training: a run that goes on as if it had never stopped, and damaged files."""

import math
import os
import random
import re

import fuzz_files
import pytest
import tiny_models
import torch
from recipe_problem import CROSS_ENTROPY, adam, batched, equal, net, pairs, sgd, state
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lora_kernels import (
    add_adaptor_layer,
    apply_lora,
    fuse_blocks,
    lora_parameters,
    train_model,
    unfuse_blocks,
)
from lora_kernels.adapters import lora_layers
from lora_kernels.packs import packs_state


def resumable(own_generator, scaled):
    """Model, loader, optimizer and options of a run with every kind of randomness."""
    dtype = torch.float32
    model = net(dtype=dtype, dropout=0.2, trained=False, seed=3)
    for _, layer in lora_layers(model):
        layer.dropout = 0.3
    generator = torch.Generator().manual_seed(5) if own_generator else None
    x, y = pairs(22, dtype=dtype)

    def noisy(samples):
        x, y = torch.utils.data.default_collate(samples)
        return x + 0.1 * torch.randn(x.shape) + 0.1 * random.random(), y

    loader = DataLoader(
        TensorDataset(x, y), batch_size=3, shuffle=True, generator=generator, collate_fn=noisy
    )
    optimizer = adam(model)
    options = {
        "scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
        "accumulation_steps": 2,
        "max_grad_norm": 0.5,
        "autocast_dtype": torch.float16 if scaled else None,
    }
    return model, loader, optimizer, options


@pytest.mark.parametrize("own_generator", [False, True])
@pytest.mark.parametrize("stop", [1, 3, 4, 6, 12])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_resumed_run_gives_identical_results(tmp_path, own_generator, stop, scaled):
    file = tmp_path / "run" / "checkpoint.pt"
    model, loader, optimizer, options = resumable(own_generator, scaled)
    torch.manual_seed(11)
    random.seed(11)
    history = train_model(model, loader, CROSS_ENTROPY, optimizer, epochs=3, **options)
    expected = state(model), history, optimizer.state_dict(), torch.get_rng_state()
    assert len(history) == 12

    model, loader, optimizer, options = resumable(own_generator, scaled)
    torch.manual_seed(11)
    random.seed(11)
    train_model(
        model, loader, CROSS_ENTROPY, optimizer, epochs=3, max_steps=stop, checkpoint=file,
        **options,
    )  # fmt: skip

    model, loader, optimizer, options = resumable(own_generator, scaled)
    torch.manual_seed(77)
    random.seed(77)
    history = train_model(
        model, loader, CROSS_ENTROPY, optimizer, epochs=3, resume_from=file, **options
    )
    assert equal(expected[0], state(model))
    assert history == expected[1]
    for key, value in expected[2]["state"].items():
        assert all(torch.equal(value[k], optimizer.state_dict()["state"][key][k]) for k in value)
    assert torch.equal(torch.get_rng_state(), expected[3])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stop", [1, 2, 4])
def test_layers_are_computed_together_from_the_step_on_that_they_were(
    tmp_path, stop, checkpointing
):
    """`fuse_blocks` packs from the second forward on, which rounds sums otherwise than before."""

    def run(**options):
        torch.manual_seed(0)
        model = tiny_models.llama()
        apply_lora(model, 4, alpha=8)
        with torch.no_grad():
            for _, layer in lora_layers(model):
                layer.lora_B.normal_(std=0.1)
        fuse_blocks(model)
        if checkpointing:
            model.gradient_checkpointing_enable()
        ids = torch.randint(0, 64, (5, 8, 32))
        data = [{"input_ids": one, "labels": one} for one in ids]
        optimizer = torch.optim.AdamW(lora_parameters(model), 1e-2)
        history = train_model(model, data, None, optimizer, **options)
        return state(model), history, packs_state(model)

    file = tmp_path / "checkpoint.pt"
    expected, history, packs = run()
    assert packs
    assert all(pack["settled"] for pack in packs)
    run(max_steps=stop, checkpoint=file)
    resumed = run(resume_from=file)
    assert equal(resumed[0], expected)
    assert resumed[1] == history
    assert resumed[2] == packs


def test_a_checkpoint_of_packed_layers_needs_them(tmp_path):
    model = tiny_models.llama()
    apply_lora(model, 2)
    fuse_blocks(model)
    ids = torch.randint(0, 64, (2, 8))
    data, file = [{"input_ids": ids, "labels": ids}], tmp_path / "checkpoint.pt"
    train_model(model, data, None, adam(model), checkpoint=file)
    kept = torch.load(file)
    fuse_blocks(model)
    for wrong in ({}, [{}], [{**kept["packs"][0], "misses": "1"}], [3]):
        torch.save({**kept, "packs": wrong}, tmp_path / "wrong.pt")
        with pytest.raises(ValueError, match="packs: expected a list"):
            train_model(model, data, None, adam(model), resume_from=tmp_path / "wrong.pt", epochs=2)
    unfuse_blocks(model)
    with pytest.raises(ValueError, match=r"packs: computes .*q_proj together with others"):
        train_model(model, data, None, adam(model), resume_from=file, epochs=2)


def test_checkpoints_are_written_when_asked_and_survive_a_crash(tmp_path):
    file = tmp_path / "checkpoint.pt"
    model = net()
    sizes = []

    def batches():
        for index, batch in enumerate(batched(4)):
            sizes.append(len(torch.load(file)["history"]["loss"]) if file.exists() else 0)
            if index == 5:
                raise OSError("disk gone")
            yield batch

    with pytest.raises(OSError, match="disk gone"):
        train_model(
            model, batches(), CROSS_ENTROPY, adam(model), checkpoint=file, checkpoint_every=2
        )
    # The first batch of an epoch is read before its first step.
    assert sizes == [0, 0, 2, 2, 4, 4]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_bad_checkpoints_name_what_is_wrong(tmp_path):
    file = tmp_path / "checkpoint.pt"
    model = net(rank=4)
    train_model(model, batched(4), CROSS_ENTROPY, adam(model), checkpoint=file, max_steps=3)

    def resume(model, message, error=ValueError, file=file, data=None, **options):
        before = state(model)
        with pytest.raises(error, match=re.escape(message)):
            train_model(
                model, batched(4) if data is None else data, CROSS_ENTROPY,
                **{"optimizer": adam(model), "resume_from": file, **options},
            )  # fmt: skip
        assert equal(before, state(model))

    resume(net(), "no such file", FileNotFoundError, tmp_path / "nothing.pt")
    resume(
        net(rank=3),
        "inner.lora_A has shape (4, 6)",
    )
    resume(net(), "accumulation_steps: ", accumulation_steps=2)
    resume(net(target_modules=["inner"]), "outer.lora_A is only in the file")
    other = net()
    optimizer = adam(other)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    options = {"optimizer": optimizer, "scheduler": scheduler}
    resume(other, "was written without a scheduler", **options)
    other = net()
    resume(other, "optimizer['param_groups'][0]: has no 'momentum'", optimizer=sgd(other))
    resume(net(), "gave 2 batches, but 3 were seen", data=batched(4)[:2])
    torch.save({"weights": torch.ones(2)}, tmp_path / "other.pt")
    resume(net(), "is no checkpoint of train_model", file=tmp_path / "other.pt")


def test_the_scale_of_losses_is_resumed(tmp_path):
    """Losses so large that the scaler leaves the first steps out and finds another scale."""

    def run(**options):
        model = net(dtype=torch.float32)
        history = train_model(
            model, batched(4, dtype=torch.float32), lambda p, t: 40 * CROSS_ENTROPY(p, t),
            adam(model), autocast_dtype=torch.float16, epochs=2, **options,
        )  # fmt: skip
        return state(model), history

    file = tmp_path / "checkpoint"
    expected = run()
    overflown = [not math.isfinite(norm) for norm in expected[1].grad_norm]
    assert 2 <= sum(overflown) <= 6
    run(max_steps=7, checkpoint=file)
    resumed = run(resume_from=file)
    assert equal(expected[0], resumed[0])
    assert str(expected[1].grad_norm) == str(resumed[1].grad_norm)  # with its nans


def test_running_statistics_are_resumed(tmp_path):
    def run(**options):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
        add_adaptor_layer(model, 2, target_modules=["0"], modules_to_save=["1"])
        data = batched(4, dtype=torch.float32)
        train_model(model, data, CROSS_ENTROPY, adam(model), epochs=2, **options)
        return model.state_dict()

    file = tmp_path / "checkpoint"
    expected = run()
    run(max_steps=7, checkpoint=file)
    assert equal(expected, run(resume_from=file))


def test_the_best_and_the_evaluations_are_resumed(tmp_path):
    file = tmp_path / "checkpoint"

    def run(fail_at=None, **options):
        model = net()
        optimizer = adam(model, lr=0.3)
        options |= {"eval_loader": batched(4, seed=3), "eval_every": 2, "keep_best": "loss"}
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        calls = []

        def criterion(prediction, targets):
            calls.append(0)
            return CROSS_ENTROPY(prediction, targets) * (torch.nan if len(calls) == fail_at else 1)

        history = train_model(
            model, batched(4), criterion, optimizer, scheduler=scheduler, epochs=2, **options
        )
        return state(model), history

    expected = run()
    losses = [found["loss"] for found in expected[1].evaluations]
    assert 0 < losses.index(min(losses)) < len(losses) - 1
    # Six batches are evaluated after every second one.
    with pytest.raises(FloatingPointError):
        run(fail_at=34, checkpoint=file, checkpoint_every=1)
    resumed = run(resume_from=file)
    assert equal(expected[0], resumed[0])
    assert expected[1] == resumed[1]


@pytest.mark.parametrize("seed", [0, 1])
def test_damaged_checkpoints_change_nothing(seed):
    """A sample; `python tests/fuzz_files.py --kind checkpoint --count 20000` is the long form."""
    outcomes = fuzz_files.fuzz("checkpoint", count=60, seed=seed)
    assert not outcomes["wrong"]
    assert outcomes["refused"] > 30


def one_cycle(file=None, change=None, **options):
    """A run of 12 steps; before it, `change` of what the file holds."""
    model = net()
    optimizer = adam(model)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=12)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.manual_seed(4 if change is None else 5)
    before = state(model), scheduler.state_dict(), torch.get_rng_state()
    if change is not None:
        path, new = change
        content = torch.load(file, weights_only=True)
        torch.save(fuzz_files.replaced(content, path, new), file)
        options["resume_from"] = file

    def unchanged():
        return (
            equal(before[0], state(model))
            and before[1] == scheduler.state_dict()
            and not optimizer.state
            and torch.equal(before[2], torch.get_rng_state())
            and all(parameter.grad is not None for parameter in model.parameters())
        )

    def run():
        data = batched(4)
        options.setdefault("epochs", 2)
        return train_model(model, data, CROSS_ENTROPY, optimizer, scheduler=scheduler, **options)

    return run, unchanged


@pytest.mark.parametrize(
    ("path", "change", "message"),
    [
        (["epoch"], lambda _: 2**70, "epoch: expected an integer of at least 0, got 118"),
        (["optimizer", "param_groups", 0, "eps"], lambda _: 2**70, "expected a finite number"),
        (["optimizer", "param_groups", 0, "fused"], lambda _: torch.ones(2),
         "cannot be loaded (Boolean value of Tensor"),
        (["scheduler", "total_steps"], lambda _: -1, "cannot make a step (ValueError: "),
        (["scheduler", "_schedule_phases", 1, "end_lr"], lambda _: "text",
         "cannot make a step (KeyError: 'text')"),
        (["scheduler", "_schedule_phases", 0, "end_step"], lambda _: math.inf, "a finite number"),
        (["optimizer", "state", 1, "exp_avg"], lambda t: torch.full_like(t, math.inf),
         "optimizer: its state makes parameters inf or nan"),
        (["tensors", "inner.lora_A"], lambda t: torch.full_like(t, math.nan),
         "inner.lora_A holds values that are inf or nan"),
    ],
)  # fmt: skip
def test_values_that_no_step_can_be_made_with(tmp_path, path, change, message):
    file = tmp_path / "checkpoint"
    one_cycle(checkpoint=file, max_steps=3)[0]()
    run, unchanged = one_cycle(file, (path, change))
    with pytest.raises(ValueError, match=re.escape(f"resume_from: {file}: ")) as raised:
        run()
    assert message in str(raised.value)
    assert unchanged()


def test_a_run_that_has_ended_is_read(tmp_path):
    """Its scheduler cannot make another step."""
    file = tmp_path / "checkpoint"
    history = one_cycle(checkpoint=file)[0]()
    assert one_cycle(resume_from=file)[0]() == history
    with pytest.raises(ValueError, match=r"checkpoint: .* cannot make a step .*Tried to step 13"):
        one_cycle(resume_from=file, epochs=3)[0]()


def test_an_optimizer_of_its_own_needs_is_resumed(tmp_path):
    """A step without its gradients cannot be tried, with this run's state no more than another."""

    class Wary(torch.optim.SGD):
        def step(self):
            assert all(p.grad.any() for group in self.param_groups for p in group["params"])
            super().step()

    def run(**options):
        model = net()
        optimizer = Wary(lora_parameters(model), 0.1, momentum=0.9)
        train_model(model, batched(4), CROSS_ENTROPY, optimizer, **options)
        return state(model)

    file = tmp_path / "checkpoint"
    run(max_steps=3, checkpoint=file)
    assert equal(run(resume_from=file), run())


def test_neither_folders_nor_pipes_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    model = net()
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(ValueError, match=r"resume_from: .* is no regular file"):
            train_model(model, batched(4), CROSS_ENTROPY, adam(model), resume_from=path)
