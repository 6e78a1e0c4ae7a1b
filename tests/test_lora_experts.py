"""Adapters of experts by apply_lora, against a loop over the experts; PEFT's files both ways."""

import copy
import json
import pickle

import pytest
import torch
from tiny_models import MIXTURES, SMALL

import lora_kernels as lk
from lora_kernels.nn import experts as lora_experts

transformers = pytest.importorskip("transformers")
pytest.importorskip("transformers.integrations.moe")

BOTH = ["experts.gate_up_proj", "experts.down_proj"]
TOKENS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1))


def base(family="mixtral"):
    torch.manual_seed(0)
    name, sizes = MIXTURES[family]
    config = getattr(transformers, name)(**{**SMALL, **sizes})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # some experts have no values of their own
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return model.eval()


def adapted(family="mixtral", parameters=BOTH, rank=3, **options):
    """With an adapter of its own, not zero, on every expert."""
    model = base(family)
    options = {"target_modules": ["o_proj"], "alpha": 6, "init": "random", **options}
    report = lk.apply_lora(model, rank, target_parameters=parameters, **options)
    return model, report


def experts_of(model):
    return [(n, m) for n, m in model.named_modules() if n.endswith(".experts")]


def merged_by_hand(model, family):
    """A plain model with scaling B A of every expert in its weights."""
    plain = base(family)
    with torch.no_grad():
        for name, layer in model.named_modules():
            if not hasattr(layer, "lora_A"):
                continue
            delta = layer.scaling * (layer.lora_B @ layer.lora_A)
            if delta.dim() == 3:
                weight = plain.get_parameter(name.removesuffix("_lora"))
                weight += delta.transpose(1, 2) if family == "gpt_oss" else delta
            else:
                plain.get_submodule(name).weight += delta
    return plain


# ------------------------------------------------------------------------------ what is computed


@pytest.mark.parametrize("parameters", [BOTH, BOTH[:1], BOTH[1:]])
@pytest.mark.parametrize("family", MIXTURES)
def test_values_of_a_family(family, parameters):
    model, report = adapted(family, parameters)
    layers = len(experts_of(model))
    assert sum("experts" in name for name in report.replaced) == layers * len(parameters)
    assert not any(n.endswith(tuple(parameters)) for n in report.other_linear_maps)
    expected = merged_by_hand(model, family)(TOKENS).logits
    torch.testing.assert_close(model(TOKENS).logits, expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(expected, base(family)(TOKENS).logits, atol=1e-2)


@pytest.mark.parametrize("family", MIXTURES)
def test_gradients_of_a_family(family):
    """Against the product that Transformers' own experts form of summed weights."""
    model, _ = adapted(family)
    name, experts = experts_of(model)[-1]
    plain = base(family).get_submodule(name)
    x = torch.randn(11, 24, requires_grad=True)
    index = torch.randint(0, experts.num_experts, (11, 2))
    weights = torch.rand(11, 2)
    y = experts(x, index, weights)
    dy = torch.randn_like(y)
    factors = [p for one in experts.adapted() for p in (one.lora_A, one.lora_B)]
    ours = torch.autograd.grad(y, [x, *factors], dy)

    copies = [p.detach().clone().requires_grad_() for p in factors]
    sums = {}
    for one, A, B in zip(experts.adapted(), copies[::2], copies[1::2], strict=True):
        delta = one.scaling * (B @ A)
        key = one._of[1]
        sums[key] = getattr(plain, key) + (delta.transpose(1, 2) if family == "gpt_oss" else delta)
    plain.config._experts_implementation = "eager"
    expected = torch.func.functional_call(plain, sums, (x, index, weights))
    theirs = torch.autograd.grad(expected, [x, *copies], dy)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine - other).norm() <= 1e-4 * other.norm() + 1e-6


def test_dropout_in_training_only():
    model, _ = adapted(dropout=0.5)
    assert torch.equal(model(TOKENS).logits, model(TOKENS).logits)
    model.train()
    assert not torch.equal(model(TOKENS).logits, model(TOKENS).logits)


def test_the_start_is_the_base_s():
    model = base()
    expected = model(TOKENS).logits
    lk.apply_lora(model, 4, target_modules=[], target_parameters=BOTH)
    torch.testing.assert_close(model(TOKENS).logits, expected)
    A = experts_of(model)[0][1].gate_up_proj_lora.lora_A
    assert A.shape == (4, 4, 24)
    assert not torch.equal(A[0], A[1])
    bound = 24**-0.5  # of Kaiming's by the features of one expert
    assert 0.9 * bound < A.abs().max() <= bound


