"""`train_model`: the loop over optimizer steps."""

import contextlib
import itertools
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.adapters import lora_layers
from lora_kernels.check import first_step_problems, folded
from lora_kernels.progress import progress_bar
from lora_kernels.recipes import batches, checks, proving, resume
from lora_kernels.recipes.batches import Count, Criterion
from lora_kernels.recipes.callbacks import Callback, Goal
from lora_kernels.recipes.evaluation import Metric, evaluate_model
from lora_kernels.recipes.history import History
from lora_kernels.recipes.stepping import (
    check_closure,
    check_scheduler,
    is_plateau,
    needs_closure,
)
from lora_kernels.sharding import is_sharded, whole


def train_model(
    model: nn.Module,
    train_loader: Iterable[Any],
    criterion: Criterion,
    optimizer: torch.optim.Optimizer,
    *,
    epochs: int = 1,
    max_steps: int | None = None,
    accumulation_steps: int = 1,
    max_grad_norm: float | None = None,
    scheduler: Any = None,
    device: torch.device | str | None = None,
    autocast_dtype: torch.dtype | None = None,
    count: Count = None,
    progress: bool | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    resume_from: str | os.PathLike[str] | None = None,
    eval_loader: Iterable[Any] | None = None,
    eval_every: int | None = None,
    metrics: Mapping[str, Metric] | None = None,
    keep_best: str | None = None,
    callbacks: Sequence[Callback] = (),
    tune: bool = False,
) -> History:
    """Trains what requires gradients: with LoRA layers, the adapters and `modules_to_save`.

    One pass over the loader unless `epochs` says more. Every module's train/eval mode is afterwards
    what it was. In a model with LoRA layers, batch norms that are frozen stay in eval mode, so that
    their running statistics, which belong to the base, do not move. Adapters that the first step
    leaves without a gradient, or that the optimizer does not hold, are named in a warning.

    Args:
        model: any module, e.g. after `add_adaptor_layer`.
        train_loader: any iterable of batches, (inputs, targets) or mappings as Transformers' data
            collators give. inputs may be a tensor, a packed sequence, a tuple of arguments or a
            mapping of keywords.
        criterion: (prediction, targets) -> mean loss; the prediction is the model's output, or its
            logits. None takes the loss that the model returns (Transformers, given `labels`).
        optimizer: over parameters of the model, e.g. `AdamW(lora_parameters(model))`. One that
            needs a closure (LBFGS) gets one over the step's batches; without fp16 and clipping.
        epochs: passes over the loader, in this run and the one it resumes together.
        max_steps: ends the run after this many optimizer steps, likewise together.
        accumulation_steps: batches per optimizer step; the step's loss is the mean over all their
            samples. An epoch's last step takes what is left.
        max_grad_norm: clips the gradient's norm.
        scheduler: learning-rate scheduler; stepped after every optimizer step. ReduceLROnPlateau is
            stepped with the held-out loss after every evaluation, without `eval_loader` with the
            epoch's mean loss after every epoch.
        device: where to move model and optimizer state; None leaves them. Batches follow the model.
        autocast_dtype: torch.bfloat16 or torch.float16 for mixed precision, the latter with scaled
            losses; None for the model's own dtypes.
        count: batch -> what it counts for in a mean, its first dimension by default.
        progress: True shows a bar (if tqdm is there), False none, None one in a terminal.
        checkpoint: file written, atomically, every `checkpoint_every` steps and after every epoch.
        resume_from: such a file to continue from, given model, loader and optimizer made as for the
            first run. The results are those of a run never interrupted, if the order of the data
            comes from torch's or Python's generators; the batches already seen are read again. A
            file that is damaged or of another run is refused, and nothing is changed.
        eval_loader: held-out batches for `evaluate_model`, in every `eval_every`-th step, by
            default after every epoch, and at the end.
        metrics: what to measure there besides the loss, as in `evaluate_model`.
        keep_best: "loss", or "min NAME" or "max NAME" of a metric: the model ends with the trained
            parameters (and running statistics) of the evaluation where that was best. Without it,
            and after an exception, it has the last ones.
        callbacks: of `lora_kernels.recipes.callbacks`: EarlyStopping, CSV, TensorBoard, or your own
            `Callback`.
        tune: proves and times the fused kernels before the first step, where the model is on a GPU
            that has no table yet: once a card, in under a minute, with a bar as `progress` says.
            `lora_kernels.tune(model, rows)` does it more thoroughly.

    Returns:
        `History`, of the whole run where it was resumed.

    Raises:
        FloatingPointError: a loss or gradient is not finite; names the step. The model then holds
            the last parameters that gave a finite loss and gradient.
        FileNotFoundError: no file at `resume_from`.
        ValueError: an argument that is not legal, a merged layer, an empty loader, a file at
            `resume_from` that is damaged or of another run.
        TypeError: an argument or batch of another kind.
    """
    batches.check_arguments(model, criterion, autocast_dtype)
    checks.check_numbers(
        epochs, max_steps, accumulation_steps, max_grad_norm, checkpoint_every, eval_every
    )
    if checkpoint_every is not None and checkpoint is None:
        raise ValueError("checkpoint_every: needs checkpoint, the file to write")
    checks.check_trainable(model, optimizer, autocast_dtype)
    check_closure(optimizer, autocast_dtype, max_grad_norm)
    check_scheduler(scheduler, optimizer)
    checks.require_whole_for_files(model, checkpoint=checkpoint, resume_from=resume_from)
    measured = checks.measured_names(eval_loader, eval_every, metrics)
    goal = None if keep_best is None else Goal.parse("keep_best", keep_best, measured)
    target = batches.device_of(model) if device is None else torch.device(device)
    run = resume.Run(
        model,
        optimizer,
        scheduler,
        torch.amp.GradScaler(target.type, enabled=autocast_dtype == torch.float16),
        train_loader,
        History(),
        accumulation_steps,
        epochs,
        max_steps,
        measured,
    )
    checks.check_callbacks(callbacks, run)
    if resume_from is not None:
        run.load(resume_from)
    device = batches.place(model, device, optimizer)
    good = _LastGood(optimizer)
    loop = _Loop(run, criterion, device, autocast_dtype, count, max_grad_norm, good)
    _zero_grad(model, optimizer)
    history = run.history

    def tell(event: str) -> None:
        for callback in callbacks:
            getattr(callback, event)(run)

    def due(every: int | None) -> bool:
        return every is not None and len(history) % every == 0

    def evaluate() -> None:
        evaluated = history.evaluations and history.evaluations[-1]["step"] == len(history)
        if eval_loader is None or evaluated:
            return
        found = evaluate_model(
            model, eval_loader, criterion, metrics=metrics, count=count,
            autocast_dtype=autocast_dtype, progress=False,
        )  # fmt: skip
        history.evaluations.append({"step": len(history), **found})
        if is_plateau(scheduler):
            scheduler.step(found["loss"])
        if goal and goal.better(found[goal.name], run.best["value"] if run.best else None):
            run.keep_best(found[goal.name])
        tell("on_evaluate")

    def save() -> None:
        if checkpoint is not None:
            good.require_finite(len(history))
            run.save(checkpoint)
            tell("on_checkpoint")

    bar = progress_bar(
        progress, _total_steps(train_loader, epochs, max_steps, accumulation_steps), "train"
    )
    begun = len(history)
    with contextlib.ExitStack() as ends:
        for callback in callbacks:
            callback.on_start(run)
            ends.callback(callback.on_end, run)
        with batches.mode(model, training=True), bar:
            _freeze_batch_norms(model)
            bar.update(begun)
            while not run.done:
                start = time.perf_counter()
                for group in _groups(run.epoch_batches(), accumulation_steps):
                    if tune and len(history) == begun:
                        proving.prove(model, group, autocast_dtype, progress)
                        start = time.perf_counter()
                    _step(loop, group, first=len(history) == begun)
                    history.seconds.append(time.perf_counter() - start)
                    bar.update()
                    bar.set_postfix_str(_status(history))
                    tell("on_step")
                    if due(eval_every):
                        evaluate()
                    if run.done:
                        break
                    if due(checkpoint_every):
                        save()
                    start = time.perf_counter()
                else:
                    run.end_epoch()
                    if eval_loader is None and is_plateau(scheduler):
                        scheduler.step(history.epoch_loss[-1])
                    if eval_every is None:
                        evaluate()
                if run.done:
                    evaluate()
                if run.batches == 0 or run.done:
                    save()
            good.require_finite(len(history))
        if goal and run.best:
            run.restore_best()
    return history


