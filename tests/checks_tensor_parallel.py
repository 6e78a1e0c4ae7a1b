"""On two ranks: the ops on DTensors and the parallel styles against one process, in fp64."""

import itertools

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from lora_kernels import (
    FusedLoRALinear,
    apply_lora,
    lora_add,
    lora_add_,
    lora_linear,
    lora_parameters,
    merge_lora,
    unmerge_lora,
)
from lora_kernels.distributed import ColwiseParallelLoRA, RowwiseParallelLoRA

WHOLE, ROWS, COLUMNS = Replicate(), Shard(0), Shard(1)
OURS = ColwiseParallelLoRA, RowwiseParallelLoRA
STOCK = ColwiseParallel, RowwiseParallel


def mesh():
    return init_device_mesh("cpu", (dist.get_world_size(),))


def close(one, two):
    """Sums over ranks are added in another order: a few units in the last place of fp64."""
    one = one.full_tensor() if isinstance(one, DTensor) else one
    assert one.shape == two.shape
    error = (one - two).norm() / max(two.norm(), 1)
    assert error <= 1e-14, error


def tensors(M, K, N, r, add=False):
    torch.manual_seed(1)
    shapes = ((M, N), (M, K), (r, K), (N, r)) if add else ((M, K), (N, K), (r, K), (N, r), (N,))
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def against_one_process(op, given, placements, p):
    ours = [
        distribute_tensor(t, mesh(), [placement]).requires_grad_()
        for t, placement in zip(given, placements, strict=True)
    ]
    given = [t.clone().requires_grad_() for t in given]
    args = {"scaling": 2.0, "dropout_p": p, "seed": 5}
    expected, got = op(*given, **args), op(*ours, **args)
    dy = torch.randn_like(expected)
    expected.backward(dy)
    got.backward(distribute_tensor(dy, mesh(), [WHOLE]))
    close(got, expected)
    for one, two in zip(ours, given, strict=True):
        close(one.grad, two.grad)
    return got


def check_lora_linear_with_any_placements():
    given = tensors(12, 32, 20, 3)
    matrix = (WHOLE, ROWS, COLUMNS)
    for p in (0.0, 0.3):
        for placements in itertools.product(matrix, matrix, matrix, matrix):
            against_one_process(lora_linear, given, (*placements, ROWS), p)
    y = against_one_process(lora_linear, given, (COLUMNS, COLUMNS, COLUMNS, WHOLE, WHOLE), 0.3)
    assert y.placements == (Partial(),)
    y = against_one_process(lora_linear, given, (ROWS, WHOLE, WHOLE, WHOLE, WHOLE), 0.3)
    assert y.placements == (ROWS,)


def check_lora_add_with_any_placements():
    given = tensors(12, 32, 20, 3, add=True)
    matrix = (WHOLE, ROWS, COLUMNS)
    for p in (0.0, 0.3):
        for placements in itertools.product(matrix, matrix, matrix, matrix):
            against_one_process(lora_add, given, placements, p)


def check_sizes_that_do_not_divide():
    for M, K, N in ((3, 20, 5), (1, 3, 7), (5, 24, 1), (2, 8, 3)):
        for p in (0.0, 0.3):
            for weight in (ROWS, COLUMNS, WHOLE):
                for x in (ROWS, COLUMNS, WHOLE):
                    placements = (x, weight, weight, weight, WHOLE)
                    against_one_process(lora_linear, tensors(M, K, N, 2), placements, p)


def check_lora_add_in_place():
    base, x, a, b = tensors(12, 32, 20, 3, add=True)
    expected = lora_add(base, x, a, b)
    m = mesh()
    for placement in (WHOLE, ROWS, COLUMNS):
        ours = [distribute_tensor(t.clone(), m, [placement]) for t in (base, x, a, b)]
        local = ours[0].to_local()
        lora_add_(*ours)
        close(ours[0], expected)
        assert ours[0].placements == (placement,)
        assert ours[0].to_local().data_ptr() == local.data_ptr()
    share = base / dist.get_world_size()
    partial = DTensor.from_local(share, m, [Partial()])
    lora_add_(partial, *(distribute_tensor(t, m, [WHOLE]) for t in (x, a, b)))
    close(partial, expected)
    odd = DTensor.from_local(base, m, [Partial("max")])
    refused(lambda: lora_add_(odd, *ours[1:]), "base_out", "use lora_add")


