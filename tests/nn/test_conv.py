"""Convolutions with an adapter: against torch in fp64, PEFT where that is right, merged, saved."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import lora_kernels
from lora_kernels import (
    add_adapter,
    apply_lora,
    check_adapters,
    direct,
    disable_adapters,
    load_adapter,
    lora_parameters,
    merge_lora,
    merged_state_dict,
    remove_lora,
    save_adapter,
    set_adapter,
    unmerge_lora,
)
from lora_kernels.backends.dropout import keep_mask, keep_scale
from lora_kernels.nn import FusedLoRAConv1d, FusedLoRAConv2d, FusedLoRAConv3d
from lora_kernels.testing import error

KINDS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
OURS = {1: FusedLoRAConv1d, 2: FusedLoRAConv2d, 3: FusedLoRAConv3d}
MODES = ("zeros", "reflect", "replicate", "circular")
GEOMETRIES = [
    {"kernel_size": 3},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 1},
    {"kernel_size": 1, "stride": 2},
    {"kernel_size": 3, "stride": 2, "padding": 2},
    {"kernel_size": 3, "padding": 2, "dilation": 2},
    {"kernel_size": 3, "padding": "valid"},
    {"kernel_size": 3, "padding": "same", "dilation": 2},
    {"kernel_size": 4, "padding": "same"},
    {"kernel_size": 3, "padding": 1, "groups": 2},
    {"kernel_size": 3, "stride": 2, "padding": 2, "dilation": 2, "groups": 4},
]


def layer_of(dims, dtype=torch.float64, rank=4, **options):
    """An adapter on a Conv of 4 channels to 8, both factors random."""
    torch.manual_seed(0)
    lora = {key: options.pop(key) for key in ("alpha", "dropout") if key in options}
    conv = KINDS[dims](4, 8, dtype=dtype, **options)
    return OURS[dims].from_linear(conv, rank, **{"alpha": 6, "init": "random", **lora})


def input_of(dims, dtype=torch.float64, **options):
    torch.manual_seed(1)
    return torch.randn(2, 4, *(7, 6, 5)[:dims], dtype=dtype, **options)


def unfused(layer, x, weight, bias, A, B):
    """By torch's own layers: the base, a convolution of A like it, one of B that is 1x1."""
    plain = layer.base_class(
        layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding,
        layer.dilation, layer.groups, padding_mode=layer.padding_mode,
    )  # fmt: skip
    s = plain._conv_forward(x, A, None)
    conv = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[weight.dim()]
    branch = conv(s, B, groups=layer.groups)
    return plain._conv_forward(x, weight, bias) + layer.scaling * branch


def tensors_of(layer):
    return layer.weight, layer.bias, layer.lora_A, layer.lora_B


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("dims", KINDS)
def test_output_and_all_gradients_are_torchs(dims, geometry, mode):
    layer, x = layer_of(dims, padding_mode=mode, **geometry), input_of(dims, requires_grad=True)
    layer.bias.requires_grad_(True)
    layer.weight.requires_grad_(True)
    y, expected = layer(x), unfused(layer, x, *tensors_of(layer))
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    leaves = [x, *tensors_of(layer)]
    found, wanted = (torch.autograd.grad(out, leaves, dy) for out in (y, expected))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("dims", KINDS)
def test_merge_computes_what_the_forward_does_and_unmerge_is_exact(dims, geometry):
    for mode in MODES:
        layer, x = layer_of(dims, padding_mode=mode, **geometry), input_of(dims)
        before, y = layer.weight.detach().clone(), layer(x)
        expected = layer.merged_weight()
        layer.merge()
        assert torch.equal(layer.weight, expected)
        torch.testing.assert_close(layer(x), y)
        layer.unmerge()
        assert torch.equal(layer.weight, before)
        assert torch.equal(layer(x), y)


