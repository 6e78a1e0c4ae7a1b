"""FusedLoRALinear: what it shares, computes, merges, saves and refuses."""

import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrize, prune

from lora_kernels import FusedLoRAConv1D, FusedLoRALinear
from lora_kernels.nn.tensors import MERGED

N, K, R = 24, 40, 4
KEEP = [True, "cpu"]


def make(seed=0, dtype=torch.float32, bias=True, trained=True, **options):
    """A layer on a random base; `trained` gives it a lora_B other than zero."""
    torch.manual_seed(seed)
    base = nn.Linear(K, N, bias=bias, dtype=dtype)
    layer = FusedLoRALinear.from_linear(base, R, **{"alpha": 8, **options})
    if trained:
        nn.init.normal_(layer.lora_B, std=0.2)
    return layer


def pissa(trained=False, seed=0, **options):
    """(the original weight, a PiSSA layer on it)."""
    torch.manual_seed(seed)
    base = nn.Linear(K, N)
    original = base.weight.detach().clone()
    layer = FusedLoRALinear.from_linear(base, R, init="pissa", **{"alpha": 8, **options})
    if trained:
        with torch.no_grad():
            layer.lora_B.add_(0.1 * torch.randn(N, R))
    return original, layer


def inputs(dtype=torch.float32, *leading):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(*(leading or (3, 5)), K, generator=generator).to(dtype)


def state_of(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def plain(x, weight, bias, A, B, scaling):
    return F.linear(x, weight, bias) + scaling * F.linear(F.linear(x, A), B)


def error(value, exact):
    return ((value.double() - exact).norm() / exact.norm()).item()


# --------------------------------------------------------------------------- construction


def test_from_linear_shares_the_base():
    base = nn.Linear(K, N).eval()
    weight, bias = base.weight, base.bias
    layer = FusedLoRALinear.from_linear(base, R)
    assert isinstance(layer, nn.Linear)
    assert layer.weight is weight
    assert layer.bias is bias
    assert not layer.training
    assert FusedLoRALinear.from_linear(nn.Linear(K, N), R).training
    trainable = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert trainable == {"lora_A", "lora_B"}
    assert (layer.lora_A.shape, layer.lora_B.shape) == ((R, K), (N, R))
    assert (layer.in_features, layer.out_features, layer.rank) == (K, N, R)


@pytest.mark.parametrize("bias", [True, False])
def test_a_new_layer_computes_its_base(bias):
    torch.manual_seed(0)
    layer = FusedLoRALinear(K, N, R, bias=bias, alpha=8)
    assert (layer.bias is not None) == bias
    assert not layer.weight.requires_grad
    assert_plain(layer, layer.weight)
    bound = 1 / math.sqrt(K)
    assert bound / 2 < layer.lora_A.abs().max() <= bound


def assert_plain(layer, weight):
    """The layer computes what a plain one does with this weight, in any order of its sums."""
    eps = torch.finfo(weight.dtype).eps
    assert error(layer(inputs()), F.linear(inputs().double(), *doubled(weight, layer.bias))) < eps


def doubled(*tensors):
    return [None if tensor is None else tensor.double() for tensor in tensors]


class Subclass(nn.Linear):
    pass


def hooked(register):
    linear = nn.Linear(K, N)
    getattr(linear, register)(lambda *args: None)
    return linear


def overridden():
    linear = nn.Linear(K, N)
    linear.forward = lambda x: x
    return linear


@pytest.mark.parametrize(
    ("linear", "kind", "message"),
    [
        (lambda: hooked("register_forward_hook"), ValueError, "_forward_hooks"),
        (lambda: hooked("register_forward_pre_hook"), ValueError, "_forward_pre_hooks"),
        (lambda: hooked("register_full_backward_hook"), ValueError, "_backward_hooks"),
        (lambda: hooked("register_state_dict_post_hook"), ValueError, "_state_dict_hooks"),
        (
            lambda: torch.nn.utils.parametrizations.weight_norm(nn.Linear(K, N)),
            ValueError,
            "has parametrizations on weight",
        ),
        (overridden, ValueError, "forward overridden"),
        (lambda: Subclass(K, N), TypeError, "expected torch.nn.Linear itself, got Subclass"),
        (lambda: nn.Conv1d(K, N, 1), TypeError, "expected torch.nn.Linear itself, got Conv1d"),
    ],
)
def test_from_linear_refuses_what_it_would_change(linear, kind, message):
    linear = linear()
    with pytest.raises(kind, match=message):
        FusedLoRALinear.from_linear(linear, R)
    assert all(p.requires_grad for p in linear.parameters())


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"rank": 0}, ValueError, "rank: expected an integer of at least 1, got 0"),
        ({"rank": -2}, ValueError, "rank: .* got -2"),
        ({"rank": 4.0}, ValueError, "rank: .* got 4.0"),
        ({"rank": True}, ValueError, "rank: .* got True"),
        ({"alpha": math.nan}, ValueError, "alpha: expected a finite number or None, got nan"),
        ({"alpha": math.inf}, ValueError, "alpha: .* got inf"),
        ({"alpha": 0}, ValueError, "alpha: expected a number other than 0 or None, got 0"),
        ({"alpha": "16"}, TypeError, "alpha: expected a number or None, got '16'"),
        ({"alpha": True}, ValueError, "alpha: .* got True"),
        ({"rank": "8"}, TypeError, "rank: expected an integer of at least 1, got '8'"),
        ({"rank": torch.ones(1)}, TypeError, "rank: .* got tensor"),
        ({"dropout": None}, TypeError, "dropout: .* got None"),
        ({"dropout": 1.0}, ValueError, r"dropout: expected a probability in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, ValueError, "dropout: .* got -0.1"),
        ({"dropout": math.nan}, ValueError, "dropout: .* got nan"),
        ({"adapter_dtype": torch.float16}, TypeError, "adapter_dtype: .* got torch.float16"),
        ({"adapter_dtype": torch.int8}, TypeError, "adapter_dtype: .* got torch.int8"),
    ],
)
def test_bad_arguments_are_named(options, kind, message):
    options = {"rank": R, **options}
    with pytest.raises(kind, match=message):
        FusedLoRALinear(K, N, **options)
    base = nn.Linear(K, N)
    with pytest.raises(kind, match=message):
        FusedLoRALinear.from_linear(base, **options)
    assert base.weight.requires_grad