def test_half_weights_have_adapters_of_fp32():
    model = base().bfloat16()
    lk.apply_lora(model, 4, target_parameters=BOTH, init="random")
    experts = experts_of(model)[0][1]
    assert experts.down_proj_lora.lora_A.dtype == torch.float32
    assert model(TOKENS).logits.dtype == torch.bfloat16


def test_compiled_and_checkpointed():
    model, _ = adapted()
    model.train()
    gradients = []
    for way in ("plain", "checkpointed", "compiled"):
        model.zero_grad()
        if way == "checkpointed":
            model.gradient_checkpointing_enable()
        forward = model
        if way == "compiled":
            model.gradient_checkpointing_disable()
            torch._dynamo.reset()
            forward = torch.compile(model, backend="aot_eager")
        forward(TOKENS, labels=TOKENS).loss.backward()
        gradients.append([p.grad.clone() for p in lk.lora_parameters(model)])
    for others in gradients[1:]:
        for ours, theirs in zip(others, gradients[0], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


# ------------------------------------------------------------------------------------- in and out


def test_what_is_trained():
    model, report = adapted(rank=2, expert_rank=5)
    factors = {n: p.shape for n, p in model.named_parameters() if p.requires_grad}
    experts = {n: s for n, s in factors.items() if "experts" in n}
    assert experts["model.layers.0.mlp.experts.gate_up_proj_lora.lora_A"] == (4, 5, 24)
    assert experts["model.layers.0.mlp.experts.down_proj_lora.lora_B"] == (4, 24, 5)
    assert factors["model.layers.0.self_attn.o_proj.lora_A"] == (2, 24)
    assert len(factors) == 2 * (4 + 2)
    assert set(lk.lora_parameters(model)) == {p for p in model.parameters() if p.requires_grad}
    assert report.trainable == sum(p.numel() for p in lk.lora_parameters(model))
    assert not any("router" in n or "gate.weight" in n for n in factors)
    assert set(lk.lora_state_dict(model)) == set(factors)


def test_ranks_of_single_parameters():
    model, _ = adapted(
        rank=2,
        expert_rank=5,
        rank_pattern={r"layers\.1\..*down_proj": 7},
        alpha_pattern={"o_proj": 3},
    )
    ranks = [
        (m.gate_up_proj_lora.rank, m.down_proj_lora.rank, m.down_proj_lora.scaling)
        for _, m in experts_of(model)
    ]
    assert ranks == [(5, 5, 6 / 5), (5, 7, 6 / 7)]


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_merging_disabling_removing(family):
    model, _ = adapted(family)
    frozen, y = base(family)(TOKENS).logits, model(TOKENS).logits
    kinds = [type(m) for _, m in experts_of(base(family))]
    weights = {n: p.clone() for n, p in model.named_parameters() if n.endswith("proj")}
    with lk.disable_adapters(model):
        torch.testing.assert_close(model(TOKENS).logits, frozen, rtol=1e-4, atol=1e-4)
    merged = dict(lk.merged_state_dict(model))
    for keep in (True, "cpu"):
        lk.merge_lora(model, keep)
        torch.testing.assert_close(model(TOKENS).logits, y, rtol=1e-3, atol=1e-3)
        assert all(torch.equal(merged[n], model.get_parameter(n)) for n in weights)
        with lk.disable_adapters(model):
            torch.testing.assert_close(model(TOKENS).logits, frozen, rtol=1e-4, atol=1e-4)
        lk.unmerge_lora(model)
        assert all(torch.equal(w, model.get_parameter(n)) for n, w in weights.items())
    assert merged.keys() == base(family).state_dict().keys()
    plain = base(family)
    plain.load_state_dict(merged)
    torch.testing.assert_close(plain(TOKENS).logits, y, rtol=1e-3, atol=1e-3)
    final = copy.deepcopy(model)
    lk.remove_lora(model)
    assert [type(m) for _, m in experts_of(model)] == kinds
    assert torch.equal(model(TOKENS).logits, frozen)
    assert all(p.requires_grad for p in model.parameters())
    lk.merge_lora(final, keep_base=False)
    lk.remove_lora(final)
    torch.testing.assert_close(final(TOKENS).logits, y, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "file"]
)
def test_copies(again):
    model, _ = adapted()
    other = again(model)
    assert torch.equal(other(TOKENS).logits, model(TOKENS).logits)
    with torch.no_grad():
        experts_of(other)[0][1].gate_up_proj.zero_()
    product = experts_of(other)[0][1].gate_up_proj_lora
    assert not product.weight.any()  # of the copy's own experts
    assert experts_of(model)[0][1].gate_up_proj_lora.weight.any()


