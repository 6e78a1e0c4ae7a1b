"""fuse_peft and the registration for LoraConfig against PEFT's own layers."""

import copy
import pickle
import tempfile
import warnings
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode

import lora_kernels
from lora_kernels import fuse_peft, lora_linear, register_fused_lora, unfuse_peft

peft = pytest.importorskip("peft")
integration = pytest.importorskip("lora_kernels.integrations.peft")
hotswap = pytest.importorskip("peft.utils.hotswap")
gptq = pytest.importorskip("peft.tuners.lora.gptq")
Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
FIRST, SECOND = "base_model.model.first", "base_model.model.second"


@pytest.fixture(autouse=True)
def whole(monkeypatch):
    """Toys go through the op unless a test asks for the calls of few rows."""
    monkeypatch.setattr(integration, "_SMALL", -1)


@pytest.fixture
def small(whole, monkeypatch):
    monkeypatch.setattr(integration, "_SMALL", 1 << 14)


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
def test_disabled_and_merged_layers_are_peft_s_own():
    model = build(adapters=("default", "other"))
    fused = copy.deepcopy(model)  # merging and unmerging change the weights by a rounding
    fuse_peft(fused)

    def states(model):
        x = x_of()
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


def hook_b(layer):
    layer.lora_B.default.register_full_backward_hook(lambda module, dx, dy: (dx[0] * 2,))


def hook_dropout(layer):
    layer.lora_dropout.default.register_full_backward_pre_hook(lambda module, dy: (dy[0] * 3,))


def replace_forward(layer):
    forward = layer.lora_A.default.forward
    layer.lora_A.default.forward = lambda x: forward(x) + 1


class Int8(Tensor):
    """As torchao's: its own meaning of a product, other ops are refused."""

    def __new__(cls, q, scale):
        return Tensor._make_wrapper_subclass(cls, q.shape, dtype=torch.float32)

    def __init__(self, q, scale):
        self.q, self.scale = q, scale

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].q, args[0].scale)
        if func not in (torch.ops.aten.t.default, torch.ops.aten.addmm.default,
                        torch.ops.aten.mm.default):  # fmt: skip
            raise NotImplementedError(f"{func} of Int8")
        return func(*(a.q * a.scale if isinstance(a, cls) else a for a in args))


def quantise(layer):
    q = torch.randint(-9, 9, (40, 24), generator=torch.Generator().manual_seed(0)).float()
    layer.base_layer.weight = nn.Parameter(Int8(q, 0.1), requires_grad=False)


def drop_in_place(layer):
    layer.lora_dropout["default"] = nn.Dropout(0.0, inplace=True)


def own_base(layer):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layer.base_layer.__class__ = Doubled


UNCOVERED = {
    hook_base: "hooks", hook_a: "hooks", accelerate_hook: "hooks", deepspeed: "DeepSpeed",
    parametrize: "parametrized", other_type: "AlphaDropout", own_base: "Doubled",
    hook_b: "hooks", hook_dropout: "hooks", replace_forward: "hooks", quantise: "holds a Int8",
    drop_in_place: "in place",
}  # fmt: skip


@pytest.mark.parametrize("change", UNCOVERED, ids=lambda f: f.__name__)
@pytest.mark.parametrize("late", [False, True])
def test_what_is_not_covered_stays_with_peft_at_call_time(change, late):
    model, theirs = build(lora_dropout=0.1), build(lora_dropout=0.1)
    if late:
        assert not fuse_peft(model).left
        model(x_of())
    for each in (model, theirs):
        change(each.base_model.model.first)
    report = fuse_peft(model)
    assert list(report.left) == [FIRST]
    assert UNCOVERED[change] in report.left[FIRST]
    assert report.fused == [SECOND]
    inner, expected = (results(m.base_model.model.first, x_of()) for m in (model, theirs))
    assert inner.keys() == expected.keys()
    assert all(torch.equal(inner[name], expected[name]) for name in expected)
    with counted() as seen:
        model(x_of())
    assert len(seen) == 1


def deactivate(layer):
    layer.set_adapter([])


def switch(layer):
    layer.set_adapter(["other"])


def both(layer):
    layer.set_adapter(["default", "other"])


def remove(layer):
    layer.set_adapter(["other"])
    layer.delete_adapter("default")


def disable(layer):
    layer.enable_adapters(False)


def merge(layer):
    layer.merge()


def scale(layer):
    layer.scale_layer(3.0)


def trained_scaling(layer):
    layer.scaling["default"] = nn.Parameter(torch.tensor(0.7))


