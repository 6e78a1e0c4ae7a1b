"""An exception at every line of `adjust_rank`: whatever line it comes at, nothing is half done.

python tests/interrupted.py              # every line each time it is reached: some minutes
python tests/interrupted.py --visits 1   # every line the first time
"""

import argparse
import collections
import sys
from pathlib import Path

import torch
from torch import nn

import lora_kernels
from lora_kernels import adjust_rank, apply_lora
from lora_kernels.adapters import lora_layers

CHANGING = ("recipes/ranks.py", "recipes/undo.py")
PACKAGE = str(Path(lora_kernels.__file__).parent)


class Interrupt(KeyboardInterrupt):
    """What is raised; nothing catches it by its kind."""


class LineEvents:
    """Counts the lines of the package as they are reached, and raises at the `stop`-th."""

    def __init__(self, stop=None):
        self.stop, self.lines = stop, []

    def __call__(self, frame, event, arg):
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            self.lines.append((frame.f_code.co_filename, frame.f_lineno))
            if len(self.lines) == self.stop:
                raise Interrupt
        return self

    def __enter__(self):
        sys.settrace(self)
        return self

    def __exit__(self, *_):
        sys.settrace(None)


class Problem:
    """A small model with everything that a change of rank touches."""

    def __init__(self, pissa=False):
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(4, 5), nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)
        )
        options = {"alpha": 5, "target_modules": ["0", "1"], "modules_to_save": ["2"]}
        apply_lora(self.model, 3, init="pissa" if pissa else "kaiming", **options)
        with torch.no_grad():
            for _, layer in lora_layers(self.model):
                layer.lora_B.normal_(std=0.3)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(
            [{"params": trained[::2], "lr": 0.3}, {"params": trained[1::2]}], 0.2, momentum=0.9
        )
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.5)
        self.batches = [(torch.randn(4, 4), torch.randn(4, 2))]
        self.adjust(3, 3, epochs=0)
        self.step()

    def step(self):
        x, y = self.batches[0]
        nn.functional.mse_loss(self.model(x), y).backward()
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()

    def adjust(self, *k, **options):
        torch.manual_seed(1)
        return adjust_rank(
            self.model, *k, self.batches, nn.functional.mse_loss, self.optimizer,
            scheduler=self.scheduler, progress=False, **options,
        )  # fmt: skip

    def state(self):
        """All that has to fit together, by value; the optimizer's by the names of parameters."""
        names = {p: name for name, p in self.model.named_parameters()}
        groups = [
            {**group, "params": [names.get(p, "unknown") for p in group["params"]]}
            for group in self.optimizer.param_groups
        ]
        state = {names.get(p, "unknown"): held for p, held in self.optimizer.state.items()}
        layers = [(layer.rank, layer.alpha, layer.scaling) for _, layer in lora_layers(self.model)]
        return [
            layers, groups, self.scheduler.state_dict(),
            [(name, p.requires_grad, p.grad is None) for name, p in self.model.named_parameters()],
            {name: t.tolist() for name, t in self.model.state_dict().items()},
            {name: {k: torch.as_tensor(v).tolist() for k, v in s.items()}
             for name, s in state.items()},
        ]  # fmt: skip


# name: (whether the adapters start with PiSSA, ranks to reach, options)
RUNS = {
    "down in two steps": (False, 1, {"ranks": [2, 1]}),
    "down from PiSSA": (True, 2, {}),
    "up": (False, 4, {}),
    "undone": (False, 1, {"ranks": [1], "tolerance": 0.0}),
    "per layer": (False, 2, {"per_layer": True}),
}


def completed(pissa, k, options):
    """The states after each rank, and the lines of the package that the whole run reaches."""
    states = []
    path = options.get("ranks", [k])
    for end in range(len(path) + 1):
        problem = Problem(pissa)
        if end:
            shortened = options | ({"ranks": path[:end]} if "ranks" in options else {})
            with LineEvents() as events:
                report = problem.adjust(3, path[end - 1], **shortened)
            if "tolerance" in options:
                assert not report.steps[0].accepted
        states.append(problem.state())
    return states, events.lines


def interrupted(pissa, k, options, stop):
    """The state that an exception at the stop-th line leaves."""
    problem = Problem(pissa)
    try:
        with LineEvents(stop):
            problem.adjust(3, k, **options)
    except Interrupt:
        pass
    return problem.state()


def inconsistent(run, visits=None, every=1):
    """(points tried, those that left something else than a completed rank).

    `visits` of each line are tried; of lines elsewhere than where ranks change, each `every`-th.
    """
    states, lines = completed(*RUNS[run])
    seen, tried, wrong = collections.Counter(), 0, []
    for number, line in enumerate(lines, 1):
        seen[line] += 1
        if visits is not None and seen[line] > visits:
            continue
        if number % every and not line[0].endswith(CHANGING):
            continue
        tried += 1
        if interrupted(*RUNS[run], number) not in states:
            wrong.append((number, *line))
    return tried, wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--visits", type=int, help="of each line; all by default")
    parser.add_argument("--run", choices=RUNS, action="append", help="all by default")
    args = parser.parse_args()
    failed = False
    for run in args.run or RUNS:
        tried, wrong = inconsistent(run, args.visits)
        print(f"{run}: {tried} points, {len(wrong)} inconsistent", flush=True)
        for number, file, line in wrong:
            print(f"  {file}:{line} (the {number}th line)")
        failed |= bool(wrong)
    return failed


if __name__ == "__main__":
    sys.exit(main())
