"""Training loops other than the plain one: evaluations, callbacks, closures, packed sequences."""

import csv
import math
import re
import sys
import types
from typing import NamedTuple

import pytest
import torch
from recipe_problem import CROSS_ENTROPY, adam, batched, equal, llama, net, sgd, state, text_batches
from torch import nn
from torch.nn.utils import rnn

from lora_kernels import (
    add_adaptor_layer,
    adjust_rank,
    evaluate_model,
    lora_parameters,
    train_model,
)
from lora_kernels.recipes.callbacks import CSV, Callback, EarlyStopping, Goal, TensorBoard

HELD_OUT = batched(6, seed=3)


def train(model, optimizer=None, data=None, criterion=CROSS_ENTROPY, **options):
    optimizer = adam(model, lr=0.05) if optimizer is None else optimizer
    data = batched(4) if data is None else data
    return train_model(model, data, criterion, optimizer, progress=False, **options)


# ------------------------------------------------------------------------ schedulers and optimizers


def plateau(optimizer, **options):
    options = {"factor": 0.5, "patience": 0, "threshold": 1e9, "threshold_mode": "abs"} | options
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, **options)


def test_a_plateau_gets_the_mean_loss_of_each_epoch():
    model, seen = net(), []
    optimizer = sgd(model, lr=1.0)
    scheduler = plateau(optimizer)
    original = scheduler.step
    scheduler.step = lambda loss: (seen.append(loss), original(loss))
    history = train(model, optimizer, scheduler=scheduler, epochs=3)
    assert seen == history.epoch_loss
    # The first loss is an improvement over none, the others are no such.
    assert history.learning_rate == [1.0] * 12 + [0.5] * 6
    assert optimizer.param_groups[0]["lr"] == 0.25


def test_a_plateau_gets_held_out_losses_where_there_are_any():
    model, seen = net(), []
    optimizer = sgd(model, lr=1.0)
    scheduler = plateau(optimizer)
    original = scheduler.step
    scheduler.step = lambda loss: (seen.append(loss), original(loss))
    history = train(model, optimizer, scheduler=scheduler, eval_loader=HELD_OUT, eval_every=2)
    assert seen == [found["loss"] for found in history.evaluations]
    assert history.learning_rate == [1.0] * 4 + [0.5] * 2


def test_schedulers_do_not_count_steps_that_overflow():
    """Scaled losses that are too large: their steps are left out until the scale is found."""
    model = net(dtype=torch.float32)
    optimizer = adam(model, lr=1.0)
    history = train(
        model, optimizer, batched(4, dtype=torch.float32), lambda p, t: 40 * CROSS_ENTROPY(p, t),
        autocast_dtype=torch.float16, epochs=2,
        scheduler=torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
    )  # fmt: skip
    made = sum(map(math.isfinite, history.grad_norm))
    assert 2 <= made <= 10
    assert optimizer.param_groups[0]["lr"] == 0.5**made