def one_element_scaling(layer):
    layer.scaling["default"] = torch.tensor([0.7], dtype=torch.float64)


def other_base(layer):
    torch.manual_seed(5)
    layer.base_layer = nn.Linear(24, 40)


def other_weight(layer):
    layer.lora_A.default.weight = nn.Parameter(torch.ones(3, 24))


def other_adapter(layer):
    torch.manual_seed(5)
    layer.lora_A["default"], layer.lora_B["default"] = (
        nn.Linear(24, 2, bias=False),
        nn.Linear(2, 40),
    )


def bias_on_a(layer):
    torch.manual_seed(5)
    layer.lora_A["default"] = nn.Linear(24, 3)


def no_dropout(layer):
    layer.lora_dropout["default"] = nn.Dropout(1.0)
    layer.train()


def keep_input_dtype(layer):
    layer.cast_input_dtype_enabled = False


def to_double(layer):
    layer.to(torch.float64)


def half_base(layer):
    layer.base_layer.to(torch.bfloat16)
    layer.base_layer.register_forward_pre_hook(lambda module, args: (args[0].bfloat16(),))


LATE = [
    *UNCOVERED, deactivate, switch, both, remove, disable, merge, scale, trained_scaling,
    one_element_scaling, other_base, other_weight, other_adapter, bias_on_a, no_dropout,
    keep_input_dtype, to_double, half_base,
]  # fmt: skip


def assert_layers_equal(ours, theirs, x):
    ours, theirs = results(ours, x), results(theirs, x)
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert ours[name].dtype == expected.dtype, name
        torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", LATE, ids=lambda f: f.__name__)
@pytest.mark.parametrize("limit", [-1, 1 << 14])
def test_what_changes_after_fusing_is_seen_by_the_next_call(change, limit, monkeypatch):
    monkeypatch.setattr(integration, "_SMALL", limit)
    theirs = build(adapters=("default", "other"), lora_bias=change is merge)
    ours = copy.deepcopy(theirs)
    fuse_peft(ours)
    ours, theirs = (model.base_model.model.first for model in (ours, theirs))
    assert_layers_equal(ours, theirs, x_of())
    for layer in (ours, theirs):
        change(layer)
    x = x_of(dtype=ours.base_layer.weight.dtype if change is to_double else torch.float32)
    assert_layers_equal(ours, theirs, x)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("base", [
    Toy, lambda: Toy(Conv1D(17, 40)), lambda: Toy().to(torch.bfloat16),
], ids=["linear", "conv1d", "bf16"])  # fmt: skip
@pytest.mark.parametrize("options", [
    {}, {"lora_dropout": 0.4}, {"lora_bias": True, "use_rslora": True},
])  # fmt: skip
@pytest.mark.parametrize("autocast", [False, True])
def test_calls_of_few_rows_are_peft_s_bit_for_bit(base, options, autocast):
    theirs = build(base(), adapters=("default", "other"), **options).train()
    theirs.base_model.set_adapter(["default", "other"])
    ours = copy.deepcopy(theirs)
    fuse_peft(ours)
    dtype = theirs.base_model.model.first.base_layer.weight.dtype
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext(), counted() as seen:
        torch.manual_seed(1)
        expected = results(theirs, x_of(3, dtype))
        torch.manual_seed(1)
        got = results(ours, x_of(3, dtype))
        assert not seen
        ours(x_of(1000, dtype))
        assert len(seen) == 4
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.usefixtures("small")
def test_calls_of_few_rows_are_the_op_where_a_graph_is_kept():
    model, seen = build(), []
    fuse_peft(model)

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x_of(1)), model(x_of(1)))
    assert sum("lora_kernels" in target for target in seen) == 2


def test_variants_and_other_layers_stay_with_peft():
    base = nn.Sequential(nn.Embedding(9, 24), nn.Linear(24, 6))
    model = build(base, target_modules=["0", "1"], use_dora=True)
    tokens = torch.arange(9)
    theirs = model(tokens)
    report = fuse_peft(model)
    assert report.fused == ["base_model.model.1"]
    assert "Embedding is not one" in report.left["base_model.model.0"]
    torch.testing.assert_close(model(tokens), theirs)
    model = build(
        nn.Sequential(nn.Linear(24, 6)), target_modules=["0"], alora_invocation_tokens=[3]
    )
    theirs = model(x_of(9))
    assert "'default' is a ALoraLinearVariant" in fuse_peft(model).left["base_model.model.0"]
    assert torch.equal(model(x_of(9)), theirs)


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


