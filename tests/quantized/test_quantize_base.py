"""Models whose frozen weights are quantised: what becomes of them, what they compute and learn,
what is refused, their files, and all that is done with adapters on them."""

import copy
import io
import weakref

import pytest
import torch
from tiny_models import bert, gpt2, llama
from torch import nn
from torch.nn import functional as F

from lora_kernels import (
    FusedLoRALinear,
    adapter_rows,
    add_adapter,
    adjust_rank,
    apply_lora,
    check_adapters,
    disable_adapters,
    load_adapter,
    load_quantized,
    lora_parameters,
    merge_lora,
    merged_state_dict,
    quantize,
    quantize_base,
    quantizing,
    remove_lora,
    save_adapter,
    save_quantized,
    set_adapter,
    train_model,
    unmerge_lora,
    warmup,
)
from lora_kernels.testing import Aten
from lora_kernels.weights import KINDS, QuantizedTensor

SIZES = {"in": 128, "hidden": 256, "out": 12}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(SIZES["in"], SIZES["hidden"])
        self.down = nn.Linear(SIZES["hidden"], SIZES["in"])
        self.head = nn.Linear(SIZES["in"], SIZES["out"])

    def forward(self, x):
        return self.head(x + self.down(F.relu(self.up(x))))


def adapted(kind=None, rank=4, **options):
    """A net with adapters that act, on weights of a kind."""
    torch.manual_seed(0)
    model = Net()
    apply_lora(model, rank, target_modules=["up", "down"], init="random", **options)
    if kind is not None:
        quantize_base(model, kind)
    return model


def x():
    return torch.randn(7, SIZES["in"], generator=torch.Generator().manual_seed(1))


def of_net(model):
    """What a net with adapters computes, in plain torch on its dequantised weights."""
    h = x()
    for name in ("up", "down"):
        layer = getattr(model, name)
        weight = (
            layer.weight.dequantize() if isinstance(layer.weight, QuantizedTensor) else layer.weight
        )
        y = (
            F.linear(h, weight, layer.bias)
            + layer.scaling * h @ layer.lora_A.t() @ layer.lora_B.t()
        )
        h = F.relu(y) if name == "up" else x() + y
    return model.head(h)


# ---------------------------------------------------------------------------------------- computing


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_compute_with_what_the_weight_decodes_to(kind, dtype):
    model = adapted()
    up, weight = model.up, model.up.weight
    report = quantize_base(model, kind)
    assert model.up is up
    assert type(up) is FusedLoRALinear
    assert set(report.layers) == {"up", "down"}
    assert report.left == {}
    assert type(up.weight) is QuantizedTensor
    assert isinstance(up.weight, nn.Parameter)
    assert not up.weight.requires_grad
    assert up.weight.shape == weight.shape
    assert torch.equal(up.weight.dequantize(), quantize(weight, kind).dequantize(torch.float32))
    model.to(dtype)
    assert up.weight.dtype == dtype
    tolerance = (
        {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.1}
    )
    expected = of_net(model.float())
    torch.testing.assert_close(model.to(dtype)(x().to(dtype)).float(), expected, **tolerance)


def test_gradients_are_those_of_the_dequantised_model():
    model = adapted("nf4")
    grads = []
    for run in (lambda: model(x()), lambda: of_net(model)):
        model.zero_grad()
        run().square().mean().backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert len(grads[0]) >= 4
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-4, atol=1e-6)


def test_report():
    model = adapted()
    before = sum(getattr(model, n).weight.nbytes for n in ("up", "down"))
    report = quantize_base(model, "nf4")
    assert report.before == before
    assert report.after == sum(getattr(model, n).weight.record.nbytes for n in ("up", "down"))
    assert all(0.05 < layer.error < 0.12 for layer in report.layers.values())
    text = str(report)
    assert "nf4 on 2 layers" in text
    assert "relative error" in text