@pytest.mark.parametrize("needs", range(1, 8))
def test_gradients_asked_for_one_by_one(needs):
    layer, x = layer_of(2, kernel_size=3, padding=1, groups=2), input_of(2)
    leaves = [t for i, t in enumerate((x, layer.lora_A, layer.lora_B)) if needs >> i & 1]
    for tensor in (layer.lora_A, layer.lora_B):
        tensor.requires_grad_(False)
    for tensor in leaves:
        tensor.requires_grad_(True)
    y, expected = layer(x), unfused(layer, x, *tensors_of(layer))
    found, wanted = (torch.autograd.grad(out.square().sum(), leaves) for out in (y, expected))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_gradcheck(dropout, mode):
    geometry = {"kernel_size": 3, "padding": 1, "stride": 2, "padding_mode": mode, "groups": 2}
    layer = layer_of(2, dropout=dropout, **geometry)
    x = input_of(2, requires_grad=True)

    def forward(x, A, B):
        torch.manual_seed(3)
        return torch.func.functional_call(layer, {"lora_A": A, "lora_B": B}, (x,))

    assert torch.autograd.gradcheck(forward, (x, layer.lora_A, layer.lora_B))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_error_is_at_most_twice_unfused_torchs(dtype, channels_last):
    for geometry in ({"kernel_size": 3, "padding": 1}, {"kernel_size": 1}):
        layer, x = layer_of(2, dtype, **geometry), input_of(2, dtype)
        if channels_last:
            x = x.to(memory_format=torch.channels_last)
            layer = layer.to(memory_format=torch.channels_last)
        x.requires_grad_(True)
        leaves = (x, *tensors_of(layer))
        layer.bias.requires_grad_(True)
        layer.weight.requires_grad_(True)
        wide = [t.detach().double().requires_grad_(True) for t in leaves]
        exact = unfused(layer, *wide)
        narrow = [t.detach().to(dtype).requires_grad_(True) for t in leaves]
        y, plain = layer(x), unfused(layer, *narrow)
        dy = torch.randn_like(y)
        ours = [y, *torch.autograd.grad(y, leaves, dy)]
        theirs = [plain, *torch.autograd.grad(plain, narrow, dy)]
        right = [exact, *torch.autograd.grad(exact, wide, dy.double())]
        eps = torch.finfo(dtype).eps
        for one, other, value in zip(ours, theirs, right, strict=True):
            assert error(one, value) <= 2 * error(other, value) + eps


def test_fp32_adapters_of_a_16_bit_base():
    layer = layer_of(2, torch.bfloat16, kernel_size=3)
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    y = layer(input_of(2, torch.bfloat16))
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert layer.lora_A.grad.dtype == torch.float32


def test_channels_last_goes_through_and_a_pointwise_layer_is_a_linear_one(monkeypatch):
    calls = []
    from lora_kernels.nn import conv

    real = conv.lora_linear
    monkeypatch.setattr(conv, "lora_linear", lambda *a, **k: calls.append(1) or real(*a, **k))
    for kernel, count in ((3, 0), (1, 1)):
        layer, x = layer_of(2, kernel_size=kernel), input_of(2)
        expected = layer(x)
        y = layer(x.to(memory_format=torch.channels_last))
        torch.testing.assert_close(y, expected)
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert len(calls) == count


def test_samples_may_be_missing_or_none():
    for dims in KINDS:
        layer, x = layer_of(dims, kernel_size=3, padding=1), input_of(dims)
        torch.testing.assert_close(layer(x[0]), layer(x)[0])
        assert layer(x[:0]).shape == (0, *layer(x).shape[1:])


@pytest.mark.parametrize("mode", MODES)
def test_dropout_is_the_librarys_mask_of_samples_and_channels_by_positions(mode):
    layer = layer_of(2, kernel_size=3, padding=1, padding_mode=mode, dropout=0.3)
    x = input_of(2)
    torch.manual_seed(5)
    y = layer(x)
    torch.manual_seed(5)
    seed = direct.draw_seed(x.device)
    keep = keep_mask(seed, 0, 8, 42, 0.3).view(x.shape)
    base = layer._conv_forward(x, layer.weight, layer.bias)
    dropped = unfused(layer, x * keep * keep_scale(0.3), *tensors_of(layer))
    branch = dropped - layer._conv_forward(x * keep * keep_scale(0.3), layer.weight, layer.bias)
    torch.testing.assert_close(y, base + branch)
    assert torch.equal(layer.eval()(x), layer(x))


def test_checkpointing_and_equal_seeds_give_equal_masks():
    layer = layer_of(2, kernel_size=3, padding=1, dropout=0.5)
    x = input_of(2, requires_grad=True)
    results = []
    for call in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(2)
        y = call(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), [x, layer.lora_A])))
    torch.testing.assert_close(*results)
    assert not torch.equal(layer(x), results[0][0])


