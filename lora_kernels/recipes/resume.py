"""The state of a training run, and its file: what it takes to continue with identical results."""

import dataclasses
import math
import os
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.serialization import config

from lora_kernels.files import replace_atomically
from lora_kernels.packs import check_packs, load_packs, packs_state
from lora_kernels.recipes.history import History
from lora_kernels.recipes.reading import (
    is_number,
    read,
    require,
    require_count,
    require_like,
    require_tensor,
)
from lora_kernels.recipes.trial import state_after_a_step, step_problem
from lora_kernels.recipes.undo import Undo, moving_tensors

_FORMAT = 3


@dataclass
class Run:
    """A run of `train_model`: its parts, and how far it is (`batches` of the current epoch).

    epochs, max_steps: where it ends.
    measured: names of what evaluations give.
    best: None, or {"value": what was measured, "tensors": what `moving_tensors` held then}.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any
    scaler: torch.amp.GradScaler
    loader: Iterable[Any]
    history: History
    accumulation_steps: int
    epochs: int
    max_steps: int | None
    measured: tuple[str, ...] = ()
    epoch: int = 0
    batches: int = 0
    # Generators as they were when the epoch began: they fix the order of its data.
    epoch_random: dict[str, Any] | None = None
    best: dict[str, Any] | None = None
    # What a resumed epoch has not seen yet.
    remaining: Iterator[Any] | None = None

    @property
    def done(self) -> bool:
        steps = math.inf if self.max_steps is None else self.max_steps
        ended = self.epoch >= self.epochs or len(self.history) >= steps
        return ended or self.history.stopped is not None

    def stop(self, reason: str) -> None:
        """Ends the run after the current step; `History.stopped` says why."""
        self.history.stopped = reason

    def epoch_batches(self) -> Iterator[Any]:
        """The batches of the current epoch that are still to come."""
        if self.batches:
            assert self.remaining is not None  # of a run that was loaded
            yield from self.remaining
            return
        self.epoch_random = _get_random(self.loader)
        iterator = iter(self.loader)
        if (first := next(iterator, None)) is None:
            raise ValueError(f"train_loader: gave no batch in epoch {self.epoch + 1}")
        yield first
        yield from iterator

    def end_epoch(self) -> None:
        self.epoch, self.batches, self.epoch_random = self.epoch + 1, 0, None

    def tensors(self) -> dict[str, Tensor]:
        return {name: t.detach() for name, t in moving_tensors(self.model).items()}

    def keep_best(self, value: float) -> None:
        kept = {name: tensor.clone() for name, tensor in self.tensors().items()}
        self.best = {"value": value, "tensors": kept}

    @torch.no_grad()
    def restore_best(self) -> None:
        assert self.best is not None  # or there is nothing to restore
        present = self.tensors()
        for name, tensor in self.best["tensors"].items():
            present[name].copy_(tensor)

    # ---------------------------------------------------------------------------------------- file

    def save(self, path: str | os.PathLike[str]) -> None:
        state = {
            "format": _FORMAT,
            "tensors": self.tensors(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "history": dataclasses.asdict(self.history),
            "best": self.best,
            "packs": packs_state(self.model),
            "accumulation_steps": self.accumulation_steps,
            "epoch": self.epoch,
            "batches": self.batches,
            "epoch_random": self.epoch_random,
            "random": _get_random(self.loader),
        }
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with config.patch(  # type: ignore[attr-defined]  # torch puts it there at import
            "save.compute_crc32", True
        ):
            replace_atomically(path, lambda temporary: torch.save(state, temporary))

    def load(self, path: str | os.PathLike[str]) -> None:
        """Checks everything, then changes model, optimizer, scheduler and generators, or nothing.

        Raises:
            FileNotFoundError: no such file. ValueError: names the file and what is wrong with it.
        """
        try:
            state = read(path)
            self._check(state)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"resume_from: {error}") from None
        except Exception as error:
            raise ValueError(f"resume_from: {path}: {error}") from error
        comparable = step_problem(self.optimizer, self.scheduler) is None
        before = _get_random(self.loader)
        try:
            self.remaining = _seek(self.loader, state["epoch_random"], state["batches"])
            with Undo(self.model, self.optimizer, self.scheduler):
                try:
                    self._apply(state)
                except Exception as error:  # of the optimizer's or the scheduler's own reading
                    raise ValueError(f"resume_from: {path}: cannot be loaded ({error})") from error
                # What cannot make a step as this run has it says nothing about the file.
                if comparable and not self.done:
                    problem = step_problem(self.optimizer, self.scheduler)
                    require(problem is None, f"resume_from: {path}: {problem}")
            load_packs(self.model, state["packs"])
        except BaseException:
            _set_random(before, self.loader)
            raise

    @torch.no_grad()
    def _apply(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        present = self.tensors()
        for name, tensor in state["tensors"].items():
            present[name].copy_(tensor)
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        self.history = type(self.history)(**(state["history"] | {"stopped": None}))
        self.epoch, self.batches = state["epoch"], state["batches"]
        self.epoch_random, self.best = state["epoch_random"], state["best"]
        _set_random(state["random"], self.loader)

    def _check(self, state: Any) -> None:
        """ValueError for what this run could not have written."""
        require(isinstance(state, dict) and "format" in state, "is no checkpoint of train_model")
        require(
            isinstance(state["format"], int) and state["format"] == _FORMAT,
            f"is a checkpoint of another version (format {state['format']!r}, read is {_FORMAT})",
        )
        for key in (
            "tensors", "optimizer", "scheduler", "scaler", "history", "best", "packs",
            "accumulation_steps", "epoch", "batches", "epoch_random", "random",
        ):  # fmt: skip
            require(key in state, f"has no {key!r}")
        require_count("epoch", state["epoch"])
        require_count("batches", state["batches"])
        require_count("accumulation_steps", state["accumulation_steps"], 1)
        require(
            state["accumulation_steps"] == self.accumulation_steps,
            f"accumulation_steps: was written with {state['accumulation_steps']},"
            f" got {self.accumulation_steps}",
        )
        self._check_tensors("", state["tensors"])
        scheduler = None if self.scheduler is None else self.scheduler.state_dict()
        for name, value, what in (
            ("scheduler", scheduler, "a scheduler"),
            ("scaler", self.scaler.state_dict(), "autocast_dtype=torch.float16"),
        ):
            had = "with" if state[name] else "without"
            same = bool(state[name]) == bool(value)
            require(same, f"was written {had} {what}, this run is not")
            require_like(name, state[name], value)
        self._check_optimizer(state["optimizer"])
        require(not state["scaler"] or state["scaler"]["scale"] > 0, "scaler: its scale is not > 0")
        self._check_history(state["history"])
        if state["best"] is not None:
            require_like("best", state["best"], {"value": 0.0, "tensors": {}})
            self._check_tensors("best: ", state["best"]["tensors"])
        check_packs(self.model, state["packs"])
        _check_random("random", state["random"], self.loader)
        if state["batches"]:
            _check_random("epoch_random", state["epoch_random"], self.loader)

    def _check_tensors(self, where: str, tensors: Any) -> None:
        require(isinstance(tensors, dict), f"{where}tensors: expected a mapping")
        present = moving_tensors(self.model)
        for name in (*present, *tensors):
            require(
                name in present and name in tensors,
                f"{where}does not train the same parameters as the model; {name} is only in the"
                f" {'model' if name in present else 'file'}",
            )
        for name, like in present.items():
            require_tensor(where + name, tensors[name], like)
            finite = not like.requires_grad or bool(tensors[name].isfinite().all())
            require(finite, f"{where}{name} holds values that are inf or nan")

    def _check_optimizer(self, state: Any) -> None:
        groups = self.optimizer.state_dict()["param_groups"]
        require_like("optimizer", state, {"param_groups": groups, "state": {}})
        for group, present in zip(state["param_groups"], groups, strict=True):
            require(
                group["params"] == present["params"],
                "optimizer: holds its parameters in other groups",
            )
        numbers = {number for group in groups for number in group["params"]}
        expected = state_after_a_step(self.optimizer, state["param_groups"])
        for number, held in state["state"].items():
            where = f"optimizer: state of parameter {number!r}"
            require(number in numbers, f"{where}: there is no such parameter")
            require_like(where, held, expected.get(number, {}))

    def _check_history(self, history: Any) -> None:
        require(isinstance(history, dict), "history: expected a mapping")
        fields = {f.name for f in dataclasses.fields(self.history)}
        require(fields == history.keys(), f"history: expected {', '.join(sorted(fields))}")
        columns = {n: history[n] for n in fields - {"evaluations", "stopped"}}
        for name, column in columns.items():
            require(
                isinstance(column, list)
                and len(column) == len(columns["loss"])
                and all(map(is_number, column)),
                f"history: {name} is no list of a number for each step",
            )
        require(all(map(math.isfinite, columns["loss"])), "history: a loss is not finite")
        require(
            isinstance(history["evaluations"], list)
            and all(
                isinstance(found, dict) and {"step", "loss"} <= found.keys()
                and all(map(is_number, found.values()))
                for found in history["evaluations"]
            ),
            "history: evaluations is no list of mappings to numbers",
        )  # fmt: skip


def _seek(
    loader: Iterable[Any], epoch_random: dict[str, Any], batches: int
) -> Iterator[Any] | None:
    """An epoch's iterator, behind the batches that were seen."""
    if batches == 0:
        return None
    _set_random(epoch_random, loader)
    iterator = iter(loader)
    for seen in range(batches):
        if next(iterator, None) is None:
            raise ValueError(
                f"train_loader: gave {seen} batches, but {batches} were seen before the checkpoint;"
                " resume with the same data"
            )
    return iterator


