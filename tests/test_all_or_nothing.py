"""Whatever ends apply_lora or load_adapter early, at whatever line, the model is as it was."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import lora_kernels
from lora_kernels import apply_lora, load_adapter, merge_lora, remove_lora, save_adapter

PACKAGE = str(Path(lora_kernels.__file__).parent)


class Model(nn.Module):
    """A layer that more than its parent holds, a frozen one, statistics, and save_pretrained."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.held = [self.first]
        self.first.register_forward_hook(lambda *_: None)
        self.second.requires_grad_(False)

    def forward(self, x):
        return self.second(self.norm(self.first(x)))

    def save_pretrained(self, save_directory):
        pass


def snapshot(model):
    """Everything by name: classes, attributes with their contents, flags; and values."""
    state, values = {}, {}
    for name, module in model.named_modules():
        state[name] = id(module), type(module), {}
        for key, value in vars(module).items():
            contents = value.copy() if isinstance(value, (dict, set)) else None
            state[name][2][key] = id(value), contents
    flags = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        values[name] = tensor.detach().clone()
    return state, flags, values


def assert_same(before, after):
    assert before[0] == after[0]
    assert before[1] == after[1]
    assert before[2].keys() == after[2].keys()
    for name, value in before[2].items():
        assert torch.equal(value, after[2][name]), name


def run(call, stop=0):
    """Gives the lines of the package that the call reaches; at the one of number `stop` it raises
    KeyboardInterrupt."""
    seen = []

    def local(frame, event, _):
        if event == "line" and frame.f_code.co_name not in ("restore", "all_or_nothing"):
            seen.append((frame.f_code.co_filename, frame.f_lineno))
            if len(seen) == stop:
                raise KeyboardInterrupt
        return local

    def begin(frame, *_):
        return local if frame.f_code.co_filename.startswith(PACKAGE) else None

    old = sys.gettrace()
    sys.settrace(begin)
    try:
        call()
    finally:
        sys.settrace(old)
    return seen


def first_and_last(lines):
    """The numbers at which every line is reached first and last."""
    first, last = {}, {}
    for number, line in enumerate(lines, 1):
        first.setdefault(line, number)
        last[line] = number
    return sorted({*first.values(), *last.values()})


def adapted(**options):
    model = Model()
    apply_lora(model, 2, **options)
    return model


def prepare(case, folder):
    """(model, what changes it)."""
    saved = {"modules_to_save": ["norm"]}
    if case == "again":
        model = adapted(target_modules=["first"])
        return model, lambda: apply_lora(model, 2, target_modules=["second"], **saved)
    if case.startswith("load"):
        other = adapted(**saved)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(1)
        save_adapter(other, folder)
        model = Model() if case == "load" else adapted(**saved)
        return model, lambda: load_adapter(model, folder)
    model = Model()
    return model, lambda: apply_lora(model, 2, init=case, **saved)


@pytest.mark.parametrize("case", ["kaiming", "pissa", "again", "load", "load into adapters"])
def test_an_interruption_at_any_line_changes_nothing(case, tmp_path):
    for _ in range(2):  # what is computed once is computed by then
        lines = run(prepare(case, tmp_path)[1])
    model, call = prepare(case, tmp_path)
    before = snapshot(model)
    assert len(set(lines)) > 60
    for stop in first_and_last(lines):
        with pytest.raises(KeyboardInterrupt):
            run(call, stop)
        assert_same(before, snapshot(model))
        assert torch.is_grad_enabled()
    call()
    with pytest.raises(AssertionError):
        assert_same(before, snapshot(model))


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_errors_of_torch_change_nothing(init, monkeypatch):
    model = Model()
    before = snapshot(model)
    taken = []

    def failing(self, *_):
        if taken:
            raise RuntimeError("out of memory")
        taken.append(self)
        return original(self)

    original = lora_kernels.nn.LoRALayer._take_pissa
    monkeypatch.setattr(lora_kernels.nn.LoRALayer, "_take_pissa", failing)
    monkeypatch.setattr(lora_kernels.nn.LoRALayer, "move_into", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        apply_lora(model, 2, init=init)
    assert_same(before, snapshot(model))


def test_apply_and_remove_again_and_again():
    model = Model()
    before = snapshot(model)
    for _ in range(2):
        apply_lora(model, 2, modules_to_save=["norm"])
        remove_lora(model)
        assert_same(before, snapshot(model))
        with pytest.raises(ValueError, match="has no LoRA layer"):
            remove_lora(model)
        assert_same(before, snapshot(model))


def test_removal_after_a_final_merge_leaves_a_plain_model_that_can_be_adapted_again():
    model = Model().eval()
    apply_lora(model, 2)
    with torch.no_grad():
        model.first.lora_B.fill_(0.5)
        merge_lora(model, keep_base=False)
        x = torch.randn(3, 6)
        expected = model(x)
        remove_lora(model)
        assert type(model.first) is nn.Linear
        torch.testing.assert_close(model(x), expected)
        assert model.first.weight.requires_grad
        apply_lora(model, 3)
        torch.testing.assert_close(model(x), expected)