def test_bad_bases_and_inits_are_named():
    with pytest.raises(ValueError, match="init: got 'svd', legal values are kaiming, pi"):
        FusedLoRALinear.from_linear(nn.Linear(K, N), R, init="svd")
    with pytest.raises(ValueError, match=r"rank: 'pissa' takes at most min\(N, K\) = 24, got 25"):
        FusedLoRALinear.from_linear(nn.Linear(K, N), 25, init="pissa")
    with pytest.raises(ValueError, match=r"alpha: 'pissa' needs a positive scaling, got -1\.0"):
        FusedLoRALinear.from_linear(nn.Linear(K, N), R, alpha=-R, init="pissa")
    with pytest.raises(ValueError, match=r"init: 'pissa' needs the values .* meta device"):
        FusedLoRALinear.from_linear(nn.Linear(K, N, device="meta"), R, init="pissa")
    integer = nn.Linear(K, N, bias=False)
    integer.weight = nn.Parameter(torch.ones(N, K, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"linear: its weight is torch\.int8; .* of float16, b"):
        FusedLoRALinear.from_linear(integer, R)
    with pytest.raises(TypeError, match=r"weight: is torch\.complex64"):
        FusedLoRALinear(K, N, R, dtype=torch.complex64, device="meta")


def test_fp32_adapters_on_an_fp64_base_are_refused():
    with pytest.raises(TypeError, match=r"adapter_dtype: expected torch\.float64"):
        FusedLoRALinear(K, N, R, dtype=torch.float64, adapter_dtype=torch.float32)


@pytest.mark.parametrize(
    ("alpha", "rslora", "scaling"),
    [(None, False, 1.0), (None, True, 1.0), (8, False, 2.0), (8, True, 4.0), (3, False, 0.75)],
)
def test_scaling(alpha, rslora, scaling):
    layer = make(alpha=alpha, use_rslora=rslora, dtype=torch.float64)
    assert layer.scaling == scaling
    exact = plain(
        inputs(torch.float64), layer.weight, layer.bias, layer.lora_A, layer.lora_B, scaling
    )
    assert error(layer(inputs(torch.float64)), exact) < 1e-14


def test_extra_repr():
    assert repr(FusedLoRALinear(K, N, R, alpha=8)) == (
        "FusedLoRALinear(in_features=40, out_features=24, bias=True, rank=4, scaling=2)"
    )
    layer = make(dtype=torch.bfloat16, adapter_dtype=torch.float32, dropout=0.1, bias=False)
    layer.merge()
    assert repr(layer).endswith(
        "bias=False, rank=4, scaling=2, dropout=0.1, adapter_dtype=torch.float32, merged=True)"
    )


# ------------------------------------------------------------------------ forward, backward


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float16, torch.float32), (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32), (torch.float64, torch.float64),
    ],
)  # fmt: skip
def test_adapters_beside_16_bits_are_fp32_unless_asked_otherwise(dtype, expected):
    layers = [make(dtype=dtype), FusedLoRALinear.from_linear(nn.Linear(K, N, dtype=dtype), R)]
    assert {p.dtype for layer in layers for p in (layer.lora_A, layer.lora_B)} == {expected}
    assert make(dtype=dtype, adapter_dtype=dtype).lora_A.dtype == dtype


