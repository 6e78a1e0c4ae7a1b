"""Quantised weights: what they decode to, part by part, what they refuse, and their owners' own
bits where the owners are installed; for GPTQ and AWQ a plain decoder of the published layout."""

import dataclasses
import importlib.util
from types import SimpleNamespace

import pytest
import torch
from quantized_layouts import awq_layer, gptq_layer
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
from lora_kernels.weights.record import check_finite

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def needs(package):
    return pytest.mark.skipif(
        importlib.util.find_spec(package) is None, reason=f"needs {package}, which is not here"
    )


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


NOT_FINITE = (float("nan"), float("inf"), float("-inf"))


def spoilt(tensor, value):
    """With one element that is not finite, the last."""
    spoilt = tensor.clone()
    spoilt.view(-1)[-1] = value
    return spoilt


@pytest.mark.parametrize("value", NOT_FINITE)
def test_scales_of_gptq_awq_and_fp8_that_are_not_finite(value):
    for layer, take in (
        (gptq_layer(24, 64, 16, True)[0], from_gptq), (awq_layer(24, 64, 16)[0], from_awq),
    ):  # fmt: skip
        layer.scales = spoilt(layer.scales, value)
        with pytest.raises(ValueError, match="group_scales: expected finite numbers"):
            take(layer)
    for name, shape in (
        ("weight_scale_inv", (2, 3)), ("weight_scale", (200, 1)), ("weight_scale", (1,)),
    ):  # fmt: skip
        layer = nn.Module()
        layer.weight = torch.randn(200, 300).to(torch.float8_e4m3fn)
        setattr(layer, name, spoilt(torch.ones(shape), value))
        with pytest.raises(ValueError, match=r"^scale: expected finite numbers"):
            from_fp8(layer)


def params4bit(double):
    """What `from_bitsandbytes` reads of a Params4bit of 4 x 128 values."""
    state = SimpleNamespace(
        nested=double, code=torch.linspace(-1, 1, 16), absmax=torch.rand(8), blocksize=64,
        shape=(4, 128), offset=torch.tensor(0.5),
    )  # fmt: skip
    if double:
        state.absmax = torch.randint(256, (8,)).byte()
        state.state2 = SimpleNamespace(code=torch.rand(256), absmax=torch.rand(1), blocksize=256)
    return SimpleNamespace(quant_state=state, data=torch.zeros(256, 1).byte())


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize(
    ("double", "held", "name"),
    [
        (False, "absmax", "scale"), (False, "code", "table"), (True, "offset", "offset"),
        (True, "state2.absmax", "outer_scale"), (True, "state2.code", "outer_table"),
    ],
)  # fmt: skip
def test_absmax_of_4_bits_that_is_not_finite(double, held, name, value):
    param = params4bit(double)
    owners._of_params4bit(param)
    *path, last = held.split(".")
    holder = getattr(param.quant_state, path[0]) if path else param.quant_state
    setattr(holder, last, spoilt(getattr(holder, last), value))
    with pytest.raises(ValueError, match=f"^{name}: expected finite numbers"):
        owners._of_params4bit(param)


@pytest.mark.parametrize("value", NOT_FINITE)
def test_absmax_of_8_bits_that_is_not_finite(value):
    codes = torch.zeros(4, 64, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"^scale: expected finite numbers"):
        owners.of_llm_int8(codes, spoilt(torch.ones(4), value))


class Int8Tensor(SimpleNamespace):
    """torchao's by name, as far as it is read."""


class Float8Tensor(SimpleNamespace):
    """torchao's by name, as far as it is read."""


def of_torchao(kind, codes, scale, block, zero=None):
    return kind(
        qdata=codes, scale=scale, block_size=block, zero_point=zero, act_quant_kwargs=None
    )  # fmt: skip


