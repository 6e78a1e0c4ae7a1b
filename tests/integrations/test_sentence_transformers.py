"""sentence-transformers: its own Trainer on a model that `apply_lora` changed, saved and loaded."""

import pytest
import torch
from tiny_models import TEXT

from lora_kernels import apply_lora, load_adapter, merge_lora, save_adapter

WANTED = "of requirements-integrations.txt"
st = pytest.importorskip("sentence_transformers", reason=f"needs sentence-transformers {WANTED}")
modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
datasets = pytest.importorskip("datasets", reason=f"needs datasets {WANTED}")
transformers = pytest.importorskip("transformers")
WORDS = [f"w{i}" for i in range(3, 63)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small BERT of random weights and its tokenizer, as from_pretrained finds them."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(**TEXT)).save_pretrained(folder)
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    transformers.BertTokenizer(vocab={n: i for i, n in enumerate(names)}).save_pretrained(folder)
    return folder


def encoder(folder):
    word = modules.Transformer(str(folder), max_seq_length=16)
    return st.SentenceTransformer(modules=[word, modules.Pooling(32)], device="cpu")


def pairs(rows=24):
    """Two sentences of the same words, in another order."""
    generator = torch.Generator().manual_seed(1)
    chosen = [torch.randperm(60, generator=generator)[:6] for _ in range(rows)]
    orders = [[c, c[torch.randperm(6, generator=generator)]] for c in chosen]
    anchor, positive = ([" ".join(WORDS[i] for i in o[k]) for o in orders] for k in (0, 1))
    return {"anchor": anchor, "positive": positive}


def train(model, output, steps=20):
    arguments = st.SentenceTransformerTrainingArguments(
        output_dir=str(output), max_steps=steps, per_device_train_batch_size=8, logging_steps=1,
        learning_rate=2e-2, report_to=[], disable_tqdm=True, use_cpu=True, save_strategy="no",
    )  # fmt: skip
    trainer = st.SentenceTransformerTrainer(
        model, arguments, train_dataset=datasets.Dataset.from_dict(pairs()),
        loss=losses.MultipleNegativesRankingLoss(model),
    )  # fmt: skip
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def encoded(model):
    return model.encode(pairs()["anchor"][:6], convert_to_tensor=True)


def close(left, right):
    return (left - right).norm() <= 1e-5 * right.norm()


def test_trained_saved_and_loaded(folder, tmp_path):
    model = encoder(folder)
    report = apply_lora(model, 4, alpha=8)
    assert len(report.replaced) >= 8
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    before = encoded(model)
    run = train(model, tmp_path / "run")
    assert sum(run[-4:]) < 0.9 * sum(run[:4])
    assert all(torch.equal(model.get_parameter(n), p) for n, p in frozen.items())
    after = encoded(model)
    assert not close(after, before)

    model.save(str(tmp_path / "whole"))
    assert close(encoded(st.SentenceTransformer(str(tmp_path / "whole"), device="cpu")), after)

    save_adapter(model, tmp_path / "adapter")
    again = encoder(folder)
    load_adapter(again, tmp_path / "adapter")
    assert close(encoded(again), after)

    merge_lora(model)
    assert close(encoded(model), after)
