"""Builds what this machine can build of csrc/ and says so, one line a part.

Ninja compiles and links: at once what can be, and only what a change concerns. Without it the same
commands run one after the other, all of them every time.

LORA_KERNELS_BUILD_CPU, LORA_KERNELS_BUILD_CUDA: auto (default) builds the part where it can be
built and used, 0 leaves it out, 1 demands it and fails without. CUDA can be used where torch has
CUDA; 1 needs nvcc alone, no GPU. TORCH_CUDA_ARCH_LIST: architectures; CUDA_HOME: where nvcc is;
CXX, CXXFLAGS, LDFLAGS: the host compiler and its options; NINJA: another ninja;
MAX_JOBS: how many files or architectures are compiled at a time.
"""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CPU = "lora_kernels._native_cpu"
CUDA = "lora_kernels._native_cuda"
CPU_STEMS = (
    "low_rank", "products", "arguments", "linear", "coded", "grouped", "grouped_packed", "gating",
    "base", "avx2", "avx512", "avx512_bf16", "neon", "neon_bf16", "single_threaded",
)  # fmt: skip
CPU_SOURCES = [f"csrc/cpu/{stem}.cpp" for stem in CPU_STEMS]
CUDA_SOURCES = ["csrc/cuda/decode.cu", "csrc/cpu/single_threaded.cpp"]
CUDA_ARCHS = "8.0;8.9;9.0+PTX"
# torch 2.11: the oldest whose stable ABI the binaries may use.
TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
FLAGS = ["-O3", "-std=c++20", TARGET]
HOST_FLAGS = ["-fPIC", "-fvisibility=hidden"]
# By system: how a library is linked. On macOS it finds torch's symbols among what is loaded.
LINK = {
    "linux": ["-shared", "-Wl,--no-as-needed"],
    "darwin": ["-bundle", "-undefined", "dynamic_lookup"],
}
ROOT = Path(__file__).resolve().parent


class Part(NamedTuple):
    name: str
    wanted: str
    extension: Extension
    compile: list[str]
    link: list[str]
    built: str  # with what


class Step(NamedTuple):
    rule: str
    output: str
    inputs: list[str]
    command: list[str]


def demand(part: str) -> str:
    name = f"LORA_KERNELS_BUILD_{part}"
    value = os.environ.get(name, "").strip().lower() or "auto"
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"{name}: got {value!r}, legal values are auto, 0, 1")
    return value


def say(what: str) -> None:
    print(f"lora_kernels: {what}", file=sys.stderr, flush=True)


def torch() -> Path | None:
    """Its folder, if it is there. Each step of an install runs this file, and the import of torch
    would take longer than the compilation of one."""
    spec = find_spec("torch")
    return Path(spec.origin).parent if spec and spec.origin else None


def words(variable: str, default: str = "") -> list[str]:
    return shlex.split(os.environ.get(variable) or default)


def compiler() -> str | None:
    """The C++ compiler, or what stands before it in CXX, if it is there."""
    return shutil.which(words("CXX", "c++")[0])


