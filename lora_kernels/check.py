"""`check_adapters`: whether every adapter of a model acts, trains and merges."""

import contextlib
import copy
import dataclasses
import math
import random
import sys
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels import names, targets
from lora_kernels.adapters import Before
from lora_kernels.bypass import bypassed, fast_paths
from lora_kernels.nn import LoRALayer
from lora_kernels.sharding import is_sharded

# How many layers are merged for one comparison, and how much weight, of which a copy is kept.
_GROUP, _GROUP_BYTES = 32, 1 << 30
_SMALL = 0.05  # a relative distance of outputs that rounding might explain
_FUNCTION = torch.autograd.Function.apply.__func__.__code__.co_filename


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


@dataclass(eq=False)
class _Adapter:
    """One adapter of one layer; of PEFT's layers each active adapter is one."""

    layer: nn.Module
    base: nn.Module
    # lora_A and lora_B, or the parameters that a parametrization computes them from.
    A: list[nn.Parameter]
    B: list[nn.Parameter]
    scaling: float
    state: AdapterState
    # Merges all adapters of the layer; None where no comparison is made.
    merge: Callable[[], None] | None
    off: str | None  # "merged" or "disabled"
    calls: list["_Call"] = field(default_factory=list)


@dataclass
class _Call:
    rows: int
    grad: bool
    function: bool  # in the forward of an autograd function, which has a backward of its own


def check_adapters(model: nn.Module, *inputs: Any, **kwargs: Any) -> AdapterReport:
    """Runs a batch forward and backward and tells of every adapter whether it acts.

    Of every adapter: was its layer called, is its gradient there, finite and not zero (where B is
    zero, A has none to get), and does merging it leave the output as it is, so that no code reads
    the weight past the layer. The loss is the output's `loss` if it has one, otherwise a fixed
    random projection of its floating tensors. The backward runs in the mode that the model is in:
    call `model.train()` first to see it with activation checkpointing; merging is compared in eval
    mode, on adapters enlarged for the moment, to 8 eps of the dtype times the root of the number of
    layers merged, or to what rounding the weights does where the model magnifies that (tied
    weights, quantised bases and PEFT's variants are left out).

    The model is bit-identical afterwards, buffers included; `.grad`, modes and random states are
    what they were, also after an error. Beside one forward and backward it costs two
    forwards for every 32 layers, or GiB of weights, of which a copy is held meanwhile.

    Args:
        model: with layers of this library or of PEFT, fused by `fuse_peft` or not.
        inputs, kwargs: one batch, as the model's forward takes it.

    Raises:
        ValueError: the model has no adapter, is sharded or on the meta device, or gives no floating
            tensor.
        Whatever the model's forward or backward raises.
    """
    adapters = list(_adapters(model))
    if not adapters:
        raise ValueError(
            f"model: {type(model).__name__} has no LoRA layer; call apply_lora or PEFT's"
            " get_peft_model first"
        )
    _require_here(model)
    with (
        torch.inference_mode(False),
        _unchanged(model, inputs, kwargs) as rewind,
        torch.compiler.set_stance("force_eager"),
    ):
        run = partial(_run, model, inputs, kwargs, rewind)
        _check_training(adapters, run)
        past = {**fast_paths(model), **bypassed(model)}
        _name_uncalled(adapters, past)
        _check_merging(model, adapters, run, past)
    return AdapterReport([adapter.state for adapter in adapters])


