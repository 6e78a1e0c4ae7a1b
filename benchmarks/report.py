"""Result files -> the tables of docs/performance.md and the plots, by one command.

    python -m benchmarks.report     # benchmarks/results/*.json -> the page, plots beside them

The tables stand between the lines `<!-- bench:cpu -->` and `<!-- /bench:cpu -->`, and the same for
gpu; what is between them is replaced. A page that does not exist is made of the two tables.
"""

import argparse
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import NamedTuple

from benchmarks import dora, grouped, host, peers, plots, quantized, shapes
from benchmarks.peers import ADDMM, FROZEN, OURS, PEERS, UNFUSED
from lora_kernels.testing import Case
from lora_kernels.tuning.machine import machine_line

ROOT = Path(__file__).parents[1]
NOTHING = "Not measured yet."


class Document(NamedTuple):
    """One result file."""

    path: Path
    machine: dict
    rows: list[dict]

    def of(self, *tables: str) -> list[dict]:
        """The timed rows of some tables."""
        return [row for row in self.rows if row["table"] in tables and "refused" not in row]


class Grid(NamedTuple):
    """One result file of `native.py`."""

    path: Path
    machine: dict
    latency: dict[str, float]
    figures: list[dict]
    rows: list[dict]


def load_grids(folder: Path) -> list[Grid]:
    """The files of `native.py`."""
    contents = {path: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    return [
        Grid(path, *(content[name] for name in Grid._fields[1:]))
        for path, content in contents.items()
        if "figures" in content
    ]


def load(folder: Path) -> list[Document]:
    """The files of `layer.py` and `model.py`; files of other benchmarks are left out."""
    found = []
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        rows = [row for row in content.get("rows", ()) if "table" in row]
        if rows and "machine" in content:
            found.append(Document(path, content["machine"], rows))
    return found


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(line)} |" for line in lines] + [""]


def _case(row: dict) -> Case:
    return Case(**{name: row[name] for name in Case._fields})


def by_case(rows: Iterable[dict]) -> dict[Case, dict[str, dict]]:
    """case -> peer -> row, in the order of the file."""
    cases: dict[Case, dict[str, dict]] = {}
    for row in rows:
        cases.setdefault(_case(row), {})[row["peer"]] = row
    return cases


def _ratio(row: dict | None, which: str) -> str:
    return f"{row[which]['ratio']:.2f}×" if row and which in row else "–"


def _spread(row: dict | None, which: str) -> str:
    if not row:
        return "–"
    return f"{_ratio(row, which)} [{row[which]['p20']:.2f}, {row[which]['p80']:.2f}]"


def _peers_in(rows: list[dict]) -> list[str]:
    """The peers of some rows beside the frozen layer, ours last and its plans after it."""
    present = dict.fromkeys(row["peer"] for row in rows)
    known = [name for name in PEERS if name in present and name != FROZEN]
    return known + [name for name in present if name not in PEERS]


def cpu_table(document: Document) -> list[str]:
    rows = document.of("cpu")
    if not rows:
        return []
    names = _peers_in(rows)
    lines = []
    for case, found in by_case(rows).items():
        frozen = found[FROZEN]
        peaks = [f"{found[n]['peak_mib']:.0f}" if n in found else "–" for n in (FROZEN, OURS)]
        lines.append(
            [case.dtype, f"({case.M}, {case.K}, {case.N}, {case.r})", f"{case.dropout:g}",
             f"{frozen['both']['ms']:.3g} ms", *(_spread(found.get(n), "both") for n in names),
             " / ".join(peaks)]
        )  # fmt: skip
    header = ["dtype", "(M, K, N, r)", "dropout", "frozen", *names, "peak MiB, frozen / ours"]
    return [
        "Forward and backward of one layer; ratios to the frozen `nn.Linear` are medians of paired",
        "rounds, 20 and 80 % quantiles in brackets, lower is better (`make bench`).",
        "",
        *markdown(header, lines),
    ]


def mean_ratio(found: Iterable[dict[str, dict]], peer: str, which: str) -> float | None:
    """Geometric mean of a peer's ratio to the frozen layer over the cases that have it."""
    ratios = [peers[peer][which]["ratio"] for peers in found if peer in peers]
    return geometric_mean(ratios) if ratios else None


