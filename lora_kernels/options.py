"""The options of an adapter: numbers as users give them, patterns for single layers, and PEFT's
`LoraConfig`."""

import dataclasses
import math
import numbers
import re
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from peft import LoraConfig
    from typing_extensions import TypeIs

_Value = TypeVar("_Value")
# PEFT's names for apply_lora's options.
PEFT_NAMES = {
    "r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "init_lora_weights": "init",
}  # fmt: skip
_SAME_NAME = (
    "target_modules", "exclude_modules", "modules_to_save", "use_rslora", "rank_pattern",
    "alpha_pattern", "target_parameters", "use_dora", "trainable_token_indices",
)  # fmt: skip
_INITS = {
    True: "kaiming", False: "random", "pissa": "pissa", "gaussian": "gaussian",
    "orthogonal": "orthogonal", "olora": "olora", "eva": "eva", "loftq": "loftq",
}  # fmt: skip
# What `quantize_base` makes of a base that PEFT's LoftQ quantises to so many bits.
LOFTQ = {4: "nf4", 8: "int8"}
# What PEFT's models for these tasks train in full beside the adapters, where it is there.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
# Entries that say where a config comes from, or act only beside another that is refused.
_WITHOUT_EFFECT = (
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "fan_in_fan_out", "layers_to_transform", "layers_pattern", "megatron_core",
    "qalora_group_size", "runtime_config",
)  # fmt: skip


def check_rank(value: object, argument: str = "rank") -> int:
    """It as an int of at least 1; Python's, NumPy's and 0-dim tensors are taken."""
    value = _number(value, argument, "an integer of at least 1")
    if not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"{argument}: expected an integer of at least 1, got {value!r}")
    return int(value)


def check_alpha(value: object, argument: str = "alpha") -> float | None:
    """It as a finite number other than 0, with which an adapter would never act, or None."""
    if value is None:
        return None
    value = _number(value, argument, "a number or None")
    if not math.isfinite(value):
        raise ValueError(f"{argument}: expected a finite number or None, got {value}")
    if value == 0:
        raise ValueError(f"{argument}: expected a number other than 0 or None, got {value}")
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def check_dropout(value: object) -> float:
    """It as a float in [0, 1)."""
    number = float(_number(value, "dropout", "a probability in [0, 1)"))
    if not 0 <= number < 1:
        raise ValueError(f"dropout: expected a probability in [0, 1), got {number}")
    return number


def check_flag(value: object, argument: str) -> bool:
    """It as a bool: what merely counts as true, "no" too, is a slip."""
    flag = _scalar(value)
    if not isinstance(flag, bool):
        raise TypeError(f"{argument}: expected True or False, got {value!r}")
    return flag


def _scalar(value: Any) -> object:
    """The Python value of a NumPy scalar or a 0-dim tensor that has one."""
    has_value = getattr(value, "ndim", None) == 0 and not getattr(value, "is_meta", False)
    return value.item() if has_value else value


def _number(value: object, argument: str, expected: str) -> numbers.Real:
    """TypeError for what is none, ValueError for a bool, more often a slip than a 1."""
    number = _scalar(value)
    if isinstance(number, bool) or not isinstance(number, numbers.Real):
        kind = ValueError if isinstance(number, bool) else TypeError
        raise kind(f"{argument}: expected {expected}, got {value!r}")
    return number


def of_layer(
    patterns: Mapping[str, _Value] | None, names: Iterable[str], default: _Value
) -> _Value:
    """What holds for the layer that goes by these names, by PEFT's rule: each pattern is an
    expression for the last parts of a name, the first that matches wins."""
    for pattern, value in (patterns or {}).items():
        if any(_matches(pattern, name) for name in names):
            return value
    return default


def of_layers(
    argument: str,
    patterns: Mapping[str, Any] | None,
    layers: Mapping[str, list[str]],
    default: _Value,
    check: Callable[[object, str], _Value],
) -> dict[str, _Value]:
    """What holds for each of these layers, of which all names are given; every value checked.

    Raises:
        ValueError: a pattern that is no expression or matches none of the layers.
    """
    names = list(chain.from_iterable(layers.values()))
    checked: dict[str, _Value] = {}
    if not isinstance(patterns or {}, Mapping):
        raise TypeError(f"{argument}: expected {{expression: value}}, got {patterns!r}")
    for pattern, value in (patterns or {}).items():
        checked[pattern] = check(value, f"{argument}[{pattern!r}]")
        try:
            found = any(_matches(pattern, name) for name in names)
        except re.error as error:
            raise ValueError(
                f"{argument}: {pattern!r} is no regular expression: {error}"
            ) from error
        if not found:
            shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if names[8:] else "")
            raise ValueError(f"{argument}: {pattern!r} matches no target; there are {shown}")
    return {name: of_layer(checked, places, default) for name, places in layers.items()}