def first_step_problems(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """After a backward: the adapters that are to train and will not, with the likely reason.

    It looks at gradients only, so it costs nothing; `check_adapters` finds out more.
    """
    held = {p for group in optimizer.param_groups for p in group["params"]}
    found, past = {}, None
    for adapter in _adapters(model):
        trained = [p for p in (*adapter.A, *adapter.B) if p.requires_grad]
        if not trained or adapter.off is not None:
            continue
        if held.isdisjoint(trained):
            found[adapter.state.name] = (
                "is not in the optimizer; make it over lora_parameters(model)"
            )
        elif any(p.grad is None for p in trained):
            past = bypassed(model) if past is None else past
            reason = past.get(adapter.layer) or past.get(adapter.base)
            found[adapter.state.name] = f"got no gradient: {reason or _NO_GRADIENT}"
        elif held.isdisjoint(p for p in adapter.B if p.requires_grad) and not _any(adapter.B):
            found[adapter.state.name] = (
                "lora_B is zero and is not trained, so the adapter stays without effect; give the"
                " optimizer lora_parameters(model)"
            )
    return found


_NO_GRADIENT = (
    "no rows in this step (an expert, a dropped layer), or the loss does not depend on its output"
)


def _adapters(model: nn.Module) -> Iterator[_Adapter]:
    peft = sys.modules.get("peft.tuners.lora.layer")
    for name, layer in names.named_modules(model):
        if isinstance(layer, LoRALayer):
            off = "merged" if layer.merged else "disabled" if layer._disabled else None
            fixed = layer.why_fixed() or layer.why_unmergeable(keep_base=False)
            merge = None if fixed else partial(layer.merge, False)
            yield _Adapter(
                layer, layer, layer.factor_parameters("lora_A"), layer.factor_parameters("lora_B"),
                float(layer.scaling), AdapterState(name), merge, off,
            )  # fmt: skip
        elif peft is not None and isinstance(layer, peft.LoraLayer):
            yield from _peft_adapters(name, layer)


def _peft_adapters(name: str, layer: Any) -> Iterator[_Adapter]:
    base = layer.get_base_layer()
    weight = getattr(base, "weight", None)
    dense = isinstance(weight, Tensor) and weight.is_floating_point()
    # On quantised bases merging rounds the sum, and PEFT cannot merge all of its variants.
    dense = dense and type(base) in (nn.Linear, nn.Embedding)
    for adapter in layer.active_adapters:
        bias = layer.lora_bias.get(adapter) and base.bias is None
        dense = dense and adapter not in layer.lora_variant and not bias
    for adapter in layer.active_adapters:
        if adapter in layer.lora_A:
            A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        elif adapter in layer.lora_embedding_A:
            A, B = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
        else:
            continue
        off = "merged" if layer.merged else "disabled" if layer.disable_adapters else None
        merge = layer.merge if dense else None
        state = AdapterState(f"{name}.{adapter}")
        yield _Adapter(layer, base, [A], [B], float(layer.scaling[adapter]), state, merge, off)


def _require_here(model: nn.Module) -> None:
    distributed = sys.modules.get("torch.distributed.fsdp")
    kinds = [getattr(distributed, n, ()) for n in ("FSDPModule", "FullyShardedDataParallel")]
    managed = any(isinstance(m, kind) for kind in kinds for m in model.modules())
    for name, parameter in model.named_parameters():
        if managed or is_sharded(parameter) or hasattr(parameter, "ds_id"):
            raise ValueError(
                f"model: {name} is sharded; check the model before it is sharded (fully_shard,"
                " parallelize_module)"
            )
        if parameter.is_meta:
            raise ValueError(
                f"model: {name} is on the meta device (offloaded?), it has no values to compute"
                " with; load the model whole for the check"
            )


# --------------------------------------------------------------------------- leaving all unchanged


@contextlib.contextmanager
def _unchanged(model: nn.Module, *inputs: Any) -> Iterator[Callable[[], None]]:
    """Restores attributes, buffers, inputs, gradients and random states; gives what rewinds all
    but the gradients, so that every forward starts from the same."""
    before = Before(model)
    given = (tensor for tensor in _tensors(inputs) if not tensor.requires_grad)
    values = [(t, t.detach().clone()) for t in dict.fromkeys((*model.buffers(), *given))]
    leaves = dict.fromkeys((*model.parameters(), *(t for t in _tensors(inputs) if t.is_leaf)))
    gradients = [(leaf, leaf.grad) for leaf in leaves]
    hooks = [leaf._post_accumulate_grad_hooks or {} for leaf in leaves]
    stepping = [(hook, dict(hook)) for hook in hooks]  # optimizers that step within the backward
    generators = random.getstate(), torch.get_rng_state()
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        drawn = numpy.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None

    @torch.no_grad()
    def rewind() -> None:
        before.restore()
        for tensor, value in values:
            if tensor.shape != value.shape:  # observers of torch.ao resize their buffers
                tensor.resize_(value.shape)
            if not torch.equal(tensor, value):
                tensor.copy_(value)
        random.setstate(generators[0])
        torch.set_rng_state(generators[1])
        if numpy is not None:
            numpy.random.set_state(drawn)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)

    for leaf, _ in gradients:
        leaf.grad = None
    for now, _ in stepping:
        now.clear()
    try:
        yield rewind
    finally:
        rewind()
        for leaf, gradient in gradients:
            leaf.grad = gradient
        for now, before in stepping:
            now.update(before)


