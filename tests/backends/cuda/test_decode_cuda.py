"""The CUDA decode kernel without a GPU: its arithmetic on the host, its machine code from nvcc, and
the plan that offers it. What it computes on a GPU: tests/test_gpu_decode.py."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import oracle
import pytest
import torch

from lora_kernels import backends, lora_add, lora_linear
from lora_kernels.backends import cuda
from lora_kernels.backends.cuda import choice, needs, tables
from lora_kernels.backends.cuda.choice import candidates, use_plan
from lora_kernels.backends.cuda.plan import Call
from lora_kernels.backends.cuda.plans import PLANS, decode_cuda
from lora_kernels.backends.device import CARDS
from lora_kernels.backends.native import decode, extension
from lora_kernels.backends.scaling import split

ROOT = Path(__file__).parents[3]
CUDA = ROOT / "csrc" / "cuda"
NVCC = shutil.which("nvcc")
COMPILER = shutil.which("c++")
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def toolkit_headers() -> Path | None:
    """Where cuda_bf16.h lies."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    if NVCC:
        homes.insert(1, str(Path(NVCC).resolve().parents[1]))
    folders = [Path(home, "include") for home in homes if home]
    return next((folder for folder in folders if (folder / "cuda_bf16.h").exists()), None)


# ---------------------------------------------------------------------------------- on the host


@pytest.fixture(scope="module")
def on_host(tmp_path_factory):
    """A program that runs the kernel's threads as fibers, under the sanitizers."""
    if COMPILER is None or toolkit_headers() is None:
        pytest.skip("needs a C++ compiler and the headers of the CUDA toolkit")
    program = tmp_path_factory.mktemp("host") / "decode"
    command = [
        COMPILER, "-std=c++20", "-O0", "-g1", "-fsanitize=address,undefined",
        "-fno-sanitize-recover=undefined", "-isystem", str(toolkit_headers()), f"-I{CUDA}",
        f'-DLORA_DEVICE_HEADER="{ROOT}/tests/host_device.h"',
        str(ROOT / "tests" / "host_decode.cpp"), "-o", str(program),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, text=True)
    return program


CASES = [
    (oracle.Case(1, 128, 16, 1, BF16, bias=False), (16, 4, 1)),
    (oracle.Case(1, 520, 50, 8, BF16), (16, 4, 2)),
    (oracle.Case(3, 264, 33, 16, F16, bias=False), (32, 4, 2)),
    (oracle.Case(8, 1032, 17, 17, BF16), (16, 8, 1)),
    (oracle.Case(9, 8, 40, 3, F16), (32, 4, 1)),
    (oracle.Case(16, 328, 65, 70, BF16), (32, 4, 4)),
    (oracle.Case(16, 200, 130, 130, F16, scaling=-1.5), (16, 4, 8)),
    (oracle.Case(5, 392, 31, 20, BF16, F32), (16, 4, 2)),
    (oracle.Case(12, 264, 48, 100, F16, F32, bias=False), (32, 8, 1)),
    (oracle.Case(13, 72, 20, 64, BF16, F32), (16, 4, 4)),
]


def strided(tensor: torch.Tensor, pitch: int) -> torch.Tensor:
    """The same rows `pitch` elements apart, NaN between them."""
    wide = tensor.new_full((tensor.shape[0], pitch), float("nan"))
    wide[:, : tensor.shape[1]] = tensor
    return wide[:, : tensor.shape[1]]


