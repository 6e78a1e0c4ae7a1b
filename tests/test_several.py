"""Several adapters of a model by name: in use, together, and each on its own rows of a batch."""

import copy
import functools
import pickle
from itertools import combinations

import pytest
import torch
import torch.utils.checkpoint
from tiny_models import build, inputs
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import lora_kernels as lk

# An adapter's name, and what it is made with.
TENANTS = {
    "ann": {"rank": 4, "alpha": 8},
    "bob": {"rank": 2, "alpha": 6, "use_rslora": True},
    "eve": {"rank": 3},
}


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 6))


def tenants(model, names=TENANTS, **options):
    for name in names:
        lk.add_adapter(model, name, init="random", **{**TENANTS[name], **options})
    return model


def alone(model, name):
    """A copy of the model with this adapter as its only one."""
    model = copy.deepcopy(model)
    for other in lk.adapter_names(model):
        if other != name:
            lk.delete_adapter(model, other)
    lk.set_adapter(model, name)
    return model


def delta(layer, name):
    adapter = layer.adapter(name)
    return adapter.scaling * adapter.lora_B @ adapter.lora_A


@pytest.fixture
def model():
    return tenants(mlp())


@pytest.fixture
def x():
    return torch.randn(6, 5, 12, generator=torch.Generator().manual_seed(2))


# ----------------------------------------------------------------------------------- which is used


def test_the_first_is_in_use_and_the_others_wait(x):
    plain = mlp()
    model = tenants(mlp(), ["ann"])
    one = model(x)
    assert not torch.equal(one, plain(x))
    tenants(model, ["bob", "eve"])
    assert lk.adapter_names(model) == ("ann", "bob", "eve")
    assert torch.equal(model(x), one)


@pytest.mark.parametrize("rows", [1, 200])  # past the op on the CPU, and by it
@pytest.mark.parametrize("names", [n for k in (1, 2, 3) for n in combinations(TENANTS, k)])
def test_those_in_use_add_up(model, names, rows):
    x = torch.randn(rows, 12)
    lk.set_adapter(model, names)
    expected = x
    for layer in model:
        if isinstance(layer, nn.ReLU):
            expected = expected.relu()
            continue
        weight = layer.weight + sum(delta(layer, name) for name in names)
        expected = F.linear(expected, weight, layer.bias)
    y = model(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    parameters = list(lk.lora_parameters(model))
    dy = torch.randn_like(y)
    ours = torch.autograd.grad(y, parameters, dy, allow_unused=True)
    theirs = torch.autograd.grad(expected, parameters, dy, allow_unused=True)
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 200])
def test_none_in_use_is_the_base(model, rows):
    x = torch.randn(rows, 12)
    lk.set_adapter(model, None)
    torch.testing.assert_close(model(x), mlp()(x))
    with lk.disable_adapters(model):
        torch.testing.assert_close(model(x), mlp()(x))


def test_adapters_may_stand_on_different_layers(x):
    model = mlp()
    lk.add_adapter(model, "ann", 4, init="random", target_modules=["0"])
    lk.add_adapter(model, "bob", 2, init="random", target_modules=["2"])
    assert [model[i].names for i in (0, 2)] == [("ann",), ("bob",)]
    base, both = mlp(), {}
    for names in ("ann", "bob", ["ann", "bob"]):
        lk.set_adapter(model, names)
        both[str(names)] = model(x)
    hidden = F.linear(x, model[0].weight + delta(model[0], "ann"), model[0].bias).relu()
    torch.testing.assert_close(both["ann"], base[2](hidden))
    last = F.linear(hidden, model[2].weight + delta(model[2], "bob"), model[2].bias)
    torch.testing.assert_close(both["['ann', 'bob']"], last)
    lk.delete_adapter(model, "bob")
    assert type(model[2]) is nn.Linear
    assert not model[2].weight.requires_grad
    lk.set_adapter(model, "ann")
    assert torch.equal(model(x), both["ann"])
    # By default a further one goes where there are others.
    assert lk.add_adapter(model, "eve", 2).replaced == ["0"]
    assert lk.add_adapter(model, "all", 2, target_modules="all-linear").replaced == ["0", "2"]
    assert model[2].active == ()


