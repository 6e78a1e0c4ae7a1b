"""Layers that code reads past: known from sources, skipped or refused; encoder layers of torch."""

import copy
import functools
import io

import pytest
import torch
import transformers
from tiny_models import MODELS, build
from torch import nn
from torch.nn.functional import linear

import lora_kernels as lk
from lora_kernels.bypass import bypassed, unregistered_linears


def names(model):
    found = bypassed(model)
    return {name for name, module in model.named_modules() if module in found}


def project(module, x):
    return linear(x, module.c.weight)


def passed_through(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


class Base(nn.Module):
    def __init__(self, pieces=1):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))
        self.rows = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.inner = nn.ModuleDict({"deep": nn.Linear(4, 4)})
        self.pieces, self.exact = pieces, True


class Direct(Base):
    def forward(self, x):
        return linear(self.a(x), self.b.weight, self.b.bias)


class ThroughAMethod(Base):
    @passed_through
    def forward(self, x):
        return self.project(x)

    def project(self, x):
        return self.a(x) @ self.b.weight.t()


class Inherited(ThroughAMethod):
    def forward(self, x):
        return super().forward(x)


class ByAnAlias(Base):
    def forward(self, x):
        layer, other = self.b, self.a
        return linear(other(x), layer.weight)


class ByTheWeight(Base):
    def forward(self, x):
        weight = self.b.weight
        return linear(x, weight)


class InAFunction(Base):
    def forward(self, x):
        return project(self, x)


class OfAList(Base):
    def forward(self, x):
        for _, layer in enumerate(self.rows):
            x = linear(x, layer.weight)
        return torch.cat([linear(x, layer.weight) for layer in self.rows])


class ByIndex(Base):
    def forward(self, x):
        return linear(x, self.inner["deep"].weight)


class ByAProperty(Base):
    @property
    def matrix(self):
        return self.b.weight

    def forward(self, x):
        return linear(x, self.matrix)


class Metadata(Base):
    def forward(self, x):
        dtype, weight = self.a.weight.dtype, self.b.weight
        if isinstance(self.b.weight, nn.Parameter) and self.c.weight is not None:
            x = x.to(dtype).to(weight.device).type_as(self.c.weight)
        assert self.rows[0].weight.shape[0] == weight.size(0)
        return self.a(self.b(x)) - self.a.bias

    def tie(self):
        self.b.weight = self.a.weight.clone()


class OnlyIfAsked(Base):
    """As Bloom: sliced products where the model was pretrained with tensor parallelism."""

    def forward(self, x):
        if self.pieces > 1 and self.exact:
            return linear(x, self.b.weight[:, :4])
        return self.b(x) if self.pieces <= 1 else linear(x, self.a.weight)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Direct(), {"b"}),
        (ThroughAMethod(), {"b"}),
        (Inherited(), {"b"}),
        (ByAnAlias(), {"b"}),
        (ByTheWeight(), {"b"}),
        (InAFunction(), {"c"}),
        (OfAList(), {"rows.0", "rows.1"}),
        (ByIndex(), {"inner.deep"}),
        (ByAProperty(), {"b"}),
        (Metadata(), set()),
        (OnlyIfAsked(), set()),
        (OnlyIfAsked(pieces=2), {"a", "b"}),
        (nn.Sequential(nn.MultiheadAttention(4, 2), Base()), {"0.out_proj"}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_sources_say_is_read_past(model, expected):
    assert names(model) == expected


def test_a_forward_put_on_the_instance_is_read_instead_of_the_class():
    model = Direct()

    def forward(self, x):
        return linear(x, self.c.weight)

    model.forward = forward.__get__(model)
    assert names(model) == {"c"}


@pytest.mark.parametrize("name", MODELS)
def test_ordinary_models_have_none(name):
    assert not names(build(name))


def test_a_default_target_is_skipped_and_a_named_one_refused():
    model = Direct()
    report = lk.apply_lora(model, 2)
    assert report.skipped == {"b": "Direct.forward reads its weight past the layer"}
    assert "b" not in report.replaced
    assert "skipped b: Direct.forward" in str(report)
    model = Direct()
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=r"on b would .* Direct\.forward .*exclude_modules"):
        lk.apply_lora(model, 2, target_modules=["a", "b"])
    assert dict(model.named_modules()) == before
    assert all(p.requires_grad for p in model.parameters())
    assert lk.apply_lora(model, 2, target_modules=["a", "b"], exclude_modules=["b"]).replaced == [
        "a"
    ]


