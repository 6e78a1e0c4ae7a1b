"""apply_lora and what undoes it, on toy modules and on Transformers models built from configs."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lora_kernels import (
    FusedLoRALinear,
    apply_lora,
    disable_adapters,
    lora_parameters,
    lora_state_dict,
    merge_lora,
    remove_lora,
    unmerge_lora,
)
from lora_kernels.names import all_names

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def llama(**options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**SIZES, "num_key_value_heads": 2, **options})
    return transformers.LlamaForCausalLM(config).eval()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc_in, self.fc_out = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.fc_out(self.fc_in(x).relu())


class Toy(nn.Module):
    """Two blocks, the second used twice, and a head that is no output embedding."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        second = Block()
        self.blocks = nn.ModuleList([Block(), second, second])
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
TOKENS = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(1))


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def fill(model, seed=0):
    """Gives every adapter a B other than zero."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, FusedLoRALinear):
            nn.init.normal_(module.lora_B, std=0.2)


def train(model, forward, steps=2):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        forward(model).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def snapshot(model):
    """All there is to know of a model: values, objects, types, flags."""
    modules = [(name, type(m), id(m)) for name, m in model.named_modules(remove_duplicate=False)]
    flags = {n: (id(p), p.requires_grad) for n, p in model.named_parameters()}
    values = {name: t.clone() for name, t in (*model.named_parameters(), *model.named_buffers())}
    return modules, flags, values


def assert_same(before, after):
    assert before[:2] == after[:2]
    assert before[2].keys() == after[2].keys()
    for name, tensor in before[2].items():
        assert torch.equal(tensor, after[2][name]), name


def kinds(model):
    return {name: type(module) for name, module in model.named_modules(remove_duplicate=False)}


# ---------------------------------------------------------------------------------- targets


@pytest.mark.parametrize("tied", [False, True])
def test_llama_gets_adapters_everywhere_but_in_the_head(tied):
    model = llama(tie_word_embeddings=tied)
    before, weights = logits(model), {id(p) for p in model.parameters()}
    report = apply_lora(model, 4, alpha=8)
    assert {name.rpartition(".")[2] for name in report.replaced} == PROJECTIONS
    assert len(report.replaced) == 14
    assert report.skipped == {"lm_head": "the model's output head"}
    assert type(model.lm_head) is nn.Linear
    assert {id(p) for p in model.parameters() if not p.requires_grad} == weights
    torch.testing.assert_close(logits(model), before)
    fill(model)
    assert not torch.equal(logits(model), before)


def test_qwen2_and_its_biases():
    torch.manual_seed(0)
    config = transformers.Qwen2Config(**SIZES, num_key_value_heads=2)
    model = transformers.Qwen2ForCausalLM(config).eval()
    before = logits(model)
    assert {n.rpartition(".")[2] for n in apply_lora(model, 2).replaced} == PROJECTIONS
    assert model.model.layers[0].self_attn.q_proj.bias is not None
    torch.testing.assert_close(logits(model), before)


def test_output_heads_are_known_by_the_model():
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES)
    masked = transformers.BertForMaskedLM(config)
    skipped = apply_lora(masked, 2).skipped
    assert skipped == {"cls.predictions.decoder": "the model's output head"}
    wrapped = nn.ModuleDict({"inner": llama()})
    assert apply_lora(wrapped, 2).skipped == {"inner.lm_head": "the model's output head"}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": ["fc_in"]}, {"blocks.0.fc_in", "blocks.1.fc_in"}),
        ({"target_modules": ["0.fc_in", "head"]}, {"blocks.0.fc_in", "head"}),
        ({"target_modules": r"blocks\.\d\.fc_(in|out)", "exclude_modules": r".*\.1\..*"},
         {"blocks.0.fc_in", "blocks.0.fc_out"}),
        ({"exclude_modules": ["fc_out", "head"]}, {"blocks.0.fc_in", "blocks.1.fc_in"}),
        ({"modules_to_save": ["blocks.1"]}, {"blocks.0.fc_in", "blocks.0.fc_out", "head"}),
        ({}, {"blocks.0.fc_in", "blocks.0.fc_out", "blocks.1.fc_in", "blocks.1.fc_out", "head"}),
    ],
)  # fmt: skip
def test_targets_by_suffix_and_by_expression(options, expected):
    model = Toy()
    report = apply_lora(model, 2, **options)
    assert set(report.replaced) == expected
    adapted = {n for n, m in model.named_modules() if isinstance(m, FusedLoRALinear)}
    assert adapted == expected
    if "exclude_modules" in options:
        assert set(report.skipped.values()) == {"excluded by exclude_modules"}


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"target_modules": ["fc_in", "q_proj"]}, ValueError,
         r"target_modules: 'q_proj' matches no module; there are blocks\.\*\.fc_in, blocks\.\*\.f"),
        ({"target_modules": "fc_in"}, ValueError, "target_modules: 'fc_in' matches no module"),
        ({"target_modules": "fc_(in"}, ValueError, "is no regular expression"),
        ({"target_modules": []}, ValueError, "target_modules: got an empty list"),
        ({"target_modules": [3]}, TypeError, "target_modules: expected names as strings, got 3"),
        ({"target_modules": ["norm"]}, ValueError,
         "'norm' matches no linear layer: norm is a LayerNorm"),
        ({"exclude_modules": ["nope"]}, ValueError, "exclude_modules: 'nope' matches no module"),
        ({"exclude_modules": ".*"}, ValueError, "no layer of Toy can carry an adapter"),
        ({"modules_to_save": ["nope"]}, ValueError, "modules_to_save: 'nope' matches no module"),
        ({"rank": 0}, ValueError, "rank: expected an integer of at least 1, got 0"),
        ({"rank": 5, "init": "pissa"}, ValueError, r"rank: 'pissa' .* = 3 of head, got 5"),
        ({"dropout": 1.0}, ValueError, "dropout: expected a probability"),
        ({"init": "corda"}, ValueError, "init: got 'corda'"),
        ({"adapter_dtype": torch.float16}, TypeError, "adapter_dtype: .* got torch.float16"),
    ],
)  # fmt: skip
def test_a_failing_apply_names_the_cause_and_changes_nothing(options, kind, message):
    model = Toy()
    model.norm.requires_grad_(False)
    before = snapshot(model)
    with pytest.raises(kind, match=message):
        apply_lora(model, **{"rank": 2, **options})
    assert_same(before, snapshot(model))


def test_pissa_that_fails_at_a_later_layer_changes_nothing():
    model = Toy()
    with torch.no_grad():
        model.head.weight[0, 0] = torch.inf
    before = snapshot(model)
    with pytest.raises(ValueError, match="init: 'pissa' needs a weight of finite values"):
        apply_lora(model, 2, init="pissa")
    assert_same(before, snapshot(model))


def test_a_model_that_is_a_linear_is_refused():
    with pytest.raises(ValueError, match=r"is itself a linear layer.*FusedLoRALinear\.from_linear"):
        apply_lora(nn.Linear(3, 4), 2)
    with pytest.raises(ValueError, match=r"it holds no nn\.Linear"):
        apply_lora(nn.Sequential(nn.Conv1d(3, 4, 1)), 2)


def test_what_cannot_carry_an_adapter_is_skipped_with_the_reason():
    class Special(nn.Linear):
        pass

    taken = nn.Linear(8, 8)
    taken.dropout = nn.Dropout(0.5)  # a name that the adapter needs
    overridden = nn.Linear(8, 8)
    overridden.forward = lambda x: x
    model = nn.ModuleDict({
        "plain": nn.Linear(8, 8),
        "special": Special(8, 8),
        "taken": taken,
        "overridden": overridden,
        "normed": torch.nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
        "attention": nn.MultiheadAttention(8, 2),
    })  # fmt: skip
    before = kinds(model)
    report = apply_lora(model, 2)
    assert report.replaced == ["plain"]
    assert report.skipped["special"].startswith("Special is a subclass of nn.Linear")
    assert report.skipped["taken"].startswith(
        "has attributes that a layer with an adapter needs: d"
    )
    assert "forward overridden" in report.skipped["overridden"]
    assert report.skipped["normed"].startswith("has parametrizations on weight")
    assert report.skipped["attention.out_proj"].startswith("NonDynamicallyQuantizableLinear is a")
    assert kinds(model) == {**before, "plain": FusedLoRALinear}
    assert "attention.in_proj_weight [24, 8]" in report.other_linear_maps
    for name in ("special", "attention.out_proj"):
        assert f"skipped {name}: " in str(report)


class Dressed(nn.Module):
    """A layer that more than its parent knows, and that has more than weight and bias."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(8, 8)
        self.aliases, self.alias = [self.linear], self.linear
        self.linear.register_buffer("smooth_scale", torch.full((8,), 2.0))
        self.linear.register_buffer("passing", torch.ones(8), persistent=False)
        self.linear.norm = nn.LayerNorm(8)
        self.linear.extra = nn.Parameter(torch.ones(3))
        self.linear.init_std = 0.02
        self.calls = []
        self.linear.register_forward_hook(lambda *_: self.calls.append("before"))

    def forward(self, x):
        return self.aliases[0](self.alias(x))


