"""Quantised weights: what they decode to, part by part, what they refuse, and their owners' own
bits where the owners are installed; for GPTQ and AWQ a plain decoder of the published layout."""

import dataclasses
import importlib.util
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lora_kernels import QuantizedWeight, quantize
from lora_kernels.weights import (
    KINDS,
    Awq,
    Float8,
    FourBit,
    Gptq,
    Int8,
    assemble,
    from_awq,
    from_bitsandbytes,
    from_fp8,
    from_gptq,
    from_torchao,
    owners,
    shape_of,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def needs(package):
    return pytest.mark.skipif(
        importlib.util.find_spec(package) is None, reason=f"needs {package}, which is not here"
    )


def gptq_layer(N, K, group, act_order):
    """What AutoGPTQ packs, and the weight that it packs, by the formulas of its `pack`."""
    groups = K // group
    g_idx = (torch.randperm(K) if act_order else torch.arange(K)).int() // group
    codes, zeros = torch.randint(16, (K, N)), torch.randint(1, 16, (groups, N))
    scales = torch.rand(groups, N).half() + 0.1
    weight = (codes - zeros[g_idx.long()]) * scales[g_idx.long()].float()
    qweight = torch.zeros(K // 8, N, dtype=torch.int64)
    for i in range(8):
        qweight |= codes[i::8] << 4 * i
    qzeros = torch.zeros(groups, N // 8, dtype=torch.int64)
    for i in range(8):
        qzeros |= (zeros[:, i::8] - 1) << 4 * i
    as_words = lambda t: torch.where(t >= 2**31, t - 2**32, t).int()  # noqa: E731
    layer = nn.Module()
    for name, tensor in {
        "qweight": as_words(qweight), "qzeros": as_words(qzeros), "scales": scales, "g_idx": g_idx,
    }.items():  # fmt: skip
        layer.register_buffer(name, tensor)
    return layer, weight.t()


def awq_layer(N, K, group):
    """What AutoAWQ's `WQLinear_GEMM` packs, and the weight that it packs."""
    codes, zeros = torch.randint(16, (K, N)), torch.randint(16, (K // group, N))
    scales = torch.rand(K // group, N).half() + 0.1
    of = torch.arange(K) // group
    weight = (codes - zeros[of]) * scales[of].float()

    def packed(values):
        words = torch.zeros(len(values), N // 8, dtype=torch.int64)
        for i, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            words |= values[:, column::8] << 4 * i
        return torch.where(words >= 2**31, words - 2**32, words).int()

    layer = nn.Module()
    for name, tensor in {
        "qweight": packed(codes), "qzeros": packed(zeros), "scales": scales,
    }.items():  # fmt: skip
        layer.register_buffer(name, tensor)
    return layer, weight.t()


def every_layout():
    """One of each, with a shape whose rows are whole blocks and, where it may be, one with none."""
    weight, odd = torch.randn(48, 256), torch.randn(33, 130)
    yield from (quantize(weight, kind) for kind in KINDS)
    yield from (quantize(odd, kind) for kind in ("int8", "nf4", "fp8"))
    yield quantize(weight, "fp8", block=32)
    yield quantize(odd, "fp8", block=64)
    yield quantize(weight, "int4", block=32)
    nf4 = quantize(weight, "nf4")
    yield FourBit(nf4.shape, nf4.codes, nf4.table, torch.rand(48 * 4))
    int8 = quantize(weight, "int8")
    yield Int8(int8.shape, int8.codes, int8.scale, torch.randn(48), factor=1 / 127)
    yield from_gptq(gptq_layer(48, 64, 16, act_order=True)[0])
    yield from_awq(awq_layer(48, 64, 16)[0])


# -------------------------------------------------------------------------------------- quantizing


# Of normal values; the bounds are a third above what the formats give.
@pytest.mark.parametrize(
    ("kind", "worst"), [("int8", 0.01), ("nf4", 0.12), ("fp8", 0.035), ("int4", 0.135)]
)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_a_weight_comes_back_as_near_as_its_format_allows(kind, worst, dtype):
    weight = torch.randn(64, 256, dtype=dtype)
    back = quantize(weight, kind).dequantize(torch.float64)
    assert (back - weight.double()).norm() / weight.double().norm() < worst


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_block_can_hold_comes_back_bit_for_bit(kind):
    weight = quantize(torch.randn(32, 256), kind).dequantize(torch.float32)
    if kind == "nf4":  # its scales are rounded too
        return
    again = quantize(weight, kind).dequantize(torch.float32)
    torch.testing.assert_close(again, weight, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zero(kind):
    weight = torch.randn(4, 256)
    weight[1] = 0
    weight[2, ::2] = 0
    back = quantize(weight, kind).dequantize(torch.float32)
    assert not back[1].any()
    assert not back[2, ::2].any()


def test_sizes():
    weight = torch.randn(256, 1024, dtype=torch.bfloat16)
    whole = weight.numel() * 2
    share = {kind: quantize(weight, kind).nbytes / whole for kind in KINDS}
    assert share["nf4"] < 0.27
    assert share["int8"] < 0.51
    assert share["fp8"] < 0.51
    assert share["int4"] < 0.29


@pytest.mark.parametrize(
    ("weight", "kind", "block", "message"),
    [
        (torch.randn(4, 64), "nf5", None, "kind: got 'nf5', legal values are int8, nf4"),
        (torch.randn(4, 64), "int8", 64, "block: expected None of int8"),
        (torch.randn(4, 64), "nf4", 1, "block: expected a number of values"),
        (torch.randn(4, 64), "nf4", 63, "even number"),
        (torch.randn(3, 63), "nf4", None, "even number"),
        (torch.randn(4, 100), "int4", None, "multiple of the block of 128"),
        (torch.randn(4), "int8", None, r"weight: expected shape \[N, K\]"),
        (torch.full((4, 64), float("nan")), "nf4", None, "finite"),
        (torch.full((4, 64), float("inf")), "int8", None, "finite"),
    ],
)
def test_what_cannot_be_quantised(weight, kind, block, message):
    with pytest.raises(ValueError, match=message):
        quantize(weight, kind, block=block)


def test_what_is_no_floating_tensor():
    with pytest.raises(TypeError, match="weight: expected a floating Tensor, got torch"):
        quantize(torch.zeros(4, 64, dtype=torch.int8), "nf4")
    with pytest.raises(TypeError, match="got list"):
        quantize([[1.0]], "nf4")
    with pytest.raises(TypeError, match="dtype: expected a floating one"):
        quantize(torch.randn(4, 64), "nf4").dequantize(torch.int32)


# ---------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize("index", range(14))
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_part_is_that_of_the_whole(index, dtype):
    weight = list(every_layout())[index]
    N, K = weight.shape
    whole = weight.dequantize(dtype)
    parts = [(0, N, 0, K), (1, N, 3, K), (5, 9, 40, 41), (N - 1, N, K - 1, K), (0, N, 32, 64)]
    for top, bottom, left, right in parts:
        out = torch.empty(bottom - top, right - left, dtype=dtype)
        part = weight.decode(slice(top, bottom), slice(left, right), out)
        assert part is out
        assert torch.equal(part, whole[top:bottom, left:right])


def test_as_many_layouts_are_tried_as_there_are():
    assert len(list(every_layout())) == 14
    assert {type(w) for w in every_layout()} == {Int8, Float8, FourBit, Gptq, Awq}


@pytest.mark.parametrize("index", range(14))
def test_form_and_parts_are_all_of_it(index):
    weight = list(every_layout())[index]
    again = assemble(weight.form, weight.parts)
    assert type(again) is type(weight)
    assert again.form == weight.form
    assert shape_of(weight.form) == weight.shape
    assert torch.equal(again.dequantize(torch.float32), weight.dequantize(torch.float32))
    assert all(a is b for a, b in zip(again.parts, weight.parts, strict=True))
    moved = weight.to("meta")
    assert moved.device.type == "meta"
    assert moved.nbytes == weight.nbytes


@pytest.mark.parametrize("form", ["", "int8", "int9 4x64 codes,scale", "int8 4 codes,scale", "x=1"])
def test_a_form_that_is_none(form):
    with pytest.raises(ValueError, match="form: expected that of a QuantizedWeight"):
        assemble(form, [])
    with pytest.raises(ValueError, match="parts: expected 2 tensors"):
        assemble("int8 4x64 codes,scale", [torch.zeros(4, 64)])


def test_it_cannot_be_changed_and_says_what_it_is():
    weight = quantize(torch.randn(64, 128), "nf4")
    with pytest.raises(dataclasses.FrozenInstanceError):
        weight.block = 32
    assert "4bit, 64 x 128" in repr(weight)


def int8_parts():
    return torch.zeros(4, 64, dtype=torch.int8), torch.ones(4)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda c, s: Int8((4, 65), c, s), ValueError, r"codes: expected shape \(4, 65\)"),
        (lambda c, s: Int8((4, 64), c.float(), s), TypeError, "codes: expected int8"),
        (lambda c, s: Int8((4, 64), c, s[:3]), ValueError, "scale: expected shape"),
        (lambda c, s: Int8((4, 64), c, s.int()), TypeError, "scale: expected float32"),
        (lambda c, s: Int8((4, 64), c, s, torch.zeros(3)), ValueError, "zero: expected shape"),
        (lambda c, s: Int8((0, 64), c, s), ValueError, "shape: expected"),
        (lambda c, s: Int8((4, 64), c.t().contiguous().t(), s), ValueError, "contiguous"),
        (lambda c, s: Int8((4, 64), c, s.to("meta")), ValueError, "one device"),
        (lambda c, s: Int8((4, 64), "codes", s), TypeError, "codes: expected a Tensor, got str"),
        (
            lambda c, s: FourBit((4, 64), c.byte().view(-1), s, s),
            ValueError,
            r"codes: expected shape \(128,\)",
        ),
        (
            lambda c, s: FourBit((4, 64), torch.zeros(128).byte(), s, s),
            ValueError,
            r"table: expected shape \(16,\)",
        ),
        (
            lambda c, s: FourBit(
                (4, 64), torch.zeros(128).byte(), torch.zeros(16), s.byte(), None, torch.zeros(256)
            ),
            ValueError,
            "outer_scale: expected a tensor beside outer_table",
        ),
        (
            lambda c, s: Float8((4, 64), c.to(torch.float8_e4m3fn), s[:, None], block=32),
            ValueError,
            r"scale: expected shape \(1, 2\)",
        ),
    ],
)
def test_tensors_that_do_not_fit(make, error, message):
    with pytest.raises(error, match=message):
        make(*int8_parts())


# ------------------------------------------------------------------------------------------ owners


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("version", [1, 2])
def test_gptq(act_order, version):
    layer, weight = gptq_layer(24, 64, 16, act_order)
    if version == 2:  # whose zeros are stored as they are
        layer.qzeros += sum(1 << 4 * i for i in range(7)) + (1 << 28)
    found = from_gptq(layer, version=version)
    assert torch.equal(found.dequantize(torch.float32), weight)
    assert torch.equal(found.dequantize(torch.float16), weight.half())
    assert found.parts[0].data_ptr() == layer.qweight.data_ptr()


def test_awq():
    layer, weight = awq_layer(24, 64, 16)
    found = from_awq(layer)
    assert torch.equal(found.dequantize(torch.float32), weight)
    assert found.parts[0].data_ptr() == layer.qweight.data_ptr()


@pytest.mark.parametrize("name", ["weight_scale_inv", "weight_scale"])
def test_fp8_layers(name):
    weight = torch.randn(200, 300).to(torch.float8_e4m3fn)
    scale = torch.rand(2, 3) if name == "weight_scale_inv" else torch.rand(200, 1)
    layer = nn.Module()
    layer.weight = nn.Parameter(weight, requires_grad=False)
    setattr(layer, name, nn.Parameter(scale))
    whole = scale.repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :300]
    if name == "weight_scale":
        whole = scale
    found = from_fp8(layer)
    assert torch.equal(found.dequantize(torch.float32), weight.float() * whole)
    assert found.codes.data_ptr() == layer.weight.data_ptr()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: from_gptq(nn.Linear(8, 8)), TypeError, "a layer of GPTQ with qweight"),
        (lambda: from_awq(nn.Linear(8, 8)), TypeError, "a layer of AWQ with qweight"),
        (lambda: from_fp8(nn.Linear(8, 8)), TypeError, "a float8_e4m3fn weight"),
        (lambda: from_bitsandbytes(torch.zeros(8, 8)), TypeError, "Params4bit or Int8Params, got"),
        (lambda: from_torchao(torch.zeros(8, 8)), TypeError, "Int8Tensor or Float8Tensor, got"),
    ],
)
def test_what_is_of_no_owner(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_layers_that_are_not_sound():
    layer, _ = gptq_layer(24, 64, 16, False)
    layer.g_idx[3] = 4
    with pytest.raises(ValueError, match="g_idx: expected groups from 0 to 3"):
        from_gptq(layer)
    layer.g_idx[3] = 0
    layer.scales[0, 0] = float("nan")
    with pytest.raises(ValueError, match="group_scales: expected finite numbers"):
        from_gptq(layer)
    with pytest.raises(ValueError, match="version: expected 1 or 2"):
        from_gptq(layer, version=3)
    layer.bits = 8
    with pytest.raises(ValueError, match="a layer of 4 bits, got 8"):
        from_gptq(layer)


@needs("bitsandbytes")
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
def test_bits_of_bitsandbytes_in_4_bits(kind, double):
    import bitsandbytes as bnb

    weight = torch.randn(96, 320)
    param = bnb.nn.Params4bit(
        weight, requires_grad=False, quant_type=kind, compress_statistics=double
    ).to("cpu")
    found = from_bitsandbytes(param)
    assert isinstance(found, QuantizedWeight)
    assert found.codes.data_ptr() == param.data.data_ptr()
    for dtype in DTYPES:
        param.quant_state.dtype = dtype
        own = bnb.functional.dequantize_4bit(param.data, param.quant_state)
        assert torch.equal(found.dequantize(dtype), own)


@needs("bitsandbytes")
def test_blocks_across_the_ends_of_rows():
    """Which the CPU kernel of bitsandbytes 0.50 decodes wrongly; its generic code does not."""
    import bitsandbytes as bnb
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
    from bitsandbytes.backends.utils import _get_4bit_code

    weight = torch.randn(40, 96)
    codes, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    param = SimpleNamespace(quant_state=state, data=codes)
    found = owners._of_params4bit(param).dequantize(torch.float32)
    code = _get_4bit_code("nf4", codes.device)
    own = _dequantize_4bit_compute(
        codes.view(-1), state.absmax, code, 64, weight.shape, torch.float32
    )
    assert torch.equal(found, own)
    assert (found - weight).norm() / weight.norm() < 0.12


@needs("bitsandbytes")
def test_codes_are_those_of_bitsandbytes():
    import bitsandbytes as bnb

    weight = torch.randn(64, 256)
    own, state = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    ours = quantize(weight, "nf4")
    assert torch.equal(ours.codes, own.view(-1))
    scales = ours.block_scales(0, len(ours.scale))
    torch.testing.assert_close(scales, state.absmax, rtol=0.01, atol=0)


@needs("bitsandbytes")
def test_bits_of_bitsandbytes_in_8_bits():
    import bitsandbytes as bnb

    param = bnb.nn.Int8Params(torch.randn(64, 128), requires_grad=False).to("cpu")
    found = from_bitsandbytes(param)
    own = torch.ops.bitsandbytes.int8_vectorwise_dequant(param.CB, param.SCB)
    assert torch.equal(found.dequantize(torch.float32), own)
    with pytest.raises(ValueError, match="expected a quantised Int8Params"):
        from_bitsandbytes(bnb.nn.Int8Params(torch.randn(8, 8), requires_grad=False))
    with pytest.raises(ValueError, match="got one without a quant_state"):
        from_bitsandbytes(bnb.nn.Params4bit(torch.randn(8, 8), requires_grad=False))


@needs("torchao")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_bits_of_torchao(config, dtype):
    from torchao import quantization

    layer = nn.Linear(128, 64).to(dtype)
    quantization.quantize_(layer, getattr(quantization, config)())
    found = from_torchao(layer.weight)
    for out in DTYPES:
        assert torch.equal(found.dequantize(out), layer.weight.dequantize(out))


@needs("torchao")
def test_torchao_tensors_that_quantise_x_are_refused():
    from torchao import quantization

    layer = nn.Linear(128, 64)
    quantization.quantize_(layer, quantization.Int8DynamicActivationInt8WeightConfig())
    with pytest.raises(ValueError, match="quantises or scales what it is multiplied with"):
        from_torchao(layer.weight)


def test_codes_in_another_order_are_refused():
    """bitsandbytes reorders them in place for its own kernel."""
    state = SimpleNamespace(packing_format_for_cpu=True, shape=(8, 8))
    weight = SimpleNamespace(quant_state=state, data=torch.zeros(32, 1).byte())
    with pytest.raises(ValueError, match="order of bitsandbytes' kernel"):
        owners._of_params4bit(weight)
