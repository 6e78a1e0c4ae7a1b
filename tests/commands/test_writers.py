"""Adapters written in every format and read back, and what a format cannot hold."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lora_kernels import apply_lora, load_adapter, lora_parameters, save_adapter
from lora_kernels.__main__ import main
from lora_kernels.gguf_adapters import permute, unpermute


def make(base, folder, **options):
    model = AutoModelForCausalLM.from_pretrained(base)
    apply_lora(model, 3, **{"alpha": 5, **options})
    torch.manual_seed(1)
    for parameter in lora_parameters(model):
        torch.nn.init.normal_(parameter, std=0.3)
    save_adapter(model, folder)
    return folder


def logits(base, adapter):
    model = AutoModelForCausalLM.from_pretrained(base)
    load_adapter(model, adapter)
    with torch.no_grad():
        return model.eval()(torch.arange(1, 30)[None]).logits


def convert(source, out, form, base, *options):
    return main(["convert", str(source), str(out), "--to", form, "--model", str(base), *options])


def refused(capsys, message, *arguments):
    capsys.readouterr()
    assert convert(*arguments) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not arguments[1].exists()


FILES = {"peft": "out", "mlx": "out", "diffusers": "out", "kohya": "out.safetensors",
         "gguf": "out.gguf"}  # fmt: skip
PATTERNS = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 7}}
HELD = {
    "plain": ({}, list(FILES)),
    "rsLoRA": ({"use_rslora": True}, list(FILES)),
    "patterns": (PATTERNS, ["peft", "diffusers", "kohya"]),
    "DoRA": ({"use_dora": True}, ["peft", "mlx"]),
}


@pytest.mark.parametrize(
    ("what", "form"), [(what, form) for what, (_, forms) in HELD.items() for form in forms]
)
def test_there_and_back_it_computes_the_same(base, tmp_path, what, form):
    if form == "gguf":
        pytest.importorskip("gguf", reason="needs gguf")
    source = make(base, tmp_path / "source", **HELD[what][0])
    out, back = tmp_path / FILES[form], tmp_path / "back"
    component = ["--component", "text_encoder"]
    assert convert(source, out, form, base, *component) == 0
    assert convert(out, back, "peft", base) == 0
    right = logits(base, source)
    torch.testing.assert_close(logits(base, back), right, rtol=1e-4, atol=1e-4)
    if form not in ("gguf",):  # which load_adapter does not read itself
        torch.testing.assert_close(logits(base, out), right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("form", "options", "message"),
    [
        ("mlx", PATTERNS, r"rank: .* has 3 and .* has 2 \(rank_pattern"),
        ("gguf", PATTERNS, r"convert: alpha: .* has 5 and .* has 7 \(rank_pattern"),
        ("diffusers", {"use_dora": True}, r"DoRA \(use_dora\).* Diffusers cannot hold"),
        ("kohya", {"use_dora": True}, r"DoRA \(use_dora\).* kohya cannot hold"),
        ("gguf", {"use_dora": True}, r"DoRA \(use_dora\).* GGUF cannot hold"),
        ("mlx", {"modules_to_save": ["norm"]}, "modules_to_save: model.norm, which files of MLX"),
        (
            "kohya",
            {"modules_to_save": ["norm"]},
            "modules_to_save: model.norm, which files of kohya",
        ),
    ],
)
def test_what_a_format_cannot_hold_is_named(base, tmp_path, capsys, form, options, message):
    if form == "gguf":
        pytest.importorskip("gguf", reason="needs gguf")
    source = make(base, tmp_path / "source", **options)
    refused(capsys, message, source, tmp_path / FILES[form], form, base)


def test_a_bias_of_peft_is_named(base, tmp_path, capsys):
    source = make(base, tmp_path / "source")
    weights = source / "adapter_model.safetensors"
    bias = {"base_model.model.model.layers.0.self_attn.q_proj.bias": torch.ones(32)}
    save_file(load_file(weights) | bias, weights)
    message = r"tensors beside the adapter: .*q_proj\.bias, which files of kohya cannot hold"
    refused(capsys, message, source, tmp_path / "o.safetensors", "kohya", base)


def test_names_of_the_files(base, tmp_path):
    source = make(base, tmp_path / "source")
    for form in ("mlx", "diffusers", "kohya"):
        assert convert(source, tmp_path / form / FILES[form], form, base) == 0
    mlx = load_file(tmp_path / "mlx" / "out" / "adapters.safetensors")
    assert mlx["model.layers.0.self_attn.q_proj.lora_a"].shape == (32, 3)
    config = json.loads((tmp_path / "mlx" / "out" / "adapter_config.json").read_text())
    assert config["lora_parameters"]["scale"] == pytest.approx(5 / 3)
    assert "self_attn.q_proj" in config["lora_parameters"]["keys"]
    kohya = load_file(tmp_path / "kohya" / "out.safetensors")
    assert kohya["lora_unet_model_layers_0_mlp_up_proj.alpha"] == 5
    assert kohya["lora_unet_model_layers_0_mlp_up_proj.lora_up.weight"].shape == (64, 3)
    diffusers = load_file(tmp_path / "diffusers" / "out" / "pytorch_lora_weights.safetensors")
    assert "unet.model.layers.1.mlp.down_proj.lora_A.weight" in diffusers


def test_a_gguf_file_is_as_llama_cpp_reads_it(base, tmp_path):
    gguf = pytest.importorskip("gguf", reason="needs gguf")
    source, out = make(base, tmp_path / "source"), tmp_path / "adapter.gguf"
    assert convert(source, out, "gguf", base) == 0
    reader = gguf.GGUFReader(out)
    for key, value in {
        "general.type": "adapter", "adapter.type": "lora", "general.architecture": "llama",
        "adapter.lora.alpha": 5.0,
    }.items():  # fmt: skip
        assert reader.get_field(key).contents() == value
    tensors = {one.name: torch.tensor(one.data) for one in reader.tensors}
    assert len(tensors) == 28
    stored = load_file(source / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.1"
    down = stored[f"{prefix}.mlp.down_proj.lora_A.weight"]
    assert torch.equal(tensors["blk.1.ffn_down.weight.lora_a"], down)
    key = stored[f"{prefix}.self_attn.k_proj.lora_B.weight"]
    assert torch.equal(tensors["blk.1.attn_k.weight.lora_b"], permute(key, 2))
    assert torch.equal(unpermute(permute(key, 2), 2), key)


def test_permuted_rows_give_adjacent_pairs_what_halves_had():
    """Queries and keys of one head, rotated as Transformers does and as llama.cpp does."""
    torch.manual_seed(0)
    heads, width = 3, 8
    query, key = torch.randn(2, heads * width, 5, dtype=torch.float64)
    angles = torch.rand(width // 2, 2, dtype=torch.float64)

    def halves(x, angle):
        one, other = x.view(heads, 2, width // 2, 5).unbind(1)
        c, s = angle.cos()[:, None], angle.sin()[:, None]
        return torch.cat([one * c - other * s, other * c + one * s], 1)

    def pairs(x, angle):
        one, other = x.view(heads, width // 2, 2, 5).unbind(2)
        c, s = angle.cos()[:, None], angle.sin()[:, None]
        return torch.stack([one * c - other * s, other * c + one * s], 2).view(heads, width, 5)

    theirs = [halves(x, angle) for x, angle in zip((query, key), angles.T, strict=True)]
    ours = [
        pairs(permute(x, heads), angle) for x, angle in zip((query, key), angles.T, strict=True)
    ]
    scores = [q.mT @ k for q, k in (theirs, ours)]
    torch.testing.assert_close(scores[1], scores[0])


def test_damaged_and_foreign_gguf_files(base, tmp_path, capsys):
    gguf = pytest.importorskip("gguf", reason="needs gguf")
    source, out = make(base, tmp_path / "source"), tmp_path / "adapter.gguf"
    assert convert(source, out, "gguf", base) == 0
    (tmp_path / "short.gguf").write_bytes(out.read_bytes()[:100])
    for name, message in (("short.gguf", "damaged, or not a GGUF file"), ("none.gguf", "no such")):
        refused(capsys, message, tmp_path / name, tmp_path / "back", "peft", base)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_type(gguf.GGUFType.MODEL)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    message = "general.type: got 'model', legal is 'adapter'"
    refused(capsys, message, tmp_path / "model.gguf", tmp_path / "back", "peft", base)


def test_what_convert_refuses(base, tmp_path, capsys):
    source = make(base, tmp_path / "source")
    kohya = tmp_path / "a.safetensors"
    assert convert(source, kohya, "kohya", base) == 0
    refused(capsys, r"out: .* ends in \.safetensors", source, tmp_path / "folder", "kohya", base)
    capsys.readouterr()
    assert main(["convert", str(kohya), str(tmp_path / "o"), "--to", "peft"]) == 1
    assert "--model: is needed" in capsys.readouterr().err
