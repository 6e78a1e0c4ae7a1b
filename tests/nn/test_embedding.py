"""FusedLoRAEmbedding and lora_embedding: against fp64, PEFT and its files."""

import copy
import pickle

import peft
import pytest
import torch
import torch.nn.functional as F
from tiny_models import gpt2, llama
from torch import nn

import lora_kernels
from lora_kernels import FusedLoRAEmbedding, lora_embedding

V, D, R = 40, 24, 4


def tensors(dtype=torch.float32, adapter_dtype=None, rows=(3, 17), seed=0):
    torch.manual_seed(seed)
    weight = torch.randn(V, D).to(dtype)
    pair = [torch.randn(R, V), torch.randn(D, R)]
    a, b = (t.to(adapter_dtype or dtype).requires_grad_() for t in pair)
    return torch.randint(0, V, rows), weight, a, b


def unfused(indices, weight, a, b, scaling, padding_idx=None):
    s = F.embedding(indices, a.t(), padding_idx).to(weight.dtype)
    branch = scaling * (s @ b.to(weight.dtype).t())
    return F.embedding(indices, weight, padding_idx) + branch


def error(tensor, exact):
    return ((tensor.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("padding_idx", [None, 3])
@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"),
    [
        (torch.float32, None),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, None),
        (torch.float16, torch.float32),
    ],
)
def test_accuracy(dtype, adapter_dtype, padding_idx):
    indices, weight, a, b = tensors(dtype, adapter_dtype, rows=(4, 64))
    dy = torch.randn(4, 64, D).to(dtype)

    def results(function, *given):
        given = [t.detach().clone().requires_grad_() for t in given]
        y = function(indices, *given, scaling=1.7, padding_idx=padding_idx)
        return [y, *torch.autograd.grad(y, given, dy.to(y.dtype))]

    exact = results(unfused, *(t.double() for t in (weight, a, b)))
    ours = results(lora_embedding, weight, a, b)
    theirs = results(unfused, weight, a, b)
    for mine, other, truth in zip(ours, theirs, exact, strict=True):
        assert mine.dtype == other.dtype
        assert error(mine, truth) <= 2 * error(other, truth) + torch.finfo(dtype).eps


def test_gradcheck():
    indices, weight, a, b = tensors(torch.float64, rows=(7,))
    weight.requires_grad_()
    function = lambda w, a, b: lora_embedding(indices, w, a, b, scaling=0.5)  # noqa: E731
    assert torch.autograd.gradcheck(function, (weight, a, b))
    assert torch.autograd.gradgradcheck(function, (weight, a, b))


def test_only_named_columns_get_a_gradient_and_in_the_same_bits():
    torch.manual_seed(1)
    indices = torch.randint(0, 30, (5000,))
    _, weight, a, b = tensors()
    dy = torch.randn(5000, D)
    found = [torch.autograd.grad(lora_embedding(indices, weight, a, b), a, dy)[0] for _ in range(5)]
    assert found[0][:, :30].any(dim=0).all()
    assert not found[0][:, 30:].any()
    assert all(torch.equal(found[0], other) for other in found)


def test_nothing_of_the_vocabularys_size_is_made_but_the_gradient():
    indices, weight, a, b = tensors()
    of_its_size = []

    def report(name, values):
        if any(torch.is_tensor(v) and V in v.shape for v in values):
            of_its_size.append(name.split(".")[1])

    with lora_kernels.testing.Aten(report):
        lora_embedding(indices, weight, a, b).sum().backward()
    assert of_its_size == ["embedding", "index_select", "new_zeros", "index_add_"]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        lora_embedding(indices, weight, a, b)
    rows = indices.numel()
    assert sorted(map(tuple, kept)) == [(R, D), (rows,), (rows, R)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_a": torch.zeros(R, V + 1)}, "lora_a: expected shape"),
        ({"lora_b": torch.zeros(D, R + 1)}, "lora_b: expected shape"),
        ({"indices": torch.zeros(3)}, "indices: expected int64 or int32"),
        ({"weight": torch.zeros(V)}, "weight: expected shape"),
        ({"lora_a": torch.zeros(0, V), "lora_b": torch.zeros(D, 0)}, "lora_a: expected shape"),
        ({"lora_a": torch.zeros(R, V, dtype=torch.bfloat16)}, "lora_a: expected the weight's"),
        ({"weight": torch.zeros(V, D, device="meta")}, "expected the weight's device meta"),
        ({"weight": None}, "weight: expected a Tensor"),
    ],
)
def test_bad_input(change, message):
    indices, weight, a, b = tensors()
    given = {"indices": indices, "weight": weight, "lora_a": a, "lora_b": b, **change}
    with pytest.raises((TypeError, ValueError), match=message):
        lora_embedding(**given)


