"""fuse_peft and the registration for LoraConfig against PEFT's own layers."""

import copy
import pickle
import tempfile
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode

import lora_kernels
from lora_kernels import fuse_peft, lora_linear, register_fused_lora, unfuse_peft

peft = pytest.importorskip("peft")
gptq = pytest.importorskip("peft.tuners.lora.gptq")
Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
FIRST, SECOND = "base_model.model.first", "base_model.model.second"


class Toy(nn.Module):
    def __init__(self, second=None):
        super().__init__()
        self.first, self.second = nn.Linear(24, 40), second or nn.Linear(40, 17, bias=False)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


class Quantised(nn.Module):
    """A base with a GEMM of its own: int8 weight [N, K], one scale per row, no `weight`."""

    def __init__(self, K, N):
        super().__init__()
        self.in_features, self.out_features = K, N
        self.register_buffer("qweight", torch.randint(-127, 128, (N, K), dtype=torch.int8))
        self.register_buffer("scales", torch.rand(N, 1) / 500)

    def forward(self, x):
        return nn.functional.linear(x, self.qweight.to(x.dtype) * self.scales.to(x.dtype))


def config(**options):
    return peft.LoraConfig(
        **{"r": 3, "lora_alpha": 5, "target_modules": ["first", "second"],
           "init_lora_weights": False, **options}
    )  # fmt: skip


def build(base=None, adapters=("default",), **options):
    torch.manual_seed(0)
    model = peft.get_peft_model(base or Toy(), config(**options))
    for name in adapters[1:]:
        model.add_adapter(name, config(**{**options, "r": 5, "use_rslora": True}))
    return model.eval()


def x_of(rows=11, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, rows, 24, generator=generator).to(dtype).requires_grad_()


@contextmanager
def counted():
    """The calls of the fused ops within it, by name."""
    calls = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "lora_kernels":
                calls.append(func.__name__)
            return func(*args, **(kwargs or {}))

    with Count():
        yield calls


def results(model, x, **kwargs):
    """y and every gradient of a loss, by name."""
    model.zero_grad()
    x = x.detach().requires_grad_()
    y = model(x, **kwargs)
    y.double().square().sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **grads}


def assert_as_good(ours, theirs, exact, dtype):
    """The accuracy rule: at most twice PEFT's error against fp64, plus eps of the dtype."""
    assert ours.keys() == theirs.keys() == exact.keys()
    eps = torch.finfo(dtype).eps * (3 if dtype == torch.float32 else 1)
    for name, truth in exact.items():
        assert ours[name].dtype == theirs[name].dtype, name
        error, peer = ((v[name].double() - truth).norm() / truth.norm() for v in (ours, theirs))
        assert error <= 2 * peer + eps, f"{name}: {error:.3g}, PEFT {peer:.3g}"


def check(model, x, dtype=torch.float32, calls=2, **kwargs):
    """Fused results are as good as PEFT's, with `calls` forward ops; unfusing restores."""
    exact = results(copy.deepcopy(model).double(), x.double(), **kwargs)
    theirs = results(model, x, **kwargs)
    report = fuse_peft(model)
    with counted() as seen:
        ours = results(model, x, **kwargs)
    forward = [name for name in seen if "backward" not in name]
    assert len(forward) == calls, seen
    assert_as_good(ours, theirs, exact, dtype)
    unfuse_peft(model)
    again = results(model, x, **kwargs)
    assert all(torch.equal(again[name], theirs[name]) for name in theirs)
    return report


@pytest.mark.parametrize("options", [
    {}, {"use_rslora": True}, {"lora_bias": True}, {"lora_dropout": 0.3},
    {"rank_pattern": {"second": 1}},
])  # fmt: skip
def test_values_and_gradients(options):
    report = check(build(**options), x_of())
    assert report.fused == [FIRST, SECOND]
    assert not report.left
    assert not report.rounded


def test_several_active_adapters():
    model = build(adapters=("default", "other"), lora_bias=True)
    model.base_model.set_adapter(["default", "other"])
    check(model, x_of(), calls=4)
    model.set_adapter("other")
    check(model, x_of())


def delete(model):
    model.set_adapter("other")
    model.delete_adapter("default")
    return model


def add(model):
    torch.manual_seed(4)
    model.add_adapter("third", config(r=4))
    model.set_adapter("third")
    return model


def weigh(model):
    model.add_weighted_adapter(["default", "other"], [0.3, 0.7], "sum", combination_type="cat")
    model.set_adapter("sum")
    return model


def merge_one(model):
    model.merge_adapter(["other"])
    model.unmerge_adapter()
    return model


def save_and_load(model):
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        model.load_adapter(f"{folder}/other", "again")
    model.set_adapter("again")
    return model


