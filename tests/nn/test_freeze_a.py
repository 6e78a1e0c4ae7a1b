"""LoRA-FA: `freeze_a` leaves lora_A what it starts as, and no layer keeps its x for backward."""

import copy
import itertools
import warnings

import pytest
import torch
from torch import nn

import lora_kernels as lk
from lora_kernels.nn import FusedLoRALinear

K, N, R = 24, 40, 4


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(K, N), nn.Tanh(), nn.Linear(N, 8))


def adapted(**options):
    found = model()
    lk.apply_lora(found, R, **{"target_modules": ["0", "2"], "freeze_a": True, **options})
    return found


def layers(found):
    return [found[0], found[2]]


def is_frozen(found):
    return all(
        not layer.lora_A.requires_grad and layer.lora_B.requires_grad for layer in layers(found)
    )


def kept(run):
    """Bytes that autograd keeps of a forward, storages once, beside parameters."""
    storages = {}

    def pack(tensor):
        if not isinstance(tensor, nn.Parameter) and tensor.numel():
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = run()
    return sum(storages.values()), y


@pytest.mark.parametrize("rows", [3, 500])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_x_is_not_kept(rows, dropout):
    base = nn.Linear(K, N)
    x = torch.randn(rows, K)
    found = {}
    for freeze_a in (False, True):
        layer = FusedLoRALinear.from_linear(
            copy.deepcopy(base), R, freeze_a=freeze_a, dropout=dropout, init="random"
        )
        found[freeze_a], y = kept(lambda layer=layer: layer(x))
        y.sum().backward()
        assert (layer.lora_A.grad is None) == freeze_a
        assert layer.lora_B.grad.any()
    assert found[False] - found[True] == x.numel() * x.element_size()


def peak(step):
    """The most bytes that a step holds beside what was there before it."""
    with torch.profiler.profile(profile_memory=True) as found:
        step()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(sizes))


def test_the_bytes_of_a_training_step_of_a_model():
    """Of a Llama's step the inputs that only adapters would read are not kept."""
    tiny = pytest.importorskip("tiny_models")
    ids = torch.randint(64, (2, 32), generator=torch.Generator().manual_seed(0))
    saved, most, inputs = {}, {}, {}

    def note(layer, args):
        inputs[layer] = args[0].nbytes

    for freeze_a in (False, True):
        llama = tiny.build(intermediate_size=256).train()
        lk.apply_lora(llama, R, freeze_a=freeze_a, target_modules=["o_proj", "down_proj"])
        optimizer = torch.optim.AdamW(lk.lora_parameters(llama))

        def step(model=llama, optimizer=optimizer):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        step()
        most[freeze_a] = peak(step)
        inputs.clear()
        for layer in lk.adapters.lora_layers(llama):
            layer[1].register_forward_pre_hook(note)
        saved[freeze_a], _ = kept(lambda model=llama: model(input_ids=ids, labels=ids))
        # The attention of the second block keeps its output itself.
        alone = sum(inputs.values()) - inputs[llama.model.layers[1].self_attn.o_proj]
    assert saved[False] - saved[True] == alone
    assert most[False] - most[True] > alone / 2