def test_plain_layers_and_those_named():
    model = Net()
    report = quantize_base(model, "int8", target_modules=["up", "head"])
    assert set(report.layers) == {"up", "head"}
    assert type(model.up) is nn.Linear
    assert not isinstance(model.down.weight, QuantizedTensor)
    h = x()
    up = F.linear(h, model.up.weight.dequantize(), model.up.bias)
    expected = F.linear(h + model.down(F.relu(up)), model.head.weight.dequantize(), model.head.bias)
    torch.testing.assert_close(model(h), expected, rtol=1e-4, atol=1e-4)
    again = quantize_base(model, "int8", target_modules="all-linear")
    assert set(again.layers) == {"down"}
    assert "is quantised already" in again.left["up"]


def test_then_adapters():
    model = Net()
    quantize_base(model, "nf4", target_modules=["up", "down"])
    before = model(x())
    report = apply_lora(model, 4, target_modules=["up", "down"])
    assert report.replaced == ["up", "down"]
    assert torch.equal(model(x()), before)
    assert model.up.lora_A.dtype == torch.float32
    optimizer = torch.optim.AdamW(lora_parameters(model), 1e-2)
    losses = []
    for _ in range(20):
        loss = F.mse_loss(model(x()), torch.ones(7, SIZES["out"]))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


def test_loftq_is_nearer():
    dense = adapted()
    for layer in (dense.up, dense.down):
        layer.lora_B.data.zero_()
    expected, models = dense(x()), []
    for loftq in (False, True):
        model = copy.deepcopy(dense)
        report = quantize_base(model, "nf4", loftq=loftq)
        models.append((model, report))
    (plain, first), (started, second) = models
    assert all(second.layers[n].error < 0.97 * first.layers[n].error for n in first.layers)
    apart = [(model(x()) - expected).norm() for model in (plain, started)]
    assert apart[1] < apart[0]
    weight, layer = dense.up.weight, started.up
    whole = layer.weight.dequantize() + layer.scaling * layer.lora_B @ layer.lora_A
    error = (whole - weight).norm() / weight.norm()
    assert error.item() == pytest.approx(second.layers["up"].error, rel=1e-4)


def test_memory_beside_the_model_is_that_of_a_layer():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(8)))
    largest = []

    def report(name, values):
        plain = [tensor for tensor in values if type(tensor) is torch.Tensor]
        largest.append(max((t.untyped_storage().nbytes() for t in plain), default=0))

    with Aten(report):
        quantize_base(model, "nf4", target_modules="all-linear")
    # Pairs of codes are looked up as int32, two to a value of the weight.
    assert max(largest) <= 2 * 256 * 256 * 4


def test_weights_go_as_they_are_replaced(monkeypatch):
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(5)))
    old = [weakref.ref(layer.weight) for layer in model]
    alive, one = [], quantizing._quantize

    def watched(*given):
        alive.append(sum(ref() is not None for ref in old))
        return one(*given)

    monkeypatch.setattr(quantizing, "_quantize", watched)
    quantize_base(model, "nf4", target_modules="all-linear")
    assert alive == [5, 4, 3, 2, 1]


def test_one_weight_in_two_layers_stays_one():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight = model[0].weight
    apply_lora(model, 2, target_modules=["0", "1"])
    quantize_base(model, "nf4")
    assert model[1].weight is model[0].weight
    assert isinstance(model[0].weight, QuantizedTensor)


# ------------------------------------------------------------------------------------------ refused


def test_what_is_left_as_it_is():
    model = llama(tie_word_embeddings=True)
    report = quantize_base(model, "nf4", target_modules="all-linear")
    assert "lm_head" not in report.layers
    assert not isinstance(model.lm_head.weight, QuantizedTensor)


def test_weights_that_others_read_stay():
    model = nn.Sequential(nn.Embedding(64, 64), nn.Linear(64, 64, bias=False), nn.Linear(64, 64))
    model[1].weight = model[0].weight
    report = quantize_base(model, "nf4", target_modules=["1", "2"])
    assert set(report.layers) == {"2"}
    assert "its weight is tied to 0.weight" in report.left["1"]
    assert model[1].weight is model[0].weight


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kind": "nf5"}, ValueError, "kind: got 'nf5'"),
        ({"block": 3}, ValueError, "even number"),
        ({"loftq": 1}, TypeError, "loftq: expected a bool"),
        ({"target_modules": ["nothing"]}, ValueError, "nothing"),
    ],
)
def test_options(options, error, message):
    model = adapted()
    with pytest.raises(error, match=message):
        quantize_base(model, **options)
    assert type(model.up.weight) is nn.Parameter


