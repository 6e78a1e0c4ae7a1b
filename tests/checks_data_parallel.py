"""On two ranks: FSDP2, DDP and sharded checkpoints against one process that sees every rank's
rows."""

import contextlib
import copy
import functools
import os
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from checks_tensor_parallel import refused
from parallel_problem import (
    STEPS,
    Block,
    Part,
    batch,
    build,
    by_rank,
    loss_of,
    optimizer_of,
    require_as_reference,
    require_close,
    require_equal_draws,
    set_training_state,
    shard,
    shared_folder,
    train,
    training_state,
    whole,
)
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from lora_kernels import (
    adapter_rows,
    add_adapter,
    apply_lora,
    disable_adapters,
    evaluate_model,
    fuse_blocks,
    load_adapter,
    lora_parameters,
    lora_state_dict,
    merge_lora,
    merged_state_dict,
    remove_lora,
    save_adapter,
    set_adapter,
    train_model,
    unmerge_lora,
)


def check_ddp_with_a_static_graph():
    require_as_reference(DistributedDataParallel(build(), static_graph=True), build())


def check_ddp_with_activation_checkpoints():
    model = DistributedDataParallel(build(checkpointed=True), static_graph=True)
    require_as_reference(model, build())


def check_ddp_accumulates():
    model, single = DistributedDataParallel(build()), build()
    for step, context in enumerate((model.no_sync, contextlib.nullcontext)):
        with context():
            loss_of(model, batch(), step, by_rank()).backward()
        for rank in range(dist.get_world_size()):
            part = Part(rank, dist.get_world_size())
            (loss_of(single, batch(), step, part) / part.count).backward()
    for one, two in zip(lora_parameters(model), lora_parameters(single), strict=True):
        assert torch.allclose(one.grad, two.grad, rtol=1e-12, atol=1e-15)


def check_fsdp():
    model = shard(build())
    weight = model[0].up.weight
    assert weight.to_local().shape == (16, 16)
    require_as_reference(model, build())
    assert model[0].up.weight.to_local().shape == (16, 16)


def check_fsdp_with_dora():
    """In evaluation norms are not held: FSDP fills a weight without counting its changes."""
    for dropout in (0.0, 0.25):
        model, single = (build(use_dora=True, dropout=dropout) for _ in range(2))
        assert whole(model[0].up.lora_magnitude).shape == (32,)
        model = shard(model)
        require_as_reference(model, single)
        model.eval(), single.eval()
        with torch.no_grad():
            for _ in range(2):
                assert torch.allclose(model(batch()), single(batch()), rtol=1e-12)
                for one in (model, single):
                    for parameter in one.parameters():
                        parameter.mul_(1.25)


def check_fsdp_with_blocks():
    """Packed projections and gated MLPs of a Llama whose blocks are sharded."""
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(2)
    single = LlamaForCausalLM(config).double()
    apply_lora(single, 4, alpha=8, init="random")
    model = copy.deepcopy(single)
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    ids = torch.arange(24).reshape(2, 12) % 32
    with mock.patch("lora_kernels.packed.packs_rows", return_value=True):
        assert len(fuse_blocks(model).mlps) == 2
        for checkpointed in (False, True):
            if checkpointed:
                for one in (model, single):
                    one.train().gradient_checkpointing_enable()
            for _ in range(3):
                for one in (model, single):
                    one(input_ids=ids, labels=ids).loss.backward()
                for one, other in zip(lora_parameters(model), lora_parameters(single), strict=True):
                    assert torch.allclose(whole(one.grad), other.grad, rtol=1e-9, atol=1e-12)
                    one.grad = other.grad = None
    assert any(layer._pack is not None for layer in model.modules() if hasattr(layer, "lora_A"))


def check_fsdp_with_activation_checkpoints():
    require_as_reference(shard(build(checkpointed=True)), build())


def check_fsdp_kept_after_forward_and_full_training_beside():
    model = shard(build(modules_to_save=["1.down"]), reshard_after_forward=False)
    require_as_reference(model, build(modules_to_save=["1.down"]))


