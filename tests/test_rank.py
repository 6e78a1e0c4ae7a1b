"""Low-rank approximation, re-factoring of adapters, rank budgets."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from lora_kernels import low_rank_approximation
from lora_kernels.rank import allocate_ranks, refactor, spectrum, widen


def matrix(spectrum, m, n, seed=0):
    """An m x n matrix of fp64 with these singular values."""
    generator = torch.Generator().manual_seed(seed)
    size = len(spectrum)
    left = torch.linalg.qr(torch.randn(m, size, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(n, size, generator=generator, dtype=torch.float64)).Q
    return left * torch.as_tensor(spectrum, dtype=torch.float64) @ right.mT


def randn(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


# --------------------------------------------------------------------------- low_rank_approximation


@pytest.mark.parametrize(("m", "n"), [(1, 1), (7, 129), (129, 7), (64, 64)])
def test_exact_error_is_the_tail_of_the_spectrum(m, n):
    size = min(m, n)
    singular = torch.linspace(2, 0.1, size, dtype=torch.float64)
    M = matrix(singular, m, n)
    for k in {1, (size + 1) // 2, size}:
        U, V = low_rank_approximation(M.float(), k)
        assert U.shape == (m, k)
        assert V.shape == (k, n)
        tail = singular[k:].norm()
        error = (M - U.double() @ V.double()).norm()
        assert abs(float(error - tail)) <= 2e-6 * float(singular.norm())


SPECTRA = {
    "1/j": 1 / torch.arange(1, 401.0),
    "1/sqrt(j)": torch.arange(1, 401.0) ** -0.5,
    "exponential": 0.9 ** torch.arange(400.0),
    "flat": torch.ones(400),
    "step": torch.cat((torch.ones(20), torch.full((380,), 1e-3))),
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("k", [1, 16, 40])
def test_randomized_is_within_one_percent_of_the_best(name, k):
    singular = SPECTRA[name].double()
    M = matrix(singular, 400, 500)
    U, V = low_rank_approximation(M, k, method="randomized")
    error = float((M - U @ V).norm() / singular[k:].norm())
    assert 1 - 1e-9 <= error <= 1.01


def test_power_iterations_bring_it_nearer():
    M = matrix(SPECTRA["1/sqrt(j)"], 400, 500)
    errors = [
        float((M - U @ V).norm())
        for q in (0, 1, 2)
        for U, V in [low_rank_approximation(M, 16, method="randomized", power_iterations=q)]
    ]
    assert errors[0] > 1.05 * errors[2]
    assert errors[1] > errors[2]


def test_size_chooses_the_method():
    small, large = randn(100, 120), randn(600, 700)
    for M, k, method in (
        (small, 3, "exact"),
        (large, 3, "randomized"),
        (large, 400, "exact"),
    ):
        expected = low_rank_approximation(M, k, method=method)
        other = low_rank_approximation(M, k, method="exact" if method != "exact" else "randomized")
        chosen = low_rank_approximation(M, k)
        assert all(map(torch.equal, chosen, expected))
        assert not all(map(torch.equal, chosen, other))


@pytest.mark.parametrize("method", ["exact", "randomized"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_and_batches(method, dtype):
    M = torch.stack([matrix(SPECTRA["exponential"][:30], 30, 50, seed=s) for s in range(6)])
    M = M.view(2, 3, 30, 50).to(dtype)
    U, V = low_rank_approximation(M, 4, method=method)
    assert U.shape == (2, 3, 30, 4)
    assert V.shape == (2, 3, 4, 50)
    assert U.dtype == V.dtype == dtype
    assert not U.requires_grad
    best = torch.linalg.svdvals(M.double())[..., 4:].norm(dim=-1)
    error = torch.linalg.matrix_norm(M.double() - U.double() @ V.double())
    rounding = torch.finfo(dtype).eps * torch.linalg.matrix_norm(M.double())
    assert (error <= 1.0001 * best + 2 * rounding).all()
    one = low_rank_approximation(M[1, 2], 4, method="exact")
    if method == "exact":
        assert relative(U[1, 2] @ V[1, 2], one[0] @ one[1]) <= 2 * torch.finfo(dtype).eps


def test_strides_and_gradients_of_the_input_do_not_matter():
    M = randn(60, 40).requires_grad_()
    U, V = low_rank_approximation(M.mT, 5, method="randomized")
    U2, V2 = low_rank_approximation(M.detach().mT.contiguous(), 5, method="randomized")
    assert not U.requires_grad
    assert relative(U @ V, U2 @ V2) < 1e-5


@pytest.mark.parametrize("scale", [1e-40, 1e-20, 1e35])
def test_extreme_magnitudes(scale):
    M = matrix(SPECTRA["exponential"][:50], 50, 60)
    M = M / M.abs().max()
    best = torch.linalg.svdvals(M)[4:].norm()
    U, V = low_rank_approximation((M * scale).float(), 4, method="randomized")
    error = (M - U.double() @ V.double() / scale).norm()
    assert float(error) <= 1.001 * float(best)


def test_zero_matrix():
    for method in ("exact", "randomized"):
        U, V = low_rank_approximation(torch.zeros(30, 40), 3, method=method)
        assert torch.equal(U @ V, torch.zeros(30, 40))


def test_same_bits_and_untouched_generator():
    M = randn(200, 150)
    state = torch.get_rng_state()
    first = low_rank_approximation(M, 4, method="randomized")
    torch.manual_seed(99)
    second = low_rank_approximation(M, 4, method="randomized")
    other = low_rank_approximation(M, 4, method="randomized", seed=1)
    assert all(map(torch.equal, first, second))
    assert not torch.equal(first[0], other[0])
    torch.set_rng_state(state)
    low_rank_approximation(M, 4, method="randomized")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("method", ["exact", "randomized"])
def test_autocast_does_not_lower_the_precision(method):
    M = randn(80, 90)
    plain = low_rank_approximation(M, 5, method=method)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = low_rank_approximation(M, 5, method=method)
        adapter = refactor(M[:8], M.mT[:40, :8], 3)
    assert all(map(torch.equal, plain, inside))
    assert torch.equal(adapter.A, refactor(M[:8], M.mT[:40, :8], 3).A)


@pytest.mark.parametrize(
    ("error", "message", "M", "k", "options"),
    [
        (TypeError, "M: expected a Tensor, got list", [[1.0]], 1, {}),
        (ValueError, "M: expected shape [..., m, n] with m, n >= 1, got (3,)",
         torch.ones(3), 1, {}),
        (ValueError, "M: expected shape [..., m, n] with m, n >= 1, got (0, 3)",
         torch.ones(0, 3), 1, {}),
        (TypeError, "M: expected a real floating dtype, got torch.int64",
         torch.ones(3, 3, dtype=torch.int64), 1, {}),
        (TypeError, "M: expected a real floating dtype, got torch.complex64",
         torch.ones(3, 3, dtype=torch.complex64), 1, {}),
        (ValueError, "M: expected a dense tensor with values, got one of the meta device",
         torch.ones(3, 3, device="meta"), 1, {}),
        (ValueError, "k: expected an integer from 1 to 3 (min(m, n) of M (3, 4)), got 4",
         torch.ones(3, 4), 4, {}),
        (ValueError, "k: expected an integer from 1 to 3", torch.ones(3, 4), 0, {}),
        (TypeError, "k: expected an integer, got 1.0", torch.ones(3, 4), 1.0, {}),
        (TypeError, "k: expected an integer, got True", torch.ones(3, 4), True, {}),
        (ValueError, "M: expected finite values, got 2 that are inf or nan",
         torch.tensor([[1.0, torch.inf], [torch.nan, 0.0]]), 1, {}),
        (ValueError, "method: got 'svd', legal values are None, exact, randomized",
         torch.ones(3, 4), 1, {"method": "svd"}),
        (ValueError, "power_iterations: expected an integer of at least 0, got -1",
         torch.ones(3, 4), 1, {"power_iterations": -1}),
        (ValueError, "oversampling: expected an integer of at least 0, got -1",
         torch.ones(3, 4), 1, {"oversampling": -1}),
        (TypeError, "seed: expected an integer, got None", torch.ones(3, 4), 1, {"seed": None}),
    ],
)  # fmt: skip
def test_bad_input(error, message, M, k, options):
    with pytest.raises(error, match=re.escape(message)):
        low_rank_approximation(M, k, **options)


# ----------------------------------------------------------------------------------------- refactor


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data(), N=st.integers(1, 40), K=st.integers(1, 40), r=st.integers(1, 20))
def test_refactor_is_the_best_approximation_of_the_product(data, N, K, r):
    k = data.draw(st.integers(1, r))
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32]))
    A, B = randn(r, K, seed=1, dtype=dtype), randn(N, r, seed=2, dtype=dtype)
    torch.manual_seed(0)
    new_A, new_B, singular, energy = refactor(A, B, k)
    assert new_A.shape == (k, K)
    assert new_B.shape == (N, k)
    assert new_A.dtype == new_B.dtype == dtype
    product = B.double() @ A.double()
    U, S, Vh = torch.linalg.svd(product, full_matrices=False)
    kept = min(k, len(S))
    best = U[:, :kept] * S[:kept] @ Vh[:kept]
    got = new_B.double() @ new_A.double()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    # Errors are compared: with two singular values close to each other the best is not unique.
    assert float((got - product).norm()) <= float((best - product).norm()) + tolerance * float(
        product.norm()
    )
    assert torch.allclose(singular.double(), S[: len(singular)], atol=tolerance * float(S[0]))
    expected = float(S[:kept].square().sum() / S.square().sum())
    assert energy == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_refactor_in_half_precision_rounds_once(dtype):
    A, B = randn(16, 96, dtype=dtype), randn(64, 16, seed=1, dtype=dtype)
    half, full = refactor(A, B, 4), refactor(A.float(), B.float(), 4)
    assert torch.equal(half.A, full.A.to(dtype))
    assert torch.equal(half.B, full.B.to(dtype))


class LargestResult(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return result


def test_refactor_never_forms_the_product():
    A, B = randn(8, 1000), randn(1500, 8, seed=1)
    with LargestResult() as largest:
        refactor(A, B, 3)
        spectrum(A, B)
    assert 0 < largest.elements <= 8 * 1500


@pytest.mark.parametrize("zero", ["B", "A", "both", "one direction"])
def test_null_directions_stay_trainable(zero):
    A, B = randn(8, 12), randn(10, 8, seed=1)
    if zero in ("A", "both"):
        A.zero_()
    if zero in ("B", "both"):
        B.zero_()
    if zero == "one direction":
        B[:, 3:] = 0
    new_A, new_B, _, energy = refactor(A, B, 4)
    assert float((new_B @ new_A - B @ A).norm()) <= 1e-5
    assert energy == pytest.approx(1.0)
    # B gets a gradient through every row of A.
    assert (new_A.norm(dim=1) > 0.1).all()


@pytest.mark.parametrize("k", [8, 9, 20])
def test_widen_keeps_the_product_and_starts_as_a_new_adapter(k):
    A, B = randn(8, 12, dtype=torch.bfloat16), randn(10, 8, seed=1, dtype=torch.bfloat16)
    torch.manual_seed(0)
    new_A, new_B = widen(A, B, k)
    assert torch.equal(new_A[:8], A)
    assert torch.equal(new_B[:, :8], B)
    assert torch.count_nonzero(new_B[:, 8:]) == 0
    assert (new_A[8:].abs() <= 12**-0.5 + 1e-3).all()
    assert (new_A[8:].float().norm(dim=1) > 0).all()
    assert new_A.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("error", "message", "A", "B", "k"),
    [
        (ValueError, "k: expected an integer from 1 to 2 (the rank of A (2, 5)), got 3",
         torch.ones(2, 5), torch.ones(4, 2), 3),
        (ValueError, "B: expected shape [N, r] with r = 2 of A (2, 5), got (4, 3)",
         torch.ones(2, 5), torch.ones(4, 3), 1),
        (TypeError, "B: expected A's dtype torch.float32, got torch.float64",
         torch.ones(2, 5), torch.ones(4, 2).double(), 1),
        (TypeError, "A: expected a Tensor, got NoneType", None, torch.ones(4, 2), 1),
        (ValueError, "A: expected a matrix, got shape (1, 2, 5)",
         torch.ones(1, 2, 5), torch.ones(4, 2), 1),
        (ValueError, "B: expected finite values, got 8 that are inf or nan",
         torch.ones(2, 5), torch.full((4, 2), torch.nan), 1),
    ],
)  # fmt: skip
def test_refactor_bad_input(error, message, A, B, k):
    with pytest.raises(error, match=re.escape(message)):
        refactor(A, B, k)


def test_widen_refuses_a_smaller_rank():
    with pytest.raises(ValueError, match="k: expected an integer of at least 2, got 1"):
        widen(torch.ones(2, 5), torch.ones(4, 2), 1)


# ------------------------------------------------------------------------------------------ budgets


def test_equal_costs_keep_the_largest_singular_values():
    spectra = {"a": torch.tensor([9.0, 8, 1, 0.5]), "b": torch.tensor([7.0, 2, 1.5, 0.1])}
    assert allocate_ranks(spectra, {"a": 10, "b": 10}, 40) == {"a": 2, "b": 2}
    assert allocate_ranks(spectra, {"a": 10, "b": 10}, 50) == {"a": 2, "b": 3}
    assert allocate_ranks(spectra, {"a": 10, "b": 10}, 1000) == {"a": 4, "b": 4}


def test_costs_count():
    spectra = {"dear": torch.tensor([3.0, 2.0]), "cheap": torch.tensor([3.0, 1.9])}
    assert allocate_ranks(spectra, {"dear": 100, "cheap": 10}, 210) == {"dear": 1, "cheap": 2}


def test_untrained_adapters_share_evenly():
    spectra = {name: torch.zeros(8) for name in "abcd"}
    assert set(allocate_ranks(spectra, dict.fromkeys("abcd", 5), 4 * 5 * 3).values()) == {3}


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    values=st.lists(st.lists(st.floats(0, 10), min_size=1, max_size=6), min_size=1, max_size=5),
    k=st.integers(1, 6),
)
def test_budget_is_kept_and_used(values, k):
    spectra = {str(i): torch.tensor(sorted(v, reverse=True)) for i, v in enumerate(values)}
    costs = {name: 3 + int(name) for name in spectra}
    budget = k * sum(costs.values())
    ranks = allocate_ranks(spectra, costs, budget)
    used = sum(ranks[name] * costs[name] for name in spectra)
    assert used <= budget
    assert all(1 <= ranks[name] <= len(spectra[name]) for name in spectra)
    for name in spectra:
        assert ranks[name] == len(spectra[name]) or used + costs[name] > budget


def test_budget_below_rank_one():
    message = "budget: rank 1 in every layer costs 20, more than the 15 given"
    with pytest.raises(ValueError, match=message):
        allocate_ranks({"a": torch.ones(2), "b": torch.ones(2)}, {"a": 10, "b": 10}, 15)
