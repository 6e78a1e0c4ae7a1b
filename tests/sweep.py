"""Tries the default targets on every architecture of Transformers that can be built small.

    python tests/sweep.py [--only TYPE ...] [--jobs 2] [--fresh] [--ledger FILE] [--table FILE]

Each model type runs in a child process with its own time and memory limit; what a child finds goes
to the ledger (JSON), so that a sweep that was stopped goes on where it was. The table is made from
the ledger. Exit status 1 if an adapter is reported and does not act, or a value differs.
"""

import argparse
import contextlib
import copy
import json
import multiprocessing
import os
import re
import resource
import sys
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import architectures
import peft
import torch
import transformers

import lora_kernels as lk
from lora_kernels.nn import LoRAExpertProduct

ROOT = Path(__file__).resolve().parents[1]
LEDGER = ROOT / "build" / "sweep.json"
TABLE = ROOT / "docs" / "architectures.md"
SECONDS, MEMORY = 120, 8 << 30
RANK = 4
ROUNDING = 1e-4
# What reaches no output of these inputs, and does of others.
OTHER_INPUTS = {
    "FastSpeech2Conformer": ("duration_predictor", "its loss alone reads it"),
    "FlavaForPreTraining": ("text_to_mm_projection", "an image alone reads it"),
    "LightGlueForKeypointMatching": ("match_assignment_layers", "read where matching stops"),
}
VANISHED = 1e-20  # a norm, of gradients that are about 1 where they arrive
CHECKS = {
    "start": "outputs equal the plain model's at B = 0",
    "acts": "every adapter is called and gets a finite non-zero gradient",
    "no grad": "outputs without grad equal those with it",
    "blocks": "`fuse_blocks`: outputs and every adapter's gradient are those of the layers",
    "merge": "merging moves outputs by no more than rounding; unmerging restores every bit",
    "to PEFT": "PEFT computes from our file what we compute",
    "from PEFT": "we compute from PEFT's file what PEFT computes",
    "generate": "greedy generation: cached, uncached and merged agree",
    "remove": "names, requires_grad and outputs are the plain model's again",
}


# -------------------------------------------------------------------------------------- one model


def tensors_of(output) -> list[torch.Tensor]:
    """The floating tensors of whatever a model returns."""
    if isinstance(output, torch.Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        output = output.values()
    if isinstance(output, (list, tuple, type({}.values()))):
        return [tensor for part in output for tensor in tensors_of(part)]
    return []  # caches


def forward(model, given) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return tensors_of(model(**copy.deepcopy(given)))


def gap(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    """The largest difference of two outputs relative to the size of the tensor it is in."""
    if [t.shape for t in a] != [t.shape for t in b]:
        return float("inf")
    gaps = [0.0]
    for left, right in zip(a, b, strict=True):
        finite = left.isfinite() & right.isfinite()
        if not torch.equal(left.isfinite(), right.isfinite()):
            return float("inf")
        left, right = left[finite].detach(), right[finite].detach()
        if left.numel():
            gaps.append(((left - right).abs().max() / left.abs().max().clamp(min=1e-6)).item())
    return max(gaps)


def randomise(parameters) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(std=0.2, generator=generator)


def folded(names) -> str:
    """Names with numbers folded and only as many as a table's cell holds."""
    parts = dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) for name in names)
    more = f" and {len(parts) - 3} more" if len(parts) > 3 else ""
    return ", ".join(list(parts)[:3]) + more


def without_gradient(plain, given) -> set[str]:
    """The plain model's weights that get no gradient from these inputs, or one that vanishes."""
    plain.zero_grad()
    outputs = [t[t.isfinite()] for t in forward(plain, given) if t.requires_grad]
    sum((t * torch.randn_like(t)).sum() for t in outputs).backward()
    norms = {
        n: 0.0 if p.grad is None else float(p.grad.norm()) for n, p in plain.named_parameters()
    }
    found = {name for name, norm in norms.items() if norm < VANISHED}
    plain.zero_grad()
    return {name.removesuffix(".weight") for name in found}