def test_a_layer_keeps_everything_it_had():
    model = Dressed()
    linear, x = model.linear, X.clone().requires_grad_()
    state, flags = (
        set(model.state_dict()),
        {n: p.requires_grad for n, p in model.named_parameters()},
    )
    held = {key: value for key, value in vars(linear).items() if key != "_lora_frozen"}
    base = model(X)
    apply_lora(model, 2)
    assert model.linear is linear is model.aliases[0] is model.alias
    assert type(linear) is FusedLoRALinear
    assert state < set(model.state_dict())
    linear.register_forward_pre_hook(lambda *_: model.calls.append("since"))
    linear.register_full_backward_hook(lambda *_: model.calls.append("backward"))
    linear.added_since = "kept"
    fill(model)
    model.calls.clear()
    assert not torch.allclose(model(x), base)  # through the list and the alias
    model(x).sum().backward()
    assert model.calls == ["since", "before"] * 4 + ["backward"] * 2

    remove_lora(model)
    assert model.linear is linear
    assert type(linear) is nn.Linear
    assert set(model.state_dict()) == state
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert vars(linear).keys() == held.keys() | {"added_since"}
    for key in ("_buffers", "_modules", "_parameters", "_forward_hooks", "init_std"):
        assert vars(linear)[key] is held[key]
    model.calls.clear()
    torch.testing.assert_close(model(X), base)
    assert model.calls == ["since", "before"] * 2


