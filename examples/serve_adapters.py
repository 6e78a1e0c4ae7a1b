"""Serve many adapters of one base: requests of different users are decoded in one batch.

    python examples/serve_adapters.py

A small byte-level Llama learns Python's source code; each user's adapter is then trained on a page
of the language reference and saved as PEFT saves it. The service loads adapters while it runs,
answers a queue of requests in batches that mix them, and drops the one that was used longest ago
when there is no room. The same requests are then answered in PEFT's own way, by merging one adapter
after the other, and by Transformers' continuous batching, in which every step holds the tokens of
whichever requests are under way and adapters come and go between two steps.
"""

import argparse
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import peft
import torch
from torch import Tensor
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from lora_kernels import (
    Groups,
    adapter_names,
    adapter_rows,
    delete_adapter,
    fuse_peft,
    load_adapter,
    unfuse_peft,
)

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
        ids = torch.tensor([prompt_of(request) for request in batch])
        assert self.model is not None
        return self.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=self.tokens,
            min_new_tokens=self.tokens, do_sample=False, **options,
        )  # fmt: skip


class Continuous:
    """The same by layers of this library and Transformers' continuous batching."""

    def __init__(self, base: LlamaForCausalLM, folder: Path, room: int, tokens: int) -> None:
        self.model, self.folder, self.room = base.eval(), folder, room
        self.config = GenerationConfig(
            max_new_tokens=tokens, do_sample=False, pad_token_id=0, eos_token_id=-1
        )
        # Requests under way by user, the users not asked for longest first; the user of each.
        self.under_way: OrderedDict[str, int] = OrderedDict()
        self.user_of: dict[str, str] = {}
        self.changing = threading.Lock()  # adapters, between two steps
        self.latencies: list[float] = []

    def answer(self, queue: list[Request]) -> list[bytes]:
        waiting, numbers = list(enumerate(queue)), {}
        begun, answers = {}, [b""] * len(queue)
        plain = self.model.forward
        manager = self.model.init_continuous_batching(
            self.config,
            ContinuousBatchingConfig(page_size=32, num_blocks=128, max_batch_tokens=256),
        )

        def forward(*args: object, cu_seq_lens_q: Tensor, **kwargs: object) -> object:
            """A step: tokens [1, T] of the requests, one after the other."""
            requests = manager.batch_processor.inputs_and_outputs.requests_in_batch
            users = [self.user_of[request.state.request_id] for request in requests]
            lengths = cu_seq_lens_q.diff().tolist()[: len(users)]
            with self.changing:
                table = adapter_names(self.model)
                groups = Groups.from_names(users, table, lengths)
                with adapter_rows(self.model, groups, table):
                    return plain(*args, cu_seq_lens_q=cu_seq_lens_q, **kwargs)

        self.model.forward = forward  # type: ignore[method-assign]
        manager.start()
        try:
            while waiting or numbers:
                for number, request in list(waiting):
                    if not self.make_room(request.user):
                        continue
                    waiting.remove((number, request))
                    name = f"request{number}"
                    self.user_of[name], numbers[name] = request.user, number
                    begun[name] = time.perf_counter()
                    manager.add_request(prompt_of(request), request_id=name)
                result = manager.get_result(timeout=60)
                if result is None or result.error is not None:
                    raise RuntimeError(f"no answer: {result and result.error}")
                answers[numbers.pop(result.request_id)] = bytes(result.generated_tokens)
                self.under_way[self.user_of[result.request_id]] -= 1
                self.latencies.append(time.perf_counter() - begun[result.request_id])
        finally:
            manager.stop(block=True)
            self.model.forward = plain  # type: ignore[method-assign]
        return answers

    def make_room(self, user: str) -> bool:
        """Whether the user's adapter is there, in place of one that nobody waits for if need be."""
        if user not in self.under_way:
            idle = [other for other, count in self.under_way.items() if count == 0]
            if len(self.under_way) >= self.room and not idle:
                return False
            with self.changing:
                if len(self.under_way) >= self.room:
                    delete_adapter(self.model, idle[0])
                    del self.under_way[idle[0]]
                load_adapter(self.model, self.folder / user, adapter=user)
            self.under_way[user] = 0
        self.under_way[user] += 1
        self.under_way.move_to_end(user)
        return True


def prompt_of(request: Request) -> list[int]:
    return list(request.prompt.encode()[:PROMPT].rjust(PROMPT))


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
    base = service.model.unload()
    continuous = Continuous(base, options.output, options.room, options.tokens)
    begin = time.perf_counter()
    packed = continuous.answer(queue)
    seconds = time.perf_counter() - begin
    print(
        f"{'continuous batching, adapters by name':38} {len(queue) * options.tokens / seconds:7.0f}"
        f" tokens/s, a request {1e3 * sum(continuous.latencies) / len(queue):6.0f} ms"
        f" (slowest {1e3 * max(continuous.latencies):.0f})"
    )
    for what, others in (("PEFT's own", same), ("merged", alone), ("continuous", packed)):
        equal = sum(a == b for a, b in zip(answers, others, strict=True))
        print(f"answers equal to those {what}: {equal} of {len(answers)}")
    print(f"{queue[0].user} ({pages[queue[0].user]}): {answers[0][:60]!r}")
    return {"fused": ours, "PEFT": theirs, "merged": merged, "continuous": seconds}


if __name__ == "__main__":
    main()