def _matches(pattern: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def refuse_unknown(given: Iterable[str]) -> None:
    """TypeError for options that apply_lora does not have, with what to type for PEFT's names."""
    for name in given:
        if name in PEFT_NAMES:
            raise TypeError(f"apply_lora: {name} is called {PEFT_NAMES[name]} here")
        raise TypeError(f"apply_lora: got an unexpected keyword argument {name!r}")


def is_config(value: object) -> "TypeIs[LoraConfig]":
    """Whether it is one of PEFT's configs, of any kind: `from_peft` refuses others than LoRA's."""
    return hasattr(value, "peft_type")


def from_peft(
    config: "LoraConfig", modules: Iterable[str], model_type: str | None
) -> dict[str, Any]:
    """The options of apply_lora that mean what a `peft.LoraConfig` does, for a model with modules
    of these names.

    Raises:
        TypeError: another of PEFT's configs. ValueError: an option that apply_lora does not have is
            switched on.
    """
    kind = type(config).__name__
    if getattr(config.peft_type, "value", config.peft_type) != "LORA":
        raise TypeError(f"rank: expected an integer or a peft.LoraConfig, got {kind}")
    modules = list(modules)
    _require_supported(config, kind)
    options = {name: getattr(config, name) for name in _SAME_NAME}
    options |= {ours: getattr(config, theirs) for theirs, ours in PEFT_NAMES.items()}
    options["init"] = _INITS[config.init_lora_weights]
    if options["init"] == "loftq":
        options["loftq_kind"] = _loftq_kind(config.loftq_config, kind)
    targets: Iterable[str] | None = config.target_modules
    if targets is None or not (targets or config.target_parameters):
        targets = _default_targets(model_type, kind)
    options["target_modules"] = targets if isinstance(targets, str) else [*targets]
    if config.layers_to_transform not in (None, []):
        options["target_modules"] = _of_layers(config, targets, modules)
    task: str | None = getattr(config.task_type, "value", config.task_type)
    heads = _HEADS.get(task or "", ())
    last_parts = {name.rpartition(".")[2] for name in modules}
    # PEFT adds its names of heads to every config; of those the model may lack some.
    wanted = dict.fromkeys((*(config.modules_to_save or ()), *heads))
    saved = [name for name in wanted if name not in heads or name in last_parts]
    options["modules_to_save"] = saved or None
    return options


def _require_supported(config: "LoraConfig", kind: str) -> None:
    cure = "make the model with PEFT and call fuse_peft(peft_model)"
    init = config.init_lora_weights
    if init not in _INITS:
        raise ValueError(
            f"{kind}: init_lora_weights = {init!r} is not supported, only"
            f" {', '.join(map(repr, _INITS))}; {cure}"
        )
    for field in dataclasses.fields(config):
        name, value = field.name, getattr(config, field.name)
        if name in _WITHOUT_EFFECT or name in _SAME_NAME or name in PEFT_NAMES:
            continue
        if name == f"{init}_config":  # of LoftQ; EVA's goes to initialize_eva
            continue
        if name == "inference_mode" and value:
            raise ValueError(
                f"{kind}: inference_mode = True freezes the adapter; set it to False to train, or"
                " read a saved adapter by load_adapter"
            )
        if value and value != field.default:
            raise ValueError(f"{kind}: {name} = {value!r} is not supported; {cure}")


def _loftq_kind(given: Any, kind: str) -> str:
    """The format that a `loftq_config` stands for."""
    bits, steps = given.get("loftq_bits", 4), given.get("loftq_iter", 1)
    if bits not in LOFTQ or steps != 1:
        raise ValueError(
            f"{kind}: loftq_config: got loftq_bits={bits}, loftq_iter={steps}, legal are"
            f" {' or '.join(map(str, LOFTQ))} bits and one step"
        )
    return LOFTQ[bits]


def _default_targets(model_type: str | None, kind: str) -> Iterable[str]:
    """The targets that PEFT chooses for an architecture where a config names none."""
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as known

    if model_type not in known:
        raise ValueError(
            f"{kind}: target_modules is not given and PEFT has no default for this model; name"
            " them, or write target_modules='all-linear'"
        )
    return known[model_type]


def _of_layers(config: "LoraConfig", targets: Iterable[str], modules: list[str]) -> str:
    """An expression for those targets that lie in the layers of `layers_to_transform`: by PEFT's
    rule the first number after one of `layers_pattern`, or after any name."""
    given = config.layers_to_transform
    indices = {given} if isinstance(given, int) else set(given or ())
    patterns = config.layers_pattern or r"[^.]*"
    patterns = [patterns] if isinstance(patterns, str) else patterns

    def index(name: str) -> int | None:
        for pattern in patterns:
            found = re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name)
            if found:
                return int(found.group(1))
        return None

    endings = tuple(f".{part}" for part in targets)
    names = [n for n in modules if f".{n}".endswith(endings) and index(n) in indices]
    if not names:
        raise ValueError(
            f"layers_to_transform: no target lies in the layers {sorted(indices)}"
            + (f" of {config.layers_pattern}" if config.layers_pattern else "")
        )
    return "|".join(map(re.escape, names))
