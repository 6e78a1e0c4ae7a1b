"""End to end: a LoRA training step and batch-1 decoding of a Llama-architecture model.

    python -m benchmarks.model --out benchmarks/results/model-cpu.json

The frozen model passes gradients through without adapters of its own: what no adapter can beat.
PEFT as it comes (fp32 adapters) and in the model's dtype, and ours, start from equal weights and
adapters; their logits and adapter gradients are checked against fp64 first. On a GPU the layers
have the sizes of Llama-3-8B.
"""

import argparse
import copy
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from benchmarks.memory import peak_bytes
from benchmarks.peers import BLOCKS, FROZEN, OURS, OURS_FP32, PEFT, PEFT_COMPILED, PEFT_FP32
from benchmarks.store import Results
from lora_kernels import apply_lora, fuse_blocks
from lora_kernels.testing import DTYPES, WrongResult, error
from lora_kernels.tuning.clock import Deadline, interleaved, summary
from lora_kernels.tuning.machine import machine, machine_line

RANK, ALPHA = 16, 32
SIZES = {  # hidden, intermediate, layers, heads, key-value heads, vocabulary, batch, length
    "gpu": (4096, 14336, 4, 32, 8, 32000, 2, 2048),
    "cpu": (512, 1408, 4, 8, 4, 4096, 2, 256),
    "wide": (1024, 2816, 4, 16, 4, 4096, 2, 512),
    "smoke": (32, 64, 1, 2, 1, 64, 1, 8),
    "host": (64, 176, 2, 4, 2, 64, 1, 16),  # of `benchmarks.host`
}


def base_model(
    size: str, dtype: torch.dtype, device: torch.device, layers: int | None = None
) -> LlamaForCausalLM:
    hidden, intermediate, own, heads, key_value, vocabulary, _, length = SIZES[size]
    layers = layers or own
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=key_value,
        max_position_embeddings=2 * length,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(config).to(dtype)
    return model.requires_grad_(False)


def make_peft(base: nn.Module, fp32: bool) -> nn.Module:
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules="all-linear", exclude_modules=["lm_head"]
    )
    return get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=fp32)


def make_ours(base: nn.Module, fp32: bool) -> nn.Module:
    model = copy.deepcopy(base)
    dtype = torch.float32 if fp32 else base.dtype
    apply_lora(model, RANK, alpha=ALPHA, adapter_dtype=dtype)
    return model


def adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trained parameters under equal names in PEFT's model and ours."""
    return {
        name.removeprefix("base_model.model.").replace(".default.weight", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


@torch.no_grad()
def equalise(models: Sequence[nn.Module]) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapters(models[0]).items():
        scale = parameter.shape[1] ** -0.5
        values = torch.randn(parameter.shape, generator=generator) * 0.1 * scale
        for model in models:
            adapters(model)[name].copy_(values)


def _outputs(model: nn.Module, ids: Tensor) -> list[Tensor]:
    trained = adapters(model)
    names = sorted(trained)[:2]  # of the first layer: everything lies behind it
    out = model(input_ids=ids, labels=ids)
    gradients = torch.autograd.grad(out.loss, [trained[name] for name in names])
    return [out.logits.detach(), *gradients]


def gate(models: dict[str, nn.Module], ids: Tensor) -> None:
    """Raises WrongResult unless ours is as near to fp64 as PEFT is, by the library's rule."""
    exact = _outputs(copy.deepcopy(models[PEFT]).double(), ids)
    for _ in range(2):  # packs compute together from the second time on
        found = {name: _outputs(models[name], ids) for name in (PEFT, OURS, BLOCKS)}
    for index, true in enumerate(exact):
        theirs, *ours = (error(outputs[index], true) for outputs in found.values())
        for name, mine in zip((OURS, BLOCKS), ours, strict=True):
            if not mine <= 2 * theirs + torch.finfo(found[name][index].dtype).eps:
                raise WrongResult(f"{name}: output {index}: error {mine:.2e}, PEFT's {theirs:.2e}")


def trainer(model: nn.Module, ids: Tensor) -> Callable[[], None]:
    trained = list(adapters(model).values())
    model.train()
    if not trained:
        model.enable_input_require_grads()
    optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        if optimizer:
            optimizer.step()
            optimizer.zero_grad()

    return step


def generator(model: nn.Module, ids: Tensor, tokens: int) -> Callable[[], None]:
    model.eval()
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}

    def step() -> None:
        with torch.no_grad():
            model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)

    return step


