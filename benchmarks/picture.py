"""The picture of the README: what one layer reads and writes, call by call, beside PEFT's.

    python -m benchmarks.picture     # docs/images/traffic.svg

The numbers are those of `benchmarks.traffic`: tensors that a call is given or returns, each once.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

from benchmarks.peers import FROZEN, OURS, PEFT
from benchmarks.traffic import Moved, calls
from lora_kernels.testing import Case

ROOT = Path(__file__).parents[1]
CASE = Case(8192, 4096, 4096, 16)
FUSED = "shrink_gemm"
ROWS = (
    ("frozen nn.Linear", FROZEN, None),
    ("PEFT", PEFT, None),
    ("lora_kernels, ATen's calls", OURS, None),
    (f"lora_kernels, plan {FUSED}", OURS, FUSED),
)
KINDS = {  # what a call is for: its colour
    "product with W": "#3b6fb6",
    "products of the adapter": "#3a8f5c",
    "elementwise": "#c9763a",
}
_LEFT, _WIDTH, _BAR, _GAP = 216, 560, 20, 8
_NARROW = 26  # a number does not fit into less


def kind(moved: Moved, case: Case) -> str:
    """Of a call; a product that moves W beside half the rows of x and y or more is the one with W:
    dropout's calls work through the rows in two halves."""
    name = moved.name.removeprefix("aten.").partition(".")[0]
    with_w = 2 * (case.N * case.K + case.M * (case.N + case.K) // 2)
    if name.startswith("gemm") or (name == "mm" and moved.bytes >= with_w):
        return "product with W"
    products = ("mm", "addmm", "addmm_", "shrink_kernel", "ds_db_kernel", "tall_kernel")
    return "products of the adapter" if name in products else "elementwise"


def _text(x: float, y: float, words: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {more}>{escape(words)}</text>'


def _bar(y: float, label: str, moved: Sequence[Moved], case: Case, scale: float) -> Iterator[str]:
    total, x = sum(one.bytes for one in moved) / 2**20, float(_LEFT)
    yield _text(_LEFT - 8, y + 14, label, 'text-anchor="end"')
    for one in moved:
        width = one.bytes / 2**20 * scale
        yield (
            f'<rect x="{x:.1f}" y="{y}" width="{max(width - 1, 0.4):.1f}" height="{_BAR}"'
            f' fill="{KINDS[kind(one, case)]}"><title>{one.name}: {one.bytes / 2**20:.1f} MiB'
            "</title></rect>"
        )
        if width >= _NARROW:
            words = f"{one.bytes / 2**20:.0f}"
            yield _text(x + width / 2, y + 14, words, 'text-anchor="middle" class="in"')
        x += width
    yield _text(x + 6, y + 14, f"{total:.0f} MiB, {len(moved)} calls".replace("1 calls", "1 call"))


def draw(case: Case = CASE) -> str:
    """The SVG."""
    panels = []
    for p in (0.0, 0.1):
        found = [(label, calls(name, case._replace(dropout=p), plan)) for label, name, plan in ROWS]
        for index, which in enumerate(("Forward", "Backward")):
            panels.append((f"{which}, dropout {p:g}", [(label, of[index]) for label, of in found]))
    longest = max(sum(one.bytes for one in moved) for _, rows in panels for _, moved in rows)
    scale = _WIDTH / (longest / 2**20)
    lines, y = [], 20.0
    title = f"MiB that one layer reads and writes: M = {case.M}, K = {case.K}, N = {case.N}, "
    lines.append(_text(12, y, f"{title}r = {case.r}, bf16", 'class="head"'))
    x = 12.0
    for name, color in KINDS.items():
        lines.append(f'<rect x="{x}" y="{y + 10}" width="12" height="12" fill="{color}"/>')
        lines.append(_text(x + 18, y + 20, name))
        x += 48 + 6.6 * len(name)
    y += 46
    for heading, rows in panels:
        lines.append(_text(12, y, heading, 'class="head"'))
        y += 8
        for label, moved in rows:
            lines += _bar(y, label, moved, case, scale)
            y += _BAR + _GAP
        y += 20
    width, height = _LEFT + _WIDTH + 130, int(y)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img"'
            f' aria-label="{escape(title)}r = {case.r}, bf16">',
            "<style>text{font:12px sans-serif;fill:#222}.head{font-weight:bold}.in{fill:#fff}"
            "</style>",
            f'<rect width="{width}" height="{height}" fill="#fff"/>',
            *lines,
            "</svg>\n",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images" / "traffic.svg")
    args = parser.parse_args(arguments)
    args.out.write_text(draw())
    print(args.out)


if __name__ == "__main__":
    main()
