"""Flop formulas of the ops, for torch.utils.flop_counter.

That module imports triton, so it is left to whoever wants to count: the formulas go into its
registry when it is imported, which is before the first FlopCounterMode copies the registry.
"""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from lora_kernels._contract import OPS, Op
from lora_kernels._namespace import ops

_COUNTER = "torch.utils.flop_counter"
# Of ops beside those of the contract, for a counter that is not there yet.
_more: dict[str, Callable[..., int]] = {}


def _formula(op: Op) -> Callable[..., int]:
    """Two per multiplication of the products that the op is made of, by the shapes of tensors."""

    def count(*args: Any, out_shape: object = None, **kwargs: object) -> int:
        sizes = op.sizes(args)
        M, N, K, r = (sizes[letter] for letter in "MNKr")
        if not op.is_backward:
            return 2 * M * (K * N * op.has_weight + r * (K + N))
        need = op.need(args)
        branch = N * (need.x or need.a) + K * need.x + K * need.a + N * need.b
        return 2 * M * (r * branch + K * N * op.has_weight * (need.x + need.weight))

    return count


def register() -> None:
    """Registers the formulas now if the counter is imported, else once it is."""
    if _COUNTER in sys.modules:
        _fill(sys.modules[_COUNTER])
    else:
        sys.meta_path.insert(0, _Finder())


def add(name: str, formula: Callable[..., int]) -> None:
    """The flops of another op, by the shapes of its tensors, now or once there is a counter."""
    if _COUNTER in sys.modules:
        counter: Any = sys.modules[_COUNTER]
        counter.register_flop_formula(getattr(ops, name))(formula)
    else:
        _more[name] = formula


def _fill(counter: ModuleType) -> None:
    for name, op in OPS.items():
        counter.register_flop_formula(getattr(ops, name))(_formula(op))
    for name, formula in _more.items():
        counter.register_flop_formula(getattr(ops, name))(formula)


class _Finder(MetaPathFinder):
    """Finds the counter as the other finders do, once, and fills its registry after its code."""

    def find_spec(
        self,
        name: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _fill(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]  # of this one loader
        return spec
