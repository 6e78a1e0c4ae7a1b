"""What people already have, on a real GPU: Transformers and PEFT models, compiled, checkpointed,
sharded. The same lines are tested on the CPU in the files of their names."""

import pytest
import tiny_models
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

import lora_kernels
from lora_kernels import lora_parameters

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.gpu
DEVICE = "cuda"
ATTENTION = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"]}


def on_device(name, dtype=torch.bfloat16):
    """A model, an input for it, and the names of its layers."""
    inputs = {key: value.to(DEVICE) for key, value in tiny_models.inputs(name).items()}
    return tiny_models.build(name).to(DEVICE, dtype), inputs, ATTENTION[name]


def randomise(parameters):
    torch.manual_seed(2)
    for parameter in parameters:
        torch.nn.init.normal_(parameter, std=0.1)


def gradients(model, inputs):
    parameters = [p for p in model.parameters() if p.requires_grad]
    logits = model(**inputs).logits
    return [logits.detach(), *torch.autograd.grad(logits.float().square().mean(), parameters)]


def assert_close(ours, theirs, dtype=torch.bfloat16):
    for one, two in zip(ours, theirs, strict=True):
        difference = (one.double() - two.double()).norm() / two.double().norm()
        assert difference < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", ATTENTION)
def test_fused_peft_models(name):
    base, inputs, targets = on_device(name)
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=8, target_modules=targets, fan_in_fan_out=name == "gpt2")
    )
    model = model.to(torch.bfloat16)
    randomise(p for p in model.parameters() if p.requires_grad)
    expected = gradients(model, inputs)
    report = lora_kernels.fuse_peft(model)
    assert len(report.fused) == 2 * len(targets)
    assert_close(gradients(model, inputs), expected)


@pytest.mark.parametrize("name", ATTENTION)
def test_one_compiled_graph(name):
    model, inputs, targets = on_device(name)
    lora_kernels.apply_lora(model, 8, alpha=16, target_modules=targets)
    randomise(lora_parameters(model))
    expected = gradients(model, inputs)
    assert_close(gradients(torch.compile(model, fullgraph=True), inputs), expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoints_change_no_gradient(use_reentrant):
    model, inputs, targets = on_device("llama")
    lora_kernels.apply_lora(model, 8, dropout=0.25, target_modules=targets)
    randomise(lora_parameters(model))
    model.train()
    model.enable_input_require_grads()

    def step():
        torch.manual_seed(3)
        loss = model(**inputs).logits.float().square().mean()
        loss.backward()
        found = [p.grad for p in lora_parameters(model)]
        model.zero_grad()
        return found

    expected = step()
    options = {"use_reentrant": use_reentrant}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    assert all(map(torch.equal, step(), expected))


def test_generate_with_a_cache():
    model, inputs, targets = on_device("llama", torch.float32)
    lora_kernels.apply_lora(model, 8, target_modules=targets)
    randomise(lora_parameters(model))
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    tokens = model.generate(**inputs, **options)
    assert torch.equal(tokens, model.generate(**inputs, use_cache=False, **options))
    lora_kernels.merge_lora(model)
    assert torch.equal(tokens, model.generate(**inputs, **options))


def test_fully_sharded_on_one_device(tmp_path):
    backend = "nccl" if DEVICE == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, inputs, targets = on_device("llama")
        lora_kernels.apply_lora(model, 8, target_modules=targets)
        randomise(lora_parameters(model))
        expected = gradients(model, inputs)
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        loss = model(**inputs).logits.float().square().mean()
        loss.backward()
        found = [p.grad.full_tensor() for p in lora_parameters(model)]
        assert_close(found, expected[1:])
    finally:
        dist.destroy_process_group()