def ninja() -> str | None:
    """Beside this Python, whose environment need not be activated, or on the PATH."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    return shutil.which(os.environ.get("NINJA") or "ninja", path=path)


def jobs() -> int:
    value = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    if not value.isdigit() or int(value) == 0:
        raise SystemExit(f"MAX_JOBS: got {value!r}, expected a number from 1 on")
    return int(value)


def nvcc() -> str | None:
    """Of CUDA_HOME or CUDA_PATH, on the PATH, or in the usual place."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return shutil.which(str(Path(home, "bin", "nvcc")))
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def archs() -> list[str]:
    """Those of TORCH_CUDA_ARCH_LIST that the kernels can be compiled for, as 9.0 or 9.0+PTX."""
    listed = re.split(r"[;\s,]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip())
    listed = [arch for arch in listed if arch] or CUDA_ARCHS.split(";")
    for arch in listed:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", arch):
            raise SystemExit(
                f"TORCH_CUDA_ARCH_LIST: got {arch!r}, expected numbers like {CUDA_ARCHS}"
            )
    return [arch for arch in listed if int(arch.split(".")[0]) >= 8]


def gencode(arch: str) -> list[str]:
    number = arch.removesuffix("+PTX").replace(".", "")
    codes = [f"sm_{number}"] + [f"compute_{number}"] * arch.endswith("+PTX")
    return [f"-gencode=arch=compute_{number},code={code}" for code in codes]


def without_paths() -> list[str]:
    """Options of the host compiler that keep this machine's folders out of binaries and messages;
    of two that match, the last counts."""
    folders = {ROOT: ".", torch(): "torch"}
    return [f"-ffile-prefix-map={folder}={name}" for folder, name in folders.items()]


def missing(demanded: bool) -> str | None:
    """Why nothing can be built here."""
    if sys.platform not in LINK:
        return f"built on Linux and macOS only, this is {sys.platform}"
    if torch() is None:
        return "no torch found (install it first, then this with --no-build-isolation)"
    return None


def missing_for_cpu(demanded: bool) -> str | None:
    return missing(demanded) or (
        None if compiler() else "no C++ compiler found (CXX, or c++ on the PATH)"
    )


def missing_for_cuda(demanded: bool) -> str | None:
    if reason := missing(demanded):
        return reason
    if sys.platform != "linux":
        return f"built on Linux only, this is {sys.platform}"
    if nvcc() is None:
        return "no nvcc found (CUDA_HOME, the PATH, /usr/local/cuda)"
    if not archs():
        return "no architecture from 8.0 on in TORCH_CUDA_ARCH_LIST"
    if runpy.run_path(str(torch() / "version.py"))["cuda"] is None and not demanded:
        return "torch has no CUDA (LORA_KERNELS_BUILD_CUDA=1 builds them all the same)"
    return None


def torch_libraries() -> list[str]:
    """What the libraries find the stable ABI in at load; its CUDA half comes through libtorch."""
    return [f"-L{torch() / 'lib'}", "-lc10", "-ltorch", "-ltorch_cpu"]


def cpu_part(wanted: str) -> Part:
    host = words("CXX", "c++")
    flags = [*FLAGS, *HOST_FLAGS, "-DNDEBUG", "-Wall", *without_paths(), *words("CXXFLAGS")]
    libraries = torch_libraries() if sys.platform == "linux" else []
    return Part(
        "CPU",
        wanted,
        Extension(CPU, CPU_SOURCES, py_limited_api=True),
        compile=[*host, *flags, f"-I{torch() / 'include'}"],
        link=[*host, *LINK[sys.platform], *libraries, *words("LDFLAGS")],
        built=f"built with {compiler()}",
    )


def cuda_part(wanted: str) -> Part:
    """torch's own CUDA build needs a torch with CUDA; this one needs its headers. The CUDA runtime
    is linked in, whichever torch brings along."""
    host = [f"-ccbin={compiler()}"] if os.environ.get("CXX") else []
    host_flags = ",".join([*HOST_FLAGS, *without_paths()])
    # Not as nvcc's own options: those it writes into the library, folders and all.
    libraries = ",".join(["--no-as-needed", *torch_libraries()])
    codes = [flag for arch in archs() for flag in gencode(arch)]
    common = [nvcc(), *host, *codes]
    flags = [*FLAGS, "-DUSE_CUDA", f"-Xcompiler={host_flags}"]
    return Part(
        "CUDA",
        wanted,
        Extension(CUDA, CUDA_SOURCES, py_limited_api=True),
        compile=[*common, *flags, f"-I{torch() / 'include'}"],
        link=[*common, "-shared", "-cudart=static", f"-Xlinker={libraries}"],
        built=f"built with {nvcc()} for {', '.join(archs())}",
    )


def steps(part: Part, folder: Path) -> list[Step]:
    """What makes the part's library, the last step's output, from its sources."""
    found = []
    for source in part.extension.sources:
        output = str(folder / f"{Path(source).name}.o")
        command = [*part.compile, "-MD", "-MF", f"{output}.d", "-c", source, "-o", output]
        found.append(Step("compile", output, [source], command))
    objects = [step.output for step in found]
    library = str(folder / "library.so")
    return [*found, Step("link", library, objects, [*part.link, *objects, "-o", library])]


def ninja_file(planned: list[Step], folder: Path) -> str:
    def escaped(*paths: str | Path) -> str:
        return " ".join(re.sub(r"([$ :])", r"$\1", str(path)) for path in paths)

    lines = [f"builddir = {escaped(folder)}", "rule compile", "  command = $line"]
    lines += ["  depfile = $out.d", "  deps = gcc", "rule link", "  command = $line"]
    for step in planned:
        lines.append(f"build {escaped(step.output)}: {step.rule} {escaped(*step.inputs)}")
        lines.append(f"  line = {shlex.join(step.command).replace('$', '$$')}")
    return "\n".join(lines) + "\n"


def run(command: list[str]) -> None:
    # In a variable: another number of threads is no reason to compile anew.
    kernels = sum(source.endswith(".cu") for source in CUDA_SOURCES)
    threads = f"--threads {max(1, jobs() // kernels)}"
    flags = f"{threads} {os.environ.get('NVCC_PREPEND_FLAGS', '')}"
    environment = os.environ | {"NVCC_PREPEND_FLAGS": flags}
    status = subprocess.run(command, env=environment, check=False).returncode
    if status:
        raise RuntimeError(f"{Path(command[0]).name}: exit status {status}")


def make(part: Part, folder: Path) -> str:
    """The path of the part's library, made in the folder where it is not up to date."""
    folder.mkdir(parents=True, exist_ok=True)
    planned = steps(part, folder)
    if program := ninja():
        file = folder / "build.ninja"
        file.write_text(ninja_file(planned, folder))
        run([program, "-f", str(file), "-j", str(jobs())])
    else:
        for step in planned:
            run(step.command)
    return planned[-1].output


PARTS: dict[str, tuple[Callable[[bool], str | None], Callable[[str], Part]]] = {
    "CPU": (missing_for_cpu, cpu_part),
    "CUDA": (missing_for_cuda, cuda_part),
}


def parts() -> list[Part]:
    """What is to be built; fails for what is demanded and cannot be."""
    found = []
    for name, (reason_against, part) in PARTS.items():
        wanted = demand(name)
        if wanted == "0":
            say(f"{name} kernels: skipped, LORA_KERNELS_BUILD_{name}=0")
        elif reason := reason_against(wanted == "1"):
            if wanted == "1":
                raise SystemExit(f"LORA_KERNELS_BUILD_{name}=1, but: {reason}")
            say(f"{name} kernels: skipped, {reason}")
        else:
            found.append(part(wanted))
    return found


def extensions() -> dict:
    planned = parts()
    if not planned:
        return {}

    class Build(build_ext):
        """Each part by itself: one that fails leaves the others alone."""

        def build_extensions(self) -> None:
            if ninja() is None:
                say("no ninja found (NINJA, the PATH): all is compiled, one file at a time")
            self.force = True  # ninja knows what is up to date, not the times of copies
            # An editable install brings a temporary folder, in which nothing would be up to date.
            folder = Path("build/editable" if self.editable_mode else self.build_temp)
            done = []
            for part in planned:
                try:
                    library = make(part, folder / part.name.lower())
                except Exception as error:
                    if part.wanted == "1":
                        raise
                    say(f"{part.name} kernels: skipped, the build failed: {error}")
                else:
                    target = self.get_ext_fullpath(part.extension.name)
                    self.mkpath(os.path.dirname(target))
                    self.copy_file(library, target)
                    say(f"{part.name} kernels: {part.built}")
                    done.append(part.extension)
            self.extensions = done

    return {
        "ext_modules": [part.extension for part in planned],
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


def urls() -> dict[str, str]:
    """Of the repository whose workflow builds the packages: nothing else knows where it lies."""
    server, name = os.environ.get("GITHUB_SERVER_URL"), os.environ.get("GITHUB_REPOSITORY")
    if not (server and name):
        return {}
    source = f"{server}/{name}"
    changelog = f"{source}/blob/main/CHANGELOG.md"
    return {"Source": source, "Issues": f"{source}/issues", "Changelog": changelog}


setup(**extensions(), project_urls=urls())
