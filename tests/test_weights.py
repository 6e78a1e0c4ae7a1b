"""Weights that are not where they seem: offloaded, tied by memory, replaced, pruned, quantised."""

import contextlib

import pytest
import torch
from tiny_models import build
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from lora_kernels import (
    FusedLoRALinear,
    add_adaptor_layer,
    adjust_rank,
    apply_lora,
    disable_adapters,
    load_adapter,
    lora_parameters,
    lora_state_dict,
    merge_lora,
    remove_lora,
    save_adapter,
    train_model,
    unmerge_lora,
)
from lora_kernels.nn import LoRALayer, merging
from lora_kernels.targets import owners

KEEP = (True, "cpu", False)


def mlp(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)).to(dtype)


def fill(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.normal_(std=0.3)
    return model


def adapted(model=None, **options):
    model = mlp() if model is None else model
    apply_lora(model, 2, alpha=4, **options)
    return fill(model)


def batch(rows=5, width=8):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(2))


def state(model):
    return {
        name: (type(model.get_submodule(name.rpartition(".")[0])), tensor.detach().clone())
        for name, tensor in model.state_dict(keep_vars=True).items()
    } | {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def assert_unchanged(before, model):
    after = state(model)
    assert before.keys() == after.keys()
    for name, value in before.items():
        if isinstance(value, tuple) and not value[1].is_meta:
            assert value[0] is after[name][0]
            assert torch.equal(value[1], after[name][1]), name


# ---------------------------------------------------------------------------------- offloaded


def offload(model, how, folder):
    accelerate = pytest.importorskip("accelerate")
    if how == "cpu":
        accelerate.cpu_offload(model, execution_device="cpu")
    elif how == "disk":
        accelerate.disk_offload(model, str(folder), execution_device="cpu")
    else:
        where = {"0": "disk", "1": "cpu", "2": "cpu"}
        accelerate.dispatch_model(
            model, where, main_device="cpu", offload_dir=str(folder), force_hooks=True
        )
    return model


def change_rank(model):
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
    data = [(batch(), batch())] * 2
    adjust_rank(model, 2, 1, data, nn.functional.mse_loss, optimizer, progress=False)


def train(model):
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
    train_model(model, [(batch(), batch())], nn.functional.mse_loss, optimizer, progress=False)


CHANGES = {
    "merge_lora": merge_lora,
    "final merge_lora": lambda model: merge_lora(model, keep_base=False),
    "merge": lambda model: model[0].merge(),
    "remove_lora": remove_lora,
    "to_linear": lambda model: model[0].to_linear(),
    "set_factors": lambda model: model[0].set_factors(torch.ones(1, 8), torch.ones(12, 1)),
    "reset": lambda model: model[0].reset_lora_parameters(),
    "adjust_rank": change_rank,
    "train_model": train,
    "lora_parameters": lambda model: list(lora_parameters(model)),
    "apply_lora": lambda model: apply_lora(model, 3, target_modules=["2"]),
}
ON_A_LAYER = ("merge", "to_linear", "set_factors", "reset")


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("how", ["cpu", "disk", "part"])
def test_what_would_change_an_offloaded_layer_is_refused(how, change, tmp_path):
    model = adapted(mlp(), target_modules=["0"]) if change == "apply_lora" else adapted()
    expected = model(batch())
    offload(model, how, tmp_path)
    before = state(model)
    named = "" if change in ON_A_LAYER else r"\b[02]\b.* "
    with pytest.raises(ValueError, match=rf"(?s){named}accelerate"):
        CHANGES[change](model)
    assert_unchanged(before, model)
    assert torch.equal(model(batch()), expected)
    assert not model[0].merged
    assert isinstance(model[0], LoRALayer)


@pytest.mark.parametrize("how", ["cpu", "disk", "part"])
def test_an_offloaded_adapter_is_saved_with_its_values(how, tmp_path):
    model = adapted(modules_to_save=["2"])
    fresh = mlp()
    plain, expected = fresh(batch()), model(batch())
    tensors = {name: tensor.clone() for name, tensor in lora_state_dict(model).items()}
    offload(model, how, tmp_path / "weights")
    found = lora_state_dict(model)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    save_adapter(model, tmp_path / "adapter")
    load_adapter(fresh, tmp_path / "adapter")
    torch.testing.assert_close(fresh(batch()), expected)
    if how != "part":
        with pytest.raises(ValueError, match=r"model: 2 is offloaded"), disable_adapters(model):
            pass
        with pytest.raises(ValueError, match="model: 0 is offloaded"):
            load_adapter(model, tmp_path / "adapter")
    torch.testing.assert_close(model(batch()), expected)
    alone = adapted()
    offload(alone, how, tmp_path / "alone")
    with disable_adapters(alone):
        torch.testing.assert_close(alone(batch()), plain)


def test_a_merged_model_is_not_unmerged_or_removed_while_its_base_is_elsewhere(tmp_path):
    model = adapted()
    merge_lora(model)
    offload(model, "cpu", tmp_path)
    for undo in (unmerge_lora, remove_lora, lambda model: model[0].unmerge()):
        with pytest.raises(ValueError, match=r"offloaded by accelerate|hook of accelerate"):
            undo(model)
    assert model[0].merged
    assert model[2].merged


def test_weights_without_values():
    model = adapted().to("meta")
    for refused in (merge_lora, lambda model: model[0].merge()):
        with pytest.raises(ValueError, match=r"merge.*weight is on the meta device"):
            refused(model)
    with pytest.raises(ValueError, match=r"lora_A\.weight is on the meta device"):
        save_adapter(model, "nowhere")
    remove_lora(model)
    assert type(model[0]) is nn.Linear
    merged = adapted()
    merge_lora(merged)
    with pytest.raises(ValueError, match="remove_lora: 0, 2: its weight is on the meta device"):
        remove_lora(merged.to("meta"))
    assert merged[0].merged


# ------------------------------------------------------------------------------ tied by memory


def test_weights_that_share_memory_are_tied():
    model = mlp()
    extra = nn.Linear(8, 12)
    extra.weight = nn.Parameter(model[0].weight.data)  # another object, the same storage
    model.append(extra)
    adapted(model, target_modules=["0", "2", "3"])
    before = state(model)
    for keep in KEEP:
        with pytest.raises(ValueError, match=r"merge_lora: .* 0\.weight and 3\.weight share"):
            merge_lora(model, keep)
        assert_unchanged(before, model)
    model = mlp()
    model.register_buffer("view", model[0].weight.data[3:5])
    adapted(model, target_modules=["0"])
    with pytest.raises(ValueError, match=r"view and 0\.weight share"):
        merge_lora(model)
    plain = mlp()
    plain.append(nn.Linear(8, 12))
    plain[3].weight = nn.Parameter(plain[0].weight.data)
    before = state(plain)
    with pytest.raises(ValueError, match=r"init='pissa': .* 0\.weight and 3\.weight share"):
        apply_lora(plain, 2, init="pissa", target_modules=["0"])
    with pytest.raises(ValueError, match=r"modules_to_save: 3\.weight is tied to 0\.weight"):
        apply_lora(plain, 2, modules_to_save=["3"])
    assert_unchanged(before, plain)


@pytest.mark.parametrize("by_columns", [False, True])
def test_parts_of_one_packed_weight_are_no_ties(by_columns):
    packed = torch.randn(8, 24, generator=torch.Generator().manual_seed(0))
    parts = packed.chunk(3, 1) if by_columns else packed.view(24, 8).chunk(3)
    model = nn.ModuleList(nn.Linear(8, 8) for _ in parts)
    for linear, part in zip(model, parts, strict=True):
        linear.weight = nn.Parameter(part)
    adapted(model)
    assert [len(names) for names in owners(model, beside=True).values()] == [1] * 12
    expected = [linear(batch()) for linear in model]
    merge_lora(model, keep_base=False)
    for linear, value in zip(model, expected, strict=True):
        torch.testing.assert_close(linear(batch()), value)
    model[0].weight = nn.Parameter(packed.view(-1)[4:68].view(8, 8))
    assert {"0.weight", "1.weight"} <= set(owners(model)[model[0].weight])


# ------------------------------------------------------------------------------------- replaced


@pytest.mark.parametrize("trained", ["lm_head", "embed_tokens", "head in full"])
def test_embeddings_that_are_trained_are_not_replaced(trained):
    pytest.importorskip("transformers")
    model = build("llama")
    size = model.config.vocab_size
    if trained == "lm_head":
        apply_lora(model, 2, target_modules=["lm_head"])
    else:
        name = "lm_head" if trained == "head in full" else trained
        apply_lora(model, 2, modules_to_save=[name])
    fill(model)
    before, tokens = state(model), torch.arange(8)[None]
    expected = model(tokens).logits
    replacing = [lambda: model.resize_token_embeddings(size + 6, mean_resizing=False),
                 lambda: model.resize_token_embeddings(pad_to_multiple_of=size + 1)]  # fmt: skip
    if trained == "embed_tokens":
        replacing += [lambda: model.set_input_embeddings(nn.Embedding(9, 32)),
                      lambda: model.model.set_input_embeddings(nn.Embedding(9, 32))]  # fmt: skip
    else:
        replacing += [lambda: model.set_output_embeddings(nn.Linear(32, 9))]
    for replace in replacing:
        with pytest.raises(ValueError, match=f"would replace .*{trained.split()[0]}|lm_head"):
            replace()
        assert_unchanged(before, model)
    assert model.resize_token_embeddings(size) is model.get_input_embeddings()
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    model.set_output_embeddings(model.get_output_embeddings())
    assert torch.equal(model(tokens).logits, expected)
    remove_lora(model)
    model.resize_token_embeddings(size + 6, mean_resizing=False)
    assert model.lm_head.out_features == size + 6


def test_embeddings_beside_the_adapters_may_be_resized():
    pytest.importorskip("transformers")
    model = build("llama")
    adapted(model)
    tokens, size = torch.arange(8)[None], model.config.vocab_size
    expected = model(tokens).logits
    model.resize_token_embeddings(size + 6, mean_resizing=False)
    torch.testing.assert_close(model(tokens).logits[..., :size], expected)


# --------------------------------------------------------------------- computed from elsewhere

RECOMPUTED = {
    "prune": lambda layer, name: prune.random_unstructured(layer, name, 0.5),
    "pruned twice": lambda layer, name: [
        prune.random_unstructured(layer, name, 0.3) for _ in range(2)
    ],
    "weight_norm": lambda layer, name: nn.utils.weight_norm(layer, name),
    "spectral_norm": lambda layer, name: nn.utils.spectral_norm(layer, name),
    "new weight_norm": lambda layer, name: parametrizations.weight_norm(layer, name),
    "parametrization": lambda layer, name: parametrize.register_parametrization(
        layer, name, nn.Tanh()
    ),
}
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")


@pytest.mark.parametrize("how", RECOMPUTED)
def test_a_computed_base_is_skipped(how):
    model = mlp()
    RECOMPUTED[how](model[0], "weight")
    before = state(model)
    report = apply_lora(model, 2, target_modules=["0", "2"])
    assert report.replaced == ["2"]
    assert "weight" in report.skipped["0"]
    with pytest.raises(ValueError, match=r"\n  0: .*weight"):
        apply_lora(model, 2, target_modules=["0"])
    with pytest.raises(ValueError, match="weight"):
        FusedLoRALinear.from_linear(model[0], 2)
    remove_lora(model)
    assert_unchanged(before, model)


@pytest.mark.parametrize("how", RECOMPUTED)
def test_a_base_computed_after_the_fact(how, tmp_path):
    model = adapted().eval()
    RECOMPUTED[how](model[0], "weight")
    assert isinstance(model[0], LoRALayer)
    expected, before = model(batch()), state(model)
    for change in (
        merge_lora,
        lambda model: model[0].merge(),
        lambda model: model[0].to_linear(),
        remove_lora,
    ):
        with pytest.raises(ValueError, match=r"weight is computed from .*weight"):
            change(model)
        assert_unchanged(before, model)
    assert torch.equal(model(batch()), expected)
    assert len(list(lora_parameters(model))) == 4
    save_adapter(model, tmp_path)


@pytest.mark.parametrize("how", RECOMPUTED)
def test_a_computed_factor_trains_and_is_saved_as_it_acts(how, tmp_path):
    model = adapted()
    RECOMPUTED[how](model[0], "lora_B")
    trained = list(lora_parameters(model))
    assert all(isinstance(parameter, nn.Parameter) for parameter in trained)
    assert {id(p) for p in trained} == {id(p) for p in model.parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained, lr=0.1)
    before = model[0].lora_B.detach().clone()
    model(batch()).square().sum().backward()
    nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    model.eval()
    found = lora_state_dict(model)  # before the next forward computes lora_B anew
    expected = model(batch())
    assert torch.equal(found["0.lora_B"], model[0].lora_B)
    assert not torch.equal(before, model[0].lora_B)
    save_adapter(model, tmp_path)
    fresh = mlp()
    load_adapter(fresh, tmp_path)
    torch.testing.assert_close(fresh(batch()), expected)
    plain = adapted()
    plain.load_state_dict(found, strict=False)
    torch.testing.assert_close(plain(batch()), expected)


@pytest.mark.parametrize("how", RECOMPUTED)
def test_a_computed_factor_is_not_replaced(how, tmp_path):
    model = adapted()
    save_adapter(model, tmp_path)
    plain = {name: tensor.clone() for name, tensor in lora_state_dict(model).items()}
    RECOMPUTED[how](model[0], "lora_B")
    model.eval()
    expected, before = model(batch()), state(model)
    for change in (
        lambda: merge_lora(model, keep_base=False),
        lambda: remove_lora(model),
        lambda: model[0].set_factors(torch.ones(1, 8), torch.ones(12, 1)),
        lambda: model[0].reset_parameters(),
        lambda: change_rank(model),
        lambda: load_adapter(model, tmp_path),
    ):
        with pytest.raises(ValueError, match=r"lora_B is computed from .*lora_B"):
            change()
        assert_unchanged(before, model)
    with pytest.raises(RuntimeError, match="0: cannot take lora_A, lora_B: its lora_B is computed"):
        model.load_state_dict(plain, strict=False)
    merge_lora(model)
    torch.testing.assert_close(model(batch()), expected)
    unmerge_lora(model)
    assert torch.equal(model(batch()), expected)


def test_pruning_made_permanent_ends_the_refusals():
    model = adapted()
    prune.l1_unstructured(model[0], "lora_B", 0.5)
    prune.l1_unstructured(model[2], "weight", 0.5)
    for pruned, name in ((model[0], "lora_B"), (model[2], "weight")):
        prune.remove(pruned, name)
    expected = model(batch())
    merge_lora(model, keep_base=False)
    remove_lora(model)
    torch.testing.assert_close(model(batch()), expected)


# ---------------------------------------------------------------------------------- odd tensors


class Scaled(torch.Tensor):
    """As quantised weights are: knows nn.functional.linear and little else."""

    @staticmethod
    def __new__(cls, values, scale):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float32)

    def __init__(self, values, scale):
        self.values, self.scale = values, scale

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].values, args[0].scale)
        raise NotImplementedError(f"{func} of Scaled")