def test_copies_of_a_layer_keep_what_it_had():
    linear = Dressed().linear
    linear._forward_hooks.clear()
    layer = FusedLoRALinear.from_linear(linear, 2)
    plain = layer.to_linear()
    assert type(plain) is nn.Linear
    assert set(plain.state_dict()) == set(linear.state_dict()) < set(layer.state_dict())
    for copied in (layer, plain):
        assert copied.smooth_scale is linear.smooth_scale
        assert copied.norm is linear.norm
        assert copied.init_std == 0.02
        assert copied._non_persistent_buffers_set >= {"passing"}
        copied.register_forward_hook(lambda *_: None)
        assert not linear._forward_hooks
    assert type(linear) is nn.Linear
    assert type(layer) is FusedLoRALinear


def test_removing_from_a_part_and_with_parts_added_since():
    model = nn.ModuleDict({"first": Block(), "second": Block(), "frozen": Block()})
    model["frozen"].requires_grad_(False)
    apply_lora(model, 2, modules_to_save=["second.fc_out"])
    model["second"].added = nn.Linear(8, 2)
    model["second"].added_frozen = nn.Linear(8, 2).requires_grad_(False)
    remove_lora(model["first"])
    assert all(p.requires_grad for p in model["first"].parameters())
    assert {type(m) for m in model["second"].children()} == {FusedLoRALinear, nn.Linear}
    remove_lora(model)
    assert all(p.requires_grad for n, p in model["second"].named_parameters() if "frozen" not in n)
    assert not any(p.requires_grad for p in model["second"].added_frozen.parameters())
    assert not any(p.requires_grad for p in model["frozen"].parameters())
    assert not any("_lora" in key for module in model.modules() for key in vars(module))


def test_fused_experts_are_reported():
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        **SIZES, num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1
    )
    model = transformers.MixtralForCausalLM(config).eval()
    before = logits(model)
    report = apply_lora(model, 2)
    experts = {n for n, p in model.named_parameters() if p.dim() == 3}
    assert experts
    assert experts <= {entry.partition(" ")[0] for entry in report.other_linear_maps}
    assert "linear maps that are no nn.Linear, left frozen: " in str(report)
    assert not any(p.requires_grad for n, p in model.named_parameters() if n in experts)
    torch.testing.assert_close(logits(model), before)


def test_report():
    model = Toy()
    report = apply_lora(model, 2, target_modules=["fc_in"], modules_to_save=["head"])
    adapters = 2 * (2 * 8 + 16 * 2)
    assert report.trainable == adapters + 8 * 3 + 3
    assert report.total == sum(p.numel() for p in model.parameters())
    assert report.adapter_bytes == 4 * report.trainable
    assert report.saved == ["head"]
    text = str(report)
    weights = 2 * 8 * 16
    assert (report.adapted, report.base) == (weights, 2 * (weights + 24) + 16 + 27)
    assert text.startswith(
        "LoRA on 2 layers: blocks.*.fc_in\n"
        "one adapter in several places: blocks.1.fc_in = blocks.2.fc_in\n"
        "adapters on 42 % of the weights\n"
    )
    share = 100 * report.trainable / report.total
    assert f"trainable {report.trainable} of {report.total} parameters ({share:.2f}%)" in text
    assert "adapter 0.00 MiB" in text
    assert "trained in full: head" in text


