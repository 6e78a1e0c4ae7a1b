"""Adapters as other programs write them, and what of a file is not loaded."""

import json
import warnings

import fuzz_files
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_kernels import apply_lora, load_adapter, lora_parameters, save_adapter

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
P = "base_model.model."


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q, self.to_out = nn.Linear(6, 8), nn.ModuleList([nn.Linear(8, 6)])

    def forward(self, x):
        return self.to_out[0](self.to_q(x))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.attn, self.norm = Block(), nn.LayerNorm(6)

    def forward(self, x):
        return self.attn(self.norm(x))


X = torch.randn(3, 6, generator=torch.Generator().manual_seed(3))
NAMES = ("attn.to_q", "attn.to_out.0")


def factors(rank=2):
    generator = torch.Generator().manual_seed(4)
    model = Model()
    shapes = {name: model.get_submodule(name).weight.shape for name in NAMES}
    return {
        name: (torch.randn(rank, K, generator=generator), torch.randn(N, rank, generator=generator))
        for name, (N, K) in shapes.items()
    }


def expected(pairs, scaling):
    model = Model()
    for name, (A, B) in pairs.items():
        model.get_submodule(name).weight.data += scaling * B @ A
    return model(X)


def assert_loads(path, pairs, scaling, **options):
    model = Model()
    load_adapter(model, path, **options)
    torch.testing.assert_close(model(X), expected(pairs, scaling), rtol=1e-5, atol=1e-5)
    assert {id(p) for p in model.parameters() if p.requires_grad} == set(
        map(id, lora_parameters(model))
    )


def write_peft(folder, tensors=None, **entries):
    """PEFT's two files, with changed entries and tensors."""
    pairs = factors()
    stored = {
        f"{P}{name}.lora_{part}.weight": tensor
        for name, pair in pairs.items()
        for part, tensor in zip("AB", pair, strict=True)
    }
    folder.mkdir(exist_ok=True)
    save_file(stored | (tensors or {}), folder / WEIGHTS)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["to_q", "0"]}
    (folder / CONFIG).write_text(json.dumps(config | entries))
    return pairs


