"""New heads of Transformers models: trained in full, saved, and the same in PEFT's files."""

import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_kernels import FusedLoRALinear, apply_lora, load_adapter, remove_lora, save_adapter

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0,
}  # fmt: skip
DISTIL = {"vocab_size": 64, "dim": 32, "hidden_dim": 48, "n_layers": 1, "n_heads": 2}
# family: (config, the last parts of some targets, the new head)
FAMILIES = {
    "Bert": (transformers.BertConfig(**SIZES), ["query", "value"], ["classifier"]),
    "Roberta": (transformers.RobertaConfig(**SIZES), ["query", "value"], ["classifier"]),
    "Llama": (transformers.LlamaConfig(**SIZES), ["q_proj", "v_proj"], ["score"]),
    "DistilBert": (
        transformers.DistilBertConfig(**DISTIL), ["q_lin", "v_lin"],
        ["pre_classifier", "classifier"],
    ),
}  # fmt: skip
TOKENS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """(class, folder of a checkpoint of the body alone, targets, head)."""
    config, names, head = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    getattr(transformers, f"{request.param}Model")(config).save_pretrained(folder)
    return (
        getattr(transformers, f"{request.param}ForSequenceClassification"), folder, names, head
    )  # fmt: skip


def load(family, seed):
    """The checkpoint's body and a head drawn from the seed, as another process draws another."""
    torch.manual_seed(seed)
    return family[0].from_pretrained(family[1]).eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def train(model):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        model(input_ids=TOKENS).logits.square().sum().backward()
        optimizer.step()


def assert_close(ours, theirs):
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize("named", [False, True])
def test_a_new_head_is_trained_saved_and_read_back(family, tmp_path, named):
    model = load(family, 1)
    report = apply_lora(model, 4, alpha=8, target_modules=family[2] if named else None)
    assert report.saved == report.new_heads == family[3]
    assert f"trained in full (a new head): {', '.join(family[3])}" in str(report)
    for name in family[3]:
        part = model.get_submodule(name)
        assert not any(isinstance(module, FusedLoRALinear) for module in part.modules())
        assert all(p.requires_grad for p in part.parameters())
    train(model)
    save_adapter(model, tmp_path)
    again = load(family, 2)
    assert not torch.allclose(logits(again), logits(model))
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_peft_reads_our_head(family, tmp_path):
    model = load(family, 1)
    apply_lora(model, 4, alpha=8)
    train(model)
    save_adapter(model, tmp_path)
    for kind in (peft.PeftModel, peft.PeftModelForSequenceClassification):
        theirs = kind.from_pretrained(load(family, 2), tmp_path).eval()
        assert_close(logits(theirs), logits(model))


def test_we_read_peft_s_head(family, tmp_path):
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=family[2],
        task_type="SEQ_CLS",
        modules_to_save=[*family[3]],  # PEFT adds to the list
    )
    theirs = peft.get_peft_model(load(family, 1), config).eval()
    train(theirs)
    theirs.save_pretrained(tmp_path)
    model = load(family, 2)
    load_adapter(model, tmp_path)
    assert_close(logits(model), logits(theirs))
    remove_lora(model)
    assert torch.equal(logits(model), logits(load(family, 2)))


def adapter_without_head(family, folder):
    model = load(family, 1)
    apply_lora(model, 4, alpha=8, target_modules=family[2], exclude_modules=family[3])
    train(model)
    save_adapter(model, folder)