def _count_calls(adapters: list[_Adapter]) -> None:
    """Notes the calls of every layer. The forward is wrapped, since a hook would change the way of
    modules that look for hooks (torch's encoder layers). `rewind` takes it off."""
    for layer in dict.fromkeys(adapter.layer for adapter in adapters):
        mine = [adapter for adapter in adapters if adapter.layer is layer]
        for adapter in mine:
            adapter.calls.clear()
        vars(layer)["forward"] = partial(_count, layer.forward, mine)


def _count(forward: Callable, adapters: list[_Adapter], *args: Any, **kwargs: Any) -> Any:
    rows = sum(t.numel() for t in _tensors((args, kwargs)))
    call = _Call(rows, torch.is_grad_enabled(), not torch.is_grad_enabled() and _in_function())
    for adapter in adapters:
        adapter.calls.append(call)
    return forward(*args, **kwargs)


def _in_function() -> bool:
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename == _FUNCTION:
            return True
        frame = frame.f_back
    return False


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in an output or input: mappings, sequences, dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _tensors(one)
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from _tensors(one)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for one in dataclasses.fields(value):
            yield from _tensors(getattr(value, one.name))


# ------------------------------------------------------------------------------------ the two runs


def _run(
    model: nn.Module,
    inputs: tuple,
    kwargs: dict,
    rewind: Callable,
    adapters: list[_Adapter],
    evaluate: bool = False,
    change: Callable | None = None,
) -> Any:
    rewind()
    if evaluate:
        model.eval()
    if change is not None:
        change()
    _count_calls(adapters)
    return model(*_containers(inputs), **_containers(kwargs))


def _containers(value: Any) -> Any:
    """New lists and dictionaries of the same contents, for a forward that takes things out."""
    if isinstance(value, MutableMapping):
        value = copy.copy(value)
        for key in list(value):
            value[key] = _containers(value[key])
    elif type(value) in (list, tuple):
        value = type(value)(map(_containers, value))
    return value


def _check_training(adapters: list[_Adapter], run: Callable) -> None:
    with torch.enable_grad():
        loss = _loss(run(adapters))
        if loss.requires_grad:
            loss.backward()
    finite = bool(loss.isfinite())
    for adapter in adapters:
        state, calls = adapter.state, adapter.calls
        state.calls = len(calls)
        norms = [_gradient_norm(adapter.A), _gradient_norm(adapter.B)]
        state.grad_norm = tuple(norms)
        if adapter.off is not None:
            state.problem = _OFF[adapter.off]
        elif not calls:
            state.problem = "never called"  # `_name_uncalled` looks for the reason
        elif not any(call.rows for call in calls):
            state.problem = "received no rows in this batch (an expert?); try another batch"
        elif not all(any(p.requires_grad for p in held) for held in (adapter.A, adapter.B)):
            state.problem = "is frozen: set requires_grad of lora_A and lora_B"
        elif adapter.scaling == 0:
            state.problem = "its scaling is 0; give it another alpha"
        elif None in norms:
            state.problem = _no_gradient(calls)
        elif not all(map(math.isfinite, norms)):
            what = "" if finite else ", as the loss is"
            state.problem = f"its gradient is not finite{what}; look at the batch and the dtype"
        else:
            state.problem = _zero(adapter, *norms)


def _gradient_norm(parameters: list[nn.Parameter]) -> float | None:
    norms = [float(p.grad.norm()) for p in parameters if p.grad is not None]
    return math.hypot(*norms) if norms else None


def _any(parameters: list[nn.Parameter]) -> bool:
    return any(bool(p.any()) for p in parameters)


