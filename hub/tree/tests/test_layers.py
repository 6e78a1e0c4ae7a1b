"""What `kernelize` puts in the place of forwards, and what a kernel must not do."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import lora_kernels

pytestmark = pytest.mark.kernels_ci


class Adopting(nn.Module):
    """With the attributes and the forward of PEFT's `tuners.lora.Linear`."""

    def __init__(self, p=0.0, dtype=torch.float32):
        super().__init__()
        options = {"bias": False, "dtype": dtype}
        self.base_layer = nn.Linear(24, 40, dtype=dtype)
        self.lora_A = nn.ModuleDict({"a": nn.Linear(24, 4, **options)})
        self.lora_B = nn.ModuleDict({"a": nn.Linear(4, 40, **options)})
        self.lora_dropout = nn.ModuleDict({"a": nn.Dropout(p) if p else nn.Identity()})
        self.scaling, self.active_adapters, self.lora_variant = {"a": 0.5}, ["a"], {}
        self.disable_adapters = self.merged = False
        self.own_calls = 0

    def forward(self, x, *args, **kwargs):
        self.own_calls += 1
        y = self.base_layer(x)
        if self.disable_adapters:
            return y
        for name in self.active_adapters:
            low = self.lora_A[name](self.lora_dropout[name](x))
            y = y + self.scaling[name] * self.lora_B[name](low)
        return y


def replaced(layer):
    """As kernelize does it."""
    layer.forward = lora_kernels.layers.LoRALinear.forward.__get__(layer)
    return layer


def test_the_op_computes_what_the_layer_computes():
    layer = Adopting()
    x = torch.randn(7, 3, 24, requires_grad=True)
    wanted = layer(x)
    gradients = torch.autograd.grad(wanted.square().sum(), [x, *layer.parameters()])
    y = replaced(layer)(x)
    assert layer.own_calls == 1
    torch.testing.assert_close(y, wanted)
    found = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
    torch.testing.assert_close(found, gradients)


def test_dropout_is_of_training_alone():
    layer = replaced(Adopting(p=0.5))
    x = torch.randn(5, 24)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    assert layer.own_calls == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: setattr(layer, "disable_adapters", True),
        lambda layer: setattr(layer, "merged", True),
        lambda layer: layer.active_adapters.append("a"),
        lambda layer: layer.lora_variant.update(a=object()),
        lambda layer: layer.base_layer.register_forward_hook(lambda *args: None),
        lambda layer: layer.lora_A.double(),
    ],
    ids=["disabled", "merged", "several", "variant", "hooked", "dtypes"],
)
def test_what_the_op_does_not_cover_is_the_layer_s_own(change):
    layer = replaced(Adopting())
    change(layer)
    if layer.lora_A["a"].weight.dtype == torch.float64:
        with pytest.raises(RuntimeError, match="dtype"):
            layer(torch.randn(5, 24))
    else:
        layer(torch.randn(5, 24))
    assert layer.own_calls == 1


def test_under_autocast():
    layer = replaced(Adopting())
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(5, 24)).dtype == torch.bfloat16
    assert layer.own_calls == 0


def test_compiles_as_one_graph():
    layer = Adopting()
    x = torch.randn(6, 24)
    wanted = layer(x)
    compiled = torch.compile(replaced(layer), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), wanted)


def test_layers_are_pure():
    plain = set(dir(nn.Module))
    for cls in (v for v in vars(lora_kernels.layers).values() if isinstance(v, type)):
        if issubclass(cls, nn.Module) and cls.__module__ == lora_kernels.layers.__name__:
            assert cls.__init__ is nn.Module.__init__
            added = set(dir(cls)) - plain - {"__annotations__", "__annotate_func__"}
            assert added <= {"has_backward", "can_torch_compile"}


def test_all_of_it_lies_here_and_asks_for_nothing_else():
    folder = Path(lora_kernels.__file__).parent
    ours = {k: v for k, v in sys.modules.items() if k.split(".")[0] == "lora_kernels"}
    assert all(Path(module.__file__).is_relative_to(folder) for module in ours.values())
    allowed = {*sys.stdlib_module_names, "torch", "triton"}
    for path in folder.rglob("*.py"):
        for line in path.read_text().splitlines():
            first, *words = line.split() or [""]
            if (first == "from" and "import" in words) or (first == "import" and not words[1:]):
                top = words[0].split(".")[0]
                assert not top or top in allowed, f"{path}: {line}"