# --------------------------------------------------------------------------------------- generators


def _generators(loader: Iterable[Any]) -> list[torch.Generator]:
    """The loader's own generators; a DataLoader shares one with its sampler."""
    owners = (loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None))
    found = [getattr(owner, "generator", None) for owner in owners]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


def _get_random(loader: Iterable[Any]) -> dict[str, Any]:
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "python": random.getstate(),
        "loader": [generator.get_state() for generator in _generators(loader)],
    }


def _set_random(state: dict[str, Any], loader: Iterable[Any]) -> None:
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():
        for device, value in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
            torch.cuda.set_rng_state(value, device)
    random.setstate(state["python"])
    for generator, value in zip(_generators(loader), state["loader"], strict=True):
        generator.set_state(value)


def _check_random(where: str, state: Any, loader: Iterable[Any]) -> None:
    """By setting other generators to it."""
    own = _generators(loader)
    require_like(where, state, {"loader": [None] * len(own), "torch": torch.get_rng_state()})
    try:
        torch.Generator().set_state(state["torch"])
        for generator, value in zip(own, state["loader"], strict=True):
            torch.Generator(generator.device).set_state(value)
        if torch.cuda.is_available():
            for value in state["cuda"]:
                torch.Generator("cuda").set_state(value)
        random.Random().setstate(state["python"])
        float(state["python"][2] or 0)
    except Exception as error:
        raise ValueError(f"{where}: is no state of the generators ({error})") from error
