"""Train many adapters of one base in one step: each has its own data, optimizer and loss.

    python examples/train_adapters.py

A small byte-level Llama learns Python's source code; then each user's adapter is trained on a page
of the language reference, all users in one batch. The same is done with one user after the other:
once in a batch of the same shape, in which the rows of the other users are nobody's, where what an
adapter becomes is the same bit for bit, and once each with a batch of its own rows alone.
"""

import argparse
import copy
import time
from collections.abc import Callable, Sequence
from pydoc_data.topics import topics
from typing import NamedTuple

import torch
from serve_adapters import make_base
from torch import Tensor, nn
from torch.nn import functional as F

from lora_kernels import adapter_rows, add_adapter, lora_parameters, set_adapter

LENGTH = 96


class User(NamedTuple):
    name: str
    rank: int
    rate: float
    text: Tensor  # bytes

    def batch(self, step: int, rows: int) -> Tensor:
        """The same in every run."""
        generator = torch.Generator().manual_seed(1000 * step + self.rank)
        starts = torch.randint(len(self.text) - LENGTH, (rows,), generator=generator)
        return torch.stack([self.text[start : start + LENGTH] for start in starts.tolist()])


def make_users(count: int) -> list[User]:
    pages = sorted((page for page in topics if len(topics[page]) > 800), key=len)[:count]
    return [
        User(
            f"user{i}", 4 + 2 * i, (2e-3, 5e-3)[i % 2],
            torch.frombuffer(bytearray(topics[page].encode()), dtype=torch.uint8).long(),
        )
        for i, page in enumerate(pages)
    ]  # fmt: skip


def add_adapters(base: nn.Module, users: Sequence[User]) -> nn.Module:
    """A copy of the base with an adapter of each user, equal in every call."""
    model = copy.deepcopy(base)
    for user in users:
        torch.manual_seed(user.rank)
        add_adapter(model, user.name, user.rank, alpha=16)
    return model.train()


def losses(logits: Tensor, ids: Tensor, rows: int) -> Tensor:
    """The mean loss of each user, whose rows lie together."""
    each = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    return each.view(-1, rows * (LENGTH - 1)).mean(1)


class Optimizers:
    """One of each user, with a state of its own."""

    def __init__(self, model: nn.Module, users: Sequence[User]) -> None:
        self.of = [
            torch.optim.AdamW(lora_parameters(model, adapter=user.name), lr=user.rate)
            for user in users
        ]

    def step(self) -> None:
        for one in self.of:
            one.step()
            one.zero_grad()


def train_together(
    model: nn.Module, users: Sequence[User], steps: int, rows: int, only: User | None = None
) -> Tensor:
    """The losses [steps, users] of batches that hold rows of all; with `only`, those of the others
    are bytes of zero and nobody's."""
    optimizers, found = Optimizers(model, users), []
    names = [user.name if only in (None, user) else None for user in users for _ in range(rows)]
    for step in range(steps):
        ids = torch.cat([
            user.batch(step, rows) if only in (None, user) else torch.zeros(rows, LENGTH).long()
            for user in users
        ])  # fmt: skip
        with adapter_rows(model, names):
            of_users = losses(model(input_ids=ids).logits, ids, rows)
        mine = of_users if only is None else of_users[users.index(only)]
        mine.sum().backward()
        optimizers.step()
        found.append(of_users.detach())
    return torch.stack(found)


def train_alone(model: nn.Module, user: User, steps: int, rows: int) -> Tensor:
    """The losses [steps, 1] of one user's rows alone, the adapter in use."""
    optimizers, found = Optimizers(model, [user]), []
    set_adapter(model, user.name)
    for step in range(steps):
        ids = user.batch(step, rows)
        loss = losses(model(input_ids=ids).logits, ids, rows)
        loss.sum().backward()
        optimizers.step()
        found.append(loss.detach())
    return torch.stack(found)


def timed(what: str, train: Callable[[], Tensor], tokens: int) -> tuple[float, Tensor]:
    begin = time.perf_counter()
    found = train()
    seconds = time.perf_counter() - begin
    print(f"{what:44} {seconds:6.1f} s, {tokens / seconds:7.0f} tokens/s")
    return seconds, found


def parameters(model: nn.Module, user: User) -> Tensor:
    return torch.cat([p.detach().flatten() for p in lora_parameters(model, adapter=user.name)])


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--users", type=int, default=8)
    parser.add_argument("--rows", type=int, default=2, help="of each user in a batch")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--base-steps", type=int, default=60)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    base, users = make_base(options.width, options.base_steps), make_users(options.users)
    steps, rows = options.steps, options.rows
    tokens = len(users) * rows * LENGTH * steps

    together = add_adapters(base, users)
    first, found = timed(
        f"{len(users)} adapters in one step",
        lambda: train_together(together, users, steps, rows),
        tokens,
    )
    alone = add_adapters(base, users)
    second, apart = timed(
        "one adapter after the other",
        lambda: torch.cat([train_alone(alone, user, steps, rows) for user in users], 1),
        tokens,
    )
    equal = 0
    for user in users:
        isolated = add_adapters(base, users)
        train_together(isolated, users, steps, rows, only=user)
        equal += torch.equal(parameters(isolated, user), parameters(together, user))
    print(f"bit-equal to a run among rows of nobody: {equal} of {len(users)} adapters")
    off = float((found - apart).abs().max() / apart.abs().max())
    print(f"losses of a run of its own rows alone differ by at most {off:.1e} of the largest")
    for i, user in enumerate(users):
        print(
            f"{user.name} rank {user.rank:2} rate {user.rate:g}:"
            f" loss {found[0, i]:.3f} -> {found[-1, i]:.3f}, alone {apart[-1, i]:.3f}"
        )
    return {"ratio": second / first, "equal": equal, "off": off}


if __name__ == "__main__":
    main()
