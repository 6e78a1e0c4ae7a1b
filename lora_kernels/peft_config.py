"""PEFT's adapter_config.json: its entries checked, and what they say of a layer."""

import math
import re
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any, TypeGuard

from lora_kernels.adapter_files import shown
from lora_kernels.patterns import Matcher

PREFIX = "base_model.model."  # what PEFT puts before the model's own names
# What follows that in the keys of its files: of A and B, those of an embedding too, and of DoRA.
FACTOR_KEY = re.compile(r"(?P<layer>.+)\.lora_(?P<table>embedding_)?(?P<part>[AB])(?:\.weight)?")
MAGNITUDE_KEY = re.compile(r"(?P<layer>.+)\.lora_magnitude_vector(?:\.weight)?")
# Starts that leave PEFT's base weight as it is; "pissa", "olora" and others change it on loading.
_INITS_BESIDE_THE_BASE = ("gaussian", "eva", "orthogonal", "mica")
# Options of PEFT that change what an adapter computes and that this library does not have.
_UNSUPPORTED = (
    "use_qalora", "use_bdlora", "lora_bias", "alora_invocation_tokens", "arrow_config",
    "layer_replication", "kasa_config",
    "monteclora_config", "velora_config",
)  # fmt: skip
# Those that say nothing of what a stored adapter computes.
_WITHOUT_EFFECT = (
    "auto_mapping", "corda_config", "ensure_weight_tying", "eva_config", "loftq_config",
    "lora_ga_config", "megatron_config", "megatron_core", "peft_version", "qalora_group_size",
    "revision", "runtime_config", "task_type", "inference_mode",
)  # fmt: skip


def is_number(value: object) -> TypeGuard[float]:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def _is_rank(value: object) -> bool:
    return is_number(value) and value >= 1 and value == int(value)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)


def _is_one_or_names(value: object) -> bool:
    return isinstance(value, str) or _is_names(value)


