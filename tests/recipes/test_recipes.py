"""The recipe: training and evaluation, on tiny real models and real text."""

import dataclasses
import json
import math
import re
import runpy
import subprocess
import sys
import types
from pathlib import Path

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
    sgd,
    state,
    text_batches,
)
from torch import nn
from transformers import BatchEncoding

from lora_kernels import (
    FusedLoRALinear,
    add_adaptor_layer,
    adjust_rank,
    apply_lora,
    evaluate_model,
    lora_parameters,
    merge_lora,
    train_model,
)
from lora_kernels.adapters import lora_layers

# -------------------------------------------------------------------------------- add_adaptor_layer


def test_adapters_go_where_apply_lora_puts_them():
    ours, theirs = llama(), llama()
    torch.manual_seed(1)
    returned = add_adaptor_layer(ours, 3, alpha=6, target_modules=["q_proj", "down_proj"])
    torch.manual_seed(1)
    apply_lora(theirs, 3, alpha=6, target_modules=["q_proj", "down_proj"])
    assert returned is ours
    assert equal(state(ours), state(theirs))
    whole = add_adaptor_layer(llama(), 2)
    assert len(list(lora_layers(whole))) == 2 * 7
    assert not isinstance(whole.lm_head, FusedLoRALinear)


# -------------------------------------------------------------------------------------- train_model


def test_only_adapters_and_saved_modules_move():
    model = add_adaptor_layer(llama(), 4, dropout=0.1, modules_to_save=["norm"])
    before, data = state(model), text_batches(12)
    loss = evaluate_model(model, data, None)["loss"]
    history = train_model(model, data, None, adam(model), epochs=3)
    after = state(model)
    for name in before:
        moves = "lora_" in name or name == "model.norm.weight"
        assert torch.equal(before[name], after[name]) is not moves, name
    assert evaluate_model(model, data, None)["loss"] < loss - 0.15
    assert len(history) == 36
    assert history.epoch == [0] * 12 + [1] * 12 + [2] * 12
    assert len(history.epoch_loss) == 3
    assert history.epoch_loss[1] == pytest.approx(sum(history.loss[12:24]) / 12)
    assert history.samples == [4.0] * 36
    assert history.learning_rate == [0.01] * 36
    assert json.loads(json.dumps(dataclasses.asdict(history)))["loss"] == history.loss


def test_one_pass_is_the_default_and_max_steps_ends_it():
    model = net()
    assert len(train_model(model, batched(4), CROSS_ENTROPY, adam(model))) == 6
    assert len(train_model(model, batched(4), CROSS_ENTROPY, adam(model), max_steps=2)) == 2
    history = train_model(model, batched(4), CROSS_ENTROPY, adam(model), epochs=9, max_steps=8)
    assert history.epoch == [0] * 6 + [1] * 2


def test_a_plain_model_trains_in_full():
    torch.manual_seed(0)
    model = Net()
    before = state(model)
    train_model(model, batched(4), CROSS_ENTROPY, torch.optim.SGD(model.parameters(), lr=0.1))
    assert not any(torch.equal(before[name], p) for name, p in state(model).items())


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_accumulated_steps_equal_one_large_batch(steps):
    # 22 samples in fours: the last group is short and its last batch holds two.
    one, other = net(), net()
    groups = [
        tuple(map(torch.cat, zip(*batched(4, 22)[i : i + steps], strict=True)))
        for i in range(0, 6, steps)
    ]
    expected = train_model(one, groups, CROSS_ENTROPY, sgd(one))
    got = train_model(other, batched(4, 22), CROSS_ENTROPY, sgd(other), accumulation_steps=steps)
    assert got.loss == pytest.approx(expected.loss, rel=1e-12)
    assert got.samples == expected.samples
    for name, parameter in state(one).items():
        assert torch.allclose(parameter, state(other)[name], rtol=1e-11, atol=1e-13)


def test_clipping_bounds_the_update():
    model = net()
    before = state(model)
    history = train_model(model, batched(24), CROSS_ENTROPY, sgd(model), max_grad_norm=1e-3)
    after = state(model)
    moved = torch.cat([(after[name] - before[name]).flatten() for name in before]).norm()
    assert history.grad_norm[0] > 1e-2
    assert float(moved) == pytest.approx(1e-3, rel=1e-4)