def test_apply_lora_calls_its_adapter_default():
    model = mlp()
    lk.apply_lora(model, 2)
    assert lk.adapter_names(model) == ("default",)
    lk.add_adapter(model, "other", 3)
    keys = {f"{i}.{k}" for i in (0, 2) for k in ("lora_A", "lora_B")}
    others = {f"{i}.adapters.other.{k}" for i in (0, 2) for k in ("lora_A", "lora_B")}
    assert set(lk.lora_state_dict(model)) == keys | others
    assert keys | others < set(model.state_dict())


def test_a_lora_config_makes_a_further_one(x):
    peft = pytest.importorskip("peft")
    model = tenants(mlp(), ["ann"])
    config = peft.LoraConfig(r=3, lora_alpha=9, target_modules=["0"], lora_dropout=0.25)
    assert lk.add_adapter(model, "bob", config).replaced == ["0"]
    bob = model[0].adapter("bob")
    assert (bob.rank, bob.scaling, bob.dropout) == (3, 3.0, 0.25)


def test_parameters_of_one(model):
    of = {name: set(lk.lora_parameters(model, adapter=name)) for name in TENANTS}
    assert all(len(one) == 4 for one in of.values())
    assert set.union(*of.values()) == set(lk.lora_parameters(model))
    assert {p for p in model.parameters() if p.requires_grad} == set(lk.lora_parameters(model))


def test_a_further_one_leaves_what_is_trained_as_it_is(model):
    model[0].lora_A.requires_grad_(False)
    model[2].bias.requires_grad_(True)
    lk.add_adapter(model, "more", 2)
    assert not model[0].lora_A.requires_grad
    assert model[2].bias.requires_grad
    assert all(p.requires_grad for p in lk.lora_parameters(model, adapter="more"))


def test_train_mode_goes_with_the_model(x):
    model = tenants(mlp(), dropout=0.5)
    lk.set_adapter(model, ["ann", "bob"])
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


# ------------------------------------------------------------------------------------- taking out


@pytest.mark.parametrize("gone", TENANTS)
def test_deleting_one_leaves_the_others_as_they_were(model, x, gone):
    kept = [name for name in TENANTS if name != gone]
    before = {}
    for name in kept:
        lk.set_adapter(model, name)
        before[name] = model(x)
    parameters = {name: list(lk.lora_parameters(model, adapter=name)) for name in kept}
    lk.delete_adapter(model, gone)
    assert lk.adapter_names(model) == tuple(kept)
    for name in kept:
        lk.set_adapter(model, name)
        assert torch.equal(model(x), before[name])
        after = lk.lora_parameters(model, adapter=name)
        assert all(a is b for a, b in zip(after, parameters[name], strict=True))
    assert "lora_A" in model[0]._parameters


def test_deleting_the_one_in_use_leaves_the_base(model, x):
    lk.delete_adapter(model, "ann")
    assert model[0].active == ()
    torch.testing.assert_close(model(x), mlp()(x))


def test_deleting_the_last_gives_the_plain_model(x):
    model = tenants(mlp())
    for name in TENANTS:
        lk.delete_adapter(model, name)
    assert all(type(layer) in (nn.Linear, nn.ReLU) for layer in model)
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(model(x), mlp()(x))
    assert set(model.state_dict()) == set(mlp().state_dict())


def test_remove_lora_takes_all_of_them_out(model, x):
    lk.remove_lora(model)
    assert all(type(layer) in (nn.Linear, nn.ReLU) for layer in model)
    assert all(p.requires_grad for p in model.parameters())
    assert "adapters" not in model[0]._modules
    assert torch.equal(model(x), mlp()(x))


# ------------------------------------------------------------------------------------------- states


