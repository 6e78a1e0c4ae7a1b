"""check_adapters: what acts, what does not and why; the model is left as it was."""

import random
import warnings
from dataclasses import dataclass

import numpy
import peft
import pytest
import torch
from tiny_models import MODELS, build, inputs
from torch import nn
from torch.nn.functional import cross_entropy, linear
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import lora_kernels as lk
from lora_kernels.check import first_step_problems


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.side, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.body(x).relu() + self.side(x))


def adapted(model=None, rank=2, filled=True):
    """Every linear layer, those that are read past too."""
    model = model or Net()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, lk.FusedLoRALinear.from_linear(child, rank))
    if filled:
        for _, parameter in model.named_parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
    return model


X = torch.randn(4, 8, generator=torch.Generator().manual_seed(3))


def problem(model, *args, name="side"):
    report = lk.check_adapters(model, *args)
    assert report.problems.keys() == {name}
    assert not report.ok
    assert f"{name}: {report.problems[name]}" in str(report)
    return report.problems[name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_a_fresh_model_passes(name, dtype):
    model = build(name).to(dtype)
    lk.apply_lora(model, 2)
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs(name).items()}
    report = lk.check_adapters(model, **batch)
    assert report.ok
    assert not report.problems
    assert all(one.calls == 1 and one.merges is True for one in report.adapters)
    # B is zero: A has a gradient, of zero, and that is no fault.
    assert all(a == 0 and b > 0 for a, b in (one.grad_norm for one in report.adapters))
    assert str(report) == f"{len(report.adapters)} of {len(report.adapters)} adapters act"


def test_the_gradient_is_that_of_the_models_own_loss():
    model, batch = build(), inputs()
    lk.apply_lora(model, 2)
    batch["labels"] = batch["input_ids"]
    norms = [one.grad_norm[1] for one in lk.check_adapters(model, **batch).adapters]
    model(**batch).loss.backward()
    expected = [p.grad.norm() for n, p in model.named_parameters() if n.endswith("lora_B")]
    torch.testing.assert_close(torch.tensor(norms), torch.stack(expected))


