"""What `check_adapters` reports."""

from dataclasses import dataclass, field

from lora_kernels import targets


@dataclass
class AdapterState:
    """What one adapter did in the batch.

    calls: of its layer, in the forward that has a backward. grad_norm: (lora_A, lora_B), None where
    there is no gradient. merges: whether merging leaves the output as it is; None where that was
    not compared. problem: what is wrong, the likely reason and a cure; None if it acts.
    """

    name: str
    calls: int = 0
    grad_norm: tuple[float | None, float | None] = (None, None)
    merges: bool | None = None
    problem: str | None = None


@dataclass
class AdapterReport:
    """What `check_adapters` found; prints as a short text with equal lines folded."""

    adapters: list[AdapterState] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems

    @property
    def problems(self) -> dict[str, str]:
        """Name of an adapter that does not act -> likely reason and cure."""
        return {one.name: one.problem for one in self.adapters if one.problem is not None}

    def __str__(self) -> str:
        acting = len(self.adapters) - len(self.problems)
        return "\n".join([f"{acting} of {len(self.adapters)} adapters act", *folded(self.problems)])


def folded(problems: dict[str, str]) -> list[str]:
    """Lines "names: reason", one a reason."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in problems.items():
        by_reason.setdefault(reason, []).append(name)
    return [f"{targets.summary(which)}: {reason}" for reason, which in by_reason.items()]
