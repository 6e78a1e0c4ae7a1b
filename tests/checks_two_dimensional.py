"""On four ranks: tensor parallel within data parallel, HSDP, and checkpoints for another number of
ranks, against one process."""

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from checks_tensor_parallel import OURS, STOCK, refused
from parallel_problem import (
    STEPS,
    Part,
    batch,
    build,
    by_rank,
    optimizer_of,
    reference,
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
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import parallelize_module

from lora_kernels import load_adapter, lora_parameters, lora_state_dict, remove_lora, save_adapter
from lora_kernels.distributed import ColwiseParallelLoRA


def mesh():
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))


def parallel(model, grid, styles=OURS):
    colwise, rowwise = styles
    plan = {"*.up": colwise(), "*.down": rowwise()}
    parallelize_module(model, grid["tp"], plan)
    return shard(model, mesh=grid["dp"])


def part_of(grid):
    """The ranks of a tp group compute the same rows, with the same seeds."""
    return Part(grid["dp"].get_local_rank(), grid["dp"].size())


def check_tensor_parallel_within_data_parallel():
    grid = mesh()
    for dropout in (0.0, 0.25):
        for styles in (OURS, STOCK):
            model = parallel(build(dropout=dropout), grid, styles)
            require_as_reference(model, build(dropout=dropout), part=part_of(grid))


def check_gradients_of_both_dimensions():
    grid = mesh()
    model, single, part = parallel(build(), grid), build(), part_of(grid)
    x = batch()
    torch.manual_seed(part.index)
    model(x.chunk(2)[part.index]).square().mean().backward()
    for index in range(2):
        torch.manual_seed(index)
        (single(x.chunk(2)[index]).square().mean() / 2).backward()
    for one, two in zip(lora_parameters(model), lora_parameters(single), strict=True):
        assert one.grad.placements == one.placements
        assert torch.allclose(whole(one.grad), two.grad, rtol=1e-12, atol=1e-15)


def check_every_parameter_is_split_twice():
    model = parallel(build(), mesh())
    block = model[0]
    assert block.up.weight.to_local().shape == (8, 16)
    assert block.down.weight.to_local().shape == (8, 16)
    assert block.up.lora_A.to_local().shape == (2, 16)
    assert block.down.lora_A.to_local().shape == (2, 16)
    assert block.up.lora_A.placements == (Shard(0), Replicate())


def check_adapters_drawn_after_sharding():
    """Ranks with different seeds agree on every copy."""
    model, single = parallel(build(), mesh()), build()
    require_equal_draws(model, single)


def check_hybrid_sharding():
    model = shard(build(), mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("copy", "shard")))
    assert model[0].up.weight.to_local().shape == (16, 16)
    require_as_reference(model, build())


def check_checkpoint_of_both_dimensions():
    """Adapters and optimizer, resumed on the same mesh; the adapters also in one process."""
    grid = mesh()
    part = part_of(grid)
    with shared_folder() as folder:
        straight = parallel(build(), grid)
        losses = train(straight, part=part)
        model = parallel(build(), grid)
        optimizer = optimizer_of(model)
        assert train(model, range(1), optimizer=optimizer, part=part) == losses[:1]
        dcp.save(training_state(model, optimizer), checkpoint_id=folder)

        model = parallel(build(), grid)
        optimizer = optimizer_of(model)
        state = training_state(model, optimizer)
        dcp.load(state, checkpoint_id=folder)
        set_training_state(model, optimizer, state)
        assert train(model, range(1, STEPS), optimizer=optimizer, part=part) == losses[1:]
        for one, two in zip(model.parameters(), straight.parameters(), strict=True):
            assert torch.equal(one.to_local(), two.to_local())
        dist.barrier()
        dcp.save(lora_state_dict(model), checkpoint_id=folder + "/adapters")
        single = build()
        state = lora_state_dict(single)
        dcp.load(state, checkpoint_id=folder + "/adapters")
        single.load_state_dict(state, strict=False)
        require_close(model, single, 0)


def check_checkpoint_loads_on_another_mesh():
    """Adapters and optimizer of four FSDP ranks, on two by two."""
    grid = mesh()
    with shared_folder() as folder:
        model = shard(build())
        optimizer = optimizer_of(model)
        train(model, range(2), optimizer=optimizer)
        dcp.save(training_state(model, optimizer), checkpoint_id=folder)
        again = parallel(build(), grid)
        other = optimizer_of(again)
        state = training_state(again, other)
        dcp.load(state, checkpoint_id=folder)
        set_training_state(again, other, state)
    for one, two in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(whole(one), whole(two))
    for one, two in zip(lora_parameters(model), lora_parameters(again), strict=True):
        for key, moment in optimizer.state[one].items():
            assert torch.equal(whole(moment), whole(other.state[two][key])), key


def check_adapter_files_of_both_dimensions():
    grid = mesh()
    with shared_folder() as folder:
        model = parallel(build(), grid)
        train(model, part=part_of(grid))
        save_adapter(model, folder)
        dist.barrier()
        single = build()
        remove_lora(single)
        load_adapter(single, folder)
        model.eval(), single.eval()
        expected = single(batch())
        assert (model(batch()) - expected).norm() <= 1e-13 * expected.norm()
        again = parallel(build(), grid)
        load_adapter(again, folder)
        require_close(again, single, 0)


def check_checkpoint_of_two_ranks_loads_into_four():
    """Saved by a job of two ranks after its first step; four ranks go on as one process would that
    takes the batches in two parts first and in four from then on."""
    two = DeviceMesh("cpu", [0, 1])  # made by all ranks, as every group is
    single = build()
    expected = optimizer_of(single)
    reference(single, steps=range(1), optimizer=expected, part=Part(0, 2))
    with shared_folder() as folder:
        if dist.get_rank() < 2:
            model = shard(build(), mesh=two)
            optimizer = optimizer_of(model)
            train(model, range(1), optimizer=optimizer, part=Part(dist.get_rank(), 2))
            state = training_state(model, optimizer)
            dcp.save(state, checkpoint_id=folder, process_group=two.get_group())
        dist.barrier()

        model = shard(build())
        optimizer = optimizer_of(model)
        state = training_state(model, optimizer)
        dcp.load(state, checkpoint_id=folder)
        set_training_state(model, optimizer, state)
    assert model[0].up.lora_B.to_local().shape == (8, 4)
    require_close(model, single, 1e-10)
    rest = range(1, STEPS)
    losses = train(model, rest, optimizer=optimizer)
    truth = reference(single, steps=rest, optimizer=expected, part=by_rank())
    for one, other in zip(losses, truth, strict=True):
        assert abs(one - other) <= 1e-10 * other
    require_close(model, single, 1e-10)


def check_tensor_parallel_comes_before_fully_shard():
    grid = mesh()
    model = shard(build(), mesh=grid["dp"])
    before = list(model.parameters())
    plan = {"0.up": ColwiseParallelLoRA()}
    refused(
        lambda: parallelize_module(model, grid["tp"], plan),
        "weight is sharded already",
        "parallelize before fully_shard",
    )
    assert all(one is two for one, two in zip(model.parameters(), before, strict=True))