def test_backward_keeps_x_and_s_alone():
    layer = layer_of(2, kernel_size=3, padding=1, dropout=0.5)
    x, kept = input_of(2), {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    rank_sized = y.numel() // y.shape[1] * layer.rank
    parameters = layer.lora_A.numel() + layer.lora_B.numel()
    kept.pop(layer.weight.data_ptr(), None)
    assert sum(kept.values()) == x.numel() + rank_sized + parameters + 1  # and the seed


class Net(nn.Module):
    """A block as in a diffusion model's UNet, with a strided, a grouped and a dilated part."""

    def __init__(self, **last):
        super().__init__()
        self.conv_in = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.down = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding="same", groups=4, bias=False)
        self.last = nn.Conv2d(8, 8, 3, padding="same", **last)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.shortcut = nn.Conv2d(8, 8, 1)
        self.proj = nn.Linear(8, 5)

    def forward(self, x):
        h = self.conv_in(x)
        y = self.last(self.grouped(self.down(F.silu(self.norm(h)))))
        return self.proj((self.up(y) + self.shortcut(h)).mean((2, 3)))


TARGETS = ["conv_in", "down", "grouped", "last", "shortcut", "proj"]


def net_of(**last):
    torch.manual_seed(0)
    return Net(**last), torch.randn(2, 3, 8, 8)


def trained(net, x, targets=TARGETS):
    apply_lora(net, 4, alpha=8, target_modules=targets, init="random")
    return net.eval()(x)


def test_default_targets_stay_linear_layers():
    net, _ = net_of()
    report = apply_lora(net, 4)
    assert report.replaced == ["proj"]
    assert type(net.down) is nn.Conv2d
    assert any("down" in name for name in report.left_out["convolutions"])


def test_named_targets_train_and_come_out_again():
    net, x = net_of()
    before, y = dict(net.named_parameters()), net(x)
    report = apply_lora(net, 4, target_modules=TARGETS)
    assert report.replaced == TARGETS
    assert not any("down" in name for name in report.left_out.get("convolutions", ()))
    assert type(net.down) is FusedLoRAConv2d
    torch.testing.assert_close(net(x), y)
    names = {name for name, p in net.named_parameters() if p.requires_grad}
    assert names == {f"{name}.lora_{half}" for name in TARGETS for half in "AB"}
    assert len(list(lora_parameters(net))) == 2 * len(TARGETS)
    net(x).square().mean().backward()
    for parameter in lora_parameters(net):
        nn.init.normal_(parameter, std=0.1)
    assert "6 of 6 adapters act" in str(check_adapters(net, x))
    with disable_adapters(net):
        torch.testing.assert_close(net(x), y)
    remove_lora(net)
    assert dict(net.named_parameters()) == before
    assert torch.equal(net(x), y)


def test_merged_models_compute_the_same():
    net, x = net_of(dilation=2, padding_mode="circular")
    base = net(x)
    y = trained(net, x)
    state = dict(merged_state_dict(net))
    merge_lora(net)
    torch.testing.assert_close(net(x), y)
    with disable_adapters(net):
        torch.testing.assert_close(net(x), base)
    assert torch.equal(net.down.weight, state["down.weight"])
    plain, _ = net_of(dilation=2, padding_mode="circular")
    plain.load_state_dict(state)
    torch.testing.assert_close(plain(x), y)
    unmerge_lora(net)
    assert torch.equal(net(x), y)


@pytest.mark.parametrize("merged", [False, "kept", "cpu"])
def test_copies_pickles_and_state_dicts(merged):
    net, x = net_of()
    y = trained(net, x)
    if merged:
        merge_lora(net, keep_base=True if merged == "kept" else "cpu")
        y = net(x)
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(net), pickle.loads(pickle.dumps(net))]
    copies.append(torch.load(buffer, weights_only=False))
    other, _ = net_of()
    apply_lora(other, 4, alpha=8, target_modules=TARGETS)
    other.load_state_dict(net.state_dict())
    for one in (*copies, other.eval()):
        assert torch.equal(one(x), y)
        assert one.down.merged is bool(merged)
        if merged:
            unmerge_lora(one)


def test_several_adapters_add_up():
    net, x = net_of()
    base, first = net(x), trained(net, x, ["shortcut"])
    add_adapter(net, "other", 4, init="random")
    assert net.shortcut.adapter("other").rank == 4
    set_adapter(net, ["default", "other"])
    both = net(x)
    set_adapter(net, "other")
    torch.testing.assert_close(both - base, (first - base) + (net(x) - base))
    with pytest.raises(ValueError, match=r"shortcut.*one adapter for all of a batch"):
        lora_kernels.adapter_rows(net, ["default", None]).__enter__()