class Doubled(nn.Module):
    def forward(self, tensor):
        return 2 * tensor


@pytest.mark.parametrize("rows", [1, 4, 64])
@pytest.mark.parametrize(
    "compute",
    [
        lambda layer: parametrize.register_parametrization(layer, "bias", Doubled()),
        lambda layer: prune.random_unstructured(layer, "bias", 0.5),
    ],
    ids=["parametrized", "pruned"],
)
def test_a_bias_that_is_computed_is_added(compute, rows):
    layer, x = make(), inputs(torch.float32, rows)
    before = layer.bias.detach().clone()
    compute(layer)
    y = layer(x)  # in which pruning computes it
    assert (layer.bias - before).abs().max() > 0.01
    branch = layer.scaling * F.linear(F.linear(x, layer.lora_A), layer.lora_B)
    torch.testing.assert_close(y, F.linear(x, layer.weight, layer.bias) + branch)


@pytest.mark.parametrize("master", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_output_and_gradients_against_fp64(dtype, master):
    """The accuracy rule: at most twice the error of unfused torch, plus the dtype's eps."""
    layer = make(dtype=dtype, adapter_dtype=torch.float32 if master else dtype)
    grad_out = torch.randn(3, 5, N, generator=torch.Generator().manual_seed(1)).to(dtype)
    given = [layer.weight, layer.bias, layer.lora_A, layer.lora_B]

    def run(function, cast):
        leaves = [t.detach().to(cast).requires_grad_() for t in (inputs(dtype), *given[2:])]
        base = [t.detach().to(cast) for t in given[:2]]
        y = function(leaves[0], *base, *leaves[1:], layer.scaling)
        return [y, *torch.autograd.grad(y, leaves, grad_out.to(cast))]

    exact, unfused = run(plain, torch.float64), run(plain, dtype)
    x = inputs(dtype).requires_grad_()
    y = layer(x)
    y.backward(grad_out)
    ours = [y, x.grad, layer.lora_A.grad, layer.lora_B.grad]
    assert layer.weight.grad is None
    assert layer.bias.grad is None
    assert (y.dtype, layer.lora_A.grad.dtype) == (dtype, layer.lora_A.dtype)
    for name, value, torch_value, truth in zip(
        ("y", "dx", "dA", "dB"), ours, unfused, exact, strict=True
    ):
        limit = 2 * error(torch_value, truth) + torch.finfo(dtype).eps
        assert error(value, truth) <= limit, name


def test_dropout_only_in_training():
    layer, x = make(dropout=0.5), inputs(torch.float32, 64)
    without = make(dropout=0.0)
    torch.manual_seed(3)
    first = layer(x)
    second = layer(x)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first)
    assert not torch.equal(first, second)
    assert not torch.equal(first, without(x))
    assert torch.equal(layer.eval()(x), without(x))


def test_functional_call_takes_other_parameters():
    layer, other = make(0), make(1)
    parameters = dict(other.named_parameters())
    assert torch.equal(functional_call(layer, parameters, (inputs(),)), other(inputs()))


# ---------------------------------------------------------------------------------- merging


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("keep", KEEP)
def test_merge_and_unmerge_are_bit_exact(keep, dtype):
    layer = make(dtype=dtype)
    weight, before, y = layer.weight, state_of(layer), layer(inputs(dtype))
    exact = layer.weight.double() + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    layer.merge(keep)
    assert layer.merged
    assert layer.weight is weight
    assert error(layer.weight, exact) < torch.finfo(dtype).eps
    assert not torch.equal(layer.weight, before["weight"])
    plain = F.linear(inputs(dtype), layer.weight, layer.bias)
    torch.testing.assert_close(layer(inputs(dtype)), plain)
    assert torch.equal(layer.state_dict()["weight"], layer.weight)
    layer.unmerge()
    assert not layer.merged
    assert_same(before, state_of(layer))
    assert torch.equal(layer.weight, before["weight"])
    assert torch.equal(layer(inputs(dtype)), y)


