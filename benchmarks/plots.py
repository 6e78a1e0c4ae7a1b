"""The plots of a result file: ratio to the frozen layer by M, the roofline, decode."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import geometric_mean

import matplotlib

from benchmarks import shapes
from benchmarks.native import best_peer
from benchmarks.peers import FROZEN, OURS, PEERS
from lora_kernels.testing import Case

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

_MODES = ("#2a6fdb", "#c4533a", "#3a8f5c")
_COLORS = {FROZEN: "#8a8f98", OURS: "#2a6fdb"}


def _rows(rows: list[dict], *tables: str) -> Iterator[tuple[Case, dict]]:
    for row in rows:
        if row["table"] in tables and "refused" not in row:
            yield Case(**{name: row[name] for name in Case._fields}), row


def _axes(title: str, xlabel: str, ylabel: str) -> Axes:
    _, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title, xscale="log")
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _save(axes: Axes, line: str, path: Path) -> Path:
    axes.legend(frameon=False, fontsize=8)
    axes.figure.supxlabel(line, fontsize=6, color="#8a8f98")
    axes.figure.savefig(path, dpi=130)
    pyplot.close(axes.figure)
    return path


def _lines(axes: Axes, ratios: dict[str, dict[int, list[float]]]) -> None:
    order = [name for name in PEERS if name in ratios] + [n for n in ratios if n not in PEERS]
    for name in order:
        M = sorted(ratios[name])
        means = [geometric_mean(ratios[name][m]) for m in M]
        axes.plot(M, means, marker="o", markersize=4, label=name, color=_COLORS.get(name))
    _ticks(axes, {m for of_peer in ratios.values() for m in of_peer})


def _ticks(axes: Axes, rows: set[int]) -> None:
    axes.set_xticks(sorted(rows), [str(m) for m in sorted(rows)])
    axes.minorticks_off()


def ratio_by_rows(rows: list[dict], line: str, path: Path) -> Path | None:
    """Forward and backward over the frozen layer's, a panel of the cases without dropout."""
    ratios: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for case, row in _rows(rows, "cpu", "headline", "grid", "slow"):
        if not case.dropout:
            ratios[row["peer"]][case.M].append(row["both"]["ratio"])
    if len({m for of_peer in ratios.values() for m in of_peer}) < 2:
        return None  # not a line
    axes = _axes("Forward and backward, no dropout", "rows M", "ratio to the frozen layer")
    _lines(axes, ratios)
    return _save(axes, line, path)


def roofline(rows: list[dict], line: str, path: Path) -> Path | None:
    """Operations per second against operations per byte, under what the device reached at best."""
    ceilings = {row["dtype"]: row for row in rows if row["table"] == "ceiling"}
    points: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for case, row in _rows(rows, "cpu", "headline", "grid", "decode"):
        if row["peer"] not in (FROZEN, OURS):
            continue
        which, adapter = "both" if "both" in row else "forward", row["peer"] == OURS
        speed = shapes.flops(case, which, adapter) / row[which]["ms"] / 1e9
        points[row["peer"], case.dtype].append((shapes.intensity(case, which, adapter), speed))
    if not points or not ceilings:
        return None
    axes = _axes("Roofline", "operations per byte moved at least", "TFLOP/s")
    axes.set_yscale("log")
    at = [x for found in points.values() for x, _ in found]
    for dtype, top in ceilings.items():
        ridge = 1e3 * top["tflops"] / top["gb_s"]
        xs = sorted({min(at), ridge, max(*at, ridge)})
        ys = [min(top["tflops"], x * top["gb_s"] / 1e3) for x in xs]
        axes.plot(xs, ys, linewidth=1, label=f"copy and product reached, {dtype}")
    for (peer, dtype), found in points.items():
        marker = "o" if dtype == "bf16" else "s"
        axes.scatter(*zip(*found, strict=True), s=14, marker=marker, color=_COLORS[peer],
                     label=f"{peer}, {dtype}")  # fmt: skip
    return _save(axes, line, path)


def decode(rows: list[dict], line: str, path: Path) -> Path | None:
    """Forward of few rows over the frozen layer's."""
    ratios: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for case, row in _rows(rows, "decode"):
        ratios[row["peer"]][case.M].append(row["forward"]["ratio"])
    if not ratios:
        return None
    axes = _axes("Few rows, forward", "rows M", "ratio to the frozen layer")
    _lines(axes, ratios)
    return _save(axes, line, path)


def grid_by_rows(rows: list[dict], line: str, path: Path) -> Path:
    """Of a grid on a CPU: our time over the frozen layer's and the better peer's over it, by rows;
    the geometric means of all layers, of the dtype with the most cells."""
    counts = Counter(row["dtype"] for row in rows)
    dtype = max(counts, key=counts.__getitem__)
    ours: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    peers: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["dtype"] == dtype:
            ours[row["mode"]][row["M"]].append(row[OURS]["ratio"])
            peers[row["mode"]][row["M"]].append(best_peer(row) / row[FROZEN]["ms"])
    axes = _axes(f"{dtype}, geometric mean of the layers", "rows M", "ratio to the frozen layer")
    for color, mode in zip(_MODES, ours, strict=False):
        for ratios, style, name in ((ours, "-", "lora_kernels"), (peers, "--", "better peer")):
            M = sorted(ratios[mode])
            means = [geometric_mean(ratios[mode][m]) for m in M]
            axes.plot(M, means, style, marker="o", markersize=3, color=color,
                      label=f"{mode}: {name}")  # fmt: skip
    axes.axhline(1, color="#8a8f98", linewidth=0.8)
    _ticks(axes, {row["M"] for row in rows})
    return _save(axes, line, path)


def draw(rows: list[dict], line: str, stem: Path) -> list[Path]:
    """The plots that the rows allow, as `<stem>-ratio.png`, `-roofline.png` and `-decode.png`."""
    drawn = (
        plot(rows, line, stem.with_name(f"{stem.name}-{name}.png"))
        for name, plot in (("ratio", ratio_by_rows), ("roofline", roofline), ("decode", decode))
    )
    return [path for path in drawn if path]
