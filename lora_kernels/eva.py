"""EVA (Paischer et al., 2024, arXiv:2410.07170): adapters that start from the directions in which
the inputs of their layers vary, and that share ranks by how much of it those explain."""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lora_kernels import adapters, targets
from lora_kernels.bypass import update_fast_paths
from lora_kernels.convert import disable_adapters, refuse
from lora_kernels.directions import Directions
from lora_kernels.nn import LoRALayer
from lora_kernels.nn.tensors import frozen_by_adapter, note_frozen
from lora_kernels.progress import progress_bar
from lora_kernels.recipes.batches import call, device_of, mode, to_device
from lora_kernels.sharding import is_sharded

if TYPE_CHECKING:
    from peft import LoraConfig

_IGNORED = -100  # the label of a token that has no part in the loss


@dataclass
class EvaReport:
    """What `initialize_eva` did; prints as a short text.

    ranks: of each layer that keeps an adapter. removed: the layers that got no rank and are plain
    ones now. explained: of each layer the share of its inputs' variance that its A spans, in
    [0, 1]. shared: layer -> the one whose inputs it has too. batches: how many were read.
    unsettled: layers whose directions still turned then.
    """

    ranks: dict[str, int]
    removed: list[str]
    explained: dict[str, float]
    shared: dict[str, str]
    batches: int
    unsettled: list[str]

    def __str__(self) -> str:
        low, high = min(self.ranks.values()), max(self.ranks.values())
        lines = [
            f"EVA on {len(self.ranks)} layers from {self.batches} batches: ranks {low} to {high},"
            f" {sum(self.ranks.values())} in all"
        ]
        if self.removed:
            lines.append(f"rank 0, no adapter any more: {targets.summary(self.removed)}")
        if self.unsettled:
            lines.append(f"not settled: {targets.summary(self.unsettled)}")
        return "\n".join(lines)


@torch.no_grad()
def initialize_eva(
    model: nn.Module,
    batches: Iterable[Any],
    config: "LoraConfig | None" = None,
    *,
    rho: float = 2.0,
    tau: float = 0.99,
    whiten: bool = False,
    adjust_scaling: bool = True,
    mask: Callable[[Any], Tensor | None] | None = None,
    max_batches: int = 1000,
    progress: bool | None = None,
) -> EvaReport:
    """Gives new adapters their lora_A and their ranks from the model's inputs; lora_B stays zero.

    Each layer's rows of lora_A become the leading principal directions of its inputs, found by an
    incremental SVD over the batches until no direction turns any more. The ranks that the adapters
    have now are a budget for all of them: it goes to the directions that explain the largest shares
    of their layer's variance. Layers with equal inputs (q, k, v) share one SVD. As PEFT's
    `initialize_lora_eva_weights`, with ranks and scalings as there.

    lora_A and lora_B of a layer whose rank changes are new parameters: make the optimizer after.

    Args:
        model: after `apply_lora(..., init="eva")`, with one adapter, which is new.
        batches: read again and again, so a list or a DataLoader; a batch is what the model's
            forward takes: a mapping by keyword, (inputs, targets) of which the inputs are given,
            otherwise its one argument.
        config: a `peft.LoraConfig` whose `eva_config` stands for rho, tau, whiten, adjust_scaling.
        rho: how many times its present rank a layer may get, at least 1, which leaves all ranks.
        tau: the cosine in [0, 1] of a direction before and after a batch above which it has
            settled.
        whiten: divides each direction by the root of its singular value.
        adjust_scaling: alpha changes with the rank, so that alpha / rank stays.
        mask: which positions of a batch count, bool of any shape; by default those of a mapping's
            attention_mask whose labels are not -100, and of other batches all. Layers with another
            number of rows take all theirs.
        max_batches: after which directions are taken as they are.
        progress: True shows a bar (if tqdm is there), False none, None one in a terminal.

    Raises:
        ValueError: a value out of range; no batch, or none with as many rows as a layer needs; a
            layer that is never called; an adapter that has been trained or is one of several; a
            sharded model, several processes. The model is unchanged then.
    """
    if config is not None:
        given = getattr(config, "eva_config", None)
        if given is None:
            raise ValueError("config: expected a LoraConfig with an eva_config")
        rho, tau, whiten = given.rho, given.tau, given.whiten
        adjust_scaling = given.adjust_scaling_factors
        if mask is None and not (given.use_label_mask and given.label_mask_value == _IGNORED):
            label = given.label_mask_value if given.use_label_mask else None
            mask = partial(_counted, ignored=label)
    _check_numbers(rho, tau, max_batches)
    if isinstance(batches, Iterator):
        raise ValueError(
            f"batches: a {type(batches).__name__} is used up by the first reading; give a list or a"
            " DataLoader"
        )
    layers = dict(adapters.require_layers(model))
    refuse("initialize_eva", {name: _objection(layer) for name, layer in layers.items()})
    if dist.is_initialized() and dist.get_world_size() > 1:
        raise ValueError(
            "initialize_eva: of several processes each would find other ranks; call it in one,"
            " save_adapter there and load_adapter in all"
        )
    search = _Search(model, layers, rho, tau, mask or _counted)
    with (
        adapters.all_or_nothing(model) as before,
        torch.compiler.set_stance("force_eager"),
        progress_bar(progress, max_batches, "EVA") as bar,
    ):
        with disable_adapters(model), mode(model, False):
            search.run(batches, max_batches, bar)
        ranks = search.ranks
        explained = {n: search.svd(n).explained(rank) for n, rank in ranks.items() if rank}
        for name, layer in layers.items():
            if ranks[name]:
                before.keep(layer.lora_A)
                _start(layer, search.svd(name).directions(ranks[name], whiten), adjust_scaling)
            else:
                _take_out(layer)
        update_fast_paths(model)
    return EvaReport(
        {name: rank for name, rank in ranks.items() if rank},
        [name for name, rank in ranks.items() if not rank],
        explained,
        search.shared,
        search.read,
        [name for name in ranks if not search.has_settled(name)],
    )


