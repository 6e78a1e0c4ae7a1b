"""setup.py builds what the machine can build, says so, and fails only for what was demanded."""

import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig

import pytest
import torch

from lora_kernels import backends, doctor
from lora_kernels.backends.native import extension

ROOT = pathlib.Path(__file__).parents[1]
NO_CUDA = {"LORA_KERNELS_BUILD_CUDA": "0"}
NO_CPU = {"LORA_KERNELS_BUILD_CPU": "0"}
WITHOUT_CUDA = "lora_kernels: CUDA kernels: skipped, LORA_KERNELS_BUILD_CUDA=0"
WITHOUT_CPU = "lora_kernels: CPU kernels: skipped, LORA_KERNELS_BUILD_CPU=0"
WITHOUT_NINJA = (
    "lora_kernels: no ninja found (NINJA, the PATH): all is compiled, one file at a time"
)
NO_NINJA = {"NINJA": "no-such-ninja"}
NINJA = shutil.which("ninja") or pathlib.Path(sysconfig.get_path("scripts"), "ninja").exists()
SETTINGS = (
    "CXX", "CXXFLAGS", "LDFLAGS", "CUDA_HOME", "CUDA_PATH", "NVCC_PREPEND_FLAGS",
    "TORCH_CUDA_ARCH_LIST", "MAX_JOBS", "NINJA",
)  # fmt: skip


def run(command, cwd=ROOT, **variables):
    env = {
        name: value
        for name, value in os.environ.items()
        if name not in SETTINGS and not name.startswith("LORA_KERNELS")
    }
    result = subprocess.run(
        command, cwd=cwd, env=env | variables, capture_output=True, text=True, timeout=600
    )
    lines = [line for line in result.stderr.splitlines() if line.startswith("lora_kernels: ")]
    return result, lines


def build(folder, **variables):
    command = [
        sys.executable, "setup.py", "build_ext", "--build-lib", str(folder / "lib"),
        "--build-temp", str(folder / "temp"),
    ]  # fmt: skip
    return run(command, **variables)


def program(path: pathlib.Path, script: str) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_without_a_compiler_the_part_is_skipped(tmp_path):
    result, lines = build(tmp_path, PATH=str(tmp_path), **NO_CUDA)
    assert result.returncode == 0, result.stderr
    assert lines == [
        "lora_kernels: CPU kernels: skipped, no C++ compiler found (CXX, or c++ on the PATH)",
        WITHOUT_CUDA,
    ]
    assert not list(tmp_path.rglob("*.so"))


def test_left_out_on_demand(tmp_path):
    result, lines = build(tmp_path, **NO_CPU, **NO_CUDA)
    assert result.returncode == 0, result.stderr
    assert lines == [WITHOUT_CPU, WITHOUT_CUDA]


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"CXX": "no-such-compiler"}, "LORA_KERNELS_BUILD_CPU=1, but: no C++ compiler found"),
        ({"LORA_KERNELS_BUILD_CPU": "yes"}, "got 'yes', legal values are auto, 0, 1"),
        (
            NO_CPU | {"LORA_KERNELS_BUILD_CUDA": "1", "CUDA_HOME": "/nowhere"},
            "LORA_KERNELS_BUILD_CUDA=1, but: no nvcc found",
        ),
        (NO_CPU | {"LORA_KERNELS_BUILD_CUDA": "2"}, "got '2', legal values are auto, 0, 1"),
        ({"MAX_JOBS": "0"}, "MAX_JOBS: got '0', expected a number from 1 on"),
    ],
)
def test_what_was_demanded_and_cannot_be_built_fails(tmp_path, variables, words):
    result, _ = build(tmp_path, **{"LORA_KERNELS_BUILD_CPU": "1"} | NO_CUDA | variables)
    assert result.returncode != 0
    assert words in result.stderr


def test_a_compiler_that_fails_skips_the_part(tmp_path):
    broken = program(tmp_path / "broken-c++", "exit 1")
    result, lines = build(tmp_path, CXX=str(broken), **NO_CUDA)
    assert result.returncode == 0, result.stderr
    assert lines[-1].startswith("lora_kernels: CPU kernels: skipped, the build failed")
    result, _ = build(tmp_path, CXX=str(broken), LORA_KERNELS_BUILD_CPU="1", **NO_CUDA)
    assert result.returncode != 0