def test_state_dicts():
    model, _ = adapted()
    other, _ = adapted(alpha=6)
    with torch.no_grad():
        for p in lk.lora_parameters(other):
            p.zero_()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(TOKENS).logits, model(TOKENS).logits)
    y = model(TOKENS).logits
    model.load_state_dict(base().state_dict())  # which leaves the adapters alone
    assert torch.equal(model(TOKENS).logits, y)
    lk.merge_lora(model)
    y = model(TOKENS).logits
    lk.merge_lora(other)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(TOKENS).logits, y)
    lk.unmerge_lora(other)
    lk.unmerge_lora(model)
    assert torch.equal(other(TOKENS).logits, model(TOKENS).logits)
    # A base is merged again; an adapter alone too.
    lk.merge_lora(model)
    model.load_state_dict(base().state_dict())
    torch.testing.assert_close(model(TOKENS).logits, y, rtol=1e-4, atol=1e-4)
    halved = {k: v / 2 if k.endswith("lora_B") else v for k, v in lk.lora_state_dict(other).items()}
    model.load_state_dict(halved, strict=False)
    other.load_state_dict(halved, strict=False)
    torch.testing.assert_close(model(TOKENS).logits, other(TOKENS).logits, rtol=1e-3, atol=1e-3)


# -------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("parameters", [BOTH, BOTH[:1], BOTH[1:]])
@pytest.mark.parametrize("family", MIXTURES)
def test_peft_reads_our_files(family, parameters, tmp_path):
    peft = pytest.importorskip("peft")
    model, _ = adapted(family, parameters, rank=2, expert_rank=3)
    lk.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base(family), str(tmp_path))
    torch.testing.assert_close(theirs(TOKENS).logits, model(TOKENS).logits, rtol=1e-3, atol=1e-3)
    again = base(family)
    lk.load_adapter(again, tmp_path, strict=True)
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_parameters"] == sorted(parameters)


@pytest.mark.parametrize("parameters", [BOTH, BOTH[:1], BOTH[1:]])
@pytest.mark.parametrize("family", MIXTURES)
def test_we_read_peft_s_files(family, parameters, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=["o_proj"], target_parameters=parameters,
        rank_pattern={parameters[0]: 5}, init_lora_weights=False,
    )  # fmt: skip
    theirs = peft.get_peft_model(base(family), config).eval()
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if "lora_" in key:
                parameter.normal_(0, 0.2)
    theirs.save_pretrained(tmp_path)
    model = base(family)
    lk.load_adapter(model, tmp_path, strict=True)
    torch.testing.assert_close(model(TOKENS).logits, theirs(TOKENS).logits, rtol=1e-3, atol=1e-3)
    # And into a model that has them already.
    other = base(family)
    report = lk.apply_lora(other, config)
    assert sum("experts" in n for n in report.replaced) == len(parameters) * len(experts_of(other))
    lk.load_adapter(other, tmp_path, strict=True)
    assert torch.equal(other(TOKENS).logits, model(TOKENS).logits)


def test_a_square_weight_and_an_older_file():
    """Before it swapped them PEFT took [E, N, K] for [E, in, out]; shapes tell."""
    E, N, K, r = 3, 10, 8, 2
    weight, a, b = torch.zeros(E, N, K), torch.randn(E, r, K), torch.randn(E, N, r)
    for ours, back in zip(
        (a, b), lora_experts.from_peft(*lora_experts.to_peft(a, b), weight), strict=True
    ):
        assert torch.equal(ours, back)
    # There the delta [E, in, out] is A' B' of each expert, B' [out = K, r], A' [r, in = N].
    A, B = lora_experts.to_peft(b.transpose(1, 2), a.transpose(1, 2))
    for ours, back in zip((a, b), lora_experts.from_peft(A, B, weight), strict=True):
        assert torch.equal(ours, back)
    with pytest.raises(ValueError, match=r"has shapes \(6, 8\) and \(10, 5\), expected \[3 r, 8\]"):
        lora_experts.from_peft(torch.zeros(6, 8), torch.zeros(10, 5), weight)