@pytest.mark.parametrize("accumulation_steps", [1, 3])
def test_lbfgs_evaluates_a_group_of_batches(accumulation_steps):
    model, reference = net(), net()
    options = {"lr": 0.5, "max_iter": 4, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS(lora_parameters(model), **options)
    history = train(model, optimizer, accumulation_steps=accumulation_steps)
    own = torch.optim.LBFGS(lora_parameters(reference), **options)
    losses, data = [], batched(4)
    for start in range(0, 6, accumulation_steps):
        x, y = map(torch.cat, zip(*data[start : start + accumulation_steps], strict=True))

        def closure(x=x, y=y):
            own.zero_grad()
            loss = CROSS_ENTROPY(reference(x), y)
            loss.backward()
            return loss

        losses.append(float(own.step(closure)))
    assert history.loss == pytest.approx(losses, rel=1e-9)
    for name, parameter in state(reference).items():
        assert torch.allclose(state(model)[name], parameter, rtol=1e-6, atol=1e-9)
    assert all(parameter.grad is None for parameter in model.parameters())


class Restarting:
    """A scheduler that wants to be told the epoch, as some of other libraries do."""

    def step(self, epoch):
        raise AssertionError


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "autocast_dtype: torch.float16 scales losses (GradScaler), which LBFGS cannot",
         {"optimizer": torch.optim.LBFGS, "autocast_dtype": torch.float16}),
        (ValueError, "max_grad_norm: a clipped gradient is not the one of the loss that LBFGS",
         {"optimizer": torch.optim.LBFGS, "max_grad_norm": 1.0}),
        (TypeError, "scheduler: Restarting.step(epoch) cannot be called without arguments",
         {"scheduler": lambda optimizer: Restarting()}),
        (TypeError, "scheduler: expected one with a method step, got float",
         {"scheduler": lambda optimizer: 0.1}),
        (ValueError, "scheduler: ReduceLROnPlateau is given losses, which its mode='max'",
         {"scheduler": lambda optimizer: plateau(optimizer, mode="max")}),
        (ValueError, "scheduler: ExponentialLR was made for another optimizer",
         {"scheduler": lambda o: torch.optim.lr_scheduler.ExponentialLR(adam(net()), 0.9)}),
        (ValueError, "eval_every: needs eval_loader", {"eval_every": 2}),
        (ValueError, "metrics: needs eval_loader", {"metrics": {}}),
        (ValueError, "keep_best: 'loss' is measured in evaluations; give eval_loader",
         {"keep_best": "loss"}),
        (ValueError, "keep_best: legal values are loss, min accuracy, max accuracy, got 'accuracy'",
         {"keep_best": "accuracy", "eval_loader": HELD_OUT, "metrics": {"accuracy": None}}),
        (ValueError, "eval_loader: a list_iterator is used up by the first evaluation",
         {"eval_loader": iter(HELD_OUT)}),
        (ValueError, "eval_loader: has no batch", {"eval_loader": []}),
        (TypeError, "callbacks: expected objects of lora_kernels.recipes.callbacks.Callback, got"
         " function at 0", {"callbacks": [lambda run: None]}),
        (TypeError, "got EarlyStopping at 0", {"callbacks": [EarlyStopping]}),
        (ValueError, "callbacks: EarlyStopping: monitor: 'loss' is measured in evaluations; give",
         {"callbacks": [EarlyStopping()]}),
    ],
)  # fmt: skip
def test_refusals_come_before_training(error, message, options):
    model = net()
    before, random = state(model), torch.get_rng_state()
    options = dict(options)
    optimizer = options.pop("optimizer", torch.optim.Adam)(lora_parameters(model))
    if "scheduler" in options:
        options["scheduler"] = options["scheduler"](optimizer)
    with pytest.raises(error, match=re.escape(message)):
        train(model, optimizer, criterion=lambda *_: pytest.fail("has begun"), **options)
    assert equal(before, state(model))
    assert torch.equal(random, torch.get_rng_state())


def test_adjust_rank_refuses_what_cannot_go_on():
    model = net()
    before = state(model)
    with pytest.raises(TypeError, match="optimizer: LBFGS holds all parameters in one flat state"):
        adjust_rank(
            model, 4, 2, batched(4), CROSS_ENTROPY, torch.optim.LBFGS(lora_parameters(model))
        )
    with pytest.raises(TypeError, match="callbacks: adjust_rank takes none"):
        adjust_rank(model, 4, 2, batched(4), CROSS_ENTROPY, adam(model), callbacks=[Callback()])
    assert equal(before, state(model))


# --------------------------------------------------------------------------------- packed sequences


