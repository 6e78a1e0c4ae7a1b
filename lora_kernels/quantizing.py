"""A model's frozen weights in fewer bits, in place, and the file of such a model."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_kernels import adapters, names, targets
from lora_kernels.bases import is_conv1d, refusal
from lora_kernels.bypass import bypassed
from lora_kernels.files import open_regular, replace_atomically
from lora_kernels.nn import LoRALayer
from lora_kernels.offloading import is_offloaded
from lora_kernels.progress import progress_bar
from lora_kernels.rank import low_rank_approximation
from lora_kernels.targets import Names
from lora_kernels.weights import KINDS, QuantizedTensor, QuantizedWeight, assemble, quantize

_METADATA = "lora_kernels.quantized"


class QuantizedLayer(NamedTuple):
    """What became of one weight: bytes before and after, and the relative error of its values in
    the Frobenius norm, with `loftq` that of weight and adapter together."""

    before: int
    after: int
    error: float


@dataclass
class QuantizationReport:
    """What `quantize_base` did, by the names of the layers; prints as a short text."""

    kind: str
    layers: dict[str, QuantizedLayer] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    @property
    def before(self) -> int:
        """Bytes of the weights as they were."""
        return sum(layer.before for layer in self.layers.values())

    @property
    def after(self) -> int:
        """Bytes of the weights as they are."""
        return sum(layer.after for layer in self.layers.values())

    def __str__(self) -> str:
        lines = [f"{self.kind} on {len(self.layers)} layers: {targets.summary(list(self.layers))}"]
        if self.layers:
            errors = {name: layer.error for name, layer in self.layers.items()}
            worst, mean = max(errors, key=errors.__getitem__), sum(errors.values()) / len(errors)
            lines += [
                f"their weights: {self.before / 2**20:.1f} -> {self.after / 2**20:.1f} MiB"
                f" ({self.after / self.before:.0%})",
                f"relative error {mean:.2%} on average, at most {errors[worst]:.2%} ({worst})",
            ]
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left.items():
            reasons.setdefault(reason, []).append(name)
        lines += [
            f"left as they are {targets.summary(layers, limit=8)}: {reason}"
            for reason, layers in reasons.items()
        ]
        return "\n".join(lines)


@torch.no_grad()
def quantize_base(
    model: nn.Module,
    kind: str = "nf4",
    *,
    block: int | None = None,
    target_modules: Names = None,
    loftq: bool = False,
    progress: bool | None = None,
) -> QuantizationReport:
    """Quantises the frozen weights of a model's linear layers, in place, one after the other: the
    memory needed beside the model is that of one layer.

    The layers stay the same objects of the same classes; their `weight` becomes a frozen parameter
    of the same shape and dtype that holds a `QuantizedWeight`. What they compute changes by the
    error of the format, which the report gives.

    Args:
        model: any module; before or after `apply_lora`, not merged.
        kind, block: as in `quantize`: "int8", "nf4", "fp8" or "int4".
        target_modules: which linear layers, as in `apply_lora`; None means those with adapters, and
            in a model without any all but the output head.
        loftq: starts the adapters, which must be new, as the best approximation of each weight's
            error, so that weight and adapter together are nearer to what the weight was (Li et al.,
            2023, arXiv:2310.08659, one step).
        progress: True shows a bar (if tqdm is there), False none, None one in a terminal.

    Raises:
        ValueError: an unknown kind, a pattern that matches nothing, no layer to quantise, a weight
            that is not finite; with `loftq` an adapter that has been trained, or several. The model
            is unchanged then.
    """
    names.require_module(model)
    if kind not in KINDS:
        raise ValueError(f"kind: got {kind!r}, legal values are {', '.join(KINDS)}")
    if not isinstance(loftq, bool):
        raise TypeError(f"loftq: expected a bool, got {type(loftq).__name__}")
    quantize(torch.zeros(2, 1 << 12), kind, block=block)  # says what is wrong with these
    found, left = _candidates(model, target_modules)
    return quantize_layers(model, found, left, kind, block, loftq, progress)


@torch.no_grad()
def quantize_layers(
    model: nn.Module,
    found: dict[str, nn.Module],
    left: dict[str, str],
    kind: str,
    block: int | None = None,
    loftq: bool = False,
    progress: bool | None = None,
) -> QuantizationReport:
    """`quantize_base` of these layers by name; `left` are those that it left before."""
    report = QuantizationReport(kind, left=dict(left))
    weights: dict[Tensor, list[tuple[str, nn.Module]]] = {}
    for name, layer in found.items():
        reason = _objection(layer) or _misfit(layer, kind, block)
        if reason is None and loftq:
            reason = _why_no_start(layer)
        if reason is not None and loftq and isinstance(layer, LoRALayer):
            raise ValueError(f"loftq: {name}: {reason}")
        if reason is None:
            weights.setdefault(layer.get_parameter("weight"), []).append((name, layer))
        else:
            report.left[name] = reason
    owning = targets.owners(model, beside=True)
    for weight, layers in list(weights.items()):
        beside = set(owning.get(weight, ())) - {f"{name}.weight".lstrip(".") for name, _ in layers}
        if beside:
            del weights[weight]
            reason = f"its weight is tied to {', '.join(sorted(beside))}"
            report.left |= {name: reason for name, _ in layers}
    if not weights:
        raise ValueError(f"model: no linear layer to quantise\n{report}")
    for weight, layers in weights.items():
        if not bool(torch.isfinite(weight).all()):
            raise ValueError(
                f"model: the weight of {layers[0][0]} holds values that are not finite"
            )
    with progress_bar(progress, len(weights), "quantize") as bar:
        while weights:  # nothing here holds on to what has been replaced
            weight, layers = weights.popitem()
            owning.pop(weight, None)
            result = _quantize(weight, layers, kind, block, loftq)
            report.layers |= {name: result for name, _ in layers}
            bar.update()
    adapters.guard(model)
    order = {name: i for i, name in enumerate(found)}
    report.layers = dict(sorted(report.layers.items(), key=lambda item: order[item[0]]))
    return report


def _candidates(
    model: nn.Module, target_modules: Names
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The layers meant, and those of them that cannot be."""
    carrying = dict(adapters.lora_layers(model))
    if target_modules is None and carrying:
        return dict(carrying), {}
    plain, left = targets.find_targets(model, targets.listed("target_modules", target_modules))
    found: dict[str, nn.Module] = dict(plain)
    # Those with adapters are no targets of another.
    wanted = {name: carrying[name] for name in left if name in carrying}
    past = bypassed(model)
    found |= wanted
    left = {name: reason for name, reason in left.items() if name not in wanted}
    for name, layer in list(found.items()):
        if layer in past:
            left[name] = past[layer]
            del found[name]
    return found, left


