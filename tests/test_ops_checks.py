"""Bad input to the raw ops, which other libraries and C++ call past `functional`: always a
ValueError or TypeError that names the argument, never a result."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lora_kernels import _checks, _dispatch, backends, lora_add_, lora_linear
from lora_kernels._namespace import ops, qualified

M, K, N, R = 6, 16, 5, 3
FORWARD = ("lora_linear", "lora_add", "lora_add_")
BACKWARD = ("lora_linear_backward", "lora_add_backward")


def good(name):
    """Arguments by name, in the order of the schema."""
    shapes = {
        "x": (M, K), "weight": (N, K), "lora_a": (R, K), "lora_b": (N, R), "bias": (N,),
        "base_out": (M, N), "dy": (M, N), "s": (M, R),
    }  # fmt: skip
    values = {key: torch.randn(shape) for key, shape in shapes.items()}
    values |= {"scaling": 2.0, "dropout_p": 0.0, "seed": None}
    arguments = getattr(ops, name).default._schema.arguments
    return {a.name: values.get(a.name, True) for a in arguments}


def of(*shape, dtype=torch.float32, device="cpu"):
    return torch.ones(shape, dtype=dtype, device=device)


def seed(*values, dtype=torch.int64):
    return {"dropout_p": 0.5, "seed": torch.tensor(values, dtype=dtype)}


# what is wrong, the words that the message has, the error, the ops with such an argument
BAD = [
    ({"x": of(2, 3, K)}, r"x: expected shape \[M, K\], got \(2, 3, 16\)", ValueError, FORWARD),
    ({"x": of(K)}, r"x: expected shape \[M, K\], got \(16,\)", ValueError, FORWARD),
    ({"x": of(M + 1, K)}, "expected shape .* with M = ", ValueError, FORWARD[1:] + BACKWARD),
    ({"weight": of(N, K + 1)}, r"\[N, K\] with K = 16, got \(5, 17\)", ValueError, FORWARD[:1]),
    ({"weight": of(N, K).double()}, "weight: expected x's dtype", TypeError, FORWARD[:1]),
    ({"weight": of(N, K, device="meta")}, "x's device cpu, got meta", ValueError, FORWARD[:1]),
    ({"lora_a": of(R, K + 1)}, "lora_a: .* with K = 16", ValueError, FORWARD + BACKWARD),
    ({"lora_a": of(R + 1, K)}, "lora_b: .* with r = 4", ValueError, FORWARD + BACKWARD),
    ({"lora_a": of(R, K).half()}, "lora_a: expected .* dtype", TypeError, FORWARD + BACKWARD),
    ({"lora_b": of(1, R)}, "lora_b: .* with N = 5", ValueError, FORWARD + BACKWARD),
    ({"lora_a": of(0, K), "lora_b": of(N, 0)}, "r of at least 1", ValueError, FORWARD),
    ({"bias": of(1)}, r"bias: expected shape \[N\] with N = 5", ValueError, FORWARD[:1]),
    ({"bias": of(M, N)}, r"bias: expected shape \[N\], got", ValueError, FORWARD[:1]),
    ({"base_out": of(M, 1)}, "with N = 1", ValueError, FORWARD[1:]),
    ({"base_out": of(M, N).half()}, "x: expected base_out's dtype", TypeError, FORWARD[1:]),
    ({"x": of(M, K, dtype=torch.int64)}, "expected", TypeError, FORWARD),
    ({"dropout_p": 1.0}, r"dropout_p: .* in \[0, 1\), got 1.0", ValueError, FORWARD + BACKWARD),
    ({"dropout_p": -0.5}, "dropout_p", ValueError, FORWARD + BACKWARD),
    ({"dropout_p": float("nan")}, "dropout_p", ValueError, FORWARD + BACKWARD),
    ({"dropout_p": 0.5}, "seed: expected an int64 tensor", ValueError, FORWARD + BACKWARD),
    (seed(1, 2), "seed: .* of one element, or of three", ValueError, FORWARD + BACKWARD),
    (seed(5, dtype=torch.int32), "got torch.int32", ValueError, FORWARD + BACKWARD),
    (seed(5, -1, 0), "seed: expected a row .* got -1", ValueError, FORWARD + BACKWARD),
    (seed(5, 2**32 - M + 1, 0), "end at 2.32 or before", ValueError, FORWARD + BACKWARD),
    (seed(5, 0, 4), "a multiple of 8 .* got 4", ValueError, FORWARD + BACKWARD),
    (seed(5, 0, -8), "a multiple of 8 .* got -8", ValueError, FORWARD + BACKWARD),
    (seed(5, 0, 2**35 - 8), "end at 2.35 or before", ValueError, FORWARD + BACKWARD),
    ({"x": of(M, K).to_sparse()}, "x: .* layout torch.sparse_coo", ValueError, FORWARD),
    ({"lora_a": of(R, K).to_sparse()}, "lora_a: .* layout", ValueError, FORWARD + BACKWARD),
    ({"lora_b": of(N, R).to_mkldnn()}, "lora_b: .* layout", ValueError, FORWARD + BACKWARD),
    ({"base_out": of(M, 1).expand(M, N)}, "base_out: expected elements", ValueError, FORWARD[2:]),
    ({"scaling": float("inf")}, "scaling: expected a finite", ValueError, FORWARD + BACKWARD),
    ({"dy": of(M, N + 1)}, "expected shape .* N = 6", ValueError, BACKWARD),
    ({"dy": of(M, N).half()}, "expected dy's dtype", TypeError, BACKWARD),
    ({"s": of(M, R + 1)}, "s: expected shape .* r = 3", ValueError, BACKWARD),
    ({"s": of(0)}, r"s: expected shape \[M, r\], got \(0,\)", ValueError, BACKWARD),
    ({"x": of(0)}, r"x: expected shape \[M, K\], got \(0,\)", ValueError, BACKWARD),
]
CASES = [(op, *case[:3]) for case in BAD for op in case[3]]


@pytest.mark.parametrize(("name", "wrong", "words", "error"), CASES)
def test_bad_input_is_refused(name, wrong, words, error):
    op, args = getattr(ops, name), good(name)
    op(*args.values())
    args |= wrong
    before = {key: t.clone() for key, t in args.items() if isinstance(t, torch.Tensor)}
    with pytest.raises(error, match=words):
        op(*args.values())
    with torch.inference_mode(), pytest.raises(error, match=words):
        op(*args.values())
    for key, tensor in before.items():
        assert tensor.is_meta or torch.equal(tensor.to_dense(), args[key].to_dense())


@pytest.mark.parametrize("name", FORWARD[:2])
def test_autograd_and_fake_tensors_refuse_it_too(name):
    args = good(name) | {"lora_a": torch.randn(R, K).requires_grad_(), "lora_b": of(1, R)}
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in args.values()]
    for given in (args.values(), fake):
        with pytest.raises(ValueError, match=r"lora_b: .* with N = 5"):
            getattr(ops, name)(*given)


def test_what_a_gradient_does_not_read_may_be_left_out():
    args = good("lora_linear_backward") | {"x": of(0), "s": of(0)}
    args |= {"need_weight": False, "need_a": False, "need_b": False}
    dx, *others = ops.lora_linear_backward(*args.values())
    assert dx.shape == (M, K)
    assert all(t.shape == (0,) for t in others)
    args["need_a"] = True
    with pytest.raises(ValueError, match="x: expected"):
        ops.lora_linear_backward(*args.values())


@pytest.mark.skipif(not _dispatch.PRIVATE, reason="the public way checks in the kernel too")
def test_a_call_is_checked_once(monkeypatch):
    """lora_linear checks above the op, whose kernel does not again; a raw call is checked."""
    checks = []
    monkeypatch.setattr(_checks, "_check_values", lambda *args: checks.append(args))
    args = good("lora_linear")
    x, weight, a, b, *_ = args.values()
    for grad in (False, True):
        a.requires_grad_(grad)
        y = lora_linear(x, weight, a, b)
        if grad:
            y.sum().backward()
    lora_add_(y.detach(), x, a.detach(), b)
    assert not checks
    ops.lora_linear(*args.values())
    assert len(checks) == 1


class _Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def _step(weight):
    """Forward with a gradient and without, a backward that reads neither x nor s, one in place."""
    values = good("lora_linear")
    x, a, b = values["x"].requires_grad_(), values["lora_a"], values["lora_b"]
    lora_linear(x, weight, a, b).sum().backward()
    with torch.no_grad():
        y = lora_linear(x, weight, a, b)
        lora_add_(y, x, a, b)
    return y


OF_A_STEP = ["lora_linear", "lora_linear_backward", "lora_linear", "lora_add_"]


def test_modes_and_profilers_see_the_ops():
    weight = torch.randn(N, K)
    with _Seen() as seen:
        _step(weight)
    ours = [name.split("::")[1] for name in seen.names if name.startswith(qualified(""))]
    assert ours == OF_A_STEP
    with torch.profiler.profile() as profile:
        _step(weight)
    names = [event.name.removeprefix(qualified("")) for event in profile.events()]
    assert [name for name in names if name in OF_A_STEP] == OF_A_STEP


def test_subclasses_see_the_op():
    class Logged(torch.Tensor):
        names = []  # noqa: RUF012
        __torch_function__ = torch._C._disabled_torch_function_impl

        @staticmethod
        def __new__(cls, inner):
            return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

        def __init__(self, inner):
            self.inner = inner

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            cls.names.append(func._schema.name)
            args = [a.inner if isinstance(a, cls) else a for a in args]
            return func(*args, **(kwargs or {}))

    weight = torch.randn(N, K)
    x, _, a, b, *_ = good("lora_linear").values()
    with torch.no_grad():
        y = lora_linear(x, Logged(weight), a, b)
        assert torch.equal(y, lora_linear(x, weight, a, b))
    assert Logged.names[-1:] == [qualified("lora_linear")]


def test_tensors_without_values_have_results_without():
    x, weight, a, b, *_ = (v.to("meta") for v in list(good("lora_linear").values())[:4])
    with torch.no_grad(), _Seen() as seen:
        assert lora_linear(x, weight, a, b).is_meta
    assert seen.names == [qualified("lora_linear")]
    with torch.no_grad():
        assert lora_linear(x, weight, a, b).shape == (M, N)


def test_in_place_is_a_new_version(monkeypatch):
    """Autograd finds out that what it saved was written over, by a kernel too that is no op."""
    x, _, a, b, *_ = good("lora_linear").values()
    base_out = torch.randn(M, N)
    product = torch.ones(M, N, requires_grad=True) * base_out
    backend = SimpleNamespace(add_=lambda base_out, *rest: base_out.numpy().fill(3))
    monkeypatch.setattr(backends, "serving", lambda *args: backend)
    with torch.no_grad():
        lora_add_(base_out, x, a, b)
    assert base_out.unique() == 3
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()
    with torch.inference_mode():
        lora_add_(torch.randn(M, N), x, a, b)


def test_the_last_place_of_the_mask_is_legal():
    args = good("lora_linear") | seed(5, 2**32 - M, 2**35 - K)
    assert ops.lora_linear(*args.values())[0].shape == (M, N)


def test_memory_met_twice():
    """Against the places of all elements, one by one."""
    for rows in range(4):
        for columns in range(4):
            for down in range(5):
                for along in range(5):
                    matrix = torch.zeros(40).as_strided((rows, columns), (down, along))
                    places = [i * down + j * along for i in range(rows) for j in range(columns)]
                    twice = len(set(places)) < len(places)
                    assert _checks._overlaps_itself(matrix) == twice, (matrix.shape, down, along)


@pytest.mark.parametrize("first", [0, 1, 3, 4, 12])
@pytest.mark.parametrize("offset", [0, 2, 4, 5, 6, 12, 24])
@pytest.mark.parametrize("pitch", [8, 9])
def test_shared_memory(first, offset, pitch):
    """Columns side by side are apart, whichever comes first; nothing shared is taken for apart."""
    memory = torch.arange(100)
    left, right = (
        memory.as_strided((3, 4), (8, 1), first),
        memory[offset:].as_strided((2, 3), (pitch, 1)),
    )
    shared = bool(set(left.flatten().tolist()) & set(right.flatten().tolist()))
    found = _checks._share_memory(left, right)
    assert found == shared if pitch == 8 else found >= shared
    assert found == _checks._share_memory(right, left)


class OwnCall(TorchDispatchMode):
    """Calls an op of its own, with arguments that do not fit, before the one that it sees."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is ops.lora_linear.default:
            x, weight, a, b, *rest = args
            with pytest.raises(ValueError, match=r"lora_b: .* with N = 5"):
                function(x, weight, a, b[:1], *rest)
            with pytest.raises(ValueError, match="dropout_p"):
                function(x, weight, a, b, rest[0], rest[1], 2.0, *rest[3:])
            self.refused = True
        return function(*args, **(kwargs or {}))


