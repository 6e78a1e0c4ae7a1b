"""Fine-tune with LoRA in several processes (FSDP2), killed and resumed at will.

    torchrun --nproc-per-node 2 examples/finetune_distributed.py
    torchrun --nproc-per-node 2 --max-restarts 3 examples/finetune_distributed.py  # starts it again

The same command again goes on from the newest complete checkpoint and gives, bit for bit, the
losses of a run that nobody stopped. On CUDA devices it takes nccl, elsewhere gloo. The text is the
standard library's documentation; `build_model` is where your model goes.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from corpus import documentation, held_out, sequences, train_tokenizer
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from lora_kernels import apply_lora, lora_parameters, save_adapter

KEPT_CHECKPOINTS = 2


def build_model(vocabulary: int, length: int) -> nn.Module:
    """The frozen base: from a seed here, so that every process has the same one."""
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=length,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def prepare_data(out: Path, vocabulary: int, length: int, limit: int) -> tuple[Tensor, Tensor]:
    """(training, held-out) sequences. Made by one rank, once: a run that goes on finds its own."""
    path = out / "sequences.pt"
    if dist.get_rank() == 0 and not path.exists():
        train, test = held_out(documentation()[:limit])
        tokenizer = train_tokenizer(train, vocabulary)
        tokenizer.save(str(out / "tokenizer.json"))
        data = [sequences(tokenizer, text, length, 4096) for text in (train, test)]
        torch.save(data, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)  # all of it or nothing
    dist.barrier()
    train, test = torch.load(path)
    return train, test


def batches(data: Tensor, first: int, size: int) -> Iterator[Tensor]:
    """This rank's rows of each batch from position `first` on, endlessly. The order follows from
    the position alone, whatever the number of ranks."""
    rank, world = dist.get_rank(), dist.get_world_size()
    epoch, order = -1, data
    while True:
        rows = []
        for position in range(first, first + size):
            if position // len(data) != epoch:
                epoch = position // len(data)
                order = torch.randperm(len(data), generator=torch.Generator().manual_seed(epoch))
            rows.append(int(order[position % len(data)]))
        yield data[rows[rank::world]]
        first += size


class Training:
    """What a run needs to go on as if nothing had happened, and its sharded checkpoints: adapters,
    optimizer, step, data position, losses, and every rank's generator."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int):
        self.model, self.optimizer = model, optimizer
        self.step = self.position = 0
        self.losses = torch.zeros(steps, dtype=torch.float64)

    def _state(self) -> dict:
        trained = StateDictOptions(ignore_frozen_params=True)
        return {
            "model": get_model_state_dict(self.model, options=trained),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer),
            "progress": torch.tensor([self.step, self.position]),
            "losses": self.losses,
            f"generator of rank {dist.get_rank()}": self._generator(),
        }

    def _generator(self) -> Tensor:
        return torch.cuda.get_rng_state() if torch.cuda.is_available() else torch.get_rng_state()

    def save(self, folder: Path) -> None:
        dcp.save(self._state(), checkpoint_id=folder / f"step-{self.step:06}")
        if dist.get_rank() == 0:
            for old in complete_checkpoints(folder)[:-KEPT_CHECKPOINTS]:
                shutil.rmtree(old)

    def resume(self, folder: Path) -> None:
        """From the newest checkpoint that is complete; from the beginning where there is none."""
        newest = [complete_checkpoints(folder)[-1:]]
        dist.broadcast_object_list(newest)  # one rank's view of the disk decides for all
        if not newest[0]:
            return
        (path,) = newest[0]
        state = self._state()
        known = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        if known["losses"].size != self.losses.shape:
            (steps,) = known["losses"].size
            raise ValueError(f"--steps: {path} is of {steps} steps, got {len(self.losses)}")
        generator = f"generator of rank {dist.get_rank()}"
        if generator not in known:  # more ranks than saved it: this one keeps its own
            del state[generator]
        dcp.load(state, checkpoint_id=path)
        set_model_state_dict(self.model, state["model"], options=StateDictOptions(strict=False))
        set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"])
        self.step, self.position = state["progress"].tolist()
        if generator in state:
            cuda = torch.cuda.is_available()
            (torch.cuda if cuda else torch).set_rng_state(state[generator])
        if dist.get_rank() == 0:
            say(f"resumed from {path}")


def complete_checkpoints(folder: Path) -> list[Path]:
    """Oldest first. The metadata is written last, so a save that was cut short has none."""
    return sorted(path.parent for path in folder.glob("step-*/.metadata"))


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids).loss


@torch.no_grad()
def held_out_loss(model: nn.Module, data: Tensor, device: torch.device) -> float:
    """Mean over all ranks' rows."""
    model.eval()
    rows = data[dist.get_rank() :: dist.get_world_size()].to(device)
    total = torch.stack([loss_of(model, rows) * len(rows), torch.tensor(len(rows), device=device)])
    dist.all_reduce(total)
    model.train()
    return (total[0] / total[1]).item()


def say(line: str) -> None:
    """In one write, so that the lines of several processes stay whole."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def start_processes(backend: str) -> tuple[int, int]:
    """init_process_group, each attempt with keys of its own: torchrun keeps one store through its
    restarts, in which gloo would find the addresses of the workers that died."""
    store, rank, world = next(dist.rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"attempt {attempt}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    return rank, world


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("demo_output/distributed"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--save-every", type=int, default=20, help="steps between checkpoints")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences of all ranks together")
    parser.add_argument("--length", type=int, default=64, help="tokens in a sequence")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--vocabulary", type=int, default=512)
    parser.add_argument("--documents", type=int, default=400)
    args = parser.parse_args()

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    rank, world = start_processes("nccl" if cuda else "gloo")
    if args.batch_size % world:
        raise SystemExit(
            f"--batch-size: expected a multiple of {world} ranks, got {args.batch_size}"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    train, test = prepare_data(args.out, args.vocabulary, args.length, args.documents)

    model = build_model(args.vocabulary, args.length).to(device)
    apply_lora(model, args.rank, alpha=2 * args.rank, dropout=0.05)
    mesh = init_device_mesh(device.type, (world,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=args.lr)
    torch.manual_seed(1 + rank)  # every rank drops other elements of its own rows

    run = Training(model, optimizer, args.steps)
    run.resume(args.out)
    say(f"rank {rank} of {world}: process {os.getpid()}, from step {run.step}")
    data = batches(train, run.position, args.batch_size)
    model.train()
    while run.step < args.steps:
        loss = loss_of(model, next(data).to(device))
        loss.backward()
        nn.utils.clip_grad_norm_(lora_parameters(model), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach()
        dist.all_reduce(mean, dist.ReduceOp.SUM)
        run.losses[run.step] = mean.item() / world
        run.step, run.position = run.step + 1, run.position + args.batch_size
        if rank == 0:
            say(f"step {run.step}: loss {run.losses[run.step - 1]:.4f}")
        if run.step % args.save_every == 0 or run.step == args.steps:
            run.save(args.out)

    final = held_out_loss(model, test, device)
    save_adapter(model, args.out / "adapter")  # all ranks take part, one writes
    if rank == 0:
        result = {"losses": run.losses.tolist(), "held-out loss": final}
        (args.out / "result.json").write_text(json.dumps(result))
        say(f"held-out loss {final:.4f}; adapter in {args.out / 'adapter'}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    # Threads of gloo and autograd may still hold tensors, and an interpreter that ends around them
    # aborts now and then (seen with torch 2.11 and 2.13). Everything is written.
    sys.stdout.flush()
    os._exit(0)