def dump(folder: Path, name: str, tensor: torch.Tensor) -> None:
    """What the tensor spans in memory."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    span = 1 + sum((size - 1) * stride for size, stride in sizes)
    flat = tensor.as_strided((span,), (1,)).contiguous()
    (folder / name).write_bytes(flat.view(torch.uint8).numpy().tobytes())


def write(folder: Path, case: oracle.Case, tile: tuple[int, int, int]) -> dict:
    folder.mkdir()
    tensors, dy = oracle.make(case)
    t = {name: value.detach() for name, value in tensors.items()}
    t["x"] = strided(t["x"], case.K + 8)
    t["lora_a"] = strided(t["lora_a"], case.K + 16)
    if case.N % 2:
        t["lora_b"] = t["lora_b"].t().contiguous().t()
    names = {"x": "x", "weight": "weight", "lora_a": "a", "lora_b": "b", "bias": "bias"}
    for name in t:
        dump(folder, names[name], t[name])
    rows, warps, cluster = tile
    numbers = {
        "M": case.M, "N": case.N, "K": case.K, "r": case.r,
        "scale": split(case.scaling, case.dtype)[0], "high": split(case.scaling, case.dtype)[1],
        "x_row": t["x"].stride(0), "weight_row": t["weight"].stride(0),
        "a_row": t["lora_a"].stride(0), "b_row": t["lora_b"].stride(0),
        "b_column": t["lora_b"].stride(1), "bias_stride": 1,
        "a_is_float": t["lora_a"].dtype == F32, "b_is_float": t["lora_b"].dtype == F32,
        "bias_is_float": False, "half": case.dtype == F16, "save_s": case.r != 8,
        "rows": rows, "warps": warps, "cluster": cluster,
    }  # fmt: skip
    text = "".join(f"{name} {float(value)!r}\n" for name, value in numbers.items())
    (folder / "case").write_text(text)
    return {"tensors": tensors, "dy": dy}


def read(path: Path, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.frombuffer(bytearray(path.read_bytes()), dtype=dtype).reshape(shape)


def test_arithmetic_on_the_host(on_host, tmp_path):
    """y and s by the accuracy rule; no step outside a tensor or shared memory, no read of a copy
    that was not waited for, no deadlock, every element written."""
    made = [write(tmp_path / str(i), *case) for i, case in enumerate(CASES)]
    folders = [str(tmp_path / str(i)) for i in range(len(CASES))]
    options = {"ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}
    run = subprocess.run(
        [on_host, *folders], env=os.environ | options, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-4000:]
    for (case, tile), given, folder in zip(CASES, made, folders, strict=True):
        eps = torch.finfo(case.dtype).eps
        truth = oracle.reference64(case, **given)["y"]
        peer = oracle.unfused(case, **given)["y"].double()
        y = read(Path(folder, "y"), case.dtype, case.M, case.N).double()
        assert (y - truth).norm() <= 2 * (peer - truth).norm() + eps * truth.norm(), (case, tile)
        saved = Path(folder, "s")
        assert saved.exists() == (case.r != 8)
        if saved.exists():
            x, a = given["tensors"]["x"].detach(), given["tensors"]["lora_a"].detach()
            truth = split(case.scaling, case.dtype)[0] * x.double() @ a.to(case.dtype).double().T
            s = read(saved, case.dtype, case.M, case.r).double()
            assert (s - truth).norm() <= eps * truth.norm(), (case, tile)


# --------------------------------------------------------------------------------- machine code

ARCHS = (80, 89, 90)


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
def test_machine_code(tmp_path):
    """No spill and no local memory in any instance for any architecture; asynchronous loads of 16
    bytes, tensor cores, no atomics."""
    include = Path(torch.__file__).parent / "include"
    archs = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
    command = [
        NVCC, "-fatbin", "-std=c++20", "-O3", "-DTORCH_TARGET_VERSION=0x020b000000000000",
        "-DUSE_CUDA", f"-I{include}", *archs, "-Xptxas", "-v", "--threads", "2",
        "--keep", "--keep-dir", str(tmp_path), str(CUDA / "decode.cu"), "-o",
        str(tmp_path / "decode.fatbin"),
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    log = run.stdout + run.stderr
    memory = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", log)
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", log)]
    instances = 16 * len(ARCHS)  # 2 dtypes, 2 adapter dtypes, 2 heights, 2 counts of rows
    assert len(memory) == len(registers) == instances
    assert set(memory) == {("0", "0", "0")}
    # Two blocks of 256 threads on an SM, which shared memory allows.
    assert max(registers) <= 128
    texts = {path.name: path.read_text() for path in tmp_path.glob("*.ptx")}
    assert len(texts) == len(ARCHS)
    for name, text in texts.items():
        assert text.count("mma.sync.aligned.m16n8k16") >= 16 * 2, name
        assert not re.findall(r"cp\.async\.(?!cg|commit|wait)\S*", text), name
        assert "cp.async.cg.shared.global.L2::cache_hint" in text, name
        assert not re.findall(r"\b(?:atom|red)\.", text), name
        assert ("mapa.shared::cluster" in text) == ("90" in name), name


# ------------------------------------------------------------------------------------- the plan


def call(**changes) -> Call:
    values = {"op": "forward", "dtype": "bfloat16", "M": 16, "N": 4096, "K": 4096, "r": 300}
    return Call(**{**values, "dropout": False, **changes})


@pytest.fixture
def there(monkeypatch):
    """As on a machine where the kernel is built and can run."""
    monkeypatch.setattr(extension, "cuda_available", lambda: True)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"M": 1, "dtype": "float16", "r": 1}, None),
        ({"op": "backward", "M": 8192}, None),
        ({"M": 17}, "M <= 16, got M = 17"),
        ({"dropout": True}, "no dropout"),
        ({"dtype": "float32"}, "float16 and bfloat16, got float32"),
        ({"K": 4100}, r"multiple of 8 elements .* \(K = 4100\)"),
        ({"readable": False}, "multiples of 16 bytes"),
    ],
)
def test_what_the_plan_serves(there, changes, reason):
    found = PLANS["decode_cuda"].refusal(call(**changes))
    assert found is None if reason is None else re.search(reason, found)


def test_forced_without_the_kernel_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(
        extension,
        "_cuda",
        lambda: (None, "not built (no nvcc, or torch without CUDA, at install?)"),
    )
    with (
        use_plan("decode_cuda"),
        pytest.raises(RuntimeError, match=r"decode_cuda.*CUDA kernels are not there: not built"),
    ):
        choice.choose(call(), torch.device("cpu"))


def test_never_chosen_before_a_table_says_so(there):
    assert choice.choose(call(), torch.device("cpu")).plan == "aten"
    bucket = call()._asdict() | {"plan": "decode_cuda"}
    table = {"proven": [tables.proof("aten", "bfloat16", False)], "buckets": [bucket]}
    assert tables.nearest(table, call()) is None
    table["proven"].append(tables.proof("decode_cuda", "bfloat16", False))
    assert tables.nearest(table, call()).plan == "decode_cuda"
    assert tables.nearest(table, call(M=17)) is None


def test_a_missing_kernel_is_passed_over(monkeypatch):
    monkeypatch.setattr(extension, "cuda_available", lambda: False)
    bucket = call()._asdict() | {"plan": "decode_cuda"}
    proven = [tables.proof("decode_cuda", "bfloat16", False)]
    assert tables.nearest({"proven": proven, "buckets": [bucket]}, call()) is None


def test_candidates_of_a_tuner(there):
    for card, clusters in (("80", {1}), ("89", {1}), ("90", {1, 2, 4, 8})):
        listed = candidates(call(r=16), CARDS[card])
        ours = [fields for plan, fields in listed if plan == "decode_cuda"]
        assert {} in ours
        found = [fields["decode_cuda"] for fields in ours if fields]
        found.append(decode_cuda.analytic(CARDS[card], 4096, 16)._asdict())
        assert {tile["cluster"] for tile in found} == clusters
        assert {tile["rows"] for tile in found} == {16, 32}
        assert {tile["warps"] for tile in found} <= {4, 8}


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=BF16)


@pytest.mark.parametrize(
    ("matrix", "readable"),
    [
        (zeros(4, 64), True),
        (zeros(4, 72)[:, :64], True),
        (zeros(4, 68)[:, :64], False),
        (zeros(64, 4).t(), False),
        (zeros(4 * 64 + 1)[1:].view(4, 64), False),
        (zeros(4, 72)[:, 8:], True),
        (zeros(1, 68)[:, :64], True),
        (zeros(4, 60), False),
    ],
)
def test_rows_that_the_kernel_reads(matrix, readable):
    fits = zeros(4, matrix.shape[1])
    for tensors in ((matrix, fits, fits), (fits, matrix, fits), (fits, fits, matrix)):
        assert decode.unreadable(*tensors) == (not readable)


def test_the_public_op_calls_it(there, monkeypatch):
    """Through the plan, with the tile of its candidate, for y and the s that backward needs; where
    there is no Triton, and gradients by ATen then."""
    monkeypatch.setattr(needs, "why_no_triton", lambda: "triton does not import")
    seen = []

    def run(x, base, pair, scale, save_s, tile):
        seen.append((*tile, save_s))
        weight, bias, (lora_a, lora_b) = base.weight, base.bias, pair
        s = (scale[0] * x.double() @ lora_a.double().T).to(x.dtype)
        y = torch.nn.functional.linear(x, weight, bias) + scale[1] * s @ lora_b.to(x.dtype).T
        return y, s if save_s else x.new_empty(0)

    monkeypatch.setattr(decode, "decode", run)
    choice = backends.Choice("cuda", cuda, "for this test")
    monkeypatch.setattr(backends, "_forced", lambda *args: choice)
    tensors, _ = oracle.make(oracle.Case(3, 64, 24, 5, F16))
    t = {name: value.detach() for name, value in tensors.items()}
    expected = torch.nn.functional.linear(t["x"], t["weight"], t["bias"]).double()
    expected += 2.0 * (t["x"].double() @ t["lora_a"].double().T) @ t["lora_b"].double().T
    with use_plan("decode_cuda", {"decode_cuda": {"rows": 32, "cluster": 2}}):
        y = lora_linear(**t, scaling=2.0)
        again = lora_linear(**{**t, "lora_b": tensors["lora_b"]}, scaling=2.0)
        (d_b,) = torch.autograd.grad(again, tensors["lora_b"], torch.ones_like(again))
        added = lora_add(t["x"].new_ones(3, 24), t["x"], t["lora_a"], t["lora_b"], scaling=2.0)
    assert (y - expected).norm() < 4e-3 * expected.norm()
    s = (2.0 * t["x"].double() @ t["lora_a"].double().T).sum(0)
    assert (d_b - s).norm() < 4e-3 * d_b.double().norm()
    branch = 2.0 * (t["x"].double() @ t["lora_a"].double().T) @ t["lora_b"].double().T
    assert (added - 1 - branch).norm() < 4e-3 * (1 + branch).norm()
    assert seen == [(32, 8, 2, False), (32, 8, 2, True)]