@pytest.mark.parametrize("fused", [False, True])
def test_peft_models_with_several_adapters(fused):
    config = peft.LoraConfig(target_modules=["q_proj", "up_proj"], r=2)
    model = peft.get_peft_model(build(), config)
    model.add_adapter("second", peft.LoraConfig(target_modules=["q_proj"], r=3))
    model.add_adapter("idle", peft.LoraConfig(target_modules=["q_proj"], r=3))
    model.base_model.set_adapter(["default", "second"])
    if fused:
        lk.fuse_peft(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = lk.check_adapters(model, **inputs())
    assert report.ok
    assert len(report.adapters) == 6
    assert all(one.merges for one in report.adapters)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(getattr(module, "merged", False) for module in model.modules())
    with model.disable_adapter():
        assert "disabled" in next(iter(lk.check_adapters(model, **inputs()).problems.values()))
    model.merge_adapter()
    assert "merged" in next(iter(lk.check_adapters(model, **inputs()).problems.values()))


# ------------------------------------------------------------------------- what does not act


class Uncalled(Net):
    def forward(self, x):
        return self.head(self.body(x))


class ReadPast(Net):
    def forward(self, x):
        return self.head(self.body(x)) + linear(x, self.side.weight)[:, :5]


class Unused(Net):
    def forward(self, x):
        self.side(x)
        return self.head(self.body(x))


class Detached(Net):
    def forward(self, x):
        return self.head(self.body(x) + self.side(x).detach())


class WithoutGradients(Net):
    def forward(self, x):
        with torch.no_grad():
            side = self.side(x)
        return self.head(self.body(x) + side)


class Reentrant(Net):
    def forward(self, x):
        return self.head(self.body(x) + checkpoint(self.side, x, use_reentrant=True))


class _Reversible(torch.autograd.Function):
    """Runs the layer again in the backward, as reversible layers do."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        ctx.save_for_backward(x)
        return layer(x)

    @staticmethod
    def backward(ctx, grad):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            ctx.layer(x).backward(grad)
        return x.grad, None


class Reversible(Net):
    def forward(self, x):
        return self.head(self.body(x) + _Reversible.apply(x, self.side))


class NoRows(Net):
    def forward(self, x):
        return self.head(self.body(x)) + self.side(x[:0]).sum()


class TimesZero(Net):
    def forward(self, x):
        return self.head(self.body(x) + 0 * self.side(x))


class PartlyPast(Net):
    def forward(self, x):
        hidden = self.body(x) + self.side(x)
        return self.head(hidden + x @ self.side.weight.t())


class SlightlyPast(Net):
    def forward(self, x):
        return self.head(self.body(x) + self.side(x) + 0.01 * linear(x, self.side.weight))


class PastInEval(Net):
    def forward(self, x):
        side = self.side(x) if self.training else linear(x, self.side.weight)
        return self.head(self.body(x) + side)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Uncalled, "never called in this batch"),
        (ReadPast, "never called: ReadPast.forward reads its weight past the layer"),
        (Unused, "does not reach the loss"),
        (Detached, "does not reach the loss"),
        (WithoutGradients, "under no_grad"),
        (Reentrant, "reentrant activation checkpoint"),
        (Reversible, "a reversible layer) whose inputs need no gradient"),
        (NoRows, "no rows in this batch"),
        (TimesZero, "exactly zero"),
        (PartlyPast, "merging it changes the output: PartlyPast.forward reads its weight"),
        (SlightlyPast, "merging it changes the output: SlightlyPast.forward reads its weight"),
        (PastInEval, "merging it changes the output: PastInEval.forward reads its weight"),
    ],
)
@pytest.mark.parametrize("filled", [False, True])
def test_what_does_not_act_is_named_with_the_reason(kind, reason, filled):
    assert reason in problem(adapted(kind(), filled=filled), X)


class Magnifies(Net):
    """Of a rounding in its last place the output moves by many thousands of them."""

    def forward(self, x):
        hidden = self.body(x) + self.side(x)
        return self.head(torch.sin(1e4 * hidden / hidden.detach().abs().max()))


def test_rounding_that_the_model_magnifies_is_no_bypass():
    torch.manual_seed(0)
    report = lk.check_adapters(adapted(Magnifies(), filled=True), X)
    assert report.ok, report
    assert all(one.merges for one in report.adapters)


def test_a_reversible_layer_acts_where_its_inputs_have_gradients():
    model = adapted(Reversible(), filled=True)
    assert lk.check_adapters(model, X.clone().requires_grad_()).ok


def frozen(layer):
    layer.lora_A.requires_grad_(False)


def without_A(layer):
    nn.init.zeros_(layer.lora_A)
    nn.init.zeros_(layer.lora_B)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda layer: layer.merge(), "is merged"),
        (lambda layer: setattr(layer, "_disabled", True), "is disabled"),
        (frozen, "is frozen"),
        (without_A, "both zero"),
        (lambda layer: setattr(layer, "alpha", 0.0), "scaling is 0"),
    ],
)
def test_states_that_cannot_train_are_named(change, reason):
    model = adapted()
    change(model.side)
    assert reason in problem(model, X)


def test_gradients_that_are_not_finite_are_named():
    report = lk.check_adapters(adapted(), X * float("nan"))
    assert len(report.problems) == 3
    assert str(report).count("not finite, as the loss is") == 1  # equal reasons on one line


def test_an_encoder_layer_of_peft_is_bypassed_in_eval():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    config = peft.LoraConfig(target_modules=["linear1"], r=2)
    model = peft.get_peft_model(layer, config).eval().base_model.model
    reason = problem(model, torch.randn(2, 3, 8), name="linear1.default")
    assert "never called: in eval mode TransformerEncoderLayer's fast path" in reason
    model.train()
    reason = problem(model, torch.randn(2, 3, 8), name="linear1.default")
    assert "acts, but merging it changes the output: in eval mode TransformerEncoder" in reason


@dataclass
class Output:
    first: torch.Tensor
    rest: dict


class Structured(Net):
    def forward(self, x):
        return Output(self.body(x), {"a": [self.side(x)], "b": (self.head(x), 3, None)})


def test_every_floating_tensor_of_an_output_counts():
    assert lk.check_adapters(adapted(Structured()), X).ok


def test_a_tied_weight_is_not_merged():
    model = adapted()
    model.copy = nn.Linear(8, 8)
    model.copy.weight = model.side.weight
    merges = {one.name: one.merges for one in lk.check_adapters(model, X).adapters}
    assert merges == {"body": True, "side": None, "head": True}


# -------------------------------------------------------------------------- nothing is left behind


class Stateful(Net):
    """Batch norm, dropout, a counter, a buffer that is replaced; fails if told to."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(8), nn.Dropout(0.5)
        self.register_buffer("last", torch.zeros(3))
        self.steps, self.fails_at = 0, None

    def forward(self, x):
        self.steps += 1
        self.last = torch.full((3,), float(self.steps))
        random.random(), numpy.random.rand()
        if self.steps == self.fails_at or (self.fails_at == "eval" and not self.training):
            raise RuntimeError("told to fail")
        return self.head(self.drop(self.norm(self.body(x))) + self.side(x))


@pytest.mark.parametrize("fails_at", [None, 1, "eval"])
def test_everything_is_as_it_was(fails_at):
    model, x = adapted(Stateful()), X.clone().requires_grad_()
    model.fails_at = fails_at
    model.side.eval()
    model.body.lora_A.grad = torch.ones_like(model.body.lora_A)
    model.body.lora_A.grad[0, 0] = -0.0
    x.grad = torch.ones_like(x)
    stepped, grads = [], [p.grad for p in (*model.parameters(), x)]
    model.head.lora_B.register_post_accumulate_grad_hook(stepped.append)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    tensors = {id(t) for t in (*model.parameters(), *model.buffers())}
    members = [(m, dict(vars(m)), m.training) for m in model.modules()]
    draws = [torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()]
    pointers = [p.data_ptr() for p in model.parameters()]
    if fails_at is None:
        assert lk.check_adapters(model, x).ok
    else:
        with pytest.raises(RuntimeError, match="told to fail"):
            lk.check_adapters(model, x)
    after = model.state_dict()
    assert all(torch.equal(t, state[n]) for n, t in after.items())
    assert after.keys() == state.keys()
    assert {id(t) for t in (*model.parameters(), *model.buffers())} == tensors
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert all(
        a is b for a, b in zip(grads, [p.grad for p in (*model.parameters(), x)], strict=True)
    )
    assert x.grad.eq(1).all()
    assert model.body.lora_A.grad.abs().sum() == 15
    assert all(vars(m) == members and m.training == mode for m, members, mode in members)
    assert torch.equal(torch.get_rng_state(), draws[0])
    assert random.getstate() == draws[1]
    assert numpy.random.get_state()[1].tolist() == draws[2]
    assert not stepped  # an optimizer that steps within the backward must not
    model.steps, model.fails_at = 0, None
    model(x).sum().backward()
    assert len(stepped) == 1  # the hook is there again


def test_models_that_cannot_be_checked_are_refused():
    with pytest.raises(ValueError, match="Net has no LoRA layer; call apply_lora"):
        lk.check_adapters(Net(), X)
    with pytest.raises(ValueError, match=r"body\.weight is on the meta device"):
        lk.check_adapters(adapted().to("meta"), X)

    class Integers(Net):
        def forward(self, x):
            return super().forward(x).argmax(-1)

    with pytest.raises(ValueError, match="holds no floating tensor"):
        lk.check_adapters(adapted(Integers()), X)


# -------------------------------------------------------------------------------------- train_model


def train(model, optimizer=None, **options):
    data = [(X, torch.tensor([0, 1, 2, 3]))] * 4
    optimizer = optimizer or torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        options = {"progress": False, "max_steps": 2, **options}
        lk.train_model(model, data, cross_entropy, optimizer, **options)
    return [str(one.message) for one in caught]


@pytest.mark.parametrize("options", [{}, {"accumulation_steps": 2}])
def test_training_a_healthy_model_warns_of_nothing(options):
    assert not train(adapted(filled=False), **options)
    partly = adapted()
    partly.side.lora_A.requires_grad_(False)
    partly.side.lora_B.requires_grad_(False)
    assert not train(partly)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [(Uncalled, "no rows in this step"), (ReadPast, "ReadPast.forward reads its weight past")],
)
def test_training_warns_once_of_adapters_without_a_gradient(kind, reason):
    (message,) = train(adapted(kind()))
    assert "1 adapters did not train" in message
    assert "check_adapters" in message
    assert "side: got no gradient: " in message
    assert reason in message
    assert "body" not in message


