"""The contract of the ops on one page: schemas, fakes, autograd. Kernels live in backends/.

All tensors are 2-D here: x [M,K], weight [N,K], lora_a [r,K], lora_b [N,r], bias [N], y and
base_out [M,N]; seed is an int64 tensor on x's device of one element, or of three where x is a part
of a larger matrix: the seed, then the row and the column (a multiple of 8) of x's first element
there, which are those of the dropout mask. s [M,r] and mask are what backward needs, of size 0 when
it does not: save_s (dB will be asked for) and save_mask are decided above autograd, where that is
known.

    s = scaling * drop(x) A^T      y = x W^T + bias + s B^T      lora_add: y = base_out + s B^T
    ds = scaling * dy B            dx = dy W + drop'(ds A)       dA = ds^T drop(x)    dB = dy^T s
"""

import sys
import threading
from collections.abc import Callable, Iterable
from functools import cache
from importlib import import_module

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from lora_kernels import _checks, _flops, _vmap, backends

_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)
_LIBRARY = torch.library.Library("lora_kernels", "DEF")

_ADAPTER = "Tensor lora_a, Tensor lora_b"
_BRANCH = "float scaling, float dropout_p, Tensor? seed"
_SCHEMAS = {
    "lora_linear": f"(Tensor x, Tensor weight, {_ADAPTER}, Tensor? bias, {_BRANCH}, bool save_s,"
    " bool save_mask) -> (Tensor y, Tensor s, Tensor mask)",
    "lora_add": f"(Tensor base_out, Tensor x, {_ADAPTER}, {_BRANCH}, bool save_s, bool save_mask)"
    " -> (Tensor y, Tensor s, Tensor mask)",
    "lora_add_": f"(Tensor(a!) base_out, Tensor x, {_ADAPTER}, {_BRANCH}) -> ()",
    "lora_linear_backward": f"(Tensor dy, Tensor x, Tensor weight, {_ADAPTER}, Tensor s,"
    f" Tensor mask, {_BRANCH}, bool need_x, bool need_weight, bool need_a, bool need_b)"
    " -> (Tensor dx, Tensor dweight, Tensor da, Tensor db)",
    "lora_add_backward": f"(Tensor dy, Tensor x, {_ADAPTER}, Tensor s, Tensor mask, {_BRANCH},"
    " bool need_x, bool need_a, bool need_b) -> (Tensor dx, Tensor da, Tensor db)",
}
OPS = tuple(_SCHEMAS)
for _name, _schema in _SCHEMAS.items():
    _LIBRARY.define(_name + _schema, tags=_TAGS)

_ops = torch.ops.lora_kernels
_CHECKS = {
    name: _checks.checker([a.name for a in getattr(_ops, name).default._schema.arguments])
    for name in OPS
}


# ------------------------------------------------------------------------------------------ kernels


def refuse_forward_mode(args: Iterable) -> None:
    """Below autograd a tangent would be dropped without a word; torch.func.jvp drops its own before
    the kernel, so autograd's part of the op asks too."""
    if forward_ad._current_level < 0:
        return
    for arg in args:
        if isinstance(arg, Tensor) and forward_ad.unpack_dual(arg).tangent is not None:
            raise NotImplementedError("lora_kernels: forward-mode AD (jvp) is not supported")


class _Vouched(threading.local):
    """Whether the arguments of the call on its way down have been checked by its caller."""

    now = False


_vouched = _Vouched()


def _vouch(op: Callable, *args):
    _vouched.now = True
    try:
        return op(*args)
    finally:
        _vouched.now = False


def _kernel(name: str):
    check = _CHECKS[name]

    def run(*args):
        refuse_forward_mode(args)
        if _vouched.now:
            _vouched.now = False
        else:
            check(args)
        if name == "lora_add_":
            _checks.check_written(*args[:2])
        device = args[0].device.type
        function = getattr(backends.choose(device).module, name)
        if torch.is_autocast_enabled(device):
            # Dtypes are settled above the op; ATen calls inside it must not be cast again.
            with torch.autocast(device, enabled=False):
                return function(*args)
        return function(*args)

    return run


for _name in OPS:
    _LIBRARY.impl(_name, _kernel(_name), "CompositeExplicitAutograd")


# -------------------------------------------------------------------------------------------- fakes


def _saved(like: Tensor, rows: int, rank: int, save_s: bool) -> tuple[Tensor, Tensor]:
    return like.new_empty(rows, rank) if save_s else like.new_empty(0), like.new_empty(0)


