"""The generated tree, tried where the package is not: `make hub`.

    python hub/check.py [--out hub_output] [--torch 2.13.0]

In an environment with torch, `kernels`, PEFT and what the tests need: the tree's own tests, then
the tree as `kernels` loads it, by `kernelize` on a PEFT model; and both it and the package in one
process.
"""

import argparse
import os
import subprocess
import tempfile
import venv
from pathlib import Path

from generate import ROOT, generate

KERNELS = "kernels==0.17.2"
PINNED = ("numpy", "pytest", "hypothesis", "peft", "transformers", "safetensors")
LOADED = """
import sys
from importlib.util import find_spec
from pathlib import Path
import torch
from kernels import Device, LocalLayerRepository, Mode, get_local_kernel, get_loaded_kernels
from kernels import kernelize, register_kernel_mapping, replace_kernel_forward_from_hub
from kernels._rust import Build, Digest, DigestAlgorithm, Metadata
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear

assert find_spec("lora_kernels") is None
tree = Path(sys.argv[1])
Build.open(tree)
for variant in sorted(tree.joinpath("build").iterdir()):
    found = Digest.hash_variant(DigestAlgorithm.SHA256, variant)
    Metadata.read_from_file(variant / "metadata.json").digest.validate(found)
kernel = get_local_kernel(tree)
assert get_loaded_kernels()[0].metadata.name.python_name == "lora_kernels"

model = torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.ReLU(), torch.nn.Linear(40, 8))
config = LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False)
model = get_peft_model(model, config)
x = torch.randn(9, 24)
wanted = model(x)
wanted.square().sum().backward()
gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
model.zero_grad()
replace_kernel_forward_from_hub(Linear, "LoRALinear")
register_kernel_mapping(
    {"LoRALinear": {"cpu": LocalLayerRepository(tree, layer_name="LoRALinear")}}
)
model = kernelize(model, mode=Mode.TRAINING | Mode.TORCH_COMPILE, device="cpu", use_fallback=False)
layers = [module for module in model.modules() if isinstance(module, Linear)]
forward = kernel.layers.LoRALinear.forward
assert [layer.forward.__func__ for layer in layers] == [forward] * 2
y = model(x)
torch.testing.assert_close(y, wanted)
y.square().sum().backward()
for name, parameter in model.named_parameters():
    if parameter.requires_grad:
        torch.testing.assert_close(parameter.grad, gradients[name])
print("kernelize:", len(layers), "layers of a PEFT model, on", kernel.__name__)
"""
BESIDE = """
import importlib.util, sys
import torch
import lora_kernels as package
from lora_kernels import _namespace
from lora_kernels.backends.cuda import sources

spec = importlib.util.spec_from_file_location("of_the_hub", sys.argv[1] + "/__init__.py")
kernel = importlib.util.module_from_spec(spec)
sys.modules["of_the_hub"] = kernel
spec.loader.exec_module(kernel)
of_the_hub = sys.modules["of_the_hub._namespace"]
assert of_the_hub.NAMESPACE != _namespace.NAMESPACE == "lora_kernels"
digests = sources.of_plans()
digests.pop("csrc", None)
assert sys.modules["of_the_hub.backends.cuda.sources"].of_plans() == digests

shapes = ((6, 24), (40, 24), (4, 24), (40, 4), (40,))
t = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
results = []
for library in (package, kernel):
    y = library.lora_linear(*t, scaling=0.5, dropout_p=0.25, seed=3)
    many = library.lora_add_grouped(
        y.detach(), t[0], [t[2]] * 2, [t[3]] * 2, library.Groups.from_rows([0, 0, 0, 0, 1, 1], 2)
    )
    results.append((y, many, *torch.autograd.grad(y.sum() + many.square().sum(), t)))
torch.testing.assert_close(*results)
args = (*t[:4], t[4], 0.5, 0.0, None, True)
for ops in (_namespace.ops, of_the_hub.ops):
    torch.library.opcheck(ops.lora_linear, args)
print("beside the package:", of_the_hub.NAMESPACE)
"""


def run(*command: object, cwd: Path | None = None, **environment: str) -> None:
    print("+", *(str(word).strip().partition("\n")[0] for word in command), flush=True)
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    variables = kept | {"PYTHONDONTWRITEBYTECODE": "1"} | environment
    subprocess.run(list(map(str, command)), check=True, cwd=cwd, env=variables)


def check(tree: Path, torch: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        venv.create(name, with_pip=True)
        python = Path(name, "bin", "python")
        constraints = Path(name, "constraints.txt")
        pinned = ROOT.joinpath("requirements.txt").read_text().splitlines()
        kept = [
            line for line in pinned if "==" in line and not line.startswith(("torch", "triton"))
        ]
        constraints.write_text("\n".join([f"torch=={torch}", *kept]) + "\n")
        pip = (python, "-m", "pip", "install", "--quiet", "--progress-bar", "off")
        run(*pip, "-c", constraints, "torch", KERNELS, *PINNED)
        run(python, "-c", LOADED, tree, cwd=tree)
        run(python, "-c", BESIDE, tree / "build" / "torch-cpu", cwd=tree, PYTHONPATH=str(ROOT))
        run(python, "-m", "pytest", "-q", cwd=tree, OMP_NUM_THREADS="1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "hub_output")
    parser.add_argument("--torch", default="2.13.0", help="the version to try it with")
    args = parser.parse_args()
    print(f"{args.out}: builds {generate(args.out)}")
    check(args.out.resolve(), args.torch)


if __name__ == "__main__":
    main()