def check_fsdp_with_mixed_precision():
    """Master copies and reductions in fp32, everything else in bf16: the very same roundings."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model, single = (build(torch.float32) for _ in range(2))
    model = shard(model, mp_policy=policy)
    assert model(batch(torch.float32)).dtype == torch.bfloat16
    require_as_reference(model, single, 1e-6, torch.float32, torch.bfloat16)
    assert model[0].up.lora_A.dtype == torch.float32


def check_fsdp_with_master_adapters_on_a_16_bit_base():
    options = {"dtype": torch.bfloat16, "adapter_dtype": torch.float32}
    model = shard(build(**options))
    require_as_reference(model, build(**options), 1e-6, torch.bfloat16)
    assert model[0].up.weight.dtype == torch.bfloat16
    assert model[0].up.lora_A.dtype == torch.float32


def check_compiled_fsdp():
    """torch.compile breaks the graph at FSDP's hooks; results and gradients are the same."""
    model, single = shard(build()), build()
    for one in (torch.compile(model, backend="aot_eager"), single):
        torch.manual_seed(5)
        one(batch()).square().sum().backward()
    for one, two in zip(lora_parameters(model), lora_parameters(single), strict=True):
        assert torch.allclose(whole(one.grad), two.grad, rtol=1e-12, atol=1e-14)


def check_fsdp_with_cpu_offload():
    model = shard(build(), offload_policy=CPUOffloadPolicy(pin_memory=False))
    require_as_reference(model, build())


def check_fsdp_checkpoint_resumes():
    """A sharded checkpoint of adapters and optimizer; the base comes from where it came from."""
    with shared_folder() as folder:
        straight = shard(build())
        losses = train(straight)
        model = shard(build())
        optimizer = optimizer_of(model)
        assert train(model, range(1), optimizer=optimizer) == losses[:1]
        dcp.save(training_state(model, optimizer), checkpoint_id=folder)

        model = shard(build())
        with torch.no_grad():
            for parameter in lora_parameters(model):
                parameter.zero_()
        optimizer = optimizer_of(model)
        state = training_state(model, optimizer)
        assert not any("weight" in key or "bias" in key for key in state["model"])
        dcp.load(state, checkpoint_id=folder)
        set_training_state(model, optimizer, state)
        assert train(model, range(1, STEPS), optimizer=optimizer) == losses[1:]
        for one, two in zip(model.parameters(), straight.parameters(), strict=True):
            assert torch.equal(one.to_local(), two.to_local())


def check_sharded_checkpoint_loads_into_one_process():
    with shared_folder() as folder:
        model = shard(build())
        train(model)
        dcp.save(lora_state_dict(model), checkpoint_id=folder)
        single = build()
        state = lora_state_dict(single)
        dcp.load(state, checkpoint_id=folder)
        single.load_state_dict(state, strict=False)
        require_close(model, single, 0)


def check_adapter_files_of_a_sharded_model():
    """Saved by all ranks together; loaded into one process and into a sharded model again."""
    for options in ({}, {"init": "pissa"}, {"modules_to_save": ["1.down"]}):
        with shared_folder() as folder:
            model = shard(build(**options))
            train(model)
            save_adapter(model, folder)
            dist.barrier()
            files = sorted(os.listdir(folder))
            assert files == ["adapter_config.json", "adapter_model.safetensors"]
            single = build(**options | {"init": "kaiming"})
            remove_lora(single)
            load_adapter(single, folder)
            model.eval(), single.eval()
            expected = model(batch())
            assert (single(batch()) - expected).norm() <= 1e-13 * expected.norm()
            if "init" in options:
                continue
            again = shard(build(**options))
            load_adapter(again, folder)
            require_close(again, single, 0)


def check_fsdp_with_rows_of_several_adapters():
    """Checkpointed; an adapter added before sharding, and none after it."""
    single, sharded = build(checkpointed=True, dropout=0), build(checkpointed=True, dropout=0)
    for model in (single, sharded):
        torch.manual_seed(5)
        add_adapter(model, "other", 3, init="random")
    sharded = shard(sharded)
    names = ["other", None, "default", "other", "default", None] * 2
    for model in (single, sharded):
        with adapter_rows(model, names):
            loss = model(batch()).square().mean()
        loss.backward()
    for one, two in zip(lora_parameters(single), lora_parameters(sharded), strict=True):
        assert torch.allclose(one.grad, two.grad.full_tensor(), rtol=1e-12, atol=1e-15)
    with shared_folder() as folder:
        save_adapter(sharded, folder, adapter="other")
        dist.barrier()
        again = build()
        load_adapter(again, folder, adapter="other")
        set_adapter(again, "other")
        set_adapter(single, "other")
        assert torch.equal(again(batch()), single(batch()))
    refused(lambda: add_adapter(sharded, "more", 2), "before parallelize_module or fully_shard")