def test_an_index_out_of_range_is_torchs_error():
    _, weight, a, b = tensors()
    with pytest.raises(IndexError):
        lora_embedding(torch.tensor([V]), weight, a, b)


def layer(trained=True, **options):
    torch.manual_seed(0)
    made = FusedLoRAEmbedding(V, D, R, alpha=8, **options)
    if trained:
        nn.init.normal_(made.lora_A)
    return made


def test_layer_starts_as_its_base_and_trains():
    made = layer(trained=False)
    indices = torch.randint(0, V, (2, 5))
    y = made(indices)
    assert torch.equal(y, F.embedding(indices, made.weight))
    y.sum().backward()
    assert made.weight.grad is None
    assert made.lora_A.grad.any()
    assert repr(made) == "FusedLoRAEmbedding(40, 24, rank=4, scaling=2)"


def test_layer_merges_and_unmerges_bit_exactly():
    made = layer()
    indices, before = torch.arange(V), made.weight.detach().clone()
    y = made(indices)
    made.merge()
    torch.testing.assert_close(made(indices), y, rtol=0, atol=1e-6)
    state = copy.deepcopy(made.state_dict())
    other = layer()
    other.load_state_dict(state)
    assert other.merged
    assert torch.equal(other(indices), made(indices))
    made.unmerge()
    assert torch.equal(made.weight, before)
    assert torch.equal(made(indices), y)


def test_copies_pickles_and_meta():
    made = layer(padding_idx=1)
    indices = torch.tensor([[1, 2], [3, 1]])
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(other(indices), made(indices))
        assert other.padding_idx == 1
    empty = FusedLoRAEmbedding(V, D, R, device="meta").to_empty(device="cpu")
    empty.reset_parameters()
    assert not empty.lora_A.any()
    assert empty.lora_B.any()


def test_compiles_as_one_graph():
    made = layer()
    indices = torch.randint(0, V, (2, 5))
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    y, expected = compiled(indices), made(indices)
    assert torch.equal(y, expected)
    gradients = [torch.autograd.grad(out.square().sum(), made.lora_A)[0] for out in (y, expected)]
    assert torch.equal(*gradients)


def test_autocast_leaves_the_dtype_of_the_rows():
    made = layer()
    with torch.autocast("cpu", torch.bfloat16):
        assert made(torch.tensor([1])).dtype == torch.float32


def peft_pair(build, names, **options):
    """(our model, PEFT's) with the same base and adapter."""
    torch.manual_seed(0)
    base = build()
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=R, lora_alpha=8, target_modules=names, **options)
    )
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    return base, theirs


@pytest.mark.parametrize(
    ("build", "names"),
    [(llama, ["q_proj", "embed_tokens"]), (gpt2, ["c_attn", "wte", "wpe"])],
)
def test_pefts_files_both_ways(build, names, tmp_path):
    ours, theirs = peft_pair(build, names)
    ids = torch.randint(0, 64, (2, 9))
    theirs.save_pretrained(tmp_path / "theirs")
    lora_kernels.load_adapter(ours, tmp_path / "theirs")
    expected = theirs(ids).logits
    torch.testing.assert_close(ours(ids).logits, expected)

    loss = lambda model: model(ids, labels=ids).loss  # noqa: E731
    loss(ours).backward(), loss(theirs).backward()
    embedding = ours.get_input_embeddings()
    assert isinstance(embedding, FusedLoRAEmbedding)
    wrapped = theirs.base_model.model.get_input_embeddings()
    torch.testing.assert_close(embedding.lora_A.grad, wrapped.lora_embedding_A["default"].grad)
    torch.testing.assert_close(embedding.lora_B.grad, wrapped.lora_embedding_B["default"].grad)

    lora_kernels.save_adapter(ours, tmp_path / "ours")
    torch.manual_seed(0)
    again = peft.PeftModel.from_pretrained(build(), tmp_path / "ours")
    torch.testing.assert_close(again(ids).logits, expected)