def test_the_report_folds_what_is_skipped_and_names_what_carries_no_adapter():
    model = nn.Transformer(16, 2, 3, 3, 24, batch_first=True)
    lines = str(apply_lora(model, 2)).splitlines()
    skipped = [line for line in lines if line.startswith("skipped")]
    assert len(skipped) == 1
    assert skipped[0].startswith(
        "skipped 9 layers: encoder.layers.*.self_attn.out_proj, decoder.layers.*.self_attn.out_proj"
        ", decoder.layers.*.multihead_attn.out_proj: NonDynamicallyQuantizableLinear is a subclass"
    )
    model = nn.ModuleDict({
        "words": nn.Embedding(10, 8),
        "patches": nn.Conv2d(3, 8, 2),
        "body": nn.Linear(8, 8, bias=False),
        "head": nn.Linear(8, 3, bias=False),
    })  # fmt: skip
    model.register_parameter("pos_embedding", nn.Parameter(torch.ones(1, 4, 8)))
    report = apply_lora(model, 2, target_modules=["body"])
    total = 80 + 96 + 8 + 64 + 24 + 32
    assert (report.adapted, report.base) == (64, total)
    assert report.left_out == {
        "embeddings": ["pos_embedding [1, 4, 8]", "words.weight [10, 8]"],
        "convolutions": ["patches.weight [8, 3, 2, 2]"],
    }
    assert report.left_out_parameters == {"embeddings": 112, "convolutions": 96}
    assert f"convolutions, left frozen: patches.weight [8, 3, 2, 2] ({9600 / total:.2g} %" in str(
        report
    )
    report = apply_lora(model, 2, target_modules=["head"], modules_to_save=["words", "patches"])
    assert report.left_out == {"embeddings": ["pos_embedding [1, 4, 8]"]}


def gpt_oss():
    config = transformers.GptOssConfig(
        **SIZES, num_key_value_heads=2, head_dim=8, num_local_experts=4
    )
    return transformers.GptOssForCausalLM(config)


def test_biases_are_no_linear_maps():
    report = apply_lora(gpt_oss(), 2)
    names = {entry.partition(" ")[0].rpartition(".")[2] for entry in report.other_linear_maps}
    assert names == {"weight", "gate_up_proj", "down_proj"}
    experts = nn.Module()
    experts.register_parameter("w", nn.Parameter(torch.ones(4, 8, 8)))
    experts.register_parameter("b", nn.Parameter(torch.ones(4, 8)))
    model = nn.ModuleDict({"experts": experts, "linear": nn.Linear(8, 8)})
    assert apply_lora(model, 2).other_linear_maps == ["experts.w [4, 8, 8]"]


@pytest.mark.parametrize("names", [["q_proj", "gate_up_proj"], r".*\.gate_up_proj"])
def test_experts_as_targets_are_answered_with_what_they_are(names):
    message = (
        r"gate_up_proj' matches no module: model\.layers\.0\.mlp\.experts\.gate_up_proj is a"
        r" \[4, 32, 96\] parameter of GptOssExperts, not a torch\.nn\.Linear.*target_parameters"
    )
    with pytest.raises(ValueError, match=message):
        apply_lora(gpt_oss(), 2, target_modules=names)


def test_hooks_of_every_kind_go_on():
    layer = nn.utils.skip_init(nn.Linear, 8, 8)
    nn.init.ones_(layer.weight), nn.init.zeros_(layer.bias)
    model, calls = nn.Sequential(layer), []
    layer.register_forward_pre_hook(lambda m, args, kwargs: calls.append(1), with_kwargs=True)
    layer.register_forward_hook(lambda m, args, kwargs, y: calls.append(2), with_kwargs=True)
    layer.register_forward_hook(lambda *_: calls.append(3), always_call=True)
    layer.register_full_backward_pre_hook(lambda *_: calls.append(4))
    layer.register_full_backward_hook(lambda *_: calls.append(5))
    layer.register_state_dict_post_hook(lambda *_: calls.append(6))
    layer.register_load_state_dict_post_hook(lambda *_: calls.append(7))

    def used():
        calls.clear()
        model(X.clone().requires_grad_()).sum().backward()
        model.load_state_dict(model.state_dict())
        return list(calls)

    expected = used()
    assert sorted(expected) == [1, 2, 3, 4, 5, 6, 7]
    apply_lora(model, 2)
    assert used() == expected
    remove_lora(model)
    assert used() == expected