def test_meta_device_and_materialised():
    with torch.device("meta"):
        net = Net()
    apply_lora(net, 4, target_modules=TARGETS)
    assert net.down.lora_A.shape == (4, 8, 3, 3)
    assert net.grouped.lora_A.shape == (4, 2, 3, 3)
    assert net.grouped.lora_B.shape == (8, 1, 1, 1)
    net.to_empty(device="cpu")
    net.down.reset_parameters()
    bound = (8 * 9) ** -0.5
    assert 0.5 * bound < net.down.lora_A.abs().max() <= bound
    assert not net.down.lora_B.any()


def test_reset_of_a_channels_last_layer():
    layer = layer_of(2, kernel_size=3).to(memory_format=torch.channels_last)
    before = layer.lora_A.detach().clone()
    layer.reset_lora_parameters()
    assert not torch.equal(layer.lora_A, before)
    assert not layer.lora_B.any()


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_compiled_without_graph_breaks(dropout):
    net, x = net_of(padding_mode="reflect")
    apply_lora(net, 4, alpha=8, dropout=dropout, target_modules=TARGETS, init="random")
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    results = []
    for model in (net, compiled):
        torch.manual_seed(4)
        y = model(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), list(lora_parameters(net)))))
    torch.testing.assert_close(*results)


def test_exported():
    net, x = net_of(dilation=2)
    y = trained(net, x)
    exported = torch.export.export(net, (x,))
    torch.testing.assert_close(exported.module()(x), y)


def test_autocast():
    net, x = net_of()
    trained(net, x)
    with torch.autocast("cpu", torch.bfloat16):
        y = net.down(torch.randn(2, 8, 6, 6))
        z = net(x)
    assert y.dtype == torch.bfloat16
    z.float().sum().backward()
    assert net.down.lora_A.grad.dtype == torch.float32
    torch.testing.assert_close(z.float(), net(x), rtol=0.05, atol=0.05)


def test_vmap_and_grad_transforms():
    layer, x = layer_of(2, kernel_size=3, groups=2), input_of(2)

    def loss(A):
        return torch.func.functional_call(layer, {"lora_A": A}, (x,)).square().sum()

    wanted = torch.autograd.grad(layer(x).square().sum(), layer.lora_A)[0]
    torch.testing.assert_close(torch.func.grad(loss)(layer.lora_A.detach()), wanted)
    stacked = torch.stack([x, 2 * x])
    expected = torch.stack([layer(x), layer(2 * x)])
    torch.testing.assert_close(torch.func.vmap(layer)(stacked), expected)


def test_peft_reads_what_is_saved(tmp_path):
    peft = pytest.importorskip("peft")
    net, x = net_of()
    plain = copy.deepcopy(net)
    y = trained(net, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_adapter(net, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of groups, that it cannot merge them
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    torch.testing.assert_close(theirs(x), y)
    load_adapter(plain, tmp_path)
    assert torch.equal(plain.eval()(x), y)
    with pytest.raises(NotImplementedError, match="groups"):
        theirs.merge_adapter()
    merge_lora(plain)
    torch.testing.assert_close(plain(x), y)


@pytest.mark.parametrize("rslora", [False, True])
def test_pefts_files_load(tmp_path, rslora):
    peft = pytest.importorskip("peft")
    net, x = net_of()
    targets = [name for name in TARGETS if name != "grouped"]
    config = peft.LoraConfig(
        r=4, lora_alpha=3, target_modules=targets, init_lora_weights=False, use_rslora=rslora
    )
    theirs = peft.get_peft_model(copy.deepcopy(net), config).eval()
    theirs.save_pretrained(tmp_path)
    load_adapter(net, tmp_path, strict=True)
    torch.testing.assert_close(net.eval()(x), theirs(x))


def test_peft_config_in_place_of_options():
    peft = pytest.importorskip("peft")
    net, _ = net_of()
    apply_lora(net, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["down", "proj"]))
    assert type(net.down) is FusedLoRAConv2d
    assert net.down.scaling == 2


@pytest.mark.parametrize(
    ("last", "what"),
    [
        ({"dilation": 2}, r"dilation \(2, 2\)"),
        ({"padding_mode": "reflect"}, "padding_mode 'reflect'"),
    ],
)
def test_what_peft_leaves_out_of_the_base_is_said_both_ways(tmp_path, last, what):
    peft = pytest.importorskip("peft")
    net, x = net_of(**last)
    plain = copy.deepcopy(net)
    y = trained(net, x, ["last"])
    with pytest.warns(UserWarning, match=rf"^last: PEFT's adapter .*{what}"):
        save_adapter(net, tmp_path / "ours")
    again = copy.deepcopy(plain)
    load_adapter(again, tmp_path / "ours")
    assert torch.equal(again.eval()(x), y)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "ours")
    assert (theirs(x) - y).abs().max() > 1e-3
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match=rf"last\.lora_A\.weight: was trained without.*{what}"):
        load_adapter(plain, tmp_path / "theirs")
    assert type(plain.last) is nn.Conv2d


