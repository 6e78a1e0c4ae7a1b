"""Damaged files, by kind and seed: each is refused with a ValueError that names it, and nothing
changes, or its result is that of the file before the damage.

    python tests/fuzz_files.py --kind checkpoint --count 20000 --seed 1
"""

import argparse
import collections
import io
import json
import random
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_kernels import apply_lora, load_adapter, lora_parameters, save_adapter, train_model
from lora_kernels.adapter_files import DIGEST

# ------------------------------------------------------------------------------- damage of any file


def flip_bits(data, rng):
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 8, 64))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def cut(data, rng):
    return data[: rng.randrange(len(data))]


def overwrite(data, rng):
    start, length = rng.randrange(len(data)), rng.choice((1, 16, 512))
    return data[:start] + rng.randbytes(length) + data[start + length :]


def leave_out(data, rng):
    start = rng.randrange(len(data))
    return data[:start] + data[start + rng.choice((1, 64, 1024)) :]


def other_content(data, rng):
    return rng.choice((b"", b"PK", b"{}", rng.randbytes(len(data)), b"\0" * len(data)))


BYTES = (flip_bits, flip_bits, cut, overwrite, leave_out, other_content)


# -------------------------------------------------------------------------- damage of what is in it


def places(value, path=()):
    """Every path to a value within nested containers."""
    if path:
        yield path
    items = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)) and len(value) < 50:
        items = enumerate(value)
    for key, item in items:
        yield from places(item, (*path, key))


def replaced(value, path, change):
    """A copy of nested containers with the value at a path changed; None of `change` drops it."""
    if not path:
        return change(value)
    kind = type(value)
    copied = dict(value) if isinstance(value, dict) else list(value)
    new = replaced(copied[path[0]], path[1:], change)
    if new is DROP:
        del copied[path[0]]
    else:
        copied[path[0]] = new
    return copied if kind in (dict, list) else tuple(copied)


DROP = object()


def other_value(value, rng):
    """A value of another kind or, of a tensor, of another shape or dtype; or a drop."""
    choices = [
        DROP, None, "text", -1, 3, 2.5, float("nan"), float("inf"), 2**70, True, [], {}, (1, 2),
        {"a": 1}, [None], b"bytes", torch.ones(2), torch.ones(()), torch.zeros(3, dtype=torch.int8),
        1j, torch.Size([3]),
    ]  # fmt: skip
    if isinstance(value, torch.Tensor) and value.numel():
        choices += 2 * [
            value.double(), value.flatten()[:-1], value[None], value.to(torch.complex64),
            value.to(torch.bool), torch.full_like(value, 255) if not value.is_floating_point()
            else torch.full_like(value, torch.nan), value.to_sparse(),
        ]  # fmt: skip
    return rng.choice(choices)


def other_part(content, rng):
    path = rng.choice(list(places(content)))
    return replaced(content, path, lambda value: other_value(value, rng))


# -------------------------------------------------------------------------------------- checkpoints


class Checkpoints:
    """Files of `train_model(checkpoint=...)`, resumed."""

    def __init__(self, folder):
        self.file = folder / "checkpoint"
        arguments = self.make()
        train_model(*arguments[0], **arguments[1], checkpoint=self.file, max_steps=2)
        self.data = self.file.read_bytes()
        self.content = torch.load(io.BytesIO(self.data), weights_only=True)
        self.expected = self.result()

    @staticmethod
    def make():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        apply_lora(model, 2, alpha=4, dropout=0.1, target_modules=["0"], modules_to_save=["1"])
        optimizer = torch.optim.AdamW(lora_parameters(model))
        generator = torch.Generator().manual_seed(2)
        rows = list(zip(torch.randn(6, 4), torch.randn(6, 2), strict=True))
        loader = torch.utils.data.DataLoader(rows, 2, shuffle=True, generator=generator)
        options = {
            "scheduler": torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=9),
            "eval_loader": [(torch.ones(3, 4), torch.ones(3, 2))],
            "eval_every": 1,
            "keep_best": "loss",
            "progress": False,
        }
        return (model, loader, nn.functional.mse_loss, optimizer), options

    def damage(self, rng):
        """Writes a damaged file; whether its content may be another one that is legal."""
        if rng.random() < 0.5:
            self.file.write_bytes(rng.choice(BYTES)(self.data, rng))
            return False
        written = io.BytesIO()
        torch.save(other_part(self.content, rng), written)
        self.file.write_bytes(written.getvalue())
        return True

    def state(self, arguments):
        (model, loader, _, optimizer), options = arguments
        return _plain([
            model.state_dict(), optimizer.state_dict(), options["scheduler"].state_dict(),
            [m.training for m in model.modules()], [p.grad for p in model.parameters()],
            torch.get_rng_state(), str(random.getstate()), loader.generator.get_state(),
        ])  # fmt: skip

    def result(self):
        arguments = self.make()
        random.seed(0)
        before = self.state(arguments)
        try:
            train_model(*arguments[0], **arguments[1], max_steps=4, resume_from=self.file)
        except Exception:
            assert self.state(arguments) == before, "was changed"
            raise
        return self.state(arguments)

    def outcome(self):
        return "as before" if self.result() == self.expected else "another"