def _status(history: History) -> str:
    rate, unit = history.tokens_per_second, "tokens"
    if not rate:
        rate, unit = history.samples_per_second, "samples"
    return f"loss {history.loss[-1]:.4f}, {rate:.0f} {unit}/s"


@dataclass(frozen=True)
class _Loop:
    """What all steps of a run have in common."""

    run: resume.Run
    criterion: Criterion
    device: torch.device
    autocast_dtype: torch.dtype | None
    count: Count
    max_grad_norm: float | None
    good: "_LastGood"


def _step(loop: _Loop, group: list[Any], first: bool) -> None:
    """One optimizer step over a group of batches; after the first adapters that stay idle are
    named."""
    run, good, device = loop.run, loop.good, loop.device
    model, optimizer, scaler, history = run.model, run.optimizer, run.scaler, run.history
    step = len(history) + 1
    weights = [batches.weigh(batch, loop.count) for batch in group]
    total = sum(weights)
    if not total > 0:
        raise ValueError(f"count: the batches of step {step} count for nothing")

    def backward() -> list[Tensor]:
        """The batches' parts of the loss; adds their gradients."""
        losses = []
        for batch, weight in zip(group, weights, strict=True):
            if weight == 0:
                continue
            batch = batches.to_device(batch, device)
            with batches.autocast(device, loop.autocast_dtype):
                loss, _, _ = batches.forward_loss(model, batch, loop.criterion)
            if not loss.requires_grad:
                raise ValueError(
                    "criterion: the loss does not depend on any parameter that requires a gradient"
                )
            scaler.scale(loss * (weight / total)).backward()
            loss = loss.detach().to(torch.promote_types(loss.dtype, torch.float32))
            losses.append(loss * (weight / total))
        return losses

    losses = backward()
    if first:
        _warn_of_idle_adapters(model, optimizer)
    scaler.unscale_(optimizer)
    trained = [p for p in good.parameters if p.grad is not None]
    norm = whole(torch.nn.utils.get_total_norm(p.grad for p in trained))
    # One wait for the device per step. The batches run one after another on it either way.
    *losses, grad_norm = torch.stack([*losses, norm.to(losses[0])]).tolist()
    where = f"at step {step} (epoch {run.epoch + 1}, batches {run.batches + 1}"
    where += f" to {run.batches + len(group)})"
    if not all(map(math.isfinite, losses)):
        value = next(value for value in losses if not math.isfinite(value))
        good.stop(f"the loss is {value} {where}")
    # A gradient that overflowed fp16 is the scaler's business: it leaves the step out.
    if not math.isfinite(grad_norm) and not scaler.is_enabled():
        good.stop(f"the norm of the gradient is {grad_norm} {where}")
    if loop.max_grad_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(trained, loop.max_grad_norm, norm)
    good.keep()
    history.loss.append(math.fsum(losses))
    history.samples.append(total)
    history.epoch.append(run.epoch)
    history.grad_norm.append(grad_norm)
    history.learning_rate.append(float(optimizer.param_groups[0]["lr"]))
    history.tokens.append(sum(map(batches.token_count, group)))
    scale = scaler.get_scale()
    if needs_closure(optimizer):
        closure = _closure(model, optimizer, backward, math.fsum(losses))
        optimizer.step(closure)  # type: ignore[arg-type]  # torch's give tensors
    else:
        scaler.step(optimizer)
        scaler.update()
    _zero_grad(model, optimizer)
    if run.scheduler is not None and not is_plateau(run.scheduler) and scaler.get_scale() >= scale:
        run.scheduler.step()
    run.batches += len(group)