def test_a_dispatch_mode_s_own_call_is_checked():
    x, weight, a, b, *_ = good("lora_linear").values()
    with OwnCall() as mode:
        lora_linear(x, weight, a, b)
    assert mode.refused


PUBLIC = """
import torch
from lora_kernels import _dispatch, lora_linear, lora_add
assert not _dispatch.PRIVATE
shapes = ((4, 6), (5, 6), (2, 6), (5, 2), (5,))
t = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
options = {"scaling": 0.7, "dropout_p": 0.3, "seed": 3}
assert torch.autograd.gradcheck(lambda *v: lora_linear(*v, **options), t)
base = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
assert torch.autograd.gradcheck(lambda *v: lora_add(*v, **options), (base, t[0], *t[2:4]))
(dx,) = torch.autograd.grad(lora_linear(*t).square().sum(), t[0], create_graph=True)
try:
    dx.sum().backward()
except NotImplementedError as error:
    assert "double backward" in str(error)
else:
    raise AssertionError("double backward")
for function, which in ((lora_linear, 0), (lora_linear, 2), (lora_add, 0), (lora_add, 1)):
    call = t if function is lora_linear else [base, t[0], *t[2:4]]
    call = [v.detach() for v in call]
    vary = lambda v: function(*call[:which], v, *call[which + 1:])
    try:
        torch.func.jvp(vary, (call[which],), (call[which],))
    except NotImplementedError as error:
        assert "forward-mode AD (jvp) is not supported" in str(error)
    else:
        raise AssertionError("forward mode")
assert not lora_linear(*(v.detach() for v in t)).requires_grad
compiled = torch.compile(lora_linear, backend="aot_eager", fullgraph=True)
torch.testing.assert_close(compiled(*t), lora_linear(*t))
"""


def test_the_public_way_of_torch_library():
    environment = {**os.environ, "LORA_KERNELS_PUBLIC_DISPATCH": "1"}
    root = str(Path(_dispatch.__file__).parents[1])
    run = subprocess.run(
        [sys.executable, "-c", PUBLIC], env=environment | {"PYTHONPATH": root},
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