def check_a_sharded_model_keeps_its_rank():
    model = shard(build())
    layer, before = model[0].up, list(model.parameters())
    try:
        layer.set_factors(torch.ones(2, 16), torch.ones(32, 2))
    except ValueError as error:
        assert "before" in str(error), error  # noqa: PT017
    else:
        raise AssertionError("a rank was changed")
    assert all(one is two for one, two in zip(model.parameters(), before, strict=True))


def check_merge_of_a_sharded_model():
    model, single = shard(build().eval()), build().eval()
    before = [p.to_local().clone() for p in model.parameters()]
    expected = single(batch())
    merge_lora(model)
    assert (model(batch()) - expected).norm() <= 1e-13 * expected.norm()
    unmerge_lora(model)
    assert all(map(torch.equal, before, (p.to_local() for p in model.parameters())))


def check_merged_weights_of_a_sharded_model():
    model, single = shard(build(modules_to_save=["1.down"])), build(modules_to_save=["1.down"])
    for _ in range(2):
        for (name, one), two in zip(
            merged_state_dict(model).items(), merged_state_dict(single).values(), strict=True
        ):
            assert torch.equal(one, two), name
        merge_lora(model)


def check_states_of_merged_sharded_models():
    """Sharded or gathered, they restore a model that is merged, the gathered state by rank 0."""
    model, single = shard(build()), build()
    merge_lora(model)
    before = [p.to_local().clone() for p in model.parameters()]
    merge_lora(single)
    gathered = StateDictOptions(full_state_dict=True, cpu_offload=True)
    from_one = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    state = get_model_state_dict(model, options=gathered)
    fresh = build()
    if dist.get_rank() == 0:
        fresh.load_state_dict(state)
        for name, tensor in single.state_dict().items():
            assert torch.equal(fresh.state_dict()[name], tensor), name
    for options in (None, from_one):
        other = shard(build())
        for parameter in lora_parameters(other):
            nn.init.zeros_(parameter)
        merge_lora(other)
        given = state if options else get_model_state_dict(model)
        set_model_state_dict(other, dict(given), options=options)
        assert all(map(torch.equal, before, (p.to_local() for p in other.parameters())))
        unmerge_lora(other)
        assert torch.equal(whole(other[0].up.weight), build()[0].up.weight)
    with shared_folder() as folder:
        dcp.save(model.state_dict(), checkpoint_id=folder)
        other = shard(build())
        merge_lora(other)
        state = other.state_dict()
        for tensor in state.values():
            tensor.zero_()
        dcp.load(state, checkpoint_id=folder)
        other.load_state_dict(state)
        unmerge_lora(other)
        assert torch.equal(whole(other[0].up.weight), build()[0].up.weight)


def check_disabled_adapters_of_a_sharded_model():
    """What the base computes, within the context and in training beside it (a DPO step)."""
    model, single = shard(build(dropout=0.0)), build(dropout=0.0)
    remove_lora(single)
    for _ in range(2):
        with torch.no_grad(), disable_adapters(model):
            base = model(batch())
        expected = single(batch())
        assert (base - expected).norm() <= 1e-13 * expected.norm()
        assert (model(batch()) - expected).norm() > 1e-3 * expected.norm()
        train(model, range(1))
    model = shard(build(modules_to_save=["1.down"]))
    words = "1.down.weight is sharded", "adapter instead of modules_to_save"
    refused(lambda: disable_adapters(model).__enter__(), *words)
    model.eval()(batch())
    refused(lambda: disable_adapters(model).__enter__(), *words)


def check_adapters_of_a_sharded_model_stay_in_it():
    for options in ({}, {"reshard_after_forward": False}):
        model = shard(build().eval(), **options)
        for _ in range(2):
            before = list(model.modules())
            expected = model(batch())
            refused(lambda m=model: remove_lora(m), "0.up.weight is sharded", "disable_adapters")
            assert list(model.modules()) == before
            assert torch.equal(model(batch()), expected)
    torch.manual_seed(3)
    plain = shard(nn.Sequential(nn.Sequential(nn.Linear(16, 16))))
    refused(lambda: apply_lora(plain, 2), "0.0: its weight is sharded already", "fully_shard")
    assert type(plain[0][0]) is nn.Linear