@pytest.mark.parametrize(
    "dress",
    [
        lambda linear: linear.register_parameter("lora_A", nn.Parameter(torch.ones(2, 8))),
        lambda linear: linear.register_buffer("pissa_B", torch.ones(2)),
        lambda linear: linear.add_module("merge", nn.Identity()),
        lambda linear: setattr(linear, "alpha", 3),
        lambda linear: setattr(linear, "scaling", 3),
    ],
)
def test_names_that_an_adapter_needs_leave_the_layer_alone(dress):
    model = nn.ModuleDict({"taken": nn.Linear(8, 8), "free": nn.Linear(8, 8)})
    dress(model["taken"])
    before = dict(vars(model["taken"]))
    report = apply_lora(model, 2)
    assert report.replaced == ["free"]
    assert "attributes that a layer with an adapter needs" in report.skipped["taken"]
    remove_lora(model)
    assert vars(model["taken"]) == before


def test_subclasses_with_state_of_their_own_are_skipped():
    class Stateful(nn.Linear):
        __slots__ = ("extra",)

        def get_extra_state(self):
            return self.extra

        def set_extra_state(self, state):
            self.extra = state

    model = nn.ModuleDict({"stateful": Stateful(8, 8), "free": nn.Linear(8, 8)})
    model["stateful"].extra = 3
    assert apply_lora(model, 2).skipped["stateful"].startswith("Stateful is a subclass")
    remove_lora(model)
    assert model["stateful"].extra == 3


def test_applying_twice():
    model = Toy()
    apply_lora(model, 2, target_modules=["fc_in"])
    first = model.blocks[0].fc_in
    report = apply_lora(model, 3, target_modules=["fc_in", "fc_out"])
    assert set(report.replaced) == {"blocks.0.fc_out", "blocks.1.fc_out"}
    assert report.skipped["blocks.0.fc_in"] == "already carries an adapter"
    assert model.blocks[0].fc_in is first
    with pytest.raises(ValueError, match=r"blocks\.0\.fc_in: already carries an adapter"):
        apply_lora(model, 2, target_modules=["fc_in"])
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {
        "lora_A",
        "lora_B",
    }
    remove_lora(model)
    assert all(p.requires_grad for p in model.parameters())


# --------------------------------------------------------------------------- sharing, tying


def test_shared_modules_are_handled_once_and_in_every_place():
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "inner": nn.ModuleDict()})
    model["b"] = model["inner"]["c"] = model["a"]
    base = model["a"]
    report = apply_lora(model, 2)
    assert report.replaced == ["a"]
    assert isinstance(model["a"], FusedLoRALinear)
    assert model["a"] is model["b"] is model["inner"]["c"]
    assert report.trainable == 32
    merge_lora(model)
    unmerge_lora(model)
    remove_lora(model)
    assert type(model["a"]) is nn.Linear
    assert model["a"] is model["b"] is model["inner"]["c"]
    assert model["a"].weight is base.weight


def shared_layers():
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "other": nn.Linear(8, 8), "in": nn.ModuleDict()})
    model["b"] = model["in"]["c"] = model["a"]
    model["round"] = nn.ModuleDict({"block": model["in"]})
    return model


PLACES = ["a", "in.c", "b", "round.block.c"]


@pytest.mark.parametrize("name", [*PLACES, r"round\..*", ["c"], ["a", "b"]])
def test_every_name_of_a_shared_module_reaches_it(name):
    model = shared_layers()
    report = apply_lora(model, 2, target_modules=[name] if name in PLACES else name)
    assert report.replaced == ["a"]
    assert report.shared == {"a": ["in.c", "b", "round.block.c"]}
    assert "one adapter in several places: a = in.c = b = round.block.c" in str(report)
    assert isinstance(model["b"], FusedLoRALinear)
    assert type(model["other"]) is nn.Linear


@pytest.mark.parametrize("name", PLACES)
def test_every_name_of_a_shared_module_excludes_saves_and_sets_it(name):
    report = apply_lora(shared_layers(), 2, exclude_modules=[name])
    assert report.replaced == ["other"]
    assert report.shared == {}
    assert report.skipped == {"a": "excluded by exclude_modules"}
    report = apply_lora(model := shared_layers(), 2, modules_to_save=[name])
    assert (report.replaced, report.saved) == (["other"], ["a"])
    assert model["a"].weight.requires_grad
    model = shared_layers()
    apply_lora(model, 2, alpha=4, rank_pattern={name: 3}, alpha_pattern={f"^{name}": 5})
    assert (model["a"].rank, model["a"].alpha) == (3, 5)
    assert (model["other"].rank, model["other"].alpha) == (2, 4)


def test_a_whole_shared_part_is_saved_by_any_of_its_names():
    for name in ("in", "block", "round.block"):
        report = apply_lora(shared_layers(), 2, modules_to_save=[name])
        assert (report.replaced, report.saved) == (["other"], ["in"])


def test_a_pattern_that_matches_no_name_of_a_shared_module_lists_them_all():
    with pytest.raises(ValueError, match=r"there are a, in\.c, b, round\.block\.c, other"):
        apply_lora(shared_layers(), 2, rank_pattern={"x": 3})
    with pytest.raises(ValueError, match=r"'x' matches no module"):
        apply_lora(shared_layers(), 2, target_modules=["x"])