def _check_numbers(rho: float, tau: float, max_batches: int) -> None:
    if not 1 <= rho < math.inf:
        raise ValueError(f"rho: expected a finite number of at least 1, got {rho!r}")
    if not 0 <= tau <= 1:
        raise ValueError(f"tau: expected a number in [0, 1], got {tau!r}")
    if isinstance(max_batches, bool) or not isinstance(max_batches, int) or max_batches < 2:
        raise ValueError(f"max_batches: expected an integer of at least 2, got {max_batches!r}")


def _objection(layer: LoRALayer) -> str | None:
    """Why an adapter cannot start so; None if it can."""
    if layer.merged:
        return "is merged; call unmerge_lora first"
    if isinstance(layer, nn.Embedding):
        return "is an embedding, whose inputs have no directions"
    if layer.lora_A.dim() != 2:
        return "its adapters are those of experts"
    if len(layer.names) > 1:
        return layer.why_not_two()
    if is_sharded(layer.lora_A) or is_sharded(layer.weight):
        return "is sharded; call initialize_eva before parallelize_module or fully_shard"
    reason = layer.why_fixed() or layer.why_valueless(*layer.adapter_parameters)
    if reason is None and layer.pissa_A is not None:
        reason = "was started with PiSSA or OLoRA"
    if reason is None and bool(layer.lora_B.any()):
        reason = "its adapter is not new, lora_B is not zero"
    return reason


def _start(layer: LoRALayer, A: Tensor, adjust_scaling: bool) -> None:
    rank = layer.rank
    if len(A) == rank:
        layer.lora_A.copy_(A)
        return
    old = layer.lora_A, layer.lora_B
    new = A.to(old[0]).contiguous(), old[1].new_zeros(layer.out_features, len(A))
    for name, before, now in zip(("lora_A", "lora_B"), old, new, strict=True):
        setattr(layer, name, nn.Parameter(now, requires_grad=before.requires_grad))
    if adjust_scaling and layer.alpha is not None:
        layer.alpha *= len(A) / rank


def _take_out(layer: LoRALayer) -> None:
    frozen = frozen_by_adapter(layer)
    layer.move_out()
    for parameter in frozen:  # while other layers have adapters
        layer.get_parameter(parameter).requires_grad_(False)
    note_frozen(layer, frozen)


def _counted(batch: Any, ignored: int | None = _IGNORED) -> Tensor | None:
    """The positions of a batch of tokens that are no padding and whose label is not this one."""
    if not isinstance(batch, Mapping):
        return None
    counted: Tensor | None = batch.get("attention_mask")
    labels: Tensor | None = batch.get("labels")
    if ignored is None or labels is None:
        return None if counted is None else counted.bool()
    with_label = labels != ignored
    if counted is None:
        return with_label
    return counted.bool() & with_label if counted.shape == labels.shape else counted.bool()