def with_weight(weight):
    linear = nn.Linear(8, 8)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def without_bias():
    linear = nn.Linear(8, 8)
    del linear.bias
    return linear


def cast(dtype):
    return lambda: with_weight(torch.ones(8, 8).to(dtype))


ODD = {
    "Scaled, a tensor subclass .*fuse_peft": lambda: with_weight(Scaled(torch.ones(8, 8), 2.0)),
    "torch.int8": cast(torch.int8),
    "torch.uint8": cast(torch.uint8),
    "torch.float8_e4m3fn; an adapter stands beside": cast(torch.float8_e4m3fn),
    "torch.complex64": cast(torch.complex64),
    r"shape \(8, 4\), expected \(8, 8\)": lambda: with_weight(torch.ones(8, 4)),
    r"shape \(32, 1\)": lambda: with_weight(torch.ones(32, 1)),
    "its bias is no parameter": without_bias,
}


@pytest.mark.parametrize("reason", ODD)
def test_odd_weights_are_skipped_with_the_reason(reason):
    model = nn.ModuleDict({"good": nn.Linear(8, 8), "odd": ODD[reason]()})
    report = apply_lora(model, 2)
    assert report.replaced == ["good"]
    with pytest.raises(ValueError, match=rf"\n  odd: .*{reason}"):
        apply_lora(model, 2, target_modules=["odd"])
    with pytest.raises(ValueError, match="linear: its"):
        FusedLoRALinear.from_linear(model["odd"], 2)
    assert report.skipped.keys() == {"odd"}


