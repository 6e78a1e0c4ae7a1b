"""Turning a model's linear layers into LoRA layers and back, in place."""

import contextlib
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from lora_kernels import adapters, backends, names, options, targets
from lora_kernels.adapters import lora_parameters
from lora_kernels.bases import is_convolution
from lora_kernels.bypass import unregistered_linears
from lora_kernels.nn import (
    DEFAULT,
    AdapterOptions,
    LoRAExpertProduct,
    LoRALayer,
    NamedAdapter,
    check_name,
    layer_class,
)
from lora_kernels.nn.conv import why_unfit
from lora_kernels.nn.merging import Into
from lora_kernels.nn.pissa import FROM_WEIGHT, INITS, Init
from lora_kernels.quantizing import quantize_layers
from lora_kernels.sharding import is_sharded
from lora_kernels.targets import Names
from lora_kernels.tokens import TokenIndices, find_tokens
from lora_kernels.weights import QuantizedTensor

if TYPE_CHECKING:
    import peft


_IN_FULL = "trained in full"
# The start by which a model's first adapters make up for what quantising their weights loses.
_LOFTQ = "loftq"


@dataclass
class LoraReport:
    """What `apply_lora` did; prints as a short text. Counts are of parameters.

    `adapted` of the `base` parameters are weights under an adapter. Of `saved`, the `new_heads` are
    trained in full because no checkpoint holds them. `left_out` holds by kind what can carry none:
    convolutions, embeddings, and the `other_linear_maps` (fused experts). `shared` holds the other
    names of layers that stand in several places, with one adapter, `tokens` how many rows of
    tables are trained.
    """

    replaced: list[str]
    skipped: dict[str, str]
    saved: list[str]
    other_linear_maps: list[str]
    trainable: int
    total: int
    adapter_bytes: int
    new_heads: list[str] = field(default_factory=list)
    adapted: int = 0
    base: int = 0
    left_out: dict[str, list[str]] = field(default_factory=dict)
    left_out_parameters: dict[str, int] = field(default_factory=dict)
    unregistered: list[str] = field(default_factory=list)
    shared: dict[str, list[str]] = field(default_factory=dict)
    gpu: str = ""
    tokens: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [
            f"LoRA on {len(self.replaced)} layers: {targets.summary(self.replaced)}",
            f"adapters on {self._share(self.adapted)} of the weights",
            f"trainable {self.trainable:,} of {self.total:,} parameters"
            f" ({self.trainable / max(self.total, 1):.2%}),"
            f" adapter {self.adapter_bytes / 2**20:.2f} MiB",
        ]
        if self.shared:
            places = [" = ".join((name, *others)) for name, others in self.shared.items()]
            shown = targets.summary(places, limit=8, fold=False)
            lines.insert(1, f"one adapter in several places: {shown}")
        heads = set(self.new_heads)
        for what, in_full in (
            (_IN_FULL, [name for name in self.saved if name not in heads]),
            (f"{_IN_FULL} (a new head)", self.new_heads),
        ):
            if in_full:
                lines.append(f"{what}: {', '.join(in_full)}")
        lines += [f"{_IN_FULL}: {count} rows of {name}" for name, count in self.tokens.items()]
        reasons: dict[str, list[str]] = {}
        for name, reason in self.skipped.items():
            if not reason.startswith(_IN_FULL):
                reasons.setdefault(reason, []).append(name)
        for reason, skipped in reasons.items():
            count = f"{len(skipped)} layers: " if len(skipped) > 1 else ""
            lines.append(f"skipped {count}{targets.summary(skipped, limit=8)}: {reason}")
        for kind, weights in self.left_out.items():
            share = self._share(self.left_out_parameters[kind])
            lines.append(
                f"{kind}, left frozen: {targets.summary(weights, limit=8)} ({share} of the weights)"
            )
        if self.gpu:
            lines.append(self.gpu)
        if self.unregistered:
            lines.append(
                "held in a plain list only, so not part of the model (nn.ModuleList registers"
                f" them): {targets.summary(self.unregistered, limit=8)}"
            )
        return "\n".join(lines)

    def _share(self, count: int) -> str:
        return f"{100 * count / max(self.base, 1):.2g} %"


