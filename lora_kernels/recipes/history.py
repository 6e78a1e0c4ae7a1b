"""`History`: what a training run did."""

import dataclasses
import itertools
import math
from dataclasses import dataclass, field
from typing import Any


@dataclass
class History:
    """One entry per optimizer step, `len(history)` of them; `dataclasses.asdict` gives lists for
    JSON.

    loss: mean over the step's samples, before the update. samples: their number, or what `count`
    gave for them. epoch: from 0. grad_norm: over all trained parameters, before clipping.
    learning_rate: of the optimizer's first group. tokens: token ids in the step's `input_ids`,
    padding included, 0 for other data. seconds: what the step took, waiting for its data included;
    not compared by ==.

    evaluations: {"step": steps made before it, "loss": ..., metric: ...} of each. stopped: the
    reason, where a callback ended the run, otherwise None.
    """

    loss: list[float] = field(default_factory=list)
    samples: list[float] = field(default_factory=list)
    epoch: list[int] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)
    learning_rate: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list, compare=False)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    stopped: str | None = None

    def __len__(self) -> int:
        return len(self.loss)

    def columns(self) -> dict[str, list[Any]]:
        """The lists that have an entry per step."""
        fields = (f.name for f in dataclasses.fields(self))
        return {n: getattr(self, n) for n in fields if n not in ("evaluations", "stopped")}

    @property
    def tokens_per_second(self) -> float:
        """Mean over all steps, without evaluations and checkpoints; 0 without `input_ids`."""
        return sum(self.tokens) / (math.fsum(self.seconds) or math.inf)

    @property
    def samples_per_second(self) -> float:
        """As `tokens_per_second`."""
        return math.fsum(self.samples) / (math.fsum(self.seconds) or math.inf)

    @property
    def epoch_loss(self) -> list[float]:
        """Mean loss over the samples of each epoch."""
        steps = zip(self.epoch, self.loss, self.samples, strict=True)
        means: list[float] = []
        for _, steps_of_epoch in itertools.groupby(steps, key=lambda step: step[0]):
            group = list(steps_of_epoch)
            means.append(math.fsum(l * n for _, l, n in group) / sum(n for *_, n in group))
        return means
