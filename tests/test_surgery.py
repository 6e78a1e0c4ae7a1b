"""What torch's own tools make of a model with adapters: the same values, or those after a merge."""

import copy

import pytest
import torch
from torch import nn
from torch.ao.quantization import QConfigMapping, default_dynamic_qconfig, quantize_fx
from torch.fx.experimental.optimization import fuse
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.nn.utils.fusion import fuse_linear_bn_eval
from torch.optim.swa_utils import AveragedModel
from torch.utils import mkldnn

from lora_kernels import apply_lora, lora_linear, lora_parameters, merge_lora, remove_lora

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)

    def forward(self, x):
        return self.last(self.norm(self.first(x)).relu())


def adapted(seed=0, **options):
    torch.manual_seed(seed)
    model = Net().eval()
    nn.init.normal_(model.norm.running_mean)
    nn.init.uniform_(model.norm.running_var, 0.5, 2)
    apply_lora(model, 2, alpha=4, **options)
    for layer in (model.first, model.last):
        nn.init.normal_(layer.lora_B)
    return model


def quantized(model):
    every = QConfigMapping().set_global(default_dynamic_qconfig)
    return quantize_fx.convert_fx(quantize_fx.prepare_fx(model, every, (X,)))


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("tool", [torch.fx.symbolic_trace, fuse, quantized])
def test_torch_fx_writes_an_adapted_layer_as_one_call(tool, use_rslora):
    model = adapted(use_rslora=use_rslora)
    expected = model(X).detach()
    traced = tool(model)
    torch.testing.assert_close(traced(X), expected, rtol=0, atol=0)
    assert sum(node.target is lora_linear for node in traced.graph.nodes) == 2
    merge_lora(model)
    # Merged it is a plain linear map, which loses what 8 bits lose.
    bound = 0.03 if tool is quantized else 1e-5
    assert (tool(model)(X) - expected).norm() <= bound * expected.norm()


def test_a_traced_graph_trains_the_layer_s_own_parameters():
    model = adapted()
    traced = torch.fx.symbolic_trace(model)
    traced(X).sum().backward()
    own = dict(model.named_parameters())
    there = dict(traced.named_parameters())
    assert {name for name, p in there.items() if p.grad is not None} == {
        name for name, p in own.items() if p.requires_grad
    }
    assert all(there[name] is own[name] for name in there)


def test_what_reads_the_weight_is_right_after_a_merge_and_removal():
    model = adapted()
    expected, fused = model(X), model.norm(model.first(X))
    merge_lora(model, keep_base=False)
    remove_lora(model)
    torch.testing.assert_close(fuse_linear_bn_eval(model.first, model.norm)(X), fused)
    if torch.backends.mkldnn.is_available():
        torch.testing.assert_close(mkldnn.to_mkldnn(model)(X), expected)


def emptied(model):
    empty = copy.deepcopy(model).to("meta").to_empty(device="cpu")
    empty.load_state_dict(model.state_dict())
    return empty


def averaged(model):
    average = AveragedModel(adapted(seed=1), use_buffers=True)
    average.update_parameters(model)
    return average


def from_vector(model):
    other = adapted(seed=1)
    other.norm.load_state_dict(model.norm.state_dict())
    vector_to_parameters(parameters_to_vector(model.parameters()), other.parameters())
    return other


@pytest.mark.parametrize("copied", [emptied, averaged, from_vector, nn.Module.share_memory])
def test_copies_by_torch_s_tools_compute_the_same(copied):
    model = adapted()
    expected = model(X)
    torch.testing.assert_close(copied(model)(X), expected, rtol=0, atol=0)


def test_models_with_adapters_are_stacked():
    models = [adapted(), adapted(seed=1)]
    parameters, buffers = torch.func.stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")

    def call(parameters, buffers):
        return torch.func.functional_call(base, (parameters, buffers), (X,))

    out = torch.vmap(call)(parameters, buffers)
    torch.testing.assert_close(out, torch.stack([model(X) for model in models]))
    assert len(list(lora_parameters(models[0]))) == 4