def apply_lora(
    model: nn.Module,
    rank: "int | peft.LoraConfig | None" = None,
    *,
    alpha: float | None = None,
    dropout: float = 0.0,
    target_modules: Names = None,
    exclude_modules: Names = None,
    modules_to_save: Names = None,
    target_parameters: Names = None,
    trainable_token_indices: TokenIndices = None,
    expert_rank: int | None = None,
    use_rslora: bool = False,
    init: Init | Literal["loftq"] = "kaiming",
    use_dora: bool = False,
    freeze_a: bool = False,
    adapter_dtype: torch.dtype | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    **unknown: object,
) -> LoraReport:
    """Gives a model's linear layers LoRA adapters, in place, and freezes everything else.

    A head that no checkpoint holds (a new classifier of a Transformers model) is trained in full
    and saved with the adapter, unless `target_modules` or `exclude_modules` names it.

    Args:
        model: any module; its modules and weights stay the same objects.
        rank: of the adapters; or a whole `peft.LoraConfig` in place of all other options but
            `adapter_dtype` and `freeze_a`, which it has not.
        alpha, dropout, use_rslora, adapter_dtype, init, use_dora, freeze_a: as in
            `FusedLoRALinear.from_linear`. init="loftq" quantises the weights under the adapters too
            (nf4), as `quantize_base` does with loftq=True; "eva" wants `initialize_eva` next.
        target_modules: names or their last parts as a list, or one regular expression for the whole
            name (names of the plain model, without the parts of wrappers as torch.compile; any of
            its names for a module in several places); None or
            "all-linear" means every nn.Linear and Conv1D (GPT-2) but the output head
            (`get_output_embeddings()`). A convolution gets an adapter where it is named.
        exclude_modules: the same, taken out of the targets.
        modules_to_save: the same; these modules are trained in full and saved with the adapter,
            their buffers (running statistics) too.
        target_parameters: the same for weights [E, N, K] of a mixture's experts, as Transformers 5
            keeps them: ["experts.gate_up_proj", "experts.down_proj"]; each expert gets an adapter.
            With `target_modules=[]` they are all that gets any.
        trainable_token_indices: rows of the input embedding, or {name of a table: rows}, that are
            trained in full, for new tokens; a head that is tied to the table has them too.
        expert_rank: of the adapters of experts; `rank` by default.
        rank_pattern, alpha_pattern: ranks and alphas of single layers, {expression: value}, as in
            PEFT: an expression stands for the last parts of a name, the first that matches wins.

    Raises:
        ValueError: a pattern that matches nothing (it lists what there is), a value out of range.
        TypeError: an option of another type, or of another name. Whatever is raised, Ctrl-C too,
            the model is unchanged then.
    """
    chosen: dict[str, Any] = {
        "alpha": alpha,
        "dropout": dropout,
        "target_modules": target_modules,
        "exclude_modules": exclude_modules,
        "modules_to_save": modules_to_save,
        "target_parameters": target_parameters,
        "trainable_token_indices": trainable_token_indices,
        "expert_rank": expert_rank,
        "use_rslora": use_rslora,
        "init": init,
        "use_dora": use_dora,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
    }
    given = _given(model, apply_lora, rank, chosen, unknown)
    return _apply(model, _Options(adapter_dtype=adapter_dtype, freeze_a=freeze_a, **given))


def add_adapter(
    model: nn.Module,
    name: str,
    rank: "int | peft.LoraConfig | None" = None,
    *,
    alpha: float | None = None,
    dropout: float = 0.0,
    target_modules: Names = None,
    exclude_modules: Names = None,
    use_rslora: bool = False,
    init: Init | Literal["loftq"] = "kaiming",
    use_dora: bool = False,
    freeze_a: bool = False,
    adapter_dtype: torch.dtype | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    **unknown: object,
) -> LoraReport:
    """Gives a model a further adapter, with a name; `set_adapter` and `adapter_rows` put it to use.

    What the model computes does not change. A model without adapters gets its first, which is in
    use at once, as by `apply_lora`, whose adapter is called "default".

    Args:
        name: of the adapter: a string without dots that no other adapter of the model has.
        target_modules: as in `apply_lora`; None means the layers that carry adapters, or in a model
            without any what it means there.
        rank and others: as in `apply_lora`.

    Raises:
        ValueError: a name or a value out of range; a layer that is merged, sharded or was started
            with PiSSA or OLoRA. TypeError: an option of another type or name. The model is
            unchanged then.
    """
    chosen: dict[str, Any] = {
        "alpha": alpha,
        "dropout": dropout,
        "target_modules": target_modules,
        "exclude_modules": exclude_modules,
        "use_rslora": use_rslora,
        "init": init,
        "use_dora": use_dora,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
    }
    given = _given(model, add_adapter, rank, chosen, unknown)
    check_name(name)
    known = adapters.adapter_names(model)
    if name in known:
        raise ValueError(f"name: the model has an adapter {name!r} already")
    further = bool(known)
    for in_full in ("modules_to_save", "trainable_token_indices"):
        if further and given.get(in_full):
            raise ValueError(
                f"{in_full}: are trained in full for all adapters of a model; give them to its"
                " first"
            )
    if further and given["target_modules"] is None:
        carrying = "|".join(re.escape(layer) for layer, _ in adapters.lora_layers(model))
        given["target_modules"] = f"(?:{carrying})"
    given |= {"adapter_dtype": adapter_dtype, "freeze_a": freeze_a}
    return _apply(model, _Options(name=name, further=further, **given))


