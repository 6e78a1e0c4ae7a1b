"""Turning a model's linear layers into LoRA layers and back, in place."""

import contextlib
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lora_kernels import adapters, targets
from lora_kernels.adapters import lora_parameters
from lora_kernels.checkpoint import guard_save_pretrained, release_save_pretrained
from lora_kernels.layer import Init, is_sharded
from lora_kernels.nn import layer_class
from lora_kernels.targets import Names


@dataclass
class LoraReport:
    """What `apply_lora` did; prints as a short text. Counts are of parameters."""

    replaced: list[str]
    skipped: dict[str, str]
    saved: list[str]
    other_linear_maps: list[str]
    trainable: int
    total: int
    adapter_bytes: int

    def __str__(self) -> str:
        lines = [
            f"LoRA on {len(self.replaced)} layers: {targets.summary(self.replaced)}",
            f"trainable {self.trainable:,} of {self.total:,} parameters"
            f" ({self.trainable / max(self.total, 1):.2%}),"
            f" adapter {self.adapter_bytes / 2**20:.2f} MiB",
        ]
        if self.saved:
            lines.append(f"trained in full: {', '.join(self.saved)}")
        lines += [f"skipped {name}: {reason}" for name, reason in self.skipped.items()]
        if self.other_linear_maps:
            names = targets.summary(self.other_linear_maps, limit=8)
            lines.append(f"linear maps that are no nn.Linear, left frozen: {names}")
        return "\n".join(lines)


def apply_lora(
    model: nn.Module,
    rank: int,
    *,
    alpha: float | None = None,
    dropout: float = 0.0,
    target_modules: Names = None,
    exclude_modules: Names = None,
    modules_to_save: Names = None,
    use_rslora: bool = False,
    init: Init = "kaiming",
    adapter_dtype: torch.dtype | None = None,
) -> LoraReport:
    """Gives a model's linear layers LoRA adapters, in place, and freezes everything else.

    Args:
        model: any module; its weights stay the same objects.
        rank, alpha, dropout, use_rslora, adapter_dtype, init: as in `FusedLoRALinear.from_linear`.
        target_modules: names or their last parts as a list, or one regular expression for the whole
            name; None means every nn.Linear and Conv1D (GPT-2) but the output head
            (`get_output_embeddings()`).
        exclude_modules: the same, taken out of the targets.
        modules_to_save: the same; these modules are trained in full and saved with the adapter,
            their buffers (running statistics) too.

    Raises:
        ValueError: a pattern that matches nothing (it lists what there is), a value out of range.
            The model is unchanged then.
    """
    found, skipped = targets.find_targets(model, target_modules, exclude_modules)
    saved = targets.find_saved(model, modules_to_save)
    trained_in_full = targets.submodules(saved)
    for name in [name for name, linear in found.items() if linear in trained_in_full]:
        del found[name]
        skipped[name] = "trained in full (modules_to_save)"
    targets.require_whole_ties(model, saved)
    if init == "pissa":
        _require_untied(model, list(found.values()), "init='pissa'")
        for name, linear in found.items():
            if rank > min(linear.weight.shape):
                raise ValueError(
                    f"rank: 'pissa' takes at most min(N, K) = {min(linear.weight.shape)} of {name},"
                    f" got {rank}"
                )
    with adapters.rollback_on_error(model) as trainable:
        layers = {
            linear: layer_class(linear)._prepare(
                linear, rank, alpha, dropout, use_rslora, adapter_dtype, init
            )
            for linear in found.values()
        }
    for layer in layers.values():
        layer._take_pissa()
    adapters.attach(model, layers, saved, trainable)
    guard_save_pretrained(model)
    trained = list(lora_parameters(model))
    return LoraReport(
        replaced=list(found),
        skipped=skipped,
        saved=list(saved),
        other_linear_maps=targets.other_linear_maps(model),
        trainable=sum(p.numel() for p in trained),
        total=sum(p.numel() for p in model.parameters()),
        adapter_bytes=sum(p.numel() * p.element_size() for p in trained),
    )


def _require_untied(model: nn.Module, layers: list[nn.Module], what: str) -> None:
    owners = targets.owners(model, beside=True)
    for layer in layers:
        names = owners[layer.weight]
        if len(names) > 1:
            raise ValueError(
                f"{what}: would change a weight that {' and '.join(names)} share; untie them first"
            )