GLOBAL_HOOKS = {
    "register_module_forward_pre_hook": lambda module, args: None,
    "register_module_forward_hook": lambda module, args, y: None,
    "register_module_full_backward_pre_hook": lambda module, dy: None,
    "register_module_full_backward_hook": lambda module, dx, dy: None,
}


@pytest.mark.parametrize("register", GLOBAL_HOOKS)
@pytest.mark.parametrize("limit", [-1, 1 << 14])
def test_hooks_on_every_module_see_peft_s_submodules(register, limit, monkeypatch):
    monkeypatch.setattr(integration, "_SMALL", limit)
    counts = []
    for fuse in (False, True):
        model, seen = build(lora_dropout=0.1), []
        if fuse:
            fuse_peft(model)

        def hook(module, *args, seen=seen):
            seen.append(module)
            return GLOBAL_HOOKS[register](module, *args)

        handle = getattr(nn.modules.module, register)(hook)
        try:
            results(model, x_of())
        finally:
            handle.remove()
        counts.append(len(seen))
    assert counts[0] == counts[1] > 6


def test_names_of_fused_classes():
    model, theirs = build(), build()
    fuse_peft(model)
    layer = model.base_model.model.first
    assert repr(model) == repr(theirs)
    assert repr(layer).startswith("lora.Linear(")
    assert f"{type(layer).__module__}.{type(layer).__qualname__}" == (
        "lora_kernels.integrations.peft.FusedLinear"
    )


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_trace_is_that_of_peft_s_layers():
    model, theirs = (build().requires_grad_(False) for _ in range(2))
    fuse_peft(model)
    ours, theirs = (torch.jit.trace(m, x_of(3).detach()) for m in (model, theirs))
    x = x_of(7).detach()
    assert torch.equal(ours(x), theirs(x))