def _given(
    model: nn.Module,
    function: Any,
    rank: "int | peft.LoraConfig | None",
    chosen: dict[str, Any],
    unknown: Mapping[str, object],
) -> dict[str, Any]:
    """The options of `function`: rank and those chosen, or all from a LoraConfig."""
    options.refuse_unknown(unknown)
    names.require_module(model)
    what = function.__name__
    if rank is None:
        raise TypeError(f"{what}: rank is missing, apply_lora(model, 8)")
    if not options.is_config(rank):
        return {"rank": rank, **chosen}
    beside = [n for n, value in chosen.items() if value != function.__kwdefaults__[n]]
    if beside:
        raise TypeError(f"{what}: {beside[0]} is given beside a LoraConfig; set it there")
    modules = [name for name, _ in names.named_modules(model, remove_duplicate=False)]
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return options.from_peft(rank, modules, model_type)


class _Options(NamedTuple):
    """Of `apply_lora`, and of `add_adapter` for a model that has adapters: `further`."""

    rank: int
    alpha: float | None
    dropout: float
    target_modules: Names
    exclude_modules: Names
    use_rslora: bool
    init: Init | Literal["loftq"]
    use_dora: bool
    adapter_dtype: torch.dtype | None
    rank_pattern: Mapping[str, int] | None
    alpha_pattern: Mapping[str, float] | None
    modules_to_save: Names = None
    target_parameters: Names = None
    trainable_token_indices: TokenIndices = None
    expert_rank: int | None = None
    name: str = DEFAULT
    further: bool = False
    freeze_a: bool = False
    loftq_kind: str = "nf4"