def calls_of(step: Callable[[], None]) -> int:
    """How many operators a step calls: what the host has to launch."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        step()
    return sum(
        event.cpu_parent is None or not event.cpu_parent.name.startswith("aten::")
        for event in profiler.events()
        if event.name.startswith(("aten::", "lora_kernels::"))
    )


def measure(
    table: str, what: str, steps: dict[str, Callable[[], None]], tokens: int, args, device
) -> list[dict]:
    turns = {}
    for name, step in steps.items():

        def turn(mark: Callable[[], None], step: Callable[[], None] = step) -> None:
            step()
            mark()

        turns[name] = turn
    found = interleaved(turns, device, args.seconds, tuple(args.rounds), hide_host=False)
    times = {name: [part[0] for part in parts] for name, parts in found.items()}
    return [
        {"table": table, "what": what, "peer": name,
         "tokens_s": round(tokens / statistics.median(spent), 2),
         "peak_mib": round(peak_bytes(steps[name], device) / 2**20, 2),
         "calls": calls_of(steps[name]), "rounds": len(spent),
         **summary(spent, times[FROZEN])}
        for name, spent in times.items()
    ]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    gpu = torch.cuda.is_available()
    parser.add_argument("--out", type=Path, help="result file (JSON), continued if it is there")
    parser.add_argument("--size", choices=SIZES, default="gpu" if gpu else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16" if gpu else "fp32")
    parser.add_argument("--seconds", type=float, default=15, help="of each of the two parts")
    parser.add_argument("--rounds", type=int, nargs=2, default=(3, 50), metavar=("MIN", "MAX"))
    parser.add_argument("--new-tokens", type=int, default=32, help="decoded in a round")
    parser.add_argument("--compiled", action="store_true", help="PEFT under torch.compile too")
    parser.add_argument("--minutes", type=float, default=3, help="time box, asked between parts")
    args = parser.parse_args(arguments)
    logging.set_verbosity_error()
    device, deadline = torch.device("cuda" if gpu else "cpu"), Deadline(args.minutes)
    info = machine(gpu)
    print(machine_line(info), flush=True)
    results = Results(args.out, info)
    base = base_model(args.size, DTYPES[args.dtype], device)
    models = {PEFT: make_peft(base, fp32=False), OURS: make_ours(base, fp32=False)}
    if args.dtype != "fp32":
        masters = {PEFT_FP32: make_peft(base, fp32=True), OURS_FP32: make_ours(base, fp32=True)}
        models = {**masters, **models}
    models[BLOCKS] = copy.deepcopy(models[OURS])
    fuse_blocks(models[BLOCKS])
    equalise(list(models.values()))
    *shape, batch, length = SIZES[args.size]
    ids = torch.randint(shape[5], (batch, length), device=device)
    gate(models, ids[:1, :64])
    models = {FROZEN: base, **models}
    name = f"{args.dtype}, {shape[2]} layers of width {shape[0]}"
    prompt = ids[:1, :8]
    for table, what, tokens, make in (
        ("generate", f"decode, batch 1, {name}", args.new_tokens,
         lambda model: generator(model, prompt, args.new_tokens)),
        ("train", f"training step, batch {batch} of {length}, {name}", batch * length,
         lambda model: trainer(model, ids)),
    ):  # fmt: skip
        if results.done({"table": table, "what": what}):
            continue
        if deadline.left() <= 0:
            print(f"time is over before: {what}; run again to go on")
            break
        steps = {peer: make(model) for peer, model in models.items()}
        if args.compiled and table == "train":
            compiled = copy.deepcopy(models[PEFT]).train()
            compiled.forward = torch.compile(compiled.forward)
            steps[PEFT_COMPILED] = make(compiled)
        rows = measure(table, what, steps, tokens, args, device)
        results.add(rows)
        print(what)
        for row in rows:
            print(f"    {row['peer']:22} {row['tokens_s']:10.1f} tokens/s  {row['ratio']:.3f}x"
                  f"  {row['peak_mib']:9.1f} MiB  {row['calls']:6} calls", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
