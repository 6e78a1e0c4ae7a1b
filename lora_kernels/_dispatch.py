"""How a call comes to its kernel: the one room with private parts of torch.

With them a call costs one trip through the dispatcher and little Python. Where torch lacks one of
them, or with LORA_KERNELS_PUBLIC_DISPATCH=1, torch.library's own registration of autograd serves,
which walks the schema in Python at every call (about 50 us more) and computes the same;
torch.func's transforms of a gradient (grad, vjp, jacrev) are refused there by torch itself.
"""

import sys
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad, profiler
from torch.autograd.graph import increment_version

from lora_kernels import _env
from lora_kernels._contract import OPS, Args, Op
from lora_kernels._namespace import NAMESPACE, ops, qualified

if TYPE_CHECKING:
    from torch._C import DispatchKeySet
    from torch._ops import OpOverload

try:
    from torch._C import (
        _after_autograd_keyset,
        _any_requires_grad,
        _are_functorch_transforms_active,
        _AutoDispatchBelowAutograd,
        _is_any_autocast_enabled,
        _is_tracing,
        _len_torch_dispatch_stack,
        _len_torch_function_stack,
    )
    from torch._C._functorch import TransformType, get_interpreter_stack, is_legacy_batchedtensor
    from torch._functorch.utils import enable_single_level_autograd_function
    from torch.autograd.forward_ad import _set_fwd_grad_enabled
    from torch.autograd.function import _SingleLevelFunction
except ImportError:  # a later torch
    PRIVATE = False
else:
    PRIVATE = not _env.PUBLIC_DISPATCH

_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)
LIBRARY = torch.library.Library(NAMESPACE, "DEF")
for _op in OPS.values():
    LIBRARY.define(_op.schema, tags=_TAGS)
_OVERLOADS: "dict[str, OpOverload]" = {name: getattr(ops, name).default for name in OPS}

# Of arguments that fit together: an op's results, None where one is not asked for.
Results = Sequence[Tensor | None]
Check = Callable[[Args], None]
Compute = Callable[[Args], Results | None]
Fake = Callable[[Args], tuple[Tensor, ...] | None]
# What an autograd formula is: save(ctx, args, output), and gradients(ctx, needs, *d_outputs), which
# gives one for every argument; needs says for which one is asked.
Save = Callable[..., None]
Gradients = Callable[..., tuple[Tensor | None, ...]]
_computes: dict[str, Compute] = {}
_functions: dict[str, type[torch.autograd.Function]] = {}
# Of these types are the arguments of a call that nobody else wants to see.
_TENSORS = frozenset((Tensor, torch.nn.Parameter))
_PLAIN_TYPES = _TENSORS | {float, int, bool, type(None)}


# ------------------------------------------------------------------------------------------ kernels


def register_kernel(op: Op, check: Check, compute: Compute) -> None:
    """What the op computes below autograd, on every device."""

    def run(*args: Any) -> tuple[Tensor, ...] | None:
        refuse_forward_mode(args)
        check(args)
        return op.filled(args, compute(args))

    LIBRARY.impl(op.name, run, "CompositeExplicitAutograd")
    _computes[op.name] = compute


def register_fake(op: Op, fake: Fake) -> None:
    """Results without values, from arguments that are checked as a kernel's are."""

    def run(*args: Any) -> tuple[Tensor, ...] | None:
        refuse_forward_mode(args)
        return fake(args)

    torch.library.register_fake(qualified(op.name), run, lib=LIBRARY)


def refuse_forward_mode(args: Args) -> None:
    """Below autograd a tangent would be dropped without a word; torch.func.jvp drops its own before
    the kernel, so autograd's part of the op asks too."""
    if getattr(forward_ad, "_current_level", 0) < 0:
        return
    for arg in args:
        if isinstance(arg, Tensor) and forward_ad.unpack_dual(arg).tangent is not None:
            raise NotImplementedError("lora_kernels: forward-mode AD (jvp) is not supported")


# ----------------------------------------------------------------------------------------- autograd


def register_autograd(op: Op, save: Save, gradients: Gradients) -> None:
    """The formula of an op, whose first result is the only one that has a gradient; what it saves
    may be None where the op has it of size 0."""
    (_register_private if PRIVATE else _register_public)(op, save, gradients)