def test_a_state_dict_round_trip(model, x):
    lk.set_adapter(model, ["bob", "eve"])
    other = tenants(mlp())
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    other.load_state_dict(model.state_dict())
    lk.set_adapter(other, ["bob", "eve"])
    assert torch.equal(other(x), model(x))


def test_states_of_one_adapter_and_of_the_base_go_on_loading(model, x):
    single = tenants(mlp(), ["ann"])
    with torch.no_grad():
        for p in single.parameters():
            p.mul_(2)
    kept = model[0].adapter("bob").lora_A.clone()
    model.load_state_dict(single.state_dict())
    assert torch.equal(model(x), single(x))
    assert torch.equal(model[0].adapter("bob").lora_A, kept)
    model.load_state_dict(mlp().state_dict())
    lk.set_adapter(model, None)
    torch.testing.assert_close(model(x), mlp()(x))


def test_half_an_adapter_is_an_error(model):
    state = model.state_dict()
    del state["0.adapters.bob.lora_B"]
    with pytest.raises(RuntimeError, match=r"Missing.*0\.adapters\.bob\.lora_B"):
        model.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Unexpected.*0\.adapters\.bob\.lora_A"):
        tenants(mlp(), ["ann"]).load_state_dict(state)


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "file"]
)
def test_copies(model, x, again):
    lk.set_adapter(model, ["bob"])
    with lk.adapter_rows(model, ["ann"] * 6), lk.disable_adapters(model):
        other = again(model)
    assert torch.equal(other(x), model(x))
    assert lk.adapter_names(other) == tuple(TENANTS)


def test_the_printed_layer_says_which():
    model = tenants(mlp())
    text = str(model)
    assert "adapters=ann, bob, eve, active=ann" in text
    assert "(bob): NamedAdapter(rank=2, scaling=4.24264" in text


# -------------------------------------------------------------------------------------------- files


def test_files_of_one_of_several(model, x, tmp_path):
    outputs = {}
    for name in TENANTS:
        lk.save_adapter(model, tmp_path / name, adapter=name)
        lk.set_adapter(model, name)
        outputs[name] = model(x)
    service = mlp()
    for name in ("eve", "ann", "bob"):
        lk.load_adapter(service, tmp_path / name, adapter=name)
    assert lk.adapter_names(service) == ("eve", "ann", "bob")
    assert torch.equal(service(x), outputs["eve"])
    for name, y in outputs.items():
        lk.set_adapter(service, name)
        assert torch.equal(service(x), y)
        assert service[0].adapter(name).scaling == model[0].adapter(name).scaling
    # Other values for one that is there.
    with torch.no_grad():
        for p in lk.lora_parameters(service, adapter="ann"):
            p.zero_()
    lk.load_adapter(service, tmp_path / "ann", adapter="ann")
    lk.set_adapter(service, "ann")
    assert torch.equal(service(x), outputs["ann"])