def test_nothing_changes_where_it_cannot():
    model = adapted()
    with torch.no_grad():
        model.down.weight[3, 4] = float("nan")
    with pytest.raises(ValueError, match="down holds values that are not finite"):
        quantize_base(model, "nf4")
    assert type(model.up.weight) is nn.Parameter
    model = adapted()
    merge_lora(model)
    with pytest.raises(ValueError, match="call unmerge_lora first"):
        quantize_base(model, "nf4")
    with pytest.raises(ValueError, match="lora_B is not zero"):
        quantize_base(adapted(), "nf4", loftq=True)
    with pytest.raises(ValueError, match="no linear layer to quantise"):
        quantize_base(adapted("nf4"), "nf4")
    with torch.device("meta"):
        model = Net()
    with pytest.raises(ValueError, match="on the meta device"):
        quantize_base(model, "nf4", target_modules=["up"])
    model = nn.Sequential(nn.Linear(30, 30))
    with pytest.raises(ValueError, match="multiple of the block"):
        quantize_base(model, "int4", target_modules="all-linear")


def test_what_would_change_the_weight_is_refused():
    model = adapted("nf4")
    with pytest.raises(ValueError, match="into='dequantised'"):
        merge_lora(model)
    with pytest.raises(ValueError, match="quantised"):
        merged_state_dict(model)
    with pytest.raises(ValueError, match="into: got 'both'"):
        merge_lora(model, False, into="both")
    with pytest.raises(ValueError, match="keep_base: expected False"):
        merge_lora(model, into="requantise")
    plain = Net()
    quantize_base(plain, "nf4", target_modules=["up"])
    with pytest.raises(ValueError, match="'pissa' changes the weight"):
        apply_lora(plain, 4, target_modules=["up"], init="pissa")
    assert type(plain.up) is nn.Linear
    with pytest.raises(NotImplementedError, match=r"dequantize\(\) gives an ordinary tensor"):
        model.up.weight + 1
    with pytest.raises(RuntimeError, match=r"expected x in torch.float32, the weight's"):
        plain.up(x().double())
    with pytest.raises(TypeError, match="weight: expected x's dtype"):
        model.up(x().double())


# ------------------------------------------------------------------------------------------ merging


@pytest.mark.parametrize("kind", ["int8", "nf4", "fp8", "int4"])
def test_merged_into_a_dense_weight(kind):
    model = adapted(kind)
    before = model(x())
    held = merge_lora(model, False, into="dequantised")
    assert held == {"up": pytest.approx(1.0, abs=1e-3), "down": pytest.approx(1.0, abs=1e-3)}
    assert type(model.up.weight) is nn.Parameter
    assert model.up.merged
    torch.testing.assert_close(model(x()), before, rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="was not kept"):
        unmerge_lora(model)
    remove_lora(model)
    assert type(model.up) is nn.Linear
    torch.testing.assert_close(model(x()), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_into_a_quantised_weight(kind):
    model = adapted(kind)
    before, weight = model(x()), model.up.weight
    total = weight.dequantize() + model.up.scaling * model.up.lora_B @ model.up.lora_A
    held = merge_lora(model, False, into="requantise")
    again = model.up.weight
    assert isinstance(again, QuantizedTensor)
    assert again.record.form == weight.record.form
    assert torch.equal(again.dequantize(), quantize(total, kind).dequantize(torch.float32))
    update = total - weight.dequantize()
    share = ((again.dequantize() - weight.dequantize()) * update).sum() / update.square().sum()
    assert held["up"] == pytest.approx(share.item(), abs=1e-3)
    assert 0.5 < held["up"] < 1.5
    assert (model(x()) - before).norm() / before.norm() < 0.3


def test_of_dense_layers_nothing_is_reported():
    assert merge_lora(adapted()) == {}
    model = adapted("nf4")
    with torch.no_grad():
        model.up.lora_B.zero_()
    assert merge_lora(model, False, into="dequantised")["up"] == 1.0


# ---------------------------------------------------------------------------- files, copies, moves


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fresh", ["dense", "quantised", "meta"])
def test_files(kind, fresh, tmp_path):
    model = adapted(kind)
    path = tmp_path / "model.safetensors"
    save_quantized(model, path)
    assert path.stat().st_size < 1.3 * sum(
        p.record.nbytes if isinstance(p, QuantizedTensor) else p.nbytes for p in model.parameters()
    )
    if fresh == "meta":
        with torch.device("meta"):
            other = Net()
            apply_lora(other, 4, target_modules=["up", "down"])
    else:
        other = adapted("int8" if fresh == "quantised" else None)
        other.load_state_dict({}, strict=False)
    load_quantized(other, path)
    assert torch.equal(other(x()), model(x()))
    assert other.up.weight.record.form == model.up.weight.record.form


def test_files_that_do_not_fit(tmp_path):
    model, path = adapted("nf4"), tmp_path / "model.safetensors"
    save_quantized(model, path)
    other = adapted(rank=8)
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(ValueError, match=r"up.lora_A: has shape \(4, 128\), the model's"):
        load_quantized(other, path)
    with pytest.raises(ValueError, match=r"up.lora_A: no tensor of the model"):
        load_quantized(Net(), path)
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())
    with pytest.raises(FileNotFoundError):
        load_quantized(other, tmp_path / "none")
    damaged = bytearray(path.read_bytes())
    damaged[20:60] = b"\xff" * 40
    (tmp_path / "damaged").write_bytes(damaged)
    (tmp_path / "empty").write_bytes(b"")
    for name in ("damaged", "empty"):
        with pytest.raises(ValueError, match="is no file of save_quantized, or damaged"):
            load_quantized(other, tmp_path / name)
    from safetensors.torch import save_file

    save_file({"up.weight": torch.zeros(2)}, tmp_path / "plain")
    with pytest.raises(ValueError, match="is no file of save_quantized"):
        load_quantized(other, tmp_path / "plain")