@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler here")
def test_built_and_loaded_by_one_name(tmp_path):
    options = {"CXXFLAGS": "-g", "LDFLAGS": "-Wl,-soname,named_here", "MAX_JOBS": "2"}
    folder = tmp_path / "$a: b"
    result, lines = build(folder, LORA_KERNELS_BUILD_CPU="1", **options, **NO_CUDA)
    assert result.returncode == 0, result.stderr[-2000:]
    assert lines == [WITHOUT_CUDA, f"lora_kernels: CPU kernels: built with {shutil.which('c++')}"]
    (library,) = folder.glob("lib/lora_kernels/*.so")
    assert library.name == "_native_cpu.abi3.so"
    assert_stable(library)
    binary = library.read_bytes()
    assert b".debug_info" in binary
    assert b"named_here" in binary
    assert str(ROOT).encode() not in binary  # __FILE__ in messages, and for debuggers


# ------------------------------------------------------------------------------------------- ninja

PREPROCESS = """case " $* " in *" -c "*) exec c++ "$@" -E -P;; esac
while [ "$1" != -o ]; do shift; done
echo library > "$2"
"""
STEMS = (
    "low_rank", "products", "arguments", "linear", "coded", "grouped", "grouped_packed", "gating",
    "base", "avx2", "avx512", "avx512_bf16", "neon", "neon_bf16", "single_threaded",
)  # fmt: skip
NVCC = """while [ $# -gt 0 ]; do
case "$1" in -MF) dependencies=$2;; -o) output=$2;; esac
shift
done
echo library > "$output"
[ -z "$dependencies" ] || echo "$output: csrc/cuda/decode.cu csrc/cuda/device.cuh" > "$dependencies"
"""
EDITABLE = "import sys; from setuptools.build_meta import build_editable as b; b(sys.argv[1])"


def made(folder: pathlib.Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.rglob("*.o")}


@pytest.mark.skipif(not shutil.which("c++") or not NINJA, reason="no C++ compiler or no ninja here")
def test_an_editable_install_compiles_what_a_change_concerns(tmp_path):
    """The C++ compiler only preprocesses here, which is quick and finds the headers."""
    tree = tmp_path / "with a space"
    for name in ("lora_kernels", "csrc"):
        left = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / name, tree / name, ignore=left)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    program(tmp_path / "home" / "bin" / "nvcc", NVCC)
    settings = {
        "CXX": str(program(tmp_path / "quick-c++", PREPROCESS)),
        "CUDA_HOME": str(tmp_path / "home"),
        "LORA_KERNELS_BUILD_CPU": "1",
        "LORA_KERNELS_BUILD_CUDA": "1",
    }

    def rebuilt(*touched: str, jobs: str) -> set[str]:
        for file in touched:
            (tree / file).touch()
        before = made(tree / "build")
        command = [sys.executable, "-c", EDITABLE, str(tmp_path)]
        result, _ = run(command, cwd=tree, MAX_JOBS=jobs, **settings)
        assert result.returncode == 0, result.stderr[-2000:]
        return {name for name, time in made(tree / "build").items() if before.get(name) != time}

    assert rebuilt(jobs="2") == {
        *(f"{stem}.cpp.o" for stem in STEMS),
        "decode.cu.o",
    }
    assert rebuilt("csrc/cpu/low_rank.inl", jobs="1") == {
        "base.cpp.o", "avx2.cpp.o", "avx512.cpp.o", "avx512_bf16.cpp.o",
    }  # fmt: skip
    library = tree / "lora_kernels" / "_native_cpu.abi3.so"
    library.write_text("of another build")
    changed = rebuilt("csrc/cpu/avx2.cpp", "csrc/cuda/device.cuh", jobs="1")
    assert changed == {"avx2.cpp.o", "decode.cu.o"}
    assert library.read_text() == "library\n"