def test_gradients_of_parameters_outside_the_optimizer_do_not_pile_up():
    model = net()
    only_b = [layer.lora_B for _, layer in lora_layers(model)]
    history = train_model(model, batched(24), CROSS_ENTROPY, torch.optim.SGD(only_b, lr=0.1))
    assert all(p.grad is None for p in model.parameters())
    reference = net()
    CROSS_ENTROPY(reference(pairs()[0]), pairs()[1]).backward()
    grads = [layer.lora_B.grad for _, layer in lora_layers(reference)]
    assert history.grad_norm[0] == pytest.approx(float(torch.nn.utils.get_total_norm(grads)))


def test_a_scheduler_steps_once_per_update():
    model = net()
    optimizer = adam(model, lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    history = train_model(
        model, batched(4), CROSS_ENTROPY, optimizer, accumulation_steps=2, scheduler=scheduler
    )
    assert history.learning_rate == pytest.approx([1, 1 / 2, 1 / 3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_keeps_master_weights(dtype):
    seen = set()

    def criterion(prediction, targets):
        seen.add(prediction.dtype)
        return nn.functional.cross_entropy(prediction, targets)

    plain, mixed = net(dtype=torch.float32), net(dtype=torch.float32)
    data = batched(4, dtype=torch.float32)
    expected = train_model(plain, data, CROSS_ENTROPY, sgd(plain, 0.1))
    history = train_model(mixed, data, criterion, sgd(mixed, 0.1), autocast_dtype=dtype)
    assert seen == {dtype}
    assert {p.dtype for p in lora_parameters(mixed)} == {torch.float32}
    assert history.loss == pytest.approx(expected.loss, rel=0.02)
    assert history.grad_norm == pytest.approx(expected.grad_norm, rel=0.05)
    assert history.loss != expected.loss


def test_an_overflow_in_fp16_leaves_the_step_out():
    """The loss is finite, its gradient times the scale is not."""
    model = net(dtype=torch.float32)
    before = state(model)
    calls = []

    def criterion(prediction, targets):
        calls.append(0)
        factor = 1e36 if len(calls) == 1 else 1.0
        return nn.functional.cross_entropy(prediction.float(), targets) * factor

    optimizer = sgd(model, 0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    options = {"autocast_dtype": torch.float16, "scheduler": scheduler}
    data = batched(12, dtype=torch.float32)
    train_model(model, data, criterion, optimizer, max_steps=1, **options)
    assert equal(before, state(model))
    assert optimizer.param_groups[0]["lr"] == 0.1
    train_model(model, data, criterion, optimizer, max_steps=1, **options)
    assert not equal(before, state(model))
    assert optimizer.param_groups[0]["lr"] == 0.05


def test_modes_are_restored_and_frozen_statistics_stay():
    class Normed(Net):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3, dtype=torch.float64)

        def forward(self, x):
            return self.norm(super().forward(x))

    model = add_adaptor_layer(Normed(), 2)
    model.eval()
    model.drop.train()
    modes = [m.training for m in model.modules()]
    seen = []
    model.drop.register_forward_hook(lambda m, *_: seen.append((m.training, model.norm.training)))
    train_model(model, batched(4), CROSS_ENTROPY, adam(model))
    assert set(seen) == {(True, False)}
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(model.norm.running_mean, torch.zeros(3, dtype=torch.float64))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_training_on_a_gpu(dtype):
    model = add_adaptor_layer(llama(), 4, dropout=0.1)
    optimizer = adam(model)
    train_model(model, text_batches(2), None, optimizer)
    options = {"device": "cuda", "autocast_dtype": dtype}
    before = evaluate_model(model, text_batches(8), None)["loss"]
    history = train_model(model, text_batches(8), None, optimizer, epochs=4, **options)
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    assert history.loss[-1] < before - 0.1
    report = adjust_rank(model, 4, 2, text_batches(8), None, optimizer, **options)
    assert report.loss < before - 0.1


# -------------------------------------------------------------------------------------- batch forms


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    loss: torch.Tensor | None = None


class Forms(Net):
    """Takes and returns what it is told to."""

    def __init__(self, returns):
        super().__init__()
        self.returns = returns

    def forward(self, x, scale=1.0, labels=None):
        logits = super().forward(x) * scale
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {
            "tensor": logits,
            "tuple": (logits, "other"),
            "object": Output(logits, loss),
            "dict": {"logits": logits, "loss": loss},
        }[self.returns]


@pytest.mark.parametrize("returns", ["tensor", "tuple", "object", "dict"])
@pytest.mark.parametrize("form", ["tuple", "list", "arguments", "keywords", "mapping", "encoding"])
@pytest.mark.parametrize("own_loss", [False, True])
def test_every_form_of_batch_and_output(returns, form, own_loss):
    torch.manual_seed(0)
    model = add_adaptor_layer(Forms(returns), 2)
    x, y = pairs()
    batch = {
        "tuple": (x, y),
        "list": [x, y],
        "arguments": ((x, 1.0), y),
        "keywords": ({"x": x, "scale": 1.0}, y),
        "mapping": {"x": x, "labels": y},
        "encoding": BatchEncoding({"x": x, "labels": y}),
    }[form]
    criterion = None if own_loss else CROSS_ENTROPY
    if own_loss and returns in ("tensor", "tuple"):
        with pytest.raises(ValueError, match="criterion: None needs a model that returns an obj"):
            evaluate_model(model, [batch], criterion)
        return
    expected = float(CROSS_ENTROPY(Net.forward(model, x), y).detach())
    assert evaluate_model(model, [batch], criterion) == {"loss": pytest.approx(expected)}
    assert train_model(model, [batch], criterion, adam(model)).loss == pytest.approx([expected])


def test_a_causal_language_model_with_its_own_loss_and_with_a_criterion():
    def next_token(logits, labels):
        return CROSS_ENTROPY(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    model, data = add_adaptor_layer(llama(), 2), text_batches(3)
    own = evaluate_model(model, data, None)["loss"]
    assert evaluate_model(model, data, next_token)["loss"] == pytest.approx(own, rel=1e-6)
    as_pairs = [(batch["input_ids"], batch["labels"]) for batch in data]
    assert evaluate_model(model, as_pairs, None)["loss"] == pytest.approx(own, rel=1e-6)
    assert evaluate_model(model, as_pairs, next_token)["loss"] == pytest.approx(own, rel=1e-6)


# --------------------------------------------------------------------------------------- evaluation


def accuracy(prediction, targets):
    return (prediction.argmax(-1) == targets).double().mean()


def test_means_are_over_samples():
    model = net()
    x, y = pairs(22)
    whole = evaluate_model(model, [(x, y)], CROSS_ENTROPY, metrics={"accuracy": accuracy})
    parts = evaluate_model(model, batched(4, 22), CROSS_ENTROPY, metrics={"accuracy": accuracy})
    assert parts == pytest.approx(whole, rel=1e-12)
    assert whole["accuracy"] == float((model(x).argmax(-1) == y).double().mean())
    assert all(type(value) is float for value in parts.values())
    # The batches' plain mean is another number: the last one holds two samples.
    plain = [evaluate_model(model, [batch], CROSS_ENTROPY)["loss"] for batch in batched(4, 22)]
    assert abs(sum(plain) / 6 - whole["loss"]) > 1e-3


def test_means_over_tokens():
    model, (batch,) = add_adaptor_layer(llama(), 2), text_batches(1)
    batch["labels"][1:, 5:] = -100
    rows = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(4)]
    rows.append({"input_ids": batch["input_ids"], "labels": torch.full((4, 24), -100)})

    def tokens(batch):
        return int((batch["labels"][:, 1:] != -100).sum())

    whole = evaluate_model(model, [batch], None)["loss"]
    assert evaluate_model(model, rows, None, count=tokens)["loss"] == pytest.approx(whole, rel=1e-6)
    history = train_model(model, rows, None, adam(model), accumulation_steps=5, count=tokens)
    assert history.loss == pytest.approx([whole], rel=1e-6)
    assert history.samples == [23 + 3 * 4]


def test_evaluation_leaves_no_trace():
    model = net(dropout=0.5)
    model.train()
    model.inner.eval()
    modes = [m.training for m in model.modules()]
    before, random = state(model), torch.get_rng_state()
    grads = []

    def criterion(prediction, targets):
        grads.append(prediction.requires_grad)
        return nn.functional.cross_entropy(prediction, targets)

    first = evaluate_model(model, batched(4), criterion)
    assert first == evaluate_model(model, batched(4), criterion)
    assert not any(grads)
    assert [m.training for m in model.modules()] == modes
    assert equal(before, state(model))
    assert torch.equal(torch.get_rng_state(), random)

    def broken(prediction, targets):
        raise KeyError

    with pytest.raises(KeyError):
        evaluate_model(model, batched(4), broken)
    assert [m.training for m in model.modules()] == modes


def test_evaluation_in_mixed_precision():
    model = net(dtype=torch.float32)
    data = batched(4, dtype=torch.float32)
    plain = evaluate_model(model, data, CROSS_ENTROPY)["loss"]
    mixed = evaluate_model(model, data, CROSS_ENTROPY, autocast_dtype=torch.bfloat16)["loss"]
    assert mixed != plain
    assert mixed == pytest.approx(plain, rel=0.02)


# --------------------------------------------------------------------------------- progress, import


@pytest.mark.parametrize("installed", [True, False])
def test_progress_bar(monkeypatch, installed):
    bars = []

    class Bar:
        def __init__(self, total, desc, disable, leave):
            self.total, self.done, self.disable = total, 0, disable
            bars.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self, n=1):
            self.done += n

        def set_postfix_str(self, text):
            assert text.startswith("loss ")

    fake = types.SimpleNamespace(tqdm=Bar) if installed else None
    monkeypatch.setitem(sys.modules, "tqdm.auto", fake)
    model = net()
    options = {"epochs": 2, "accumulation_steps": 4}
    for progress in (True, None, False):
        train_model(model, batched(4), CROSS_ENTROPY, adam(model), progress=progress, **options)
    evaluate_model(model, iter(batched(4)), CROSS_ENTROPY, progress=True)
    assert [(bar.total, bar.done, bar.disable) for bar in bars] == (
        [(4, 4, False), (4, 4, None), (None, 6, False)] if installed else []
    )


def test_import_brings_neither_tqdm_nor_transformers():
    code = (
        "import sys, torch; before = set(sys.modules); import lora_kernels;"
        "print(*(set(sys.modules) - before))"
    )
    added = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    packages = {name.partition(".")[0] for name in added.stdout.split()}
    assert "lora_kernels" in packages
    assert not packages & {"tqdm", "transformers", "peft", "safetensors", "matplotlib"}


# --------------------------------------------------------------------------------------- not finite


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_a_nan_loss_stops_and_keeps_the_last_good_adapters(accumulation_steps):
    options = {"accumulation_steps": accumulation_steps}
    data = batched(4)
    data[4] = (data[4][0] * torch.nan, data[4][1])
    step = 4 // accumulation_steps + 1
    model = net()
    where = f"epoch 1, batches {5} to {4 + accumulation_steps}"
    with pytest.raises(
        FloatingPointError, match=re.escape(f"the loss is nan at step {step} ({where})")
    ):
        train_model(model, data, CROSS_ENTROPY, adam(model), **options)
    # The parameters with which step - 1 gave a finite loss: those after step - 2 updates.
    expected = net()
    train_model(expected, data, CROSS_ENTROPY, adam(expected), max_steps=step - 2, **options) if (
        step > 2
    ) else None
    assert equal(state(model), state(expected))
    assert all(p.grad is None for p in model.parameters())


def test_adapters_that_an_update_spoilt_are_taken_back():
    model = net()
    before = state(model)
    with pytest.raises(FloatingPointError, match=r"at step 2 \(epoch 1, batches 2 to 2\)"):
        train_model(model, batched(4), CROSS_ENTROPY, sgd(model, lr=1e300))
    assert equal(before, state(model))


def test_the_last_update_is_checked_too(tmp_path):
    model, file = net(), tmp_path / "checkpoint.pt"
    before = state(model)
    with pytest.raises(FloatingPointError, match="parameters are not finite after step 1"):
        train_model(model, batched(24), CROSS_ENTROPY, sgd(model, lr=math.inf), checkpoint=file)
    assert equal(before, state(model))
    assert not file.exists()


def test_a_gradient_that_is_not_finite_stops():
    model = net()
    before = state(model)

    def criterion(prediction, targets):
        return (prediction * 0).abs().sum().sqrt() + nn.functional.cross_entropy(
            prediction, targets
        )

    with pytest.raises(FloatingPointError, match="norm of the gradient is nan at step 1"):
        train_model(model, batched(4), criterion, adam(model))
    assert equal(before, state(model))


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "epochs: expected an integer of at least 0, got -1", {"epochs": -1}),
        (ValueError, "epochs: expected an integer of at least 0, got 1.5", {"epochs": 1.5}),
        (ValueError, "max_steps: expected an integer of at least 1, got 0", {"max_steps": 0}),
        (ValueError, "accumulation_steps: expected an integer of at least 1, got 0",
         {"accumulation_steps": 0}),
        (ValueError, "max_grad_norm: expected a positive number or None, got 0",
         {"max_grad_norm": 0}),
        (ValueError, "checkpoint_every: needs checkpoint", {"checkpoint_every": 3}),
        (ValueError, "autocast_dtype: legal values are None, torch.bfloat16 and torch.float16, "
         "got torch.float32", {"autocast_dtype": torch.float32}),
        (TypeError, "criterion: expected a callable (prediction, targets) -> loss, or None for a "
         "model that returns its loss, got str", {"criterion": "mse"}),
        (ValueError, "criterion: expected a loss of one floating element, got shape (4,)",
         {"criterion": nn.CrossEntropyLoss(reduction="none")}),
        (ValueError, "criterion: expected a loss of one floating element, got float",
         {"criterion": lambda p, t: 1.0}),
        (ValueError, "criterion: the loss does not depend on any parameter",
         {"criterion": lambda p, t: CROSS_ENTROPY(p.detach(), t)}),
        (ValueError, "train_loader: gave no batch in epoch 1", {"train_loader": []}),
        (TypeError, "batch: expected (inputs, targets) or a mapping, got tuple of 3 elements",
         {"train_loader": [(*batched(4)[0], torch.ones(4))]}),
        (TypeError, "batch: expected (inputs, targets) or a mapping, got Tensor",
         {"train_loader": [torch.ones(4, 6)]}),
        (ValueError, "criterion: needs the batch's 'labels'; its keys are x",
         {"train_loader": [{"x": torch.ones(4, 6)}]}),
        (ValueError, "count: expected a non-negative number, got -1.0", {"count": lambda b: -1}),
        (ValueError, "count: the batches of step 1 count for nothing", {"count": lambda b: 0}),
        (TypeError, "optimizer: expected a torch optimizer, got str", {"optimizer": "adam"}),
        (TypeError, "model: expected a torch.nn.Module, got NoneType", {"model": None}),
    ],
)  # fmt: skip
def test_bad_arguments(error, message, options):
    model = net()
    arguments = {
        "model": model, "train_loader": batched(4), "criterion": CROSS_ENTROPY,
        "optimizer": adam(model),
    }  # fmt: skip
    with pytest.raises(error, match=re.escape(message)):
        train_model(**(arguments | options))


