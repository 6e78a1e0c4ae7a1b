"""What `inspect` shows of adapters on other layers than linear ones, and what else reads them."""

import re

import pytest
import tiny_models
import torch
import transformers
from transformers import AutoModelForCausalLM

from lora_kernels import apply_lora, lora_parameters, merge_lora, save_adapter
from lora_kernels.__main__ import main


def refuses(capsys, arguments, message):
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 1
    assert re.search(message, capsys.readouterr().err)


def save(model, folder, **options):
    """The model with adapters far from zero, in a folder."""
    apply_lora(model, 2, alpha=6, **options)
    torch.manual_seed(1)
    for parameter in lora_parameters(model):
        torch.nn.init.normal_(parameter, std=0.3)
    save_adapter(model, folder)
    return folder


def shown_norm(capsys, folder, layer):
    capsys.readouterr()
    assert main(["inspect", str(folder)]) == 0
    printed = capsys.readouterr().out
    line = re.search(rf"^{layer} +(.*)$", printed, re.M)[1]
    return float(line.split()[3]), printed


def test_inspect_of_embeddings_and_rows(base, text, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(base)
    names = {"target_modules": ["embed_tokens", "q_proj"]}
    folder = save(model, tmp_path / "table", **names)
    layer = model.model.embed_tokens
    norm, printed = shown_norm(capsys, folder, r"model\.embed_tokens")
    assert norm == pytest.approx((3 * layer.lora_B @ layer.lora_A).norm().item(), rel=1e-3)
    assert "embeddings: model.embed_tokens" in printed
    rows = save(
        AutoModelForCausalLM.from_pretrained(base), tmp_path / "rows",
        trainable_token_indices=[3, 5], modules_to_save=["norm"], use_dora=True,
    )  # fmt: skip
    _, printed = shown_norm(capsys, rows, r"model\.layers\.0\.mlp\.up_proj")
    assert "    model.embed_tokens.token_adapter.trainable_tokens_delta float32 [2, 32]" in printed
    assert "    model.norm.weight float32 [32]" in printed
    assert "DoRA: norms are those of scaling" in printed
    shared = ["evaluate", "--model", str(base), "--text", str(text), "--length", "32"]
    losses = set()
    for adapter in ([], ["--adapter", str(folder)], ["--adapter", str(rows)]):
        assert main([*shared, *adapter]) == 0
        losses.add(re.search(r"loss ([\d.]+)", capsys.readouterr().out)[1])
    assert len(losses) == 3
    out = tmp_path / "o.safetensors"
    for one, message in ((folder, r"model\.embed_tokens \(embedding\)"), (rows, "modules_to_save")):
        arguments = ["convert", one, out, "--to", "kohya", "--model", base]
        refuses(capsys, arguments, message + r".* which files of kohya cannot hold")


def test_inspect_of_convolutions(tmp_path, capsys):
    for groups in (1, 2):
        model = torch.nn.Sequential(
            torch.nn.Conv2d(4, 6, 3, groups=groups), torch.nn.Conv1d(6, 4, 1)
        )
        before = model[0].weight.clone()
        folder = save(model, tmp_path / f"net{groups}", target_modules=["0", "1"])
        norm, printed = shown_norm(capsys, folder, "0")
        merge_lora(model)
        update = model[0].weight - before
        assert norm == pytest.approx(update.norm().item(), rel=1e-3)
        assert "convolutions: 0, 1" in printed


def test_inspect_of_experts(tmp_path, capsys):
    kind, sizes = tiny_models.MIXTURES["mixtral"]
    config = getattr(transformers, kind)(**tiny_models.SMALL | sizes)
    model = AutoModelForCausalLM.from_config(config)
    folder = save(
        model, tmp_path / "out", target_modules=["q_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"], expert_rank=1,
    )  # fmt: skip
    _, printed = shown_norm(capsys, folder, r"model\.layers\.0\.self_attn\.q_proj")
    assert "experts: " in printed
    assert re.search(r"^    model\.layers\.0\.mlp\.experts\.\S*lora_A float32 \[4, ", printed, re.M)
    arguments = ["convert", folder, tmp_path / "o", "--to", "mlx"]
    refuses(capsys, arguments, r"adapters of experts \(target_parameters\): .* files of MLX cannot")
