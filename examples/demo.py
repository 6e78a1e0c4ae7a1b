"""Fine-tune a real language model with LoRA from start to end, on any machine, in a few minutes.

A small Llama is trained on the standard library's documentation, frozen, given adapters and
fine-tuned to the standard library's source code; then its adapters are saved, reloaded, compressed
and merged.

    python examples/demo.py                          # a few minutes, on the GPU where there is one
    python examples/demo.py --text notes.txt *.md    # fine-tune to your own text instead

What it leaves can be loaded: base model and tokenizer in Transformers' format, the adapter below
them.
"""

import argparse
import copy
import logging
import math
import shlex
import sys
import time
from pathlib import Path

import matplotlib
import torch
from corpus import (
    documentation,
    held_out,
    loader,
    require_enough,
    sequences,
    source_code,
    train_tokenizer,
)
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lora_kernels import (
    add_adaptor_layer,
    adjust_rank,
    apply_lora,
    evaluate_model,
    load_adapter,
    lora_parameters,
    low_rank_approximation,
    merge_lora,
    save_adapter,
    train_model,
    tune,
)
from lora_kernels.recipes import History

matplotlib.use("Agg")
from matplotlib import pyplot

RANK, SMALL_RANK, ALPHA = 16, 4, 32
LENGTH, BATCH, VOCABULARY = 128, 8, 1024
BASE, TUNED, OTHER = "#8a8f98", "#2a6fdb", "#d98a2b"
LOAD = """
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
from lora_kernels import load_adapter
model = AutoModelForCausalLM.from_pretrained({folder!r})
load_adapter(model, {adapter!r})
write = pipeline("text-generation", model, tokenizer=AutoTokenizer.from_pretrained({folder!r}))
print(write({prompt!r}, max_new_tokens=60)[0]["generated_text"])
""".strip()


def build_base(vocabulary: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=192, intermediate_size=512, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def adamw(model: nn.Module, rate: float) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)


def perplexity(model: nn.Module, test) -> float:
    return math.exp(evaluate_model(model, test, None, progress=False)["loss"])


def adapter_kib(model: nn.Module) -> float:
    return sum(p.numel() * p.element_size() for p in lora_parameters(model)) / 1024