def states_of(model, given) -> list:
    """What `check_adapters` says of every adapter, after what it advises for reversible layers."""
    torch.manual_seed(0)
    states = lk.check_adapters(model, **copy.deepcopy(given)).adapters
    if any("enable_input_require_grads" in (state.problem or "") for state in states):
        model.train().enable_input_require_grads()
        try:
            return lk.check_adapters(model, **copy.deepcopy(given)).adapters
        finally:
            model.eval().disable_input_require_grads()
    return states


def adapters_that_do_not_act(model, plain, given) -> str:
    """What `check_adapters` says, in short. In parentheses stands what lies in these inputs: a
    layer is not called (and its weight read by nobody, or merging would move the outputs), or the
    plain model's weight has a zero gradient too."""
    states = states_of(model, given)
    elsewhere = [v for k, v in OTHER_INPUTS.items() if type(model).__name__.startswith(k)]
    kinds: dict[str, list[str]] = {}
    at_rest = None
    for state in states:
        problem = state.problem or ""
        if problem.startswith("was never called"):
            read = state.merges is False or "reads its weight" in problem
            kind = "bypassed" if read else "(not reached by these inputs"
        elif "received no rows" in problem:
            kind = "(not reached by these inputs"
        elif "does not reach the loss" in problem:
            known = [f"({why}" for part, why in elsewhere if part in state.name]
            kind = known[0] if known else "output unused"
        elif "exactly zero" in problem:
            at_rest = without_gradient(plain, given) if at_rest is None else at_rest
            kind = "(the plain weight's gradient is zero too" if state.name in at_rest else problem
        else:
            kind = problem.split(":")[0].split(";")[0].split(",")[0]
        if kind:
            kinds.setdefault(kind, []).append(state.name)
    found = [
        f"({w.lstrip('(')}: {len(n)}, {folded(n)})" if w.startswith("(") else
        f"{w} ({len(n)} of {len(states)}): {folded(n)}"
        for w, n in sorted(kinds.items(), key=lambda item: item[0].startswith("("))
    ]  # fmt: skip
    return "; ".join(found)


def switch_off_others(theirs, ours) -> None:
    """Zero those of PEFT's adapters that our model has none for."""
    here = {name for name, module in ours.named_modules() if hasattr(module, "lora_A")}
    for name, module in ours.named_modules():
        if isinstance(module, LoRAExpertProduct):  # PEFT wraps their module, once for each
            around = name.rpartition(".")[0]
            here |= {around, f"{around}.base_layer"}
    for name, module in theirs.base_model.model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer) and name not in here:
            for factor in module.lora_B.values():
                factor.weight.zero_()


def _refusal(call) -> str:
    try:
        call()
    except Exception as error:
        return architectures.short(error)
    return ""


def generated(model, given, **options):
    torch.manual_seed(0)
    out = model.generate(
        **copy.deepcopy(given), do_sample=False, num_beams=1, max_new_tokens=4, min_new_tokens=4,
        return_dict_in_generate=True, output_logits=True, pad_token_id=0,
        suppress_tokens=architectures.placeholders(model.config), **options,
    )  # fmt: skip
    return [t.float() for t in out.logits]