def _no_gradient(calls: list[_Call]) -> str:
    if any(call.grad for call in calls):
        return (
            "was called, but its output does not reach the loss: unused or detached; exclude the"
            " layer (exclude_modules) or use its output"
        )
    if any(call.function for call in calls):
        return (
            "runs in an autograd function (a reentrant activation checkpoint, a reversible layer)"
            " whose inputs need no gradient; use use_reentrant=False or"
            " model.enable_input_require_grads()"
        )
    return "is called under no_grad; exclude it, or call it with gradients enabled"


def _zero(adapter: _Adapter, of_A: float, of_B: float) -> str | None:
    """A zero gradient that the other factor's being zero does not explain."""
    zero_A, zero_B = not _any(adapter.A), not _any(adapter.B)
    if zero_A and zero_B:
        return "lora_A and lora_B are both zero, so neither gets a gradient; initialise lora_A"
    dead = [
        name
        for name, norm, explained in (("lora_A", of_A, zero_B), ("lora_B", of_B, zero_A))
        if norm == 0 and not explained
    ]
    if not dead:
        return None
    return (
        f"the gradient of {' and '.join(dead)} is exactly zero: its input or its gradient is zero,"
        " or too small for the dtype"
    )


_UNCALLED = (
    "was never called in this batch: its part of the model is unused, an expert got no rows, or"
    " code takes its weight; try another batch or exclude it"
)
_OFF = {
    "merged": "is merged, so it cannot train; unmerge it (unmerge_lora, unmerge_adapter)",
    "disabled": "is disabled; leave disable_adapters, or enable the adapters",
}


def _name_uncalled(adapters: list[_Adapter], past: dict[nn.Module, str]) -> None:
    for adapter in adapters:
        if adapter.state.problem == "never called":
            reason = past.get(adapter.layer) or past.get(adapter.base)
            adapter.state.problem = (
                f"was never called: {reason}; exclude it (exclude_modules)" if reason else _UNCALLED
            )


def _loss(output: Any) -> Tensor:
    """The output's own loss, or a projection of everything floating in it."""
    own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(own, Tensor) and own.is_floating_point():
        return own.float().sum()
    generator, parts = torch.Generator().manual_seed(0), []
    for tensor in _floating(output):
        weights = torch.randn(tensor.shape, generator=generator).to(tensor.device)
        parts.append((tensor.float() * weights).sum() / max(tensor.numel(), 1) ** 0.5)
    if not parts:
        raise ValueError(
            f"model: its output, {type(output).__name__}, holds no floating tensor to take a"
            " gradient of"
        )
    return torch.stack([part.to(parts[0].device) for part in parts]).sum()


def _floating(output: Any) -> list[Tensor]:
    tensors = (torch.view_as_real(t) if t.is_complex() else t for t in _tensors(output))
    return [tensor for tensor in tensors if tensor.is_floating_point()]


# ------------------------------------------------------------------------------------------ merging


@torch.no_grad()
def _check_merging(
    model: nn.Module, adapters: list[_Adapter], run: Callable, past: dict[nn.Module, str]
) -> None:
    """Merging must not move the output; where some code reads the weight past the layer it does."""
    owners, layers = targets.owners(model), {}
    for adapter in adapters:
        weight = getattr(adapter.base, "weight", None)
        tied = isinstance(weight, Tensor) and len(owners.get(weight, ())) > 1
        if adapter.off is None and adapter.merge is not None and adapter.scaling and not tied:
            layers.setdefault(adapter.layer, []).append(adapter)
    group: list[list[_Adapter]] = []
    for layer in layers.values():
        weight = layer[0].base.weight
        held = sum(one[0].base.weight.numel() for one in group) + weight.numel()
        if group and (len(group) == _GROUP or held * weight.element_size() > _GROUP_BYTES):
            _find_moved(adapters, group, run, past)
            group = []
        group.append(layer)
    if group:
        _find_moved(adapters, group, run, past)