def test_gradients_are_those_of_a_layer_whose_A_trains():
    x = torch.randn(6, K, requires_grad=True)
    grads = []
    for freeze_a in (False, True):
        found = adapted(freeze_a=freeze_a, init="random", alpha=8)
        for i, layer in enumerate(layers(found)):
            torch.manual_seed(i)
            for p in (layer.lora_A, layer.lora_B):
                p.data.copy_(torch.randn(p.shape))
        (gx,) = torch.autograd.grad(found(x).square().sum(), x, retain_graph=True)
        found(x).square().sum().backward()
        grads.append([gx, *(layer.lora_B.grad for layer in layers(found))])
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"init": "olora"}, {"init": "pissa"}])
def test_A_is_no_parameter_to_train_and_the_checks_know(options):
    found, x = adapted(dropout=0.1, **options), torch.randn(16, K)
    assert is_frozen(found)
    trained = list(lk.lora_parameters(found))
    assert not any(p is layer.lora_A for p in trained for layer in layers(found))
    assert [p for p in found.parameters() if p.requires_grad] == trained
    groups = lk.lora_parameters(found, lr=1.0, loraplus_ratio=4)
    assert [group["lr"] for group in groups] == [4.0]
    assert lk.check_adapters(found, x).ok
    A = [layer.lora_A.clone() for layer in layers(found)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = [(x, torch.zeros(16, 8))] * 4
        history = lk.train_model(
            found, data, nn.functional.mse_loss, torch.optim.AdamW(trained, lr=1e-2), epochs=3
        )
    assert history.loss[-1] < history.loss[0]
    assert all(torch.equal(a, layer.lora_A) for a, layer in zip(A, layers(found), strict=True))
    assert lk.check_adapters(found, x).ok


def test_it_stays_frozen(tmp_path):
    found, x = adapted(), torch.randn(5, K)
    assert "freeze_a=True" in repr(found[0])
    state = {key: value.clone() for key, value in found.state_dict().items()}
    for assign in (False, True):
        found.load_state_dict(state, assign=assign)
        assert is_frozen(found)
    copied = copy.deepcopy(found)
    assert is_frozen(copied)
    assert copied[0].freeze_a
    with lk.disable_adapters(found):
        assert is_frozen(found)
    lk.merge_lora(found)
    lk.unmerge_lora(found)
    assert is_frozen(found)
    lk.add_adapter(found, "other", 2)
    lk.add_adapter(found, "third", 2, freeze_a=True)
    assert is_frozen(found)
    assert found[0].adapters["other"].lora_A.requires_grad
    assert not found[0].adapters["third"].lora_A.requires_grad
    assert len(list(lk.lora_parameters(found, adapter="other"))) == 4
    assert list(lk.lora_parameters(found, adapter="third")) == [
        layer.adapters["third"].lora_B for layer in layers(found)
    ]
    lk.set_adapter(found, ["default", "third"])
    assert lk.check_adapters(found, x).ok
    lk.delete_adapter(found, "default")
    assert not found[0].freeze_a
    assert found[0].lora_A.requires_grad
    lk.delete_adapter(found, "other")
    assert found[0].freeze_a
    assert is_frozen(found)
    found[0].reset_lora_parameters()
    found[0].set_factors(torch.randn(3, K), torch.randn(N, 3))
    assert is_frozen(found)


def test_to_linear_and_remove_lora_give_back_what_was():
    found = adapted()
    linear = found[0].to_linear()
    assert type(linear) is nn.Linear
    assert linear.weight.requires_grad
    plain = model()
    plain[0].weight.requires_grad_(False)
    lk.apply_lora(plain, R, target_modules=["0"], modules_to_save=["2"], freeze_a=True)
    assert {n for n, p in plain.named_parameters() if p.requires_grad} == {
        "0.lora_B",
        "2.weight",
        "2.bias",
    }
    lk.remove_lora(plain)
    assert {n for n, p in plain.named_parameters() if not p.requires_grad} == {"0.weight"}
    assert not hasattr(plain[0], "freeze_a")


def test_files_are_pefts_plain_ones(tmp_path):
    peft = pytest.importorskip("peft")
    found, x = adapted(init="gaussian", alpha=8), torch.randn(5, K)
    for layer in layers(found):
        nn.init.normal_(layer.lora_B)
    lk.save_adapter(found, tmp_path)
    torch.testing.assert_close(peft.PeftModel.from_pretrained(model(), tmp_path)(x), found(x))
    other = adapted()
    lk.load_adapter(other, tmp_path)
    torch.testing.assert_close(other(x), found(x))
    assert is_frozen(other)
    config = peft.LoraConfig(r=R, target_modules=["0", "2"])
    third = model()
    report = lk.apply_lora(third, config, freeze_a=True)
    assert is_frozen(third)
    assert report.trainable == sum(p.numel() for p in lk.lora_parameters(third)) == R * (N + 8)
    assert report.adapter_bytes == 4 * R * (K + N + N + 8)


def test_bad_input():
    with pytest.raises(TypeError, match="freeze_a: expected True or False, got 'no'"):
        adapted(freeze_a="no")
    assert FusedLoRALinear(K, N, R, freeze_a=True).lora_A.requires_grad is False
    found, x = adapted(), torch.randn(5, K)
    nn.init.zeros_(found[0].lora_A)
    nn.init.ones_(found[0].lora_B)
    assert "lora_A is zero and frozen" in lk.check_adapters(found, x).problems["0"]
    found = adapted()
    found[0].lora_B.requires_grad_(False)
    assert "is frozen" in lk.check_adapters(found, x).problems["0"]
