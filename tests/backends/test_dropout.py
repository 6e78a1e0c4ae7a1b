"""The dropout mask: its definition, its statistics, and that backward sees the mask of forward."""

import math

import oracle
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lora_kernels import lora_add, lora_linear
from lora_kernels.backends import blocked, dropout


def mask(seed, rows, columns, p, first_row=0):
    return dropout.keep_mask(torch.tensor(seed), first_row, rows, columns, p)


# Random123's known answers for philox4x32-10.
KNOWN_10 = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_10)
def test_the_oracle_is_philox(counter, key, words):
    assert oracle.philox(counter, key, rounds=10) == words


SEEDS = (0, 1, 2**32, 2**63 - 1, -1, -(2**63), 0x0123456789ABCDEF)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("c0", [0, 1, 0x7FFFFFFF, 0xFFFFFFFF])
def test_philox_with_7_rounds(seed, c0):
    c1 = [0, 1, 12345, 0xFFFFFFFF]
    words = dropout.philox(torch.tensor(seed), torch.tensor(c0), torch.tensor(c1))
    key = (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF)
    expected = [oracle.philox((c0, row, 0, 0), key, rounds=7) for row in c1]
    assert list(zip(*(word.tolist() for word in words), strict=True)) == expected


# (seed, row, the first elements at p = 0.5; 1 = kept)
VECTORS = [
    (0, 0, "1000000001111011001111011011010000110000010"),
    (0, 1, "0111101101011101010110011111011011100101000"),
    (1, 0, "1110100000011011110001011011110101001110010"),
    (2**32, 0, "0100110110001000000011110101101100110011111"),
    (-1, 5, "1011001000011001101010101100000010001011101"),
    (123456789012345, 2**31, "0011101111100011101111101011010000111100100"),
]


@pytest.mark.parametrize(("seed", "m", "bits"), VECTORS)
def test_mask_vectors(seed, m, bits):
    row = mask(seed, 1, len(bits), 0.5, first_row=m)[0]
    assert "".join(str(int(kept)) for kept in row) == bits


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.99999])
@pytest.mark.parametrize("seed", [5, -(2**40) - 3])
def test_mask_is_the_oracles(p, seed):
    if round(65536 * p) < 65536:
        assert torch.equal(mask(seed, 19, 37, p), oracle.keep_factor(seed, 19, 37, p) > 0)


@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_threshold_is_exact(offset):
    """Thresholds just below, at and above the half-word of one element."""
    half = next(h for h in (oracle.half_word(3, 2, k) for k in range(16)) if 1 < h < 65534)
    k = [oracle.half_word(3, 2, k) for k in range(16)].index(half)
    t = half + offset
    assert dropout.threshold(t / 65536) == t
    assert bool(mask(3, 3, 16, t / 65536)[2, k]) == (half >= t)


@pytest.mark.parametrize(
    ("p", "t"), [(0.0, 0), (7e-6, 0), (8e-6, 1), (0.1, 6554), (0.5, 32768), (1 - 1e-9, 65535)]
)
def test_threshold_and_scale(p, t):
    assert dropout.threshold(p) == t
    assert dropout.keep_scale(p) == 65536 / (65536 - t)


def test_a_probability_that_rounds_to_nothing_keeps_all():
    assert mask(1, 64, 64, 1e-9).all()
    x, w, a, b = torch.randn(4, 8), torch.randn(5, 8), torch.randn(2, 8), torch.randn(5, 2)
    y = lora_linear(x, w, a, b, dropout_p=1e-9, seed=1)
    torch.testing.assert_close(y, lora_linear(x, w, a, b))


@pytest.mark.parametrize("p", [0.05, 0.3, 0.5, 0.9])
def test_rate_within_5_sigma(p):
    n = 512 * 513
    kept = mask(11, 512, 513, p).sum().item()
    exact = 1 - dropout.threshold(p) / 65536
    assert abs(kept - n * exact) < 5 * math.sqrt(n * exact * (1 - exact))


def neighbours():
    m = mask(7, 512, 520, 0.5)
    return {
        "rows": (m[:-1], m[1:]),
        "columns": (m[:, :-1], m[:, 1:]),
        "halves of a word": (m[:, ::2], m[:, 1::2]),
        "words of a block": (m[:, ::8], m[:, 2::8]),
        "blocks": (m[:, :-8], m[:, 8:]),
        "seeds": (m, mask(8, 512, 520, 0.5)),
        "high halves of seeds": (m, mask(7 + 2**32, 512, 520, 0.5)),
        "seeds with swapped halves": (
            mask(2**32 + 2, 512, 520, 0.5),
            mask(2**33 + 1, 512, 520, 0.5),
        ),
    }