def _plain(value):
    """Nested containers that can be compared: tensors as bytes."""
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), tuple(value.shape), value.numpy().tobytes())
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return repr(value) if callable(value) else value


# ----------------------------------------------------------------------------------------- adapters


class Adapters:
    """The two files of `save_adapter`, loaded into a plain model or into adapters."""

    def __init__(self, folder):
        self.file = folder
        save_adapter(self.make(adapted=True, seed=1), folder)
        self.weights, self.config = (
            folder / "adapter_model.safetensors",
            folder / "adapter_config.json",
        )
        self.data = {path: path.read_bytes() for path in (self.weights, self.config)}
        self.tensors, self.entries = load_file(self.weights), json.loads(self.config.read_text())
        self.present = False
        self.expected = {}
        for self.present in (False, True):
            self.expected[self.present] = self.result()

    @staticmethod
    def make(adapted, seed=0):
        torch.manual_seed(0)
        model = nn.ModuleDict(
            {"up": nn.Linear(4, 6), "norm": nn.BatchNorm1d(6), "down": nn.Linear(6, 4)}
        )
        if adapted:
            apply_lora(model, 2, alpha=3, modules_to_save=["norm"])
            torch.manual_seed(seed)
            for parameter in lora_parameters(model):
                nn.init.normal_(parameter)
        return model

    def damage(self, rng):
        """Writes damaged files; whether they may stand for another adapter that is legal."""
        for path, data in self.data.items():
            path.write_bytes(data)
        self.present = rng.random() < 0.5
        path, form = rng.choice(list(self.data)), rng.random()
        if form < 0.5:
            data = rng.choice(BYTES)(self.data[path], rng)
            path.write_bytes(data)
            # Of the config's entries one alone changes what is computed and is not in the metadata.
            return (
                DIGEST.encode() not in data
                if path == self.weights
                else b'"lora_dropout": 0.0' not in data
            )
        if path == self.config:
            path.write_text(json.dumps(other_part(self.entries, rng), default=str))
        else:
            metadata = {"format": "pt"}
            if rng.random() < 0.3:
                metadata["lora_kernels_config"] = rng.choice(("3", "[" * 50_000, "{", "{}"))
            content = other_part(self.tensors, rng)
            content = {k: v for k, v in content.items() if isinstance(v, torch.Tensor)}
            content = {
                k: v.to_dense() if v.is_sparse else v.contiguous() for k, v in content.items()
            }
            save_file(content, path, metadata)
        return True

    def state(self, model):
        return _plain([
            model.state_dict(), [(n, p.requires_grad) for n, p in model.named_parameters()],
            [type(m).__name__ for m in model.modules()],
            [(m.alpha, m.dropout, m.use_rslora) for m in model.modules() if hasattr(m, "lora_A")],
        ])  # fmt: skip

    def result(self):
        model = self.make(self.present)
        before = self.state(model)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                load_adapter(model, self.file)
        except Exception:
            assert self.state(model) == before, "was changed"
            raise
        return self.state(model)

    def outcome(self):
        return "as before" if self.result() == self.expected[self.present] else "another"


KINDS = {"checkpoint": Checkpoints, "adapter": Adapters}


def fuzz(kind, count, seed):
    """How many were refused, gave the result of before, or another that their content, changed but
    legal, stands for; `wrong` are those that did anything else, with their number."""
    rng = random.Random(seed)
    found = collections.Counter()
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        files = KINDS[kind](Path(folder))
        for number in range(count):
            legal = files.damage(rng)
            try:
                outcome = files.outcome()
                found[outcome] += 1
                if outcome == "another" and not legal:
                    wrong.append((number, "another result from damaged bytes"))
            except ValueError as error:
                if str(files.file) in str(error):
                    found["refused"] += 1
                else:
                    wrong.append((number, traceback.format_exc(limit=-3)))
            except Exception:
                wrong.append((number, traceback.format_exc(limit=-3)))
    return {**found, "wrong": wrong, "refused": found["refused"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--kind", choices=KINDS, action="append", help="all by default")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    failed = False
    for kind in args.kind or KINDS:
        outcomes = fuzz(kind, args.count, args.seed)
        wrong = outcomes.pop("wrong")
        print(f"{kind}, seed {args.seed}: {outcomes}, {len(wrong)} wrong")
        for number, report in wrong[:20]:
            print(f"--- {number}\n{report}")
        failed |= bool(wrong)
    return failed


if __name__ == "__main__":
    sys.exit(main())