def merge_lora(model: nn.Module, keep_base: bool | Literal["cpu"] = True) -> None:
    """Merges every adapter into its weight: the model then costs what the plain one costs.

    keep_base True or "cpu" keeps the base weights there or in host memory for a bit-exact
    `unmerge_lora`; False is final.

    An error or an interrupt midway takes back what was merged; what is merged for good stays so,
    which a warning says: the model computes the same either way, and the call can be repeated.

    Raises:
        ValueError: a weight is tied (it names the owners), offloaded, pruned, quantised, or on the
            meta device. The model is unchanged then.
    """
    layers = {
        name: layer
        for name, layer in adapters.require_layers(model)
        if not layer.merged or (not keep_base and layer._merged == "kept")
    }
    _refuse("merge_lora", {n: layer.why_unmergeable(keep_base) for n, layer in layers.items()})
    if not keep_base:
        adapters.require_loaded(model, layers=False)
    _require_untied(model, list(layers.values()), "merge_lora")
    done: list[str] = []
    try:
        for name, layer in layers.items():
            if layer.merged:
                layer.unmerge()
            layer.merge(keep_base)
            done.append(name)
    except BaseException:
        if keep_base:
            for name in done:
                layers[name].unmerge()
        else:
            warnings.warn(
                f"merge_lora: stopped at {name}; merged for good are {targets.summary(done)}, the"
                " others are not: the model computes the same, call merge_lora again",
                stacklevel=2,
            )
        raise
    if not keep_base:
        adapters.release_saved(model, keep_saved=True)


def _refuse(what: str, reasons: dict[str, str | None]) -> None:
    """ValueError that names the layers against which there is something."""
    found: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        if reason is not None:
            found.setdefault(reason, []).append(name)
    if found:
        lines = (f"{targets.summary(names)}: {reason}" for reason, names in found.items())
        raise ValueError(f"{what}: {'; '.join(lines)}")


def unmerge_lora(model: nn.Module) -> None:
    """Restores the base weights that `merge_lora` kept, bit for bit.

    Raises:
        RuntimeError: a layer was merged for good. ValueError: a weight holds no values, offloaded
            or on the meta device. The model is unchanged then.
    """
    layers = {name: layer for name, layer in adapters.require_layers(model) if layer.merged}
    for name, layer in layers.items():
        if layer._merged == "final":
            raise RuntimeError(
                f"unmerge_lora: {name} was merged with keep_base=False, its base was not kept"
            )
    _refuse("unmerge_lora", {n: layer.why_valueless("weight") for n, layer in layers.items()})
    for layer in layers.values():
        layer.unmerge()


def _require_whole(model: nn.Module, tensors: dict[str, Tensor], why: str) -> None:
    """ValueError for a sharded model. FSDP shows its parameters whole at times, so it is asked for
    by its modules too."""
    fsdp = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
    managed = any(isinstance(module, fsdp) for module in model.modules())
    for name, tensor in tensors.items():
        if managed or is_sharded(tensor):
            raise ValueError(f"model: {name} is sharded, {why}")


def remove_lora(model: nn.Module) -> None:
    """Takes the adapters out: plain layers that share the base weights, as before `apply_lora`.

    Layers merged with keep_base=False keep the sum: `merge_lora(model, keep_base=False)` and then
    `remove_lora(model)` leave a plain model with the adapter in its weights. Where PiSSA took its
    principal part out of a weight, that part is added back (equal up to one rounding).

    Raises:
        ValueError: the model has no LoRA layer, is sharded, offloaded, or has pruned or
            parametrized adapters; it is unchanged then.
    """
    weights = {f"{n}.weight": layer.weight for n, layer in adapters.require_layers(model)}
    _require_whole(
        model,
        weights,
        "its layers cannot be replaced; disable_adapters(model) computes the base, "
        "merge_lora(model, keep_base=False) leaves the plain cost",
    )
    layers = adapters.require_layers(model)
    _refuse("remove_lora", {name: layer.why_stuck() for name, layer in layers})
    adapters.require_loaded(model, layers=False)
    adapters.detach(model)
    release_save_pretrained(model)


@contextlib.contextmanager
def disable_adapters(model: nn.Module) -> Iterator[nn.Module]:
    """Within it the model computes what its base does, `modules_to_save` included; merged or not.

    For reference log-probabilities (DPO, GRPO) without a second model. Contexts may be nested.
    ValueError for a sharded model with `modules_to_save`, whose originals are not sharded.
    """
    layers = [layer for _, layer in adapters.require_layers(model) if not layer._disabled]
    saved = [saved for saved in adapters.saved_tensors(model) if not saved.swapped]
    if saved:
        adapters.require_loaded(model, layers=False)
        _require_whole(
            model,
            {one.name: one.tensor for one in saved},
            "it is trained in full and cannot be exchanged for its original; train it through an"
            " adapter instead of modules_to_save",
        )
    for layer in layers:
        layer._disabled = True
    adapters.swap_saved(saved)
    try:
        yield model
    finally:
        for layer in layers:
            layer._disabled = False
        adapters.swap_saved(saved)