class _Search:
    """The directions of all layers, and the ranks that follow from them."""

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, LoRALayer],
        rho: float,
        tau: float,
        mask: Callable[[Any], Tensor | None],
    ) -> None:
        self.model, self.layers, self.mask = model, layers, mask
        self.rho, self.tau, self.read = rho, tau, 0
        self.shared: dict[str, str] = {}
        self._found: dict[str, Directions] = {}
        self.ranks = {n: self._most(n) for n in layers}

    def svd(self, name: str) -> Directions:
        return self._found[self.shared.get(name, name)]

    def has_settled(self, name: str) -> bool:
        return bool(self.svd(name).settled[: self.ranks[name]].all())

    def run(self, batches: Iterable[Any], most: int, bar: Any) -> None:
        device = device_of(self.model)
        while True:
            read = self.read
            for batch in batches:
                batch = to_device(batch, device)
                if not self._found:
                    self._share(batch)
                active = [name for name, svd in self._found.items() if not self.has_settled(name)]
                if not active or self.read == most:
                    return
                self._feed(batch, active)
                self.read += 1
                bar.update()
                if all(svd.rows for svd in self._found.values()):
                    self.ranks = self._distribute()
            if self.read == read:
                raise ValueError("batches: has no batch")
            few = [name for name, svd in self._found.items() if not svd.rows]
            if few:
                raise ValueError(
                    f"batches: none has as many rows as {targets.summary(few)} needs,"
                    f" {max(self._found[name].count for name in few)}; give larger ones, or a"
                    " smaller rho or rank"
                )

    def _most(self, name: str) -> int:
        layer = self.layers[name]
        return min(round(layer.rank * self.rho), layer.in_features)

    def _share(self, batch: Any) -> None:
        """Finds, on one batch, the layers with equal inputs."""
        first: dict[str, bytes] = {}

        def note(name: str, rows: Tensor) -> None:
            first.setdefault(name, _digest(rows))

        self._forward(batch, self.layers, note)
        uncalled = [name for name in self.layers if name not in first]
        if uncalled:
            raise ValueError(
                f"model: {targets.summary(uncalled)}: never called in the first batch; exclude them"
                " (exclude_modules)"
            )
        owners: dict[bytes, list[str]] = {}
        for name in self.layers:
            owners.setdefault(first[name], []).append(name)
        for owner, *others in owners.values():
            self.shared |= dict.fromkeys(others, owner)
            most = max(self._most(name) for name in (owner, *others))
            self.ranks |= dict.fromkeys((owner, *others), most)
            self._found[owner] = Directions(most, self.tau)

    def _feed(self, batch: Any, names: Iterable[str]) -> None:
        def add(name: str, rows: Tensor) -> None:
            if len(rows) >= self._found[name].count:
                self._found[name].add(rows)

        self._forward(batch, names, add)

    def _forward(
        self, batch: Any, names: Iterable[str], use: Callable[[str, Tensor], None]
    ) -> None:
        counted = self.mask(batch)

        def hook(
            name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> None:
            x: Tensor = args[0] if args else next(iter(kwargs.values()))
            rows = x.reshape(-1, x.shape[-1])
            if not bool(rows.isfinite().all()):
                raise ValueError(f"batches: the input of {name} holds values that are not finite")
            if counted is not None and counted.numel() == len(rows):
                rows = rows[counted.reshape(-1).to(rows.device)]
            use(name, rows)

        handles = [
            self.layers[name].register_forward_pre_hook(partial(hook, name), with_kwargs=True)
            for name in names
        ]
        try:
            pair = isinstance(batch, (tuple, list)) and len(batch) == 2
            call(self.model, batch[0] if pair else batch)
        finally:
            for handle in handles:
                handle.remove()

    def _distribute(self) -> dict[str, int]:
        """The budget, direction by direction, to the largest share of a layer's variance."""
        order = [*self._found, *self.shared]
        shares = [(-float(r), i) for i, n in enumerate(order) for r in self.svd(n).ratios]
        ranks = dict.fromkeys(self.layers, 0)
        for _, i in sorted(shares)[: sum(layer.rank for layer in self.layers.values())]:
            ranks[order[i]] += 1
        return ranks


def _digest(rows: Tensor) -> bytes:
    held = rows.detach().contiguous().cpu()
    found = hashlib.sha256(f"{tuple(held.shape)} {held.dtype}".encode())
    found.update(held.view(torch.uint8).numpy().data)
    return found.digest()
