"""Weights that other libraries have quantised, as records of the tensors that they hold.

None of these libraries is imported: an object is known by its class's name and module.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.weights.layouts import Awq, Float8, FourBit, Gptq, Int8
from lora_kernels.weights.record import QuantizedWeight, check_finite

_FOUR_BITS = 4


def from_bitsandbytes(weight: Tensor) -> QuantizedWeight:
    """Of bitsandbytes' `Params4bit` (NF4 or FP4, double quantised or not) or `Int8Params`, the
    weight of its `Linear4bit` or `Linear8bitLt`, quantised already: moved to a device once.

    Raises TypeError for another tensor, ValueError where it is not quantised yet.
    """
    kind = type(weight).__name__
    if kind == "Params4bit":
        return _of_params4bit(weight)
    if kind == "Int8Params":
        return _of_int8params(weight)
    raise TypeError(f"weight: expected bitsandbytes' Params4bit or Int8Params, got {kind}")


def _of_params4bit(weight: Any) -> FourBit:
    state = weight.quant_state
    if state is None:
        raise ValueError("weight: expected a quantised Params4bit, got one without a quant_state")
    codes = weight.data
    if getattr(weight, "packing_format_for_cpu", False) or getattr(
        state, "packing_format_for_cpu", False
    ):
        raise ValueError(
            "weight: its codes lie in the order of bitsandbytes' kernel for this CPU; take it"
            " before the first forward in inference, or load it anew"
        )
    codes = codes.contiguous().view(torch.uint8).reshape(-1)
    N, K = state.shape
    given: dict[str, Any] = {}
    if state.nested:
        outer = state.state2
        given = {
            "outer_table": outer.code.float().contiguous(), "outer_scale": outer.absmax,
            "offset": state.offset.reshape(()), "outer_block": outer.blocksize,
        }  # fmt: skip
    table = state.code.float().contiguous()
    scale = state.absmax.contiguous()
    return check_finite(FourBit((N, K), codes, table, scale, block=state.blocksize, **given))


def _of_int8params(weight: Any) -> Int8:
    return of_llm_int8(weight.data if weight.CB is None else weight.CB, weight.SCB)


def of_llm_int8(codes: Tensor, scale: Tensor | None) -> Int8:
    """Of what bitsandbytes holds of 8 bits, wherever it does: codes [N,K] and each row's absmax."""
    if codes.dtype != torch.int8 or scale is None:
        raise ValueError("weight: expected a quantised Int8Params, got one without int8 codes")
    N, K = codes.shape
    # Its own constant, 1 / 127.
    return check_finite(Int8((N, K), codes, scale, factor=7.874015718698502e-3))


def from_torchao(weight: Tensor) -> QuantizedWeight:
    """Of torchao's `Int8Tensor` (a scale for each row, or one), or `Float8Tensor` (one scale, of
    rows, or of square blocks), as weights in `torchao.quantization.quantize_`.

    Raises TypeError for other tensors, naming what they are; ValueError for a scale of activations
    or of groups, which no such record holds.
    """
    tensor: Any = weight.data if isinstance(weight, nn.Parameter) else weight
    kind = type(tensor).__name__
    if kind not in ("Int8Tensor", "Float8Tensor"):
        raise TypeError(f"weight: expected torchao's Int8Tensor or Float8Tensor, got {kind}")
    N, K = tensor.qdata.shape
    if tensor.act_quant_kwargs is not None or getattr(tensor, "act_pre_scale", None) is not None:
        raise ValueError(
            f"weight: this {kind} quantises or scales what it is multiplied with too; expected one"
            " of a configuration for the weight only"
        )
    scale, block = tensor.scale, tuple(tensor.block_size)
    if kind == "Int8Tensor":
        if block not in ((1, K), (N, K)):
            raise ValueError(f"weight: expected a scale for each row, got blocks of {block}")
        zero = tensor.zero_point
        return check_finite(Int8((N, K), tensor.qdata, _of_rows(scale, N), _of_rows(zero, N)))
    if block in ((1, K), (N, K)):
        return check_finite(Float8((N, K), tensor.qdata, scale.reshape(-1, 1)))
    if block[0] != block[1]:
        raise ValueError(f"weight: expected square blocks or a scale for each row, got {block}")
    return check_finite(Float8((N, K), tensor.qdata, scale, block=block[0]))