def test_files_with_dropout_say_so(tmp_path):
    model, _ = adapted(dropout=0.1)
    with pytest.warns(UserWarning, match="lora_dropout: written as 0"):
        lk.save_adapter(model, tmp_path)


def test_save_pretrained(tmp_path):
    pytest.importorskip("peft")
    model, _ = adapted("qwen3_moe")
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(TOKENS).logits, model(TOKENS).logits, rtol=1e-3, atol=1e-3)
    lk.merge_lora(model)
    y = model(TOKENS).logits
    model.save_pretrained(tmp_path / "merged")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(again(TOKENS).logits, y, rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------------- the rest of the library


def test_the_check():
    model, _ = adapted()
    report = lk.check_adapters(model, TOKENS)
    names = [state.name for state in report.adapters]
    assert "model.layers.0.mlp.experts.gate_up_proj" in names
    assert all(state.problem is None and state.merges for state in report.adapters), str(report)


@pytest.mark.parametrize("family", MIXTURES)
def test_the_implementation_of_experts_without_adapters(family):
    model = base(family)
    expected = model(TOKENS).logits
    model.set_experts_implementation(lk.register_experts())
    torch.testing.assert_close(model(TOKENS).logits, expected, rtol=1e-3, atol=1e-3)
    _, experts = experts_of(model)[-1]
    x, index = torch.randn(7, 24), torch.randint(0, experts.num_experts, (7, 2))
    ours = experts(x, index, torch.ones(7, 2))
    model.set_experts_implementation("eager")
    torch.testing.assert_close(ours, experts(x, index, torch.ones(7, 2)), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="is not one of Transformers' modules of experts"):
        lora_experts.frozen_forward(model.lm_head, x, index, torch.ones(7, 2))


def test_a_step_of_training():
    model, _ = adapted(init="kaiming")
    batches = [{"input_ids": TOKENS, "labels": TOKENS}] * 4
    optimizer = torch.optim.AdamW(lk.lora_parameters(model), lr=1e-2)
    losses = []
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"target_parameters": ["experts.up_proj"]}, r"'experts.up_proj' matches no module; there"),
        (
            {"target_parameters": ["o_proj.weight"]},
            "of a linear layer: name .*o_proj in target_mod",
        ),
        ({"target_parameters": ["mlp.gate.weight"]}, "which cannot carry adapters of experts"),
        ({"target_parameters": BOTH, "init": "pissa", "target_modules": []}, "init: got 'pissa'"),
        ({"target_parameters": BOTH, "expert_rank": 0}, "expert_rank: "),
        (
            {"target_parameters": BOTH, "rank_pattern": {"nothing": 3}},
            "'nothing' matches no target",
        ),
        ({"target_modules": []}, "target_modules: got an empty list"),
    ],
)
def test_bad_options(options, text):
    model = base()
    before = set(model.state_dict())
    with pytest.raises(ValueError, match=text):
        lk.apply_lora(model, 4, **options)
    assert set(model.state_dict()) == before
    assert all(p.requires_grad for p in model.parameters())


def test_what_experts_do_not_have():
    model, _ = adapted()
    with pytest.raises(ValueError, match="its rows are those of experts"):
        lk.adapter_rows(model, ["default"]).__enter__()
    with pytest.raises(ValueError, match="already carries adapters"):
        lk.apply_lora(model, 2, target_modules=[], target_parameters=BOTH)
    lk.add_adapter(model, "other", 2)  # on linear layers alone
    assert experts_of(model)[0][1].gate_up_proj_lora.names == ("default",)
    lk.set_adapter(model, "other")
    with lk.disable_adapters(model):
        frozen = model(TOKENS).logits
    torch.testing.assert_close(model(TOKENS).logits, frozen, rtol=1e-4, atol=1e-4)  # B is zero
    lk.delete_adapter(model, "default")
    assert not hasattr(experts_of(model)[0][1], "gate_up_proj_lora")
    assert not experts_of(model)[0][1].gate_up_proj.requires_grad
    lk.remove_lora(model)
    assert all(p.requires_grad for p in model.parameters())


def test_a_file_that_does_not_fit(tmp_path):
    model, _ = adapted()
    lk.save_adapter(model, tmp_path)
    other = base("qwen3_moe")  # five experts, not four
    with pytest.raises(ValueError, match=r"expected \[5 r, "):
        lk.load_adapter(other, tmp_path)
    assert not any("lora" in n for n in other.state_dict())
