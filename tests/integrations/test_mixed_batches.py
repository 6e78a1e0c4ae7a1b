"""PEFT's `adapter_names` on fused layers: one call for a batch of many adapters."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lora_kernels
from lora_kernels import fuse_peft, unfuse_peft

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
NAMES = ["a", "__base__", "b", "a", "c", "b"]


class Count(TorchDispatchMode):
    """The fused ops that are called, by name."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "lora_kernels":
            self.calls.append(func.__name__)
        return func(*args, **(kwargs or {}))


def llama(**options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    base = transformers.LlamaForCausalLM(config)

    def adapter(r, **more):
        targets = ["q_proj", "v_proj", "gate_proj", "down_proj"]
        more = {**options, **more}
        return peft.LoraConfig(
            r=r, lora_alpha=4 * r, target_modules=targets, init_lora_weights=False, **more
        )

    model = peft.get_peft_model(base, adapter(4), adapter_name="a")
    model.add_adapter("b", adapter(8, use_rslora=True))
    model.add_adapter("c", adapter(2))
    return model.eval()


@pytest.fixture
def tokens():
    return torch.randint(0, 64, (6, 7), generator=torch.Generator().manual_seed(1))


def both(model):
    fused = copy.deepcopy(model)
    fuse_peft(fused)
    return fused, model


def logits(model, tokens, names=NAMES):
    with Count() as count:
        out = model(tokens, adapter_names=names).logits
    return out, count.calls


@torch.no_grad()
@pytest.mark.parametrize("names", [NAMES, sorted(NAMES, reverse=True), ["c"] * 6])
def test_a_mixed_batch(tokens, names):
    fused, plain = both(llama())
    ours, calls = logits(fused, tokens, names)
    theirs, _ = logits(plain, tokens, names)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert set(calls) == {"lora_linear_grouped.default"}
    assert len(calls) == 8


@torch.no_grad()
def test_samples_of_the_base_are_the_base_s(tokens):
    fused, _ = both(llama())
    ours, _ = logits(fused, tokens)
    with fused.disable_adapter():
        base = fused(tokens).logits
    torch.testing.assert_close(ours[1], base[1], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(ours[0], base[0], atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 3])
def test_generation(tokens, beams):
    options = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False, "pad_token_id": 0}
    fused, plain = both(llama())
    ours, theirs = (
        model.generate(input_ids=tokens, adapter_names=NAMES, **options) for model in (fused, plain)
    )
    assert torch.equal(ours, theirs)


def test_gradients_of_a_mixed_batch(tokens):
    """Where PEFT computes them: without the training mode, which it refuses."""
    models, grads = both(llama()), []
    for model in models:
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        logits(model, tokens)[0].square().sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    ours, theirs = grads
    assert ours.keys() == theirs.keys()
    for name, grad in theirs.items():
        assert (ours[name] - grad).norm() <= 1e-4 * grad.norm() + 1e-6, name


def trained_together(model, tokens, batches):
    """Gradients by adapter, of batches of other rows whose forwards all come first."""
    model.train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    losses = [model(tokens, adapter_names=names).logits.square().sum() for names in batches]
    for loss in reversed(losses):
        loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if "lora_" in n}


def trained_alone(model, tokens, batches):
    """The same by PEFT, one adapter after the other."""
    model.train()
    grads = {}
    for adapter in "abc":
        model.set_adapter(adapter)
        model.zero_grad()
        for names in batches:
            rows = [i for i, name in enumerate(names) if name == adapter]
            if rows:
                model(tokens[rows]).logits.square().sum().backward()
        grads |= {n: p.grad for n, p in model.named_parameters() if f".{adapter}." in n}
        grads = {n: None if g is None else g.clone() for n, g in grads.items()}
    return grads


BATCHES = [NAMES, ["b", "a", "__base__", "b", "b", "a"]]


@pytest.mark.parametrize("options", [None, {"use_reentrant": True}, {"use_reentrant": False}])
def test_training(tokens, options):
    fused, plain = both(llama())
    if options is not None:
        fused.gradient_checkpointing_enable(options)
        fused.enable_input_require_grads()
    with Count() as count:
        ours = trained_together(fused, tokens, BATCHES)
    theirs = trained_alone(plain, tokens, BATCHES)
    assert ours.keys() == theirs.keys()
    for name, grad in theirs.items():
        assert (ours[name] - grad).norm() <= 1e-4 * grad.norm(), name
    assert count.calls.count("lora_linear_grouped.default") == (16 if options is None else 32)
    assert not fused.base_model.model.model.layers[0].self_attn.q_proj._rows