def test_the_one_in_use_is_saved(model, x, tmp_path):
    lk.set_adapter(model, "bob")
    lk.save_adapter(model, tmp_path)
    plain = mlp()
    lk.load_adapter(plain, tmp_path)
    assert lk.adapter_names(plain) == ("default",)
    assert torch.equal(plain(x), model(x))
    for names in (["ann", "bob"], None):
        lk.set_adapter(model, names)
        with pytest.raises(ValueError, match="adapter: the model has 'ann', 'bob', 'eve', in use"):
            lk.save_adapter(model, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_peft_reads_them(tmp_path):
    peft = pytest.importorskip("peft")
    model = tenants(build("llama"), target_modules=["q_proj", "down_proj"])
    tokens = inputs("llama")["input_ids"]
    theirs = build("llama")
    for name in TENANTS:
        lk.save_adapter(model, tmp_path / name, adapter=name)
        if isinstance(theirs, peft.PeftModel):
            theirs.load_adapter(str(tmp_path / name), name)
        else:
            theirs = peft.PeftModel.from_pretrained(theirs, str(tmp_path / name), name)
    for name in TENANTS:
        lk.set_adapter(model, name)
        theirs.set_adapter(name)
        torch.testing.assert_close(model(tokens).logits, theirs(tokens).logits)


def test_loading_says_what_is_wrong(model, tmp_path):
    lk.save_adapter(model, tmp_path / "ann", adapter="ann")
    with pytest.raises(ValueError, match="adapter: the model has several, 'ann', 'bob', 'eve'"):
        lk.load_adapter(model, tmp_path / "ann")
    with pytest.raises(ValueError, match="has rank 4, the model's layer has rank 2"):
        lk.load_adapter(model, tmp_path / "ann", adapter="bob")
    lk.merge_lora(model)
    with pytest.raises(ValueError, match="is merged"):
        lk.load_adapter(model, tmp_path / "ann", adapter="more")
    lk.unmerge_lora(model)
    assert lk.adapter_names(model) == tuple(TENANTS)


def test_a_failed_load_leaves_no_trace(model, x, tmp_path):
    wide = tenants(nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 7)), ["ann"])
    lk.save_adapter(wide, tmp_path)
    before, y = set(model.state_dict()), model(x)
    with pytest.raises(ValueError, match="expected"):
        lk.load_adapter(model, tmp_path, adapter="more")
    assert set(model.state_dict()) == before
    assert torch.equal(model(x), y)
    assert lk.adapter_names(model) == tuple(TENANTS)


# ------------------------------------------------------------------------------------------- merged


def test_those_in_use_are_merged(model, x):
    lk.set_adapter(model, ["ann", "eve"])
    y, weight = model(x), model[0].weight.detach().clone()
    expected = lk.merged_state_dict(model)["0.weight"]
    lk.merge_lora(model)
    assert torch.equal(model[0].weight, expected)
    torch.testing.assert_close(model(x), y)
    for change in (
        lambda: lk.set_adapter(model, "ann"),
        lambda: lk.delete_adapter(model, "bob"),
        lambda: lk.add_adapter(model, "more", 2),
        lambda: lk.adapter_rows(model, ["ann"]).__enter__(),
    ):
        with pytest.raises((ValueError, RuntimeError), match="merged"):
            change()
    assert model[0].names == tuple(TENANTS)
    lk.unmerge_lora(model)
    assert torch.equal(model[0].weight, weight)
    assert torch.equal(model(x), y)


def test_a_merge_for_good_takes_no_base_from_others(model, x):
    with pytest.raises(ValueError, match="not in use, 'bob', 'eve'"):
        lk.merge_lora(model, keep_base=False)
    lk.set_adapter(model, ["ann", "bob", "eve"])
    y = model(x)
    lk.merge_lora(model, keep_base=False)
    lk.remove_lora(model)
    torch.testing.assert_close(model(x), y)


def test_a_merged_state_of_several(model, x):
    lk.set_adapter(model, ["ann", "bob"])
    lk.merge_lora(model)
    state = copy.deepcopy(model.state_dict())
    other = tenants(mlp())
    lk.set_adapter(other, ["ann", "bob"])
    other.load_state_dict(state)
    assert torch.equal(other(x), model(x))
    lk.unmerge_lora(other)
    lk.unmerge_lora(model)
    assert torch.equal(other(x), model(x))
    lk.merge_lora(model)
    with pytest.raises(RuntimeError, match="carries several adapters; call unmerge_lora"):
        model.load_state_dict(other.state_dict())


# ------------------------------------------------------------------------------- rows of a batch

NAMES = ["bob", None, "ann", "bob", "eve", "ann"]


@pytest.mark.parametrize("names", [NAMES, ["bob"] * 6, [None] * 6, sorted(map(str, NAMES))])
def test_rows_are_those_of_each_alone(model, x, names):
    names = [None if name == "None" else name for name in names]
    with lk.adapter_rows(model, names):
        y = model(x)
    for name in dict.fromkeys(names):
        here = [i for i, other in enumerate(names) if other == name]
        lk.set_adapter(model, name)
        torch.testing.assert_close(y[here], model(x)[here])
        if name is None:
            assert torch.equal(y[here], mlp()(x)[here])


