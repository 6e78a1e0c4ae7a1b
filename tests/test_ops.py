"""The contract of the raw ops: opcheck, derivatives that must not exist, what is saved, memory."""

import itertools

import oracle
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lora_kernels import lora_add, lora_linear
from lora_kernels._namespace import NAMESPACE, ops
from lora_kernels.backends import blocked, reference
from lora_kernels.branch import Branch, Dense, Given, Need

M, K, N, R = 12, 20, 16, 3
PLAIN = [torch.float32, torch.float64, torch.bfloat16]


def inputs(dtype=torch.float64, adapter_dtype=None, grad=True, m=M):
    torch.manual_seed(1)
    low = adapter_dtype or dtype
    shapes = {"x": (m, K), "weight": (N, K), "a": (R, K), "b": (N, R), "bias": (N,), "base": (m, N)}
    return {
        name: torch.randn(shape).to(low if name in "ab" else dtype).requires_grad_(grad)
        for name, shape in shapes.items()
    }


def branch(p):
    return 2.0, p, torch.tensor(5) if p else None


def call(name, t, p, save=True, need=None):
    """The argument tuple of an op."""
    s = torch.randn(len(t["x"]), R).to(t["x"].dtype)
    dy = torch.randn_like(t["base"])
    args = {
        "lora_linear": (t["x"], t["weight"], t["a"], t["b"], t["bias"], *branch(p), save),
        "lora_add": (t["base"], t["x"], t["a"], t["b"], *branch(p), save),
        "lora_add_": (t["base"], t["x"], t["a"], t["b"], *branch(p)),
        "lora_linear_backward": (dy, t["x"], t["weight"], t["a"], t["b"], s, *branch(p)),
        "lora_add_backward": (dy, t["x"], t["a"], t["b"], s, *branch(p)),
    }[name]
    if name.endswith("backward"):
        args += need or (True,) * (4 if "linear" in name else 3)
    return args


ALL = ("lora_linear", "lora_add", "lora_add_", "lora_linear_backward", "lora_add_backward")


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", PLAIN)
@pytest.mark.parametrize("name", ALL)
def test_opcheck(name, dtype, p):
    forward = name in ("lora_linear", "lora_add")
    t = inputs(dtype, grad=forward)
    with torch.set_grad_enabled(name != "lora_add_"):
        torch.library.opcheck(getattr(ops, name).default, call(name, t, p))


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradcheck(p):
    t, args = inputs(), {"scaling": 0.7, "dropout_p": p, "seed": 3}
    tensors = (t["x"], t["weight"], t["a"], t["b"], t["bias"])
    assert torch.autograd.gradcheck(lambda *v: lora_linear(*v, **args), tensors)
    tensors = (t["base"], t["x"], t["a"], t["b"])
    assert torch.autograd.gradcheck(lambda *v: lora_add(*v, **args), tensors)


@pytest.mark.parametrize("name", ["lora_linear", "lora_add"])
def test_s_is_not_differentiable(name):
    y, s = getattr(ops, name)(*call(name, inputs(), 0.0))
    assert y.requires_grad
    assert s.shape == (M, R)
    assert not s.requires_grad


def both(t, p=0.0):
    args = {"dropout_p": p, "seed": 3}
    return {
        "linear": lambda: lora_linear(t["x"], t["weight"], t["a"], t["b"], t["bias"], **args),
        "add": lambda: lora_add(t["base"], t["x"], t["a"], t["b"], **args),
    }


