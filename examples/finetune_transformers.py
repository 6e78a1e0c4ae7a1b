"""Fine-tune a Transformers model with LoRA: train, evaluate, adjust the rank, save.

    python examples/finetune_transformers.py                        # a small model made on the spot
    python examples/finetune_transformers.py --model path-or-name   # yours, with its own tokenizer

The text is Python's own: the small model first learns the standard library's source code, byte by
byte, and is then fine-tuned on the prose of the language reference.
"""

import argparse
import math
import pydoc_data.topics
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from lora_kernels import (
    add_adaptor_layer,
    adjust_rank,
    evaluate_model,
    lora_parameters,
    save_adapter,
    train_model,
)


def small_model(steps: int, length: int, batch_size: int) -> torch.nn.Module:
    """A byte-level Llama from a config, trained for a moment on source code."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=length,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    library = Path(argparse.__file__).parent
    code = "".join((library / f"{name}.py").read_text() for name in ("argparse", "typing", "ast"))
    loader = batches(list(code.encode()), length, batch_size, steps * batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    train_model(model, loader, None, optimizer, max_steps=steps)
    return model


def batches(tokens: list[int], length: int, batch_size: int, limit: int) -> DataLoader:
    """Rows of `length` tokens, as mappings with input_ids and labels; at most `limit` rows."""
    rows = torch.tensor(tokens[: len(tokens) // length * length]).view(-1, length)[:limit]
    data = [{"input_ids": row, "labels": row} for row in rows]
    return DataLoader(data, batch_size=batch_size, shuffle=True)


def main(arguments: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="name or path of a causal language model of yours")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--final-rank", type=int, default=4)
    parser.add_argument("--steps", type=int, default=60, help="per pass over the data")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=128, help="tokens in a row")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--output", default="bench_output/adapter")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)

    text = "\n".join(pydoc_data.topics.topics.values())
    if options.model:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(options.model)
        tokens = AutoTokenizer.from_pretrained(options.model)(text)["input_ids"]
    else:
        model = small_model(options.steps, options.length, options.batch_size)
        tokens = list(text.encode())
    held_out = len(tokens) // 10
    sizes = options.length, options.batch_size
    test = batches(tokens[:held_out], *sizes, limit=20 * options.batch_size)
    train = batches(tokens[held_out:], *sizes, limit=options.steps * options.batch_size)

    def perplexity() -> float:
        return math.exp(evaluate_model(model, test, None)["loss"])

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    print(f"base: perplexity {perplexity():.3f}")

    add_adaptor_layer(model, options.rank, alpha=2 * options.rank)
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=options.lr)
    train_model(model, train, None, optimizer, max_grad_norm=1.0)
    print(f"rank {options.rank}: perplexity {perplexity():.3f}")

    report = adjust_rank(
        model, options.rank, options.final_rank, train, None, optimizer,
        eval_loader=test, max_grad_norm=1.0,
    )  # fmt: skip
    print(report)
    print(f"rank {report.rank}: perplexity {math.exp(report.loss):.3f}")

    save_adapter(model, options.output)
    print(f"adapter in {options.output}")
    return math.exp(report.loss)


if __name__ == "__main__":
    main()
