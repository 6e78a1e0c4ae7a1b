"""What to do at the steps, evaluations and checkpoints of `train_model`.

A callback gets the run: its model, optimizer, scheduler, history (what was just measured comes
last), and `run.stop(reason)`, which ends it after the current step.
"""

import csv
import math
import os
from pathlib import Path
from typing import Any, NamedTuple


class Goal(NamedTuple):
    """Something measured in evaluations that should become small, or large."""

    name: str
    sign: int

    @classmethod
    def parse(cls, argument: str, text: str, measured: tuple[str, ...]) -> "Goal":
        """From "loss", "min NAME" or "max NAME"; `measured` are the names there are."""
        if not measured:
            raise ValueError(f"{argument}: {text!r} is measured in evaluations; give eval_loader")
        legal = {"loss": ("loss", 1)}
        for other in measured:
            if other != "loss":
                legal |= {f"min {other}": (other, 1), f"max {other}": (other, -1)}
        if text not in legal:
            raise ValueError(f"{argument}: legal values are {', '.join(legal)}, got {text!r}")
        return cls(*legal[text])

    def better(self, value: float, than: float | None, by: float = 0.0) -> bool:
        """Whether a value is better by more than `by`; nan never is."""
        if math.isnan(value):
            return False
        return than is None or self.sign * (than - value) > by


class Callback:
    """Does nothing; override what is wanted."""

    def check(self, run: Any) -> None:
        """Before anything has changed: the place to refuse. `run.measured` are the names of what
        evaluations give, none without eval_loader."""

    def on_start(self, run: Any) -> None:
        """Before the first step, also of a resumed run."""

    def on_step(self, run: Any) -> None:
        """After an optimizer step."""

    def on_evaluate(self, run: Any) -> None:
        """After an evaluation: `run.history.evaluations[-1]`."""

    def on_checkpoint(self, run: Any) -> None:
        """After a checkpoint was written."""

    def on_end(self, run: Any) -> None:
        """Whether training came to its end or failed."""


class EarlyStopping(Callback):
    """Stops once `patience` evaluations in a row were no better than the best before them.

    Args:
        patience: at least 1.
        monitor: "loss", or "min NAME" or "max NAME" of a metric.
        min_delta: what counts as better, at least 0.

    A run that goes on from a checkpoint is judged by all its evaluations.
    """

    def __init__(self, patience: int = 3, monitor: str = "loss", min_delta: float = 0.0) -> None:
        if isinstance(patience, bool) or not isinstance(patience, int) or patience < 1:
            raise ValueError(f"patience: expected an integer of at least 1, got {patience!r}")
        if not 0 <= min_delta < math.inf:
            raise ValueError(f"min_delta: expected a number of at least 0, got {min_delta!r}")
        self.patience, self.monitor, self.min_delta = patience, monitor, min_delta

    def check(self, run: Any) -> None:
        self.goal = Goal.parse("callbacks: EarlyStopping: monitor", self.monitor, run.measured)

    def on_evaluate(self, run: Any) -> None:
        best, waited = None, 0
        for found in run.history.evaluations:
            value = found[self.goal.name]
            if self.goal.better(value, best, self.min_delta):
                best, waited = value, 0
            else:
                waited += 1
        if waited >= self.patience:
            run.stop(f"{self.goal.name} has not become better than {best} in {waited} evaluations")


class CSV(Callback):
    """A table of all steps: the columns of `History`, and what was measured after a step.

    The file is replaced at the start; that of a resumed run has the steps before too.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def on_start(self, run: Any) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.columns = [*run.history.columns(), *(f"eval_{name}" for name in run.measured)]
        self.written = 0
        with open(self.path, "w", newline="") as file:
            csv.writer(file).writerow(["step", *self.columns])
        self._write(run, len(run.history))

    def on_step(self, run: Any) -> None:
        # The last step waits for what may be measured after it.
        self._write(run, len(run.history) - 1)

    def on_end(self, run: Any) -> None:
        self._write(run, len(run.history))

    def _write(self, run: Any, end: int) -> None:
        columns = run.history.columns()
        # A step that failed has not all of them.
        end = min(end, *map(len, columns.values()))
        if end <= self.written:
            return
        evaluations = {found["step"]: found for found in run.history.evaluations}
        with open(self.path, "a", newline="") as file:
            for step in range(self.written, end):
                row = {name: column[step] for name, column in columns.items()}
                for name, value in evaluations.get(step + 1, {}).items():
                    row[f"eval_{name}"] = value
                csv.writer(file).writerow([step + 1, *(row.get(n, "") for n in self.columns)])
        self.written = end


class TensorBoard(Callback):
    """Writes every step and evaluation for TensorBoard, below `train/` and `eval/`.

    Raises:
        ImportError: without the package tensorboard.
    """

    def __init__(self, log_dir: str | os.PathLike[str]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(f"TensorBoard: pip install tensorboard ({error})") from error
        self.log_dir, self.make_writer = str(log_dir), SummaryWriter
        self.writer: SummaryWriter | None = None

    def on_start(self, run: Any) -> None:
        # What an interrupted run wrote after its checkpoint is hidden.
        self.writer = self.make_writer(self.log_dir, purge_step=len(run.history) + 1)

    def on_step(self, run: Any) -> None:
        assert self.writer is not None  # after on_start
        for name, column in run.history.columns().items():
            self.writer.add_scalar(f"train/{name}", column[-1], len(run.history))

    def on_evaluate(self, run: Any) -> None:
        assert self.writer is not None  # after on_start
        found = run.history.evaluations[-1]
        for name in run.measured:
            self.writer.add_scalar(f"eval/{name}", found[name], found["step"])
        self.writer.flush()

    def on_end(self, run: Any) -> None:
        if self.writer is not None:
            self.writer.close()