def test_a_weight_quantised_under_its_adapter_is_not_merged(tmp_path):
    model = adapted()
    base = model[0].weight.detach().clone()
    model[0].weight = nn.Parameter(Scaled(base, 1.0), requires_grad=False)
    for merge in (merge_lora, lambda model: model[0].merge()):
        with pytest.raises(ValueError, match="its weight is of type Scaled"):
            merge(model)
    assert not model[2].merged
    save_adapter(model, tmp_path)
    remove_lora(model)
    assert type(model[0]) is nn.Linear


def test_a_lazy_module_leaves_the_model_as_it_was(tmp_path):
    adapter = adapted(nn.Sequential(nn.Linear(8, 12)))
    save_adapter(adapter, tmp_path)
    for give in (lambda model: apply_lora(model, 2), lambda model: load_adapter(model, tmp_path)):
        model = nn.Sequential(nn.Linear(8, 12), nn.LazyLinear(4))
        with pytest.raises(ValueError, match=r"model: 1\.weight has no shape yet"):
            give(model)
        assert [type(module) for module in model] == [nn.Linear, nn.LazyLinear]
        assert model[0].weight.requires_grad
        model(batch())
        assert apply_lora(model, 2).replaced == ["0", "1"]


# -------------------------------------------------------------------------------- all or nothing


