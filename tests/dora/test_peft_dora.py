"""`fuse_peft` on PEFT's DoRA: its values and gradients, and what is left to PEFT."""

import copy

import pytest
import torch
from torch import nn

from lora_kernels import fuse_peft, unfuse_peft
from lora_kernels.norms import HELD

peft = pytest.importorskip("peft")
Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D


def build(base, dtype=torch.float32, **options):
    torch.manual_seed(0)
    config = {"r": 4, "lora_alpha": 6, "target_modules": ["0", "2"], "use_dora": True}
    model = peft.get_peft_model(base.to(dtype), peft.LoraConfig(**config | options))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
                parameter.add_(noise * (0.05 if "magnitude" in name else 0.2))
    return model


def base(kind=nn.Linear):
    torch.manual_seed(1)
    first = nn.Linear(24, 40) if kind is nn.Linear else Conv1D(40, 24)
    return nn.Sequential(first, nn.Tanh(), nn.Linear(40, 8, bias=False))


def rows(dtype=torch.float32):
    return torch.randn(3, 24, generator=torch.Generator().manual_seed(4)).to(dtype).requires_grad_()


def step(model, dtype=torch.float32):
    x = rows(dtype)
    y = model(x)
    y.backward(torch.ones_like(y))
    found = {"y": y.detach(), "x": x.grad}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[name], parameter.grad = parameter.grad, None
    return found


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("mode", ["training", "evaluation"])
def test_values_and_gradients(kind, mode):
    model = build(base(kind)).train(mode == "training")
    theirs = step(model)
    report = fuse_peft(model)
    assert len(report.fused) == 2
    assert not report.left
    layer = model.base_model.model[0]
    assert type(layer).__name__ == "FusedLinear"
    ours = step(model)
    assert (HELD in vars(layer)) == (mode == "evaluation")
    assert ours.keys() == theirs.keys()
    assert len(ours) == 8
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5)
    assert HELD not in vars(copy.deepcopy(layer))
    with model.disable_adapter():
        torch.testing.assert_close(model(rows()), base(kind)(rows()))
    unfuse_peft(model)
    assert torch.equal(step(model)["y"], theirs["y"])


def test_bf16_with_fp32_adapters_and_autocast():
    model = build(base(), torch.bfloat16)
    theirs = step(model, torch.bfloat16)
    assert len(fuse_peft(model).rounded) == 2
    for name, value in step(model, torch.bfloat16).items():
        other = theirs[name]
        assert value.dtype == other.dtype
        assert (value - other).float().norm() <= 3e-2 * other.float().norm(), name
    model = build(base())
    fuse_peft(model)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(rows())
    assert y.dtype == torch.bfloat16
    unfuse_peft(model)
    torch.testing.assert_close(y.float(), model(rows()), rtol=3e-2, atol=3e-2)


def test_dropout_drops_in_the_base_term_too():
    """On average over masks the output is the one without dropout, and equal seeds give equal
    masks."""
    model = build(base(), lora_dropout=0.5, target_modules=["0"])
    fuse_peft(model)
    x = rows().detach()
    layer = model.base_model.model[0]
    with torch.no_grad():
        expected = layer.eval()(x)
        layer.train()
        found = torch.stack([layer(x) for _ in range(4000)])
    spread = found.std(0) / 4000**0.5
    assert spread.min() > 0
    assert ((found.mean(0) - expected).abs() < 6 * spread).all()
    torch.manual_seed(3)
    first = layer(x)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first)


def test_what_is_left_to_peft():
    model = build(base(), lora_bias=False)
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["0", "2"], use_dora=True))
    fuse_peft(model)
    model.base_model.set_adapter(["default", "other"])
    report = fuse_peft(model)
    assert all("beside other active adapters" in why for why in report.left.values())
    assert len(report.left) == 2
    ours = step(model)
    unfuse_peft(model)
    assert torch.equal(step(model)["y"], ours["y"])
    fuse_peft(model)
    layer = model.base_model.model[0]
    model.base_model.set_adapter("default")
    layer.lora_magnitude_vector["default"].register_forward_hook(lambda *_: None)
    assert "carries hooks" in fuse_peft(model).left["base_model.model.0"]


def test_merged_and_saved(tmp_path):
    model = build(base()).eval()
    fuse_peft(model)
    before = model(rows()).detach()
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base(), tmp_path)
    torch.testing.assert_close(again(rows()), before)
    model.merge_adapter()
    torch.testing.assert_close(model(rows()), before, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(model(rows()), before, rtol=1e-4, atol=1e-5)


def test_compiled():
    model = build(base())
    fuse_peft(model)
    expected = model(rows())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(rows()), expected)