def check_files_of_a_wrapped_model():
    """Under DDP and torch.compile the files have the names of the model itself."""
    with shared_folder() as folder:
        model = DistributedDataParallel(build(), static_graph=True)
        train(model)
        save_adapter(model, folder)
        dist.barrier()
        single = build()
        remove_lora(single)
        load_adapter(single, folder)
        require_close(model.module, single, 0)
        again = torch.compile(DistributedDataParallel(build()), backend="eager")
        load_adapter(again, folder)
        require_close(model.module, again._orig_mod.module, 0)
        save_adapter(again, folder + "/again")
        dist.barrier()
        weights = [f"{folder}/{name}adapter_model.safetensors" for name in ("", "again/")]
        one, two = (load_file(path) for path in weights)
        assert sorted(one) == sorted(two)
        assert all(torch.equal(one[key], two[key]) for key in one)
        assert "base_model.model.0.up.lora_A.weight" in one


def check_the_training_recipe_on_a_sharded_model():
    model = shard(build())
    optimizer, data = optimizer_of(model), [(batch(), batch())] * 3
    torch.manual_seed(5 + dist.get_rank())
    args = {"progress": False, "max_grad_norm": 0.5}
    history = train_model(model, data, nn.MSELoss(), optimizer, **args)
    single = build()
    expected = optimizer_of(single)
    generators = [torch.Generator().manual_seed(5 + rank) for rank in range(dist.get_world_size())]
    for step in range(3):
        single.zero_grad()
        for rank, generator in enumerate(generators):
            torch.set_rng_state(generator.get_state())
            loss = nn.MSELoss()(single(batch()), batch())
            generator.set_state(torch.get_rng_state())
            (loss / dist.get_world_size()).backward()
            if rank == dist.get_rank():
                assert abs(history.loss[step] - loss.item()) <= 1e-10 * loss.item()
        norm = nn.utils.clip_grad_norm_(lora_parameters(single), 0.5)
        assert abs(history.grad_norm[step] - norm.item()) <= 1e-10 * norm.item()
        expected.step()
    require_close(model, single, 1e-10)
    evaluated = evaluate_model(model, data, nn.MSELoss(), progress=False)["loss"]
    truth = evaluate_model(single, data, nn.MSELoss(), progress=False)["loss"]
    assert abs(evaluated - truth) <= 1e-10 * truth
    for wrong in ({"checkpoint": "run.pt"}, {"resume_from": "run.pt"}):
        call = functools.partial(train_model, model, data, nn.MSELoss(), optimizer, **wrong)
        refused(call, next(iter(wrong)), "sharded", "torch.distributed.checkpoint")
    assert not os.path.exists("run.pt")


def check_initialised_after_sharding():
    """Made without memory, sharded, then filled: the base from rank 0, the adapters as in one
    process with rank 0's seed."""
    single = build(torch.float32, dropout=0.0)
    base = {k: v for k, v in single.state_dict().items() if "lora" not in k}
    with torch.device("meta"):
        model = nn.Sequential(Block(False), Block(False))
        apply_lora(model, 4, alpha=8)
    shard(model).to_empty(device="cpu")
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    set_model_state_dict(model, base if dist.get_rank() == 0 else {}, options=options)
    require_equal_draws(model, single)


def check_save_pretrained_of_a_sharded_model():
    """With the gathered state, as Trainer hands it over, rank 0 alone makes the call; without it
    all ranks do. Neither may wait for the other."""
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(3)
    model = LlamaForCausalLM(config)
    single = LlamaForCausalLM(config)
    single.load_state_dict(model.state_dict())
    apply_lora(model, 4, alpha=8, modules_to_save=["lm_head"])
    for parameter in lora_parameters(model):
        nn.init.normal_(parameter, std=0.2)
    fully_shard(model.model.layers[0])
    fully_shard(model)
    expected = [whole(p).detach().clone() for p in lora_parameters(model)]
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    with shared_folder() as folder:
        if dist.get_rank() == 0:
            model.save_pretrained(folder + "/one", state_dict=state)
        dist.barrier()
        # Transformers gathers by itself only what it has sharded by itself.
        with mock.patch.object(LlamaForCausalLM, "save_pretrained", autospec=True):
            model.save_pretrained(folder + "/all", is_main_process=dist.get_rank() == 0)
        dist.barrier()
        for name in ("one", "all"):
            if name == "all":
                remove_lora(single)
            load_adapter(single, f"{folder}/{name}")
            for one, two in zip(lora_parameters(single), expected, strict=True):
                assert torch.equal(one, two), name