def _register_public(op: Op, save: Save, gradients: Gradients) -> None:
    def setup_context(ctx: Any, inputs: Args, output: Sequence[Tensor]) -> None:
        save(ctx, inputs, output)
        if not op.is_backward:
            ctx.mark_non_differentiable(*output[1:])

    def backward(ctx: Any, *d_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        return gradients(ctx, ctx.needs_input_grad, *d_outputs)

    torch.library.register_autograd(
        qualified(op.name), backward, setup_context=setup_context, lib=LIBRARY
    )


def _register_private(op: Op, save: Save, gradients: Gradients) -> None:
    overload = _OVERLOADS[op.name]

    class Function(torch.autograd.Function):
        """keyset is None where `call` applies it, which takes y alone."""

        @staticmethod
        def forward(ctx: Any, keyset: "DispatchKeySet | None", *args: Any) -> Any:
            output = _below(op, args) if keyset is None else _redispatch(overload, keyset, args)
            save(ctx, args, output)
            if keyset is None:
                return output[0]
            if not op.is_backward:
                ctx.mark_non_differentiable(*output[1:])
            return output

        @staticmethod
        def backward(ctx: Any, *d_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
            return (None, *gradients(ctx, ctx.needs_input_grad[1:], *d_outputs))

    single_level = _single_level(Function)

    def dispatch(keyset: "DispatchKeySet", *args: Any) -> Any:
        refuse_forward_mode(args)
        if not (torch.is_grad_enabled() and _any_requires_grad(*args)):
            return _redispatch(overload, keyset, args)
        if _are_functorch_transforms_active():
            with enable_single_level_autograd_function():
                return single_level.apply(keyset, *args)
        return Function.apply(keyset, *args)  # type: ignore[no-untyped-call]  # torch's own

    LIBRARY.impl(op.name, dispatch, "Autograd", with_keyset=True)
    _functions[op.name] = Function


def _single_level(function: type[torch.autograd.Function]) -> Any:
    """The function as one level of torch.func.grad sees it: within the op's autograd kernel the
    transforms have come down to that level, so nothing is left for Function.apply to arrange."""

    def forward(ctx: Any, *args: Any) -> Any:
        # For the levels below, which have graphs and tangents of their own.
        with torch.enable_grad(), _set_fwd_grad_enabled(True):
            return function.forward(ctx, *args)

    members = {"forward": staticmethod(forward), "backward": staticmethod(function.backward)}
    return type(function.__name__, (_SingleLevelFunction,), members)


def define(name: str, schema: str) -> None:
    """An op beside those of the contract: one whose arguments are lists of tensors too."""
    LIBRARY.define(name + schema, tags=_TAGS)


def register(
    name: str, kernel: Callable[..., Any], fake: Callable[..., Any], formula: Any, no_vmap: str
) -> None:
    """What such an op does, by torch.library's own ways. formula: (setup_context, backward), or
    None of a backward op, which has no derivative; under vmap it raises with the words `no_vmap`.
    """

    def refuse_vmap(info: Any, in_dims: Any, *args: Any) -> NoReturn:
        raise NotImplementedError(f"lora_kernels: {no_vmap}")

    def refuse_double_backward(ctx: Any, *d_outputs: Any) -> NoReturn:
        raise NotImplementedError("lora_kernels: double backward is not supported")

    setup, gradients = formula or (lambda ctx, inputs, output: None, refuse_double_backward)
    full = qualified(name)
    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(full, fake, lib=LIBRARY)
    torch.library.register_vmap(full, refuse_vmap, lib=LIBRARY)
    torch.library.register_autograd(full, gradients, setup_context=setup, lib=LIBRARY)


def refuse_gradient_transforms(what: str) -> None:
    """For ops registered by `register`, whose autograd torch.func's transforms do not know."""
    if not PRIVATE or not _are_functorch_transforms_active():
        return
    if any(level.key() == TransformType.Grad for level in get_interpreter_stack() or ()):
        raise NotImplementedError(
            f"lora_kernels: {what} under torch.func's grad, vjp and jacrev are not supported; take"
            " gradients by backward() or torch.autograd.grad"
        )


@cache
def _serve_dtensors() -> None:
    import_module(f"{__package__}.rules.dtensor").register(LIBRARY)


def _redispatch(overload: "OpOverload", keyset: "DispatchKeySet", args: Args) -> Any:
    """The op past its autograd kernel, which the dispatcher has called."""
    if "torch.distributed.tensor" in sys.modules:
        _serve_dtensors()
    with _AutoDispatchBelowAutograd():
        return overload.redispatch(keyset & _after_autograd_keyset, *args)


# --------------------------------------------------------------------------------------- calls down


def call(name: str, *args: Any) -> Tensor:
    """The op's y, as `functional` calls it, with arguments that it has checked; save_s is the last.
    Where nothing above autograd listens (torch.compile, torch.func, __torch_function__), the op's
    autograd kernel is passed over."""
    op = OPS[name]
    if not PRIVATE:
        return _overload(op, args)[0]  # type: ignore[return-value]  # y is always there
    if _are_functorch_transforms_active():
        # Whether a gradient will be asked for is known only at the level that asks.
        y: Tensor = _OVERLOADS[name](*args[:-1], True)[0]
        return y
    if torch.compiler.is_compiling() or torch.overrides.has_torch_function(args[:4]):
        y = _OVERLOADS[name](*args)[0]
        return y
    refuse_forward_mode(args)
    if torch.is_grad_enabled() and _any_requires_grad(*args):
        y = _functions[name].apply(None, *args)
        return y
    return _below(op, args)[0]  # type: ignore[return-value]  # y is always there


def call_in_place(name: str, *args: Any) -> None:
    """An op that writes its first argument, with arguments that have been checked."""
    if PRIVATE and not torch.compiler.is_compiling() and _is_unseen(args):
        with _AutoDispatchBelowAutograd():
            _computes[name](args)
        if not args[0].is_inference():
            increment_version(args[0])
    else:
        _overload(OPS[name], args)


def call_backward(name: str, *args: Any) -> Results:
    """A backward op, from arguments that a forward has seen: x and s may be None where they are not
    read. Without create_graph it goes past its own autograd kernel."""
    op = OPS[name]
    if torch.is_grad_enabled() or not PRIVATE:
        return _overload(op, args)
    return _below(op, args)


def any_requires_grad(*tensors: Tensor | None) -> bool:
    """Whether a gradient of one of them may be asked for."""
    return bool(_any_requires_grad(*tensors))


def in_backward() -> bool:
    """Whether a backward is being computed, in which a forward is one that is computed again."""
    return torch._C._current_graph_task_id() != -1


def saved_tensors_have_hooks() -> bool:
    """Whether what is saved for backward goes through hooks now, as under
    `torch.utils.checkpoint`; where torch does not tell, it may."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or top(False) is not None


def is_unwatched(x: Tensor, w: Tensor, *others: Tensor | None) -> bool:
    """Whether nothing would see an op on these tensors, where nothing is compiled: what it computes
    is then all that matters. Written for speed."""
    if profiler._is_profiler_enabled or _is_any_autocast_enabled():
        return False
    return is_plain(x, w, *others)


def is_plain(x: Tensor, w: Tensor, *others: Tensor | None) -> bool:
    """Whether all of them are ordinary tensors and no mode or transform would do something else
    with an op on them. A profiler, which looks on, and autocast are not asked."""
    return (
        PRIVATE
        and type(x) in _TENSORS
        and type(w) in _TENSORS
        and _PLAIN_TYPES.issuperset(map(type, others))
        and not is_legacy_batchedtensor(x)  # dy of is_grads_batched
        and not _len_torch_dispatch_stack()
        and not _len_torch_function_stack()
        and not _are_functorch_transforms_active()
        and not _is_tracing()
        and getattr(forward_ad, "_current_level", 0) < 0
    )


def _below(op: Op, args: Args) -> Results:
    """The op below autograd, called by this library: where nobody there would see it, without the
    dispatcher, a third of a small call's time, and without a second check."""
    with _AutoDispatchBelowAutograd():
        if not _is_unseen(args):
            return _overload(op, args)
        return _computes[op.name](args)  # type: ignore[return-value]  # None where it writes


def _is_unseen(args: Args) -> bool:
    """Whether no mode, transform, profiler or tensor subclass is there to see the op, and the
    arguments have values."""
    return (
        _PLAIN_TYPES.issuperset(map(type, args))
        and not args[0].is_meta
        and not is_legacy_batchedtensor(args[0])  # dy of is_grads_batched
        and not _len_torch_dispatch_stack()
        and not _are_functorch_transforms_active()
        and not profiler._is_profiler_enabled
    )


def _overload(op: Op, args: Args) -> Results:
    """The op through the dispatcher."""
    if not torch.compiler.is_compiling():
        if not PRIVATE:  # torch's own part of autograd does not ask
            refuse_forward_mode(args)
        if "torch.distributed.tensor" in sys.modules:
            _serve_dtensors()
    results: Results = _OVERLOADS[op.name](*op.given(args))
    return results