def test_a_loader_that_runs_dry():
    model = net()
    with pytest.raises(ValueError, match="train_loader: gave no batch in epoch 2"):
        train_model(model, iter(batched(4)), CROSS_ENTROPY, adam(model), epochs=2)


def test_bad_models():
    model, base = net(), Net()
    with pytest.raises(ValueError, match="optimizer: holds none of the parameters to train"):
        train_model(model, batched(4), CROSS_ENTROPY, torch.optim.SGD(base.parameters(), lr=1))
    base.requires_grad_(False)
    with pytest.raises(ValueError, match="model: no parameter requires a gradient; call add_adap"):
        train_model(base, batched(4), CROSS_ENTROPY, adam(model))
    half = net(dtype=torch.float16, adapter_dtype=torch.float16)
    with pytest.raises(TypeError, match=r"inner.lora_A is fp16; add adapters with adapter_dtype"):
        train_model(half, [], CROSS_ENTROPY, adam(half), autocast_dtype=torch.float16)
    merge_lora(model)
    with pytest.raises(ValueError, match=r"model: inner is merged; unmerge_lora\(model\) first"):
        train_model(model, batched(4), CROSS_ENTROPY, adam(model))


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("test_loader: gave no batch", {"test_loader": []}),
        ("count: all batches count for nothing", {"count": lambda batch: 0}),
        ("metrics: 'loss' is the criterion's own name", {"metrics": {"loss": accuracy}}),
        ("metrics: 'wide' gave shape (4,), expected one number",
         {"metrics": {"wide": lambda p, t: t}}),
    ],
)  # fmt: skip
def test_bad_evaluations(message, options):
    arguments = {"test_loader": batched(4), "criterion": CROSS_ENTROPY}
    with pytest.raises(ValueError, match=re.escape(message)):
        evaluate_model(net(), **(arguments | options))