def test_apply_lora_takes_embeddings_that_are_named_alone():
    model, ids = llama(), torch.randint(0, 64, (1, 5))
    before = model(ids).logits
    assert "model.embed_tokens" not in lora_kernels.apply_lora(model, R).replaced
    lora_kernels.remove_lora(model)
    report = lora_kernels.apply_lora(model, R, target_modules=["q_proj", "embed_tokens"])
    assert "model.embed_tokens" in report.replaced
    assert "embeddings" not in report.left_out
    plain = model(ids).logits.detach()
    nn.init.normal_(model.model.embed_tokens.lora_A)
    assert not torch.equal(model(ids).logits, plain)
    with lora_kernels.disable_adapters(model):
        assert torch.equal(model(ids).logits, plain)
    adapted = model(ids).logits
    lora_kernels.merge_lora(model)
    torch.testing.assert_close(model(ids).logits, adapted)
    lora_kernels.unmerge_lora(model)
    lora_kernels.remove_lora(model)
    assert type(model.model.embed_tokens) is nn.Embedding
    assert model.model.embed_tokens.weight.requires_grad
    assert torch.equal(model(ids).logits, before)


def test_a_tied_table_is_not_merged():
    model = llama(tie_word_embeddings=True)
    lora_kernels.apply_lora(model, R, target_modules=["embed_tokens"])
    with pytest.raises(ValueError, match=r"embed_tokens\.weight.*lm_head\.weight|tie"):
        lora_kernels.merge_lora(model)
    with pytest.raises(ValueError, match="resize_token_embeddings"):
        model.resize_token_embeddings(80)


def test_several_adapters_add_up():
    model = llama()
    lora_kernels.apply_lora(model, R, target_modules=["embed_tokens"])
    lora_kernels.add_adapter(model, "other", 2)
    table = model.model.embed_tokens
    for one in (table, table.adapter("other")):
        nn.init.normal_(one.lora_A)
    ids = torch.arange(9)
    lora_kernels.set_adapter(model, ["default", "other"])
    both = table(ids)
    exact = table.weight.double()
    for one in (table, table.adapter("other")):
        exact = exact + one.scaling * (one.lora_B.double() @ one.lora_A.double()).t()
    torch.testing.assert_close(both, exact[ids].float())


@pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}])
def test_tables_that_are_more_than_a_frozen_weight_are_refused(option):
    base = nn.Embedding(V, D, **option)
    with pytest.raises(ValueError, match=f"linear: has {next(iter(option))}="):
        FusedLoRAEmbedding.from_linear(base, R)
    model = nn.Sequential(base, nn.Linear(D, 4))
    with pytest.raises(ValueError, match=next(iter(option))):
        lora_kernels.apply_lora(model, R, target_modules=["0"])


def test_dora_and_quantising_name_the_embedding():
    with pytest.raises(TypeError, match="FusedLoRAEmbedding has no class with DoRA"):
        lora_kernels.apply_lora(llama(), R, target_modules=["embed_tokens"], use_dora=True)
    model = llama()
    lora_kernels.apply_lora(model, R, target_modules=["q_proj", "embed_tokens"])
    report = lora_kernels.quantize_base(model, "int8")
    assert "looked up" in report.left["model.embed_tokens"]


def test_a_frozen_lora_a_and_directions_of_inputs_are_refused_by_name():
    targets = ["q_proj", "embed_tokens"]
    with pytest.raises(ValueError, match="freeze_a: an embedding"):
        lora_kernels.apply_lora(llama(), R, target_modules=targets, freeze_a=True)
    model = llama()
    lora_kernels.apply_lora(model, R, target_modules=targets, init="eva")
    with pytest.raises(ValueError, match=r"model\.embed_tokens: is an embedding"):
        lora_kernels.initialize_eva(model, [{"input_ids": torch.randint(0, 64, (2, 9))}])
