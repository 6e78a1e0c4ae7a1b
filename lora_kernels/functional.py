"""What other libraries call: checks, autocast and flattening around the ops of `_ops`."""

from collections.abc import Mapping
from numbers import Integral, Real

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_kernels import _checks, _dispatch, columns, direct, quantized, scaled
from lora_kernels import _ops as _ops  # it defines what is called
from lora_kernels._contract import DTYPES
from lora_kernels.branch import Branch, Dense
from lora_kernels.norms import weight_norms
from lora_kernels.weights import QuantizedTensor, QuantizedWeight


def lora_linear(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    magnitude: Tensor | None = None,
) -> Tensor:
    """Linear layer with a LoRA branch, in one op.

    Equivalent to::

        F.linear(x, weight, bias) + scaling * F.linear(F.linear(F.dropout(x, dropout_p), lora_a),
        lora_b)

    and with a magnitude (DoRA; Liu et al., 2024, arXiv:2402.09353), where g is magnitude / |W +
    scaling B A| of each row, to::

        F.linear(x, weight, bias) + (g - 1) * F.linear(F.dropout(x, dropout_p), weight)
        + g * scaling * F.linear(F.linear(F.dropout(x, dropout_p), lora_a), lora_b)

    Args:
        x: [..., K] of any rank >= 1 and any strides; fp32, fp16, bf16 or (slow) fp64. A nested
            tensor [B, j, K] of the jagged layout, contiguous, gives [B, j, N]; all others are
            dense.
        weight: [N, K] in x's dtype. Under autocast x, weight and bias are cast to the autocast
            dtype. Or a `QuantizedWeight`, whose values are rounded to x's dtype at most, a few MiB
            of them at a time, and which has no gradient.
        lora_a: [r, K] in x's dtype or fp32; fp32 adapters are master copies, rounded to x's dtype
            at use.
        lora_b: [N, r], likewise.
        bias: [N] in x's dtype, or None.
        scaling: factor of the branch, `lora_alpha / r` in LoRA's terms: a number, or a floating
            tensor of one element on x's device, whose value is never read on the host (one compiled
            graph, one CUDA graph for all values) and which is not differentiable.
        dropout_p: probability in [0, 1) of dropping an element of x in the branch.
        seed: of the dropout mask: an int, an int64 tensor of one element, or None to draw one from
            torch's generator. Equal seeds give equal masks on every device and backend.
        magnitude: [N] in x's dtype or fp32, or None. The norm that divides it is computed from
            products of the rank's size in every call, and is a constant to the gradients, as in the
            paper and in PEFT. Without dropout this costs one pass over y; with dropout the weight
            is multiplied twice, as the definition says.

    Returns:
        [..., N] in x's dtype. Gradients flow to x, weight, lora_a, lora_b, bias and magnitude;
        products are accumulated in fp32, the gradients of lora_a and lora_b come in their own
        dtype.

    Raises:
        TypeError: a wrong dtype or type of an argument.
        ValueError: a wrong shape, device or value.
        NotImplementedError: forward-mode AD or double backward.
    """
    if magnitude is not None:
        values = (scaling, dropout_p, seed)
        return _with_magnitude(x, weight, (lora_a, lora_b), bias, values, magnitude)
    if isinstance(weight, QuantizedTensor):
        weight = _record(weight, x)
    if isinstance(weight, QuantizedWeight):
        if seed is None and not torch.compiler.is_compiling():
            y = direct.quantized(x, weight, bias, (lora_a, lora_b, scaling, dropout_p))
            if y is not None:
                return y
        return _on_quantized(x, weight, (lora_a, lora_b), bias, (scaling, dropout_p, seed))
    if torch.jit.is_tracing():
        return F.linear(x, weight, bias) + _traced(x, (lora_a, lora_b), scaling, dropout_p, seed)
    if seed is None and not torch.compiler.is_compiling():
        y = direct.linear(x, weight, bias, (lora_a, lora_b, scaling, dropout_p))
        if y is not None:
            return y
    if not _checks.are_sound(x, lora_a, lora_b, weight, bias, linear=True):
        if _is_jagged(x):
            y = lora_linear(
                x.values(), weight, lora_a, lora_b, bias,
                scaling=scaling, dropout_p=dropout_p, seed=seed,
            )  # fmt: skip
            offsets: Tensor = x.offsets()  # type: ignore[attr-defined]  # of nested tensors alone
            return torch.nested.nested_tensor_from_jagged(y, offsets)
        x, lora_a, lora_b = _check_linear(x, weight, lora_a, lora_b, bias)
    scaling, dropout_p, seed = check_values(scaling, dropout_p, seed, x.device)
    scaling, lora_b = _fold(scaling, lora_b)
    y = _dispatch.call(
        "lora_linear", flat_rows(x), weight, lora_a, lora_b, bias, scaling, dropout_p, seed,
        torch.is_grad_enabled() and lora_b.requires_grad,
    )  # fmt: skip
    return y if x.dim() == 2 else y.view(*x.shape[:-1], lora_b.shape[0])


