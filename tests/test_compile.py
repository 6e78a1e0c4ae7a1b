"""torch.compile, export, AOTAutograd and selective activation checkpoints."""

import io
import shutil
from functools import partial

import oracle
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

from lora_kernels import FusedLoRALinear, apply_lora, lora_linear, lora_parameters

ops = torch.ops.lora_kernels
K, N, R = 40, 24, 4
# Other backends than Inductor where the generated code is not the point: seconds against minutes.
needs_compiler = pytest.mark.skipif(
    not shutil.which("c++"), reason="Inductor needs a C++ compiler, none found"
)


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()


def make(seed=0, **options):
    torch.manual_seed(seed)
    layer = FusedLoRALinear.from_linear(nn.Linear(K, N), R, **{"alpha": 8, **options})
    nn.init.normal_(layer.lora_B, std=0.2)
    return layer


def rows(*leading):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(*leading, K, generator=generator)


def results(function, x, leaves):
    """y and the gradients of x and of `leaves`."""
    x = x.detach().requires_grad_()
    y = function(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *leaves])]


def assert_equal(ours, theirs, exact=True):
    for one, two in zip(ours, theirs, strict=True):
        assert torch.equal(one, two) if exact else (one - two).norm() <= 1e-6 * two.norm()


def seeded(layer, x, seed):
    """The layer with a dropout mask that a compiled graph and eager mode share."""
    y = lora_linear(
        x, layer.weight, layer.lora_A, layer.lora_B, layer.bias, scaling=2.0, dropout_p=0.3,
        seed=seed,
    )  # fmt: skip
    return torch.tanh(y)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=needs_compiler)])
def test_one_graph_of_the_layer_with_dropout(backend):
    layer = make()
    leaves = [layer.lora_A, layer.lora_B]
    compiled = torch.compile(seeded, fullgraph=True, backend=backend)
    for seed in (torch.tensor(5), torch.tensor(6)):
        ours = results(lambda x, s=seed: compiled(layer, x, s), rows(2, 3), leaves)
        theirs = results(lambda x, s=seed: seeded(layer, x, s), rows(2, 3), leaves)
        assert_equal(ours, theirs, exact=backend == "aot_eager")


@pytest.mark.parametrize("training", [True, False])
def test_one_graph_for_every_number_of_rows(training):
    layer = make(dropout=0.2).train(training)
    leaves = [layer.lora_A, layer.lora_B]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for count in (3, 5, 64, 200):
        x = rows(2, count)
        torch._dynamo.mark_dynamic(x, 1)
        torch.manual_seed(3)
        y = compiled(x)
        ours = [y, *torch.autograd.grad(y.sum(), leaves)]
        torch.manual_seed(3)
        y = layer(x)
        assert_equal(ours, [y, *torch.autograd.grad(y.sum(), leaves)])
    assert counter.frame_count == 1