def test_a_final_merge_absorbs_the_adapter():
    layer, kept = make(), make()
    kept.merge()
    layer.merge(keep_base=False)
    assert torch.equal(layer.weight, kept.weight)
    assert torch.equal(layer(inputs()), kept(inputs()))
    fresh = make(5)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(inputs()), layer(inputs()))
    for each in (layer, fresh):
        with pytest.raises(RuntimeError, match="unmerge: merged with keep_base=False"):
            each.unmerge()


def test_merging_in_the_wrong_order_is_refused():
    layer = make()
    with pytest.raises(RuntimeError, match="unmerge: the layer is not merged"):
        layer.unmerge()
    with pytest.raises(ValueError, match="keep_base: got 'gpu'"):
        layer.merge("gpu")
    assert not layer.merged
    layer.merge()
    merged = layer.weight.clone()
    for call in (layer.merge, layer.reset_lora_parameters, layer.reset_parameters):
        with pytest.raises(RuntimeError, match=r"the layer is merged; call unmerge\(\) first"):
            call()
        assert torch.equal(layer.weight, merged)


# ------------------------------------------------------------------------- state dict, copies


STATES = [None, True, "cpu", False]  # unmerged, or merged with this keep_base


def in_state(keep, seed=0, started=make):
    layer = started(seed)
    if keep is not None:
        layer.merge(keep)
    return layer


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("started", [make, lambda seed: pissa(trained=True, seed=seed)[1]])
@pytest.mark.parametrize("there", STATES)
@pytest.mark.parametrize("keep", [True, "cpu", False])
def test_the_state_of_a_merged_layer_is_restored(keep, there, started, assign):
    source, target = in_state(keep, 0, started), in_state(there, 1, started)
    state = state_of(source)
    assert torch.equal(state["weight"], source.weight)
    assert state.keys() - {"lora_A", "lora_B", "pissa_A", "pissa_B"} == {
        "weight", "bias", "merged_base",
    }  # fmt: skip
    plain_linear = nn.Linear(K, N)
    plain_linear.load_state_dict(state, strict=False)
    torch.testing.assert_close(plain_linear(inputs()), source(inputs()))
    for strict in (True, False):
        target.load_state_dict(state, strict=strict, assign=assign)
        assert_same(state, target.state_dict())
        assert target._merged == source._merged
        assert torch.equal(target(inputs()), source(inputs()))
    if keep:
        target.unmerge()
        assert_same(state_of(started(0)), state_of(target))
        assert torch.equal(target(inputs()), started(0)(inputs()))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("there", STATES)
def test_the_state_of_an_unmerged_layer_goes_into_merged_ones(there, assign):
    source, target = make(0), in_state(there, 1)
    state = state_of(source)
    target.load_state_dict(state, assign=assign)
    assert_same(state_of(source), state)  # not what the target merges into
    assert target.merged == bool(there)
    if there:
        source.merge(there)
    assert torch.equal(target(inputs()), source(inputs()))
    if there:
        target.unmerge()
    assert_same(state_of(make(0)), state_of(target))


def test_a_base_brings_a_layer_without_one_back_into_use():
    layer, base = in_state(False), nn.Linear(K, N)
    factors = {name: make(1).state_dict()[name] for name in ("lora_A", "lora_B")}
    before = state_of(layer)
    with pytest.raises(RuntimeError, match=r"lora_A: the layer is merged with keep_base=False.*we"):
        layer.load_state_dict(factors, strict=False)
    assert_same(before, state_of(layer))
    layer.load_state_dict(base.state_dict())
    layer.load_state_dict(factors, strict=False)
    expected = F.linear(inputs(), base.weight, base.bias) + 2 * F.linear(
        F.linear(inputs(), factors["lora_A"]), factors["lora_B"]
    )
    assert error(layer(inputs()), expected) < 1e-6