def _means(cases: dict[Case, dict[str, dict]], names: Sequence[str], which: str) -> list[str]:
    means = (mean_ratio(cases.values(), name, which) for name in names)
    return ["–" if mean is None else f"{mean:.3f}×" for mean in means]


def headline_table(document: Document) -> list[str]:
    cases = by_case(document.of("headline"))
    lines = []
    for dropout in shapes.DROPOUTS:
        some = {case: found for case, found in cases.items() if case.dropout == dropout}
        for which in shapes.PASSES if some else ():
            lines.append([f"{dropout:g}", which, *_means(some, (ADDMM, OURS), which)])
    if not lines:
        return []
    return [
        "Llama-3-8B and 70B layers, M = 8192, r = 16, bf16: geometric mean of the ratio to frozen.",
        "",
        *markdown(["dropout", "pass", ADDMM, OURS], lines),
    ]


def rows_table(document: Document) -> list[str]:
    """By rows and rank, over all named shapes."""
    cases = by_case(document.of("headline", "grid"))
    lines = []
    for key in sorted({(case.r, case.dropout, case.M) for case in cases}):
        some = {c: found for c, found in cases.items() if (c.r, c.dropout, c.M) == key}
        r, dropout, M = key
        pair = (ADDMM, OURS)
        means = [*_means(some, pair, "forward"), *_means(some, pair, "both")]
        lines.append([str(r), f"{dropout:g}", str(M), *means, str(len(some))])
    header = ["r", "dropout", "M", f"{ADDMM}, forward", f"{OURS}, forward",
              f"{ADDMM}, both", f"{OURS}, both", "shapes"]  # fmt: skip
    slower = [
        case for case, found in cases.items()
        if ADDMM in found and OURS in found
        and found[OURS]["both"]["p20"] > found[ADDMM]["both"]["p80"]
    ]  # fmt: skip
    if not lines:
        return []
    return [
        "All named shapes: geometric mean of the ratio to frozen. Forward and backward was slower"
        f" than {ADDMM}, beyond the quantiles, in {len(slower)} of {len(cases)} cells.",
        "",
        *markdown(header, lines),
    ]


def lorafusion_table(document: Document) -> list[str]:
    cases = by_case(document.of("lorafusion"))
    cases = {case: found for case, found in cases.items() if {UNFUSED, OURS} <= found.keys()}
    if not cases:
        return []
    speed = {c: f[UNFUSED]["both"]["ms"] / f[OURS]["both"]["ms"] for c, f in cases.items()}
    lines = [
        [str(case.M), str(case.N), f"{found[UNFUSED]['both']['ms']:.3f} ms",
         f"{found[OURS]['both']['ms']:.3f} ms", f"{speed[case]:.2f}×"]
        for case, found in cases.items()
    ]  # fmt: skip
    return [
        "LoRAFusion's setup (r = 16, dropout 0.1, bf16, forward and backward; it reports a mean of",
        f"1.27× over unfused torch on an H100): mean {geometric_mean(speed.values()):.2f}×.",
        "",
        *markdown(["M", "K = N", UNFUSED, OURS, "faster by"], lines),
    ]


def slow_table(document: Document) -> list[str]:
    rows = document.of("slow")
    if not rows:
        return []
    names = _peers_in(rows)
    lines = [
        [f"({case.M}, {case.K}, {case.N}, {case.r})", f"{case.dropout:g}",
         f"{found[FROZEN]['both']['ms']:.3f} ms", *(_ratio(found.get(n), "both") for n in names)]
        for case, found in by_case(rows).items()
    ]  # fmt: skip
    return [
        "Every peer, forward and backward, ratio to frozen.",
        "",
        *markdown(["(M, K, N, r)", "dropout", "frozen", *names], lines),
    ]


def weight_gb_s(case: Case, milliseconds: float) -> float:
    """Weight bytes per second: what limits few rows."""
    return case.N * case.K * shapes.ITEM_BYTES[case.dtype] / milliseconds / 1e6