def test_training_warns_of_adapters_that_the_optimizer_does_not_hold():
    model = adapted()
    held = [p for name, p in model.named_parameters() if "side" not in name]
    (message,) = train(model, torch.optim.AdamW(held))
    assert "side: is not in the optimizer" in message


def test_a_resumed_run_warns_too(tmp_path):
    model, path = adapted(Uncalled()), tmp_path / "run.pt"
    assert len(train(model, checkpoint=path)) == 1
    assert len(train(adapted(Uncalled()), resume_from=path, max_steps=3)) == 1


def test_pruned_and_parametrized_adapters_act():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    lk.apply_lora(model, 2)
    model[0].reset_lora_parameters()
    prune.l1_unstructured(model[0], "lora_A", amount=0.5)
    parametrizations.weight_norm(model[2], "lora_A")
    report = lk.check_adapters(model, torch.randn(5, 8))
    assert report.ok, report
    assert all(adapter.grad_norm[1] > 0 for adapter in report.adapters)
    optimizer = torch.optim.SGD(lk.lora_parameters(model), lr=0.1)
    model(torch.randn(5, 8)).sum().backward()
    assert first_step_problems(model, optimizer) == {}


def test_names_are_the_plain_models():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    lk.apply_lora(model, 2)
    wrapped = nn.DataParallel(torch.compile(model, backend="eager"))
    assert [a.name for a in lk.check_adapters(wrapped, torch.randn(3, 8)).adapters] == ["0", "1"]


