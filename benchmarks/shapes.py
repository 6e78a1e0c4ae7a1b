"""Which layers are measured: named models, rows, ranks; and what each must compute and move.

A weight is [N, K]: K features in, N out.
"""

from collections.abc import Iterable

from lora_kernels.testing import Case

ROWS = (8192, 2048, 512, 64, 8, 1)
RANKS = (16, 64, 8, 128)
DROPOUTS = (0.0, 0.1)


def _decoder(hidden: int, key_value: int, intermediate: int) -> dict[str, tuple[int, int]]:
    return {
        "q, o": (hidden, hidden),
        "k, v": (key_value, hidden),
        "gate, up": (intermediate, hidden),
        "down": (hidden, intermediate),
    }


MODELS = {
    "Llama-3-8B": _decoder(4096, 1024, 14336),
    "Llama-3-70B": _decoder(8192, 1024, 28672),
    "Qwen2.5-7B": _decoder(3584, 512, 18944),
    "2048-wide": _decoder(2048, 512, 8192),
}


def names(N: int, K: int) -> str:
    """The layers with this weight, as "Llama-3-8B q, o"."""
    found = [
        f"{model} {layer}"
        for model, layers in MODELS.items()
        for layer, shape in layers.items()
        if shape == (N, K)
    ]
    return "; ".join(found)


def weights(models: Iterable[str] = MODELS) -> list[tuple[int, int]]:
    """(N, K) of every layer of the models, each once."""
    return list(dict.fromkeys(shape for model in models for shape in MODELS[model].values()))


def grid() -> list[Case]:
    """Every model's layers; what matters most comes first, for a run that is cut short."""
    cells = [
        Case(M, K, N, r, dropout=p)
        for r in RANKS
        for p in DROPOUTS
        for M in ROWS
        for N, K in weights()
    ]
    return sorted(cells, key=lambda case: (case.r != 16, not is_headline(case)))


def is_headline(case: Case) -> bool:
    """The shapes of the headline: Llama-3-8B and 70B in training."""
    llama = weights(("Llama-3-8B", "Llama-3-70B"))
    return (case.M, case.r) == (8192, 16) and (case.N, case.K) in llama


def named_cells() -> list[Case]:
    """The dozen cells that the slow peers are timed on too."""
    layers = ((4096, 4096), (14336, 4096), (4096, 14336))
    return [Case(M, K, N, 16, dropout=p) for p in DROPOUTS for M in (8192, 2048) for N, K in layers]


def lorafusion() -> list[Case]:
    """The published setup of LoRAFusion (EuroSys '26): 1.27x mean over unfused torch on an H100."""
    return [Case(M, n, n, 16, dropout=0.1) for n in (4096, 5120, 8192) for M in (2048, 4096, 8192)]


def decode() -> list[Case]:
    layers = ((4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192))
    return [Case(M, K, N, 16) for M in (1, 8, 16, 64) for N, K in layers]


def cpu() -> list[Case]:
    sizes = ((1024, 2048, 2048, 16), (4096, 768, 768, 8), (16, 2048, 2048, 16))
    return [Case(*size, dtype, p) for dtype in ("fp32", "bf16") for p in DROPOUTS for size in sizes]


# ------------------------------------------------------------------------- the least work of a case

ITEM_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
PASSES = ("forward", "backward", "both")


def flops(case: Case, which: str, adapter: bool = True) -> int:
    """Multiplications and additions of one pass, of the layer or of the frozen one.

    forward: y, s and s Bᵀ. backward: dx, ds, ds A, dA and dB.
    """
    base, low = case.K * case.N, case.r * (case.K + case.N) * adapter
    forward, backward = 2 * case.M * (base + low), 2 * case.M * (base + 2 * low)
    return {"forward": forward, "backward": backward, "both": forward + backward}[which]


def least_bytes(case: Case, which: str, adapter: bool = True) -> int:
    """Every input read once, every output written once, in the case's dtype."""
    M, K, N, r = case[:4]
    factors, s = r * (K + N) * adapter, M * r * adapter
    forward = M * K + N * K + factors + M * N + s
    # dy, W, A, B, s and (for dA) x in; dx, dA and dB out
    backward = M * N + N * K + factors + s + M * K * adapter + M * K + factors
    words = {"forward": forward, "backward": backward, "both": forward + backward}[which]
    return words * ITEM_BYTES[case.dtype]


def intensity(case: Case, which: str, adapter: bool = True) -> float:
    """Operations per byte: where the case lies on a roofline."""
    return flops(case, which, adapter) / least_bytes(case, which, adapter)