@pytest.mark.parametrize("name", neighbours())
def test_independent(name):
    first, second = neighbours()[name]
    n = first.numel()
    agreeing = (first == second).sum().item()
    assert abs(agreeing - n / 2) < 5 * math.sqrt(n / 4)


@pytest.mark.parametrize("first", [0, 1, 7, 30])
def test_row_blocks_see_the_same_mask(first):
    whole = mask(9, 40, 21, 0.4)
    assert torch.equal(mask(9, 10, 21, 0.4, first_row=first), whole[first : first + 10])
    assert torch.equal(mask(9, 40, 13, 0.4), whole[:, :13])


@pytest.mark.parametrize("limit", [2**12, 2**16, 2**31])
def test_rows_are_counted_past(limit):
    """No counter of rows wraps there."""
    found = mask(9, 4, 64, 0.5, first_row=limit - 2)
    for row, m in zip(found, range(limit - 2, limit + 2), strict=True):
        words = [oracle.half_word(9, m, k) for k in range(64)]
        assert row.tolist() == [word >= 32768 for word in words]


def test_rows_of_one_call_are_counted_past_65536():
    whole = mask(9, 65_600, 8, 0.5)
    assert torch.equal(whole[-100:], mask(9, 100, 8, 0.5, first_row=65_500))


def masks_of_forward_and_backward(op, M, K, p, seed):
    """Both read off linear maps: A = I, B = I, no base."""
    x = torch.ones(M, K, requires_grad=True)
    eye = torch.eye(K)
    base = {"weight": torch.zeros(K, K)} if op is lora_linear else {"base_out": torch.zeros(M, K)}
    y = op(x=x, lora_a=eye, lora_b=eye, dropout_p=p, seed=seed, **base)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    return y.detach(), dx


@pytest.mark.parametrize("op", [lora_linear, lora_add])
@pytest.mark.parametrize("block_bytes", [1, 400, 8 << 20])
@pytest.mark.parametrize("p", [0.1, 0.75])
def test_the_op_uses_the_mask_in_both_directions(op, block_bytes, p, monkeypatch):
    monkeypatch.setattr(blocked, "_CPU_BLOCK_BYTES", block_bytes)
    y, dx = masks_of_forward_and_backward(op, 21, 19, p, seed=77)
    expected = oracle.keep_factor(77, 21, 19, p).float()
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(dx, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("op", [lora_linear, lora_add])
def test_seed_none_follows_torch_manual_seed(op):
    def draw():
        return masks_of_forward_and_backward(op, 16, 32, 0.5, None)[0]

    torch.manual_seed(3)
    first, second = draw(), draw()
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(draw(), first)
    assert torch.equal(draw(), second)
    agreeing = (first == second).float().mean().item()
    assert abs(agreeing - 0.5) < 5 * 0.5 / math.sqrt(first.numel())


@pytest.mark.parametrize("seed", [None, 42])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("op", [lora_linear, lora_add])
def test_activation_checkpointing(op, reentrant, seed):
    case = oracle.Case(24, 40, 32, 4, torch.bfloat16, torch.float32, add=op is lora_add)
    tensors, dy = oracle.make(case)

    def layer(*values):
        names = dict(zip(tensors, values, strict=True))
        return op(**names, scaling=2.0, dropout_p=0.3, seed=seed)

    def gradients(run):
        torch.manual_seed(1)
        return torch.autograd.grad(run(), list(tensors.values()), dy)

    def backward(run):
        torch.manual_seed(1)
        for t in tensors.values():
            t.grad = None
        run().backward(dy)
        return [t.grad for t in tensors.values()]

    plain = gradients(lambda: layer(*tensors.values()))
    again = backward(lambda: checkpoint(layer, *tensors.values(), use_reentrant=reentrant))
    for expected, got in zip(plain, again, strict=True):
        assert torch.equal(expected, got)


def test_a_part_of_x_has_its_part_of_the_mask():
    whole = dropout.keep_mask(torch.tensor(9), 0, 40, 100, 0.3)
    for row, column in ((0, 0), (7, 24), (38, 96)):
        seed = torch.tensor([9, row, column])
        part = dropout.keep_mask(seed, 0, 40 - row, 100 - column, 0.3)
        assert torch.equal(part, whole[row:, column:])
        assert torch.equal(dropout.keep_mask(seed, 1, 39 - row, 4, 0.3), part[1:, :4])