def said(load):
    """What load() warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load()
    return [str(one.message) for one in caught if one.category is UserWarning]


def test_a_new_head_that_the_file_lacks_is_named(family, tmp_path):
    adapter_without_head(family, tmp_path)
    for strict in (False, True):
        (message,) = said(
            lambda strict=strict: load_adapter(load(family, 2), tmp_path, strict=strict)
        )
        assert message.startswith(f"load_adapter: {', '.join(family[3])}: a new head, in neither")
    load(family, 3).save_pretrained(tmp_path / "whole")
    whole = family[0].from_pretrained(tmp_path / "whole")
    built = family[0](whole.config)
    built.load_state_dict(whole.state_dict())
    for model in (whole, built):
        assert not said(lambda model=model: load_adapter(model, tmp_path))


def test_a_trained_head_that_the_file_lacks_is_named(family, tmp_path):
    adapter_without_head(family, tmp_path)
    model = load(family, 2)
    apply_lora(model, 4, target_modules=family[2])
    head = model.get_submodule(family[3][0])
    before = {key: tensor.clone() for key, tensor in head.state_dict().items()}
    (message,) = said(lambda: load_adapter(model, tmp_path))
    assert message.startswith(f"load_adapter: not loaded: {family[3][0]}.")
    assert "trained in full in the model but not in the file" in message
    for key, tensor in before.items():
        assert torch.equal(head.state_dict()[key], tensor)
    with pytest.raises(ValueError, match=r"strict: .* trained in full in the model but not"):
        load_adapter(model, tmp_path, strict=True)


def test_a_tensor_of_a_head_that_the_file_lacks_is_named(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    apply_lora(model, 2, modules_to_save=["1"])
    save_adapter(model, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    for lacking, named in (("bias", "1.bias"), ("1.", "1.weight, 1.bias, 1.running_mean")):
        tensors = {k: t for k, t in load_file(file).items() if lacking not in k}
        save_file(tensors, file)
        (message,) = said(lambda: load_adapter(model, tmp_path))
        assert message.startswith(f"load_adapter: not loaded: {named}")
        assert "trained in full in the model but not in the file" in message


def test_a_head_that_the_file_holds_is_loaded_in_silence(family, tmp_path):
    model = load(family, 1)
    apply_lora(model, 4, target_modules=family[2])
    save_adapter(model, tmp_path)
    again = load(family, 2)
    apply_lora(again, 4, target_modules=family[2])
    for other in (again, load(family, 3)):
        assert not said(lambda other=other: load_adapter(other, tmp_path, strict=True))


def test_a_head_from_a_checkpoint_gets_an_adapter(family, tmp_path):
    load(family, 1).save_pretrained(tmp_path)
    report = apply_lora(family[0].from_pretrained(tmp_path), 4)
    assert not report.saved
    assert any(name.startswith(family[3][-1]) for name in report.replaced)


def test_what_else_a_checkpoint_lacks_is_trained_in_full(tmp_path):
    config = transformers.BertConfig(**SIZES)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path)
    model = transformers.BertForSequenceClassification.from_pretrained(tmp_path)
    assert apply_lora(model, 4).new_heads == ["classifier", "bert.pooler"]
    half = transformers.RobertaForSequenceClassification(FAMILIES["Roberta"][0])
    half.save_pretrained(tmp_path)
    more = transformers.RobertaForSequenceClassification.from_pretrained(
        tmp_path, num_labels=5, ignore_mismatched_sizes=True
    )
    assert apply_lora(more, 4).new_heads == ["classifier"]


@pytest.mark.parametrize(
    ("options", "saved", "adapted"),
    [
        ({"target_modules": ["query", "classifier.dense"]}, [], {"classifier.dense"}),
        ({"target_modules": ["query", "out_proj"]}, [], {"classifier.out_proj"}),
        ({"target_modules": r".*query|classifier\.dense"}, ["classifier"], set()),
        ({"target_modules": r"classifier\.(dense|out_proj)"}, [], {"classifier.dense"}),
        ({"target_modules": ["query", "dense"]}, ["classifier"], set()),
        ({"exclude_modules": ["classifier"]}, [], set()),
        ({"exclude_modules": r"classifier\..*"}, [], set()),
        ({"exclude_modules": ["dense"]}, ["classifier"], set()),
        ({"modules_to_save": ["embeddings"]}, ["classifier", "roberta.embeddings"], set()),
    ],
)  # fmt: skip
def test_a_head_that_is_named_is_treated_as_asked(options, saved, adapted):
    model = transformers.RobertaForSequenceClassification(FAMILIES["Roberta"][0])
    report = apply_lora(model, 4, **options)
    assert report.saved == saved
    assert report.new_heads == [name for name in saved if name == "classifier"]
    head = {name for name in report.replaced if name.startswith("classifier")}
    assert adapted <= head
    assert bool(head) == bool(adapted)
    trains = [p.requires_grad for p in model.classifier.parameters()]
    assert any(trains) == bool(saved or adapted)


@pytest.mark.parametrize(
    ("kind", "config", "head"),
    [
        ("BertForTokenClassification", transformers.BertConfig(**SIZES), ["classifier"]),
        ("BertForQuestionAnswering", transformers.BertConfig(**SIZES), ["qa_outputs"]),
        ("BertForMultipleChoice", transformers.BertConfig(**SIZES), ["classifier"]),
        ("BertForMaskedLM", transformers.BertConfig(**SIZES), []),
        ("LlamaForCausalLM", transformers.LlamaConfig(**SIZES), []),
        ("BertModel", transformers.BertConfig(**SIZES), []),
        ("GPT2ForSequenceClassification",
         transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2), ["score"]),
    ],
)  # fmt: skip
def test_heads_of_models_built_from_a_config(kind, config, head):
    model = getattr(transformers, kind)(config)
    assert apply_lora(model, 2).saved == head


def test_the_head_of_a_compiled_model():
    model = transformers.BertForSequenceClassification(FAMILIES["Bert"][0])
    assert apply_lora(torch.compile(model), 2).new_heads == ["classifier"]
    assert model.classifier.weight.requires_grad
