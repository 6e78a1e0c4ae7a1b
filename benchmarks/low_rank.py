"""Randomised against exact low-rank approximation of one matrix: time, ratio and error, in one run.

python -m benchmarks.low_rank                     # 4096 x 4096, k = 16; the exact SVD takes long
python -m benchmarks.low_rank --size 512          # a quick look
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable

import torch

import lora_kernels
from lora_kernels import low_rank_approximation


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            models = [line.partition(":")[2].strip() for line in file if "model name" in line]
        name = models[0] if models else name
    return f"{name}, {torch.get_num_threads()} threads"


def seconds(function: Callable[[], object], device: torch.device) -> tuple[float, object]:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    start = time.perf_counter()
    result = function()
    wait()
    return time.perf_counter() - start, result


def decaying(size: int, device: torch.device) -> torch.Tensor:
    """A dense matrix whose singular values fall roughly as 1 / j, made by products alone.

    Random directions of decaying length; orthonormal ones would take a QR of the whole matrix.
    """
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(size, size, generator=generator, device=device) for _ in range(2))
    return left / torch.arange(1, size + 1, device=device) @ right / size


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", type=int, default=4096, help="rows and columns")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5, help="of the randomised method")
    parser.add_argument("--exact-repeats", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", help="also write the results to this file")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)

    M = decaying(options.size, device)
    warm = M[:256, :256].contiguous()
    times: dict[str, list[float]] = {"randomized": [], "exact": []}
    errors = {}
    for method, repeats in (("randomized", options.repeats), ("exact", options.exact_repeats)):
        low_rank_approximation(warm, min(options.rank, 256), method=method)
        for _ in range(repeats):
            elapsed, factors = seconds(
                lambda method=method: low_rank_approximation(M, options.rank, method=method), device
            )
            times[method].append(elapsed)
        U, V = factors
        errors[method] = float((M - U @ V).norm() / M.norm())
    median = {method: statistics.median(values) for method, values in times.items()}
    result = {
        "machine": machine(device),
        "versions": f"torch {torch.__version__}, lora_kernels {lora_kernels.__version__},"
        f" Python {platform.python_version()}",
        "matrix": f"{options.size} x {options.size} fp32, k = {options.rank}",
        "seconds": median,
        "ratio": median["exact"] / median["randomized"],
        "relative error": errors,
        "error over the best": errors["randomized"] / errors["exact"],
    }
    print(result["machine"])
    print(result["versions"])
    print(result["matrix"])
    for method, repeats in times.items():
        spread = f"{min(repeats):.4f} to {max(repeats):.4f}"
        print(
            f"{method:10} {median[method]:9.4f} s (median of {len(repeats)}, {spread}),"
            f" relative error {errors[method]:.6f}"
        )
    print(
        f"exact / randomized: {result['ratio']:.1f} x in time,"
        f" {result['error over the best']:.6f} x the best error"
    )
    if options.json:
        with open(options.json, "w") as file:
            json.dump(result, file, indent=2)
    return result


if __name__ == "__main__":
    main()