def examine(kind: str, name: str | None = None) -> dict:
    """What was found for one model type, with the class `name`: a row of the table."""
    name = name or architectures.classes()[kind]
    row = {"class": name}
    try:
        plain = architectures.build(kind, name)
        given = architectures.inputs(plain)
    except architectures.NotBuilt as error:
        return row | {"not built": str(error)}
    row["inputs"] = list(given)

    plain.requires_grad_(True)
    with torch.no_grad():
        before = forward(plain, given)
        if gap(before, forward(plain, given)) > 0:
            return row | {"not built": "the plain model gives other outputs on a second call"}
        if not any(t.isfinite().any() for t in before):
            return row | {"not built": "the plain model's outputs are not finite"}
    model = copy.deepcopy(plain)
    names = {n: p.requires_grad for n, p in model.named_parameters()}
    try:
        report = lk.apply_lora(model, RANK, alpha=RANK)
    except ValueError as error:
        return row | {"not built": f"nothing to adapt: {str(error)[:120]}"}
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A")}
    weights = {id(m.weight): m.weight.numel() for m in layers.values()}
    row["layers"] = len(layers)
    row["share"] = sum(weights.values()) / sum(p.numel() for p in plain.parameters())
    row["skipped"] = dict(list(report.skipped.items())[:20])

    checks = row["checks"] = {}

    @contextlib.contextmanager
    def check(what: str):
        try:
            yield
        except Exception as error:
            checks[what] = architectures.short(error)

    def agree(what: str, a, b, bound: float = ROUNDING) -> None:
        difference = gap(a, b)
        checks[what] = "" if difference <= bound else f"differs by {difference:.1e}"

    with check("start"), torch.no_grad():
        agree("start", before, forward(model, given), 1e-5)
        if checks["start"] and (apart := apart_in_double(model, plain, given)) < 1e-9:
            checks["start"] = f"(rounding, magnified: {apart:.0e} in fp64)"
    randomise(lk.lora_parameters(model))
    with torch.no_grad():
        adapted = forward(model, given)
    with check("acts"):
        checks["acts"] = adapters_that_do_not_act(model, plain, given)
        if not checks["acts"] and gap(before, adapted) == 0:
            checks["acts"] = "random adapters do not move the outputs"
    with check("no grad"):
        agree("no grad", forward(model, given), adapted)
    with check("blocks"):
        checks["blocks"] = apart_in_blocks(model, given)
    with check("merge"), torch.no_grad():
        state = {n: t.clone() for n, t in model.state_dict().items()}
        lk.merge_lora(model)
        merged = forward(model, given)
        lk.unmerge_lora(model)
        agree("merge", adapted, merged)
        if checks["merge"] and (apart := merged_apart_in_double(model, given)) < 1e-9:
            checks["merge"] = f"(rounding, magnified: {apart:.0e} in fp64)"
        after = model.state_dict()
        if set(state) != set(after) or not all(
            torch.equal(t, after[n]) or not t.isfinite().all() for n, t in state.items()
        ):
            checks["merge"] += " unmerging does not restore the weights"
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear")
    with check("to PEFT"), tempfile.TemporaryDirectory() as folder, torch.no_grad():
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            lk.save_adapter(model, folder)
        try:
            theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), folder).eval()
            agree("to PEFT", adapted, forward(theirs.base_model.model, given))
        except Exception as error:
            checks["to PEFT"] = architectures.short(error)
            if peft_alone := _refusal(lambda: peft.get_peft_model(copy.deepcopy(plain), config)):
                checks["to PEFT"] = f"(PEFT itself: {peft_alone[:80]})"
        if checks["to PEFT"] and any("PEFT" in str(w.message) for w in said):
            checks["to PEFT"] = f"(save_adapter warns: {checks['to PEFT']})"
    with check("from PEFT"), tempfile.TemporaryDirectory() as folder, torch.no_grad():
        try:
            theirs = peft.get_peft_model(copy.deepcopy(plain), config).eval()
            randomise(p for n, p in theirs.named_parameters() if "lora_" in n)
            expected = forward(theirs.base_model.model, given)
        except Exception as error:
            checks["from PEFT"] = f"(PEFT itself: {architectures.short(error)[:80]})"
        else:
            theirs.save_pretrained(folder, save_embedding_layers=False)
            again = peft.PeftModel.from_pretrained(copy.deepcopy(plain), folder).eval()
            if gap(expected, forward(again.base_model.model, given)) > ROUNDING:
                checks["from PEFT"] = "(PEFT does not read its own file back)"
            else:
                ours = copy.deepcopy(plain)
                try:
                    with warnings.catch_warnings(record=True) as said:
                        warnings.simplefilter("always")
                        lk.load_adapter(ours, folder)
                except (ValueError, TypeError) as error:
                    checks["from PEFT"] = f"refused: {str(error).replace(folder, '')[:120]}"
                else:
                    left_out = any("not loaded" in str(w.message) for w in said)
                    if left_out:
                        switch_off_others(again, ours)
                        expected = forward(again.base_model.model, given)
                    agree("from PEFT", expected, forward(ours, given))
                    if left_out and not checks["from PEFT"]:
                        checks["from PEFT"] = "(without what load_adapter says it leaves out)"
    if plain.can_generate():
        with check("generate"), torch.no_grad():
            prompt = {n: v for n, v in given.items() if n != "decoder_input_ids"}
            checks["generate"] = generation(plain, model, prompt)
    with check("remove"), torch.no_grad():
        lk.remove_lora(model)
        agree("remove", before, forward(model, given), 0.0)
        if {n: p.requires_grad for n, p in model.named_parameters()} != names:
            checks["remove"] += " names or requires_grad are not as before"
        if [type(m) for m in model.modules()] != [type(m) for m in plain.modules()]:
            checks["remove"] += " classes are not as before"
    return row