def _apply(model: nn.Module, chosen: _Options) -> LoraReport:
    rank, alpha = options.check_rank(chosen.rank), options.check_alpha(chosen.alpha)
    target_modules = targets.listed("target_modules", chosen.target_modules)
    exclude_modules = targets.listed("exclude_modules", chosen.exclude_modules)
    further = chosen.name if chosen.further else None
    experts = targets.find_parameters(
        model, targets.listed("target_parameters", chosen.target_parameters)
    )
    if options.check_flag(chosen.use_dora, "use_dora") and experts:
        raise ValueError("use_dora: experts (target_parameters) have no DoRA")
    found: dict[str, targets.Target] = {}
    skipped: dict[str, str] = {}
    if target_modules != [] or not experts:
        found, skipped = targets.find_targets(model, target_modules, exclude_modules, further)
    heads, frozen = targets.new_heads(model, target_modules, exclude_modules)
    if chosen.further:
        heads = {}
        carrying = dict(adapters.lora_layers(model))
        against = {n: carrying[n].why_no_other(chosen.name) for n in skipped if n in carrying}
        refuse("add_adapter", {n: why for n, why in against.items() if why == skipped[n]})
    saved = heads | targets.find_saved(model, chosen.modules_to_save)
    in_heads = targets.submodules(heads)
    in_full = targets.submodules(saved) | {one.module for one in adapters.saved_tensors(model)}
    modules, places = dict(names.named_modules(model)), names.all_names(model)
    for name in [*found, *skipped]:
        linear = modules[name]
        if linear in in_full:
            kind = "a new head" if linear in in_heads else "modules_to_save"
            skipped[name] = f"{_IN_FULL} ({kind})"
        elif name in frozen:
            skipped[name] = frozen[name]
    found = {name: linear for name, linear in found.items() if name not in skipped}
    if not found and not experts:
        raise ValueError(
            f"target_modules: no layer is left for an adapter: {targets.summary(skipped)} are"
            " trained in full or excluded"
        )
    targets.require_whole_ties(model, saved)
    tokens = find_tokens(model, chosen.trainable_token_indices, {*found.values(), *in_full})
    all_of = {name: places[linear] for name, linear in found.items()}
    all_of |= {name: [name] for name in experts}
    ranks = options.of_layers("rank_pattern", chosen.rank_pattern, all_of, rank, options.check_rank)
    alphas = options.of_layers(
        "alpha_pattern", chosen.alpha_pattern, all_of, alpha, options.check_alpha
    )
    if chosen.expert_rank is not None:
        rank = options.check_rank(chosen.expert_rank, "expert_rank")
        ranks |= {name: options.of_layer(chosen.rank_pattern, [name], rank) for name in experts}
    init = _start_of(chosen)
    settings = (
        chosen.dropout,
        chosen.use_rslora,
        chosen.adapter_dtype,
        init,
        chosen.name,
        chosen.use_dora,
        chosen.freeze_a,
    )
    convolutions = {name: layer for name, layer in found.items() if is_convolution(layer)}
    if convolutions and chosen.use_dora:
        raise NotImplementedError(
            f"use_dora: {targets.summary(convolutions)}: convolutions have no DoRA here; leave them"
            " out (exclude_modules)"
        )
    adapter_of = {n: AdapterOptions(ranks[n], alphas[n], *settings) for n in found}
    refuse("apply_lora", {n: why_unfit(conv, adapter_of[n]) for n, conv in convolutions.items()})
    if init in FROM_WEIGHT:
        require_untied(model, found.values(), f"init={init!r}")
        for name, linear in found.items():
            most = min(linear.weight.shape)
            if ranks[name] > most:
                raise ValueError(
                    f"rank: {init!r} takes at most min(N, K) = {most} of {name}, got {ranks[name]}"
                )
    with adapters.all_or_nothing(model) as before:
        made: dict[str, LoRALayer | NamedAdapter] = {}
        for name, linear in found.items():
            adapter = adapter_of[name]
            if isinstance(linear, LoRALayer):
                made[name] = linear.prepare_other(adapter)
            else:
                made[name] = layer_class(linear, chosen.use_dora)._prepare(linear, adapter)
        prepared: list[adapters.Prepared] = [(found[name], one) for name, one in made.items()]
        for linear, layer in prepared:
            if init in FROM_WEIGHT and isinstance(layer, LoRALayer):
                before.keep(linear.weight)  # type: ignore[arg-type]  # of a linear layer
                layer._take_pissa()
        for name, (module, parameter) in experts.items():
            adapter = AdapterOptions(ranks[name], alphas[name], *settings)
            prepared.append((module, LoRAExpertProduct.prepare(module, parameter, adapter)))
        weights = {module.get_parameter(parameter) for module, parameter in experts.values()}
        weights |= {layer.get_parameter("weight") for layer in found.values()}
        left_out = targets.others(model, in_full, weights)
        base = sum(p.numel() for p in model.parameters())
        if chosen.further:
            adapters.attach_other(model, chosen.name, prepared, before.trainable)
        else:
            adapters.attach(model, prepared, saved, before.trainable, tokens.values())
        adapters.guard(model)
        if chosen.init == _LOFTQ:
            if not found:
                raise ValueError("init: 'loftq' is of linear layers, and no target is one")
            layers: dict[str, nn.Module] = dict(found)
            quantised = quantize_layers(model, layers, {}, chosen.loftq_kind, None, True, False)
            refuse("init: 'loftq'", dict(quantised.left))
        trained = list(lora_parameters(model, adapter=further))
        held = dict.fromkeys((*trained, *adapters.frozen_factors(model, further)))
        return LoraReport(
            replaced=[*found, *experts],
            skipped=skipped,
            saved=list(saved),
            other_linear_maps=list(left_out.get(targets.LINEAR_MAPS, ())),
            trainable=sum(p.numel() for p in trained),
            total=sum(p.numel() for p in model.parameters()),
            adapter_bytes=sum(p.numel() * p.element_size() for p in held),
            unregistered=unregistered_linears(model),
            new_heads=list(heads),
            adapted=sum(w.numel() for w in weights),
            base=base,
            shared={name: others[1:] for name, others in all_of.items() if len(others) > 1},
            gpu=backends.on_gpu(weights),
            left_out={kind: list(weights) for kind, weights in left_out.items()},
            tokens={name: len(one.indices) for name, one in tokens.items()},
            left_out_parameters={
                kind: sum(p.numel() for p in set(weights.values()))
                for kind, weights in left_out.items()
            },
        )


