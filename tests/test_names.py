"""Adapters of wrapped models: files have the plain model's names, state dicts those of torch."""

import copy
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

from lora_kernels import apply_lora, load_adapter, lora_parameters, lora_state_dict, save_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    """One's own part called `module` is no wrapper, `_orig_mod` of one's own neither."""

    def __init__(self):
        super().__init__()
        self.module, self._orig_mod, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(self._orig_mod(self.module(x).relu()))


def plain():
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), nn.Linear(8, 4))


def adapted(seed=1):
    model = plain()
    apply_lora(model, 2, modules_to_save=["1.norm"])
    torch.manual_seed(seed)
    for parameter in lora_parameters(model):
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/pg", rank=0,
                                         world_size=1)  # fmt: skip
    yield
    torch.distributed.destroy_process_group()


def compiled(module):
    return torch.compile(module, backend="eager")


def blocks(wrap):
    def change(model):
        for name, child in list(model.named_children()):
            setattr(model, name, wrap(child))
        return model

    return change


def in_place(model):
    model[1].compile(backend="eager")
    model.compile(backend="eager")
    return model


WRAPPED = {
    "compiled": compiled,
    "compiled blocks": blocks(compiled),
    "compiled in place": in_place,
    "checkpointed blocks": blocks(checkpoint_wrapper),
    "checkpointed and compiled blocks": blocks(lambda block: compiled(checkpoint_wrapper(block))),
    "data parallel": nn.DataParallel,
    "averaged": AveragedModel,
    "averaged and compiled": lambda model: compiled(AveragedModel(blocks(compiled)(model))),
    "distributed": lambda model: nn.parallel.DistributedDataParallel(blocks(compiled)(model)),
}
wrappings = pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)


@wrappings
def test_files_have_the_plain_model_s_names(tmp_path, wrap, group):
    save_adapter(adapted(), tmp_path / "plain")
    save_adapter(wrap(adapted()), tmp_path / "wrapped")
    ours, theirs = tmp_path / "wrapped", tmp_path / "plain"
    assert json.loads((ours / CONFIG).read_text()) == json.loads((theirs / CONFIG).read_text())
    ours, theirs = load_file(ours / WEIGHTS), load_file(theirs / WEIGHTS)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert "base_model.model.0._orig_mod.lora_A.weight" in ours
    expected = adapted()(X)
    there = wrap(adapted(2))
    load_adapter(there, tmp_path / "plain")
    assert torch.equal(there(X), expected)
    fresh = plain()
    load_adapter(fresh, tmp_path / "wrapped")
    assert torch.equal(fresh(X), expected)


@wrappings
def test_a_file_goes_into_a_wrapped_plain_model(tmp_path, wrap, group):
    save_adapter(adapted(), tmp_path)
    fresh = wrap(plain())
    load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(X), adapted()(X))


@wrappings
def test_lora_state_dict_is_a_part_of_the_state_dict(wrap, group):
    source, target = wrap(adapted()), wrap(adapted(2))
    state = lora_state_dict(source)
    assert state.keys() < source.state_dict().keys()
    assert len(state) == 12
    result = target.load_state_dict(state, strict=False)
    assert not result.unexpected_keys
    assert torch.equal(target(X), adapted()(X))


@pytest.mark.parametrize("change", [
    lambda model: setattr(model, "head", nn.Linear(4, 4)),
    lambda model: model[0].norm.requires_grad_(True),
])  # fmt: skip
def test_what_trains_and_is_not_written_is_named(tmp_path, change):
    model = adapted()
    change(model)
    name = "head" if hasattr(model, "head") else "0.norm"
    message = rf"{name}.weight, {name}.bias: trainable, but no part .* modules_to_save"
    with pytest.warns(UserWarning, match=message):
        save_adapter(model, tmp_path)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_adapter(model, tmp_path)


def test_a_deep_copy_has_the_same_names(tmp_path):
    model = copy.deepcopy(blocks(checkpoint_wrapper)(adapted()))
    save_adapter(model, tmp_path)
    fresh = plain()
    load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(X), model(X))


@pytest.mark.parametrize(
    "wrap", [lambda m: torch.compile(m, backend="eager"), nn.DataParallel, AveragedModel]
)
def test_patterns_are_for_the_plain_models_names(wrap):
    def build():
        torch.manual_seed(0)
        block = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        return nn.ModuleDict({"block": block, "head": nn.Linear(8, 2), "new": nn.Linear(8, 2)})

    model = build()
    model["block"] = wrap(model["block"])
    report = apply_lora(
        wrap(model),
        2,
        target_modules=r"block\.\d|head",
        exclude_modules=["block.1"],
        modules_to_save=["new"],
        rank_pattern={"^block.0": 3},
    )
    assert report.replaced == ["block.0", "head"]
    assert report.skipped == {"block.1": "excluded by exclude_modules"}
    assert report.saved == ["new"]
    with pytest.raises(ValueError, match=r"matches no module; there are block\.\*, head, new"):
        apply_lora(wrap(model), 2, target_modules=["nothing"])