def _is_index(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_rows(value: object) -> bool:
    if isinstance(value, dict):
        return all(map(_is_rows, value.values()))
    return isinstance(value, list) and all(map(_is_index, value))


def _of_patterns(of: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, dict) and all(map(of, value.values()))


# Entry -> (whether a value is legal, which are); null is legal everywhere but in the first rows.
_REQUIRED = {"r", "lora_alpha"}
_ENTRIES: dict[str, tuple[Callable[[object], bool], str]] = {
    "r": (_is_rank, "an integer of at least 1"),
    "lora_alpha": (is_number, "a finite number"),
    "rank_pattern": (_of_patterns(_is_rank), "integers of at least 1 by pattern"),
    "alpha_pattern": (_of_patterns(is_number), "finite numbers by pattern"),
    "lora_dropout": (lambda v: is_number(v) and 0 <= v < 1, "a probability in [0, 1)"),
    "use_rslora": (_is_flag, "true or false"),
    "use_dora": (_is_flag, "true or false"),
    "fan_in_fan_out": (_is_flag, "true or false"),
    "bias": (_is_text, "'none'"),
    "base_model_name_or_path": (_is_text, "text"),
    "init_lora_weights": (lambda v: _is_flag(v) or _is_text(v), "true, false or text"),
    "target_modules": (_is_one_or_names, "names, or one expression"),
    "exclude_modules": (_is_one_or_names, "names, or one expression"),
    "target_parameters": (_is_names, "names"),
    "trainable_token_indices": (_is_rows, "row numbers, or row numbers by name"),
    "modules_to_save": (_is_names, "names"),
    "layers_pattern": (_is_one_or_names, "names"),
    "layers_to_transform": (
        lambda v: _is_index(v) or (isinstance(v, list) and all(map(_is_index, v))), "indices"
    ),
}  # fmt: skip


class Config:
    """The entries of a config; ValueError, without the file's name, for what is not legal."""

    def __init__(self, entries: dict[str, Any]) -> None:
        kind = entries.get("peft_type")
        if kind != "LORA":
            raise ValueError(f"expected peft_type 'LORA', got {shown(kind)}")
        for option in _UNSUPPORTED:
            if entries.get(option):
                raise ValueError(
                    f"{option} = {shown(entries[option])} is not supported; load it with PEFT"
                )
        for name, (legal, which) in _ENTRIES.items():
            value = entries.get(name)
            absent = name not in entries or (value is None and name not in _REQUIRED)
            if not absent and not legal(value):
                raise ValueError(f"{name}: got {shown(value)}, legal is {which}")
        init = entries.get("init_lora_weights")
        if isinstance(init, str) and init not in _INITS_BESIDE_THE_BASE:
            raise ValueError(
                f"init_lora_weights = {shown(init)} stands on a changed base; save it from PEFT"
                " with path_initial_model_for_weight_conversion"
            )
        bias = entries.get("bias") or "none"
        if bias != "none":
            raise ValueError(f"bias = {shown(bias)} is not supported, only 'none'")
        self.entries = entries
        self.dropout = float(entries.get("lora_dropout") or 0.0)
        self.use_dora = bool(entries.get("use_dora"))
        self.base = entries.get("base_model_name_or_path")
        self.target_parameters: list[str] = entries.get("target_parameters") or []
        saved = entries.get("modules_to_save") or []
        self.modules_to_save: list[str] = [name.removeprefix(PREFIX) for name in saved]
        self._matcher = Matcher()

    @property
    def unknown(self) -> list[str]:
        """Options that are switched on and that this library has never heard of."""
        known = {"peft_type", *_ENTRIES, *_UNSUPPORTED, *_WITHOUT_EFFECT}
        return sorted(name for name, value in self.entries.items() if value and name not in known)

    @property
    def names_targets(self) -> bool:
        """Whether it has names of targets, of which convolutions may be some."""
        return self.entries.get("target_modules") != "all-linear"

    @property
    def origin(self) -> str:
        """Where an adapter that does not fit belongs."""
        base = f", {self.base}" if self.base else ""
        return f"; load it into the model it was trained on{base}"

    def layer(self, name: str) -> tuple[int, float, bool]:
        """(rank, alpha, use_rslora) of one layer, with PEFT's rule for patterns: the first that
        matches."""
        return (
            int(self._of_layer("rank_pattern", name, self.entries.get("r", 8))),
            self._of_layer("alpha_pattern", name, self.entries.get("lora_alpha", 8)),
            bool(self.entries.get("use_rslora")),
        )

    def _of_layer(self, entry: str, name: str, default: float) -> float:
        for pattern, value in (self.entries.get(entry) or {}).items():
            if self._matches(entry, pattern, name, self._matcher.ends_with):
                found: float = value
                return found
        return default

    def _matches(
        self, entry: str, pattern: str, name: str, rule: Callable[[str, str], bool]
    ) -> bool:
        try:
            return rule(pattern, name)
        except ValueError as error:
            raise ValueError(f"{entry}: {error}") from None

    def targeted(self, layers: Iterable[str], head: str | None) -> list[str]:
        """Those linear layers that target_modules and target_parameters name, as PEFT reads
        them."""
        return [name for name in layers if self._is_targeted(name, head)]

    def parameters(self, names: Iterable[str]) -> list[str]:
        """Those parameters that target_parameters names."""
        wanted = tuple(f".{parameter}" for parameter in self.target_parameters)
        return [name for name in names if f".{name}".endswith(wanted)]

    def _is_targeted(self, name: str, head: str | None) -> bool:
        if self.parameters([f"{name}.weight"]):
            return True
        if self.entries.get("target_modules") == "all-linear":
            named = name != head
        else:
            named = self._is_named("target_modules", name)
        return named and not self._is_named("exclude_modules", name) and self._is_in_layers(name)

    def _is_named(self, entry: str, name: str) -> bool:
        wanted = self.entries.get(entry) or ()
        if isinstance(wanted, str):
            return self._matches(entry, wanted, name, self._matcher.matches)
        return any(f".{name}".endswith(f".{part}") for part in wanted)

    def _is_in_layers(self, name: str) -> bool:
        wanted = self.entries.get("layers_to_transform")
        if wanted is None or wanted == []:
            return True
        lists = self.entries.get("layers_pattern") or ()
        lists = [lists] if isinstance(lists, str) else lists
        parts = name.split(".")
        indices = [
            int(part)
            for before, part in pairwise(parts[:-1])
            if part.isdecimal() and (not lists or before in lists)
        ]
        return bool(indices) and indices[-1] in (wanted if isinstance(wanted, list) else [wanted])

    def is_saved(self, owner: str) -> bool:
        """Whether modules_to_save names this module or one around it."""
        parts = owner.split(".")
        around = [".".join(parts[: i + 1]) for i in range(len(parts))]
        return any(f".{n}".endswith(f".{one}") for n in around for one in self.modules_to_save)