def _warn_of_idle_adapters(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    problems = first_step_problems(model, optimizer)
    if problems:
        lines = "".join(f"\n  {line}" for line in folded(problems))
        warnings.warn(
            f"{len(problems)} adapters did not train in the first step;"
            f" check_adapters(model, ...) with a batch looks closer{lines}",
            stacklevel=4,
        )


def _closure(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    backward: Callable[[], list[Tensor]],
    loss: float,
) -> Callable[[], Tensor]:
    """What an optimizer evaluates by itself: loss and gradients. The first time they are there."""
    known = [torch.tensor(loss, dtype=torch.float64)]

    def evaluate() -> Tensor:
        if known:
            return known.pop()
        _zero_grad(model, optimizer)
        return torch.stack(backward()).sum()

    return evaluate


class _LastGood:
    """A copy of the optimizer's parameters as they were when loss and gradient were last finite.

    A loss that is not finite shows only one step after the update that spoilt the parameters.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        held = (p for group in optimizer.param_groups for p in group["params"])
        self.parameters = [p for p in held if p.requires_grad]
        self.copies = [p.clone() for p in self._local()]

    def _local(self) -> list[Tensor]:
        """The parameters' memory; of sharded ones this process's part."""
        held = (p.detach() for p in self.parameters)
        return [p.to_local() if is_sharded(p) else p for p in held]

    def keep(self) -> None:
        torch._foreach_copy_(self.copies, self._local())

    def stop(self, reason: str) -> None:
        torch._foreach_copy_(self._local(), self.copies)
        for parameter in self.parameters:
            parameter.grad = None
        raise FloatingPointError(
            f"{reason}; the model holds the last parameters that gave finite losses"
        )

    def require_finite(self, step: int) -> None:
        if not all(bool(whole(p.isfinite().all())) for p in self.parameters):
            self.stop(f"parameters are not finite after step {step}")


def _groups(loader: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(loader)
    while group := list(itertools.islice(iterator, size)):
        yield group


def _zero_grad(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Of both: either may hold parameters that the other does not."""
    optimizer.zero_grad(set_to_none=True)
    model.zero_grad(set_to_none=True)


def _freeze_batch_norms(model: nn.Module) -> None:
    if next(lora_layers(model), None) is None:
        return
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and not any(
            parameter.requires_grad for parameter in module.parameters()
        ):
            module.eval()


def _total_steps(
    loader: Iterable[Any], epochs: int, max_steps: int | None, accumulation_steps: int
) -> int | None:
    length = batches.length(loader)
    if length is None:
        return max_steps
    steps = epochs * math.ceil(length / accumulation_steps)
    return steps if max_steps is None else min(steps, max_steps)