def test_training_leaves_absent_adapters_alone(tokens):
    fused, _ = both(llama())
    grads = trained_together(fused, tokens, [["b", "__base__"] * 3])
    assert {n.split(".")[-2] for n, grad in grads.items() if grad is not None} == {"b"}


def test_rows_by_our_own_context(tokens):
    fused, plain = both(llama())
    with lora_kernels.adapter_rows(fused, [None if n == "__base__" else n for n in NAMES]):
        torch.testing.assert_close(
            fused(tokens).logits, plain(tokens, adapter_names=NAMES).logits, rtol=1e-4, atol=1e-4
        )
        with fused.disable_adapter(), plain.disable_adapter():
            torch.testing.assert_close(fused(tokens).logits, plain(tokens).logits)
        copied = copy.deepcopy(fused)
    torch.testing.assert_close(copied(tokens).logits, plain(tokens).logits)
    fused.merge_adapter(["a"])
    with pytest.raises(ValueError, match="is merged; call unmerge_adapter"):
        lora_kernels.adapter_rows(fused, ["a"] * 6).__enter__()


def test_training_that_is_not_served_is_refused(tokens):
    fused, plain = both(llama())
    with pytest.raises(ValueError, match=r"Linear of PEFT, which cannot have rows.*fuse_peft"):
        lora_kernels.adapter_rows(plain, ["a"] * 6).__enter__()
    fused.train()
    with pytest.raises(ValueError, match="got 'mal', known adapters are 'a', 'b', 'c'"):
        fused(tokens, adapter_names=["a", "mal", "b", "a", "c", "b"])
    fused.base_model.model.model.layers[0].self_attn.q_proj.lora_dropout["a"] = torch.nn.Dropout(
        0.5
    )
    with pytest.raises(ValueError, match="cannot be served: its adapters differ in dropout"):
        fused(tokens, adapter_names=NAMES)
    unfuse_peft(fused)
    with pytest.raises(ValueError, match="Cannot pass `adapter_names` when the model is in train"):
        fused(tokens, adapter_names=NAMES)
    saved = llama(modules_to_save=["lm_head"])
    fuse_peft(saved)
    saved.train()
    with pytest.raises(ValueError, match=r"lm_head is ModulesToSaveWrapper of PEFT"):
        saved(tokens, adapter_names=NAMES)


@torch.no_grad()
def test_fp32_adapters_on_a_16_bit_base(tokens):
    fused, plain = both(llama())
    for model in (fused, plain):
        model.base_model.model.to(torch.bfloat16)
        for name, parameter in model.named_parameters():
            parameter.data = parameter.float() if "lora_" in name else parameter
    exact, _ = logits(plain.double(), tokens)
    ours, calls = logits(fused, tokens)
    assert calls
    assert (ours.double() - exact).norm() <= 0.05 * exact.norm()


@torch.no_grad()
def test_what_the_op_does_not_cover_is_peft_s(tokens):
    def spoil_dropout(model):
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        layer.lora_dropout["a"] = torch.nn.AlphaDropout(0.1)

    def spoil_hook(model):
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        layer.lora_A["b"].register_forward_hook(lambda *args: None)

    for spoil in (spoil_dropout, spoil_hook):
        fused, plain = both(llama())
        for model in (fused, plain):
            spoil(model)
            model.eval()
        ours, calls = logits(fused, tokens)
        theirs, _ = logits(plain, tokens)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        assert len(calls) == 7
    fused, plain = both(llama(lora_bias=True))
    ours, calls = logits(fused, tokens)
    assert torch.equal(ours, logits(plain, tokens)[0])
    assert not calls


@torch.no_grad()
def test_names_are_peft_s_to_check(tokens):
    fused, _ = both(llama())
    with pytest.raises(ValueError, match="non-existing adapter"):
        fused(tokens, adapter_names=["a", "x", "b", "a", "c", "b"])
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        fused(tokens, adapter_names=["a"])