def test_layers_that_lack_some_of_the_adapters(x):
    model = mlp()
    lk.add_adapter(model, "ann", 4, init="random", target_modules=["0"])
    lk.add_adapter(model, "bob", 2, init="random", target_modules=["0", "2"])
    groups = lk.Groups.from_rows([i % 3 - 1 for i in range(30)], 2)
    rows = {
        "ann": [i for i in range(30) if i % 3 == 1],
        "bob": [i for i in range(30) if i % 3 == 2],
    }
    flat = x.reshape(30, 12)
    with lk.adapter_rows(model, groups):
        mixed = model(flat)
    with lk.adapter_rows(model, groups, table=["bob", "ann"]):
        turned = model(flat)
    with lk.adapter_rows(model, ["ann", "bob"] * 3):
        named = model(x)
    for name, here in rows.items():
        other = next(n for n in rows if n != name)
        lk.set_adapter(model, name)
        torch.testing.assert_close(mixed[here], model(flat)[here])
        samples = [0, 2, 4] if name == "ann" else [1, 3, 5]
        torch.testing.assert_close(named[samples], model(x)[samples])
        lk.set_adapter(model, other)
        torch.testing.assert_close(turned[here], model(flat)[here])
    assert torch.equal(mixed[::3], mlp()(flat)[::3])


def test_disabled_within(model, x):
    with lk.adapter_rows(model, NAMES), lk.disable_adapters(model):
        torch.testing.assert_close(model(x), mlp()(x))


def test_contexts_nest_and_end(model, x):
    outside = model(x)
    with lk.adapter_rows(model, ["bob"] * 6):
        bob = model(x)
        with lk.adapter_rows(model, ["eve"] * 6):
            assert not torch.equal(model(x), bob)
        assert torch.equal(model(x), bob)
        with pytest.raises(ZeroDivisionError), lk.adapter_rows(model, ["eve"] * 6):
            raise ZeroDivisionError
        assert torch.equal(model(x), bob)
    assert torch.equal(model(x), outside)


def gradients(model, adapter):
    return [p.grad for p in lk.lora_parameters(model, adapter=adapter)]


