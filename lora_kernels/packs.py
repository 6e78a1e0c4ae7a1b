"""Layers that a forward calls on one tensor, computed at the first of these calls.

A pack watches which of its layers are called on the same tensor, and from the second round on
computes those together: the first layer's call makes the outputs of all, the others take theirs.
Whoever gets another tensor (a hook changed it, a cache gave it) computes for itself.
"""

import copy
import weakref
from collections.abc import Mapping, Sequence
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels import names, packed
from lora_kernels._dispatch import in_backward, saved_tensors_have_hooks
from lora_kernels.packed import Projection, project

_MOST_MISSES = 3


class Packable(nn.Module):
    """A layer that can be one of a pack; mixed in before nn.Module."""

    _pack: "Pack | None" = None

    def projection(self, x: Tensor) -> Projection | None:
        """What the forward of x computes now; None where it is more than that."""
        raise NotImplementedError

    def leave_pack(self) -> None:
        self.__dict__.pop("_pack", None)


class Pack:
    """Layers of one width. They are made its own.

    What is computed together changes between forwards only, and none of which a part may be
    computed again in a backward (`torch.utils.checkpoint`) sees a change in between: where hooks of
    saved tensors were there, it waits for an optimizer's step, after which no earlier graph counts.
    """

    def __init__(self, layers: Sequence[Packable]) -> None:
        self._layers: list[Packable] = list(layers)
        self._settled = False
        self._seen: list[Packable] = []
        self._seen_x: weakref.ref[Tensor] | None = None
        self._misses = 0
        # Of the parameters, when a forward was last one that may be computed again.
        self._versions: list[int] | None = None
        # Of each thread: the tensor, its version then, the outputs that wait for their layers.
        self._held: dict[int, tuple[Tensor, int, dict[Packable, Tensor]]] = {}
        for layer in self._layers:
            layer.__dict__["_pack"] = self

    def __deepcopy__(self, memo: dict[int, Any]) -> "Pack":
        """Of the copies of its layers, which each of them makes when it is copied first."""
        copied = memo[id(self)] = Pack.__new__(Pack)
        copied.__dict__.update(self._blank())
        copied._layers = [copy.deepcopy(layer, memo) for layer in self._layers]
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return self._blank()

    def _blank(self) -> dict[str, Any]:
        """Without what is of calls that are being made."""
        return {**self.__dict__, "_seen": [], "_seen_x": None, "_versions": None, "_held": {}}

    def __call__(self, layer: Packable, x: Tensor) -> Tensor | None:
        """The layer's output; None where it is to compute for itself."""
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        thread = get_ident()
        held = self._held.get(thread)
        if held is not None:
            of, version, outputs = held
            if of is x and x._version == version and layer in outputs:
                y = outputs.pop(layer)
                if not outputs:
                    del self._held[thread]
                    self._misses = 0
                return y
        if not self._settled:
            self._watch(layer, x)
            if not self._settled:
                return None
        if layer is not self._layers[0] or not packed.packs_rows(x):
            return None
        if held is not None and self._held.pop(thread, None) is not None:
            self._misses += 1  # outputs that nobody took
        if self._misses >= _MOST_MISSES and self._may_change():
            for one in self._layers:
                one.leave_pack()
            return None
        self._note()
        return self._compute(x, thread)

    def _compute(self, x: Tensor, thread: int) -> Tensor | None:
        if any(layer.__dict__.get("_pack") is not self for layer in self._layers):
            return None  # one is a plain layer again
        projections = [layer.projection(x) for layer in self._layers]
        known = [p for p in projections if p is not None]
        if len(known) < len(projections):
            return None
        ys = project(x, known, only_as_one=True)
        if not ys:
            return None
        first, *others = ys
        self._held[thread] = x, x._version, dict(zip(self._layers[1:], others, strict=True))
        return first

    def _watch(self, layer: Packable, x: Tensor) -> None:
        """Until a layer gets another tensor; then those that had the last one are the pack."""
        if _is_computed_again():
            return
        if self._seen_x is not None and self._seen_x() is x and layer not in self._seen:
            self._seen.append(layer)
        elif len(self._seen) > 1:
            # With the first of them in a new round.
            if layer is self._seen[0] and self._may_change():
                for one in self._layers:
                    if one not in self._seen:
                        one.leave_pack()
                self._layers, self._seen, self._seen_x = self._seen, [], None
                self._settled = True
                return
        else:
            self._seen, self._seen_x = [layer], weakref.ref(x)
        self._note()

    def _note(self) -> None:
        """That a forward is made, which a backward may compute again."""
        if saved_tensors_have_hooks() and not in_backward():
            self._versions = self._counted()

    def _may_change(self) -> bool:
        if _is_computed_again():
            return False
        return self._versions is None or self._versions != self._counted()

    def _counted(self) -> list[int]:
        return [p._version for layer in self._layers for p in layer.parameters() if p.requires_grad]

    def state(self, name_of: Mapping[nn.Module, str]) -> dict[str, Any]:
        """What it has found out; its layers by name."""
        return {
            "layers": [name_of[layer] for layer in self._layers],
            "seen": [name_of[layer] for layer in self._seen],
            "settled": self._settled,
            "misses": self._misses,
            "waits": not self._may_change(),
        }

    @classmethod
    def of_state(cls, state: Mapping[str, Any], modules: Mapping[str, Any]) -> "Pack":
        """The other way of `state`."""
        pack = cls([modules[name] for name in state["layers"]])
        pack._seen = [modules[name] for name in state["seen"]]
        pack._settled, pack._misses = state["settled"], state["misses"]
        pack._versions = pack._counted() if state["waits"] else None
        return pack


def packs_state(model: nn.Module) -> list[dict[str, Any]]:
    """What the packs of a model have found out, as plain values: sums are rounded by it."""
    name_of = {module: name for name, module in names.named_modules(model)}
    packs = {layer._pack: None for layer in name_of if isinstance(layer, Packable)}
    return [pack.state(name_of) for pack in packs if pack is not None]


def check_packs(model: nn.Module, states: Any) -> None:
    """ValueError: no `packs_state` of a model made as this one."""
    modules = dict(names.named_modules(model))
    kinds = {"layers": list, "seen": list, "settled": bool, "misses": int, "waits": bool}
    for state in states if isinstance(states, list) else [states]:
        if not isinstance(state, dict) or {k: type(v) for k, v in state.items()} != kinds:
            raise ValueError("packs: expected a list of what each pack of layers has found out")
        for name in (*state["layers"], *state["seen"]):
            layer = modules.get(name) if isinstance(name, str) else None
            if not isinstance(layer, Packable) or layer._pack is None:
                raise ValueError(
                    f"packs: computes {name} together with others (fuse_blocks), the model does not"
                )


def load_packs(model: nn.Module, states: Sequence[Mapping[str, Any]]) -> None:
    """Has the layers of a model packed as those that `packs_state` was asked of."""
    modules = dict(names.named_modules(model))
    for layer in modules.values():
        if isinstance(layer, Packable):
            layer.leave_pack()
    for state in states:
        Pack.of_state(state, modules)


def _is_computed_again() -> bool:
    """Whether this is a forward that must save what the first one did. (A reentrant checkpoint's is
    the first that saves anything.)"""
    return in_backward() and saved_tensors_have_hooks()
