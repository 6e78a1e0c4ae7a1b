"""One weight of every layout, by name, what other libraries pack, and the rule of accuracy."""

import oracle
import torch
from torch import nn

from lora_kernels import lora_linear, quantize
from lora_kernels.weights import Float8, FourBit, Int8, from_awq, from_gptq, owners

FP4 = [0.0, 0.0052083333, 0.6666667, 1.0, 0.3333333, 0.5, 0.1666667, 0.25]


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


def four_bit(weight, table):
    """With the scale of each block as it is."""
    nf4 = quantize(weight, "nf4")
    scale = torch.rand(len(nf4.scale)) + 0.1
    return FourBit(nf4.shape, nf4.codes, nf4.table if table is None else table, scale)


def int8(weight, **options):
    found = quantize(weight, "int8")
    return Int8(found.shape, found.codes, found.scale, **options)


LAYOUTS = {
    "int8": lambda w: quantize(w, "int8"),
    "int8 with zeros": lambda w: int8(w, zero=torch.randn(len(w))),
    "LLM.int8": lambda w: owners.of_llm_int8(quantize(w, "int8").codes, w.abs().amax(1).float()),
    "nf4, scales in turn": lambda w: quantize(w, "nf4"),
    "nf4, plain scales": lambda w: four_bit(w, None),
    "fp4": lambda w: four_bit(w, torch.tensor([*FP4, *(-value for value in FP4)])),
    "int4": lambda w: quantize(w, "int4"),
    "int4 in 32": lambda w: quantize(w, "int4", block=32),
    "fp8 of rows": lambda w: quantize(w, "fp8"),
    "fp8 in blocks": lambda w: quantize(w, "fp8", block=128),
    "fp8, one scale": lambda w: Float8(
        tuple(w.shape), (w * 100).to(torch.float8_e4m3fn), torch.tensor([[0.01]])
    ),
    "gptq": lambda w: from_gptq(gptq_layer(*w.shape, 64, act_order=False)[0]),
    "gptq, act order": lambda w: from_gptq(gptq_layer(*w.shape, 64, act_order=True)[0]),
    "awq": lambda w: from_awq(awq_layer(*w.shape, 64)[0]),
}


def assert_accurate(case, quantized, op=lora_linear):
    """The rule of `oracle.assert_accurate`, of all but dW; `quantized` makes the weight."""
    sums = {}
    for draw in case.draws():
        tensors, dy = oracle.make(draw)
        weight = quantized(tensors["weight"].detach())
        tensors["weight"] = weight.dequantize(case.dtype).requires_grad_()
        truth, peer = (f(draw, tensors, dy) for f in (oracle.reference64, oracle.unfused))
        del tensors["weight"], truth["weight"], peer["weight"]
        options = {"scaling": case.scaling, "dropout_p": case.p, "seed": draw.seed}
        y = op(weight=weight, **tensors, **options)
        grads = torch.autograd.grad(y, list(tensors.values()), dy)
        ours = {"y": y.detach(), **dict(zip(tensors, grads, strict=True))}
        for name, exact in truth.items():
            assert ours[name].dtype == (case.dtype if name == "y" else tensors[name].dtype)
            assert ours[name].shape == exact.shape
            apart = [(v[name].double() - exact).square().sum() for v in (ours, peer)]
            sums[name] = sums.get(name, 0) + torch.stack([*apart, exact.square().sum()])
    eps = torch.finfo(case.dtype).eps
    if not eps > 1e-4:  # as `oracle.assert_accurate` has it
        eps *= max(1.0, max(case.M, case.K, case.N, case.r) ** 0.5 / 2)
    for name, squares in sums.items():
        mine, other, size = squares.sqrt().tolist()
        assert mine <= 2 * other + eps * size, (name, mine, other, size)
