"""Transformers models of a few thousand parameters, built from configs, and inputs for them."""

import torch
import transformers

TEXT = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
GROUPED = {**TEXT, "num_key_value_heads": 2}


def llama(**options):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**GROUPED, **options}))


def qwen2():
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**GROUPED))


def mistral():
    config = transformers.MistralConfig(**GROUPED, sliding_window=6)
    return transformers.MistralForCausalLM(config)


def gpt2(**options):
    config = transformers.GPT2Config(
        **{"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "n_head": 4, "n_inner": 48,
           "n_positions": 64, "bos_token_id": 0, "eos_token_id": 0, "resid_pdrop": 0.0,
           "embd_pdrop": 0.0, "attn_pdrop": 0.0, **options},
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def bert():
    config = transformers.BertConfig(**TEXT, num_labels=3)
    return transformers.BertForSequenceClassification(config)


def vit():
    sizes = {k: TEXT[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers",
                                  "num_attention_heads")}  # fmt: skip
    config = transformers.ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=3)
    return transformers.ViTForImageClassification(config)


MODELS = {f.__name__: f for f in (llama, qwen2, mistral, gpt2, bert, vit)}


def build(name="llama", **options):
    """In evaluation mode, from a fixed seed."""
    torch.manual_seed(0)
    return MODELS[name](**options).eval()


def inputs(name="llama", rows=2):
    generator = torch.Generator().manual_seed(1)
    if name == "vit":
        return {"pixel_values": torch.randn(rows, 3, 8, 8, generator=generator)}
    return {"input_ids": torch.randint(1, 64, (rows, 9), generator=generator)}
