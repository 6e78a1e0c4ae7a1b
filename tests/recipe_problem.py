"""What the tests of the recipes train: tiny real models on real text."""

import pydoc_data.topics

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lora_kernels import add_adaptor_layer, lora_parameters
from lora_kernels.adapters import lora_layers

CROSS_ENTROPY = nn.CrossEntropyLoss()


def text_batches(count, size=4, length=24, start=0):
    """Mappings as a Transformers collator gives them: bytes of Python's own reference manual."""
    text = "\n".join(pydoc_data.topics.topics.values()).encode()
    data = torch.tensor(list(text[start : start + count * size * length]))
    return [
        {"input_ids": ids, "labels": ids.clone()} for ids in data.view(count, size, length).unbind()
    ]


def llama(seed=0, **options):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64, **options,
    )  # fmt: skip
    return LlamaForCausalLM(config)


class Net(nn.Module):
    def __init__(self, dtype=torch.float64, dropout=0.0):
        super().__init__()
        self.inner = nn.Linear(6, 10, dtype=dtype)
        self.drop = nn.Dropout(dropout)
        self.outer = nn.Linear(10, 3, dtype=dtype)

    def forward(self, x):
        return self.outer(self.drop(torch.relu(self.inner(x))))


def net(rank=4, seed=0, dtype=torch.float64, dropout=0.0, trained=True, **options):
    """A small model with adapters whose B is not zero."""
    torch.manual_seed(seed)
    model = add_adaptor_layer(Net(dtype, dropout), rank, **options)
    if trained:
        with torch.no_grad():
            for _, layer in lora_layers(model):
                layer.lora_B.normal_(std=0.3)
    return model


def pairs(n=24, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=generator, dtype=torch.float64).to(dtype)
    return x, (x[:, :3].argmax(1) + (x[:, 3] > 0)) % 3


def batched(size, n=24, **options):
    x, y = pairs(n, **options)
    return list(zip(x.split(size), y.split(size), strict=True))


def adam(model, lr=1e-2):
    return torch.optim.Adam(lora_parameters(model), lr=lr)


def sgd(model, lr=1.0):
    return torch.optim.SGD(lora_parameters(model), lr=lr)


def state(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