@pytest.mark.parametrize("base", [Toy, lambda: Toy(Conv1D(17, 40))], ids=["linear", "conv1d"])
@pytest.mark.parametrize("life", [
    delete, add, weigh, merge_one, save_and_load, lambda m: m.merge_and_unload(),
    lambda m: m.merge_and_unload(safe_merge=True), lambda m: m.unload(),
])  # fmt: skip
def test_an_adapter_s_life_is_that_of_peft_s_own_layers(base, life):
    theirs = build(base(), adapters=("default", "other"))
    ours = copy.deepcopy(theirs)
    fuse_peft(ours)
    ours, theirs = life(ours).eval(), life(theirs).eval()
    ours_y, theirs_y = ours(x_of()), theirs(x_of())
    assert (ours_y - theirs_y).norm() <= 1e-5 * theirs_y.norm()
    expected, got = theirs.state_dict(), ours.state_dict()
    assert got.keys() == expected.keys()
    for key, tensor in got.items():
        assert (tensor - expected[key]).norm() <= 1e-6 * expected[key].norm(), key
    trained = {n for n, p in theirs.named_parameters() if p.requires_grad}
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == trained


@torch.no_grad()
def test_disabled_merged_and_mixed_batches_are_peft_s_own():
    model = build(adapters=("default", "other"))
    fused = copy.deepcopy(model)  # merging and unmerging change the weights by a rounding
    fuse_peft(fused)

    def states(model):
        x = x_of()
        yield model(x, adapter_names=["other", "__base__"])
        with model.disable_adapter():
            yield model(x)
        model.merge_adapter()
        yield model(x)
        model.unmerge_adapter()

    for ours, theirs in zip(list(states(fused)), list(states(model)), strict=True):
        assert torch.equal(ours, theirs)