def decode_table(document: Document) -> list[str]:
    rows = document.of("decode")
    if not rows:
        return []
    # What each plan takes is in the file and its plot.
    names = [name for name in _peers_in(rows) if not name.startswith(peers.of_plan(""))]
    lines = [
        [f"({case.M}, {case.K}, {case.N}, {case.r})",
         f"{weight_gb_s(case, found[FROZEN]['forward']['ms']):.0f}",
         *(_ratio(found.get(name), "forward") for name in names)]
        for case, found in by_case(rows).items()
    ]  # fmt: skip
    return [
        "Few rows, forward alone: weight traffic of the frozen layer, and ratios to it.",
        "",
        *markdown(["(M, K, N, r)", "frozen, GB/s", *names], lines),
    ]


def _speed(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def model_table(document: Document) -> list[str]:
    rows = document.of("train", "generate")
    if not rows:
        return []
    lines = [
        [row["what"], row["peer"], _speed(row["tokens_s"]), f"{row['ratio']:.2f}×",
         f"{row['peak_mib']:.0f}", f"{row['calls']}" if "calls" in row else "–"]
        for row in rows
    ]  # fmt: skip
    return [
        "A Llama-architecture model, end to end; ratio of the time to the frozen model's. Calls are"
        " operators that the host launches; peak memory is of a step, without parameters.",
        "",
        *markdown(["what", "model", "tokens/s", "time", "peak MiB", "calls"], lines),
    ]


def host_table(document: Document) -> list[str]:
    rows = document.of("host")
    if not rows:
        return []
    both = {row["peer"]: sum(row[f"{what}_us"] for what in host.PASSES) for row in rows}
    lines = [
        [row["peer"], *(f"{row[f'{what}_{unit}']:.0f}" for what in host.PASSES
                        for unit in ("us", "calls")),
         f"{both[row['peer']] / both[FROZEN]:.2f}×"]
        for row in rows
    ]  # fmt: skip
    heads = [f"{what}, {unit}" for what in host.PASSES for unit in ("µs", "operators")]
    return [
        "What a Transformer layer costs the host: a Llama of width 64 with 16 tokens, in which next"
        " to nothing is computed. A layer is the difference of many and few (`host.py`).",
        "",
        *markdown(["model", *heads, "to frozen, both"], lines),
    ]


_TABLES = (
    cpu_table, headline_table, rows_table, lorafusion_table, slow_table, decode_table, model_table,
    host_table,
)  # fmt: skip


def section(documents: Iterable[Document]) -> str:
    """The tables of some result files, each under its machine line."""
    lines: list[str] = []
    for document in documents:
        tables = [line for table in _TABLES for line in table(document)]
        if tables:
            lines += [*tables, f"`{document.path.name}`: {machine_line(document.machine)}", ""]
    return "\n".join(lines).strip() or NOTHING


def grid_section(grids: Iterable[Grid]) -> str:
    """What the grids on CPUs say, each under its machine line."""
    lines: list[str] = []
    for grid in grids:
        table = [
            [one["dtype"], one["mode"], str(one["cells"]), f"{one['better']:.2f}×",
             f"{one['worst']:.2f}×", str(one["slower"]), f"{one['frozen']:.2f}×"]
            for one in grid.figures
        ]  # fmt: skip
        lines += [
            "A grid of rows (1 to 4096), widths (512 to 4096) and ranks (8 to 128): our time over"
            " that of the better of PEFT and unfused torch, and over the frozen layer's.",
            "",
            *markdown(["dtype", "what", "cells", "better peer, mean", "worst cell", "slower by 5 %",
                       "frozen, mean"], table),
            *markdown(["a 64 × 64 layer, fp32, rank 16", "µs"],
                      [[name, f"{value:.1f}"] for name, value in grid.latency.items()]),
            f"`{grid.path.name}`: {machine_line(grid.machine)}",
            "",
        ]  # fmt: skip
    return "\n".join(lines).strip()


def load_groups(folder: Path) -> list[Document]:
    """The files of `grouped.py`."""
    contents = {path: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    return [
        Document(path, content["machine"], content["rows"])
        for path, content in contents.items()
        if any("kind" in row for row in content.get("rows", ()))
    ]


# Peers of `grouped.py` as its tables name them.
_PEERS_OF_GROUPS = {
    grouped.OURS: grouped.OURS, grouped.FORCED: grouped.FORCED, grouped.LOOP: grouped.LOOP,
    grouped.PEFT: "PEFT", grouped.GROUPED_MM: "torch's grouped_mm",
}  # fmt: skip


def groups_section(documents: Iterable[Document]) -> str:
    """What many adapters in one batch cost, each under its machine line."""
    lines: list[str] = []
    for document in documents:
        of_kind = {
            kind: [row for row in document.rows if row["kind"] == kind]
            for kind in ("tenants", "experts")
        }
        peers = {
            kind: [name for name in _PEERS_OF_GROUPS if any(name in row for row in rows)]
            for kind, rows in of_kind.items()
        }
        batches, mixtures = [], []
        for row in of_kind["tenants"]:
            if row["r"] == grouped.RANKS[0] and row["G"] > 1 and row["M"] <= 512:
                batches.append(
                    [row["dtype"], str(row["M"]), str(row["r"]), str(row["G"]),
                     "both" if row["trains"] else "forward", f"{row[grouped.ONE]['ms']:.3g} ms",
                     *(_ratio_of(row, name) for name in peers["tenants"])]
                )  # fmt: skip
        for row in of_kind["experts"]:
            peaks = [
                f"{row[name]['peak_mib']:.0f}" if name in row else "–"
                for name in (grouped.FROZEN, *peers["experts"])
            ]
            mixtures.append(
                [row["dtype"], str(row.get("G", 8)), str(row["r"]),
                 f"{row[grouped.FROZEN]['ms']:.3g} ms",
                 *(_ratio_of(row, name) for name in peers["experts"]), " / ".join(peaks)]
            )  # fmt: skip
        heads = {kind: [_PEERS_OF_GROUPS[name] for name in names] for kind, names in peers.items()}
        lines += [
            "Rows of G adapters in one batch, K = N = 1024, forward and backward or forward alone;"
            " ratios to one adapter for all rows (`benchmarks/grouped.py`; r = 64, G = 1 and"
            " M = 4096 in the file). PEFT by `adapter_names`.",
            "",
            *markdown(["dtype", "M", "r", "G", "pass", grouped.ONE, *heads["tenants"]], batches),
            "Experts, two of each of 1024 tokens, 512 to 1024 wide, forward and backward; ratios to"
            " the experts without adapters. PEFT by `target_parameters`.",
            "",
            *markdown(["dtype", "experts", "r", grouped.FROZEN, *heads["experts"],
                       "peak MiB, in this order"], mixtures),
            f"`{document.path.name}`: {machine_line(document.machine)}",
            "",
        ]  # fmt: skip
    return "\n".join(lines).strip()


def _ratio_of(row: dict, peer: str) -> str:
    return f"{row[peer]['ratio']:.2f}×" if peer in row else "–"


def load_rows(folder: Path, key: str) -> list[Document]:
    """The files that have rows under a key of their own, as of `quantized.py` and `dora.py`."""
    contents = {path: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    return [
        Document(path, content["machine"], content[key])
        for path, content in contents.items()
        if key in content
    ]


def quantized_section(documents: Iterable[Document]) -> str:
    """What layers on quantised weights cost, each under its machine line."""
    lines: list[str] = []
    for document in documents:
        kinds = list(document.rows[0]["bytes"])
        decoded, trained = [], []
        for row in document.rows:
            shape = [row["dtype"], f"{row['N']} × {row['K']}"]
            known = [f"{row[kind]['ratio']:.2f}×" for kind in kinds]
            dense = row[quantized.DENSE]
            if row["trains"]:
                rival = row.get(quantized.PEFT)
                peft = "–" if rival is None else f"{rival['ratio']:.2f}×"
                trained.append([*shape, f"{dense['ms']:.3g} ms", *known, peft])
            else:
                frozen = f"{row[quantized.FROZEN]['ms']:.3g} ms"
                decoded.append([*shape, str(row["M"]), frozen, f"{dense['ratio']:.2f}×", *known])
        of_half = [row for row in document.rows if row["dtype"] == "bf16"] or document.rows
        shares = ", ".join(
            f"{kind} {max(row['bytes'][kind] for row in of_half):.3f}" for kind in kinds
        )
        lines += [
            f"LoRA of rank {quantized.RANK} on quantised weights, without gradients, weights cold;"
            " ratios to the frozen layer (`benchmarks/quantized.py`).",
            "",
            *markdown(["dtype", "N × K", "rows", quantized.FROZEN, "LoRA", *kinds], decoded),
            f"Forward and backward of {quantized.TRAINED} rows; ratios to LoRA on the dense weight."
            f" Bytes of the weight, of those in {of_half[0]['dtype']}: {shares}.",
            "",
            *markdown(["dtype", "N × K", "LoRA", *kinds, quantized.PEFT], trained),
            f"`{document.path.name}`: {machine_line(document.machine)}",
            "",
        ]
    return "\n".join(lines).strip()


def dora_section(documents: Iterable[Document]) -> str:
    """What DoRA costs, each under its machine line."""
    lines: list[str] = []
    for document in documents:
        rows = [
            [
                row["dtype"], row["adapter_dtype"], str(row["M"]), f"{row['dropout']:g}",
                f"{row[dora.LORA]['ms']:.3g} ms",
                *(f"{row[name]['ratio']:.2f}×" for name in (dora.FROZEN, dora.DORA, dora.PEFT)),
            ]
            for row in document.rows
        ]  # fmt: skip
        lines += [
            f"DoRA of rank {dora.RANK}, N = {dora.N}, K = {dora.K}; {dora.TRAINED} rows forward and"
            " backward, one row without gradients; ratios to our LoRA layer"
            " (`benchmarks/dora.py`). With dropout DoRA multiplies the weight twice, by its"
            " definition.",
            "",
            *markdown(
                ["dtype", "adapter", "rows", "dropout", dora.LORA, dora.FROZEN, dora.DORA,
                 dora.PEFT],
                rows,
            ),
            f"`{document.path.name}`: {machine_line(document.machine)}",
            "",
        ]  # fmt: skip
    return "\n".join(lines).strip()


def insert(text: str, name: str, body: str) -> str:
    """The text with what stands between the two markers of `name` replaced."""
    begin, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"page: expected one {begin} … {end}")
    return pattern.sub(lambda _: f"{begin}\n\n{body}\n\n{end}", text)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "performance.md")
    parser.add_argument("--plots", type=Path, help="folder of the plots (that of the results)")
    args = parser.parse_args(arguments)
    documents, grids = load(args.results), load_grids(args.results)
    groups = load_groups(args.results)
    on_cpu = {
        quantized_section: load_rows(args.results, "quantized"),
        dora_section: load_rows(args.results, "dora"),
    }
    names = ("cpu", "gpu")
    text = "\n\n".join(f"<!-- bench:{name} -->\n<!-- /bench:{name} -->" for name in names) + "\n"
    if args.page.exists():
        text = args.page.read_text()
    for name in names:
        on_gpu = name == "gpu"
        kind = [document for document in documents if bool(document.machine["gpu"]) == on_gpu]
        body = section(kind)
        if grids and not on_gpu:
            body = "\n\n".join([grid_section(grids), *([] if body == NOTHING else [body])])
        if groups and not on_gpu:
            body = "\n\n".join([*([] if body == NOTHING else [body]), groups_section(groups)])
        for write, found in on_cpu.items():
            if found and not on_gpu:
                body = "\n\n".join([*([] if body == NOTHING else [body]), write(found)])
        text = insert(text, name, body)
    args.page.write_text(text)
    print(args.page)
    folder = args.plots or args.results
    folder.mkdir(parents=True, exist_ok=True)
    for document in documents:
        for path in plots.draw(document.rows, machine_line(document.machine),
                               folder / document.path.stem):  # fmt: skip
            print(path)
    for grid in grids:
        print(plots.grid_by_rows(grid.rows, machine_line(grid.machine),
                                 folder / f"{grid.path.stem}-grid.png"))  # fmt: skip


if __name__ == "__main__":
    main()