def linear_quantized(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """The frozen linear layer x [..., K] -> [..., N] on a quantised weight, as `lora_linear` takes
    it; differentiable in x and bias."""
    return _on_quantized(x, weight, None, bias, (1.0, 0.0, None))


_Values = tuple[float | Tensor, float, int | Tensor | None]  # scaling, dropout_p, seed


def _with_magnitude(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    pair: tuple[Tensor, Tensor],
    bias: Tensor | None,
    values: _Values,
    magnitude: Tensor,
) -> Tensor:
    if not isinstance(magnitude, Tensor):
        raise TypeError(f"magnitude: expected a Tensor or None, got {type(magnitude).__name__}")
    _checks.check_layout("magnitude", magnitude)
    if isinstance(weight, QuantizedTensor):
        weight = _record(weight, x)
    if isinstance(weight, QuantizedWeight):
        _check_quantized(x, weight, pair, bias)
    elif not _checks.are_sound(x, *pair, weight, bias, linear=True):
        _check_linear(x, weight, *pair, bias)
    N = weight.shape[0]
    if magnitude.shape != (N,):
        raise ValueError(f"magnitude: expected shape [N] = [{N}], got {_shape(magnitude)}")
    autocast = DTYPES[:3] if torch.is_autocast_enabled(x.device.type) else ()
    if magnitude.dtype not in (x.dtype, torch.float32, *autocast):
        raise TypeError(
            f"magnitude: expected x's dtype {x.dtype} or float32, got {magnitude.dtype}"
        )
    _check_devices(x.device, {"magnitude": magnitude})
    scaling, p, seed = check_values(*values, x.device)
    norms = weight_norms(weight, *pair, scaling)
    factor = magnitude.to(norms.dtype) / norms
    return scaled_linear(x, weight, pair, bias, (scaling, p, seed), factor)


def scaled_linear(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    pair: tuple[Tensor, Tensor],
    bias: Tensor | None,
    values: _Values,
    factor: Tensor,
) -> Tensor:
    """`lora_linear` with a magnitude, of which the factor [N] is known: magnitude over norm."""
    scaling, p, seed = values
    if not p:
        if isinstance(weight, Tensor):
            y = scaled.linear(x, Dense(weight, bias), pair, scaling, factor)
            if y is not None:
                return y
        z = lora_linear(x, weight, *pair, scaling=scaling, dropout_p=p, seed=seed)
        return columns.scale_columns(z, factor, bias)
    _, p, mask = check_values(1.0, p, seed, x.device)
    assert mask is not None  # with dropout
    kept = columns.dropped(x, p, mask)
    z = lora_linear(kept, weight, *pair, scaling=scaling)
    # x W^T - drop(x) W^T, which has no factor.
    if isinstance(weight, QuantizedWeight):
        rest = linear_quantized(x - kept, weight, bias)
    else:
        rest = F.linear(x - kept, weight, bias)
    return columns.scale_columns(z, factor, rest)


def _record(weight: QuantizedTensor, x: Tensor) -> QuantizedWeight:
    """What a weight of a module holds, whose dtype must fit as that of any other."""
    if weight.transposed:
        raise ValueError("weight: expected shape [N, K], got the transpose of a QuantizedTensor")
    autocast = isinstance(x, Tensor) and torch.is_autocast_enabled(x.device.type)
    if isinstance(x, Tensor) and x.dtype != weight.dtype and not autocast:
        raise TypeError(f"weight: expected x's dtype {x.dtype}, got {weight.dtype}")
    return weight.record


def _on_quantized(
    x: Tensor,
    weight: QuantizedWeight,
    pair: tuple[Tensor, Tensor] | None,
    bias: Tensor | None,
    values: _Values,
) -> Tensor:
    if torch.jit.is_tracing():
        y = F.linear(x, weight.dequantize(x.dtype), bias)
        return y if pair is None else y + _traced(x, pair, *values)
    branch, N = None, weight.shape[0]
    x, given = _check_quantized(x, weight, pair, bias)
    if pair is not None:
        scaling, dropout_p, seed = check_values(*values, x.device)
        scaling, lora_b = _fold(scaling, given[1])
        branch = Branch(given[0], lora_b, scaling, dropout_p, seed)
    return quantized.linear(flat_rows(x), weight, bias, branch).view(*x.shape[:-1], N)


def _check_quantized(
    x: Tensor, weight: QuantizedWeight, pair: tuple[Tensor, Tensor] | None, bias: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """x and the adapter as the op takes them."""
    N, K = weight.shape
    tensors = {"x": x, "bias": bias}
    if pair is not None:
        tensors |= dict(zip(("lora_a", "lora_b"), pair, strict=True))
    _check_tensors(tensors)
    if x.dim() == 0 or x.shape[-1] != K:
        raise ValueError(f"x: expected shape [..., {K}] of a weight {N} x {K}, got {_shape(x)}")
    if bias is not None and bias.shape != (N,):
        raise ValueError(f"bias: expected shape [N] = [{N}], got {_shape(bias)}")
    _check_devices(x.device, {**tensors, "weight": weight.parts[0]})
    x, given, autocast = _checks.under_autocast(x, pair or ())
    lora_a, lora_b = given or (x, x)  # of a dtype that fits
    _check_dtypes(x, lora_a, lora_b, {"bias": bias}, autocast)
    if pair is not None:
        rank, _ = _check_branch(x, lora_a, lora_b)
        if lora_b.shape[0] != N:
            raise ValueError(f"lora_b: expected shape [N, r] = [{N}, {rank}], got {_shape(lora_b)}")
    return x, given


def lora_add(
    base_out: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scaling: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """The LoRA branch on top of a base output that something else computed (quantised, foreign,
    sharded).

    Equivalent to::

        base_out + scaling * F.linear(F.linear(F.dropout(x, dropout_p), lora_a), lora_b)

    `base_out` is [..., N] with the leading dimensions of x, in x's dtype; the other arguments, the
    errors and the gradients (to base_out, x, lora_a, lora_b) are those of `lora_linear`.
    """
    if torch.jit.is_tracing():
        return base_out + _traced(x, (lora_a, lora_b), scaling, dropout_p, seed)
    base_out, x, lora_a, lora_b, scaling, dropout_p, seed = _prepare_add(
        base_out, x, lora_a, lora_b, scaling, dropout_p, seed
    )
    y = _dispatch.call(
        "lora_add", flat_rows(base_out), flat_rows(x), lora_a, lora_b, scaling, dropout_p, seed,
        torch.is_grad_enabled() and lora_b.requires_grad,
    )  # fmt: skip
    return y if base_out.dim() == 2 else y.view(base_out.shape)


def lora_add_(
    base_out: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scaling: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """`lora_add` in place, for inference: adds to `base_out` and returns it.

    Raises RuntimeError where a gradient would be needed, and ValueError for a base_out whose
    leading dimensions cannot be viewed as one, whose elements overlap in memory, or which shares
    memory with x.
    """
    tensors = (base_out, x, lora_a, lora_b)
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors):
        raise RuntimeError("lora_add_: has no gradient; call it under torch.no_grad, or lora_add")
    if torch.jit.is_tracing():
        return base_out.add_(_traced(x, (lora_a, lora_b), scaling, dropout_p, seed))
    result = base_out
    base_out, x, lora_a, lora_b, scaling, dropout_p, seed = _prepare_add(
        base_out, x, lora_a, lora_b, scaling, dropout_p, seed
    )
    if base_out.dtype != result.dtype:
        raise TypeError(f"base_out: expected x's dtype {x.dtype}, got {result.dtype}")
    try:
        rows = result.view(-1, result.shape[-1])
    except RuntimeError as error:
        raise ValueError(
            f"base_out: expected leading dimensions that view as one, got strides {result.stride()}"
            f" for shape {_shape(result)}"
        ) from error
    given = flat_rows(x), lora_a, lora_b, scaling, dropout_p, seed
    _dispatch.call_in_place("lora_add_", rows, *given)
    return result


def _traced(
    x: Tensor,
    pair: tuple[Tensor, Tensor],
    scaling: float | Tensor,
    dropout_p: float,
    seed: int | Tensor | None,
) -> Tensor:
    """The branch for torch.jit.trace: torch's own calls, which it records for any number of rows
    and which run without this library."""
    if dropout_p and seed is not None:
        raise ValueError("seed: expected None under torch.jit.trace, which cannot keep the mask")
    lora_a, lora_b = (each.to(x.dtype) for each in pair)
    branch: Tensor = scaling * F.linear(F.linear(F.dropout(x, dropout_p), lora_a), lora_b)
    return branch


def _is_jagged(x: Tensor) -> bool:
    """Whether x is a nested tensor [B, j, K] whose values [rows, K] lie one after the other."""
    return isinstance(x, Tensor) and x.layout == torch.jagged and x.dim() == 3 and x.is_contiguous()


def flat_rows(tensor: Tensor) -> Tensor:
    """[..., K] as [M, K], copied only where the strides leave no other way."""
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])


def _prepare_add(
    base_out: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float | Tensor,
    dropout_p: float,
    seed: int | Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, float, float, Tensor | None]:
    """The tensors as the op takes them; scaling, dropout_p and seed as numbers and a tensor."""
    if not _checks.are_sound(x, lora_a, lora_b, base_out, None, linear=False):
        base_out, x, lora_a, lora_b = _check_add(base_out, x, lora_a, lora_b)
    scaling, dropout_p, seed = check_values(scaling, dropout_p, seed, x.device)
    scaling, lora_b = _fold(scaling, lora_b)
    return base_out, x, lora_a, lora_b, scaling, dropout_p, seed


def _fold(scaling: float | Tensor, lora_b: Tensor) -> tuple[float, Tensor]:
    """A tensor's factor goes into lora_b, which the op then takes as a master copy: fp32 keeps
    the product from a second rounding, and dB where its sum is formed in fp32."""
    if not isinstance(scaling, Tensor):
        return scaling, lora_b
    wide = lora_b if lora_b.dtype == torch.float64 else lora_b.float()
    return 1.0, wide * scaling.to(wide.dtype)


# -------------------------------------------------------- checks: rank, shape, dtype, device, value


def _check_linear(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """x and the adapter as the op takes them."""
    tensors = {"x": x, "weight": weight, "lora_a": lora_a, "lora_b": lora_b, "bias": bias}
    _check_tensors(tensors)
    rank, K = _check_branch(x, lora_a, lora_b)
    if weight.dim() != 2 or weight.shape[1] != K:
        raise ValueError(f"weight: expected shape [N, K] with K = {K} of x, got {_shape(weight)}")
    N = weight.shape[0]
    if lora_b.shape[0] != N:
        raise ValueError(
            f"lora_b: expected shape [N, r] = [{N}, {rank}] for weight {_shape(weight)},"
            f" got {_shape(lora_b)}"
        )
    if bias is not None and bias.shape != (N,):
        raise ValueError(f"bias: expected shape [N] = [{N}], got {_shape(bias)}")
    # The op rounds a weight of another dtype at use, so autocast leaves no copy of it behind.
    x, (lora_a, lora_b), autocast = _checks.under_autocast(x, (lora_a, lora_b))
    _check_dtypes(x, lora_a, lora_b, {"weight": weight, "bias": bias}, autocast)
    _check_devices(x.device, tensors)
    return x, lora_a, lora_b


def _check_add(
    base_out: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """base_out, x and the adapter as the op takes them."""
    tensors = {"base_out": base_out, "x": x, "lora_a": lora_a, "lora_b": lora_b}
    _check_tensors(tensors)
    _check_branch(x, lora_a, lora_b)
    expected = (*x.shape[:-1], lora_b.shape[0])
    if base_out.shape != expected:
        raise ValueError(
            f"base_out: expected shape {tuple(expected)} for x {_shape(x)} and"
            f" lora_b {_shape(lora_b)}, got {_shape(base_out)}"
        )
    x, (lora_a, lora_b), autocast = _checks.under_autocast(x, (lora_a, lora_b))
    if autocast and base_out.is_floating_point() and base_out.dtype != torch.float64:
        base_out = base_out.to(x.dtype)
    _check_dtypes(x, lora_a, lora_b, {"base_out": base_out}, autocast=False)
    _check_devices(x.device, tensors)
    return base_out, x, lora_a, lora_b


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _check_tensors(tensors: Mapping[str, Tensor | None]) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) and not (tensor is None and name == "bias"):
            raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}")
        if tensor is not None:
            _checks.check_layout(name, tensor)


def _check_branch(x: Tensor, lora_a: Tensor, lora_b: Tensor) -> tuple[int, int]:
    """Shapes that agree whatever the base is; returns (r, K)."""
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: expected shape [..., K] with K >= 1, got {_shape(x)}")
    K = x.shape[-1]
    if lora_a.dim() != 2 or lora_a.shape[1] != K or lora_a.shape[0] == 0:
        raise ValueError(
            f"lora_a: expected shape [r, K] with r >= 1 and K = {K} of x, got {_shape(lora_a)}"
        )
    rank = lora_a.shape[0]
    if lora_b.dim() != 2 or lora_b.shape[1] != rank or lora_b.shape[0] == 0:
        raise ValueError(
            f"lora_b: expected shape [N, r] with N >= 1 and r = {rank} of lora_a,"
            f" got {_shape(lora_b)}"
        )
    return rank, K


def _check_dtypes(
    x: Tensor, lora_a: Tensor, lora_b: Tensor, others: dict[str, Tensor | None], autocast: bool
) -> None:
    if x.dtype not in DTYPES:
        raise TypeError(f"x: expected float32, float16, bfloat16 or float64, got {x.dtype}")
    for name, tensor in others.items():
        if tensor is None or tensor.dtype == x.dtype:
            continue
        if not (autocast and tensor.dtype in DTYPES[:3]):
            raise TypeError(f"{name}: expected x's dtype {x.dtype}, got {tensor.dtype}")
    for name, tensor in (("lora_a", lora_a), ("lora_b", lora_b)):
        if tensor.dtype != x.dtype and (tensor.dtype != torch.float32 or x.dtype == torch.float64):
            raise TypeError(f"{name}: expected x's dtype {x.dtype} or float32, got {tensor.dtype}")


def _check_devices(device: torch.device, tensors: Mapping[str, Tensor | None]) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name}: expected x's device {device}, got {tensor.device}")