def apart_in_blocks(model, given) -> str:
    """What differs where blocks are computed as one: gradients in fp64, in which rounding does not
    grow to what a fault would be; in fp32 where the model's own code takes no other."""
    try:
        model, bound = copy.deepcopy(model), 1e-3
    except RuntimeError:
        return "(the model holds activations of its last forward and cannot be copied)"
    with contextlib.suppress(Exception):  # grouped products are not of fp64
        model.set_experts_implementation("eager")
    with contextlib.suppress(RuntimeError, TypeError):
        wide = {
            n: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
            for n, v in given.items()
        }
        forward(copy.deepcopy(model).double(), wide)
        model, given, bound = model.double(), wide, 1e-6
    parameters = list(lk.lora_parameters(model))

    def step() -> list[torch.Tensor]:
        outputs = forward(model, given)
        loss = sum(t.square().nan_to_num(0, 0, 0).sum() for t in outputs if t.requires_grad)
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        return [*outputs, *(torch.zeros(()) if g is None else g for g in found)]

    if not any(t.requires_grad for t in forward(model, given)):
        return "(no output has a gradient)"
    right, classes = step(), [type(m) for m in model.modules()]
    with mock.patch("lora_kernels.packed.packs_rows", return_value=True):
        lk.fuse_blocks(model)
        for _ in range(3):  # packs compute together from the second time on
            if (difference := gap(right, step())) > bound:
                return f"differs by {difference:.1e}"
    lk.unfuse_blocks(model)
    if [type(m) for m in model.modules()] != classes or gap(right, step()) > 0:
        return "unfuse_blocks leaves something"
    return ""


def apart_in_double(one, other, given) -> float:
    given = {n: v.double() if v.is_floating_point() else v for n, v in given.items()}
    return gap(*(forward(copy.deepcopy(model).double(), given) for model in (one, other)))


def merged_apart_in_double(model, given) -> float:
    exact = copy.deepcopy(model).double()
    given = {n: v.double() if v.is_floating_point() else v for n, v in given.items()}
    apart = forward(exact, given)
    lk.merge_lora(exact)
    return gap(apart, forward(exact, given))


def generation(plain, model, prompt) -> str:
    """Where the merged model, which has no adapter to run, differs without cache, so may ours."""
    try:
        generated(plain, prompt)
        generated(plain, prompt, use_cache=False)
    except Exception as error:
        return f"(the plain model: {architectures.short(error)[:80]})"
    cached, uncached = generated(model, prompt), generated(model, prompt, use_cache=False)
    lk.merge_lora(model)
    merged, without = generated(model, prompt), generated(model, prompt, use_cache=False)
    lk.unmerge_lora(model)
    for what, one, other in (("", cached, merged), (" without cache", uncached, without)):
        if (difference := gap(one, other)) > ROUNDING:
            return f"merged{what} differs by {difference:.1e}"
    return "(the plain model: its cache changes it)" if gap(merged, without) > 1e-3 else ""


# ------------------------------------------------------------------------------------- all of them