def tokens_per_second(models: dict[str, nn.Module], train, steps: int = 6) -> dict[str, float]:
    """Median over interleaved rounds of training steps, so that all meet the same noise."""
    batches = [batch for batch, _ in zip(train, range(steps), strict=False)]
    optimizers = {name: adamw(model, 0.0) for name, model in models.items()}
    rates: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(5):
        for name, model in models.items():
            history = train_model(model, batches, None, optimizers[name], progress=False)
            rates[name].append(history.tokens_per_second)
    return {name: sorted(values)[len(values) // 2] for name, values in rates.items()}


@torch.no_grad()
def same_logits(one: nn.Module, other: nn.Module, batch: dict) -> float:
    """Largest difference of the logits, relative to the largest logit."""
    one.eval(), other.eval()
    ids = batch["input_ids"].to(next(one.parameters()).device)
    a, b = one(ids).logits, other(ids).logits
    return float((a - b).abs().max() / a.abs().max())


def frozen(base: nn.Module) -> nn.Module:
    """The base, whose gradient goes through every layer to one norm and to no weight: the least
    that a step of any adapter takes."""
    model = copy.deepcopy(base).requires_grad_(False)
    model.model.layers[0].input_layernorm.weight.requires_grad_(True)
    return model


@torch.no_grad()
def sample(model: nn.Module, tokenizer: PreTrainedTokenizerFast, prompt: str, seed: int) -> str:
    torch.manual_seed(seed)
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    ids = model.eval().generate(
        **inputs, max_new_tokens=60, do_sample=True, temperature=0.7, top_p=0.9, pad_token_id=0
    )
    return tokenizer.decode(ids[0])


def indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def plot(path: Path, base: History, tuned: History, rows: list, rates: dict[str, float]) -> None:
    """rows: (label, steps of fine-tuning, held-out perplexity, KiB) of each adapter."""
    figure, (left, middle, right) = pyplot.subplots(
        1, 3, figsize=(15, 4.2), layout="constrained", width_ratios=(5, 4, 3)
    )
    begin = 0
    for history, label, color in (
        (base, "base, on documentation", BASE),
        (tuned, f"LoRA r={RANK}, on the target", TUNED),
    ):
        steps = range(begin + 1, begin + len(history) + 1)
        left.plot(steps, history.loss, color=color, alpha=0.45, linewidth=1, label=label)
        found = [(begin + e["step"], e["loss"]) for e in history.evaluations]
        left.plot(*zip(*found, strict=True), "o-", color=color, markersize=4, label="held out")
        begin += len(history)
    left.axvline(len(base) + 0.5, color=BASE, linestyle=":", linewidth=1)
    left.set(xlabel="optimizer step", ylabel="loss (nats per token)", title="Training")
    left.legend(frameon=False)
    labels = [
        f"{label}\n{steps} steps" + (f"\n{kib:.0f} KiB" if kib else "")
        for label, steps, _, kib in rows
    ]
    bars = middle.bar(
        labels, [row[2] for row in rows], color=[BASE, *[TUNED] * (len(rows) - 1)], width=0.6
    )
    middle.bar_label(bars, fmt="%.1f", padding=2)
    middle.tick_params(axis="x", labelsize=8)
    middle.set(ylabel="held-out perplexity", title="Perplexity, fine-tuning steps, size")
    colors = [{"frozen": BASE, "PEFT": OTHER}.get(name, TUNED) for name in rates]
    bars = right.bar(list(rates), list(rates.values()), color=colors, width=0.6)
    right.bar_label(bars, fmt="{:,.0f}", padding=2)
    right.set(ylabel="tokens/s", title="A training step")
    for axis in (left, middle, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, nargs="+", help="fine-tune to these text files")
    parser.add_argument("--out", type=Path, default=Path("demo_output"), help="folder for results")
    parser.add_argument("--base-steps", type=int, default=300)
    parser.add_argument("--steps", type=int, default=150, help="of fine-tuning")
    args = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    begin = time.perf_counter()

    print("== 1. Real text: the standard library's documentation, then", end=" ")
    print("your files" if args.text else "its source code")
    docs, docs_test = held_out(documentation())
    if args.text:
        try:
            texts = [path.read_text(errors="replace") for path in args.text]
            require_enough(texts, LENGTH * BATCH)
        except (OSError, ValueError) as error:
            parser.error(f"--text: {error}")
    else:
        texts = source_code()
    code, code_test = held_out(texts)
    tokenizer = train_tokenizer(docs + code, VOCABULARY)
    words = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    train = {
        "docs": sequences(tokenizer, docs, LENGTH, args.base_steps * BATCH),
        "code": sequences(tokenizer, code, LENGTH, args.steps * BATCH),
    }
    train = {name: loader(data, BATCH, shuffle=True) for name, data in train.items()}
    tests = {
        name: loader(sequences(tokenizer, text, LENGTH, 64), 16, shuffle=False)
        for name, text in (("docs", docs_test), ("code", code_test))
    }

    print("\n== 2. Train the base model on the documentation")
    model = build_base(VOCABULARY).to(device)
    history = train_model(
        model, train["docs"], None, adamw(model, 3e-3), epochs=20, max_steps=args.base_steps,
        max_grad_norm=1.0, eval_loader=tests["docs"], eval_every=max(1, args.base_steps // 6),
    )  # fmt: skip
    base = copy.deepcopy(model)
    base.save_pretrained(args.out)
    words.save_pretrained(args.out)
    prompts = [words.decode(row[:24]) for row in next(iter(tests["code"]))["input_ids"][:2]]
    samples = {"before": [sample(model, words, prompt, 1) for prompt in prompts]}
    before = {name: perplexity(model, test) for name, test in tests.items()}
    print(f"held-out perplexity: documentation {before['docs']:.1f}, target {before['code']:.1f}")
    weight = model.model.layers[0].self_attn.q_proj.weight.detach()
    U, V = low_rank_approximation(weight, RANK)
    kept = 1 - float((weight - U @ V).norm() / weight.norm()) ** 2
    print(f"rank {RANK} holds {kept:.0%} of the energy of a trained {list(weight.shape)} weight")

    print("\n== 3. Freeze it, add adapters, fine-tune")
    report = apply_lora(model, RANK, alpha=ALPHA)
    print(report)
    if device == "cuda":
        # The rows of a step, of an evaluation and of a token that is written.
        rows = [next(iter(data["code"]))["input_ids"].numel() for data in (train, tests)]
        print(tune(model, rows=[*rows, 1], minutes=1, variants=False))
    optimizer = adamw(model, 4e-3)
    tuned = train_model(
        model, train["code"], None, optimizer, epochs=20, max_steps=args.steps, max_grad_norm=1.0,
        eval_loader=tests["code"], eval_every=max(1, args.steps // 6),
    )  # fmt: skip
    after = perplexity(model, tests["code"])
    print(f"held-out perplexity on the target: {before['code']:.1f} -> {after:.1f}")
    samples["after"] = [sample(model, words, prompt, 1) for prompt in prompts]
    for number in range(len(prompts)):
        for when, texts in samples.items():
            print(f"\n  {when}, text {number + 1}:\n{indented(texts[number])}")

    print("\n== 4. The same training step under PEFT, and without adapters")
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
    models = {
        "frozen": frozen(base),
        "PEFT": get_peft_model(copy.deepcopy(base), config),
        "lora_kernels": model,
    }
    rates = tokens_per_second(models, train["code"])
    for name, rate in rates.items():
        print(f"{name:13} {rate:8.0f} tokens/s")
    print(f"ratio to PEFT {rates['lora_kernels'] / rates['PEFT']:8.2f}")

    print("\n== 5. Save, reload into a fresh base, merge")
    batch = next(iter(tests["code"]))
    save_adapter(model, args.out / "adapter")
    fresh = copy.deepcopy(base)
    load_adapter(fresh, args.out / "adapter")
    print(f"reloaded: largest relative difference of logits {same_logits(model, fresh, batch):.1e}")
    merge_lora(fresh)
    print(f"merged:   largest relative difference of logits {same_logits(model, fresh, batch):.1e}")

    print(f"\n== 6. Compress the adapters {RANK} -> {SMALL_RANK}, training between the steps")
    rows = [("base", 0, before["code"], 0.0), (f"r={RANK}", args.steps, after, adapter_kib(model))]
    direct = add_adaptor_layer(copy.deepcopy(base), SMALL_RANK, alpha=ALPHA * SMALL_RANK / RANK)
    bytes_per_rank = adapter_kib(direct) / SMALL_RANK
    ranks = adjust_rank(
        model, RANK, SMALL_RANK, train["code"], None, optimizer, eval_loader=tests["code"],
        max_steps=args.steps // 3, max_grad_norm=1.0,
    )  # fmt: skip
    steps = args.steps
    for step in ranks.steps:
        steps += len(step.history)
        rows.append((f"r={step.rank}", steps, math.exp(step.loss), step.rank * bytes_per_rank))
    # As many steps as the compressed adapter has seen in all.
    train_model(
        direct, train["code"], None, adamw(direct, 4e-3), epochs=20, max_steps=steps,
        max_grad_norm=1.0,
    )  # fmt: skip
    reached = perplexity(direct, tests["code"])
    rows.append((f"r={SMALL_RANK} direct", steps, reached, adapter_kib(direct)))
    print(ranks)
    print(f"\n{'adapter':12} {'steps':>5} {'perplexity':>11} {'size':>10}")
    for label, steps, value, kib in rows:
        print(f"{label:12} {steps:>5} {value:>11.2f} {kib:>6.0f} KiB")

    merge_lora(model, keep_base=False)
    plot(args.out / "demo.png", history, tuned, rows, rates)
    print(f"\n{args.out}/ holds model, tokenizer, adapter and plot. To let them write:\n")
    folder, adapter = str(args.out), str(args.out / "adapter")
    load = LOAD.format(folder=folder, adapter=adapter, prompt=prompts[0])
    print(f"{shlex.quote(sys.executable)} -c {shlex.quote(load)}")
    print(f"\n{time.perf_counter() - begin:.0f} s in all")


if __name__ == "__main__":
    main()
