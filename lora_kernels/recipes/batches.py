"""What training and evaluation share: batches, the loss of one, devices, modes."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

Criterion = Callable[[Any, Any], Tensor] | None
Count = Callable[[Any], int] | None
_LABELS = "labels"


def check_arguments(model: nn.Module, criterion: Criterion, autocast_dtype: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if criterion is not None and not callable(criterion):
        raise TypeError(
            "criterion: expected a callable (prediction, targets) -> loss, or None for a model that"
            f" returns its loss, got {type(criterion).__name__}"
        )
    if autocast_dtype not in (None, torch.bfloat16, torch.float16):
        raise ValueError(
            "autocast_dtype: legal values are None, torch.bfloat16 and torch.float16,"
            f" got {autocast_dtype!r}"
        )


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter lies: batches go there."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def place(
    model: nn.Module,
    device: torch.device | str | None,
    optimizer: torch.optim.Optimizer | None = None,
) -> torch.device:
    """Moves model and optimizer state to a device if one is given; the device of the batches."""
    current = device_of(model)
    if device is None:
        return current
    device = torch.device(device)
    if device.type != current.type or device.index not in (None, current.index):
        model.to(device)
        if optimizer is not None:
            # Loading puts each state on its parameter's device, but leaves step counts where they
            # have to be.
            optimizer.load_state_dict(optimizer.state_dict())
    return device_of(model)


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on a device; mappings become dicts, sequences tuples, named
    tuples and packed sequences stay such."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, PackedSequence):
        return batch.to(device, non_blocking=True)  # type: ignore[arg-type]  # as a tensor does
    if isinstance(batch, (tuple, list)):
        moved = [to_device(value, device) for value in batch]
        return type(batch)(*moved) if hasattr(batch, "_fields") else tuple(moved)
    return batch


def batch_size(batch: Any) -> int:
    """The first dimension of the batch's first tensor, targets before inputs; the sequences of a
    packed one."""
    if isinstance(batch, PackedSequence):
        return int(batch.batch_sizes[0])
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.dim() else 1
    if isinstance(batch, Mapping):
        parts = [batch[_LABELS]] if _LABELS in batch else list(batch.values())
    else:
        parts = list(reversed(batch)) if isinstance(batch, (tuple, list)) else []
    for part in parts:
        if isinstance(part, (Tensor, Mapping, tuple, list)):
            return batch_size(part)
    raise TypeError(
        f"batch: expected (inputs, targets) or a mapping with tensors, got {type(batch).__name__}"
    )


def token_count(batch: Any) -> int:
    """Token ids among a batch's inputs, padding included; 0 for other data."""
    if isinstance(batch, (tuple, list)) and batch:
        batch = batch[0]
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    return ids.numel() if isinstance(ids, Tensor) else 0


def weigh(batch: Any, count: Count) -> float:
    """What a batch counts for in a mean."""
    weight = float(batch_size(batch) if count is None else count(batch))
    if not 0 <= weight < float("inf"):
        raise ValueError(f"count: expected a non-negative number, got {weight}")
    return weight


def forward_loss(model: nn.Module, batch: Any, criterion: Criterion) -> tuple[Tensor, Any, Any]:
    """(loss [], prediction, targets) of a batch.

    A mapping goes to the model by keyword, without its "labels" where a criterion takes them. Of
    (inputs, targets), inputs may be a tensor, a packed sequence, a tuple of arguments or a mapping;
    without a criterion the targets go to the model as `labels`, as Transformers' models take them.
    The criterion gets the output's logits where there are any, the first element of a tuple,
    otherwise the output itself.
    """
    if isinstance(batch, Mapping):
        inputs, targets = dict(batch), batch.get(_LABELS)
        if criterion is not None:
            if _LABELS not in batch:
                raise ValueError(
                    f"criterion: needs the batch's {_LABELS!r}; its keys are"
                    f" {', '.join(map(str, batch))}"
                )
            del inputs[_LABELS]
        output = model(**inputs)
    elif isinstance(batch, (tuple, list)) and len(batch) == 2:
        inputs, targets = batch
        extra = {} if criterion is not None else {_LABELS: targets}
        output = call(model, inputs, **extra)
    else:
        what = type(batch).__name__
        if isinstance(batch, (tuple, list)):
            what += f" of {len(batch)} elements"
        raise TypeError(f"batch: expected (inputs, targets) or a mapping, got {what}")
    prediction = _prediction(output)
    loss = _own_loss(output) if criterion is None else criterion(prediction, targets)
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"criterion: expected a loss of one floating element, got {got}")
    return loss.reshape(()), prediction, targets


def call(model: nn.Module, inputs: Any, **extra: Any) -> Any:
    """The output for a tensor, a packed sequence, a tuple of arguments or a mapping."""
    if isinstance(inputs, Mapping):
        return model(**inputs, **extra)
    return model(*inputs, **extra) if _is_sequence(inputs) else model(inputs, **extra)


def _prediction(output: Any) -> Any:
    if isinstance(output, Mapping) and "logits" in output:
        return output["logits"]
    if getattr(output, "logits", None) is not None:
        return output.logits
    return output[0] if _is_sequence(output) else output


def _is_sequence(value: Any) -> bool:
    """Of several things: a packed sequence, a tuple to Python, is one."""
    return isinstance(value, (tuple, list)) and not isinstance(value, PackedSequence)


def _own_loss(output: Any) -> Tensor:
    is_mapping = isinstance(output, Mapping)
    loss: Tensor | None = output.get("loss") if is_mapping else getattr(output, "loss", None)
    if loss is None:
        raise ValueError(
            "criterion: None needs a model that returns an object with a loss, got"
            f" {type(output).__name__} without one (do the batches hold {_LABELS!r}?)"
        )
    return loss


@contextlib.contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Train or eval mode within, afterwards every module's own mode again."""
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, was in before:
            module.training = was


def autocast(
    device: torch.device, dtype: torch.dtype | None
) -> contextlib.AbstractContextManager[Any]:
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def length(loader: Iterable[Any]) -> int | None:
    try:
        return len(loader)  # type: ignore[arg-type]  # one without a length raises
    except TypeError:
        return None