def _of_rows(value: Any, N: int) -> Any:
    """A number for each row, where there are numbers."""
    return None if value is None else value.reshape(-1).expand(N).contiguous()


def from_fp8(module: nn.Module) -> QuantizedWeight:
    """Of a linear layer whose weight is in float8 e4m3 beside `weight_scale_inv` (blocks of
    128 x 128, as DeepSeek-V3's and Transformers' `FP8Linear`) or `weight_scale` (one, or of rows,
    as compressed-tensors has them)."""
    weight: Any = module.weight
    scale: Any = getattr(module, "weight_scale_inv", None)
    if scale is None:
        scale = getattr(module, "weight_scale", None)
    if not isinstance(weight, Tensor) or weight.dtype != torch.float8_e4m3fn or scale is None:
        raise TypeError(
            f"module: expected a float8_e4m3fn weight beside weight_scale_inv or weight_scale, got"
            f" {type(module).__name__} with {getattr(weight, 'dtype', None)}"
        )
    N, K = weight.shape
    codes, scale = weight.data, scale.data.float().contiguous()
    if scale.numel() == 1 or tuple(scale.shape) in ((N,), (N, 1)):
        return check_finite(Float8((N, K), codes, scale.reshape(-1, 1)))
    side = getattr(module, "block_size", None) or (128, 128)
    if side[0] != side[1]:
        raise ValueError(f"module: expected square blocks, got {tuple(side)}")
    return check_finite(Float8((N, K), codes, scale, block=int(side[0])))


def from_gptq(module: nn.Module, *, version: int = 1) -> QuantizedWeight:
    """Of a linear layer of GPTQ in 4 bits: `qweight`, `qzeros`, `scales` and `g_idx`, in any order
    of groups. version: of its file format, "gptq" is 1 and "gptq_v2" 2.

    Raises TypeError for another layer, ValueError for other bits or tensors that do not fit.
    """
    found = _tensors(module, ("qweight", "qzeros", "scales", "g_idx"), "GPTQ")
    qweight, qzeros, scales, g_idx = found
    _require_four(module)
    if version not in (1, 2):
        raise ValueError(f"version: expected 1 or 2, got {version}")
    K, N = 8 * qweight.shape[0], qweight.shape[1]
    weight = Gptq((N, K), qweight, scales, qzeros, g_idx, less=2 - version)
    if not g_idx.is_meta and not 0 <= int(g_idx.min()) <= int(g_idx.max()) < len(scales):
        raise ValueError(f"g_idx: expected groups from 0 to {len(scales) - 1}")
    return check_finite(weight)


def from_awq(module: nn.Module) -> QuantizedWeight:
    """Of a linear layer of AWQ in 4 bits, layout "gemm": `qweight`, `qzeros` and `scales`.

    Raises TypeError for another layer, ValueError for other bits or tensors that do not fit.
    """
    qweight, qzeros, scales = _tensors(module, ("qweight", "qzeros", "scales"), "AWQ")
    _require_four(module)
    K, N = qweight.shape[0], 8 * qweight.shape[1]
    if K % len(scales):
        raise ValueError(f"scales: expected a divisor of {K} groups, got {len(scales)}")
    return check_finite(Awq((N, K), qweight, scales, qzeros, group=K // len(scales)))


def _tensors(module: nn.Module, names: tuple[str, ...], owner: str) -> list[Tensor]:
    found = [getattr(module, name, None) for name in names]
    if any(not isinstance(tensor, Tensor) for tensor in found):
        raise TypeError(
            f"module: expected a layer of {owner} with {', '.join(names)}, got"
            f" {type(module).__name__}"
        )
    return [tensor.data for tensor in found if isinstance(tensor, Tensor)]


def _require_four(module: nn.Module) -> None:
    bits = getattr(module, "bits", getattr(module, "w_bit", _FOUR_BITS))
    if bits != _FOUR_BITS:
        raise ValueError(f"module: expected a layer of 4 bits, got {bits}")
