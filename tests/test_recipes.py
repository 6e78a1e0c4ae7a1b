"""The recipe: training, evaluation, adjusting ranks, on tiny real models and real text."""

import copy
import dataclasses
import json
import math
import pydoc_data.topics
import re
import runpy
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BatchEncoding, LlamaConfig, LlamaForCausalLM

from lora_kernels import (
    FusedLoRALinear,
    add_adaptor_layer,
    adjust_rank,
    apply_lora,
    evaluate_model,
    load_adapter,
    lora_parameters,
    merge_lora,
    save_adapter,
    train_model,
)
from lora_kernels.adapters import lora_layers
from lora_kernels.recipes import ranks as ranks_module

CROSS_ENTROPY = nn.CrossEntropyLoss()


def text_batches(count, size=4, length=24, start=0):
    """Mappings as a Transformers collator gives them: bytes of Python's own reference manual."""
    text = "\n".join(pydoc_data.topics.topics.values()).encode()
    data = torch.tensor(list(text[start : start + count * size * length]))
    return [
        {"input_ids": ids, "labels": ids.clone()} for ids in data.view(count, size, length).unbind()
    ]


def llama(seed=0, **options):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64, **options,
    )  # fmt: skip
    return LlamaForCausalLM(config)


class Net(nn.Module):
    def __init__(self, dtype=torch.float64, dropout=0.0):
        super().__init__()
        self.inner = nn.Linear(6, 10, dtype=dtype)
        self.drop = nn.Dropout(dropout)
        self.outer = nn.Linear(10, 3, dtype=dtype)

    def forward(self, x):
        return self.outer(self.drop(torch.relu(self.inner(x))))


def net(rank=4, seed=0, dtype=torch.float64, dropout=0.0, trained=True, **options):
    """A small model with adapters whose B is not zero."""
    torch.manual_seed(seed)
    model = add_adaptor_layer(Net(dtype, dropout), rank, **options)
    if trained:
        with torch.no_grad():
            for _, layer in lora_layers(model):
                layer.lora_B.normal_(std=0.3)
    return model


def pairs(n=24, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=generator, dtype=torch.float64).to(dtype)
    return x, (x[:, :3].argmax(1) + (x[:, 3] > 0)) % 3


def batched(size, n=24, **options):
    x, y = pairs(n, **options)
    return list(zip(x.split(size), y.split(size), strict=True))


def adam(model, lr=1e-2):
    return torch.optim.Adam(lora_parameters(model), lr=lr)


def sgd(model, lr=1.0):
    return torch.optim.SGD(lora_parameters(model), lr=lr)


def state(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


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
    assert history.loss[-1] < before - 0.3
    report = adjust_rank(model, 4, 2, text_batches(8), None, optimizer, **options)
    assert report.loss < before - 0.3


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


# ------------------------------------------------------------------------------------------- resume


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
        return x + 0.1 * torch.randn(x.shape), y

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
    history = train_model(model, loader, CROSS_ENTROPY, optimizer, epochs=3, **options)
    expected = state(model), history, optimizer.state_dict(), torch.get_rng_state()
    assert len(history) == 12

    model, loader, optimizer, options = resumable(own_generator, scaled)
    torch.manual_seed(11)
    train_model(
        model, loader, CROSS_ENTROPY, optimizer, epochs=3, max_steps=stop, checkpoint=file,
        **options,
    )  # fmt: skip

    model, loader, optimizer, options = resumable(own_generator, scaled)
    torch.manual_seed(77)
    history = train_model(
        model, loader, CROSS_ENTROPY, optimizer, epochs=3, resume_from=file, **options
    )
    assert equal(expected[0], state(model))
    assert history == expected[1]
    for key, value in expected[2]["state"].items():
        assert all(torch.equal(value[k], optimizer.state_dict()["state"][key][k]) for k in value)
    assert torch.equal(torch.get_rng_state(), expected[3])


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
                model, batched(4) if data is None else data, CROSS_ENTROPY, adam(model),
                resume_from=file, **options,
            )  # fmt: skip
        if data is None:
            assert equal(before, state(model))

    resume(net(), "no such file", FileNotFoundError, tmp_path / "nothing.pt")
    resume(
        net(rank=3),
        "inner.lora_A has shape (4, 6)",
    )
    resume(net(), "accumulation_steps: ", accumulation_steps=2)
    resume(net(target_modules=["inner"]), "outer.lora_A is only in the file")
    optimizer = adam(net())
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    resume(net(), "was written without a scheduler", scheduler=scheduler)
    resume(net(), "gave 2 batches, but 3 were seen", data=batched(4)[:2])
    torch.save({"weights": torch.ones(2)}, tmp_path / "other.pt")
    resume(net(), "is no checkpoint of train_model", file=tmp_path / "other.pt")


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


# -------------------------------------------------------------------------------------- set_adapter


@pytest.mark.parametrize("alpha", [None, 5, 16, 1 / 3])
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("rank", [1, 3, 4, 49])
def test_set_adapter_keeps_the_scaling(alpha, use_rslora, rank):
    layer = FusedLoRALinear(
        6, 5, 4, alpha=alpha, use_rslora=use_rslora, dtype=torch.bfloat16,
        adapter_dtype=torch.bfloat16,
    )  # fmt: skip
    scaling, old = layer.scaling, layer.lora_A
    A, B = torch.randn(rank, 6), torch.randn(5, rank)
    layer.set_adapter(A, B)
    assert layer.rank == rank
    assert layer.scaling == pytest.approx(scaling, rel=3e-16)
    assert (layer.alpha is None) == (alpha is None)
    assert layer.lora_A is not old
    assert layer.lora_A.requires_grad
    assert torch.equal(layer.lora_A, A.bfloat16())
    assert layer.lora_B.dtype == torch.bfloat16
    A.zero_()
    assert layer.lora_A.any()


def test_set_adapter_bad_input():
    layer = FusedLoRALinear(6, 5, 4)
    for A, B, name in (
        (torch.ones(2, 5), torch.ones(5, 2), "A"),
        (torch.ones(2, 6), torch.ones(5, 3), "B"),
        (torch.ones(0, 6), torch.ones(5, 0), "A"),
        (torch.ones(6), torch.ones(5, 1), "A"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"{name}: expected A [r, 6] and B [5, r]")):
            layer.set_adapter(A, B)
    layer.merge()
    with pytest.raises(RuntimeError, match="set_adapter: the layer is merged"):
        layer.set_adapter(torch.ones(2, 6), torch.ones(5, 2))


def test_pissa_buffers_of_another_rank_load():
    torch.manual_seed(0)
    linear = nn.Linear(12, 9)
    layer = FusedLoRALinear.from_linear(copy.deepcopy(linear), 4, init="pissa")
    layer.set_adapter(torch.randn(2, 12), torch.randn(9, 2))
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
                init=init)  # fmt: skip
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


# ------------------------------------------------------------------------- examples and benchmarks


def script(path):
    """The main function of a script beside the package."""
    return runpy.run_path(str(Path(__file__).parents[1] / path))["main"]


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


def test_benchmark_of_low_rank(tmp_path, capsys):
    file = tmp_path / "result.json"
    result = script("benchmarks/low_rank.py")(
        ["--size", "96", "--rank", "4", "--repeats", "2", "--device", "cpu", "--json", str(file)]
    )
    assert json.loads(file.read_text()) == result
    assert result["ratio"] == result["seconds"]["exact"] / result["seconds"]["randomized"]
    assert 1 - 1e-5 <= result["error over the best"] <= 1.01
    assert torch.__version__ in capsys.readouterr().out
