"""A small Llama with a real tokenizer as a folder, and texts to train it on."""

import runpy
from pathlib import Path

import pytest
import torch
import transformers

CORPUS = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "corpus.py"))
CHAT = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}\n{% endgeneration %}"
    "{% else %}{{ m.content }}\n{% endif %}{% endfor %}"
)


@pytest.fixture(scope="session")
def documents():
    from pydoc_data.topics import topics

    return list(topics.values())[:24]


@pytest.fixture(scope="session")
def words(documents):
    made = CORPUS["train_tokenizer"](documents, 384)
    made.add_special_tokens(["<end>"])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<end>", chat_template=CHAT
    )


@pytest.fixture(scope="session")
def base(words, tmp_path_factory):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        eos_token_id=words.eos_token_id,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("base")
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text(documents, tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "topics.txt"
    path.write_text("\n".join(documents)[:20000])
    return path