def test_a_pickled_file_and_shards(tmp_path):
    pairs = write_peft(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    (tmp_path / WEIGHTS).unlink()
    torch.save(tensors, tmp_path / "adapter_model.bin")
    assert_loads(tmp_path, pairs, 1.5, strict=True)
    torch.save({"a": print}, tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model.bin: truncated or not a file of tensors"):
        load_adapter(Model(), tmp_path)
    (tmp_path / "adapter_model.bin").unlink()
    where = {}
    for number, key in enumerate(tensors, 1):
        where[key] = f"adapter_model-{number:05}-of-{len(tensors):05}.safetensors"
        save_file({key: tensors[key]}, tmp_path / where[key])
    index = tmp_path / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    assert_loads(tmp_path, pairs, 1.5, strict=True)
    index.write_text(json.dumps({"weight_map": where | {"x": "../elsewhere"}}))
    with pytest.raises(ValueError, match=r"index.json: weight_map: expected file names"):
        load_adapter(Model(), tmp_path)


def test_kohya_s_names_and_alphas(tmp_path):
    pairs, path = factors(), tmp_path / "kohya.safetensors"
    tensors = {}
    for name, (A, B) in pairs.items():
        flat = f"lora_unet_{name.replace('.', '_')}"
        tensors |= {f"{flat}.lora_down.weight": A, f"{flat}.lora_up.weight": B}
        tensors[f"{flat}.alpha"] = torch.tensor(1.0)
    other = {"lora_te_text_q.lora_down.weight": torch.ones(2, 6)}
    save_file(tensors, path)
    assert_loads(path, pairs, 0.5, strict=True)
    save_file(tensors | other, path)
    with pytest.warns(UserWarning, match="lora_te: another model's part"):
        assert_loads(path, pairs, 0.5)
    with pytest.raises(ValueError, match=r"strict: .*lora_te"):
        load_adapter(Model(), path, strict=True)
    save_file(tensors | {"lora_unet_attn_to_k.lora_down.weight": torch.ones(2, 6)}, path)
    with pytest.raises(ValueError, match=r"kohya.safetensors: lora_unet_attn_to_k.*no module"):
        load_adapter(Model(), path)


@pytest.mark.parametrize("halves", [
    (".lora_A.weight", ".lora_B.weight"), (".lora.down.weight", ".lora.up.weight"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
])  # fmt: skip
def test_diffusers_names(tmp_path, halves):
    pairs = factors()
    tensors = {
        f"unet.{name}{half}": tensor
        for name, pair in pairs.items()
        for half, tensor in zip(halves, pair, strict=True)
    }
    path = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(tensors, path)
    assert_loads(tmp_path, pairs, 1, strict=True)
    described = {"unet.r": 2, "unet.lora_alpha": 6, "unet.target_modules": ["to_q", "to_out.0"]}
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps(described)})
    assert_loads(tmp_path, pairs, 3, strict=True)


def test_names_of_attention_processors(tmp_path):
    pairs, path = factors(), tmp_path / "pytorch_lora_weights.safetensors"
    tensors = {}
    for name, (A, B) in pairs.items():
        old = f"unet.attn.processor.{name.split('.')[1]}_lora"
        tensors |= {f"{old}.down.weight": A, f"{old}.up.weight": B}
    save_file(tensors, path)
    assert_loads(path, pairs, 1, strict=True)


@pytest.mark.parametrize("present", [False, True])
def test_the_dropout_of_a_file_is_set(tmp_path, present):
    write_peft(tmp_path, lora_dropout=0.25)
    model = Model()
    if present:
        apply_lora(model, 2)
    load_adapter(model, tmp_path)
    assert model.attn.to_q.dropout == 0.25


def test_mlx(tmp_path):
    pairs = factors()
    tensors = {f"{n}.lora_a": A.mT.contiguous() for n, (A, _) in pairs.items()}
    tensors |= {f"{n}.lora_b": B.mT.contiguous() for n, (_, B) in pairs.items()}
    save_file(tensors, tmp_path / "adapters.safetensors")
    options = {"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 20.0}}
    (tmp_path / CONFIG).write_text(json.dumps(options))
    assert_loads(tmp_path, pairs, 20, strict=True)
    (tmp_path / CONFIG).write_text(json.dumps(options | {"fine_tune_type": "full"}))
    with pytest.raises(ValueError, match="fine_tune_type = 'full' is not supported"):
        load_adapter(Model(), tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps(options | {"fine_tune_type": "dora"}))
    with pytest.raises(ValueError, match="lora_magnitude_vector: missing"):
        load_adapter(Model(), tmp_path)
    lengths = {name: torch.rand(B.shape[0]) for name, (_, B) in pairs.items()}
    save_file(
        tensors | {f"{n}.m": m for n, m in lengths.items()}, tmp_path / "adapters.safetensors"
    )
    model = Model()
    load_adapter(model, tmp_path, strict=True)
    for name, length in lengths.items():
        layer = model.get_submodule(name)
        assert torch.equal(layer.lora_magnitude, length)
        assert layer.scaling == 20


@pytest.mark.parametrize(("entries", "message"), [
    ({"use_later_variant": True}, "does not know: use_later_variant = True"),
    ({"target_parameters": ["norm.weight"]}, "'norm.weight' is not the weight of a linear layer"),
    ({"modules_to_save": ["norm"]}, "modules_to_save: 'norm' is not in the file"),
])  # fmt: skip
def test_what_is_not_loaded_is_said_and_refused_if_strict(tmp_path, entries, message):
    pairs = write_peft(tmp_path, **entries)
    with pytest.warns(UserWarning, match=message):
        assert_loads(tmp_path, pairs, 1.5)
    model = Model()
    with pytest.raises(ValueError, match=f"strict: .*{message}"):
        load_adapter(model, tmp_path, strict=True)
    assert not list(lora_parameters(model))


@pytest.mark.parametrize("wanted", ["all-linear", r".*(to_q|\.0)", ["to_q", "attn.to_out.0"]])
def test_missing_layers_are_named(tmp_path, wanted):
    pairs = write_peft(tmp_path, target_modules=wanted)
    tensors = load_file(tmp_path / WEIGHTS)
    save_file({k: t for k, t in tensors.items() if "to_q" in k}, tmp_path / WEIGHTS)
    with pytest.warns(UserWarning, match="attn.to_out.*targets of the config, not in the file"):
        assert_loads(tmp_path, {"attn.to_q": pairs["attn.to_q"]}, 1.5)
    elsewhere = {"target_modules": ["to_q"]} if wanted == "all-linear" else None
    if elsewhere:
        config = json.loads((tmp_path / CONFIG).read_text()) | elsewhere
        (tmp_path / CONFIG).write_text(json.dumps(config))
        load_adapter(Model(), tmp_path, strict=True)


def test_stored_weights_of_the_base_are_compared_and_stay_frozen(tmp_path):
    weight, scale = Model().attn.to_q.weight.detach(), Model().norm.weight.detach()
    base, norm = f"{P}attn.to_q.base_layer.weight", f"{P}norm.weight"
    pairs = write_peft(tmp_path, {base: weight.clone(), norm: scale.bfloat16()})
    assert_loads(tmp_path, pairs, 1.5, strict=True)
    for key, tensor, message in (
        (base, weight + 1, "differs from the model's attn.to_q.weight"),
        (norm, scale + 1, "differs from the model's norm.weight"),
        (base, torch.ones(9, 6), "was its vocabulary resized"),
        (norm, torch.ones(6, dtype=torch.int8), "has dtype torch.int8"),
    ):
        write_peft(tmp_path, {key: tensor})
        with pytest.raises(ValueError, match=f"{key}: .*{message}"):
            load_adapter(Model(), tmp_path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_factors_that_are_no_floats_are_named(tmp_path, dtype):
    write_peft(tmp_path, {f"{P}attn.to_q.lora_A.weight": torch.ones(2, 6).to(dtype)})
    with pytest.raises(ValueError, match=r"adapter_model.*to_q.lora_A.weight: has dtype"):
        load_adapter(Model(), tmp_path)


def test_an_adapter_that_is_zero_and_has_no_place(tmp_path):
    idle = {f"{P}norm.lora_A.weight": torch.ones(2, 6), f"{P}norm.lora_B.weight": torch.zeros(6, 2)}
    pairs = write_peft(tmp_path, idle)
    with pytest.warns(UserWarning, match="norm: is no linear layer; its adapter has no effect"):
        assert_loads(tmp_path, pairs, 1.5)
    model = Model()
    apply_lora(model, 2, target_modules=["to_q"])
    zero = torch.zeros(6, 2)
    write_peft(tmp_path, {f"{P}attn.to_out.0.lora_B.weight": zero}, target_modules=["to_q"])
    with pytest.warns(UserWarning, match=r"attn.to_out.0: its adapter is zero"):
        load_adapter(model, tmp_path)
    torch.testing.assert_close(model(X), expected({"attn.to_q": pairs["attn.to_q"]}, 1.5))


def test_attention_s_own_projection_is_left_out_as_peft_leaves_it(tmp_path):
    class Tower(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn, self.to_q = nn.MultiheadAttention(6, 2), nn.Linear(6, 8)

    out = {f"{P}attn.out_proj.lora_A.weight": torch.ones(2, 6),
           f"{P}attn.out_proj.lora_B.weight": torch.ones(6, 2)}  # fmt: skip
    write_peft(tmp_path, out)
    tensors = load_file(tmp_path / WEIGHTS)
    kept = {k.replace("attn.to_q", "to_q"): t for k, t in tensors.items() if ".0." not in k}
    save_file(kept, tmp_path / WEIGHTS)
    model = Tower()
    with pytest.warns(UserWarning, match=r"attn.out_proj: .* its adapter has no effect"):
        load_adapter(model, tmp_path)
    assert type(model.attn.out_proj) is type(Tower().attn.out_proj)


def test_flipped_bits_of_values_are_noticed(tmp_path):
    model = Model()
    apply_lora(model, 2)
    save_adapter(model, tmp_path)
    data = bytearray((tmp_path / WEIGHTS).read_bytes())
    data[-3] ^= 1
    (tmp_path / WEIGHTS).write_bytes(data)
    with pytest.raises(ValueError, match=r"adapter_model.*their digest differs"):
        load_adapter(Model(), tmp_path)


@pytest.mark.parametrize("seed", [0, 1])
def test_damaged_files(seed):
    """A sample; `python tests/fuzz_files.py --kind adapter --count 20000` is the long form."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outcomes = fuzz_files.fuzz("adapter", count=100, seed=seed)
    assert not outcomes["wrong"]
    assert outcomes["refused"] > 50
    assert outcomes["as before"] > 5
