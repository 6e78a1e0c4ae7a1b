"""Flop formulas of the ops, for torch.utils.flop_counter.

That module imports triton, so it is left to whoever wants to count: the formulas go into its
registry when it is imported, which is before the first FlopCounterMode copies the registry.
"""

import importlib.util
import sys
from importlib.abc import MetaPathFinder
from types import ModuleType

import torch

_COUNTER = "torch.utils.flop_counter"


def _lora_linear(x, weight, lora_a, *args, out_shape=None, **kwargs) -> int:
    (M, K), (N, _), (r, _) = x, weight, lora_a
    return 2 * M * (K * N + r * (K + N))


def _lora_add(base_out, x, lora_a, *args, out_shape=None, **kwargs) -> int:
    (M, N), (_, K), (r, _) = base_out, x, lora_a
    return 2 * M * r * (K + N)


def _branch_backward(
    M: int, N: int, K: int, r: int, need_x: bool, need_a: bool, need_b: bool
) -> int:
    ds, dx, d_a, d_b = need_x or need_a, need_x, need_a, need_b
    return 2 * M * r * (N * ds + K * dx + K * d_a + N * d_b)


def _lora_linear_backward(dy, x, weight, lora_a, *args, out_shape=None, **kwargs) -> int:
    (M, N), (r, K) = dy, lora_a
    need_x, need_weight, need_a, need_b = args[-4:]
    return 2 * M * N * K * (need_x + need_weight) + _branch_backward(
        M, N, K, r, need_x, need_a, need_b
    )


def _lora_add_backward(dy, x, lora_a, *args, out_shape=None, **kwargs) -> int:
    (M, N), (r, K) = dy, lora_a
    return _branch_backward(M, N, K, r, *args[-3:])


_FORMULAS = {
    "lora_linear": _lora_linear,
    "lora_add": _lora_add,
    "lora_add_": _lora_add,
    "lora_linear_backward": _lora_linear_backward,
    "lora_add_backward": _lora_add_backward,
}


def register() -> None:
    """Registers the formulas now if the counter is imported, else once it is."""
    if _COUNTER in sys.modules:
        _fill(sys.modules[_COUNTER])
    else:
        sys.meta_path.insert(0, _Finder())


def _fill(counter: ModuleType) -> None:
    for name, formula in _FORMULAS.items():
        counter.register_flop_formula(getattr(torch.ops.lora_kernels, name))(formula)


class _Finder(MetaPathFinder):
    """Finds the counter as the other finders do, once, and fills its registry after its code."""

    def find_spec(self, name, path=None, target=None):
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _fill(module)

        spec.loader.exec_module = exec_module
        return spec