def _find_moved(
    adapters: list[_Adapter],
    layers: list[list[_Adapter]],
    run: Callable,
    past: dict[nn.Module, str],
) -> None:
    """Halves the layers down to those whose merging moves the output."""
    same = _merges(adapters, layers, run)
    if same is False and len(layers) > 1:
        half = len(layers) // 2
        _find_moved(adapters, layers[:half], run, past)
        _find_moved(adapters, layers[half:], run, past)
        return
    for adapter in (one for layer in layers for one in layer):
        adapter.state.merges = same
        problem = adapter.state.problem
        if same is False and problem in (None, _UNCALLED):
            adapter.state.problem = (
                f"{'acts, but' if problem is None else 'was never called, and'} merging it changes"
                " the output: "
                + past.get(adapter.layer, "in eval mode some code reads its weight past the layer")
                + "; exclude it (exclude_modules)"
            )


def _merges(adapters: list[_Adapter], layers: list[list[_Adapter]], run: Callable) -> bool | None:
    """Whether merging these layers leaves the output as it is; None where two outputs of the same
    computation cannot be compared."""
    chosen = [adapter for layer in layers for adapter in layer]
    parameters = [p for a in chosen for p in (*a.A, *a.B, *a.base.parameters(recurse=False))]
    kept = [(p, p.data, p.detach().clone()) for p in dict.fromkeys(parameters)]

    def merge() -> None:
        for layer in layers:
            layer[0].merge()

    eps = max(torch.finfo(a.base.weight.dtype).eps for a in chosen)
    kind = chosen[0].base.weight.device.type
    if torch.is_autocast_enabled(kind):
        eps = max(eps, torch.finfo(torch.get_autocast_dtype(kind)).eps)

    def round_weights() -> None:
        generator = torch.Generator().manual_seed(0)
        for weight in dict.fromkeys(a.base.weight for a in chosen):
            noise = torch.randn(weight.shape, generator=generator).to(weight)
            weight.mul_(noise.mul_(eps).add_(1))

    def outputs(change: Callable | None) -> list[Tensor]:
        output = run(adapters, evaluate=True, change=change)
        return [t.detach().to(torch.float64, copy=True) for t in _floating(output)]

    def restore() -> None:
        for parameter, data, value in kept:
            parameter.data = data
            parameter.copy_(value)
        for layer in layers:
            getattr(layer[0].layer, "merged_adapters", []).clear()

    def enlarge() -> None:
        for adapter in chosen:
            _enlarge(adapter)

    try:
        enlarge()
        apart = outputs(None)
        merged = outputs(merge)
        if not apart or [t.shape for t in apart] != [t.shape for t in merged]:
            return None
        # Each merged weight is rounded once, independently of the others; the products around it
        # too.
        bound, moved = 8 * eps * len(layers) ** 0.5, _distance(apart, merged)
        if bound < moved < _SMALL:  # a bypass, or a model that magnifies rounding
            restore()
            enlarge()
            rounded = outputs(round_weights)
            if [t.shape for t in apart] == [t.shape for t in rounded]:
                bound = 4 * _distance(apart, rounded)
        return moved <= bound
    finally:
        restore()


def _enlarge(adapter: _Adapter) -> None:
    """An adapter as large as the weight: a zero one, or a small one, would merge unseen."""
    weight, (A,), (B,) = adapter.base.weight, adapter.A, adapter.B
    size = abs(adapter.scaling) * float(A.float().norm()) * B.shape[0] ** 0.5
    std = float(weight.float().norm()) / size if size else 0.0
    if 0 < std < float("inf"):
        generator = torch.Generator().manual_seed(0)
        B.copy_(torch.randn(B.shape, generator=generator) * std)


def _distance(one: list[Tensor], other: list[Tensor]) -> float:
    """The largest over tensors of the median over rows of the relative distance: a router that
    sends a few tokens elsewhere does not count."""
    largest = 0.0
    for a, b in zip(one, other, strict=True):
        if a.numel() == 0:
            continue
        a, b = (t.reshape(-1, t.shape[-1] if t.dim() > 1 else t.numel()) for t in (a, b))
        both = a.isfinite() & b.isfinite()
        a, b = a.masked_fill(~both, 0), b.masked_fill(~both, 0)
        size = a.norm(dim=1).clamp_min(1e-30 + float(a.norm()) / len(a) ** 0.5 * 1e-3)
        largest = max(largest, float(((a - b).norm(dim=1) / size).median()))
    return largest