def test_copies_pickles_and_state_dicts():
    model = adapted("nf4")
    expected = model(x())
    copied = copy.deepcopy(model)
    assert torch.equal(copied(x()), expected)
    assert copied.up.weight.record.codes.data_ptr() != model.up.weight.record.codes.data_ptr()
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    other = adapted("nf4")
    with torch.no_grad():
        other.up.weight.record.codes.zero_()
    other.load_state_dict(state)
    assert torch.equal(other(x()), expected)
    with pytest.raises(RuntimeError, match="copying into a QuantizedTensor"):
        other.load_state_dict(adapted("int8").state_dict())
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x()), expected)


def test_moved_and_cast():
    model = adapted("nf4")
    scale = model.up.weight.record.outer_scale
    model.to(torch.bfloat16)
    assert model.up.weight.record.outer_scale.dtype == torch.float32
    assert model.up.weight.record.outer_scale is scale or torch.equal(
        model.up.weight.record.outer_scale, scale
    )
    assert model(x().bfloat16()).dtype == torch.bfloat16
    model.to("meta")
    assert model.up.weight.is_meta
    assert model.up.weight.record.device.type == "meta"


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(backend):
    model = adapted("nf4")
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x()), model(x()))
    grads = []
    for run in (model, compiled):
        model.zero_grad()
        run(x()).square().mean().backward()
        grads.append([p.grad.clone() for p in lora_parameters(model)])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


# ----------------------------------------------------------------------------------------- adapters


def test_adapters_go_on(tmp_path):
    model = adapted("nf4")
    expected = model(x())
    with disable_adapters(model):
        base = model(x())
    plain = copy.deepcopy(model)
    remove_lora(plain)
    assert torch.equal(plain(x()), base)
    assert isinstance(plain.up.weight, QuantizedTensor)
    save_adapter(model, tmp_path / "adapter.safetensors")
    other = adapted("nf4")
    for p in lora_parameters(other):
        p.data.zero_()
    load_adapter(other, tmp_path / "adapter.safetensors")
    assert torch.equal(other(x()), expected)
    assert warmup(model, rows=4) == 0