def test_dropout_drops_in_training_only():
    model = build(lora_dropout=0.25)
    fuse_peft(model)
    layer, x = model.base_model.model.first, x_of()
    arguments = (layer.base_layer.weight, layer.lora_A.default.weight, layer.lora_B.default.weight)

    def expected(p):
        torch.manual_seed(7)
        return lora_linear(x, *arguments, layer.base_layer.bias, scaling=5 / 3, dropout_p=p)

    for mode, p in ((True, 0.25), (False, 0.0)):
        layer.train(mode)
        torch.manual_seed(7)
        assert torch.equal(layer(x), expected(p))
    assert not torch.equal(expected(0.25), expected(0.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fp32_adapters_on_a_16_bit_base(dtype):
    model = build(Toy().to(dtype))
    assert model.base_model.model.first.lora_A.default.weight.dtype == torch.float32
    rounded = copy.deepcopy(model).to(dtype)  # what rounding at use costs, in PEFT's own layers
    exact = results(copy.deepcopy(model).double(), x_of(dtype=dtype).double())
    theirs = results(rounded, x_of(dtype=dtype))
    theirs = {n: v.to(exact[n]) if n not in ("x", "y") else v for n, v in theirs.items()}
    report = fuse_peft(model)
    assert report.rounded == report.fused == [FIRST, SECOND]
    assert "fp32 adapters rounded" in str(report)
    ours = {n: v.to(theirs[n].dtype) for n, v in results(model, x_of(dtype=dtype)).items()}
    assert_as_good(ours, theirs, exact, dtype)

    own = results(build(Toy().to(dtype)), x_of(dtype=dtype))
    model = build(Toy().to(dtype))
    report = fuse_peft(model, exact=True)
    assert not report.fused
    assert "exact=True" in report.left[FIRST]
    left = results(model, x_of(dtype=dtype))
    assert all(torch.equal(left[name], own[name]) for name in own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("exact", [False, True])
def test_autocast(dtype, exact):
    model, x = build(Toy().to(dtype)), x_of(dtype=dtype)
    truth = results(copy.deepcopy(model).double(), x.double())
    with torch.autocast("cpu", torch.bfloat16):
        theirs = results(model, x)
        fuse_peft(model, exact=exact)
        with counted() as seen:
            ours = results(model, x)
    assert [n for n in seen if "backward" not in n] == ["lora_linear.default"] * 2
    assert_as_good(ours, theirs, truth, torch.bfloat16)


def test_a_quantised_base_keeps_its_gemm():
    options = config()
    options._register_custom_module({Quantised: gptq.GPTQLoraLinear})
    torch.manual_seed(0)
    model = peft.get_peft_model(Toy(Quantised(40, 17)), options).eval()
    x = x_of()
    theirs = results(model, x)
    truth = results(copy.deepcopy(model).double(), x.double())
    assert fuse_peft(model).fused == [FIRST, SECOND]
    with counted() as seen:
        ours = results(model, x)
    assert [n for n in seen if "backward" not in n] == ["lora_linear.default", "lora_add.default"]
    assert_as_good(ours, theirs, truth, torch.float32)
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(x), model(x))


def test_conv1d():
    check(build(Toy(Conv1D(17, 40))), x_of())


def hook_base(layer):
    layer.base_layer.register_forward_hook(lambda module, args, output: output + 1)


def hook_a(layer):
    layer.lora_A.default.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def accelerate_hook(layer):
    layer.lora_B.default._hf_hook = object()


def deepspeed(layer):
    layer.base_layer.weight.ds_id = 3


def parametrize(layer):
    parametrizations.weight_norm(layer.lora_A.default)


def other_type(layer):
    layer.lora_dropout["default"] = nn.AlphaDropout(0.1).eval()


def own_base(layer):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layer.base_layer.__class__ = Doubled


UNCOVERED = {
    hook_base: "hooks", hook_a: "hooks", accelerate_hook: "hooks", deepspeed: "DeepSpeed",
    parametrize: "parametrized", other_type: "AlphaDropout", own_base: "Doubled",
}  # fmt: skip


@pytest.mark.parametrize("change", UNCOVERED, ids=lambda f: f.__name__)
@pytest.mark.parametrize("late", [False, True])
def test_what_is_not_covered_stays_with_peft_at_call_time(change, late):
    model, theirs = build(lora_dropout=0.1), build(lora_dropout=0.1)
    if late:
        assert not fuse_peft(model).left
    for each in (model, theirs):
        change(each.base_model.model.first)
    report = fuse_peft(model)
    assert list(report.left) == [FIRST]
    assert UNCOVERED[change] in report.left[FIRST]
    assert report.fused == [SECOND]
    inner = torch.equal(model.base_model.model.first(x_of()), theirs.base_model.model.first(x_of()))
    assert inner
    with counted() as seen:
        model(x_of())
    assert len(seen) == 1


def test_variants_and_other_layers_stay_with_peft():
    base = nn.Sequential(nn.Embedding(9, 24), nn.Linear(24, 6))
    model = build(base, target_modules=["0", "1"], use_dora=True)
    tokens = torch.arange(9)
    theirs = model(tokens)
    report = fuse_peft(model)
    assert not report.fused
    assert "Dora" in report.left["base_model.model.1"]
    assert "Embedding is not one" in report.left["base_model.model.0"]
    assert torch.equal(model(tokens), theirs)


def test_no_lora_layer_and_bad_input():
    report = fuse_peft(Toy())
    assert (report.fused, report.left, report.rounded) == ([], {}, [])
    for call in (fuse_peft, unfuse_peft):
        with pytest.raises(TypeError, match=r"peft_model: expected a torch\.nn\.Module, got str"):
            call("model")
    with pytest.raises(TypeError, match="exact: expected a bool, got int"):
        fuse_peft(Toy(), exact=1)
    with pytest.raises(TypeError, match=r"config: expected a peft\.LoraConfig, got dict"):
        register_fused_lora({})


def test_parameters_keys_and_modules_stay():
    model = build(lora_dropout=0.1)
    before = {name: id(p) for name, p in model.named_parameters()}
    modules, adapter = dict(model.named_modules()), peft.get_peft_model_state_dict(model)
    for call in (fuse_peft, fuse_peft, unfuse_peft):
        call(model)
        assert {name: id(p) for name, p in model.named_parameters()} == before
        assert all(a is b for a, b in zip(modules.values(), model.modules(), strict=True))
        after = peft.get_peft_model_state_dict(model)
        assert after.keys() == adapter.keys()
    assert type(model.base_model.model.first) is peft.tuners.lora.layer.Linear
    assert vars(model.base_model.model.first).keys() == vars(build().base_model.model.first).keys()


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles_are_fused_and_independent(twin_of):
    model = build()
    fuse_peft(model)
    twin = twin_of(model)
    with counted() as seen:
        assert torch.equal(twin(x_of()), model(x_of()))
    assert len(seen) == 4
    nn.init.zeros_(twin.base_model.model.first.lora_B.default.weight)
    assert not torch.equal(twin(x_of()), model(x_of()))


def test_one_compiled_graph():
    model = build(Toy(Conv1D(17, 40)), lora_dropout=0.1, lora_bias=True)
    fuse_peft(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x_of()), model(x_of()))


@pytest.mark.parametrize("base", [Toy, lambda: Toy(Conv1D(17, 40))])
def test_registered_layers_are_built_fused(base):
    torch.manual_seed(0)
    plain = peft.get_peft_model(base(), config(lora_dropout=0.1)).eval()
    torch.manual_seed(0)
    options = register_fused_lora(config(lora_dropout=0.1))
    model = peft.get_peft_model(base(), options).eval()
    model.add_adapter("other", config(r=2))
    assert plain.state_dict().keys() <= model.state_dict().keys()
    with counted() as seen:
        y = model(x_of())
    assert len(seen) == 2
    unfuse_peft(model)
    assert torch.equal(model(x_of()), plain(x_of()))
    assert (y - plain(x_of())).norm() <= 1e-6 * y.norm()
    assert options.fan_in_fan_out == plain.peft_config["default"].fan_in_fan_out


def test_the_supported_range_of_versions():
    major, minor = map(int, peft.__version__.split(".")[:2])
    assert (0, 20) <= (major, minor) <= (0, 21), "README and integrations/peft.py name 0.20 to 0.21"
    assert lora_kernels.fuse_peft is fuse_peft
