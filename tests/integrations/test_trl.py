"""TRL's trainers on `apply_lora` models beside PEFT's, and DPO without a second model."""

import math

import peft
import pytest
import torch
from tiny_models import build

from lora_kernels import (
    fuse_peft,
    load_adapter,
    reference_model,
    save_adapter,
)

WANTED = "of requirements-integrations.txt"
trl = pytest.importorskip("trl", reason=f"needs trl {WANTED}")
datasets = pytest.importorskip("datasets", reason=f"needs datasets {WANTED}")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

ROWS, LENGTH, STEPS = 16, 12, 5
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def words():
    vocabulary = {f"w{i}": i for i in range(64)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w1"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="w0", eos_token="w2", unk_token="w1"
    )


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """The file of the adapter that every run starts from; its `lora_B` is 0."""
    folder = tmp_path_factory.mktemp("started")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS)
    peft.get_peft_model(build(), config).save_pretrained(folder)
    return folder


def ours(folder, dtype=torch.float32):
    model = build().to(dtype)
    load_adapter(model, folder)
    return model


def theirs(folder, dtype=torch.float32):
    return peft.PeftModel.from_pretrained(build().to(dtype), folder, is_trainable=True)


def sentences(seed, rows=ROWS, length=LENGTH):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 64, (rows, length), generator=generator).tolist()


def arguments(kind, folder, **options):
    return kind(
        output_dir=str(folder), report_to=[], disable_tqdm=True, use_cpu=True, bf16=False,
        logging_steps=1, max_steps=STEPS, per_device_train_batch_size=4,
        save_strategy="no", gradient_checkpointing=False,
        **{"learning_rate": 1e-2, **options},
    )  # fmt: skip


def logged(trainer, key="loss"):
    found = [entry[key] for entry in trainer.state.log_history if key in entry]
    return torch.tensor(found, dtype=torch.float64)


# ------------------------------------------------------------------------------------------- SFT


def sft(model, words, folder, **options):
    trainer = trl.SFTTrainer(
        model, arguments(trl.SFTConfig, folder, **options), processing_class=words,
        train_dataset=datasets.Dataset.from_dict({"input_ids": sentences(1)}),
    )  # fmt: skip
    trainer.train()
    return trainer


def as_near(got, peft_s, exact):
    """The library's rule, of results instead of products."""
    error, allowed = ((run - exact).norm() / exact.norm() for run in (got, peft_s))
    return error <= 2 * allowed + torch.finfo(torch.float32).eps


def factors(model):
    state = peft.get_peft_model_state_dict(model)
    return torch.cat([tensor.double().flatten() for _, tensor in sorted(state.items())])


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
def test_sft_takes_peft_s_steps_and_leaves_peft_s_file(optim, words, started, tmp_path):
    options = {"optim": optim, "learning_rate": 1.0 if optim == "sgd" else 1e-2}
    exact = sft(theirs(started, torch.float64), words, tmp_path, **options)
    peft_s = sft(theirs(started), words, tmp_path, **options)
    model = ours(started)
    run = sft(model, words, tmp_path, **options)
    assert len(logged(run)) == STEPS
    assert logged(run)[-1] < logged(run)[0]
    assert as_near(logged(run), logged(peft_s), logged(exact))
    save_adapter(model, tmp_path / "adapter")
    written = peft.PeftModel.from_pretrained(build(), tmp_path / "adapter")
    if optim == "sgd":  # AdamW's steps are of one size, also where rounding makes the gradient
        assert as_near(factors(written), factors(peft_s.model), factors(exact.model))


# ------------------------------------------------------------------------------------------- DPO


def dpo(model, words, folder, reference=None, **options):
    rows = {
        "prompt": sentences(2, length=4), "chosen": sentences(3), "rejected": sentences(4, length=7)
    }  # fmt: skip
    text = {key: [" ".join(f" w{i}" for i in row) for row in value] for key, value in rows.items()}
    trainer = trl.DPOTrainer(
        model, ref_model=reference, args=arguments(trl.DPOConfig, folder, **options),
        train_dataset=datasets.Dataset.from_dict(text), processing_class=words,
    )  # fmt: skip
    trainer.train()
    return trainer


@torch.no_grad()
def log_probs(model, batch):
    """[2 * rows]: of the completions."""
    kept = batch["completion_mask"][:, 1:]
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    of_tokens = logits.log_softmax(-1)[:, :-1].gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    return (of_tokens * kept).sum(1)


def test_dpo_with_the_model_as_its_own_reference(words, started, tmp_path):
    """The losses of a run with a second model, up to the order of sums: a disabled layer's product
    is our kernels' where those are faster than torch's."""
    model = ours(started)
    run = dpo(model, words, tmp_path, reference_model(model))
    second = dpo(ours(started), words, tmp_path, build())
    eps = torch.finfo(torch.float32).eps
    assert (logged(run) - logged(second)).norm() <= 8 * eps * logged(second).norm()
    assert logged(run)[0] == pytest.approx(math.log(2), rel=eps)
    assert logged(run)[-1] < 0.98 * math.log(2)
    batch = next(iter(run.get_train_dataloader()))
    reference = torch.cat(run.compute_ref_log_probs(run.ref_model, batch))
    other = torch.cat(second.compute_ref_log_probs(second.ref_model, batch))
    assert (reference - other).norm() <= 8 * eps * other.norm()
    expected = log_probs(build(), batch)
    assert (reference - expected).norm() <= 1e-6 * expected.norm()
    assert (log_probs(model.eval(), batch) - expected).norm() >= 1e-2 * expected.norm()


def test_dpo_takes_peft_s_steps(words, started, tmp_path):
    exact = logged(dpo(theirs(started, torch.float64), words, tmp_path))
    peft_s = logged(dpo(theirs(started), words, tmp_path))
    model, fused = ours(started), theirs(started)
    assert fuse_peft(fused).fused
    assert as_near(logged(dpo(model, words, tmp_path, reference_model(model))), peft_s, exact)
    assert as_near(logged(dpo(fused, words, tmp_path)), peft_s, exact)
    early = dpo(ours(started), words, tmp_path, precompute_ref_log_probs=True)
    assert early.ref_model is None
    assert as_near(logged(early), peft_s, exact)
