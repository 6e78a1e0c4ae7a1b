"""Single rows of a table that are trained: against PEFT, in files, tied to a head, undone."""

import copy
import warnings

import peft
import pytest
import torch
import torch.nn.functional as F
from tiny_models import llama
from torch import nn

import lora_kernels
from lora_kernels.nn import TrainableTokens

ROWS = [9, 3, 40]


def ids_of(*rows):
    torch.manual_seed(1)
    ids = torch.randint(0, 64, (2, 9))
    ids[0, : len(rows)] = torch.tensor(rows)
    return ids


def pair(tied, rows=ROWS, **options):
    """(our model, PEFT's) of one base, whose adapters and rows are the same."""
    torch.manual_seed(0)
    base = llama(tie_word_embeddings=tied, **options)
    given = {"target_modules": ["q_proj"], "trainable_token_indices": rows}
    config = peft.LoraConfig(r=4, lora_alpha=8, **given)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    lora_kernels.apply_lora(base, 4, alpha=8, **given)
    return base, theirs


def trained_rows(theirs):
    found = [p for n, p in theirs.named_parameters() if "trainable_tokens_delta" in n]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("tied", [False, True])
def test_outputs_gradients_and_files_are_pefts(tied, tmp_path):
    ours, theirs = pair(tied)
    ids = ids_of(*ROWS)
    table = ours.model.embed_tokens
    assert isinstance(table, TrainableTokens)
    assert table.token_indices.tolist() == sorted(ROWS)
    assert isinstance(ours.lm_head, TrainableTokens) == tied
    assert [p is table.trainable_tokens for p in lora_kernels.lora_parameters(ours)].count(
        True
    ) == 1
    values = torch.randn(len(ROWS), 32)
    with torch.no_grad():
        trained_rows(theirs).copy_(values)
        table.trainable_tokens.copy_(values[torch.tensor(ROWS).argsort()])
        for layer in ours.model.layers:
            nn.init.zeros_(layer.self_attn.q_proj.lora_B)
    out, expected = ours(ids, labels=ids), theirs(ids, labels=ids)
    torch.testing.assert_close(out.logits, expected.logits)
    out.loss.backward(), expected.loss.backward()
    torch.testing.assert_close(
        table.trainable_tokens.grad, trained_rows(theirs).grad[torch.tensor(ROWS).argsort()]
    )
    assert table.weight.grad is None

    lora_kernels.save_adapter(ours, tmp_path / "ours")
    torch.manual_seed(0)
    again = peft.PeftModel.from_pretrained(llama(tie_word_embeddings=tied), tmp_path / "ours")
    torch.testing.assert_close(again(ids).logits, expected.logits)
    theirs.save_pretrained(tmp_path / "theirs")
    torch.manual_seed(0)
    for model in (llama(tie_word_embeddings=tied), ours):  # without adapters, and with them
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            lora_kernels.load_adapter(model, tmp_path / "theirs")
        torch.testing.assert_close(model(ids).logits, expected.logits)


@pytest.mark.parametrize("tied", [False, True])
def test_disabled_merged_and_removed(tied):
    torch.manual_seed(0)
    model, ids = llama(tie_word_embeddings=tied), ids_of(*ROWS)
    before = model(ids).logits
    lora_kernels.apply_lora(model, 4, trainable_token_indices=ROWS)
    torch.testing.assert_close(model(ids).logits, before)
    with torch.no_grad():
        model.model.embed_tokens.trainable_tokens.add_(1)
    trained = model(ids).logits
    assert not torch.allclose(trained, before)
    with lora_kernels.disable_adapters(model):
        table = model.model.embed_tokens
        assert torch.equal(table(ids), F.embedding(ids, table.weight))
        torch.testing.assert_close(model(ids).logits, before)
    assert torch.equal(model(ids).logits, trained)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(ids).logits, trained)
    assert (copied.lm_head.weight is copied.model.embed_tokens.weight) == tied

    state = dict(lora_kernels.merged_state_dict(model))
    plain = llama(tie_word_embeddings=tied)
    assert state.keys() == plain.state_dict().keys()
    plain.load_state_dict(state)
    torch.testing.assert_close(plain(ids).logits, trained)

    lora_kernels.remove_lora(model)
    assert type(model.model.embed_tokens) is nn.Embedding
    assert type(model.lm_head) is nn.Linear
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(model(ids).logits, before)
    lora_kernels.merge_lora(copied, keep_base=False)
    lora_kernels.remove_lora(copied)
    torch.testing.assert_close(copied(ids).logits, trained)