@pytest.mark.parametrize("there", STATES)
@pytest.mark.parametrize(("damage", "message"), [
    (lambda s: s.update(merged_base=s["merged_base"][1:]), "size mismatch for merged_base"),
    (lambda s: s.update(lora_A=s["lora_A"][1:]), "size mismatch for lora_A"),
    (lambda s: s.pop("weight"), "merged_base: is of a merged layer, whose weight is missing"),
])  # fmt: skip
def test_a_merged_state_that_does_not_fit_changes_nothing(there, damage, message):
    layer, state = in_state(there, 1), state_of(in_state(True))
    before = state_of(layer)
    damage(state)
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state, strict=False)
    assert_same(before, state_of(layer))
    assert layer.merged == (there is not None)


@pytest.mark.parametrize("merged", [False, True])
def test_a_base_state_dict_leaves_the_adapter_alone(merged):
    base, layer = nn.Linear(K, N), make()
    A, B = layer.lora_A.clone(), layer.lora_B.clone()
    if merged:
        layer.merge()
    layer.load_state_dict(base.state_dict(), strict=True)
    if merged:
        layer.unmerge()
    assert torch.equal(layer.weight, base.weight)
    assert torch.equal(layer.lora_A, A)
    assert torch.equal(layer.lora_B, B)


def test_half_an_adapter_is_a_missing_key():
    state = make(1).state_dict()
    del state["lora_B"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "lora_B"'):
        make().load_state_dict(state)
    assert make().load_state_dict(state, strict=False).missing_keys == ["lora_B"]


def by_file(layer):
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("merged", [None, *KEEP])
@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), by_file]
)
def test_copies_are_whole_and_separate(clone, merged):
    layer = make(dropout=0.25).eval()
    if merged:
        layer.merge(merged)
    twin = clone(layer)
    assert_same(state_of(layer), state_of(twin))
    assert torch.equal(layer(inputs()), twin(inputs()))
    assert (twin.scaling, twin.dropout, twin.training) == (2.0, 0.25, False)
    assert [p.requires_grad for p in twin.parameters()] == [False, False, True, True]
    if merged:
        twin.unmerge()
        assert layer.merged
        assert torch.equal(twin.weight, make().weight)
    nn.init.zeros_(twin.lora_B)
    assert not torch.equal(layer(inputs()), twin(inputs()))


def test_pickles_name_the_class_that_users_import():
    assert FusedLoRALinear.__module__ == FusedLoRAConv1D.__module__ == "lora_kernels.nn"
    assert b"lora_kernels.nn\nFusedLoRALinear\n" in pickle.dumps(make(), protocol=0)


def test_tensors_have_the_dimensions_that_are_listed():
    layer = FusedLoRALinear.from_linear(nn.Linear(7, 5), 3, init="pissa")
    sizes = {"N": 5, "K": 7, "r": 3}
    tensors = {**layer._parameters, **layer._buffers}
    assert tensors.pop(MERGED) is None
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == {
        name: [sizes[letter] for letter in letters]
        for name, letters in FusedLoRALinear.dimensions().items()
    }


