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

# Mixtures of experts: the class of a config and its sizes, beside those that all have.
SMALL = {
    "vocab_size": 64, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
MIXTURES = {
    "mixtral": ("MixtralConfig", {"intermediate_size": 20, "num_local_experts": 4}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"moe_intermediate_size": 20, "num_experts": 5, "num_experts_per_tok": 2, "head_dim": 8},
    ),
    # Weights [E, in, out], gate and up in turn, biases, and a gate of its own.
    "gpt_oss": (
        "GptOssConfig",
        {"intermediate_size": 20, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            "moe_intermediate_size": 20, "n_routed_experts": 4, "num_experts_per_tok": 2,
            "first_k_dense_replace": 1, "n_group": 2, "topk_group": 2, "q_lora_rank": 8,
            "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
            "intermediate_size": 20, "num_key_value_heads": 4,
        },
    ),
}  # fmt: skip


def build(name="llama", **options):
    """In evaluation mode, from a fixed seed."""
    torch.manual_seed(0)
    return MODELS[name](**options).eval()


def inputs(name="llama", rows=2):
    generator = torch.Generator().manual_seed(1)
    if name == "vit":
        return {"pixel_values": torch.randn(rows, 3, 8, 8, generator=generator)}
    return {"input_ids": torch.randint(1, 64, (rows, 9), generator=generator)}