def test_several_adapters_and_mixed_rows():
    model = adapted("nf4")
    expected = model(x())
    add_adapter(model, "other", 2, init="random")
    set_adapter(model, "other")
    other = model(x())
    assert not torch.allclose(other, expected)
    with disable_adapters(model):
        base = model(x())
    names = ["default", "other", None, "default", None, "other", "other"]
    with adapter_rows(model, names):
        mixed = model(x())
    wanted = {"default": expected, "other": other, None: base}
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], wanted[name][row], rtol=1e-4, atol=1e-5)
    with adapter_rows(model, names):
        model(x()).square().mean().backward()
    assert model.up.adapters["other"].lora_A.grad is not None


def test_check_adapters_does_not_merge_them():
    model = adapted("nf4")
    weight = model.up.weight
    report = check_adapters(model, x())
    assert model.up.weight is weight
    assert report.ok
    assert len(report.adapters) == 2


@pytest.mark.parametrize("make", [llama, gpt2, bert])
def test_models_of_transformers(make):
    model = make().eval()
    ids = torch.randint(4, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        dense = model(ids).logits
    apply_lora(model, 4)
    report = quantize_base(model, "int8")
    assert report.layers
    logits = model(ids).logits
    assert (logits - dense).norm() / dense.norm() < 0.1
    logits.square().mean().backward()
    trained = [p for n, p in model.named_parameters() if n.endswith("lora_B")]
    assert all(p.grad is not None for p in trained)


def test_save_pretrained(tmp_path):
    """Transformers cannot write the weights: the adapter's files alone, which load again."""
    model = llama()
    apply_lora(model, 4, init="random")
    quantize_base(model, "int8")
    ids = torch.randint(4, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match="leaves to lora_kernels.save_quantized"):
        model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} >= {"config.json", "adapter_model.safetensors"}
    assert not (tmp_path / "model.safetensors").exists()
    with torch.no_grad():
        expected = model(ids).logits
        for parameter in lora_parameters(model):
            parameter.zero_()
        load_adapter(model, tmp_path)
        assert torch.equal(model(ids).logits, expected)
    plain = llama()
    quantize_base(plain, "int8", target_modules="all-linear")
    with pytest.raises(ValueError, match=r"save_quantized\(model, path\) writes them"):
        plain.save_pretrained(tmp_path / "plain")


def test_recipes():
    model = adapted("nf4")
    data = [(x(), torch.randint(SIZES["out"], (7,)))] * 4
    optimizer = torch.optim.AdamW(lora_parameters(model), 1e-2)
    weight = model.up.weight
    options = {"epochs": 5, "progress": False}
    history = train_model(model, data, F.cross_entropy, optimizer, **options)
    assert history.loss[-1] < history.loss[0]
    adjust_rank(model, 4, 2, data, F.cross_entropy, optimizer, progress=False)
    assert model.up.rank == 2
    assert model.up.weight is weight


# -------------------------------------------------------------------------------- a trained weight


NOT_TRAINED = "requires_grad: expected False of a quantised weight, got True: QuantizedWeight"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "train",
    [
        lambda model: model.up.weight.requires_grad_(True),
        lambda model: model.up.weight.requires_grad_(),
        lambda model: setattr(model.up.weight, "requires_grad", True),
        lambda model: model.up.requires_grad_(),
        lambda model: torch.optim.AdamW(model.requires_grad_(True).parameters()),
        lambda model: nn.Parameter(model.up.weight.detach()),
        lambda model: nn.Parameter(QuantizedTensor(model.up.weight.record, torch.float32)),
    ],
)
def test_a_quantised_weight_is_not_trained(kind, train):
    model = adapted(kind)
    with pytest.raises(ValueError, match=NOT_TRAINED):
        train(model)
    assert not model.up.weight.requires_grad
    model(x()).sum().backward()
    assert model.up.lora_A.grad is not None


def test_frozen_it_may_be_again():
    model = adapted("nf4")
    model.up.weight.requires_grad_(False)
    model.up.weight.requires_grad = False
    model.requires_grad_(False)
    nn.Parameter(model.up.weight.detach(), requires_grad=False)
    assert not copy.deepcopy(model).up.weight.requires_grad
    assert not any(p.requires_grad for p in model.parameters())


def test_an_optimizer_of_all_parameters_leaves_it_alone():
    model = adapted("nf4")
    before = [part.clone() for part in model.up.weight.record.parts]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5)
    model(x()).square().sum().backward()
    optimizer.step()
    assert model.up.weight.grad is None
    after = model.up.weight.record.parts
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