def test_training_gives_each_the_gradient_of_its_own_rows(model, x):
    names = ["bob", None, "ann", "bob", None, "ann"]
    dy = torch.randn(6, 5, 6)
    with lk.adapter_rows(model, names):
        y = model(x)
    y.backward(dy)
    for name in ("ann", "bob"):
        here = [i for i, other in enumerate(names) if other == name]
        single = alone(model, name)
        single.zero_grad()
        single(x[here]).backward(dy[here])
        for ours, theirs in zip(gradients(model, name), gradients(single, name), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert gradients(model, "eve") == [None] * 4


def test_an_optimizer_leaves_absent_tenants_alone(model, x):
    optimizer = torch.optim.AdamW(lk.lora_parameters(model), weight_decay=0.5)
    before = {
        name: [p.clone() for p in lk.lora_parameters(model, adapter=name)] for name in TENANTS
    }
    with lk.adapter_rows(model, ["ann", "bob"] * 3):
        model(x).square().sum().backward()
    optimizer.step()
    for name in TENANTS:
        moved = [
            not torch.equal(p, old)
            for p, old in zip(lk.lora_parameters(model, adapter=name), before[name], strict=True)
        ]
        assert moved == [name != "eve"] * 4


def two_batches(model, x, forward, backwards):
    """The gradients of batches with other rows, computed before both backwards."""
    batches = (["ann", "bob"] * 3, ["eve", "ann", "ann", "bob", None, None])
    losses = []
    for names in batches:
        with lk.adapter_rows(model, names):
            losses.append(forward(model, x).square().sum())
    losses.append(forward(model, x).sum())  # by the one in use
    backwards(model, losses)
    return [None if p.grad is None else p.grad.clone() for p in lk.lora_parameters(model)]


def one_after_the_other(model, losses):
    for loss in losses:
        loss.backward()


def last_first(model, losses):
    for loss in reversed(losses):
        loss.backward()


def within_another(model, losses):
    with lk.adapter_rows(model, ["eve"] * 6):
        last_first(model, losses)


def plainly(model, x):
    return model(x)


def checkpointed(model, x, how=checkpoint, **options):
    return how(model, x.clone().requires_grad_(), **options)


def nested(model, x, **options):
    def inner(x):
        return checkpoint(model[2], checkpoint(model[0], x, **options).relu(), **options)

    return checkpoint(inner, x.clone().requires_grad_(), **options)


# `checkpoint` was imported by this name before any context was entered.
WAYS = {
    f"{way.__name__}-{kind}": functools.partial(way, use_reentrant=kind == "reentrant")
    for way in (checkpointed, nested)
    for kind in ("reentrant", "other")
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("backwards", [one_after_the_other, last_first, within_another])
@pytest.mark.parametrize("way", ["plainly", *WAYS])
def test_two_forwards_before_two_backwards(x, way, backwards):
    expected = two_batches(tenants(mlp()), x, plainly, one_after_the_other)
    found = two_batches(tenants(mlp()), x, WAYS.get(way, plainly), backwards)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_checkpointing_is_as_before_after_it():
    before = vars(torch.utils.checkpoint).copy()
    model = tenants(mlp())
    with lk.adapter_rows(model, ["ann"]), lk.adapter_rows(model, ["bob"]):
        assert torch.utils.checkpoint.CheckpointFunction is not before["CheckpointFunction"]
    assert vars(torch.utils.checkpoint) == before


@pytest.mark.parametrize("reentrant", [True, False])
def test_dropout_falls_alike_when_computed_again(x, reentrant):
    found = []
    for forward in (plainly, functools.partial(checkpointed, use_reentrant=reentrant)):
        model = tenants(mlp(), dropout=0.5)
        torch.manual_seed(3)
        with lk.adapter_rows(model, NAMES):
            loss = forward(model, x).square().sum()
        loss.backward()
        found.append([p.grad for p in lk.lora_parameters(model)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("options", [{}, {"use_reentrant": True}, {"use_reentrant": False}])
def test_training_a_transformers_model(options):
    model = tenants(build("llama")).train()
    plain = tenants(build("llama")).train()
    if options:
        model.gradient_checkpointing_enable(options)
        model.enable_input_require_grads()
    tokens = inputs("llama", rows=3)["input_ids"]
    for one in (model, plain):
        for names in (["ann", "bob", None], ["bob", "bob", "ann"]):
            with lk.adapter_rows(one, names):
                loss = one(tokens, labels=tokens).loss
            loss.backward()
    assert gradients(plain, "eve") == gradients(model, "eve") == [None] * 28
    for name in ("ann", "bob"):
        for ours, theirs in zip(gradients(model, name), gradients(plain, name), strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"use_cache": False}])
def test_generation(how):
    model = tenants(build("llama"))
    model.generation_config.pad_token_id = 0
    tokens = inputs("llama", rows=4)["input_ids"]
    names = ["eve", "ann", None, "bob"]
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **how}
    with lk.adapter_rows(model, names):
        mixed = model.generate(tokens, **options)
    for i, name in enumerate(names):
        lk.set_adapter(model, name)
        assert torch.equal(model.generate(tokens[i : i + 1], **options)[0], mixed[i])
    assert len({tuple(row.tolist()) for row in mixed}) == 4


@pytest.mark.parametrize("how", ["names", "groups"])
def test_compiled_once_for_all_contents(model, x, how):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    numbers = {None: -1, "ann": 0, "bob": 1, "eve": 2}
    for names in (NAMES, ["ann"] * 6, [None, "eve", "eve", "bob", "ann", None]):
        rows = names
        if how == "groups":
            each = [numbers[name] for name in names for _ in range(5)]
            rows = lk.Groups.from_rows(each, 3)
        with lk.adapter_rows(model, rows):
            expected = model(x)
            model.zero_grad()
            expected.square().sum().backward()
            theirs = [p.grad for p in lk.lora_parameters(model)]
            model.zero_grad()
            y = compiled(x)
        y.square().sum().backward()  # outside
        torch.testing.assert_close(y, expected)
        for p, grad in zip(lk.lora_parameters(model), theirs, strict=True):
            wanted = torch.zeros_like(p) if grad is None else grad
            torch.testing.assert_close(p.grad, wanted, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("name", "error"),
    [(3, TypeError), ("", ValueError), ("a.b", ValueError), ("keys", ValueError)],
)
def test_names_that_no_adapter_can_have(model, name, error):
    with pytest.raises(error, match="name: "):
        lk.add_adapter(model, name, 2)


def test_unknown_and_double_names(model, x):
    y = model(x)
    known = "got 'mal', the model's adapters are 'ann', 'bob', 'eve'"
    for call in (
        lambda: lk.set_adapter(model, "mal"),
        lambda: lk.set_adapter(model, ["ann", "mal"]),
        lambda: lk.delete_adapter(model, "mal"),
        lambda: list(lk.lora_parameters(model, adapter="mal")),
        lambda: lk.save_adapter(model, "nowhere", adapter="mal"),
    ):
        with pytest.raises(ValueError, match=known):
            call()
    with pytest.raises(ValueError, match="got 'mal', known adapters are 'ann', 'bob', 'eve'"):
        lk.adapter_rows(model, ["ann", "mal"]).__enter__()
    with pytest.raises(ValueError, match="each adapter can be in use once"):
        lk.set_adapter(model, ["ann", "ann"])
    with pytest.raises(ValueError, match="has an adapter 'ann' already"):
        lk.add_adapter(model, "ann", 2)
    assert torch.equal(model(x), y)


@pytest.mark.parametrize("option", ["pissa", "other"])
def test_options_that_are_not_for_a_further_one(model, option):
    with pytest.raises(ValueError, match=f"init: got '{option}', legal values beside"):
        lk.add_adapter(model, "more", 2, init=option)
    with pytest.raises(TypeError, match="modules_to_save"):
        lk.add_adapter(model, "more", 2, modules_to_save=["2"])
    assert model[0].names == tuple(TENANTS)


def test_a_base_that_is_not_there_any_more():
    model = mlp()
    lk.apply_lora(model, 2, init="pissa")
    with pytest.raises(ValueError, match="was started with PiSSA"):
        lk.add_adapter(model, "more", 2)
    with pytest.raises(ValueError, match="was started with PiSSA"):
        lk.adapter_rows(model, ["default"]).__enter__()
    lk.set_adapter(model, None)
    for rows in (1, 200):
        x = torch.randn(rows, 12)
        torch.testing.assert_close(model(x), mlp()(x), rtol=1e-4, atol=1e-5)


def test_rows_that_do_not_fit(model, x):
    for rows, error, text in (
        ("ann", TypeError, "rows: expected the name"),
        (3, TypeError, "rows: expected the name"),
        ([], ValueError, "rows: got no name"),
        (lk.Groups.from_rows([0, 1], 2), ValueError, "rows: expected groups of the 3 adapters"),
    ):
        with pytest.raises(error, match=text):
            lk.adapter_rows(model, rows).__enter__()
    with pytest.raises(ValueError, match="table: is of Groups"):
        lk.adapter_rows(model, ["ann"], table=["ann"]).__enter__()
    with lk.adapter_rows(model, ["ann"] * 4), pytest.raises(ValueError, match="of 4 samples"):
        model(x)
    # Some of the rows, as routed tokens are.
    with lk.adapter_rows(model, ["ann", "bob"]), pytest.raises(ValueError, match="of 2 samples"):
        model(x[0, :4])
    two = lk.adapter_rows(model, lk.Groups.from_rows([0, 1], 3))
    with two, pytest.raises(ValueError, match="expected those of 30 rows, got 2"):
        model(x)
    assert model(x).shape == (6, 5, 6)


def test_flattened_rows_of_samples(x):
    model = tenants(mlp())
    with lk.adapter_rows(model, NAMES):
        y = model[0](x)
        assert torch.equal(model[0](x.flatten(0, 1)), y.flatten(0, 1))
        assert torch.equal(model[0](x[:, 0].contiguous()), y[:, 0])


def test_one_batch_drops_alike():
    model = mlp()
    lk.add_adapter(model, "ann", 2, dropout=0.1)
    lk.add_adapter(model, "bob", 2)
    with lk.adapter_rows(model, ["ann", "bob"]):
        with pytest.raises(ValueError, match=r"dropout: adapters of one batch differ \('ann' 0\.1"):
            model(torch.randn(2, 12))
        model.eval()(torch.randn(2, 12))


def test_an_adapter_is_not_deleted_under_a_batch(model, x):
    with lk.adapter_rows(model, ["ann", "bob"] * 3):
        for name in ("ann", "bob"):
            with pytest.raises(ValueError, match=f"computes rows of '{name}' within adapter_rows"):
                lk.delete_adapter(model, name)
        with pytest.raises(ValueError, match="computes rows of several adapters"):
            lk.merge_lora(model)
        lk.delete_adapter(model, "eve")  # which has no rows
        y = model(x)
    lk.delete_adapter(model, "bob")
    y.sum().backward()  # of what the forward had
    assert all(grad is not None for grad in gradients(model, "ann"))


@pytest.mark.parametrize("reentrant", [True, False])
def test_an_adapter_deleted_before_it_is_computed_again(model, x, reentrant):
    with lk.adapter_rows(model, ["ann", "bob"] * 3):
        loss = checkpointed(model, x, use_reentrant=reentrant).sum()
    lk.delete_adapter(model, "bob")
    with pytest.raises(RuntimeError, match="'bob' was deleted"):
        loss.backward()


# ------------------------------------------------------------------------- the rest of the library


def test_save_pretrained_writes_them_all(tmp_path):
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    model = tenants(build("llama"))
    tokens = inputs("llama")["input_ids"]
    lk.set_adapter(model, "bob")
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(tokens).logits, model(tokens).logits)
    base = build("llama")
    for name in ("ann", "eve"):
        lk.set_adapter(model, name)
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / name))
        torch.testing.assert_close(theirs(tokens).logits, model(tokens).logits)
    lk.set_adapter(model, ["ann", "bob"])
    with pytest.warns(UserWarning, match="not exactly one is in use"):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    assert (tmp_path / "bob" / "adapter_config.json").exists()


def test_the_check_looks_at_those_in_use(model, x):
    before = copy.deepcopy(model.state_dict())
    for name in TENANTS:
        lk.set_adapter(model, name)
        report = lk.check_adapters(model, x)
        assert [state.name for state in report.adapters] == [f"0 ({name})", f"2 ({name})"]
        assert all(state.problem is None and state.merges for state in report.adapters)
    lk.set_adapter(model, None)
    report = lk.check_adapters(model, x)
    assert all("is not in use" in state.problem for state in report.adapters)
    assert not model[0].merged
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_what_is_for_one_adapter_refuses_several(model):
    with pytest.raises(ValueError, match="carries other adapters too, 'bob', 'eve'"):
        model[0].set_factors(torch.ones(2, 12), torch.ones(10, 2))
    loader = [(torch.randn(2, 12), torch.randn(2, 6))]
    optimizer = torch.optim.SGD(lk.lora_parameters(model), lr=0.1)
    with pytest.raises(ValueError, match="carries other adapters too"):
        lk.adjust_rank(model, 4, 2, loader, nn.MSELoss(), optimizer)