def _objection(layer: nn.Module) -> str | None:
    """Why a layer's weight cannot be exchanged; None if it can."""
    weight = layer._parameters.get("weight")
    if isinstance(weight, QuantizedTensor):
        return "its weight is quantised already"
    if isinstance(layer, nn.Embedding):
        return "is an embedding, whose rows are looked up"
    if weight is not None and weight.dim() != 2:
        return "its weight is no matrix: of a convolution, or of experts"
    if isinstance(layer, LoRALayer):
        if layer.merged:
            return "is merged; call unmerge_lora first"
        reason = layer.why_valueless("weight")
    else:
        reason = refusal(layer, ())  # type: ignore[arg-type]  # a linear layer
    if reason is None and weight is not None and weight.is_meta:
        reason = "its weight is on the meta device, without values"
    if reason is None and is_offloaded(layer):
        reason = "its weight is offloaded"
    if reason is None and weight is not None and isinstance(layer, LoRALayer):
        reason = "its weight is trained" if weight.requires_grad else None
    return reason


def _misfit(layer: nn.Module, kind: str, block: int | None) -> str | None:
    """Why a weight's shape does not fit a format; None if it does."""
    weight = layer.get_parameter("weight")
    N, K = reversed(weight.shape) if _is_transposed(layer) else weight.shape
    try:
        quantize(torch.zeros(2, K), kind, block=block)
    except ValueError as error:
        return str(error)
    return None if N * K % 2 == 0 or kind not in ("nf4", "int4") else "an odd number of values"


def _why_no_start(layer: nn.Module) -> str | None:
    if not isinstance(layer, LoRALayer):
        return None
    reason = layer.why_fixed() or layer.why_not_two()
    if reason is None and layer.scaling == 0:
        reason = "its scaling is 0"
    if reason is None and layer.pissa_A is not None:
        reason = "it was started with PiSSA or OLoRA"
    if reason is None and bool(layer.lora_B.any()):
        reason = "its adapter is not new, lora_B is not zero"
    if reason is None and layer.rank > min(layer.weight.shape):
        reason = f"its rank of {layer.rank} is more than a weight {tuple(layer.weight.shape)} has"
    return reason


def _is_transposed(layer: nn.Module) -> bool:
    return is_conv1d(layer) or bool(getattr(layer, "fan_in_fan_out", False))