def swap(model, folder, rank=4):
    """Another adapter, saved and hot-swapped in."""
    torch.manual_seed(9)
    other = peft.get_peft_model(Toy(), config(r=rank, lora_alpha=7))
    other.save_pretrained(folder)
    hotswap.hotswap_adapter(model, str(folder), adapter_name="default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensor_scaling_of_hot_swapped_adapters(dtype, tmp_path):
    model = build(Toy().to(dtype))
    hotswap.prepare_model_for_compiled_hotswap(model, target_rank=8)
    assert isinstance(model.base_model.model.first.scaling["default"], Tensor)
    for turn in range(2):
        rounded = copy.deepcopy(model).to(dtype)
        theirs = results(rounded, x_of(dtype=dtype))
        truth = results(copy.deepcopy(model).double(), x_of(dtype=dtype).double())
        theirs = {n: v.to(truth[n]) if n not in ("x", "y") else v for n, v in theirs.items()}
        fuse_peft(model)
        with counted() as seen:
            ours = results(model, x_of(dtype=dtype))
        assert sum("backward" not in name for name in seen) == 2
        ours = {n: v.to(theirs[n].dtype) for n, v in ours.items()}
        assert_as_good(ours, theirs, truth, dtype)
        if turn == 0:
            swap(model, tmp_path)


def test_one_compiled_graph_for_all_hot_swapped_adapters(tmp_path):
    torch.compiler.reset()
    model = build()
    hotswap.prepare_model_for_compiled_hotswap(model, target_rank=8)
    fuse_peft(model)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        for rank in (4, 2, 8):
            swap(model, tmp_path / str(rank), rank)
            expected = copy.deepcopy(model)
            unfuse_peft(expected)
            torch.testing.assert_close(compiled(x_of()), expected(x_of()))
    assert counter.frame_count == 1


def test_a_scaling_tensor_elsewhere_is_peft_s():
    model = build()
    fuse_peft(model)
    layer = model.base_model.model.first
    layer.scaling["default"] = torch.tensor(2.0, device="meta")
    assert not integration._takes(layer.scaling["default"], x_of())
    assert integration._takes(torch.tensor(2.0), x_of())
    assert integration._takes(2.0, x_of())


class Lossy(Quantised):
    """A quantised base whose backward does what `mode` says."""

    def __init__(self, K, N, mode):
        super().__init__(K, N)
        self.mode, self.calls = mode, 0

    def forward(self, x):
        self.calls += 1
        if self.mode == "raises":
            y = super().forward(x)
            y.register_hook(lambda dy: 1 / 0)
            return y
        if self.mode == "random":
            torch.rand(3)
        if self.mode == "detached":
            x = x.detach()
        if self.mode == "zero":
            return super().forward(x.detach()) + 0 * x.sum()
        if self.mode == "wrong":
            return super().forward(x.detach()) + (x - x.detach()).mean(-1, keepdim=True)
        if self.mode == "rounded":  # 4 bits, straight through
            step = x.abs().amax().detach() / 7
            x = x + ((x / step).round() * step - x).detach()
        return super().forward(x)


def lossy(mode, first=None):
    options = config()
    options._register_custom_module({Lossy: gptq.GPTQLoraLinear})
    torch.manual_seed(0)
    base = Toy(Lossy(40, 17, mode))
    return peft.get_peft_model(base, options)


@pytest.mark.parametrize("mode", ["detached", "zero", "wrong"])
def test_a_base_without_a_gradient_is_named_once(mode):
    model = lossy(mode)
    state = torch.get_rng_state()
    report = fuse_peft(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert report.fused == [FIRST, SECOND]
    assert list(report.no_gradient) == [SECOND]
    assert "Lossy" in report.no_gradient[SECOND]
    assert f"no gradient through {SECOND}: its base" in str(report)
    layer = model.base_model.model.second
    assert layer.base_layer.calls == 0
    assert all(p.grad is None for p in model.parameters())
    model = pickle.loads(pickle.dumps(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.no_grad():
            model(x_of())
        model.base_model.model.second(torch.randn(2, 40))  # nothing before it trains
    with pytest.warns(UserWarning, match=rf"{SECOND}: its base .*before this layer"):
        model(x_of())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x_of())
    unfuse_peft(model)
    assert (
        vars(model.base_model.model.second).keys()
        == vars(lossy(mode).base_model.model.second).keys()
    )


@pytest.mark.parametrize("mode", ["right", "rounded", "random", "raises"])
def test_a_base_with_a_gradient_is_not_named(mode):
    model = lossy(mode)
    state = torch.get_rng_state()
    report = fuse_peft(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert not report.no_gradient
    assert "no gradient" not in str(report)


def test_a_base_that_cannot_be_tried_is_left_alone():
    hooked, odd = lossy("detached"), lossy("right")
    hooked.base_model.model.second.base_layer.register_forward_hook(lambda *args: None)
    odd.base_model.model.second.base_layer.forward = None
    for model in (hooked, odd, lossy("detached").to("meta")):
        assert not fuse_peft(model).no_gradient


def test_weights_of_other_types_are_tried_too():
    model = build()
    quantise(model.base_model.model.first)
    own_base(model.base_model.model.second)
    report = fuse_peft(model)
    assert "Int8" in report.left[FIRST]
    assert not report.no_gradient

    class Detached(nn.Linear):
        def forward(self, x):
            return super().forward(x.detach())

    model.base_model.model.second.base_layer.__class__ = Detached
    report = fuse_peft(model)
    assert list(report.no_gradient) == [SECOND]
    with pytest.warns(UserWarning, match=SECOND):
        model(x_of())


def test_the_supported_range_of_versions():
    major, minor = map(int, peft.__version__.split(".")[:2])
    assert (0, 20) <= (major, minor) <= (0, 21), "README and integrations/peft.py name 0.20 to 0.21"
    assert lora_kernels.fuse_peft is fuse_peft


def sparse_x(model):
    return torch.eye(600, 24).to_sparse()


def nested_x(model):
    return torch.nested.nested_tensor([torch.ones(700, 24), torch.ones(3, 24)])


def jagged_x(model):
    parts = [torch.ones(700, 24), torch.ones(3, 24)]
    return torch.nested.nested_tensor(parts, layout=torch.jagged)


def complex_model(model):
    model.to(torch.complex64)
    return torch.ones(700, 24, dtype=torch.complex64)


def sparse_weight(model):
    base = model.first.base_layer
    base.weight = nn.Parameter(base.weight.detach().to_sparse_csr(), requires_grad=False)
    return torch.ones(700, 24)


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:The PyTorch API of nested")
@pytest.mark.parametrize(
    "change", [sparse_x, nested_x, jagged_x, complex_model, sparse_weight], ids=lambda f: f.__name__
)
@torch.no_grad()
def test_inputs_that_the_op_does_not_take_stay_with_peft(change):
    model = build()
    layer = model.base_model.model
    x = change(layer)
    theirs = layer.first(x)
    fuse_peft(model)
    with counted() as seen:
        ours = layer.first(x)
    assert not seen
    left, right = (list(y.unbind()) if y.is_nested else [y] for y in (ours, theirs))
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@torch.no_grad()
def test_fp64_adapters_under_autocast_stay_with_peft():
    model = build()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.double()
    x = x_of(700).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs = model(x)
        fuse_peft(model)
        with counted() as seen:
            assert torch.equal(model(x), theirs)
    assert not seen