def test_without_ninja_all_is_compiled(tmp_path):
    """Every time, by the same commands."""
    compiler = program(tmp_path / "c++", 'echo "$@" >> "$0.calls"' + "\n" + NVCC)
    for _ in range(2):
        result, lines = build(tmp_path, CXX=str(compiler), **NO_CUDA, **NO_NINJA)
        assert result.returncode == 0, result.stderr
        built = f"lora_kernels: CPU kernels: built with {compiler}"
        assert lines == [WITHOUT_CUDA, WITHOUT_NINJA, built]
    calls = (tmp_path / "c++.calls").read_text().splitlines()
    sources = [word for call in calls for word in call.split() if word.endswith(".cpp")]
    expected = [f"csrc/cpu/{stem}.cpp" for stem in STEMS]
    assert sources == expected * 2
    assert len(calls) == 2 * (len(STEMS) + 1)
    assert [path.name for path in tmp_path.glob("lib/lora_kernels/*")] == ["_native_cpu.abi3.so"]


def test_what_ninja_is_asked_for(tmp_path):
    ninja = program(tmp_path / "ninja", 'echo "$@" > "$0.arguments"; exit 3')
    variables = {"CXX": sys.executable, "NINJA": str(ninja), "MAX_JOBS": "7"}
    result, lines = build(tmp_path, **variables, **NO_CUDA)
    assert result.returncode == 0, result.stderr
    skipped = "CPU kernels: skipped, the build failed: ninja: exit status 3"
    assert lines == [WITHOUT_CUDA, f"lora_kernels: {skipped}"]
    assert (tmp_path / "ninja.arguments").read_text().split()[-2:] == ["-j", "7"]


def test_doctor_shows_ninja(tmp_path, monkeypatch):
    def line() -> str:
        (found,) = [line for line in doctor.describe() if line.startswith("ninja")]
        return found.removeprefix("ninja").strip()

    ninja = program(tmp_path / "ninja", "")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.delenv("NINJA", raising=False)
    assert line() == str(ninja)
    monkeypatch.setenv("NINJA", "no-such-ninja")
    assert line().startswith("not found: ")


# --------------------------------------------------------------------------------------------- ABI


SYSTEM = """
import runpy, setuptools, setuptools.command.build_ext, sys
setuptools.setup = lambda **options: None
sys.platform = sys.argv[1]
planned = runpy.run_path("setup.py")["parts"]()
print(*[word for part in planned for word in part.link], sep="\\n")
"""


@pytest.mark.parametrize(
    ("system", "linked", "refused"),
    [
        ("linux", {"-shared", "-ltorch_cpu"}, set()),
        ("darwin", {"-bundle", "-undefined", "dynamic_lookup"}, {"CUDA"}),
        ("win32", set(), {"CPU", "CUDA"}),
    ],
)
def test_what_each_system_is_asked_for(tmp_path, system, linked, refused):
    """The commands alone: there is no other system here."""
    home, demanded = fake_nvcc(tmp_path, RECORD).parents[1], {"LORA_KERNELS_BUILD_CUDA": "auto"}
    done, lines = run([sys.executable, "-c", SYSTEM, system], CUDA_HOME=str(home), **demanded)
    assert done.returncode == 0, done.stderr
    words = done.stdout.split()
    assert linked <= set(words)
    assert system == "linux" or not [word for word in words if word.startswith("-l")]
    skipped = {line.split()[1] for line in lines if line.endswith(f"this is {system}")}
    assert skipped == refused