def test_rows_become_dynamic_by_themselves():
    layer, counter = make(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for count in (3, 5, 7, 128, 1000):
        assert_equal(results(compiled, rows(count), [layer.lora_A]),
                     results(layer, rows(count), [layer.lora_A]))  # fmt: skip
    assert counter.frame_count == 2  # the second number of rows makes them dynamic


def test_layers_share_a_graph_where_scaling_is_equal():
    """torch specialises Python floats, attributes and arguments alike, that reach no tensor
    arithmetic: every other scaling is a graph of its own, eight of them (recompile_limit) at
    most."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda layer, x: layer(x), fullgraph=True, backend=counter)
    for seed, alpha, graphs in ((0, 8, 1), (1, 8, 1), (2, 4, 2), (3, 4, 2), (4, 8, 2)):
        layer = make(seed, alpha=alpha)
        assert torch.equal(compiled(layer, rows(3)), layer(rows(3)))
        assert counter.frame_count == graphs


def test_one_graph_for_all_values_of_a_tensor_s_scaling():
    layer, counter = make(), CompileCounterWithBackend("aot_eager")
    leaves = [layer.lora_A, layer.lora_B]

    def scaled(x, scaling):
        A, B = layer.lora_A, layer.lora_B
        return lora_linear(x, layer.weight, A, B, layer.bias, scaling=scaling)

    compiled = torch.compile(scaled, fullgraph=True, backend=counter)
    for value in (0.0, 1.0, 2.0, -3.5, 1e-3):
        scaling = torch.tensor(value)
        ours = results(lambda x, s=scaling: compiled(x, s), rows(3), leaves)
        assert_equal(ours, results(lambda x, s=scaling: scaled(x, s), rows(3), leaves))
        expected = results(lambda x, s=value: scaled(x, s), rows(3), leaves)
        assert_equal(ours[:1], expected[:1], exact=False)
    assert counter.frame_count == 1


@pytest.mark.parametrize("strict", [True, False])
def test_export_with_a_tensor_s_scaling(strict):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = make()

        def forward(self, x, scaling):
            A, B = self.layer.lora_A, self.layer.lora_B
            return lora_linear(x, self.layer.weight, A, B, self.layer.bias, scaling=scaling)

    module = Scaled()
    program = torch.export.export(module, (rows(3), torch.tensor(1.0)), strict=strict).module()
    for value in (2.0, -0.5):
        assert_equal([program(rows(3), torch.tensor(value))],
                     [module(rows(3), torch.tensor(value))])  # fmt: skip


@pytest.mark.parametrize("layout", oracle.LAYOUTS)
def test_views_as_inputs(layout):
    layer = make()
    x = oracle.lay_out(rows(6), layout)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    leaves = [layer.lora_A, layer.lora_B]
    assert_equal(results(compiled, x, leaves), results(layer, x, leaves))

    def inside(x):  # the view is made within the graph
        return layer(oracle.lay_out(x, layout))

    compiled = torch.compile(inside, fullgraph=True, backend="aot_eager")
    assert_equal(results(compiled, rows(6), leaves), results(inside, rows(6), leaves))


def test_merged_and_disabled_layers_compile():
    layer = make().requires_grad_(False)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    first = compiled(rows(3))
    layer.merge()
    torch.testing.assert_close(compiled(rows(3)), layer(rows(3)))
    layer.unmerge()
    assert torch.equal(compiled(rows(3)), first)


# ------------------------------------------------------------------------------- whole models


def model_of(name="llama", **options):
    tiny_models = pytest.importorskip("tiny_models")
    model = tiny_models.build(name, num_hidden_layers=1)
    apply_lora(model, 4, alpha=8, **options)
    torch.manual_seed(1)
    for parameter in lora_parameters(model):
        nn.init.normal_(parameter, std=0.1)
    return model, tiny_models.inputs("llama")["input_ids"]


def logits_and_gradients(forward, model, tokens):
    model.zero_grad()
    torch.manual_seed(5)
    scores = forward(input_ids=tokens, use_cache=False).logits
    nn.functional.cross_entropy(scores.flatten(0, 1), tokens.flatten()).backward()
    return [scores.detach(), *(p.grad.clone() for p in lora_parameters(model))]


@pytest.mark.parametrize(
    ("name", "backend", "training"),
    [
        ("llama", "aot_eager", True),
        ("llama", "aot_eager", False),
        ("gpt2", "aot_eager", True),
        pytest.param("llama", "inductor", True, marks=needs_compiler),
    ],
)
def test_one_graph_of_a_transformers_model(name, backend, training):
    # Inductor draws other seeds from the same generator, so no dropout with it.
    model, tokens = model_of(name, dropout=0.1 if backend == "aot_eager" else 0.0)
    model.train(training)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    ours = logits_and_gradients(compiled, model, tokens)
    assert counter.frame_count == 1
    theirs = logits_and_gradients(model, model, tokens)
    for one, two in zip(ours, theirs, strict=True):
        assert (one - two).norm() <= 1e-5 * two.norm()


# ------------------------------------------------------------------------------- export, AOT


@pytest.mark.parametrize("strict", [True, False])
def test_export(strict):
    model = nn.Sequential(make(dropout=0.2), nn.Tanh(), nn.Linear(N, 3)).eval()
    count = torch.export.Dim("rows")
    shapes = ({0: count},)
    program = torch.export.export(model, (rows(3),), strict=strict, dynamic_shapes=shapes)
    targets = [n.target for n in program.graph.nodes if n.op == "call_function"]
    assert targets.count(ops.lora_linear.default) == 1
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    for exported in (program, torch.export.load(buffer)):
        assert torch.equal(exported.module()(rows(7)), model(rows(7)))


@pytest.mark.parametrize("strict", [True, False])
def test_export_of_a_transformers_model(strict):
    model, tokens = model_of()
    program = torch.export.export(model, (), {"input_ids": tokens, "use_cache": False},
                                  strict=strict)  # fmt: skip
    targets = [n.target for n in program.graph.nodes if n.op == "call_function"]
    assert targets.count(ops.lora_linear.default) == 7
    exported = program.module()(input_ids=tokens, use_cache=False)
    assert torch.equal(exported.logits, model(tokens, use_cache=False).logits)


def test_aot_function_sees_both_ops():
    from functorch.compile import aot_function, make_boxed_func

    layer, graphs = make(), []

    def keep(graph, example_inputs):
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return make_boxed_func(graph.forward)

    leaves = [p.detach().requires_grad_() for p in (layer.weight, layer.lora_A, layer.lora_B)]
    options = {"scaling": 2.0, "dropout_p": 0.3}

    def function(x, weight, a, b, seed):
        return lora_linear(x, weight, a, b, **options, seed=seed)

    traced, seed = aot_function(function, fw_compiler=keep, bw_compiler=keep), torch.tensor(5)
    ours, theirs = (
        results(lambda x, f=f: f(x, *leaves, seed), rows(3), leaves) for f in (traced, function)
    )
    assert_equal(ours, theirs)
    assert [ops.lora_linear.default in graphs[0], ops.lora_linear_backward.default in graphs[1]]
    assert ops.lora_linear.default not in graphs[1]


# ------------------------------------------------------------- flops, activation checkpoints


def test_flops_of_a_training_step():
    layer, M = make(), 6
    with FlopCounterMode(display=False) as counter:
        y = layer(rows(M).requires_grad_())
        forward = counter.get_total_flops()
        y.sum().backward()
    assert forward == 2 * M * (K * N + R * (K + N))
    # dx reads the frozen weight; ds, dx, dA and dB the factors. Nothing for dW.
    assert counter.get_total_flops() - forward == 2 * M * (K * N + R * (2 * K + 2 * N))


def nothing_saved():
    return create_selective_checkpoint_contexts([])


def op_saved():
    return create_selective_checkpoint_contexts([ops.lora_linear.default])


def op_recomputed():
    def policy(ctx, op, *args, **kwargs):
        again = op is ops.lora_linear.default
        return CheckpointPolicy.MUST_RECOMPUTE if again else CheckpointPolicy.MUST_SAVE

    return create_selective_checkpoint_contexts(policy)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    ("contexts", "forwards"), [(nothing_saved, 2), (op_saved, 1), (op_recomputed, 2)]
)
def test_selective_checkpoints_name_the_op(contexts, forwards, dropout, kernel_calls):
    layer = make(dropout=dropout).train()
    leaves = [layer.lora_A, layer.lora_B]

    def block(x):
        return torch.tanh(layer(torch.sin(x)))

    torch.manual_seed(3)
    expected = results(block, rows(6), leaves)
    assert [name for name, _ in kernel_calls] == ["lora_linear", "lora_linear_backward"]
    kernel_calls.clear()
    kept = partial(checkpoint, block, use_reentrant=False, context_fn=contexts)
    torch.manual_seed(3)
    assert_equal(results(kept, rows(6), leaves), expected)
    names = [name for name, _ in kernel_calls]
    assert names == ["lora_linear"] * forwards + ["lora_linear_backward"]


@pytest.mark.parametrize(("saved", "forwards"), [([], 2), ([ops.lora_linear.default], 1)])
def test_selective_checkpoints_in_a_compiled_graph(saved, forwards, kernel_calls):
    layer, seed = make(), torch.tensor(5)

    def kept(x):
        contexts = partial(create_selective_checkpoint_contexts, saved)
        return checkpoint(seeded, layer, x, seed, use_reentrant=False, context_fn=contexts)

    leaves = [layer.lora_A, layer.lora_B]
    compiled = torch.compile(kept, backend="aot_eager_decomp_partition", fullgraph=True)
    expected = results(lambda x: seeded(layer, x, seed), rows(6), leaves)
    kernel_calls.clear()
    # The decomposed backward of tanh rounds otherwise.
    assert_equal(results(compiled, rows(6), leaves), expected, exact=False)
    names = [name for name, _ in kernel_calls]
    assert names == ["lora_linear"] * forwards + ["lora_linear_backward"]