def _quantize(
    weight: Tensor, layers: list[tuple[str, nn.Module]], kind: str, block: int | None, loftq: bool
) -> QuantizedLayer:
    transposed = _is_transposed(layers[0][1])
    dense = weight.detach().t() if transposed else weight.detach()
    record = quantize(dense, kind, block=block)
    parameter = nn.Parameter(QuantizedTensor(record, weight.dtype, transposed), requires_grad=False)
    apart = dense.float() - record.dequantize(torch.float32)
    for _, layer in layers:
        layer.weight = parameter
        if loftq and isinstance(layer, LoRALayer):
            _start(layer, apart)
    if loftq and isinstance(layers[0][1], LoRALayer):
        first = layers[0][1]
        apart = apart - first.scaling * first.lora_B.float() @ first.lora_A.float()
    error = float(apart.norm() / dense.float().norm().clamp_min(1e-30))
    return QuantizedLayer(weight.numel() * weight.element_size(), record.nbytes, error)


def _start(layer: LoRALayer, error: Tensor) -> None:
    U, V = low_rank_approximation(error, layer.rank)
    layer.lora_B.copy_(U / layer.scaling)
    layer.lora_A.copy_(V)


# -------------------------------------------------------------------------------------------- files


def save_quantized(model: nn.Module, path: str | Path) -> None:
    """Writes a model's whole state dict, quantised weights as they are, into one safetensors file;
    `load_quantized` reads it. The file is replaced whole or not at all.

    A weight "layer.weight" is there as "layer.weight.codes", "layer.weight.scale" and what else its
    layout has; the header says of which layout it is.
    """
    from safetensors.torch import save_file

    names.require_module(model)
    tensors: dict[str, Tensor] = {}
    forms: dict[str, dict[str, object]] = {}
    seen: dict[int, str] = {}
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"model: {name} in its state dict is no tensor and has no place here")
        if isinstance(tensor, QuantizedTensor):
            record = tensor.record
            forms[name] = {
                "form": record.form,
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "transposed": tensor.transposed,
            }
            parts = {f"{name}.{part}": one for part, one in record.tensors().items()}
        else:
            parts = {name: tensor}
        for key, one in parts.items():
            # Tied tensors are written for each of their names.
            first = seen.setdefault(one.data_ptr(), key) if one.numel() else key
            tensors[key] = one.contiguous() if first == key else one.clone()
    metadata = {"format": "pt", _METADATA: json.dumps(forms)}
    replace_atomically(Path(path), lambda file: save_file(tensors, file, metadata))


@torch.no_grad()
def load_quantized(model: nn.Module, path: str | Path) -> None:
    """Reads what `save_quantized` wrote into a model of the same layers, which may be dense, on the
    meta device or quantised: weights that the file has quantised replace those of the model.

    Raises:
        FileNotFoundError: no such file. ValueError: another file, tensors that are missing, of
            another shape, or that no layer has; the model is unchanged then.
    """
    names.require_module(model)
    state = _read(Path(path))
    present = model.state_dict()
    wrong = [f"{name}: missing from the file" for name in present if name not in state]
    wrong += [f"{name}: no tensor of the model" for name in state if name not in present]
    wrong += [
        f"{name}: has shape {tuple(tensor.shape)}, the model's {tuple(present[name].shape)}"
        for name, tensor in state.items()
        if name in present and tensor.shape != present[name].shape
    ]
    if wrong:
        raise ValueError(f"path: {path} does not fit the model: {'; '.join(wrong[:8])}")
    modules = dict(model.named_modules(remove_duplicate=False))
    made: dict[Tensor, nn.Parameter] = {}
    for name in [n for n, tensor in state.items() if isinstance(tensor, QuantizedTensor)]:
        module, _, attribute = name.rpartition(".")
        old = modules[module]._parameters.get(attribute)
        if old is None:
            raise ValueError(f"path: {name} is no parameter of the model, and quantised in {path}")
        tensor = state.pop(name).to(old.device if not old.is_meta else "cpu")
        made.setdefault(old, nn.Parameter(tensor, requires_grad=False))
        setattr(modules[module], attribute, made[old])
    on_meta = any(tensor.is_meta for name, tensor in present.items() if name in state)
    model.load_state_dict(state, strict=False, assign=on_meta)


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    file, _ = open_regular(path)
    file.close()
    try:
        with safe_open(str(path), framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        forms = json.loads(metadata[_METADATA])
        state = {}
        for name, given in forms.items():
            parts = [
                tensors.pop(f"{name}.{part}") for part in given["form"].split(" ")[2].split(",")
            ]
            record: QuantizedWeight = assemble(given["form"], parts)
            dtype = getattr(torch, given["dtype"])
            state[name] = QuantizedTensor(record, dtype, bool(given["transposed"]))
    except (SafetensorError, KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise ValueError(
            f"path: {path} is no file of save_quantized, or damaged: {error!r}"
        ) from error
    return {**tensors, **state}