def _child(kind: str, connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    warnings.simplefilter("ignore")
    try:
        row = examine(kind)
    except BaseException as error:
        row = {"class": architectures.classes()[kind], "crashed": architectures.short(error)}
    connection.send(row)


def run(kind: str) -> dict:
    """`examine` in a child of this process, which has all imports behind it."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(kind, theirs))
    child.start()
    theirs.close()
    row = {"class": architectures.classes()[kind]}
    try:
        row = ours.recv() if ours.poll(SECONDS) else row | {"crashed": f"over {SECONDS} s"}
    except EOFError:
        child.join()
        row["crashed"] = f"ended with status {child.exitcode}"
    child.kill()
    child.join()
    return row


def faults(row: dict) -> dict[str, str]:
    """Checks that failed through us: not what stands in parentheses, nor a file that is refused."""
    harmless = ("(", "refused")
    found = {n: w for n, w in row.get("checks", {}).items() if w and not w.startswith(harmless)}
    return found | ({"crashed": row["crashed"]} if "crashed" in row else {})


def table(rows: dict[str, dict]) -> str:
    built = {k: r for k, r in rows.items() if "checks" in r}
    clean = [k for k, r in built.items() if not faults(r)]
    counts = {c: sum(c in faults(r) for r in built.values()) for c in CHECKS}
    tried = {c: sum(c in r["checks"] for r in built.values()) for c in CHECKS}
    lines = [
        "# Architectures",
        "",
        "Made by `make sweep` (`tests/sweep.py`): `apply_lora(model, 4)` with its default targets"
        " on small models built from configs, fp32, on the CPU.",
        f"transformers {transformers.__version__}, peft {peft.__version__},"
        f" torch {torch.__version__.split('+')[0]}.",
        "",
        f"{len(architectures.classes())} model types with a class of their own, {len(rows)} of them"
        f" tried so far; {len(built)} built and run,"
        f" {len(clean)} of them without a fault.",
        "",
        "| check | what it asks | tried | faults |",
        "|---|---|---|---|",
        *(f"| {c} | {what} | {tried[c]} | {counts[c]} |" for c, what in CHECKS.items()),
        "",
        "*Share* is the part of the model's weights that carries an adapter. What stands in"
        " parentheses is no fault of the adapters: the plain model or PEFT has it too, or the"
        " inputs of the sweep do not reach the layer, or `save_adapter` warns of it. A file that is"
        " *refused* changes nothing. *Output unused*: the layer is called, nothing reads what it"
        " gives; `check_adapters` names it.",
        "",
        "| model type | class | layers | share | found |",
        "|---|---|---|---|---|",
    ]
    for kind, row in sorted(built.items()):
        found = "; ".join(f"**{c}**: {w}" for c, w in row["checks"].items() if w) or "ok"
        lines.append(
            f"| {kind} | {row['class']} | {row['layers']} | {row['share']:.0%} | {_cell(found)} |"
        )
    lines += ["", "## Not run", "", "| model type | class | reason |", "|---|---|---|"]
    for kind, row in sorted(rows.items()):
        if kind not in built:
            reason = row.get("not built") or f"**crashed**: {row['crashed']}"
            lines.append(f"| {kind} | {row['class']} | {_cell(reason)} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="TYPE", default=[])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--fresh", action="store_true", help="forget the ledger")
    parser.add_argument("--ledger", type=Path, default=LEDGER)
    parser.add_argument("--table", type=Path, default=TABLE)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    kinds = architectures.classes()
    if unknown := [k for k in arguments.only if k not in kinds]:
        parser.error(f"--only: {unknown} are no model types; there are {', '.join(kinds)}")
    known = arguments.ledger.exists() and not arguments.fresh
    rows = json.loads(arguments.ledger.read_text()) if known else {}
    todo = arguments.only or [k for k in kinds if k not in rows]
    arguments.ledger.parent.mkdir(exist_ok=True)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for kind, row in zip(todo, pool.map(run, todo), strict=True):
            rows[kind] = row
            arguments.ledger.write_text(json.dumps(rows, indent=1))
            found = faults(row) or row.get("not built") or "ok"
            print(f"{kind}: {found}", flush=True)
    arguments.table.write_text(table({k: r for k, r in rows.items() if k in kinds}))
    return int(any(faults(rows[kind]) for kind in todo))


if __name__ == "__main__":
    sys.exit(main())