@pytest.mark.parametrize("keep", [None, *KEEP])
def test_dtype_moves_take_everything(keep):
    layer = make()
    base = layer.weight.detach().clone()
    if keep:
        layer.merge(keep)
    layer.to(torch.bfloat16)
    assert {t.dtype for t in layer.state_dict().values()} == {torch.bfloat16}
    assert layer(inputs(torch.bfloat16)).dtype == torch.bfloat16
    if keep:
        layer.unmerge()
    assert torch.equal(layer.weight, base.to(torch.bfloat16))
    layer = make(adapter_dtype=torch.float32).double()
    assert {t.dtype for t in layer.state_dict().values()} == {torch.float64}
    assert layer(inputs(torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("make_meta", [make, lambda: pissa()[1]])
def test_meta_device_and_back(make_meta):
    layer = make_meta().to("meta")
    assert {t.device.type for t in layer.state_dict().values()} == {"meta"}
    assert layer(inputs().to("meta")).shape == (3, 5, N)
    layer.to_empty(device="cpu")
    for tensor in layer.state_dict().values():
        tensor.fill_(math.nan)
    torch.manual_seed(0)
    layer.reset_parameters()
    torch.manual_seed(0)
    fresh = FusedLoRALinear(K, N, R, alpha=8)
    torch.manual_seed(0)
    fresh.reset_parameters()
    assert_same(fresh.state_dict(), layer.state_dict())
    born_there = FusedLoRALinear(K, N, R, device="meta")
    assert {p.device.type for p in born_there.parameters()} == {"meta"}


# ------------------------------------------------------------------------------------- PiSSA


def test_pissa_moves_the_principal_part_into_the_adapter():
    original, layer = pissa()
    exact = F.linear(inputs().double(), original.double(), layer.bias.double())
    eps = torch.finfo(torch.float32).eps
    assert error(layer(inputs()), exact) < 4 * eps
    assert not torch.equal(layer.weight, original)
    U, S, Vh = torch.linalg.svd(original.double())
    residual = (U[:, R:N] * S[R:]) @ Vh[R:N]
    assert error(layer.weight, residual) < 100 * eps
    principal = layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    assert error(principal, (U[:, :R] * S[:R]) @ Vh[:R]) < 100 * eps


def test_pissa_delta_factors_fit_the_original_base():
    original, layer = pissa(trained=True)
    A, B = layer.delta_factors()
    assert (A.shape, B.shape) == ((2 * R, K), (N, 2 * R))
    y = plain(*(t.double() for t in (inputs(), original, layer.bias, A, B)), layer.scaling)
    assert error(layer(inputs()), y) < 8 * torch.finfo(torch.float32).eps
    assert not torch.equal(layer(inputs()), pissa()[1](inputs()))


@pytest.mark.parametrize("keep", [None, *KEEP])
def test_pissa_state_dict(keep):
    _, layer = pissa(trained=True)
    expected, before = layer(inputs()), state_of(layer)
    if keep:
        layer.merge(keep)
    state = layer.state_dict()
    for target in (make(1), pissa()[1]):
        target.load_state_dict(state)
        if keep:
            assert torch.equal(target(inputs()), layer(inputs()))
            target.unmerge()
        assert list(target.state_dict()) == list(before)
        assert_same(before, state_of(target))
        assert torch.equal(target(inputs()), expected)
    if keep:
        layer.unmerge()
        assert torch.equal(layer.weight, before["weight"])


def test_an_original_base_goes_into_a_pissa_layer():
    original, layer = pissa()
    residual, other = layer.weight.detach().clone(), nn.Linear(K, N)
    layer.load_state_dict({"weight": original, "bias": layer.bias.detach()})
    assert torch.equal(layer.weight, residual)
    layer.load_state_dict(other.state_dict())
    exact = other.double()(inputs().double())
    assert error(layer(inputs()), exact) < 8 * torch.finfo(torch.float32).eps


def test_a_state_dict_that_does_not_fit_leaves_no_half_pissa():
    _, wide = pissa()
    state = wide.state_dict()
    layer = FusedLoRALinear(K, N, R + 1)
    with pytest.raises(RuntimeError, match="size mismatch for lora_A"):
        layer.load_state_dict(state)
    assert layer.pissa_A is None
    layer = make()
    del state["pissa_B"]
    with pytest.raises(RuntimeError, match="pissa_A"):
        layer.load_state_dict(state)
    assert layer.pissa_A is None
    weight = wide.weight.clone()
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        wide.load_state_dict(nn.Linear(K, N + 1).state_dict())
    assert torch.equal(wide.weight, weight)


def test_resetting_or_absorbing_a_pissa_layer_forgets_its_start():
    original, layer = pissa(trained=True)
    layer.reset_lora_parameters()
    eps = torch.finfo(torch.float32).eps
    assert error(layer.weight, original.double()) < 4 * eps
    assert_plain(layer, layer.weight)
    assert layer.pissa_A is None
    _, layer = pissa(trained=True)
    layer.merge(keep_base=False)
    assert list(layer.state_dict()) == ["weight", "bias", "lora_A", "lora_B", "merged_base"]


def test_pissa_of_a_large_weight_uses_a_randomised_svd():
    torch.manual_seed(0)
    base = nn.Linear(1100, 1000, bias=False)
    with torch.no_grad():  # a spectrum that falls off, as trained weights have
        base.weight.add_(torch.randn(1000, 4) @ torch.randn(4, 1100))
    original = base.weight.detach().double()
    layer = FusedLoRALinear.from_linear(base, 4, init="pissa")
    S = torch.linalg.svdvals(original)
    assert layer.weight.double().norm() < 1.001 * S[4:].norm()
    total = layer.weight.double() + layer.lora_B.double() @ layer.lora_A.double()
    assert error(total, original) < 8 * torch.finfo(torch.float32).eps


def test_an_adapter_made_in_inference_mode_trains():
    linear, x = nn.Linear(8, 4), torch.randn(3, 8)
    with torch.inference_mode():
        layer = FusedLoRALinear.from_linear(linear, 2)
    layer(x).sum().backward()
    assert layer.lora_B.grad.any()