def _lora_linear_fake(x, weight, lora_a, lora_b, bias, scaling, dropout_p, seed, save_s, save_mask):
    refuse_forward_mode((x, weight, lora_a, lora_b, bias))
    y = x.new_empty(x.shape[0], weight.shape[0])
    return y, *_saved(x, x.shape[0], lora_a.shape[0], save_s)


def _lora_add_fake(base_out, x, lora_a, lora_b, scaling, dropout_p, seed, save_s, save_mask):
    refuse_forward_mode((base_out, x, lora_a, lora_b))
    y = base_out.new_empty(base_out.shape)
    return y, *_saved(x, x.shape[0], lora_a.shape[0], save_s)


def _gradient(like: Tensor, shape: tuple, needed: bool) -> Tensor:
    return like.new_empty(shape if needed else 0)


def _lora_linear_backward_fake(
    dy,
    x,
    weight,
    lora_a,
    lora_b,
    s,
    mask,
    scaling,
    dropout_p,
    seed,
    need_x,
    need_weight,
    need_a,
    need_b,
):
    return (
        _gradient(dy, (dy.shape[0], lora_a.shape[1]), need_x),
        _gradient(weight, weight.shape, need_weight),
        _gradient(lora_a, lora_a.shape, need_a),
        _gradient(lora_b, lora_b.shape, need_b),
    )


def _lora_add_backward_fake(
    dy, x, lora_a, lora_b, s, mask, scaling, dropout_p, seed, need_x, need_a, need_b
):
    return (
        _gradient(dy, (dy.shape[0], lora_a.shape[1]), need_x),
        _gradient(lora_a, lora_a.shape, need_a),
        _gradient(lora_b, lora_b.shape, need_b),
    )


def _checked(name: str, fake: Callable) -> Callable:
    def run(*args):
        _CHECKS[name](args)
        return fake(*args)

    return run


for _name, _fake in {
    "lora_linear": _lora_linear_fake,
    "lora_add": _lora_add_fake,
    "lora_add_": lambda *args: None,
    "lora_linear_backward": _lora_linear_backward_fake,
    "lora_add_backward": _lora_add_backward_fake,
}.items():
    torch.library.register_fake(f"lora_kernels::{_name}", _checked(_name, _fake), lib=_LIBRARY)


# ----------------------------------------------------------------------------------------- autograd


@cache
def _serve_dtensors() -> None:
    import_module("lora_kernels.backends.sharded").register(_LIBRARY)


def _below_autograd(op, keyset, args):
    """The op past its autograd kernel; keyset is None where no autograd kernel made the call, but
    one who has checked the arguments."""
    if "torch.distributed.tensor" in sys.modules:
        _serve_dtensors()
    with torch._C._AutoDispatchBelowAutograd():
        if keyset is None:
            return _vouch(op, *args)
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)


def _call_backward(op, *args):
    """A backward op. Without create_graph it goes past its own autograd kernel: one Python hop."""
    return op(*args) if torch.is_grad_enabled() else _below_autograd(op, None, args)


def _single_level(function: type[torch.autograd.Function]) -> type:
    """The function as one level of torch.func.grad sees it: within the op's autograd kernel the
    transforms have come down to that level, so nothing is left for Function.apply to arrange."""

    def forward(ctx, *args):
        # For the levels below, which have graphs and tangents of their own.
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            return function.forward(ctx, *args)

    members = {"forward": staticmethod(forward), "backward": staticmethod(function.backward)}
    return type(function.__name__, (torch.autograd.function._SingleLevelFunction,), members)


def _register_autograd(name: str, function: type[torch.autograd.Function]) -> None:
    """What torch.library.register_autograd does, at 50 us less a call: that one walks the schema in
    Python every time to fill in default arguments, of which these ops have none."""
    op = getattr(_ops, name).default

    single_level = _single_level(function)

    def dispatch(keyset, *args):
        refuse_forward_mode(args)
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            return _below_autograd(op, keyset, args)
        if torch._C._are_functorch_transforms_active():
            with enable_single_level_autograd_function():
                return single_level.apply(op, keyset, *args)
        return function.apply(op, keyset, *args)

    _LIBRARY.impl(name, dispatch, "Autograd", with_keyset=True)


def _save(ctx, output, x, weight, lora_a, lora_b, scaling, dropout_p, seed, need_input, save_s):
    _, s, mask = output
    ctx.set_materialize_grads(False)
    if lora_b.requires_grad and not save_s:
        raise RuntimeError("lora_kernels: lora_b requires grad, which needs save_s=True")
    ctx.save_for_backward(x if need_input else None, weight, lora_a, lora_b, s, mask, seed)
    ctx.scaling, ctx.dropout_p = scaling, dropout_p


