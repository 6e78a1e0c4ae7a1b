"""The commands once each on a small model, and what they refuse."""

import csv
import json
import math
import re
import subprocess
import sys
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lora_kernels import apply_lora, load_adapter, lora_parameters, save_adapter
from lora_kernels.__main__ import main
from lora_kernels.commands import loading
from lora_kernels.recipes.callbacks import CSV

SMALL = ["--rank", "4", "--length", "32", "--batch-size", "8", "--max-steps", "12", "--lr", "1e-2",
         "--eval-every", "6", "--no-progress", "--device", "cpu"]  # fmt: skip


def finetune(base, text, out, *options):
    return main(["finetune", "--model", str(base), "--text", str(text), "--out", str(out), *SMALL,
                 *options])  # fmt: skip


def refused(capsys, arguments, message):
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 1
    assert re.search(message, capsys.readouterr().err)


@pytest.fixture(scope="module")
def tuned(base, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    assert finetune(base, text, out) == 0
    return out


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """One that is far from zero."""
    model = AutoModelForCausalLM.from_pretrained(base)
    apply_lora(model, 3, alpha=5)
    torch.manual_seed(1)
    for parameter in lora_parameters(model):
        torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(model, folder)
    return folder


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(1, 30)[None]).logits


def test_finetune_learns_and_leaves_what_it_says(tuned, base):
    run = json.loads((tuned / "run.json").read_text())
    assert run["loss_after"] < run["loss_before"]
    assert run["options"]["rank"] == 4
    assert {"torch", "transformers", "lora_kernels"} <= run["versions"].keys()
    with open(tuned / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in rows] == run["history"]["loss"]
    assert (tuned / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (tuned / "tokenizer.json").exists()
    model = AutoModelForCausalLM.from_pretrained(base)
    plain = logits(model)
    load_adapter(model, tuned)
    assert not torch.allclose(logits(model), plain, atol=1e-3)


def test_evaluate_gives_the_losses_of_the_run(tuned, base, text, tmp_path, capsys):
    """Of the same held-out file, with the adapter and without."""
    held = tmp_path / "held.txt"
    held.write_text(text.read_text()[:3000])
    shared = ["--model", str(base), "--text", str(held), "--length", "32"]
    assert main(["evaluate", *shared]) == 0
    assert main(["evaluate", *shared, "--adapter", str(tuned)]) == 0
    losses = re.findall(
        r"loss ([\d.]+), perplexity ([\d.]+), (\d+) tokens", capsys.readouterr().out
    )
    (before, p, count), (after, _, same) = losses
    assert float(after) < float(before)
    assert count == same
    assert float(p) == pytest.approx(math.exp(float(before)), rel=1e-3)


def test_a_resumed_run_ends_as_one_that_was_never_interrupted(
    base, text, tuned, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "out"
    arguments = ["finetune", "--model", str(base), "--text", str(text), "--out", str(out), *SMALL]

    class Killed(BaseException):
        pass

    def stop(self, run):
        if len(run.history) == 9:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(CSV, "on_step", stop)
        with pytest.raises(Killed):
            main([*arguments, "--checkpoint-every", "4"])
    assert not (out / "adapter_model.safetensors").exists()
    refused(capsys, arguments, "--out: .* holds a run; give another folder, or --resume")
    refused(capsys, [*arguments, "--resume", "--seed", "5"], "--seed: got 5, but the run .* has 0")
    assert main(["finetune", "--out", str(out), "--resume"]) == 0
    ours, theirs = (load_file(p / "adapter_model.safetensors") for p in (out, tuned))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    ours, theirs = (json.loads((p / "run.json").read_text())["history"] for p in (out, tuned))
    assert all(ours[key] == theirs[key] for key in ("loss", "grad_norm", "evaluations"))


def test_finetune_on_jsonl_with_a_quantised_base(base, documents, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    lines = [{"prompt": d[:40], "completion": d[40:90]} for d in documents]
    data.write_text("\n".join(map(json.dumps, lines)))
    out = tmp_path / "out"
    arguments = ["finetune", "--model", str(base), "--data", str(data), "--out", str(out), *SMALL]
    assert main([*arguments, "--quantize", "nf4", "--target", "q_proj", "v_proj", "--rslora",
                 "--patience", "1", "--max-steps", "2", "--eval-every", "1"]) == 0  # fmt: skip
    printed = capsys.readouterr().out
    assert "nf4 on 4 layers" in printed
    assert "quantize_base(model, 'nf4')" in printed
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["use_rslora"]


@pytest.mark.parametrize("texts", [["a b c d e f"], ["a b c d e f", "g h i j k l"]])
def test_it_is_said_where_documents_of_a_row_see_each_other(
    base, texts, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(loading, "separates", lambda model: False)
    paths = []
    for text in texts:
        paths.append(tmp_path / f"{len(paths)}.txt")
        paths[-1].write_text(text)
    arguments = ["finetune", "--model", base, "--out", tmp_path / "out", *SMALL, "--holdout", "0"]
    arguments += ["--max-steps", "1", "--text", *paths]
    assert main([str(a) for a in arguments]) == 0
    said = "does not tell the documents of a row apart" in capsys.readouterr().out
    assert said == (len(texts) > 1)


def test_documents_of_a_row_do_not_see_each_other(base):
    assert loading.separates(loading.model(str(base), "auto", "cpu"))


def test_what_finetune_refuses(base, text, tuned, tmp_path, capsys):
    out = tmp_path / "out"
    start = ["finetune", "--out", out]
    given = [*start, "--model", base, "--text", text]
    refused(capsys, start, "--model: is missing")
    refused(capsys, [*start, "--model", base], "--text, --data: one of them is needed")
    refused(capsys, [*start, "--resume"], r"--resume: .*checkpoint\.pt: no such file")
    refused(capsys, [*given, "--holdout", "0.7"], "--holdout: got 0.7, legal is a share")
    refused(capsys, [*given, "--holdout", "0", "--patience", "2"], "--patience 2: needs held-out")
    refused(capsys, [*given, "--target", "nope"], "nope")
    refused(capsys, [*start, "--model", base, "--text", tmp_path / "none.txt"], "none.txt")
    refused(capsys, [*start, "--model", tmp_path / "none", "--text", text], "none")
    with pytest.raises(SystemExit):
        main([*map(str, given), "--rank", "0"])
    assert "got '0', legal is an integer of at least 1" in capsys.readouterr().err
    assert not out.exists()


def test_merge(base, adapter, tmp_path, capsys):
    out = tmp_path / "merged"
    arguments = ["merge", "--model", base, "--adapter", adapter, "--out", out, "--device", "cpu"]
    assert main([*map(str, arguments)]) == 0
    assert "100% of the likeliest tokens are the same" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(base)
    plain = logits(model)
    load_adapter(model, adapter)
    merged = logits(AutoModelForCausalLM.from_pretrained(out))
    torch.testing.assert_close(merged, logits(model), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(merged, plain, atol=1e-2)
    assert (out / "tokenizer.json").exists()
    refused(capsys, arguments, "--out: .* is not empty")
    arguments = ["merge", "--model", base, "--adapter", tmp_path / "none", "--out", tmp_path / "o"]
    refused(capsys, arguments, "--adapter: .*: no such")


def test_inspect(adapter, base, tmp_path, capsys):
    picture = tmp_path / "adapter.png"
    assert main(["inspect", str(adapter), "--plot", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    stored = load_file(adapter / "adapter_model.safetensors")
    key = "base_model.model.model.layers.1.mlp.up_proj.lora_{}.weight"
    update = 5 / 3 * stored[key.format("B")].double() @ stored[key.format("A")].double()
    values = torch.linalg.svdvals(update)
    shares = values[:3] / values[:3].sum()
    (line,) = re.findall(r"^model\.layers\.1\.mlp\.up_proj +(.*)$", printed, re.M)
    rank, alpha, scaling, norm, first, _, effective = line.split()
    assert (rank, alpha, scaling) == ("3", "5", "1.667")
    assert float(norm) == pytest.approx(float(update.norm()), rel=1e-3)
    assert first == f"{float(values[0] ** 2 / values.square().sum()):.0%}"
    assert float(effective) == pytest.approx(float((-shares * shares.log()).sum().exp()), abs=0.06)
    assert re.search(r"^up_proj +2 ", printed, re.M)
    assert "untrained" not in printed


def test_inspect_sees_what_was_never_trained(base, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(base)
    apply_lora(model, 2, target_modules=["q_proj"])
    save_adapter(model, tmp_path / "new")
    assert main(["inspect", str(tmp_path / "new")]) == 0
    assert "untrained: B is zero in every layer" in capsys.readouterr().out
    next(lora for name, lora in model.named_parameters() if "lora_B" in name).data.fill_(1)
    save_adapter(model, tmp_path / "half")
    assert main(["inspect", str(tmp_path / "half")]) == 0
    assert "untrained, B is zero in 1 layers: model.layers.1." in capsys.readouterr().out
    refused(capsys, ["inspect", tmp_path / "none"], "none: no such file")
    weights = tmp_path / "half" / "adapter_model.safetensors"
    save_file({k: t * math.inf for k, t in load_file(weights).items()}, weights)
    refused(
        capsys,
        ["inspect", tmp_path / "half"],
        r"q_proj\.lora_[AB]\.weight: holds non-finite values",
    )


def test_as_a_program(adapter):
    done = subprocess.run(
        [sys.executable, "-m", "lora_kernels", "inspect", str(adapter)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "14 layers" in done.stdout


def test_a_missing_package_is_named(monkeypatch, adapter, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    refused(capsys, ["inspect", adapter, "--plot", tmp_path / "a.png"], "pip install matplotlib")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main(["inspect", str(adapter)]) == 0