class _Consuming(nn.Module):
    """Takes its batch out of the dictionary, changes it in place and keeps it."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.seen = []

    def forward(self, batch):
        x = batch.pop("x")
        x.mul_(2)
        self.seen.append(x)
        return self.layer(x)


def test_the_batch_and_attributes_are_left_as_they_were():
    model, x = _Consuming(), torch.randn(3, 8)
    lk.apply_lora(model, 2)
    batch, before = {"x": x}, x.clone()
    report = lk.check_adapters(model, batch)
    assert report.ok, report
    assert report.adapters[0].merges
    assert batch["x"] is x
    assert torch.equal(x, before)
    assert model.seen == []


def test_a_consumed_generator_is_not_compared():
    class Summing(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, rows):
            return sum(map(self.layer, rows))

    model = Summing()
    lk.apply_lora(model, 2)
    report = lk.check_adapters(model, iter([torch.randn(8), torch.randn(8)]))
    assert report.ok
    assert report.adapters[0].merges is None


def test_within_inference_mode():
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(3, 8)
    lk.apply_lora(model, 2)
    with torch.inference_mode():
        assert lk.check_adapters(model, x).ok


def test_an_optimizer_that_leaves_out_zero_factors():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    lk.apply_lora(model, 2)
    model(torch.randn(3, 8)).sum().backward()
    found = first_step_problems(model, torch.optim.SGD([m.lora_A for m in model], lr=0.1))
    assert found.keys() == {"0", "1"}
    assert found["0"].startswith("lora_B is zero and is not trained")
    assert not first_step_problems(model, torch.optim.SGD([m.lora_B for m in model], lr=0.1))


def test_buffers_that_a_forward_resizes_are_restored():
    class Observed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)
            self.register_buffer("least", torch.empty(0))

        def forward(self, x):
            self.least.resize_(x.shape[1:]).copy_(x.amin(0))
            return self.inner(x)

    model = Observed()
    least = model.least
    lk.apply_lora(model, 2)
    assert lk.check_adapters(model, torch.randn(3, 4)).ok
    assert model.least is least
    assert least.shape == (0,)


def test_an_uncalled_layer_whose_weight_is_read_in_a_way_that_sources_do_not_show():
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return linear(self.other(x), getattr(self.inner, "wei" + "ght"))

    model = Hidden()
    lk.apply_lora(model, 2)
    problems = lk.check_adapters(model, torch.randn(3, 4)).problems
    assert list(problems) == ["inner"]
    assert problems["inner"].startswith("was never called, and merging it changes the output")
