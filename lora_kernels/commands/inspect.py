"""What is in an adapter: ranks, norms, and how the energy of each layer's update is spread."""

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels import targets
from lora_kernels.commands import convert, loading
from lora_kernels.format_writers import Layer, layers_of
from lora_kernels.formats import Adapter
from lora_kernels.peft_config import PREFIX

if TYPE_CHECKING:
    from lora_kernels.commands import Subparsers


class Spectrum(NamedTuple):
    """The singular values [min(r, N, K)] of scaling · B A in fp64, the largest first."""

    layer: Layer
    values: Tensor

    @property
    def norm(self) -> float:
        """Frobenius."""
        return float(self.values.norm())

    def energy(self, count: int) -> float:
        """Share of the squared norm in the `count` largest singular values; nan where it is 0."""
        squares = self.values.square()
        return float(squares[:count].sum() / squares.sum())

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of the singular values as shares (Roy and Vetterli, 2007); 0 for an
        update that is zero."""
        if not self.norm:
            return 0.0
        shares = self.values / self.values.sum()
        return math.exp(float(torch.special.entr(shares).sum()))


def spectrum(layer: Layer) -> Spectrum:
    """From the factors: N x K numbers are never formed. ValueError: values that are not finite."""
    if not (layer.A.isfinite().all() and layer.B.isfinite().all()):
        raise ValueError("holds values that are inf or nan")
    Rb = torch.linalg.qr(layer.B.double()).R
    Ra = torch.linalg.qr(layer.A.double().mT).R
    return Spectrum(layer, torch.linalg.svdvals(layer.scaling * Rb @ Ra.mT))


def add(subparsers: "Subparsers") -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "inspect", help="ranks, norms and energies of an adapter", description=__doc__
    )
    parser.add_argument("adapter", type=Path, metavar="ADAPTER", help="folder or file")
    convert.add_names(parser)
    parser.add_argument("--plot", type=Path, metavar="PNG", help="energies of all layers")
    return parser


_COLUMNS = (
    f"{'rank':>5} {'alpha':>7} {'scaling':>8} {'norm':>10} {'top 1':>6} {'top 4':>6} {'eff.':>5}"
)


def _line(found: Spectrum) -> str:
    layer = found.layer
    energies = (f"{found.energy(k):>6.0%}" if found.norm else f"{'-':>6}" for k in (1, 4))
    return (
        f"{layer.rank:>5} {layer.alpha:>7g} {layer.scaling:>8.4g} {found.norm:>10.4g}"
        f" {' '.join(energies)} {found.effective_rank:>5.1f}"
    )


def run(args: argparse.Namespace) -> int:
    if args.plot:
        loading.require("matplotlib", "--plot")
    adapter = convert.read(args.adapter, args.model)
    layers, beside = layers_of(adapter)
    found = {}
    for name, layer in layers.items():
        try:
            found[name] = spectrum(layer)
        except ValueError as error:
            raise ValueError(f"{adapter.file}: {name}: {error}") from None
    for line in report(found):
        print(line)
    if adapter.config.use_dora:
        print("DoRA: norms are those of scaling · BA, before the magnitudes")
    for line in _others(adapter, layers, beside):
        print(line)
    if args.plot and not found:
        raise ValueError(f"--plot: {adapter.file} holds no layers to draw")
    if args.plot:
        plot(args.plot, found)
        print(args.plot)
    return 0


def _others(
    adapter: Adapter, layers: Mapping[str, Layer], beside: Mapping[str, Tensor]
) -> list[str]:
    """Lines: layers that are not linear, and the tensors that are no layer's, by name."""
    lines = []
    for kind in ("embedding", "convolution"):
        if names := [name for name, layer in layers.items() if layer.kind == kind]:
            lines.append(f"{kind}s: {targets.summary(names)}")
    if adapter.config.target_parameters:
        lines.append(f"experts: {targets.summary(adapter.config.target_parameters)}")
    if beside:
        lines.append(f"{len(beside)} tensors beside these layers:")
    for key, tensor in beside.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        lines.append(f"    {key.removeprefix(PREFIX)} {dtype} {list(tensor.shape)}")
    return lines


def report(found: Mapping[str, Spectrum]) -> list[str]:
    """Lines: each layer, each kind of layer, the whole; untrained layers are counted."""
    if not found:
        return ["no layers"]
    width = max(map(len, found))
    lines = [f"{'layer':{width}} {_COLUMNS}"]
    lines += [f"{name:{width}} {_line(one)}" for name, one in found.items()]
    kinds: dict[str, list[Spectrum]] = {}
    for name, one in found.items():
        kinds.setdefault(name.rpartition(".")[2], []).append(one)
    lines += ["", f"{'kind':{width}} {'layers':>6} {'norm':>10} {'share':>6} {'mean eff.':>9}"]
    total = math.hypot(*(one.norm for one in found.values()))
    for kind, ones in kinds.items():
        norm = math.hypot(*(one.norm for one in ones))
        share = f"{norm**2 / total**2:>6.0%}" if total else f"{'-':>6}"
        mean = sum(one.effective_rank for one in ones) / len(ones)
        lines.append(f"{kind:{width}} {len(ones):>6} {norm:>10.4g} {share} {mean:>9.1f}")
    parameters = sum(one.layer.A.numel() + one.layer.B.numel() for one in found.values())
    lines += ["", f"{len(found)} layers, {parameters:,} parameters, norm {total:.4g}"]
    untrained = [name for name, one in found.items() if not one.layer.B.any()]
    if len(untrained) == len(found):
        lines.append("untrained: B is zero in every layer, the adapter computes nothing")
    elif untrained:
        lines.append(f"untrained, B is zero in {len(untrained)} layers: {', '.join(untrained[:8])}")
    return lines


def plot(path: Path, found: Mapping[str, Spectrum]) -> None:
    """Norms, and the energy that the largest singular values hold, layer by layer."""
    figure_class: Any = loading.require("matplotlib.figure", "--plot").Figure
    height = max(2.5, 0.18 * len(found) + 1.2)
    figure = figure_class(figsize=(11, height), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    rows = range(len(found))
    left.barh(rows, [one.norm for one in found.values()], color="#2a6fdb")
    left.set(xlabel="norm of scaling · BA", ylim=(len(found) - 0.5, -0.5))
    left.set_yticks(rows, list(found), fontsize=7)
    ranks = max(len(one.values) for one in found.values())
    image = torch.full((len(found), ranks), math.nan, dtype=torch.float64)
    for row, one in enumerate(found.values()):
        squares = one.values.square()
        image[row, : len(squares)] = squares.cumsum(0) / squares.sum()
    shown = right.imshow(
        image.numpy(), aspect="auto", vmin=0, vmax=1, cmap="Blues", interpolation="nearest",
        extent=(0.5, ranks + 0.5, len(found) - 0.5, -0.5),
    )  # fmt: skip
    right.set(xlabel="largest singular values")
    figure.colorbar(shown, label="share of the energy")
    figure.savefig(path, dpi=130)
