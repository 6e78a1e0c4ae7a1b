"""Serve many adapters of one base: requests of different users are decoded in one batch.

    python examples/serve_adapters.py

A small byte-level Llama learns Python's source code; each user's adapter is then trained on a page
of the language reference and saved as PEFT saves it. The service loads adapters while it runs,
answers a queue of requests in batches that mix them, and drops the one that was used longest ago
when there is no room. The same requests are then answered in PEFT's own way, and by merging one
adapter after the other.
"""

import argparse
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import peft
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lora_kernels import fuse_peft, unfuse_peft

PROMPT = 24


class Request(NamedTuple):
    user: str
    prompt: str


def train(model: torch.nn.Module, text: str, steps: int, rate: float) -> float:
    """The last loss of a few steps on a text."""
    ids = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, loss = torch.optim.AdamW(parameters, lr=rate), torch.tensor(0.0)
    model.train()
    for _ in range(steps):
        starts = torch.randint(0, max(1, len(ids) - 97), (8,))
        rows = torch.stack([ids[start : start + 96] for start in starts.tolist()])
        loss = model(input_ids=rows, labels=rows).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    return loss.item()


def make_base(width: int, steps: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=256, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=4,
        num_attention_heads=width // 32, max_position_embeddings=256, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    library = Path(argparse.__file__).parent
    code = "".join((library / f"{name}.py").read_text() for name in ("argparse", "typing", "ast"))
    loss = train(model, code, steps, 2e-3)
    print(f"base: {sum(p.numel() for p in model.parameters()):,} parameters, loss {loss:.2f}")
    return model


def make_adapters(base: LlamaForCausalLM, count: int, steps: int, folder: Path) -> dict[str, str]:
    """A PEFT file for each user; user -> the page that it was trained on."""
    pages = sorted((page for page in topics if len(topics[page]) > 400), key=len)[:count]
    for i, page in enumerate(pages):
        config = peft.LoraConfig(
            r=(4, 8, 16)[i % 3], lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        model = peft.get_peft_model(base, config)
        fuse_peft(model)
        train(model, topics[page], steps, 5e-3)
        model.save_pretrained(folder / f"user{i}")
        base = model.unload()
    return {f"user{i}": page for i, page in enumerate(pages)}


class Service:
    """One base, the adapters that are in memory, and a queue of requests."""

    def __init__(self, base: LlamaForCausalLM, folder: Path, room: int, tokens: int) -> None:
        self.base, self.folder, self.room, self.tokens = base, folder, room, tokens
        self.model: peft.PeftModel | None = None
        self.there: OrderedDict[str, None] = OrderedDict()

    def load(self, users: set[str]) -> None:
        """Brings the adapters of a batch into memory, in place of those not used for longest."""
        for user in sorted(users):
            if user in self.there:
                self.there.move_to_end(user)
                continue
            path = str(self.folder / user)
            if self.model is None:
                self.model = peft.PeftModel.from_pretrained(self.base, path, adapter_name=user)
                fuse_peft(self.model)
            else:
                self.model.load_adapter(path, adapter_name=user)
            self.there[user] = None
        while len(self.there) > max(self.room, len(users)):
            dropped, _ = self.there.popitem(last=False)
            assert self.model is not None
            self.model.delete_adapter(dropped)

    def batches(self, queue: list[Request], size: int) -> list[list[Request]]:
        return [queue[i : i + size] for i in range(0, len(queue), size)]

    @torch.no_grad()
    def answer(self, batch: list[Request]) -> list[bytes]:
        self.load({request.user for request in batch})
        assert self.model is not None
        self.model.eval()
        names = [request.user for request in batch]
        return decode(self.generate(batch, adapter_names=names))

    @torch.no_grad()
    def answer_merged(self, batch: list[Request]) -> list[bytes]:
        """One user after the other, with the adapter in the weights."""
        answers: dict[Request, bytes] = {}
        self.load({request.user for request in batch})
        assert self.model is not None
        for user in dict.fromkeys(request.user for request in batch):
            mine = [request for request in batch if request.user == user]
            self.model.set_adapter(user)
            self.model.eval()
            self.model.merge_adapter()
            answers |= zip(mine, decode(self.generate(mine)), strict=True)
            self.model.unmerge_adapter()
        return [answers[request] for request in batch]

    def generate(self, batch: list[Request], **options: object) -> Tensor:
        prompts = [list(r.prompt.encode()[:PROMPT].rjust(PROMPT)) for r in batch]
        ids = torch.tensor(prompts)
        assert self.model is not None
        return self.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=self.tokens,
            min_new_tokens=self.tokens, do_sample=False, **options,
        )  # fmt: skip


def decode(ids: Tensor) -> list[bytes]:
    return [bytes(row[PROMPT:].tolist()) for row in ids]


def timed(
    what: str, answer: Callable[[list[Request]], list[bytes]], batches: list[list[Request]],
    tokens: int,
) -> tuple[float, list[bytes]]:  # fmt: skip
    answers, latencies = [], []
    for batch in batches:
        begin = time.perf_counter()
        answers += answer(batch)
        latencies.append(time.perf_counter() - begin)
    total = sum(latencies)
    speed = sum(map(len, batches)) * tokens / total
    print(
        f"{what:38} {speed:7.0f} tokens/s, a batch {1e3 * total / len(batches):6.0f} ms"
        f" (slowest {1e3 * max(latencies):.0f})"
    )
    return total, answers


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--users", type=int, default=12)
    parser.add_argument("--room", type=int, default=8, help="adapters in memory")
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32, help="of an answer")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--steps", type=int, default=60, help="of training, base and adapters")
    parser.add_argument("--output", type=Path, default=Path("bench_output/users"))
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    base = make_base(options.width, options.steps)
    pages = make_adapters(base, options.users, options.steps, options.output)
    users = sorted(pages)
    queue = [
        Request(users[(7 * i + i // 5) % len(users)], topics[pages[users[i % len(users)]]][:PROMPT])
        for i in range(options.requests)
    ]
    service = Service(base, options.output, options.room, options.tokens)
    batches = service.batches(queue, options.batch_size)
    service.answer(batches[0])
    ours, answers = timed("mixed batches, fused", service.answer, batches, options.tokens)
    assert service.model is not None
    unfuse_peft(service.model)
    theirs, same = timed("mixed batches, PEFT's own", service.answer, batches, options.tokens)
    merged, alone = timed("merged one by one", service.answer_merged, batches, options.tokens)
    for what, others in (("PEFT's own", same), ("merged", alone)):
        equal = sum(a == b for a, b in zip(answers, others, strict=True))
        print(f"answers equal to those {what}: {equal} of {len(answers)}")
    print(f"{queue[0].user} ({pages[queue[0].user]}): {answers[0][:60]!r}")
    return {"fused": ours, "PEFT": theirs, "merged": merged}


if __name__ == "__main__":
    main()
