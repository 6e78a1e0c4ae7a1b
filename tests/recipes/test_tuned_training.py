"""`train_model(..., tune=True)`: what is tuned before the first step, and when nothing is."""

import pytest
import torch
from torch import nn

from lora_kernels import apply_lora, lora_parameters, train_model
from lora_kernels.backends.cuda import tables
from lora_kernels.recipes import batches, proving


def train(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    apply_lora(model, 2)
    optimizer = torch.optim.SGD(lora_parameters(model), lr=0.1)
    data = [(torch.randn(n, 3, 8), torch.randn(n, 3, 8)) for n in (2, 4, 5, 2)]
    criterion = nn.functional.mse_loss
    return train_model(model, data, criterion, optimizer, progress=False, **options)


@pytest.fixture
def calls(monkeypatch):
    """What `tune` is asked for; the model lies on a GPU that no table is of."""
    found = []
    monkeypatch.setattr(proving.batches, "device_of", lambda model: torch.device("cuda", 0))
    monkeypatch.setattr(batches, "to_device", lambda batch, device: batch)
    monkeypatch.setattr(tables, "why_none", lambda index: "no tuned table")
    monkeypatch.setattr(proving, "tune", lambda model, rows, **more: found.append((rows, more)))
    return found


def test_it_tunes_once_before_the_first_step(calls):
    history = train(tune=True, accumulation_steps=2, epochs=2)
    ((rows, options),) = calls
    assert rows == [6, 12]
    assert options["minutes"] < 1
    assert options["variants"] is False
    assert options["progress"] is False
    assert options["dtype"] is None
    assert history.loss == train(accumulation_steps=2, epochs=2).loss
    assert len(calls) == 1, "it is asked for"


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_it_tunes_what_autocast_computes_in(calls):
    train(tune=True, max_steps=1, autocast_dtype=torch.bfloat16)
    assert calls[0][1]["dtype"] == "bf16"


def test_a_card_with_a_table_is_left_alone(calls, monkeypatch):
    monkeypatch.setattr(tables, "why_none", lambda index: None)
    train(tune=True)
    assert calls == []


def test_on_a_cpu_it_does_nothing(monkeypatch):
    monkeypatch.setattr(proving, "tune", lambda *_, **__: pytest.fail("there is no GPU"))
    assert train(tune=True).loss == train().loss


@pytest.mark.parametrize("error", [RuntimeError("no cache folder"), ValueError("no LoRA layer")])
def test_training_goes_on_without_it(calls, monkeypatch, error):
    def tune(*_, **__):
        raise error

    monkeypatch.setattr(proving, "tune", tune)
    with pytest.warns(UserWarning, match=f"tune: {error}; training goes on without"):
        assert len(train(tune=True)) == 4


def test_the_rows_of_a_batch():
    ids = torch.zeros(3, 7, dtype=torch.long)
    assert proving.rows_of({"input_ids": ids, "labels": ids}) == 21
    assert proving.rows_of((torch.zeros(5, 8), torch.zeros(5))) == 5
    assert proving.rows_of((torch.zeros(5, 4, 8), None)) == 20
    assert proving.rows_of((torch.zeros(5, 4, 6, 6), None)) == 20
    assert proving.rows_of(({"pixels": torch.zeros(2, 8)}, None)) == 2
    assert proving.rows_of((torch.zeros(8), None)) == 1