def check_values(
    scaling: float | Tensor, dropout_p: float, seed: int | Tensor | None, device: torch.device
) -> tuple[float | Tensor, float, Tensor | None]:
    """scaling as a float or a tensor of no dimension, dropout_p as a float, the seed as an int64
    tensor of one element on `device`, None without dropout."""
    dropout_p = _number("dropout_p", dropout_p, "a float")
    if isinstance(scaling, Tensor):
        scaling = _check_scaling(scaling, device)
        _checks.check_range(1.0, dropout_p)
    else:
        scaling = _number("scaling", scaling, "a float or a Tensor of one element")
        _checks.check_range(scaling, dropout_p)
    if isinstance(seed, Tensor):
        if seed.numel() != 1 or seed.dtype != torch.int64:
            raise ValueError(
                f"seed: expected an int64 tensor of one element, got {seed.dtype} {_shape(seed)}"
            )
        if seed.is_meta and device.type != "meta":
            raise ValueError(f"seed: expected x's device {device}, got {seed.device}")
        seed = seed.to(device)
    elif seed is not None and (isinstance(seed, bool) or not isinstance(seed, Integral)):
        raise TypeError(
            f"seed: expected an int, an int64 tensor or None, got {type(seed).__name__}"
        )
    elif seed is not None and not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed: expected a 64-bit integer, got {seed}")
    if dropout_p == 0:
        return scaling, dropout_p, None
    if seed is None:
        seed = direct.draw_seed(device)
    elif not isinstance(seed, Tensor):
        seed = torch.tensor(seed, dtype=torch.int64, device=device)
    return scaling, dropout_p, seed


def _number(name: str, value: float, expected: str) -> float:
    """The value in a type that the ops take; numpy's scalars are numbers too."""
    if type(value) in (float, int) or isinstance(value, torch.SymFloat):
        return value
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}")
    return float(value)


def _check_scaling(scaling: Tensor, device: torch.device) -> Tensor:
    if scaling.numel() != 1:
        raise ValueError(
            f"scaling: expected a float or a Tensor of one element, got {_shape(scaling)}"
        )
    if not scaling.is_floating_point():
        raise TypeError(f"scaling: expected a floating dtype, got {scaling.dtype}")
    if scaling.device != device:
        raise ValueError(f"scaling: expected x's device {device}, got {scaling.device}")
    if scaling.requires_grad and torch.is_grad_enabled():
        raise ValueError("scaling: expected no requires_grad, it has no gradient; detach it")
    return scaling.reshape(())