def test_a_module_within_itself_is_walked_once():
    model = shared_layers()
    model["in"]["itself"] = model["in"]
    found = all_names(model)
    assert found[model["in"]] == ["in", "round.block"]
    assert found[model["a"]] == PLACES


def test_a_module_shared_with_one_trained_in_full_gets_no_adapter():
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "other": nn.Linear(8, 8)})
    model["block"] = nn.ModuleDict({"c": model["a"]})
    report = apply_lora(model, 2, modules_to_save=["block"])
    assert report.replaced == ["other"]
    assert report.skipped == {"a": "trained in full (modules_to_save)"}
    assert model["a"].weight.requires_grad


def test_merging_a_tied_weight_names_both_owners():
    model = llama(tie_word_embeddings=True)
    apply_lora(model, 2, target_modules=["lm_head", "q_proj"])
    fill(model)
    before = snapshot(model)
    owners = r"model\.embed_tokens\.weight and lm_head\.weight share"
    for keep_base in (True, "cpu", False):
        with pytest.raises(ValueError, match=owners):
            merge_lora(model, keep_base)
    assert_same(before, snapshot(model))
    plain = llama(tie_word_embeddings=True)
    before = snapshot(plain)
    with pytest.raises(ValueError, match=owners):
        apply_lora(plain, 2, target_modules=["lm_head"], init="pissa")
    assert_same(before, snapshot(plain))


def test_training_half_of_a_tie_is_refused_with_both_names():
    model = llama(tie_word_embeddings=True)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"lm_head\.weight is tied to model\.embed_tokens\.weight"):
        apply_lora(model, 2, modules_to_save=["lm_head"])
    assert_same(before, snapshot(model))


def test_a_whole_tie_is_trained_disabled_and_restored():
    model = llama(tie_word_embeddings=True)
    before, original = logits(model), model.lm_head.weight.detach().clone()
    report = apply_lora(model, 2, modules_to_save=["embed_tokens", "lm_head"])
    assert sorted(report.saved) == ["lm_head", "model.embed_tokens"]
    assert len(list(lora_parameters(model))) == 2 * 14 + 1
    train(model, lambda m: m(TOKENS).logits)
    trained, after = model.lm_head.weight.detach().clone(), logits(model)
    assert not torch.equal(trained, original)
    for _ in range(2):
        with disable_adapters(model):
            torch.testing.assert_close(logits(model), before)
        torch.testing.assert_close(logits(model), after)
        assert torch.equal(model.model.embed_tokens.weight, trained)
    remove_lora(model)
    assert torch.equal(model.lm_head.weight, original)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(logits(model), before)


# --------------------------------------------------------------- training, merging, removing


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_training_moves_only_the_adapters(init):
    model = llama()
    apply_lora(model, 4, alpha=8, init=init, dropout=0.1)
    before = snapshot(model)[2]
    given = list(lora_parameters(model))
    assert {id(p) for p in given} == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(given) == len({id(p) for p in given}) == 28
    train(model.train(), lambda m: m(TOKENS).logits)
    for name, tensor in snapshot(model)[2].items():
        moved = name.endswith((".lora_A", ".lora_B"))
        assert torch.equal(tensor, before[name]) != moved, name