def test_attention_of_wavlm_and_projections_of_mamba_are_left_out():
    config = transformers.WavLMConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        conv_dim=(8,), conv_kernel=(10,), conv_stride=(5,), num_feat_extract_layers=1,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    skipped = lk.apply_lora(transformers.WavLMModel(config), 2).skipped
    assert {n.split(".")[-1] for n in skipped} == {"q_proj", "k_proj", "v_proj", "out_proj"}
    config = transformers.MambaConfig(
        vocab_size=16, hidden_size=8, state_size=4, num_hidden_layers=1
    )
    report = lk.apply_lora(transformers.MambaModel(config), 2)
    assert {n.split(".")[-1] for n in report.skipped} == {"x_proj", "dt_proj", "out_proj"}
    assert report.replaced == ["layers.0.mixer.in_proj"]


def test_a_file_for_a_layer_that_is_read_past_is_loaded_with_a_warning(tmp_path):
    plain = nn.Module()
    plain.b = nn.Linear(4, 4)
    lk.apply_lora(plain, 2)
    lk.save_adapter(plain, tmp_path)
    with pytest.warns(UserWarning, match=r"adapters on b .*Direct\.forward reads its weight past"):
        lk.load_adapter(Direct(), tmp_path)


def test_layers_of_a_plain_list_are_named():
    model = nn.Sequential(nn.Linear(4, 4))
    model.hidden = [nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4))]
    model.by_name = {"x": nn.Linear(4, 4)}
    assert unregistered_linears(model) == ["hidden.0", "hidden.1.0", "by_name.x"]
    report = lk.apply_lora(model, 2)
    assert report.unregistered == ["hidden.0", "hidden.1.0", "by_name.x"]
    assert "plain list" in str(report)
    assert "by_name.x" in str(report)


# ----------------------------------------------------------------------- torch's encoder layers


def encoder(**options):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2).eval()


@torch.no_grad()
def fill(model):
    for parameter in lk.lora_parameters(model):
        parameter.normal_(std=0.3)


def with_gradients(model, x, **options):
    """What the model computes one layer at a time, which gradients force."""
    return model(x.clone().requires_grad_(), **options).detach()


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("padded", [False, True])
def test_encoder_layers_compute_their_adapters_in_eval(activation, padded):
    model, x = encoder(activation=activation), torch.randn(2, 3, 8)
    mask = torch.tensor([[False, False, False], [False, False, True]])
    options = {"src_key_padding_mask": mask} if padded else {}
    seen = mask.logical_not() if padded else torch.ones(2, 3, dtype=torch.bool)
    with torch.no_grad():
        base = model(x, **options)
    lk.apply_lora(model, 2)
    fill(model)
    expected = model.train()(x, **options)
    model.eval()
    with torch.inference_mode():
        torch.testing.assert_close(model(x, **options)[seen], expected[seen])
        with lk.disable_adapters(model):
            torch.testing.assert_close(model(x, **options)[seen], base[seen])
        lk.merge_lora(model)
        torch.testing.assert_close(model(x, **options)[seen], expected[seen])
        lk.unmerge_lora(model)
    assert (expected - base)[seen].abs().max() > 0.1


def kernel_calls(model, x):
    with torch.no_grad(), torch.profiler.profile() as profile:
        model(x)
    return sum("_transformer_encoder_layer_fwd" in event.name for event in profile.events())


def test_encoder_layers_get_their_fast_path_back():
    model, x = encoder(), torch.randn(2, 3, 8)
    assert kernel_calls(model, x) == 2
    lk.apply_lora(model, 2, target_modules=["layers.1.linear1"])
    assert kernel_calls(model, x) == 1  # only the layer that holds it pays
    lk.remove_lora(model)
    assert kernel_calls(model, x) == 2
    assert model.use_nested_tensor is True
    assert [layer.activation_relu_or_gelu for layer in model.layers] == [1, 1]
    assert not [key for key in vars(model.layers[1]) if key.startswith("_lora")]


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "by hand"])
def test_copies_and_layers_put_in_by_hand_leave_the_fast_path(way):
    model, x = encoder(), torch.randn(2, 3, 8)
    if way == "by hand":
        layer = model.layers[0]
        layer.linear2 = lk.FusedLoRALinear.from_linear(layer.linear2, 2)
    else:
        lk.apply_lora(model, 2)
    fill(model)
    if way == "deepcopy":
        model = copy.deepcopy(model)
    elif way == "pickle":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        model = torch.load(file, weights_only=False)
    with torch.no_grad():
        in_eval = model(x)
    torch.testing.assert_close(in_eval, with_gradients(model, x))
