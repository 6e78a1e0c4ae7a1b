"""What the tests compare with: the layer in fp64 and in unfused torch, and the accuracy rule.

Nothing here uses the package: the dropout mask comes from a Philox in Python integers.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F

GRADIENTS = ("x", "weight", "base_out", "lora_a", "lora_b", "bias")
LAYOUTS = ("contiguous", "transposed", "sliced", "offset", "expanded")
_WORD = 0xFFFFFFFF


def philox(counter, key, rounds):
    """Philox4x32 of Salmon et al. 2011: four words from a counter of four and a key of two."""
    c, k = list(counter), list(key)
    for _ in range(rounds):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & _WORD, (p0 >> 32) ^ c[3] ^ k[1], p0 & _WORD]
        k = [(k[0] + 0x9E3779B9) & _WORD, (k[1] + 0xBB67AE85) & _WORD]
    return tuple(c)


def half_word(seed, m, k):
    """The 16 bits that decide whether element (m, k) is kept."""
    word = philox((k >> 3, m, 0, 0), (seed & _WORD, seed >> 32 & _WORD), 7)[(k & 7) >> 1]
    return word >> 16 * (k & 1) & 0xFFFF


@lru_cache(maxsize=64)
def keep_factor(seed, rows, columns, p):
    """[rows, columns] in fp64: 0 where dropped, 65536 / (65536 - t) where kept."""
    dropped = round(65536 * p)
    factor = torch.zeros(rows, columns, dtype=torch.float64)
    for m in range(rows):
        for block in range((columns + 7) // 8):
            words = philox((block, m, 0, 0), (seed & _WORD, seed >> 32 & _WORD), 7)
            for h in range(min(8, columns - 8 * block)):
                if words[h >> 1] >> 16 * (h & 1) & 0xFFFF >= dropped:
                    factor[m, 8 * block + h] = 65536 / (65536 - dropped)
    return factor


@dataclass(frozen=True)
class Case:
    """One call of lora_linear, or of lora_add where `add` is set; everything follows from it."""

    M: int
    K: int
    N: int
    r: int
    dtype: torch.dtype = torch.float32
    adapter_dtype: torch.dtype | None = None
    bias: bool = True
    scaling: float = 2.0
    p: float = 0.0
    layout: str = "contiguous"
    add: bool = False
    seed: int = 1
    large: bool = False  # with scaling 64 scaling x A^T leaves fp16's range, nothing else does

    def draws(self):
        """Enough repetitions that the error of a tiny case is no accident of one rounding."""
        sizes = (self.M * self.N, self.M * self.K, self.r * self.K, self.r * self.N)
        count = min(32, math.ceil(128 / max(1, min(sizes))))
        return [replace(self, seed=1000 * self.seed + i) for i in range(count)]


def lay_out(tensor, layout):
    """Equal values (but for 'expanded', which repeats the first row) in other strides."""
    rows, columns = tensor.shape
    if layout == "transposed":
        return tensor.t().contiguous().t()
    if layout == "sliced":
        wide = tensor.new_zeros(2 * rows, 2 * columns + 1)
        wide[::2, 1::2] = tensor
        return wide[::2, 1::2]
    if layout == "offset":
        return torch.cat([tensor.new_zeros(rows, 3), tensor], 1)[:, 3:]
    if layout == "expanded":
        return tensor[:1].expand(rows, columns)
    return tensor


def make(case):
    """(leaf tensors by argument name, dy) at the magnitudes of a layer in training."""
    rng = torch.Generator().manual_seed(case.seed)
    M, K, N, r = case.M, case.K, case.N, case.r

    def leaf(rows, columns, std, dtype, layout=case.layout):
        values = torch.randn(rows, columns, generator=rng, dtype=torch.float64) * std
        values = values.to(dtype)
        return (lay_out(values, layout) if rows else values).detach().requires_grad_()

    low = case.adapter_dtype or case.dtype
    # Expanded rows would make the other operands low in rank; they stay ordinary then.
    inner = "transposed" if case.layout == "expanded" else case.layout
    x_std, b_std, dy_std = (3000.0, 0.02, 0.005) if case.large else (1.0, 0.5 * r**-0.5, 0.1)
    tensors = {"x": leaf(M, K, x_std, case.dtype)}
    if case.add:
        tensors["base_out"] = leaf(M, N, 1.0, case.dtype)
    else:
        tensors["weight"] = leaf(N, K, K**-0.5, case.dtype, inner)
    tensors["lora_a"] = leaf(r, K, (3 * K) ** -0.5, low, inner)
    tensors["lora_b"] = leaf(N, r, b_std, low, inner)
    if case.bias and not case.add:
        tensors["bias"] = leaf(1, N, 0.5, case.dtype, "contiguous")[0].detach().requires_grad_()
    dy = leaf(M, N, dy_std, case.dtype).detach()
    return tensors, dy


def _gradients(y, tensors, dy):
    names = [name for name in GRADIENTS if name in tensors]
    grads = torch.autograd.grad(y, [tensors[name] for name in names], dy)
    return {"y": y.detach(), **dict(zip(names, grads, strict=True))}


def reference64(case, tensors, dy):
    """y and all gradients in fp64."""
    t = {name: v.detach().double().requires_grad_() for name, v in tensors.items()}
    dropped = t["x"] * keep_factor(case.seed, case.M, case.K, case.p) if case.p else t["x"]
    base = t["base_out"] if case.add else t["x"] @ t["weight"].T + t.get("bias", 0.0)
    y = base + case.scaling * ((dropped @ t["lora_a"].T) @ t["lora_b"].T)
    return _gradients(y, t, dy.double())


def unfused(case, tensors, dy):
    """y and all gradients as torch computes them op by op in x's dtype."""
    x, dtype = tensors["x"], case.dtype
    base = tensors["base_out"] if case.add else F.linear(x, tensors["weight"], tensors.get("bias"))
    factor = keep_factor(case.seed, case.M, case.K, case.p).to(dtype) if case.p else None
    dropped = x if factor is None else x * factor
    branch = F.linear(dropped, tensors["lora_a"].to(dtype))
    y = base + case.scaling * F.linear(branch, tensors["lora_b"].to(dtype))
    return _gradients(y, tensors, dy)