def assert_stable(library: pathlib.Path) -> set[str]:
    """What it takes from torch is of the stable ABI: no C++ name of torch's, no Python."""
    tool = shutil.which("nm")
    if tool is None:
        pytest.skip("nm is not installed")
    command = [tool, "-D", "--undefined-only", str(library)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = {line.split()[-1].split("@")[0] for line in listed.splitlines()}
    foreign = ("3c10", "2at", "5torch")  # namespaces as they stand in mangled names
    assert not [name for name in names if name.startswith(("Py", "_Py"))]
    assert not [name for name in names if name.startswith("_Z") and any(f in name for f in foreign)]
    found = {name for name in names if name.startswith(("aoti_torch_", "torch_"))}
    assert "torch_library_impl" in found
    return found


@pytest.mark.skipif(not extension.available(), reason=extension.status())
def test_the_installed_library_uses_the_stable_abi_alone():
    assert_stable(extension._file("_native_cpu"))


# -------------------------------------------------------------------------------------------- CUDA


def fake_nvcc(folder: pathlib.Path, script: str) -> pathlib.Path:
    """The compiler of a CUDA_HOME, a shell script."""
    return program(folder / "home" / "bin" / "nvcc", script)


RECORD = """echo "$NVCC_PREPEND_FLAGS" "$@" >> "$0.calls"
while [ "$1" != -o ]; do shift; done
echo library > "$2"
"""


def test_without_nvcc_the_part_is_skipped(tmp_path):
    result, lines = build(tmp_path, CUDA_HOME=str(tmp_path), **NO_CPU)
    assert result.returncode == 0, result.stderr
    skipped = "CUDA kernels: skipped, no nvcc found (CUDA_HOME, the PATH, /usr/local/cuda)"
    assert lines == [WITHOUT_CPU, f"lora_kernels: {skipped}"]


def test_nvcc_alone_is_not_enough_unless_demanded(tmp_path):
    nvcc = fake_nvcc(tmp_path, RECORD)
    result, lines = build(tmp_path, CUDA_HOME=str(tmp_path / "home"), **NO_CPU)
    assert result.returncode == 0, result.stderr
    if torch.version.cuda is None:
        assert "skipped, torch has no CUDA" in lines[1]
        assert not list(tmp_path.rglob("*.so"))
    else:
        assert f"built with {nvcc}" in lines[1]


@pytest.mark.parametrize(
    ("variables", "said", "flags"),
    [
        (
            {},
            "8.0, 8.9, 9.0+PTX",
            "-gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_89,code=sm_89"
            " -gencode=arch=compute_90,code=sm_90 -gencode=arch=compute_90,code=compute_90",
        ),
        (
            {"TORCH_CUDA_ARCH_LIST": "7.5 8.6;10.0a+PTX", "MAX_JOBS": "7"},
            "8.6, 10.0a+PTX",
            "-gencode=arch=compute_86,code=sm_86 -gencode=arch=compute_100a,code=sm_100a"
            " -gencode=arch=compute_100a,code=compute_100a",
        ),
    ],
)
def test_what_nvcc_is_asked_for(tmp_path, variables, said, flags):
    nvcc = fake_nvcc(tmp_path, RECORD)
    demanded = {"LORA_KERNELS_BUILD_CUDA": "1", "CUDA_HOME": str(tmp_path / "home")}
    result, lines = build(tmp_path, **NO_CPU, **demanded, **variables)
    assert result.returncode == 0, result.stderr
    assert lines == [WITHOUT_CPU, f"lora_kernels: CUDA kernels: built with {nvcc} for {said}"]
    compiled, besides, linked = (nvcc.parent / "nvcc.calls").read_text().splitlines()
    for call in (compiled, besides, linked):
        assert " ".join(word for word in call.split() if "gencode" in word) == flags
        assert call.startswith(f"--threads {variables.get('MAX_JOBS', os.cpu_count())} ")
    assert "-DTORCH_TARGET_VERSION=0x020b000000000000" in compiled
    assert f"-ffile-prefix-map={ROOT}=." in compiled
    (library,) = tmp_path.glob("lib/lora_kernels/*.so")
    assert library.name == "_native_cuda.abi3.so"


@pytest.mark.parametrize(
    ("archs", "words"),
    [("Ampere", "TORCH_CUDA_ARCH_LIST: got 'Ampere'"), ("7.0;7.5", "no architecture from 8.0 on")],
)
def test_architectures_that_cannot_be(tmp_path, archs, words):
    fake_nvcc(tmp_path, RECORD)
    variables = {"CUDA_HOME": str(tmp_path / "home"), "TORCH_CUDA_ARCH_LIST": archs}
    result, _ = build(tmp_path, **NO_CPU, LORA_KERNELS_BUILD_CUDA="1", **variables)
    assert result.returncode != 0
    assert words in result.stderr


@pytest.mark.parametrize(
    ("ninja", "words"), [({}, "ninja: exit status "), (NO_NINJA, "nvcc: exit status 5")]
)
def test_an_nvcc_that_fails_fails_what_was_demanded(tmp_path, ninja, words):
    if not ninja and not NINJA:
        pytest.skip("no ninja here")
    fake_nvcc(tmp_path, "echo it broke >&2; exit 5")
    home = str(tmp_path / "home")
    result, _ = build(tmp_path, **NO_CPU, LORA_KERNELS_BUILD_CUDA="1", CUDA_HOME=home, **ninja)
    assert result.returncode != 0
    assert words in result.stderr
    assert "it broke" in result.stdout + result.stderr


LOAD = """
import sys, torch
from lora_kernels.backends.native import extension
torch.ops.load_library(sys.argv[1])
library = torch.library.Library("lora_kernels", "FRAGMENT")
for schema in extension._CUDA_SCHEMAS:
    library.define(schema)
assert torch._C._dispatch_has_kernel_for_dispatch_key("lora_kernels::_decode_cuda", "CUDA")
"""


@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not installed")
def test_cross_built_without_a_gpu(tmp_path):
    """nvcc and torch's headers are enough. What only a torch with CUDA has is one function, which
    a stand-in gives here, so that the library loads and registers its op."""
    variables = {"LORA_KERNELS_BUILD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0"}
    result, lines = build(tmp_path, **NO_CPU, **variables)
    assert result.returncode == 0, result.stderr[-2000:]
    assert lines[-1].startswith("lora_kernels: CUDA kernels: built with ")
    (library,) = tmp_path.glob("lib/lora_kernels/*.so")
    assert str(ROOT).encode() not in library.read_bytes()
    taken = assert_stable(library)
    assert [name for name in taken if "cuda" in name and "device_type" not in name] == [
        "aoti_torch_get_current_cuda_stream"
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    if not torch.cuda.is_available():
        source, stand_in = tmp_path / "stream.c", tmp_path / "stream.so"
        source.write_text("int aoti_torch_get_current_cuda_stream(int d, void** s) { return 1; }")
        subprocess.run(["cc", "-shared", "-fPIC", source, "-o", stand_in], check=True)
        environment["LD_PRELOAD"] = str(stand_in)
    command = [sys.executable, "-c", LOAD, str(library)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.fixture
def fresh_status():
    extension._cuda.cache_clear()
    yield
    extension._cuda.cache_clear()


def test_status_of_the_cuda_part(fresh_status, monkeypatch, tmp_path):
    monkeypatch.setattr(extension, "_file", lambda name: None)
    assert extension.cuda_status() == "not built (no nvcc, or torch without CUDA, at install?)"
    assert backends.extension_status()["CUDA"] == extension.cuda_status()
    broken = tmp_path / "_native_cuda.abi3.so"
    broken.write_text("no library")
    monkeypatch.setattr(extension, "_file", lambda name: broken)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    extension._cuda.cache_clear()
    assert extension.cuda_status() == "built, not loaded: no CUDA device here"
    assert not extension.cuda_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    extension._cuda.cache_clear()
    assert extension.cuda_status().startswith("_native_cuda.abi3.so does not load: ")


@pytest.mark.parametrize("known", [True, False])
def test_packages_name_the_repository_whose_workflow_builds_them(tmp_path, known):
    where = {"GITHUB_SERVER_URL": "https://github.com", "GITHUB_REPOSITORY": "some/where"}
    given = where if known else dict.fromkeys(where, "")
    command = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(tmp_path)]
    result, _ = run(command, **given, **NO_CPU, **NO_CUDA)
    assert result.returncode == 0, result.stderr
    (found,) = tmp_path.glob("*.egg-info/PKG-INFO")
    urls = [line for line in found.read_text().splitlines() if line.startswith("Project-URL")]
    base = "https://github.com/some/where"
    assert (
        urls
        == [
            f"Project-URL: Source, {base}",
            f"Project-URL: Issues, {base}/issues",
            f"Project-URL: Changelog, {base}/blob/main/CHANGELOG.md",
        ][: len(urls)]
    )
    assert bool(urls) == known
