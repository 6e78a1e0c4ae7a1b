"""What compute-sanitizer's racecheck reports, but for what is Triton's own and no race."""

import re
from pathlib import Path

SPECIALISED = Path(__file__).parents[1] / "lora_kernels/backends/triton/specialised.py"


def dispatch() -> list[str]:
    """Where Triton puts the code that sends the warps of `specialised_gemm_kernel` to their parts:
    the kernel's first line and the call, as file:line."""
    lines = SPECIALISED.read_text().splitlines()
    marks = "def specialised_gemm_kernel(", "gl.warp_specialize("
    numbers = [next(i for i, line in enumerate(lines, 1) if mark in line) for mark in marks]
    return [f"{SPECIALISED.name}:{number}" for number in numbers]


def hazards(report: str) -> list[str]:
    """The hazards of a report. ValueError where the report is not whole.

    Left out are those between lines of `dispatch()`. In the PTX of Triton 3.6.0 the word by which
    the warps are sent is written, read, written and read, with a `barrier.sync 1` of all threads
    after each; racecheck 13.0 calls that a race in this kernel, though not in one of empty parts.
    """
    blocks = re.findall(r"^========= \w+: Race reported.*?^========= *$", report, re.M | re.S)
    count = re.search(r"RACECHECK SUMMARY: (\d+) hazards? displayed", report)
    if count is None or int(count[1]) != len(blocks):
        raise ValueError(f"{len(blocks)} hazards in a report of {count and count[1]}:\n{report}")
    places = [re.findall(r" access at \S+ in (\S+:\d+)", block) for block in blocks]
    known = set(dispatch())
    return [b for b, at in zip(blocks, places, strict=True) if len(at) < 2 or set(at) - known]