def _outputs(ctx, keyset, output):
    """y alone where `call` applied the function, else the op's three."""
    if keyset is None:
        return output[0]
    ctx.mark_non_differentiable(*output[1:])
    return output


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, op, keyset, *args):
        output = _below_autograd(op, keyset, args)
        x, weight, lora_a, lora_b, bias, scaling, dropout_p, seed, save_s, _ = args
        need_input = weight.requires_grad or lora_a.requires_grad
        _save(ctx, output, x, weight, lora_a, lora_b, scaling, dropout_p, seed, need_input, save_s)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _outputs(ctx, keyset, output)

    @staticmethod
    def backward(ctx, dy, *_):
        if dy is None:
            return (None,) * 12
        x, weight, lora_a, lora_b, s, mask, seed = ctx.saved_tensors
        need_x, need_weight, need_a, need_b, need_bias = ctx.needs_input_grad[2:7]
        dx = dweight = d_a = d_b = None
        if need_x or need_weight or need_a or need_b:
            x = dy.new_empty(0) if x is None else x
            dx, dweight, d_a, d_b = _call_backward(
                _ops.lora_linear_backward.default,
                dy, x, weight, lora_a, lora_b, s, mask, ctx.scaling, ctx.dropout_p, seed,
                need_x, need_weight, need_a, need_b,
            )  # fmt: skip
        return (
            None,
            None,
            dx if need_x else None,
            dweight if need_weight else None,
            d_a if need_a else None,
            d_b if need_b else None,
            dy.sum(0).to(ctx.bias_dtype) if need_bias else None,
            *(None,) * 5,
        )


class _LoraAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, op, keyset, *args):
        output = _below_autograd(op, keyset, args)
        _, x, lora_a, lora_b, scaling, dropout_p, seed, save_s, _ = args
        need_input = lora_a.requires_grad
        _save(ctx, output, x, None, lora_a, lora_b, scaling, dropout_p, seed, need_input, save_s)
        return _outputs(ctx, keyset, output)

    @staticmethod
    def backward(ctx, dy, *_):
        if dy is None:
            return (None,) * 11
        x, _, lora_a, lora_b, s, mask, seed = ctx.saved_tensors
        need_base, need_x, need_a, need_b = ctx.needs_input_grad[2:6]
        dx = d_a = d_b = None
        if need_x or need_a or need_b:
            x = dy.new_empty(0) if x is None else x
            dx, d_a, d_b = _call_backward(
                _ops.lora_add_backward.default,
                dy, x, lora_a, lora_b, s, mask, ctx.scaling, ctx.dropout_p, seed,
                need_x, need_a, need_b,
            )  # fmt: skip
        return (
            None,
            None,
            dy if need_base else None,
            dx if need_x else None,
            d_a if need_a else None,
            d_b if need_b else None,
            *(None,) * 5,
        )


class _Once(torch.autograd.Function):
    """A backward op: without a formula of its own it would differentiate to silent zeros."""

    @staticmethod
    def forward(ctx, op, keyset, *args):
        return _below_autograd(op, keyset, args)

    @staticmethod
    def backward(ctx, *gradients):
        raise NotImplementedError("lora_kernels: double backward is not supported")


def call(name: str, *args) -> Tensor:
    """The op's y, as `functional` calls it, with arguments that it has checked. Where nothing above
    autograd listens (torch.compile, torch.func, __torch_function__), its autograd kernel is passed
    over: one trip through the dispatcher and Python less."""
    op = getattr(_ops, name).default
    if torch._C._are_functorch_transforms_active():
        # Whether a gradient will be asked for is known only at the level that asks.
        return op(*args[:-2], True, args[-4] > 0)[0]
    if torch.compiler.is_compiling() or torch.overrides.has_torch_function(args[:4]):
        return op(*args)[0]
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
        refuse_forward_mode(args)
        return _FUNCTIONS[name].apply(op, None, *args)
    return _below_autograd(op, None, args)[0]


def call_in_place(*args) -> None:
    """`lora_add_` with arguments that have been checked."""
    op = _ops.lora_add_.default
    if torch.compiler.is_compiling():
        op(*args)
    else:
        _vouch(op, *args)


_FUNCTIONS = {
    "lora_linear": _LoraLinear,
    "lora_add": _LoraAdd,
    "lora_linear_backward": _Once,
    "lora_add_backward": _Once,
}
for _name, _function in _FUNCTIONS.items():
    _register_autograd(_name, _function)


_vmap.register(_LIBRARY)
_flops.register()