def test_pefts_adapter_of_groups_that_reads_all_channels_is_refused(tmp_path):
    peft = pytest.importorskip("peft")
    net, _ = net_of()
    config = peft.LoraConfig(r=4, target_modules=["grouped"], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(copy.deepcopy(net), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"grouped\.lora_A\.weight: .*outside its own of 4 groups"):
        load_adapter(net, tmp_path)


def test_a_file_of_kohya_keeps_the_form_of_convolutions(tmp_path):
    from safetensors.torch import save_file

    net, x = net_of()
    other = copy.deepcopy(net)
    y = trained(net, x, ["down", "shortcut", "proj"])
    tensors = {}
    for name in ("down", "shortcut", "proj"):
        layer = net.get_submodule(name)
        for half, side in (("lora_A", "lora_down"), ("lora_B", "lora_up")):
            tensor = getattr(layer, half).detach()
            tensor = tensor[..., None, None] if tensor.dim() == 2 else tensor
            tensors[f"lora_unet_{name}.{side}.weight"] = tensor.contiguous()
        tensors[f"lora_unet_{name}.alpha"] = torch.tensor(8.0)
    save_file(tensors, tmp_path / "kohya.safetensors")
    load_adapter(other, tmp_path / "kohya.safetensors")
    torch.testing.assert_close(other.eval()(x), y)


@pytest.mark.parametrize(
    ("options", "kind", "what"),
    [
        ({"rank": 6, "target_modules": ["grouped"]}, ValueError, r"grouped: rank: .*groups, 4"),
        ({"target_modules": ["up"]}, ValueError, "'up' matches no .*up is a ConvTranspose2d"),
        ({"use_dora": True, "target_modules": ["down"]}, NotImplementedError, "use_dora: down"),
        ({"init": "pissa", "target_modules": ["down"]}, ValueError, "down: init: got 'pissa'"),
        ({"init": "orthogonal", "target_modules": ["down"]}, ValueError, "down: init: got"),
    ],
)
def test_what_cannot_be_is_said_and_changes_nothing(options, kind, what):
    net, x = net_of()
    before, y = net.state_dict().keys(), net(x)
    with pytest.raises(kind, match=what):
        apply_lora(net, **{"rank": 4, **options})
    assert net.state_dict().keys() == before
    assert torch.equal(net(x), y)


def test_layers_that_are_none_of_torchs_own_are_left_alone():
    class Causal(nn.Conv1d):
        def forward(self, x):
            return super().forward(F.pad(x, (2, 0)))

    net = nn.Sequential(Causal(4, 4, 3), nn.Conv1d(4, 4, 1))
    report = apply_lora(net, 2, target_modules=["0", "1"])
    assert report.skipped == {"0": "Causal is a subclass of nn.Conv1d with behaviour of its own"}
    with pytest.raises(TypeError, match=r"expected torch\.nn\.Conv1d itself, got Causal"):
        FusedLoRAConv1d.from_linear(net[0], 2)
    with pytest.raises(ValueError, match=r"itself a Conv2d.*FusedLoRAConv2d\.from_linear"):
        apply_lora(nn.Conv2d(2, 2, 1), 2)
    with pytest.raises(TypeError, match="is made from a Conv3d"):
        FusedLoRAConv3d(2, 2, 1, rank=2)
    with pytest.raises(ValueError, match="no matrices"):
        layer_of(2, kernel_size=3).set_factors(torch.ones(2, 4), torch.ones(8, 2))


def test_second_derivatives_are_refused():
    layer, x = layer_of(2, kernel_size=3), input_of(2, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dx.sum().backward()