def refused(call, *words, error=ValueError):
    try:
        call()
    except error as caught:
        message = str(caught)
    else:
        raise AssertionError(f"nothing raised; expected {error.__name__} with {words}")
    for word in words:
        assert word in message, message


def block(**options):
    """An up and a down projection as in a transformer's MLP, with adapters that do something."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(32, 64), nn.SiLU(), nn.Linear(64, 32)).double()
    apply_lora(model, 4, alpha=8, **options)
    for parameter in lora_parameters(model):
        nn.init.normal_(parameter, std=0.2)
    return model


def train(model, x, steps=3):
    """Losses, and the gradients of the first step."""
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=1e-2)
    losses, gradients = [], None
    for step in range(steps):
        torch.manual_seed(step)
        loss = model(x).square().mean()
        losses.append(loss.item())
        loss.backward()
        if gradients is None:
            gradients = [p.grad.clone() for p in lora_parameters(model)]
        optimizer.step()
        optimizer.zero_grad()
    return torch.tensor(losses, dtype=torch.float64), gradients


def check_styles_train_as_one_process():
    x = torch.randn(2, 6, 32, dtype=torch.float64)
    dora = {"use_dora": True}
    for options in ({}, {"dropout": 0.25}, dora, dora | {"dropout": 0.25}):
        expected = train(single := block(**options), x)
        for colwise, rowwise in (OURS, STOCK):
            model = block(**options)
            plan = {"0": colwise(), "2": rowwise()}
            losses, gradients = train(parallelize_module(model, mesh(), plan), x)
            assert torch.allclose(losses, expected[0], rtol=1e-13)
            for one, two in zip(gradients, expected[1], strict=True):
                close(one, two)
            for one, two in zip(model.parameters(), single.parameters(), strict=True):
                # Adam divides by the root of the second moment: small gradients lose digits there.
                assert (one.full_tensor() - two).norm() <= 1e-10 * two.norm()


def check_styles_place_the_adapters():
    model = parallelize_module(
        block(init="pissa"), mesh(), {"0": ColwiseParallelLoRA(), "2": RowwiseParallelLoRA()}
    )
    placed = {name: t.placements[0] for name, t in model.state_dict().items()}
    up = {"weight": ROWS, "bias": ROWS, "lora_A": WHOLE, "lora_B": ROWS}
    down = {"weight": COLUMNS, "bias": WHOLE, "lora_A": COLUMNS, "lora_B": WHOLE}
    for layer in (up, down):
        layer |= {"pissa_A": layer["lora_A"], "pissa_B": layer["lora_B"]}
    assert placed == {f"0.{k}": v for k, v in up.items()} | {f"2.{k}": v for k, v in down.items()}
    assert [p.requires_grad for p in model[0].parameters()] == [False, False, True, True]


def check_styles_communicate_once():
    """Forward: one all-reduce after the row-parallel layer. Backward: one for the input's gradient
    and one for each replicated adapter."""
    model = block(dropout=0.25)
    parallelize_module(model, mesh(), {"0": ColwiseParallelLoRA(), "2": RowwiseParallelLoRA()})
    x = torch.randn(2, 6, 32, dtype=torch.float64, requires_grad=True)
    with CommDebugMode() as forward:
        y = model(x)
    assert forward.get_total_counts() == 1
    with CommDebugMode() as backward:
        y.sum().backward()
    assert backward.get_total_counts() == 1
    assert [p.grad.placements[0] for p in lora_parameters(model)] == [
        Partial(), ROWS, COLUMNS, Partial()
    ]  # fmt: skip


def check_compiled_layers_and_inference():
    x = torch.randn(2, 6, 32, dtype=torch.float64)
    single, model = block(dropout=0.25), block(dropout=0.25)
    parallelize_module(model, mesh(), {"0": ColwiseParallelLoRA(), "2": RowwiseParallelLoRA()})
    for one in (torch.compile(model, backend="aot_eager"), single):
        torch.manual_seed(7)
        one(x).square().sum().backward()
    for one, two in zip(lora_parameters(model), lora_parameters(single), strict=True):
        close(one.grad, two.grad)
    model.eval(), single.eval()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            close(model(x), single(x))


def check_sequence_parallel_layouts():
    x = torch.randn(2, 6, 32, dtype=torch.float64)
    single = block(dropout=0.25)
    torch.manual_seed(7)
    expected = single(x)
    expected.square().sum().backward()
    plan = {
        "0": ColwiseParallelLoRA(input_layouts=Shard(1)),
        "2": RowwiseParallelLoRA(output_layouts=Shard(1), use_local_output=False),
    }
    model = parallelize_module(block(dropout=0.25), mesh(), plan)
    torch.manual_seed(7)
    y = model(distribute_tensor(x, mesh(), [Shard(1)]))
    assert y.placements == (Shard(1),)
    y.square().sum().backward()
    close(y, expected)
    for one, two in zip(lora_parameters(model), lora_parameters(single), strict=True):
        close(one.grad, two.grad)


def check_merge_of_sharded_layers():
    x = torch.randn(4, 32, dtype=torch.float64)
    model = block()
    expected = model(x)
    parallelize_module(model, mesh(), {"0": ColwiseParallelLoRA(), "2": RowwiseParallelLoRA()})
    before = [p.full_tensor() for p in model.parameters()]
    merge_lora(model)
    close(model(x), expected)
    unmerge_lora(model)
    assert all(map(torch.equal, before, (p.full_tensor() for p in model.parameters())))


def check_mismatched_placements_are_refused():
    m = mesh()
    x, w, a, b, bias = tensors(12, 32, 20, 3)
    sharded = [distribute_tensor(t, m, [WHOLE]) for t in (x, w, a, b, bias)]
    mixed = [*sharded[:2], a, *sharded[3:]]
    refused(lambda: lora_linear(*mixed), "lora_a", "got a Tensor", "apply_lora")
    other = init_device_mesh("cpu", (1, dist.get_world_size()))
    mixed[2] = distribute_tensor(a, other, [WHOLE, WHOLE])
    refused(lambda: lora_linear(*mixed), "lora_a", "got a DTensor on DeviceMesh")

    model = block()
    layer = model[0]
    layer.lora_B = nn.Parameter(distribute_tensor(layer.lora_B, m, [COLUMNS]))
    before = dict(layer.named_parameters())
    plan = {"0": ColwiseParallelLoRA()}
    refused(lambda: parallelize_module(model, m, plan), "lora_B is sharded already", "Shard(dim=1)")
    assert all(before[name] is p for name, p in layer.named_parameters())
    assert not layer._forward_pre_hooks

    plain = nn.Sequential(nn.Linear(32, 32))
    plan = {"0": RowwiseParallelLoRA()}
    refused(lambda: parallelize_module(plain, m, plan), "got Linear", "apply_lora", error=TypeError)
    parallelize_module(plain, m, {"0": ColwiseParallel()})
    weight = plain[0].weight
    refused(lambda: apply_lora(plain, 2), "0: its weight is sharded already", "before")
    assert type(plain[0]) is nn.Linear
    assert plain[0].weight is weight

    ready = FusedLoRALinear(32, 16, 2, dtype=torch.float64)
    weight = distribute_tensor(ready.weight.detach(), m, [ROWS])
    ready.weight = nn.Parameter(weight, requires_grad=False)
    parallelize_module(ready, m, ColwiseParallelLoRA())
    assert ready.lora_B.placements == (ROWS,)