@pytest.mark.parametrize("keep", KEEP)
def test_an_interrupted_merge(keep, monkeypatch):
    model = adapted(mlp().append(nn.Linear(8, 8)).append(nn.Linear(8, 8)))
    expected, before = model(batch()), state(model)
    take_up, calls = merging.Merging._take_up, []

    def interrupted(*args):
        calls.append(args)
        if keep or len(calls) != 3:
            take_up(*args)  # with a base to go back to, it may be too late
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(merging.Merging, "_take_up", interrupted)
    warns = contextlib.nullcontext()
    if not keep:
        warns = pytest.warns(UserWarning, match="stopped at 3; merged for good are 0, 2")
    with warns, pytest.raises(KeyboardInterrupt):
        merge_lora(model, keep)
    assert [model[i].merged for i in (0, 2, 3, 4)] == [not keep, not keep, False, False]
    torch.testing.assert_close(model(batch()), expected)
    if keep:
        assert_unchanged(before, model)
        assert all(model[i].merged_base is model[i]._base_weight_cpu is None for i in (0, 2, 3))
    merge_lora(model, keep)
    torch.testing.assert_close(model(batch()), expected)


def test_unmerging_is_refused_as_a_whole():
    model = adapted()
    model[0].merge()
    model[2].merge(keep_base=False)
    with pytest.raises(RuntimeError, match="unmerge_lora: 2 was merged with keep_base=False"):
        unmerge_lora(model)
    assert model[0].merged


