"""fuse_peft on bases that bitsandbytes and torchao have quantised, which the op reads itself."""

import copy
import importlib.util
import warnings

import peft
import pytest
import torch
from torch import nn

from lora_kernels import fuse_peft, unfuse_peft
from lora_kernels.backends import dequantized
from lora_kernels.integrations import peft_bases
from lora_kernels.testing import Aten

K, N = 128, 192
MISSING = [p for p in ("bitsandbytes", "torchao") if importlib.util.find_spec(p) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}")


def quantised(linear, kind):
    if kind == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(linear, Int8WeightOnlyConfig())
        return linear
    import bitsandbytes as bnb

    given = linear.in_features, linear.out_features
    if kind == "8 bits":
        layer = bnb.nn.Linear8bitLt(*given, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(*given, quant_type="nf4", compute_dtype=linear.weight.dtype)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def model(kind, dtype=torch.float32, **options):
    torch.manual_seed(0)
    layers = [nn.Linear(K, N).to(dtype), nn.Linear(N, K).to(dtype)]
    net = nn.Sequential(quantised(layers[0], kind), nn.Tanh(), quantised(layers[1], kind))
    net.is_loaded_in_8bit, net.is_loaded_in_4bit = kind == "8 bits", kind == "4 bits"
    options = {"r": 8, "target_modules": ["0", "2"], "init_lora_weights": False, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of merging torchao's
        return peft.get_peft_model(net, peft.LoraConfig(**options))


def computed(net, rows=5, dtype=torch.float32):
    """y, and the gradients of x and of the adapters."""
    x = torch.randn(rows, K, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    y = net(x)
    pairs = [p for n, p in net.named_parameters() if "lora_" in n]
    return [y, *torch.autograd.grad(y.square().mean(), [x, *pairs])]


KINDS = ["4 bits", "8 bits", "torchao"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 5, 200])
def test_as_peft(kind, rows):
    net = model(kind)
    expected = computed(net, rows)
    report = fuse_peft(net)
    assert report.read == report.fused == ["base_model.model.0", "base_model.model.2"]
    assert report.no_gradient == {}
    assert "read as they lie in 2 layers" in str(report)
    for one, other in zip(computed(net, rows), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    layer = net.base_model.model[0]
    record = vars(layer)[peft_bases.HELD].record
    assert (
        record.codes.data_ptr()
        == (
            layer.base_layer.weight.qdata if kind == "torchao" else layer.base_layer.weight
        ).data_ptr()
    )
    unfuse_peft(net)
    for one, other in zip(computed(net, rows), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_in_bf16(kind):
    net = model(kind, torch.bfloat16)
    expected = computed(net, dtype=torch.bfloat16)
    fuse_peft(net)
    for one, other in zip(computed(net, dtype=torch.bfloat16), expected, strict=True):
        assert one.dtype == other.dtype
        apart = (one.float() - other.float()).norm() / other.float().norm()
        assert apart < 0.05


def test_the_base_is_not_called_and_no_whole_weight_is_made(monkeypatch):
    monkeypatch.setattr(dequantized, "_CPU_STRIP_BYTES", 1)
    net = model("4 bits")
    fuse_peft(net)
    largest = []

    def report(name, values):
        sizes = [t.untyped_storage().nbytes() for t in values if isinstance(t, torch.Tensor)]
        largest.append(max(sizes, default=0))

    base = net.base_model.model[0].base_layer
    calls = []
    monkeypatch.setattr(type(base), "forward", lambda self, x: calls.append(1))
    with Aten(report):
        computed(net, 40)
    assert calls == []
    assert max(largest) < N * K * 4  # what fp32 would take


def test_other_ways_of_calling():
    net = model("8 bits")  # in evaluation bitsandbytes lays out 4 bits anew for its own kernel
    net.add_adapter(
        "other", peft.LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False)
    )
    x = torch.randn(4, K)
    names = ["default", "other", "__base__", "other"]
    ways = {
        "several": lambda: net.base_model.set_adapter(["default", "other"]) or net(x),
        "disabled": lambda: off(net, x),
        "mixed": lambda: net.eval()(x, adapter_names=names),
        "autocast": lambda: under_autocast(net, x),
    }
    expected = {}
    for fused in (False, True):
        if fused:
            fuse_peft(net)
        for way, call in ways.items():
            with torch.no_grad():
                y = call()
            if fused:
                # bitsandbytes rounds x to 8 bits in evaluation.
                assert (y - expected[way]).norm() < 0.02 * y.norm(), way
            expected[way] = y


def off(net, x):
    with net.disable_adapter():
        return net(x)


def under_autocast(net, x):
    with torch.autocast("cpu", torch.bfloat16):
        return net(x).float()


def test_what_the_op_does_not_read_stays_with_the_base():
    net = model("4 bits")
    layer = net.base_model.model[0]
    base = layer.base_layer
    assert peft_bases.record_of_base(layer, base, torch.float32) is not None
    assert peft_bases.record_of_base(layer, base, torch.bfloat16) is None  # another compute dtype
    assert peft_bases.record_of_base(layer, nn.Identity(), torch.float32) is None
    assert peft_bases.record_of_base(layer, nn.Linear(4, 4), torch.float32) is None
    on_meta = nn.Linear(4, 4, device="meta")
    assert peft_bases.record_of_base(layer, on_meta, torch.float32) is None


def test_a_new_weight_is_seen():
    net = model("8 bits")
    fuse_peft(net)
    layer, x = net.base_model.model[0], torch.randn(3, K)
    with torch.no_grad():
        before = layer(x)
        layer.base_layer.weight.data = torch.zeros_like(layer.base_layer.weight.data)
        after = layer(x)
        branch = layer.lora_B.default(layer.lora_A.default(x)) * layer.scaling["default"]
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, branch + layer.base_layer.bias, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["8 bits", "torchao"])
def test_copies_hold_records_of_their_own(kind):
    net = model(kind)
    fuse_peft(net)
    x = torch.randn(3, K)
    y = net(x)
    copied = copy.deepcopy(net)
    assert torch.equal(copied(x), y)
    mine, theirs = (vars(n.base_model.model[0])[peft_bases.HELD].record for n in (net, copied))
    assert mine.codes.data_ptr() != theirs.codes.data_ptr()
    state = net.base_model.model[0].__reduce_ex__(2)[2]
    assert peft_bases.HELD not in state


def test_codes_that_their_owner_lays_out_anew():
    """Which it does in evaluation where it has a kernel for that; the base then computes."""
    net = model("4 bits")
    fuse_peft(net)
    layer = net.base_model.model[0]
    weight = layer.base_layer.weight
    weight.quant_state.packing_format_for_cpu = True
    vars(layer).pop(peft_bases.HELD, None)
    assert peft_bases.record_of_base(layer, layer.base_layer, torch.float32) is None


def test_evaluation_leaves_the_codes_as_they_lie():
    """bitsandbytes lays them out anew when its layer computes without gradients, with scales of
    16 bits and no gradient for x from then on."""
    net = model("4 bits", torch.bfloat16)
    fuse_peft(net)
    expected = computed(net, dtype=torch.bfloat16)
    layer, x = net.base_model.model[0], torch.randn(2, K).bfloat16()
    with torch.no_grad():
        net.eval()
        net(x)
        frozen = off(net, x)
    assert frozen.shape == x.shape
    assert not getattr(layer.base_layer.weight.quant_state, "packing_format_for_cpu", False)
    net.train()
    for one, other in zip(computed(net, dtype=torch.bfloat16), expected, strict=True):
        assert torch.equal(one, other)