class Tagger(nn.Module):
    """Packed sequences to packed sequences of logits."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(6, 5)
        self.out = nn.Linear(5, 3)

    def forward(self, packed):
        hidden, _ = self.lstm(packed)
        return hidden._replace(data=self.out(hidden.data))


def test_packed_sequences():
    torch.manual_seed(0)
    model = add_adaptor_layer(Tagger(), 2)
    lengths = [2, 4, 3]
    x = rnn.pack_padded_sequence(torch.randn(4, 3, 6), lengths, enforce_sorted=False)
    y = rnn.pack_padded_sequence(torch.randint(3, (4, 3)), lengths, enforce_sorted=False)

    def criterion(prediction, targets):
        assert isinstance(prediction, rnn.PackedSequence)
        return CROSS_ENTROPY(prediction.data, targets.data)

    expected = float(criterion(model(x), y).detach())
    assert evaluate_model(model, [(x, y)], criterion) == {"loss": pytest.approx(expected)}
    history = train(model, data=[(x, y)], criterion=criterion)
    assert history.loss == pytest.approx([expected])
    assert history.samples == [3.0]


class Pair(NamedTuple):
    inputs: torch.Tensor
    targets: torch.Tensor


def test_named_tuples_stay_such():
    model, seen = net(), []

    def count(batch):
        seen.append(batch.inputs.shape)
        return len(batch.targets)

    train(model, data=[Pair(*batch) for batch in batched(4)], count=count)
    assert seen == [(4, 6)] * 6


# ------------------------------------------------------------------------------------- evaluations


@pytest.mark.parametrize(
    ("every", "steps"), [(None, [6, 12, 14]), (4, [4, 8, 12, 14]), (7, [7, 14]), (99, [14])]
)
def test_evaluations_come_when_asked_and_at_the_end(every, steps):
    model = net()
    history = train(model, epochs=9, max_steps=14, eval_loader=HELD_OUT, eval_every=every)
    assert [found["step"] for found in history.evaluations] == steps
    assert history.evaluations[-1]["loss"] == evaluate_model(model, HELD_OUT, CROSS_ENTROPY)["loss"]


def accuracy(prediction, targets):
    return (prediction.argmax(-1) == targets).double().mean()


@pytest.mark.parametrize(("goal", "best"), [("loss", min), ("max accuracy", max)])
def test_the_best_adapters_are_kept(goal, best):
    model = net()
    history = train(
        model, adam(model, lr=0.3), epochs=3, eval_loader=HELD_OUT, eval_every=1, keep_best=goal,
        metrics={"accuracy": accuracy},
    )  # fmt: skip
    name = goal.split()[-1]
    values = [found[name] for found in history.evaluations]
    assert values[-1] != best(values)
    after = evaluate_model(model, HELD_OUT, CROSS_ENTROPY, metrics={"accuracy": accuracy})
    assert after[name] == pytest.approx(best(values), rel=1e-12)


def test_adjust_rank_keeps_the_best_of_each_rank():
    model = net()
    report = adjust_rank(
        model, 4, 2, batched(4), CROSS_ENTROPY, adam(model, lr=0.3), eval_loader=HELD_OUT,
        eval_every=1, keep_best="loss", epochs=2,
    )  # fmt: skip
    losses = [found["loss"] for found in report.steps[0].history.evaluations]
    assert len(losses) == 12
    assert report.loss == pytest.approx(min(losses))


def test_tokens_and_samples_per_second():
    model = add_adaptor_layer(llama(), 2)
    history = train(model, data=text_batches(3), criterion=None)
    assert history.tokens == [96] * 3
    assert history.tokens_per_second == pytest.approx(288 / sum(history.seconds))
    assert history.samples_per_second == pytest.approx(12 / sum(history.seconds))
    assert train(net()).tokens_per_second == 0


def test_the_bar_says_how_fast_it_goes(monkeypatch):
    texts = []
    bar = types.SimpleNamespace(
        __enter__=None, update=lambda n=1: None, set_postfix_str=texts.append
    )

    class Bar:
        def __init__(self, **_):
            self.update, self.set_postfix_str = bar.update, bar.set_postfix_str

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setitem(sys.modules, "tqdm.auto", types.SimpleNamespace(tqdm=Bar))
    train_model(net_ := net(), batched(24), CROSS_ENTROPY, adam(net_), progress=True)
    model = add_adaptor_layer(llama(), 2)
    train_model(model, text_batches(1), None, adam(model), progress=True)
    assert re.fullmatch(r"loss \d+\.\d{4}, \d+ samples/s", texts[0])
    assert re.fullmatch(r"loss \d+\.\d{4}, \d+ tokens/s", texts[1])


# ---------------------------------------------------------------------------------------- callbacks


class Log(Callback):
    def __init__(self):
        self.events = []

    def on_start(self, run):
        self.events.append("start")

    def on_step(self, run):
        self.events.append(len(run.history))

    def on_evaluate(self, run):
        self.events.append("evaluate")

    def on_checkpoint(self, run):
        self.events.append("checkpoint")

    def on_end(self, run):
        self.events.append("end")


def test_callbacks_in_order(tmp_path):
    model, log = net(), Log()
    train(
        model, max_steps=4, eval_loader=HELD_OUT, eval_every=2, checkpoint=tmp_path / "file",
        checkpoint_every=3, callbacks=[log],
    )  # fmt: skip
    assert log.events == [
        "start", 1, 2, "evaluate", 3, "checkpoint", 4, "evaluate", "checkpoint", "end"
    ]  # fmt: skip


def test_the_end_is_told_of_a_run_that_fails():
    model, log = net(), Log()
    with pytest.raises(FloatingPointError):
        train(model, sgd(model, lr=1e300), callbacks=[log])
    assert log.events == ["start", 1, "end"]


def test_a_callback_stops_the_run():
    class Stop(Callback):
        def on_step(self, run):
            if len(run.history) == 3:
                run.stop("seen enough")

    history = train(net(), callbacks=[Stop()])
    assert (len(history), history.stopped) == (3, "seen enough")
    assert train(net()).stopped is None


@pytest.mark.parametrize(("patience", "last"), [(1, 4), (2, 5), (3, 9)])
def test_early_stopping(monkeypatch, patience, last):
    losses = iter([5.0, 4.0, 3.0, 3.0, 3.5, 2.0, 2.1, 2.2, 2.3, 1.0, 1.0, 1.0])
    monkeypatch.setattr(
        "lora_kernels.recipes.training.evaluate_model", lambda *_, **__: {"loss": next(losses)}
    )
    history = train(
        net(), epochs=2, eval_loader=HELD_OUT, eval_every=1, callbacks=[EarlyStopping(patience)]
    )
    assert len(history) == last
    assert history.stopped.endswith(f"in {patience} evaluations")


def test_better_by_more_than_asked_and_never_nan():
    loss, accuracy = Goal("loss", 1), Goal("accuracy", -1)
    assert loss.better(5.0, None)
    assert not loss.better(math.nan, None)
    assert loss.better(1.5, 2.0, by=0.25)
    assert not loss.better(1.75, 2.0, by=0.25)
    assert accuracy.better(0.5, 0.25)
    assert not accuracy.better(0.25, 0.5)


@pytest.mark.parametrize(("name", "value"), [("patience", 0), ("patience", 1.5), ("min_delta", -1)])
def test_early_stopping_of_other_arguments(name, value):
    with pytest.raises(ValueError, match=f"{name}: expected "):
        EarlyStopping(**{name: value})


def test_a_table_of_steps(tmp_path):
    file, checkpoint = tmp_path / "log" / "steps.csv", tmp_path / "checkpoint"
    options = {"eval_loader": HELD_OUT, "eval_every": 2}
    train(net(), max_steps=3, checkpoint=checkpoint, callbacks=[CSV(file)], **options)
    history = train(net(), max_steps=6, resume_from=checkpoint, callbacks=[CSV(file)], **options)
    with open(file, newline="") as opened:
        rows = list(csv.DictReader(opened))
    assert [row["step"] for row in rows] == list("123456")
    assert [float(row["loss"]) for row in rows] == history.loss
    assert [float(row["learning_rate"]) for row in rows] == history.learning_rate
    measured = {str(found["step"]): found["loss"] for found in history.evaluations}
    assert {r["step"]: float(r["eval_loss"]) for r in rows if r["eval_loss"]} == measured


def test_tensorboard(monkeypatch, tmp_path):
    scalars, purged = [], []

    class Writer:
        def __init__(self, log_dir, purge_step):
            purged.append(purge_step)

        def add_scalar(self, name, value, step):
            scalars.append((name, value, step))

        def flush(self):
            pass

        def close(self):
            scalars.append("closed")

    fake = types.SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    history = train(net(), eval_loader=HELD_OUT, callbacks=[TensorBoard(tmp_path)])
    assert purged == [1]
    found = [(value, step) for name, value, step in scalars[:-1] if name == "train/loss"]
    assert found == list(zip(history.loss, range(1, 7), strict=True))
    assert ("eval/loss", history.evaluations[0]["loss"], 6) in scalars
    assert scalars[-1] == "closed"
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="TensorBoard: pip install tensorboard"):
        TensorBoard(tmp_path)