def test_a_table_of_16_bits_has_rows_of_32():
    model = llama().bfloat16()
    lora_kernels.apply_lora(model, 4, trainable_token_indices=[5])
    table = model.model.embed_tokens
    assert table.trainable_tokens.dtype == torch.float32
    y = table(torch.tensor([5, 6]))
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, F.embedding(torch.tensor([5, 6]), table.weight))


def test_no_table_is_formed():
    model = llama(tie_word_embeddings=True)
    lora_kernels.apply_lora(model, 4, trainable_token_indices=ROWS)
    made = []
    size = model.model.embed_tokens.weight.numel()

    def report(name, values):
        if any(torch.is_tensor(v) and v.numel() == size for v in values):
            made.append(name.split(".")[1])

    with lora_kernels.testing.Aten(report):
        table = model.model.embed_tokens
        table(torch.tensor([3, 4])).sum().backward()
        model.lm_head(torch.randn(1, 32, requires_grad=True)).sum().backward()
    assert set(made) <= {"embedding", "mm", "t"}


def test_trains_and_compiles():
    torch.manual_seed(0)
    model, ids = llama(tie_word_embeddings=True), ids_of(*ROWS)
    lora_kernels.apply_lora(model, 4, trainable_token_indices=ROWS)
    table = model.model.embed_tokens
    weight, rows = table.weight.detach().clone(), table.trainable_tokens.detach().clone()
    optimizer = torch.optim.AdamW(lora_kernels.lora_parameters(model), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step(), optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert torch.equal(table.weight, weight)
    assert not torch.equal(table.trainable_tokens, rows)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids).logits, model(ids).logits)


def test_by_name_and_state_dict():
    model, ids = llama(), ids_of(*ROWS)
    lora_kernels.apply_lora(model, 4, trainable_token_indices={"embed_tokens": [1, 2]})
    with torch.no_grad():
        model.model.embed_tokens.trainable_tokens.normal_()
    other = llama()
    lora_kernels.apply_lora(other, 4, trainable_token_indices={"model.embed_tokens": [1, 2]})
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(ids).logits, model(ids).logits)
    assert "model.embed_tokens.trainable_tokens" in lora_kernels.lora_state_dict(model)
    report = str(lora_kernels.apply_lora(llama(), 4, trainable_token_indices=[1, 2]))
    assert "trained in full: 2 rows of model.embed_tokens" in report


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ([64], ValueError, "expected rows of 0 to 63"),
        ([-1], ValueError, "expected rows of 0 to 63"),
        ([3, 3], ValueError, "names a row twice"),
        ([], TypeError, "expected row numbers"),
        ([1.5], TypeError, "expected row numbers"),
        ({"nothing": [1]}, ValueError, "'nothing' matches no module"),
        ({"q_proj": [1]}, ValueError, "'q_proj' is the end of 2 names"),
        ({"norm": [1]}, ValueError, "expected torch.nn.Embedding"),
    ],
)
def test_bad_rows(given, kind, message):
    model = llama()
    before = [type(module) for module in model.modules()]
    with pytest.raises(kind, match=message):
        lora_kernels.apply_lora(model, 4, trainable_token_indices=given)
    assert [type(module) for module in model.modules()] == before


def test_not_beside_an_adapter_or_full_training():
    for options in (
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"modules_to_save": ["embed_tokens"]},
    ):
        with pytest.raises(ValueError, match="carries an adapter or is trained in full"):
            lora_kernels.apply_lora(llama(), 4, trainable_token_indices=[1], **options)


def test_files_of_other_rows_are_refused(tmp_path):
    model = llama()
    lora_kernels.apply_lora(model, 4, trainable_token_indices=[1, 2])
    lora_kernels.save_adapter(model, tmp_path)
    other = llama()
    lora_kernels.apply_lora(other, 4, trainable_token_indices=[1, 5])
    with pytest.raises(ValueError, match=r"is of the rows \[1, 2\], the model trains \[1, 5\]"):
        lora_kernels.load_adapter(other, tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"trainable_token_indices": {', '"x": {', 1))
    with pytest.raises(ValueError, match="trainable_tokens_delta"):
        lora_kernels.load_adapter(llama(), tmp_path)
