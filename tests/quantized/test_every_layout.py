"""What every layout of a quantised weight must do: values and gradients against fp64 on what it
decodes to, the memory of a strip, and a file that brings it back bit for bit."""

import oracle
import pytest
import torch
from quantized_layouts import LAYOUTS, assert_accurate
from torch import nn

from lora_kernels import apply_lora, load_quantized, lora_linear, save_quantized
from lora_kernels.backends import use_backend
from lora_kernels.backends.native import extension
from lora_kernels.backends.native import quantized as native
from lora_kernels.weights import Awq, Float8, FourBit, Gptq, Int8, QuantizedTensor

BACKENDS = ("reference", "native") if extension.available() else ("reference",)


def made(name, N, K):
    return LAYOUTS[name](torch.randn(N, K, generator=torch.Generator().manual_seed(3)) * K**-0.5)


def test_all_classes_are_among_them():
    assert {type(made(name, 16, 128)) for name in LAYOUTS} == {Int8, Float8, FourBit, Gptq, Awq}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("M", [2, 300])
def test_values_and_gradients(name, backend, dtype, M):
    half = torch.float32 if dtype == torch.bfloat16 else None
    case = oracle.Case(M, 256, 136, 8, dtype, half, bias=True, p=0.1 if M == 2 else 0.0)
    with use_backend(backend):
        assert_accurate(case, LAYOUTS[name])


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_quarter_of_the_weight_at_most(name, backend, monkeypatch):
    """The largest piece of memory that is taken in forward or backward, by whomever."""
    monkeypatch.setattr(native, "most_coded", lambda kind, dtype: 0)
    N, K, M = 2048, 2048, 4
    weight, whole = made(name, N, K), N * K * 4
    a, b = torch.randn(8, K, requires_grad=True), torch.randn(N, 8, requires_grad=True)
    x = torch.randn(M, K, requires_grad=True)
    with use_backend(backend):
        taken = memory_of(lambda: lora_linear(x, weight, a, b).sum().backward())
    assert max(taken) == whole // 4  # a strip


def memory_of(run):
    """Bytes of every piece of memory that torch's allocator gave."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run()
    events = profile.profiler.kineto_results.events()
    return [event.nbytes() for event in events if event.name() == "[memory]"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_part_is_decoded_beside_a_few_mib(name):
    """Whatever ATen's calls of a layout unpack: not the whole of anything but a row."""
    weight = made(name, 1024, 2048)
    out = torch.empty(256, 2048)
    taken = memory_of(lambda: weight.decode(slice(3, 259), slice(0, 2048), out))
    assert max(taken) <= 2 << 20  # 2^18 values of 4 bytes, of codes twice as many


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_file_brings_it_back(name, device, tmp_path):
    def net(device):
        with torch.device(device):
            return nn.Sequential(nn.Linear(256, 136))

    model, record = net("cpu"), made(name, 136, 256)
    model[0].weight = nn.Parameter(QuantizedTensor(record, torch.float32), requires_grad=False)
    apply_lora(model, 4, init="random")
    save_quantized(model, tmp_path / "model.safetensors")
    other = net(device)
    apply_lora(other, 4)
    load_quantized(other, tmp_path / "model.safetensors")
    again = other[0].weight.record
    assert type(again) is type(record)
    assert again.form == record.form
    for one, two in zip(again.parts, record.parts, strict=True):
        assert one.dtype == two.dtype
        assert torch.equal(one.flatten().view(torch.uint8), two.flatten().view(torch.uint8))
    x = torch.randn(3, 256)
    assert torch.equal(other(x), model(x))
