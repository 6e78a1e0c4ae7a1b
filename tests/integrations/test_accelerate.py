"""accelerate's `prepare`, accumulation, mixed precision and saved state."""

import pytest
import torch
from tiny_models import build
from torch.utils.data import DataLoader

from lora_kernels import apply_lora, lora_parameters, save_adapter

accelerate = pytest.importorskip("accelerate")
ROWS = torch.arange(128).reshape(16, 8) % 64


def prepared(batch, **options):
    accelerate.state.AcceleratorState._reset_state(True)
    torch.manual_seed(0)
    accelerator = accelerate.Accelerator(cpu=True, **options)
    model = build()
    apply_lora(model, 4)
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.add_(0.1 * torch.randn_like(parameter))
    optimizer = torch.optim.SGD(lora_parameters(model), lr=0.5)
    return accelerator, *accelerator.prepare(model.train(), optimizer, DataLoader(ROWS, batch))


def train(accelerator, model, optimizer, loader):
    losses, steps = [], 0
    for rows in loader:
        with accelerator.accumulate(model):
            loss = model(input_ids=rows, labels=rows).loss
            accelerator.backward(loss)
            steps += accelerator.sync_gradients
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses, steps


def flat(model):
    return torch.cat([p.detach().flatten() for p in lora_parameters(model)])


def test_accumulated_gradients_are_those_of_a_larger_batch():
    accelerator, whole, *others = prepared(8)
    before = flat(whole)
    one, _ = train(accelerator, whole, *others)
    accelerator, parts, *others = prepared(2, gradient_accumulation_steps=4)
    four, steps = train(accelerator, parts, *others)
    assert steps == len(one) == 2
    assert one == pytest.approx([sum(four[:4]) / 4, sum(four[4:]) / 4], rel=1e-5)
    assert one[-1] < one[0]
    assert (flat(whole) - flat(parts)).norm() <= 1e-5 * (flat(whole) - before).norm()


def test_saved_state_resumes(tmp_path):
    accelerator, model, optimizer, loader = prepared(4)
    train(accelerator, model, optimizer, loader)
    accelerator.save_state(tmp_path)
    rest = train(accelerator, model, optimizer, loader)
    again, model, optimizer, loader = prepared(4)
    again.load_state(tmp_path)
    assert train(again, model, optimizer, loader) == rest
    save_adapter(again.unwrap_model(model), tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_bf16_keeps_the_adapters_in_fp32():
    exact, _ = train(*prepared(4))
    accelerator, model, *others = prepared(4, mixed_precision="bf16")
    losses, _ = train(accelerator, model, *others)
    assert losses == pytest.approx(exact, rel=1e-2)
    assert losses != exact
    assert {p.dtype for p in lora_parameters(model)} == {torch.float32}