def _start_of(chosen: _Options) -> Init:
    """How the layers are to start the adapters themselves."""
    if chosen.init == _LOFTQ and not chosen.further:
        return "kaiming"
    if chosen.init in INITS:
        return chosen.init
    alone = (*FROM_WEIGHT, "eva", _LOFTQ) if chosen.further else ()
    legal = ", ".join(init for init in (*INITS, _LOFTQ) if init not in alone)
    beside = " beside another adapter" if chosen.further else ""
    raise ValueError(f"init: got {chosen.init!r}, legal values{beside} are {legal}")


def require_untied(model: nn.Module, layers: Iterable["targets.Target"], what: str) -> None:
    owners = targets.owners(model, beside=True)
    for layer in layers:
        shared = owners[layer.weight]
        if len(shared) > 1:
            raise ValueError(
                f"{what}: would change a weight that {' and '.join(shared)} share; untie them first"
            )


def merge_lora(
    model: nn.Module,
    keep_base: bool | Literal["cpu"] = True,
    *,
    into: Into | None = None,
) -> dict[str, float]:
    """Merges every adapter into its weight: the model then costs what the plain one costs.

    keep_base True or "cpu" keeps the base weights there or in host memory for a bit-exact
    `unmerge_lora`; False is final.

    A quantised weight cannot take up an update as it is: `into`, with keep_base=False, says what
    becomes of it. "dequantised" makes a weight in the layer's dtype, "requantise" one of as few
    bits, which loses what of the update is finer than its steps.

    An error or an interrupt midway takes back what was merged; what is merged for good stays so,
    which a warning says: the model computes the same either way, and the call can be repeated.

    Returns:
        Of each layer whose weight was quantised how much of the update its new weight holds, 1
        where nothing was lost.

    Raises:
        ValueError: a weight is tied (it names the owners), offloaded, pruned, on the meta device,
            or quantised without `into`. The model is unchanged then.
    """
    if into is not None and into not in get_args(Into):
        raise ValueError(f"into: got {into!r}, legal values are {', '.join(get_args(Into))}")
    if into is not None and keep_base:
        raise ValueError(f"keep_base: expected False beside into={into!r}, got {keep_base!r}")
    layers = {
        name: layer
        for name, layer in adapters.require_layers(model)
        if not layer.merged or (not keep_base and layer._merged == "kept")
    }
    refuse("merge_lora", {n: layer.why_unmergeable(keep_base, into) for n, layer in layers.items()})
    if not keep_base:
        adapters.require_loaded(model, layers=False)
    require_untied(model, layers.values(), "merge_lora")
    done: list[str] = []
    held: dict[str, float] = {}
    try:
        for name, layer in layers.items():
            if layer.merged:
                layer.unmerge()
            if into is not None and isinstance(layer.weight, QuantizedTensor):
                held[name] = layer.merge_quantised(into)
            else:
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
    return held


def refuse(what: str, reasons: dict[str, str | None]) -> None:
    """ValueError that names the layers against which there is something."""
    found: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        if reason is not None:
            found.setdefault(reason, []).append(name)
    if found:
        lines = (f"{targets.summary(layers)}: {reason}" for reason, layers in found.items())
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
    refuse("unmerge_lora", {n: layer.why_valueless("weight") for n, layer in layers.items()})
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
    `remove_lora(model)` leave a plain model with the adapter in its weights. Where PiSSA or OLoRA
    took a part out of a weight, that part is added back (equal up to one rounding).

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
    refuse("remove_lora", {name: layer.why_stuck() for name, layer in layers})
    adapters.require_loaded(model, layers=False)
    adapters.detach(model)
    adapters.unguard(model)


@contextlib.contextmanager
def disable_adapters(model: nn.Module) -> Iterator[nn.Module]:
    """Within it the model computes what its base does, `modules_to_save` included; merged or not.

    For reference log-probabilities (DPO, GRPO) without a second model. Contexts may be nested.
    Copies and pickles made within it are of the model with its adapters: they act at once.
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