# -------------------------------------------------------------------------- examples and benchmarks


def script(path):
    """The main function of a script beside the package."""
    return runpy.run_path(str(Path(__file__).parents[2] / path))["main"]


def test_example_with_these_functions(tmp_path, capsys):
    perplexity = script("examples/finetune_transformers.py")(
        ["--steps", "3", "--batch-size", "2", "--length", "16", "--rank", "4", "--final-rank", "2",
         "--output", str(tmp_path)]
    )  # fmt: skip
    assert 1 < perplexity < 300
    assert "rank 4 -> 2" in capsys.readouterr().out
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 2


def test_example_with_the_trainer(tmp_path):
    loss = script("examples/finetune_trainer.py")(
        ["--steps", "2", "--length", "16", "--output", str(tmp_path)]
    )
    assert 0 < loss < math.log(256) + 0.5
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_example_of_a_service(tmp_path, capsys):
    times = script("examples/serve_adapters.py")(
        ["--users", "3", "--room", "2", "--requests", "4", "--batch-size", "2", "--tokens", "3",
         "--width", "32", "--steps", "2", "--output", str(tmp_path)]
    )  # fmt: skip
    assert set(times) == {"fused", "PEFT", "merged", "continuous"}
    said = capsys.readouterr().out
    assert "answers equal to those PEFT's own: 4 of 4" in said
    assert "answers equal to those continuous: 4 of 4" in said
    assert (tmp_path / "user2" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("rows", ["1", "2"])
def test_example_of_training_many(monkeypatch, capsys, rows):
    folder = Path(__file__).parents[2] / "examples"
    monkeypatch.syspath_prepend(str(folder))  # as for a script
    found = script("examples/train_adapters.py")(
        ["--users", "3", "--rows", rows, "--steps", "2", "--width", "32", "--base-steps", "1"]
    )
    assert found["equal"] == 3
    assert found["off"] < 1e-5
    assert "bit-equal to a run among rows of nobody: 3 of 3" in capsys.readouterr().out


def test_example_of_a_small_machine(tmp_path):
    found = script("examples/finetune_small_machine.py")(
        ["--out", str(tmp_path), "--width", "128", "--layers", "1", "--base-steps", "1",
         "--steps", "4", "--ways", "bf16", "NF4"]
    )  # fmt: skip
    assert set(found) == {"bf16", "NF4"}
    assert all(len(one["losses"]) == 4 for one in found.values())
    assert abs(found["NF4"]["losses"][0] - found["bf16"]["losses"][0]) < 0.3
    assert (tmp_path / "small_machine.png").stat().st_size > 5_000


def test_benchmark_of_low_rank(tmp_path, capsys):
    file = tmp_path / "result.json"
    result = script("benchmarks/low_rank.py")(
        ["--size", "96", "--rank", "4", "--repeats", "2", "--device", "cpu", "--json", str(file)]
    )
    assert json.loads(file.read_text()) == result
    assert result["ratio"] == result["seconds"]["exact"] / result["seconds"]["randomized"]
    assert 1 - 1e-5 <= result["error over the best"] <= 1.01
    assert torch.__version__ in capsys.readouterr().out
