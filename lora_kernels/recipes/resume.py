"""The state of a training run, and its file: what it takes to continue with identical results."""

import dataclasses
import os
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.files import replace_atomically

_FORMAT = 1


@dataclass
class Run:
    """A run of `train_model`: its parts, and how far it is (`batches` of the current epoch)."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any
    scaler: torch.amp.GradScaler
    loader: Iterable
    history: Any
    accumulation_steps: int
    epoch: int = 0
    batches: int = 0
    # Generators as they were when the epoch began: they fix the order of its data.
    epoch_random: dict | None = None

    def epoch_batches(self) -> Iterator:
        """The batches of the current epoch that are still to come."""
        now = _get_random(self.loader)
        if self.batches == 0:
            self.epoch_random = now
        else:
            _set_random(self.epoch_random, self.loader)
        iterator = iter(self.loader)
        for seen in range(self.batches):
            if next(iterator, None) is None:
                raise ValueError(
                    f"train_loader: gave {seen} batches, but {self.batches} were seen before the"
                    " checkpoint; resume with the same data"
                )
        if self.batches:
            _set_random(now, self.loader)
        elif (first := next(iterator, None)) is None:
            raise ValueError(f"train_loader: gave no batch in epoch {self.epoch + 1}")
        else:
            yield first
        yield from iterator

    def end_epoch(self) -> None:
        self.epoch, self.batches, self.epoch_random = self.epoch + 1, 0, None

    def _tensors(self) -> dict[str, Tensor]:
        """What training changes in the model: trained parameters and persistent buffers."""
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        persistent = self.model.state_dict(keep_vars=True)
        buffers = {n: b for n, b in self.model.named_buffers() if n in persistent}
        return {name: tensor.detach() for name, tensor in (trained | buffers).items()}

    def save(self, path: str | os.PathLike) -> None:
        state = {
            "format": _FORMAT,
            "tensors": self._tensors(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "history": dataclasses.asdict(self.history),
            "accumulation_steps": self.accumulation_steps,
            "epoch": self.epoch,
            "batches": self.batches,
            "epoch_random": self.epoch_random,
            "random": _get_random(self.loader),
        }
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_atomically(path, lambda temporary: torch.save(state, temporary))

    @torch.no_grad()
    def load(self, path: str | os.PathLike) -> None:
        """Checks everything that can be checked, then changes model, optimizer and generators."""
        if not Path(path).exists():
            raise FileNotFoundError(f"resume_from: {path}: no such file")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or state.get("format") != _FORMAT:
            raise ValueError(f"resume_from: {path} is no checkpoint of train_model")
        if state["accumulation_steps"] != self.accumulation_steps:
            raise ValueError(
                f"accumulation_steps: {path} was written with {state['accumulation_steps']},"
                f" got {self.accumulation_steps}"
            )
        for name, value in (("scheduler", self.scheduler), ("scaler", self.scaler.state_dict())):
            if bool(state[name]) != bool(value):
                had = "was written with" if state[name] else "was written without"
                what = "a scheduler" if name == "scheduler" else "autocast_dtype=torch.float16"
                raise ValueError(f"resume_from: {path} {had} {what}, this run is not")
        present = self._tensors()
        if unmatched := sorted(present.keys() ^ state["tensors"].keys()):
            raise ValueError(
                f"resume_from: model and {path} do not train the same parameters; {unmatched[0]} is"
                f" only in the {'model' if unmatched[0] in present else 'file'}"
            )
        for name, tensor in state["tensors"].items():
            if tensor.shape != present[name].shape:
                raise ValueError(
                    f"resume_from: {name} has shape {tuple(tensor.shape)} in {path},"
                    f" {tuple(present[name].shape)} in the model"
                )
        self.optimizer.load_state_dict(state["optimizer"])
        for name, tensor in state["tensors"].items():
            present[name].copy_(tensor)
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        self.history = type(self.history)(**state["history"])
        self.epoch, self.batches = state["epoch"], state["batches"]
        self.epoch_random = state["epoch_random"]
        _set_random(state["random"], self.loader)


def _generators(loader: Iterable) -> list[torch.Generator]:
    """The loader's own generators; a DataLoader shares one with its sampler."""
    owners = (loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None))
    found = [getattr(owner, "generator", None) for owner in owners]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


def _get_random(loader: Iterable) -> dict:
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "python": random.getstate(),
        "loader": [generator.get_state() for generator in _generators(loader)],
    }


def _set_random(state: dict, loader: Iterable) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    random.setstate(state["python"])
    for generator, value in zip(_generators(loader), state["loader"], strict=False):
        generator.set_state(value)