@pytest.mark.parametrize("value", NOT_FINITE)
def test_scales_of_torchao_that_are_not_finite(value):
    codes = torch.zeros(4, 64, dtype=torch.int8)
    bytes_ = codes.to(torch.float8_e4m3fn)
    ones, bad = torch.ones(4, 1), spoilt(torch.ones(4, 1), value)
    for tensor, name in (
        (of_torchao(Int8Tensor, codes, bad, (1, 64)), "scale"),
        (of_torchao(Int8Tensor, codes, ones, (1, 64), bad), "zero"),
        (of_torchao(Float8Tensor, bytes_, bad, (1, 64)), "scale"),
        (of_torchao(Float8Tensor, bytes_, bad[-1:], (4, 64)), "scale"),
        (of_torchao(Float8Tensor, bytes_, bad[-2:].view(1, 2), (32, 32)), "scale"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: expected finite numbers"):
            from_torchao(tensor)


@pytest.mark.parametrize("index", range(14))
def test_a_record_of_scales_that_are_not_finite_decodes_to_such(index):
    """To make one reads no values, which would cost a device a wait in every call of the op."""
    weight = list(every_layout())[index]
    if weight.scales[-1].dtype == torch.uint8:
        return
    names = [name for name, one in weight.tensors().items() if one is weight.scales[-1]]
    broken = dataclasses.replace(weight, **{names[0]: spoilt(weight.scales[-1], float("nan"))})
    assert broken.dequantize(torch.float32).isnan().any()
    with pytest.raises(ValueError, match=f"{names[0]}: expected finite numbers"):
        check_finite(broken)


WORDS = torch.zeros(8, 24, dtype=torch.int32)  # of GPTQ: 24 x 64


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Gptq((24, 60), *gptq_parts()), ValueError, "shape: expected multiples of 8"),
        (lambda: Gptq((20, 64), *gptq_parts()), ValueError, "shape: expected multiples of 8"),
        (lambda: Gptq((24, 64), *gptq_parts(qweight=WORDS[1:])), ValueError, "qweight: expected"),
        (lambda: Gptq((24, 64), *gptq_parts(qweight=WORDS.long())), TypeError, "qweight"),
        (lambda: Gptq((24, 64), *gptq_parts(qzeros=WORDS[:4, :2])), ValueError, "qzeros: expected"),
        (lambda: Gptq((24, 64), *gptq_parts(scales=torch.ones(4, 23))), ValueError, "group_scales"),
        (lambda: Gptq((24, 64), *gptq_parts(g_idx=WORDS[0])), ValueError, "g_idx: expected shape"),
        (lambda: Awq((24, 64), *awq_parts(), group=24), ValueError, "multiples of 8 and 24"),
        (lambda: Awq((20, 64), *awq_parts(), group=16), ValueError, "multiples of 8 and 16"),
        (lambda: Awq((24, 64), *awq_parts(), group=0), ValueError, "multiples of 8 and 0"),
        (lambda: Awq((24, 64), *awq_parts(), group=32), ValueError, "group_scales: expected shape"),
        (lambda: Awq((32, 64), *awq_parts(), group=16), ValueError, "qweight: expected shape"),
        (lambda: Float8((4, 64), E4M3, torch.ones(3, 1)), ValueError, "scale: expected shape"),
        (lambda: Float8((4, 64), E4M3, torch.ones(4)), ValueError, "scale: expected shape"),
        (lambda: Float8((4, 64), E4M3, torch.ones(1, 2), block=-1), ValueError, "block: expected"),
        (lambda: Float8((4, 63), E4M3, torch.ones(4, 1)), ValueError, "codes: expected shape"),
        (
            lambda: Float8((4, 64), E4M3.to(torch.float8_e5m2), torch.ones(4, 1)),
            TypeError,
            "codes: expected float8_e4m3fn",
        ),
        (lambda: four_bits(block=63), ValueError, "block: expected an even number"),
        (lambda: four_bits(scale=torch.ones(3)), ValueError, "scale: expected shape"),
        (lambda: four_bits(zero=torch.ones(3)), ValueError, "zero: expected shape"),
        (lambda: four_bits(codes=torch.zeros(127).byte()), ValueError, "codes: expected shape"),
        (lambda: four_bits(table=torch.zeros(16).half()), TypeError, "table: expected float32"),
    ],
)
def test_a_packing_that_does_not_fit(make, error, message):
    with pytest.raises(error, match=message):
        make()


E4M3 = torch.zeros(4, 64).to(torch.float8_e4m3fn)


def gptq_parts(**change):
    layer, _ = gptq_layer(24, 64, 16, False)
    own = {name: getattr(layer, name) for name in ("qweight", "scales", "qzeros", "g_idx")}
    return list({**own, **change}.values())


def awq_parts():
    layer, _ = awq_layer(24, 64, 16)
    return layer.qweight, layer.scales, layer.qzeros


def four_bits(**change):
    given = {"codes": torch.zeros(128).byte(), "table": torch.zeros(16), "scale": torch.ones(4)}
    return FourBit((4, 64), **{**given, **change})


def test_as_many_square_blocks_as_rows():
    """Scales are those of blocks by their shape, not by their number."""
    layer = nn.Module()
    layer.weight = torch.randn(64, 1024).to(torch.float8_e4m3fn)
    layer.weight_scale_inv, layer.block_size = torch.rand(2, 32), (32, 32)
    found = from_fp8(layer)
    assert found.block == 32
    whole = layer.weight_scale_inv.repeat_interleave(32, 0).repeat_interleave(32, 1)
    assert torch.equal(found.dequantize(torch.float32), layer.weight.float() * whole)


def test_layers_whose_packing_does_not_fit():
    layer, _ = gptq_layer(24, 64, 16, False)
    layer.qzeros = layer.qzeros[:, :2].contiguous()
    with pytest.raises(ValueError, match="qzeros: expected shape"):
        from_gptq(layer)
    layer, _ = awq_layer(24, 64, 16)
    layer.scales = layer.scales[:3]
    with pytest.raises(ValueError, match="scales: expected a divisor of 64 groups, got 3"):
        from_awq(layer)
    layer.scales = torch.ones(4, 16)
    with pytest.raises(ValueError, match="group_scales: expected shape"):
        from_awq(layer)
    layer = nn.Module()
    layer.weight, layer.weight_scale_inv = E4M3, torch.ones(2, 2)
    with pytest.raises(ValueError, match="scale: expected shape"):
        from_fp8(layer)
    layer.block_size = (64, 128)
    with pytest.raises(ValueError, match="expected square blocks"):
        from_fp8(layer)
    param = params4bit(False)
    param.quant_state.shape = (4, 130)
    with pytest.raises(ValueError, match="codes: expected shape"):
        owners._of_params4bit(param)
    with pytest.raises(ValueError, match="scale: expected shape"):
        owners.of_llm_int8(torch.zeros(4, 64, dtype=torch.int8), torch.ones(5))
    for block in ((1, 32), (2, 64)):
        with pytest.raises(ValueError, match="expected a scale for each row"):
            from_torchao(
                of_torchao(Int8Tensor, torch.zeros(4, 64).to(torch.int8), torch.ones(4, 2), block)
            )
        with pytest.raises(ValueError, match="square blocks or a scale for each row"):
            from_torchao(of_torchao(Float8Tensor, E4M3, torch.ones(4, 2), block))


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
