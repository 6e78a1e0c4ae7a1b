"""LoRA with Transformers' own Trainer: `apply_lora` is the one line that changes.

python examples/finetune_trainer.py                        # a small model from a config
python examples/finetune_trainer.py --model path-or-name   # yours, with its own tokenizer
"""

import argparse
import pydoc_data.topics

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from lora_kernels import apply_lora, save_adapter


def main(arguments: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="name or path of a causal language model of yours")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--length", type=int, default=128, help="tokens in a row")
    parser.add_argument("--output", default="bench_output/trainer")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)

    # The prose of Python's language reference.
    text = "\n".join(pydoc_data.topics.topics.values())
    if options.model:
        model = AutoModelForCausalLM.from_pretrained(options.model)
        tokens = AutoTokenizer.from_pretrained(options.model)(text)["input_ids"]
    else:
        config = LlamaConfig(
            vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=3,
            num_attention_heads=4, max_position_embeddings=options.length,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config)
        tokens = list(text.encode())
    rows = torch.tensor(tokens[: len(tokens) // options.length * options.length])
    data = [{"input_ids": row, "labels": row} for row in rows.view(-1, options.length)]

    # A base made from a config knows nothing: its output head is trained beside the adapters.
    saved = None if options.model else ["lm_head"]
    print(apply_lora(model, options.rank, alpha=2 * options.rank, modules_to_save=saved))

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=options.output,
            max_steps=options.steps,
            per_device_train_batch_size=8,
            learning_rate=2e-3,
            logging_steps=max(options.steps // 4, 1),
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=data[160:],
        eval_dataset=data[:160],
        data_collator=default_data_collator,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    print(f"loss {before:.4f} -> {after:.4f}")
    save_adapter(model, options.output)
    return after


if __name__ == "__main__":
    main()
