"""Lightning's Trainer on a module that holds an `apply_lora` model."""

import pytest
import torch
from tiny_models import build, inputs
from torch.utils.data import DataLoader

from lora_kernels import apply_lora, load_adapter, lora_parameters, lora_state_dict, save_adapter

lightning = pytest.importorskip(
    "lightning", reason="needs lightning of requirements-integrations.txt"
)
EPOCH = 6  # steps


class Tuned(lightning.LightningModule):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.model = build().train()
        apply_lora(self.model, 4, dropout=dropout)
        self.losses = []

    def training_step(self, rows, index):
        loss = self.model(input_ids=rows, labels=rows).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(lora_parameters(self), lr=2e-2)


def fit(folder, epochs=2, dropout=0.0, resume=None, **options):
    lightning.seed_everything(0, verbose=False)
    module = Tuned(dropout)
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_epochs=epochs,
        logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, enable_checkpointing=False, **options,
    )  # fmt: skip
    rows = torch.arange(192).reshape(24, 8) % 64
    trainer.fit(module, DataLoader(rows, 4), ckpt_path=resume)
    return trainer, module


def test_fit_trains_the_adapters_alone(tmp_path):
    _, module = fit(tmp_path, dropout=0.1)
    assert len(module.losses) == 2 * EPOCH
    assert sum(module.losses[EPOCH:]) < sum(module.losses[:EPOCH])
    base = dict(build().named_parameters())
    for name, parameter in module.model.named_parameters():
        assert torch.equal(parameter, base[name]) if name in base else parameter.any(), name
    save_adapter(module.model, tmp_path / "adapter")
    again = build()
    load_adapter(again, tmp_path / "adapter")
    given, model = inputs(), module.model.eval()
    assert torch.equal(again(**given).logits, model(**given).logits)


def test_a_checkpoint_resumes_with_identical_losses(tmp_path):
    _, whole = fit(tmp_path)
    first, _ = fit(tmp_path, epochs=1)
    first.save_checkpoint(tmp_path / "first.ckpt")
    _, rest = fit(tmp_path, resume=tmp_path / "first.ckpt")
    assert rest.losses == whole.losses[EPOCH:]
    expected = lora_state_dict(whole)
    assert all(torch.equal(t, expected[key]) for key, t in lora_state_dict(rest).items())


def test_accumulated_and_clipped_in_bf16(tmp_path):
    trainer, module = fit(
        tmp_path, precision="bf16-mixed", accumulate_grad_batches=2, gradient_clip_val=1.0
    )
    assert trainer.global_step == EPOCH
    assert sum(module.losses[EPOCH:]) < sum(module.losses[:EPOCH])
    assert {p.dtype for p in lora_parameters(module)} == {torch.float32}
