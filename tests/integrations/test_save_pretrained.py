"""save_pretrained of a model with adapters, and of models within one's own module."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lora_kernels import apply_lora, load_adapter, lora_parameters, merge_lora, remove_lora

transformers = pytest.importorskip("transformers")
tiny_models = pytest.importorskip("tiny_models")
ADAPTER = "adapter_config.json"


class Wrapper(nn.Module):
    """As LightningModules and SentenceTransformers do, it holds a model and is none itself."""

    def __init__(self):
        super().__init__()
        self.inner, self.other = tiny_models.build(), tiny_models.build("gpt2")


def trained(model, **options):
    apply_lora(model, 4, **options)
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def outputs(model):
    with torch.no_grad():
        return model(**tiny_models.inputs())[0]


def close(left, right):
    return (left - right).norm() / right.norm() < 1e-5


def reloaded(model, folder):
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder).eval()


@pytest.mark.parametrize(
    "clone", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_models_within_a_wrapper_keep_their_adapters(tmp_path, clone):
    first = trained(Wrapper())
    wrapper = clone(first)
    if wrapper is not first:
        nn.init.zeros_(first.inner.model.layers[0].mlp.up_proj.lora_B)
    again = reloaded(wrapper.inner, tmp_path / "inner")
    assert close(outputs(again), outputs(wrapper.inner))
    assert not close(outputs(again), outputs(tiny_models.build()))
    assert close(outputs(reloaded(wrapper.other, tmp_path / "other")), outputs(wrapper.other))
    backbone = wrapper.inner.model
    assert close(outputs(reloaded(backbone, tmp_path / "backbone")), outputs(backbone))
    if wrapper is not first:
        assert not close(outputs(again), outputs(first.inner))


def test_a_part_without_adapters_is_saved_as_it_is(tmp_path):
    wrapper = trained(Wrapper(), target_modules=r"inner\..*q_proj")
    assert torch.equal(outputs(reloaded(wrapper.other, tmp_path)), outputs(wrapper.other))
    assert not (tmp_path / ADAPTER).exists()


def test_removing_adapters_gives_every_save_pretrained_back(tmp_path):
    wrapper = trained(Wrapper())
    remove_lora(wrapper.inner)
    assert close(outputs(reloaded(wrapper.other, tmp_path)), outputs(wrapper.other))
    remove_lora(wrapper)
    for module in wrapper.modules():
        assert "save_pretrained" not in vars(module)


@pytest.mark.parametrize("keep", [True, "cpu"])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("options", [{}, {"init": "pissa"}])
def test_a_merged_model_is_saved_as_its_base_and_its_adapter(tmp_path, keep, given, options):
    model = trained(tiny_models.build(), **options)
    expected = outputs(model)
    base = {k: v.clone() for k, v in model.state_dict().items() if "lora" not in k}
    merge_lora(model, keep)
    model.save_pretrained(tmp_path, **({"state_dict": model.state_dict()} if given else {}))
    assert close(outputs(type(model).from_pretrained(tmp_path).eval()), expected)
    written = load_file(tmp_path / "model.safetensors")
    assert not any("merged_base" in key for key in written)
    assert all(torch.equal(written[key], base[key]) for key in written.keys() & base.keys())
    assert base.keys() - written.keys() <= {k for k in base if "pissa" in k}


def test_one_layer_merged_for_good_does_not_lose_the_others(tmp_path):
    model = trained(tiny_models.build())
    model.model.layers[0].mlp.up_proj.merge(keep_base=False)
    assert close(outputs(reloaded(model, tmp_path)), outputs(model))


def test_compiled_blocks_are_saved_under_plain_names(tmp_path):
    model = trained(tiny_models.build(), modules_to_save=["lm_head"])
    expected = outputs(model)
    layers = model.model.layers
    for i in range(len(layers)):
        layers[i] = torch.compile(layers[i], backend="eager")
    again = reloaded(model, tmp_path)
    assert close(outputs(again), expected)
    fresh = tiny_models.build()
    load_adapter(fresh, tmp_path)
    assert close(outputs(fresh), expected)


class Hub(nn.Sequential):
    """A save_pretrained with arguments of its own."""

    def save_pretrained(self, path, revision=None):
        return path, revision


def test_a_save_pretrained_of_another_kind_is_left_alone():
    model = nn.Sequential(Hub(nn.Linear(4, 4)), nn.Linear(4, 4))
    apply_lora(model, 2)
    assert model[0].save_pretrained("there", "main") == ("there", "main")