@pytest.mark.parametrize("keep", [True, "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_unmerge_remove_are_bit_exact(keep, dtype):
    model = llama().to(dtype)
    model.lm_head.requires_grad_(False)
    plain, before = snapshot(model), logits(model)
    apply_lora(model, 4, alpha=8)
    fill(model)
    adapted, state = logits(model), {k: v.clone() for k, v in model.state_dict().items()}
    merge_lora(model, keep)
    merge_lora(model, keep)  # what is merged stays so
    merged = logits(model)
    assert not torch.equal(merged, before)
    scale = (adapted.double() - before.double()).abs().max()
    assert (merged.double() - adapted.double()).abs().max() < 20 * torch.finfo(dtype).eps * scale
    for name, parameter in model.named_parameters():
        assert torch.equal(model.state_dict()[name], parameter), name
    unmerge_lora(model)
    torch.testing.assert_close(logits(model), adapted)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    merge_lora(model, keep)
    remove_lora(model)
    torch.testing.assert_close(logits(model), before)
    after = snapshot(model)
    assert plain[1] == after[1]
    assert [(name, kind) for name, kind, _ in plain[0]] == [(n, kind) for n, kind, _ in after[0]]
    for name, tensor in plain[2].items():
        assert torch.equal(tensor, after[2][name]), name
    with pytest.raises(ValueError, match="has no LoRA layer; call apply_lora first"):
        remove_lora(model)


@pytest.mark.parametrize("merged_before", [False, True])
def test_a_final_merge_and_removal_leave_the_sum(merged_before):
    model = Toy()
    apply_lora(model, 2, modules_to_save=["norm"])
    fill(model)
    nn.init.normal_(model.norm.weight)
    norm = model.norm.weight.detach().clone()
    merge_lora(model)
    merged = model(X)
    if not merged_before:
        unmerge_lora(model)
    merge_lora(model, keep_base=False)
    torch.testing.assert_close(model(X), merged)
    for context in (lambda: unmerge_lora(model), lambda: disabled_output(model)):
        with pytest.raises(RuntimeError, match="merged with keep_base=False"):
            context()
    remove_lora(model)
    torch.testing.assert_close(model(X), merged)
    assert torch.equal(model.norm.weight, norm)
    assert FusedLoRALinear not in kinds(model).values()
    assert not list(model.buffers())


def test_removing_pissa_gives_the_base_back_up_to_rounding():
    model = Toy()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    apply_lora(model, 2, init="pissa")
    fill(model)
    remove_lora(model)
    for name, tensor in model.state_dict().items():
        difference = (tensor - before[name]).norm()
        assert difference <= 4 * torch.finfo(torch.float32).eps * before[name].norm(), name


def test_modules_to_save_are_trained_and_restored():
    model = Toy()
    model.norm.requires_grad_(False)
    before = snapshot(model)
    original = model(X)
    apply_lora(model, 2, target_modules=["fc_in"], modules_to_save=["norm", "head"])
    train(model, lambda m: m(X))
    for name in ("norm.weight", "norm.bias", "head.weight", "head.bias"):
        assert not torch.equal(model.get_parameter(name), before[2][name]), name
    assert not torch.equal(model(X), original)
    remove_lora(model)
    after = snapshot(model)
    assert before[1] == after[1]
    assert_same((None, None, before[2]), (None, None, after[2]))


def trains(layer):
    return [layer.weight.requires_grad, layer.bias.requires_grad]


@pytest.mark.parametrize("frozen", [None, "bias", "weight"])
@pytest.mark.parametrize("made", ["by hand", "by apply_lora"])
@pytest.mark.parametrize("taken", ["to_linear", "remove_lora"])
def test_what_an_adapter_froze_trains_again(made, taken, frozen):
    model = nn.Sequential(nn.Linear(8, 8))
    if frozen:
        getattr(model[0], frozen).requires_grad_(False)
    before = trains(model[0])
    if made == "by hand":
        model[0] = FusedLoRALinear.from_linear(model[0], 2)
    else:
        apply_lora(model, 2)
    assert trains(model[0]) == [False, False]
    if taken == "to_linear":
        plain = model[0].to_linear()
        assert plain.weight is model[0].weight
    else:
        remove_lora(model)
        plain = model[0]
    assert type(plain) is nn.Linear
    assert trains(plain) == before == [frozen != "weight", frozen != "bias"]
    assert not [key for key in vars(plain) if "lora" in key]


def test_layers_made_by_hand_are_removed_without_freezing_the_rest():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[0] = FusedLoRALinear.from_linear(model[0], 2)
    remove_lora(model)
    assert type(model[0]) is nn.Linear
    assert model[1].weight.requires_grad


def test_state_dict_of_the_adapter_round_trip():
    model, other = Toy(), Toy()
    for each in (model, other):
        apply_lora(each, 2, target_modules=["fc_in"], modules_to_save=["head"])
    fill(model)
    nn.init.normal_(model.head.weight)
    state = lora_state_dict(model)
    assert set(state) == {
        f"blocks.{i}.fc_in.lora_{part}" for i in (0, 1) for part in "AB"
    } | {"head.weight", "head.bias"}  # fmt: skip
    assert not torch.equal(model(X), other(X))
    result = other.load_state_dict(state, strict=False)
    assert not result.unexpected_keys
    assert not any("lora" in key for key in result.missing_keys if "blocks.2" not in key)
    torch.testing.assert_close(model(X), other(X))


# -------------------------------------------------------------------------- disable_adapters


def disabled_output(model, inputs=X):
    with disable_adapters(model):
        return model(inputs)


@pytest.mark.parametrize("merged", [None, True, "cpu"])
@pytest.mark.parametrize("saved", [None, ["norm", "head"]])
def test_disabled_adapters_give_the_base_bit_for_bit(merged, saved):
    model = Toy()
    base = model(X)
    apply_lora(model, 2, dropout=0.5, modules_to_save=saved)
    train(model, lambda m: m(X))
    model.eval()
    if merged:
        merge_lora(model, merged)
    adapted, state = model(X), {k: v.clone() for k, v in lora_state_dict(model).items()}
    with disable_adapters(model) as same:
        assert same is model
        torch.testing.assert_close(model(X), base)
        with disable_adapters(model):
            torch.testing.assert_close(model(X), base)
        torch.testing.assert_close(model(X), base)
        for name, tensor in lora_state_dict(model).items():
            assert torch.equal(tensor, state[name]), name
    torch.testing.assert_close(model(X), adapted)
    with pytest.raises(ZeroDivisionError), disable_adapters(model):
        raise ZeroDivisionError
    torch.testing.assert_close(model(X), adapted)


@pytest.mark.parametrize("take", [
    copy.deepcopy, copy.copy, AveragedModel, lambda model: pickle.loads(pickle.dumps(model)),
], ids=["deepcopy", "copy", "averaged", "pickle"])  # fmt: skip
@pytest.mark.parametrize("saved", [None, ["norm", "head"]])
def test_copies_made_while_disabled_act(take, saved):
    model = Toy()
    apply_lora(model, 2, modules_to_save=saved)
    train(model, lambda m: m(X))
    model.eval()
    expected, base = model(X), disabled_output(model)
    with disable_adapters(model):
        # A shallow copy of a module holds its very parts.
        parts = {name: take(part) for name, part in model.named_children()}
        twin = take(model) if take is not copy.copy else copy.deepcopy(model)
        assert torch.equal(twin(X), expected)
        torch.testing.assert_close(model(X), base)
    assert torch.equal(twin(X), expected)
    assert torch.equal(disabled_output(twin), base)
    assert torch.equal(twin(X), expected)
    torch.testing.assert_close(model(X), expected)
    assert not any("__getstate__" in vars(module) for module in model.modules())
    for name, part in parts.items():
        inner = part.module if take is AveragedModel else part
        assert "__getstate__" not in vars(inner)
        for key, tensor in model.get_submodule(name).state_dict().items():
            assert torch.equal(inner.state_dict()[key], tensor), (name, key)
    assert [p.requires_grad for p in twin.parameters()] == [
        p.requires_grad for p in model.parameters()
    ]


def test_copies_of_a_tie_and_of_computed_factors_made_while_disabled():
    model = nn.ModuleDict({"a": nn.Embedding(8, 8), "b": nn.Linear(8, 8, bias=False)})
    model["b"].weight, model["c"] = model["a"].weight, nn.Linear(8, 8)
    apply_lora(model, 2, target_modules=["c"], modules_to_save=["a", "b"])
    nn.init.normal_(model["c"].lora_B)
    nn.utils.parametrizations.weight_norm(model["c"], "lora_B")
    with torch.no_grad():
        model["a"].weight.add_(1)
    original, trained = model["a"].weight - 1, model["a"].weight.detach().clone()
    expected = model["c"](X)
    with disable_adapters(model):
        twin = copy.deepcopy(model)
    assert torch.equal(twin["a"].weight, trained)
    assert twin["a"].weight is twin["b"].weight
    assert torch.equal(twin["c"](X), expected)
    with disable_adapters(twin):
        torch.testing.assert_close(twin["b"].weight, original)
        torch.testing.assert_close(model["b"].weight, trained)


def test_disabled_pissa_is_the_base_up_to_rounding():
    model = llama()
    base = logits(model)
    apply_lora(model, 4, init="pissa")
    fill(model)
    with disable_adapters(model):
        disabled = logits(model)
    eps = torch.finfo(torch.float32).eps
    assert (disabled - base).norm() / base.norm() < 20 * eps
    assert (logits(model) - base).norm() / base.norm() > 1e-2


def test_a_context_on_a_part_and_one_on_the_whole():
    model = nn.Sequential(Block(), Block())
    base = model(X)
    apply_lora(model, 2, target_modules=["fc_in"], modules_to_save=["fc_out"])
    train(model, lambda m: m(X))
    adapted = model(X)
    with disable_adapters(model[0]):
        partly = model(X)
        with disable_adapters(model):
            torch.testing.assert_close(model(X), base)
        torch.testing.assert_close(model(X), partly)
    torch.testing.assert_close(model(X), adapted)
    with disable_adapters(model), disable_adapters(model[0]):
        torch.testing.assert_close(model(X), base)
    torch.testing.assert_close(model(X), adapted)
    assert not torch.equal(partly, adapted)
    assert not torch.equal(partly, base)


def test_removal_within_the_context_gives_the_base():
    model = Toy()
    base = model(X)
    apply_lora(model, 2, modules_to_save=["head"])
    train(model, lambda m: m(X))
    twin = copy.deepcopy(model)
    with disable_adapters(model):
        remove_lora(model)
    torch.testing.assert_close(model(X), base)
    assert not torch.equal(twin(X), base)