@pytest.mark.parametrize("change", ["forward", "hook"])
def test_a_forward_overridden_since_is_not_lost(change):
    model = adapted()
    if change == "forward":
        inner = model[0].forward
        model[0].forward = lambda x: inner(x) + 1
    else:
        hooks = pytest.importorskip("accelerate.hooks")
        hooks.add_hook_to_module(model[0], hooks.ModelHook())
    expected = model(batch())
    for remove in (remove_lora, lambda model: model[0].to_linear()):
        with pytest.raises(ValueError, match=r"forward overridden|_hf_hook"):
            remove(model)
    assert torch.equal(model(batch()), expected)


# ------------------------------------------------------------------------------------ fp32 adapters


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_adapters_beside_16_bits_move(dtype):
    model = adapted(mlp(dtype))
    before = model[0].lora_A.detach().clone()
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=1e-5, weight_decay=0)
    x = batch().to(dtype)
    train_model(model, [(x, x)] * 3, nn.functional.mse_loss, optimizer, progress=False)
    assert (model[0].lora_A != before).all()
    assert add_adaptor_layer(mlp(dtype), 2)[0].lora_B.dtype == torch.float32
    asked = mlp(dtype)
    assert apply_lora(asked, 2, adapter_dtype=dtype).adapter_bytes == 2 * 2 * 40
    assert {p.dtype for p in lora_parameters(asked)} == {dtype}


@pytest.mark.parametrize("of_file", [torch.float32, torch.bfloat16])
def test_files_become_fp32_adapters_as_in_peft(of_file, tmp_path):
    peft = pytest.importorskip("peft")
    source = adapted(mlp(torch.bfloat16), adapter_dtype=of_file)
    save_adapter(source, tmp_path)
    model = mlp(torch.bfloat16)
    load_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(mlp(torch.bfloat16), tmp_path).base_model.model[0]
    assert theirs.lora_A["default"].weight.dtype == model[0].lora_A.dtype == torch.float32
    assert torch.equal(model[0].lora_A, source[0].lora_A.float())
    assert torch.equal(model[0].lora_A, theirs.lora_A["default"].weight)
    present = adapted(mlp(torch.bfloat16), adapter_dtype=torch.bfloat16)
    load_adapter(present, tmp_path)
    assert present[0].lora_A.dtype == torch.bfloat16


def test_16_bit_adapters_of_a_state_dict_go_into_fp32_ones():
    old = adapted(mlp(torch.bfloat16), adapter_dtype=torch.bfloat16)
    new = adapted(mlp(torch.bfloat16))
    new.load_state_dict(old.state_dict())
    assert torch.equal(new[0].lora_B, old[0].lora_B.float())
    assert torch.equal(new(batch().bfloat16()), old(batch().bfloat16()))


def test_what_trains_and_is_not_saved_is_named(tmp_path, recwarn):
    model = adapted()
    save_adapter(model, tmp_path)
    assert not recwarn
    model[0].bias.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"0\.bias: trainable, but no part of the adapter"):
        save_adapter(model, tmp_path)
