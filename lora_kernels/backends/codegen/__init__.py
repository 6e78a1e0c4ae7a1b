"""Compiles what the backend would launch, for GPUs that are not there, and checks the machine code.

    python -m lora_kernels.backends.codegen [--arch 90] [--short]

Every case is one call of the backend on tensors without memory, under a pretended device; each
launch is compiled in place of being run. Prints a table and exits with 1 if a kernel breaks a rule
of `faults`.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget

from lora_kernels.backends.codegen.calls import run
from lora_kernels.backends.codegen.cases import Case
from lora_kernels.backends.device import CARDS, Target, assume
from lora_kernels.backends.triton.launch import intercept

_GEMMS = (
    "gemm_kernel", "gemm_tma_kernel", "dual_kernel", "flag_kernel", "dx_da_kernel",
    "experts_kernel", "packed_kernel", "packed_dx_kernel", "scaled_gemm_kernel",
    "scaled_gemm_tma_kernel",
)  # fmt: skip
_SPECIALISED = "specialised_gemm_kernel"
_ELEMENTWISE = (
    "reduce_kernel", "mask_kernel", "decode_kernel", "scale_kernel", "scale_backward_kernel",
    "gate_kernel", "gate_backward_kernel", "unscale_kernel",
)  # fmt: skip
_BY_TMA = ("gemm_tma_kernel", "scaled_gemm_tma_kernel", _SPECIALISED)


class Kernel(NamedTuple):
    """What one compiled kernel came to."""

    case: str
    target: Target
    name: str
    constants: dict[str, Any]
    registers: int
    spills: int
    shared: int
    tensor_memory: int
    mma_sync: int
    wgmma: int
    register_form: int  # wgmma whose left operand lies in registers
    pending: int  # most wgmma groups left in flight by a wait
    buffers: int | None  # fewest of a loop's that a wgmma in flight reads; None: there is none
    tcgen05: int
    tma: int
    cp_async: int
    fma: int
    waits: int  # for the kernel before
    shared_loads: int  # of TMA, into several CTAs
    arrivals: int  # at barriers of another CTA
    warnings: tuple[str, ...]


class _OfflineDriver:
    """Enough of a driver for JITFunction.warmup, which caches per device: one number an arch."""

    def __init__(self, card: str) -> None:
        self._number, self._target = list(CARDS).index(card), CARDS[card]

    def get_current_device(self) -> int:
        return self._number

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        gfx = self._target.gfx
        if gfx:
            return GPUTarget("hip", gfx, 32 if self._target.has_narrow_waves else 64)
        return GPUTarget("cuda", self._target.arch, 32)


def _assemble(ptx: str, arch: int) -> str:
    """The log of the bundled ptxas: Triton keeps none, and caches hide the one it printed."""
    tool = triton.knobs.nvidia.ptxas_blackwell if arch >= 100 else triton.knobs.nvidia.ptxas
    name = f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [
            tool.path,
            "-v",
            f"--gpu-name={name}",
            source,
            "-o",
            Path(folder, "kernel.cubin"),
        ]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def _inspect(case: Case, target: Target, compiled: Any, constants: dict[str, Any]) -> Kernel:
    if target.gfx:
        return _inspect_amd(case, target, compiled, constants)
    ptx = compiled.asm["ptx"]
    log = _assemble(ptx, target.arch)

    def count(pattern: str) -> int:
        return len(re.findall(pattern, ptx))

    def number(pattern: str) -> int:
        return sum(int(n) for n in re.findall(pattern, log))

    wgmma = re.findall(r"wgmma\.mma_async[^;]*;", ptx)
    waits = re.findall(r"wgmma\.wait_group\S*\s+(\d+)", ptx)
    return Kernel(
        case=str(case),
        target=target,
        name=compiled.metadata.name,
        constants=constants,
        registers=number(r"Used (\d+) registers"),
        spills=number(r"(\d+) bytes spill"),
        shared=compiled.metadata.shared,
        tensor_memory=getattr(compiled.metadata, "tmem_size", None) or 0,
        mma_sync=count(r"\bmma\.sync"),
        wgmma=len(wgmma),
        # Two lists of registers: the accumulators and the left operand.
        register_form=sum(len(re.findall(r"\{[^}]*\}", text)) > 1 for text in wgmma),
        pending=max(map(int, waits), default=0),
        buffers=_buffers(compiled.asm["ttgir"]),
        tcgen05=count(r"tcgen05\.mma"),
        tma=count(r"cp\.async\.bulk\.tensor\.\dd\.shared"),
        cp_async=count(r"cp\.async\.c[ag]"),
        fma=count(r"fma\.rn\.f32"),
        waits=count(r"griddepcontrol\.wait"),
        shared_loads=count(r"\.multicast::cluster"),
        arrivals=count(r"mbarrier\.arrive\S*\.shared::cluster"),
        warnings=tuple(sorted(set(re.findall(r"C75\d\d", log)))),
    )


def _buffers(ttgir: str) -> int | None:
    """The fewest buffers of those, one of which per step, from which asynchronous products read."""
    made = dict(re.findall(r"^\s*(%\w+)(?::\d+)? = (.*)$", ttgir, re.M))
    found = []
    for operands in re.findall(r"warp_group_dot (%\w+), (%\w+),.*isAsync = true", ttgir):
        for value in operands:
            while view := re.match(r"ttg\.memdesc_\w+ (%\w+)", made.get(value, "")):
                value = view[1]
            shape = re.search(r"local_alloc.*memdesc<(\d+)x\d+x\d+x", made.get(value, ""))
            found += [int(shape[1])] if shape else []
    return min(found, default=None)


def _inspect_amd(case: Case, target: Target, compiled: Any, constants: dict[str, Any]) -> Kernel:
    text = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        return sum(int(n) for n in re.findall(rf"\.{name}:\s+(\d+)", text))

    none: dict[str, Any] = dict.fromkeys(
        ("tensor_memory", "wgmma", "register_form", "pending", "tcgen05"), 0
    )
    none |= dict.fromkeys(("tma", "cp_async", "waits", "shared_loads", "arrivals"), 0)
    none |= {"buffers": None}
    return Kernel(
        case=str(case),
        target=target,
        name=compiled.metadata.name,
        constants=constants,
        registers=number("vgpr_count"),
        spills=number("private_segment_fixed_size"),
        shared=compiled.metadata.shared,
        mma_sync=len(re.findall(r"\bv_(?:mfma|wmma)", text)),
        fma=len(re.findall(r"\bv_(?:pk_|dual_)?fmac?_", text)),
        warnings=(),
        **none,
    )


def faults(kernel: Kernel) -> list[str]:
    """The rules that a kernel breaks."""
    k, wide, amd = kernel, "fp32" in kernel.constants["dtype"], bool(kernel.target.gfx)
    main = k.name in (*_GEMMS, _SPECIALISED) and not wide
    # The dual kernel forms its products transposed, and with few rows it streams the weight.
    full = main and min(k.constants["BM"], k.constants["BN"]) >= 64
    # Loads of odd rows are too narrow to be asynchronous, and the product waits for them.
    aligned = k.constants["aligned"]
    rules = {
        # With 256 registers a thread and no shared operands RDNA spills where it is to be seen what
        # that costs: the table shows it.
        "spills": k.spills == 0 or k.target.has_narrow_waves,
        "shared memory": k.shared <= k.target.shared,
        "tensor memory": k.tensor_memory <= 512,
        "ptxas warning": not k.warnings,
        "register-form wgmma": k.register_form == 0,
        "no TMA": not (k.name in _BY_TMA or k.constants.get("TMA")) or k.tma > 0,
        "overlap": k.waits == k.constants.get("PDL", 0),
        "no wgmma": not (full and k.target.is_hopper) or k.wgmma > 0,
        # A loop fills the buffer of the step `num_stages - 1` on while a wgmma is in flight.
        "too few buffers": k.pending == 0
        or k.buffers is None
        or k.buffers >= k.constants.get("num_stages", 1),
        # Else a slot of the other CTA is filled while it is read.
        "unasked shared loads": k.shared_loads == 0 or k.arrivals > 0,
        "wgmma serialised": not (full and aligned and k.target.is_hopper) or k.pending >= 1,
        "no asynchronous loads": not (main and aligned and not amd) or k.tma + k.cp_async > 0,
        "no tcgen05": not (full and k.target.is_blackwell) or k.tcgen05 > 0,
        "no tensor cores": wide or k.name in _ELEMENTWISE or k.mma_sync + k.wgmma + k.tcgen05 > 0,
        # AMD's compute in fp32 what they are given in fp32.
        "tensor cores in fp32": not wide or amd or k.mma_sync + k.wgmma + k.tcgen05 == 0,
        "no FMA": not wide or amd or k.name in _ELEMENTWISE or k.fma > 0,
    }
    return [name for name, kept in rules.items() if not kept]


def compile_case(case: Case, card: str, seen: set[str]) -> list[Kernel]:
    """The kernels of a case whose hashes are not in `seen`, which gets them. Takes the process's
    Triton driver for good."""
    kernels, target = [], CARDS[card]

    def build(
        kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], meta: dict[str, Any], _: object
    ) -> None:
        compiled = kernel.warmup(*args, grid=grid, **meta)
        if compiled.hash in seen:
            return
        seen.add(compiled.hash)
        dtype = {2: "16 bit", 4: "fp32"}[case.dtype.itemsize]
        aligned = case.N % 16 == case.K % 16 == 0
        constants = {**meta, "dtype": dtype, "aligned": aligned}
        kernels.append(_inspect(case, target, compiled, constants))

    # Not put back: where there is no GPU, Triton has no driver to return to.
    triton.runtime.driver.set_active(_OfflineDriver(card))
    with assume(target), intercept(build):
        run(case)
    return kernels