LARGE = [
    Case(*sizes, torch.float16, adapter_dtype, scaling=scaling, p=p, add=add, large=True)
    for sizes in ((1, 64, 48, 4), (40, 96, 65, 8), (150, 72, 130, 3))
    for scaling in (64.0, -64.0, 48.5)
    for adapter_dtype, p, add in (
        (None, 0.0, False), (torch.float32, 0.25, False), (torch.float32, 0.0, True),
    )
]  # fmt: skip


def assert_fp16_range(case, op):
    """Where unfused torch is finite so is the op, as accurate, and a new adapter adds nothing."""
    tensors, dy = make(case)
    assert (case.scaling * tensors["x"].double() @ tensors["lora_a"].double().T).abs().max() > 65504
    assert all(value.isfinite().all() for value in unfused(case, tensors, dy).values())
    assert_accurate(case, op)
    with torch.no_grad():
        options = {"scaling": case.scaling, "dropout_p": case.p, "seed": case.seed}
        new = op(**{**tensors, "lora_b": torch.zeros_like(tensors["lora_b"])}, **options)
        base = op(**{**tensors, "lora_a": torch.zeros_like(tensors["lora_a"])}, **options)
        assert torch.equal(new, base)


def compute(case, tensors, dy, op):
    """y and all gradients of lora_linear or lora_add."""
    args = {"scaling": case.scaling, "dropout_p": case.p, "seed": case.seed}
    y = op(**tensors, **args)
    result = _gradients(y, tensors, dy)
    for name, value in result.items():
        expected = case.dtype if name == "y" else tensors[name].dtype
        assert value.dtype == expected, f"{name}: {value.dtype} instead of {expected}"
    return result


def errors(case, op):
    """{name: (our error, unfused torch's error)}, each norm-wise relative to fp64."""
    sums = {}
    for draw in case.draws():
        tensors, dy = make(draw)
        truth = reference64(draw, tensors, dy)
        ours, peer = compute(draw, tensors, dy, op), unfused(draw, tensors, dy)
        assert ours.keys() == truth.keys()
        for name, exact in truth.items():
            assert ours[name].shape == exact.shape, name
            squares = [(v[name].double() - exact).square().sum() for v in (ours, peer)]
            squares.append(exact.square().sum())
            sums[name] = sums.get(name, 0) + torch.stack(squares)
    return {
        name: tuple((v[:2] / v[2].clamp_min(1e-300)).sqrt().tolist()) for name, v in sums.items()
    }


def assert_accurate(case, op):
    """Each output at most 2 x the error of unfused torch + eps of the compute dtype."""
    eps = torch.finfo(case.dtype).eps
    if case.dtype in (torch.float32, torch.float64):
        # No accumulator is wider than these, so the order of a sum costs up to sqrt(length) eps.
        eps *= max(1.0, max(case.M, case.K, case.N, case.r) ** 0.5 / 2)
    for name, (ours, peer) in errors(case, op).items():
        assert ours <= 2 * peer + eps, f"{name}: error {ours:.3g}, unfused {peer:.3g}, {case}"
