"""Fine-tune on a machine with little memory: an NF4 base beside a bf16 one and beside PEFT's.

    python examples/finetune_small_machine.py --out small_machine

A byte-level Llama in bf16 learns Python's source code for a moment and is saved, as Transformers
does and with `save_quantized`. Then each way gets a process of its own: it loads the base, trains
adapters on the language reference, and says what memory that took at most beside what Python and
torch take, how long a step was, and the loss on text that is held out. A plot shows all three.
"""

import argparse
import json
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lora_kernels import (
    apply_lora,
    load_quantized,
    lora_parameters,
    quantize_base,
    save_quantized,
)
from lora_kernels.tuning.machine import machine

OURS, DENSE, PEFT = "NF4", "bf16", "PEFT, bitsandbytes NF4"
BASE, CODED = "base", "base-nf4.safetensors"
LENGTH, ROWS = 128, 4
OPTIONS = {"r": 16, "alpha": 32}


def batch(text: Tensor, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(len(text) - LENGTH, (ROWS,), generator=generator)
    return torch.stack([text[start : start + LENGTH] for start in starts.tolist()])


def as_bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids).logits.float()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, text: Tensor, steps: range
) -> list[float]:
    """Seconds of each step."""
    seconds = []
    for step in steps:
        begin = time.perf_counter()
        loss_of(model, batch(text, step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - begin)
    return seconds


def make_base(folder: Path, width: int, layers: int, steps: int) -> None:
    config = LlamaConfig(
        vocab_size=256, hidden_size=width, intermediate_size=11 * width // 4,
        num_hidden_layers=layers, num_attention_heads=width // 64, max_position_embeddings=LENGTH,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).bfloat16()
    library = Path(argparse.__file__).parent
    code = as_bytes("".join((library / f"{n}.py").read_text() for n in ("argparse", "typing")))
    optimizer = torch.optim.Adafactor(model.parameters(), lr=1e-2)  # whose state is small
    for step in range(steps):
        loss = loss_of(model, batch(code, step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    count = sum(p.numel() for p in model.parameters())
    print(f"base: {count:,} parameters, loss {loss.item():.2f}", flush=True)
    model.save_pretrained(folder / BASE)
    print(quantize_base(model, "nf4", progress=False), flush=True)
    save_quantized(model, folder / CODED)


def load(way: str, folder: Path) -> tuple[nn.Module, list[nn.Parameter]]:
    """The model with new adapters, and what is trained of it."""
    if way == PEFT:
        import peft
        from transformers import BitsAndBytesConfig

        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )  # fmt: skip
        base = AutoModelForCausalLM.from_pretrained(
            folder / BASE, quantization_config=quantization, dtype=torch.bfloat16, device_map="cpu"
        )
        config = peft.LoraConfig(
            r=OPTIONS["r"], lora_alpha=OPTIONS["alpha"], target_modules="all-linear"
        )
        model = peft.get_peft_model(base, config)
        return model, [p for p in model.parameters() if p.requires_grad]
    if way == DENSE:
        model = AutoModelForCausalLM.from_pretrained(folder / BASE, dtype=torch.bfloat16)
    else:
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(folder / BASE), dtype=torch.bfloat16
            )
        load_quantized(model, folder / CODED)
    apply_lora(model, OPTIONS["r"], alpha=OPTIONS["alpha"])
    return model, list(lora_parameters(model))


def peak_mib() -> float:
    """Of this program; what getrusage says begins with the peak of the one that started it."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024
    except OSError:  # no Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def run(way: str, folder: Path, steps: int) -> dict[str, float | list[float]]:
    """In a process of its own."""
    text = as_bytes("".join(topics[name] for name in sorted(topics)))
    held_out, text = text[: len(text) // 10], text[len(text) // 10 :]
    if way == PEFT:
        import bitsandbytes  # noqa: F401 as torch, before the memory is looked at
        import peft  # noqa: F401
    torch.zeros(8, 8) @ torch.zeros(8, 8)
    before = peak_mib()
    torch.manual_seed(0)
    model, parameters = load(way, folder)
    loaded = peak_mib() - before
    losses = []
    seconds: list[float] = []
    optimizer, quarter = torch.optim.AdamW(parameters, lr=2e-3), max(1, steps // 4)
    for first in range(0, 4 * quarter, quarter):
        seconds += train(model.train(), optimizer, text, range(first, first + quarter))
        with torch.no_grad():
            ids = torch.cat([batch(held_out, -step) for step in range(1, 4)])
            losses.append(loss_of(model, ids).item())
    return {
        "loaded_mib": round(loaded, 1), "peak_mib": round(peak_mib() - before, 1),
        "seconds": round(sorted(seconds)[len(seconds) // 2], 3), "losses": losses,
    }  # fmt: skip


def plot(found: dict[str, dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (memory, speed, loss) = plt.subplots(1, 3, figsize=(12, 3.6))
    names = list(found)
    short = [name.replace(", ", ",\n") for name in names]
    memory.bar(short, [found[name]["peak_mib"] for name in names], color="0.8", label="training")
    memory.bar(short, [found[name]["loaded_mib"] for name in names], color="C0", label="loaded")
    memory.set_title("peak memory, MiB")
    memory.legend()
    speed.bar(short, [found[name]["seconds"] for name in names])
    speed.set_title("a step, s")
    for name in names:
        loss.plot(range(1, 5), found[name]["losses"], marker="o", label=name)
    loss.set_title("held-out loss, by quarters")
    loss.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> dict[str, dict]:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("small_machine"))
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--base-steps", type=int, default=20)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--ways", nargs="+", default=[DENSE, OURS, PEFT])
    parser.add_argument("--way", help=argparse.SUPPRESS)  # of a process
    options = parser.parse_args(arguments)
    if options.way is not None:
        print(json.dumps(run(options.way, options.out, options.steps)))
        return {}
    options.out.mkdir(parents=True, exist_ok=True)
    make_base(options.out, options.width, options.layers, options.base_steps)
    found = {}
    for way in options.ways:
        command = [sys.executable, __file__, "--out", options.out, "--steps", options.steps]
        done = subprocess.run(
            [*map(str, command), "--way", way], capture_output=True, text=True, check=False
        )
        if done.returncode:
            print(f"{way}: left out, {done.stderr.strip().splitlines()[-1]}")
            continue
        found[way] = one = json.loads(done.stdout.splitlines()[-1])
        print(
            f"{way:24} {one['loaded_mib']:7.0f} MiB loaded, {one['peak_mib']:7.0f} MiB at most,"
            f" {one['seconds']:6.2f} s a step, held-out loss {one['losses'][-1]:.3f}",
            flush=True,
        )
    plot(found, options.out / "small_machine.png")
    result = {"machine": machine(gpu=False), "options": vars(options) | {"out": ""}, "ways": found}
    (options.out / "small_machine.json").write_text(json.dumps(result, indent=1) + "\n")
    return found


if __name__ == "__main__":
    main()