@pytest.mark.parametrize("wanted", ["x", "a", "b"])
@pytest.mark.parametrize("name", ["linear", "add"])
def test_double_backward_raises(name, wanted):
    t = inputs()
    loss = both(t)[name]().square().sum()
    (grad,) = torch.autograd.grad(loss, t[wanted], create_graph=True)
    assert grad.requires_grad
    with pytest.raises(NotImplementedError, match="double backward"):
        torch.autograd.grad(grad.square().sum(), t["x"])


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    ("name", "which"),
    [("linear", v) for v in ("x", "weight", "a", "b", "bias")]
    + [("add", v) for v in ("base", "x", "a", "b")],
)
def test_forward_mode_raises(name, grad, which):
    t = inputs(grad=grad)

    def function(value):
        return both({**t, which: value})[name]()

    message = "lora_kernels: forward-mode AD"
    value = t[which].detach()
    with pytest.raises(NotImplementedError, match=message):
        torch.func.jvp(function, (value,), (value,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(value, torch.ones_like(value))
        with pytest.raises(NotImplementedError, match=message):
            function(dual)
        with torch.no_grad(), pytest.raises(NotImplementedError, match=message):
            function(dual)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("name", ["lora_linear_backward", "lora_add_backward"])
def test_backward_computes_what_is_asked_for(name, p):
    t, width = inputs(grad=False), 4 if "linear" in name else 3
    torch.manual_seed(2)
    full = getattr(ops, name)(*call(name, t, p))
    for need in itertools.product((False, True), repeat=width):
        torch.manual_seed(1)
        inputs_again = inputs(grad=False)
        got = getattr(ops, name)(*call(name, inputs_again, p, need=need))
        for value, expected, needed in zip(got, full, need, strict=True):
            assert value.shape == (expected.shape if needed else (0,))


class Calls(TorchDispatchMode):
    """Arguments of every dispatched op of this library."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == NAMESPACE:
            self.seen.append((func.__name__.split(".")[0], args))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("need", [*itertools.product((False, True), repeat=5)])
def test_needs_input_grad_reaches_the_op(need):
    t, names = inputs(grad=False), ("x", "weight", "a", "b", "bias")
    for name, needed in zip(names, need, strict=True):
        t[name].requires_grad_(needed)
    if not any(need):
        assert not both(t)["linear"]().requires_grad
        return
    with Calls() as calls:
        both(t, p=0.3)["linear"]().sum().backward()
    (forward, fargs), *backward = calls.seen
    assert forward == "lora_linear"
    assert fargs[-1] == need[3]
    expected = [("lora_linear_backward", need[:4])] if any(need[:4]) else []
    assert [(name, args[-4:]) for name, args in backward] == expected
    for name, needed in zip(names, need, strict=True):
        assert (t[name].grad is not None) == needed


@pytest.mark.parametrize("need", [*itertools.product((False, True), repeat=4)])
def test_needs_input_grad_reaches_lora_add(need):
    t, names = inputs(grad=False), ("base", "x", "a", "b")
    for name, needed in zip(names, need, strict=True):
        t[name].requires_grad_(needed)
    if not any(need):
        return
    with Calls() as calls:
        both(t)["add"]().sum().backward()
    assert calls.seen[0][1][-1] == need[3]
    assert [args[-3:] for _, args in calls.seen[1:]] == ([need[1:]] if any(need[1:]) else [])
    for name, needed in zip(names, need, strict=True):
        assert (t[name].grad is not None) == needed


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("name", ["linear", "add"])
def test_saved_beyond_inputs_is_rank_sized(name, p):
    t, saved = inputs(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda v: saved.append(v) or v, lambda v: v):
        both(t, p)[name]()
    own = {v.data_ptr() for v in t.values()}
    extra = [v for v in saved if v.numel() and v.data_ptr() not in own]
    assert sum(v.numel() for v in extra) == M * R + (1 if p else 0)


def test_x_is_saved_only_for_the_gradients_that_read_it():
    t, saved = inputs(grad=False), []
    t["b"].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda v: saved.append(v) or v, lambda v: v):
        both(t)["linear"]()
    assert t["x"].data_ptr() not in {v.data_ptr() for v in saved}


def test_lora_b_that_trains_needs_s():
    with pytest.raises(RuntimeError, match="save_s=True"):
        ops.lora_linear(*call("lora_linear", inputs(), 0.0, save=False))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("wide", [False, True], ids=["plain", "wide"])
@pytest.mark.parametrize("name", [n for n in ALL if n != "lora_add_"])
def test_pure_deterministic_and_fully_written(name, p, wide, monkeypatch):
    """No input changes, no output aliases one, equal bits on poisoned memory."""
    monkeypatch.setattr(blocked, "_multiplies", lambda dtype: not wide)
    monkeypatch.setattr(blocked, "_CPU_BLOCK_BYTES", 400)
    args = call(name, inputs(torch.bfloat16, torch.float32, grad=False), p)
    tensors = [v for v in args if isinstance(v, torch.Tensor)]
    before = [v.clone() for v in tensors]
    first = getattr(ops, name)(*args)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert torch.empty(3).isnan().all()
        second = getattr(ops, name)(*args)
    finally:
        torch.use_deterministic_algorithms(False)
    for one, two in zip(first, second, strict=True):
        assert one.isfinite().all()
        assert torch.equal(one, two)
    # Autograd would cast a gradient of another dtype without a word, so the raw op is asked.
    low = torch.float32 if name.endswith("backward") else torch.bfloat16
    assert [o.dtype for o in first[-2:]] == [low, low]
    assert first[0].dtype == torch.bfloat16
    for value, copy in zip(tensors, before, strict=True):
        assert torch.equal(value, copy)
    storages = {v.untyped_storage().data_ptr() for v in tensors if v.numel()}
    assert storages.isdisjoint(o.untyped_storage().data_ptr() for o in first if o.numel())


def test_lora_add_changes_base_out_alone():
    t = inputs(grad=False)
    expected, _ = ops.lora_add(*call("lora_add", t, 0.3))
    copies = {name: v.clone() for name, v in t.items()}
    ops.lora_add_(*call("lora_add_", t, 0.3))
    assert torch.equal(t["base"], expected)
    assert all(torch.equal(t[n], copies[n]) for n in t if n != "base")


def flops(name, need=None, m=M):
    with FlopCounterMode(display=False) as counter:
        getattr(ops, name)(*call(name, inputs(torch.float32, grad=False, m=m), 0.0, need=need))
    return counter.get_total_flops()


def test_flop_formulas():
    assert flops("lora_linear") == 2 * 12 * (20 * 16 + 3 * 20 + 3 * 16)
    assert flops("lora_add") == 2 * 12 * 3 * (20 + 16)
    dense, wide, narrow = 2 * 12 * 20 * 16, 2 * 12 * 3 * 20, 2 * 12 * 3 * 16
    ds, dx, d_a, d_b = narrow, wide, wide, narrow
    for need in itertools.product((False, True), repeat=4):
        x, w, a, b = need
        low = ds * (x or a) + dx * x + d_a * a + d_b * b
        assert flops("lora_linear_backward", need) == dense * (x + w) + low
        if not w:
            assert flops("lora_add_backward", (x, a, b)) == low


@pytest.mark.parametrize("dtype", PLAIN)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("m", [0, 1])
def test_no_rows_and_one_row(m, p, dtype):
    t = inputs(dtype, m=m)
    for name, function in both(t, p).items():
        y = function()
        assert y.shape == (m, N)
        y.sum().backward()
        for key in ("x", "a", "b"):
            assert t[key].grad.shape == t[key].shape
            assert t[key].grad.any() == bool(m), (name, key)
            t[key].grad = None


class Largest(TorchDispatchMode):
    """Bytes of the largest new tensor that no output shares its memory with."""

    def __init__(self):
        super().__init__()
        self.sizes, self.alive = {}, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                self.sizes[storage.data_ptr()] = storage.nbytes()
                self.alive.append(value)
        return result

    def beside(self, kept):
        own = {v.untyped_storage().data_ptr() for v in kept}
        return max((n for pointer, n in self.sizes.items() if pointer not in own), default=0)


@pytest.mark.parametrize("wide", [False, True], ids=["plain", "wide"])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("name", ["lora_linear", "lora_add", "lora_linear_backward"])
def test_memory_beside_the_outputs(name, p, wide, monkeypatch):
    block_bytes = 32768
    monkeypatch.setattr(blocked, "_multiplies", lambda dtype: not wide)
    monkeypatch.setattr(blocked, "_CPU_BLOCK_BYTES", block_bytes)
    case = oracle.Case(512, 512, 512, 2, torch.bfloat16)
    t, dy = oracle.make(case)
    t["base_out"] = torch.randn_like(dy)
    t = {key: v.detach() for key, v in t.items()}
    a, b, seed = t["lora_a"], t["lora_b"], torch.tensor(1)
    s, none, x = torch.randn(512, 2).bfloat16(), torch.empty(0), t["x"]
    base, branch = Dense(t["weight"], t["bias"]), Branch(a, b, 1.0, p, seed)
    need = Need(True, not wide and not p, True, True)
    run = {
        "lora_linear": lambda: reference.forward(base, x, branch, True),
        "lora_add": lambda: reference.forward(Given(t["base_out"]), x, branch, True),
        "lora_linear_backward": lambda: reference.backward(base, dy, x, s, branch, need),
    }[name]
    with torch.no_grad(), Largest() as memory:
        outputs = [none if output is None else output for output in run()]
    # Rank-sized scratch, or a block; the mask of a block is made of int64 words (8 x an fp32).
    limit = 8 * block_bytes if p or wide else 4 * 512 * 2
    assert memory.beside([*outputs, *t.values(), dy, s, seed, none]) <= limit
