"""Memory that shows what was not written, and who writes beside it."""

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lora_kernels.backends import cuda, dequantized
from lora_kernels.backends.cuda import coded
from lora_kernels.testing import WrongResult

_BAND = 1 << 16  # bytes on either side; a multiple of what allocators and TMA align to
_BYTE = 255  # a NaN in every floating type, and not the one that arithmetic gives
_ENTRIES = (
    (cuda, "forward"), (cuda, "add_"), (cuda, "backward"), (coded, "forward"),
    (dequantized, "product"),
)  # fmt: skip
_aten = torch.ops.aten
_EMPTY = (
    _aten.empty.memory_format,
    _aten.empty_like.default,
    _aten.empty_strided.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
)
_FILLED = (
    _aten.zeros.default,
    _aten.zeros_like.default,
    _aten.new_zeros.default,
    _aten.full.default,
    _aten.full_like.default,
    _aten.new_full.default,
)


class GuardBands(TorchDispatchMode):
    """What is allocated within this context, by name and not as the result of arithmetic, is the
    middle of something larger, and what is not filled holds NaN. Below the dispatcher's ops alone:
    an op of ours that is called within is one call, whose insides it does not see."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._held: list[tuple[Tensor, torch.Size]] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if (func not in _EMPTY and func not in _FILLED) or not out.numel():
            return out
        size = out.untyped_storage().nbytes()
        whole = torch.full((2 * _BAND + size,), _BYTE, dtype=torch.uint8, device=out.device)
        self._held.append((whole, out.shape))
        middle = whole[_BAND : _BAND + size].view(out.dtype).as_strided(out.shape, out.stride())
        return middle if func in _EMPTY else middle.copy_(out)

    def require_whole(self, name: str) -> None:
        """WrongResult where a band has been written to."""
        for whole, shape in self._held:
            for where, band in (("before", whole[:_BAND]), ("past", whole[-_BAND:])):
                written = int((band != _BYTE).sum())
                if written:
                    raise WrongResult(
                        f"{name}: wrote {where} the memory of an output or part {list(shape)},"
                        f" {written} bytes of the band there"
                    )


@contextlib.contextmanager
def guarded(name: str) -> Iterator[None]:
    """What plans allocate lies between bands; WrongResult at the end where one was written to."""
    bands = GuardBands()

    def within(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            with bands:
                return function(*args)

        return run

    with contextlib.ExitStack() as stack:
        # Below the op, which is one call to a mode that is entered around it.
        for module, entry in _ENTRIES:
            run = within(getattr(module, entry))
            stack.enter_context(mock.patch.object(module, entry, run))
        yield
    bands.require_whole(name)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """New memory holds NaN."""
    memory: Any = torch.utils.deterministic
    before = torch.get_deterministic_debug_mode(), memory.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of cuBLAS, which need not be deterministic here
        torch.use_deterministic_algorithms(True, warn_only=True)
        memory.fill_uninitialized_memory = True
        try:
            yield
        finally:
            torch.set_deterministic_debug_mode(before[0])
            memory.fill_uninitialized_memory = before[1]
