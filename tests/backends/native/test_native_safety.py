"""The compiled CPU kernels on whatever they may be handed: the private ops with every operand in a
layout of its own, the public op with layouts mixed, and arguments that are refused."""

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_kernels import lora_add, lora_add_, lora_linear
from lora_kernels.backends import blocked, dropout, native, use_backend
from lora_kernels.backends.native import extension

pytestmark = pytest.mark.skipif(not extension.available(), reason=extension.status())

OPS = torch.ops.lora_kernels
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ISAS = range(extension.best_isa() + 1 if extension.available() else 1)
OUTPUTS = ("contiguous", "transposed", "sliced", "offset")
INPUTS = (*OUTPUTS, "expanded rows", "expanded columns")
SIZES = (1, 2, 3, 7, 8, 9, 17, 31, 64, 65, 70)
AROUND = 7.0  # what lies beside an output


class Placed:
    """Values in a layout, in the middle of memory that is not theirs."""

    def __init__(self, values: torch.Tensor, layout: str) -> None:
        rows, columns = values.shape
        self.layout = layout
        if layout == "expanded rows":
            self.view = values[:1].clone().expand(rows, columns)
        elif layout == "expanded columns":
            self.view = values[:, :1].clone().expand(rows, columns)
        elif layout == "transposed":
            self.whole = values.new_full((columns + 2, rows + 3), AROUND)
            self.view = self.whole[1:-1, 1:-2].t()
        else:
            step = 2 if layout == "sliced" else 1
            left = 0 if layout == "contiguous" else 3
            self.whole = values.new_full((step * rows, step * columns + 2 * left), AROUND)
            self.view = self.whole[::step, left : left + step * columns : step]
        if not layout.startswith("expanded"):
            self.view.copy_(values)

    def assert_kept(self) -> None:
        """Nothing but the view was written to."""
        kept = self.whole.clone()
        rest = torch.ones_like(kept, dtype=torch.bool)
        rest.as_strided(self.view.shape, self.view.stride(), self.view.storage_offset()).fill_(0)
        assert (kept[rest] == AROUND).all(), self.layout


class Draw:
    """Tensors of random values at the sizes of one call."""

    def __init__(self, data) -> None:
        self.data = data
        self.generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**30)))
        self.dtype = data.draw(st.sampled_from(DTYPES))
        self.isa = data.draw(st.sampled_from(ISAS))
        self.M, self.C, self.r = (data.draw(st.sampled_from(SIZES)) for _ in range(3))
        self.p = data.draw(st.sampled_from((0.0, 0.0, 0.1, 0.6)))
        self.seed = data.draw(st.integers(-(2**40), 2**40))
        self.scale = data.draw(st.sampled_from((1.0, 2.0, -1 / 3)))

    def dropout(self) -> tuple[int, torch.Tensor | None]:
        return dropout.threshold(self.p), torch.tensor([self.seed]) if self.p else None

    def kept(self) -> torch.Tensor:
        """[M,C] in fp64: 1 where kept."""
        return (oracle.keep_factor(self.seed, self.M, self.C, self.p) != 0).double()

    def low_dtype(self) -> torch.dtype:
        return self.data.draw(st.sampled_from((self.dtype, torch.float32)))

    def tensor(self, *shape: int, dtype=None, layouts=INPUTS) -> Placed:
        values = torch.randn(shape, generator=self.generator).to(dtype or self.dtype)
        return Placed(values, self.data.draw(st.sampled_from(layouts)))

    def output(self, *shape: int, dtype=None, layouts=OUTPUTS) -> Placed:
        nan = torch.full(shape, float("nan"), dtype=dtype or self.dtype)
        return Placed(nan, self.data.draw(st.sampled_from(layouts)))

    def exact(self, placed: Placed) -> torch.Tensor:
        """What the kernel sees: masters are rounded to the dtype of the call."""
        return placed.view.to(self.dtype).double()


def assert_close(out: Placed, left: torch.Tensor, right: torch.Tensor, rest=0.0, scale=1.0):
    """out = scale * left @ right + rest, rounded once; sums in fp32, whatever their order."""
    exact = scale * (left @ right) + rest
    sums = abs(scale) * (left.abs() @ right.abs()) + abs(torch.as_tensor(rest))
    allowed = torch.finfo(out.view.dtype).eps * exact.norm()
    allowed += 2.0**-23 * max(1, left.shape[1]) ** 0.5 * sums.norm()
    error = (out.view.double() - exact).norm()
    assert error <= allowed, (error, allowed, out.layout)
    out.assert_kept()


@settings(max_examples=150)
@given(st.data())
def test_shrink_in_any_layout(data):
    d = Draw(data)
    rows = d.tensor(d.M, d.C)
    matrix = low = shrunk = gradient = None
    wanted = data.draw(st.sampled_from(("both", "shrunk", "gradient")))
    if wanted != "gradient":
        matrix = d.tensor(d.r, d.C, dtype=d.low_dtype())
        shrunk = d.output(d.M, d.r)
    if wanted != "shrunk":
        low = d.tensor(d.M, d.r)
        gradient = d.output(d.r, d.C, dtype=d.low_dtype())
    OPS._shrink_cpu(
        rows.view, *(t and t.view for t in (matrix, low)), d.scale, 0.5, *d.dropout(), d.isa,
        *(t and t.view for t in (shrunk, gradient)),
    )  # fmt: skip
    seen = d.exact(rows) * d.kept()
    if shrunk is not None:
        assert_close(shrunk, seen, d.exact(matrix).T, scale=d.scale)
    if gradient is not None:
        assert_close(gradient, d.exact(low).T, seen, scale=0.5)


@settings(max_examples=150)
@given(st.data())
def test_expand_in_any_layout(data):
    d = Draw(data)
    low, matrix = d.tensor(d.M, d.r), d.tensor(d.r, d.C, dtype=d.low_dtype())
    bias = d.tensor(2, d.C, dtype=d.low_dtype()) if data.draw(st.booleans()) else None
    accumulate = data.draw(st.booleans())
    layouts = ("contiguous", "offset")  # its columns must be contiguous
    out = d.tensor(d.M, d.C, layouts=layouts) if accumulate else d.output(d.M, d.C, layouts=layouts)
    rest = d.exact(out) if accumulate else 0.0
    if bias is not None:
        rest = rest + bias.view[0].double()
    OPS._expand_cpu(
        low.view, matrix.view, None if bias is None else bias.view[0], d.scale, *d.dropout(),
        accumulate, d.isa, out.view,
    )  # fmt: skip
    exact = d.scale * (d.exact(low) @ d.exact(matrix)) * d.kept() + rest
    sums = abs(d.scale) * (d.exact(low).abs() @ d.exact(matrix).abs()) + abs(torch.as_tensor(rest))
    allowed = torch.finfo(d.dtype).eps * exact.norm() + 2.0**-23 * d.r**0.5 * sums.norm()
    assert (out.view.double() - exact).norm() <= allowed, out.layout
    out.assert_kept()


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rows(dtype):
    rows, low = torch.ones(0, 9, dtype=dtype), torch.ones(0, 2, dtype=dtype)
    gradient = torch.full((2, 9), float("nan"), dtype=dtype)
    matrix, shrunk = torch.ones(2, 9, dtype=dtype), torch.ones(0, 2, dtype=dtype)
    OPS._shrink_cpu(rows, matrix, low, 1.0, 1.0, 0, None, 0, shrunk, gradient)
    assert (gradient == 0).all()
    OPS._expand_cpu(low, matrix, None, 1.0, 0, None, False, 0, rows)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("isa", ISAS)
def test_masters_are_rounded_at_use(dtype, isa):
    """A difference that is lost in the rounding of the fp32 operand, or else all that is left."""
    lost = torch.finfo(dtype).eps / 4
    ones = torch.tensor([[1.0, -1.0]], dtype=dtype)
    shrunk, out = torch.full((1, 1), 7.0, dtype=dtype), torch.full((1, 1), 7.0, dtype=dtype)
    master = torch.tensor([[1.0 + lost, 1.0]])
    OPS._shrink_cpu(ones, master, None, 1.0, 1.0, 0, None, isa, shrunk, None)
    OPS._expand_cpu(ones, master.t(), None, 1.0, 0, None, False, isa, out)
    assert shrunk == 0
    assert out == 0


# ------------------------------------------------------------------------------------ the public op


@pytest.mark.parametrize("add", [False, True], ids=["linear", "add"])
def test_public_op_with_mixed_layouts(add, monkeypatch, entering):
    """y and all gradients by the accuracy rule, every argument in a layout of its own."""
    entering(use_backend("native"))
    monkeypatch.setattr(blocked, "_multiplies", lambda dtype: True)

    @settings(max_examples=40)
    @given(st.data())
    def check(data):
        draw = data.draw
        isa = draw(st.sampled_from(ISAS))
        monkeypatch.setattr(native, "best_isa", lambda: isa)
        most = draw(st.sampled_from((0, 10**6)))
        monkeypatch.setattr(native, "are_few", lambda *a: bool(most))
        case = oracle.Case(
            *(draw(st.sampled_from((*SIZES, 130))) for _ in range(4)),
            dtype=draw(st.sampled_from(DTYPES)),
            adapter_dtype=draw(st.sampled_from((None, torch.float32))),
            p=draw(st.sampled_from((0.0, 0.0, 0.3))),
            add=add,
            seed=draw(st.integers(0, 2**40)),
        )
        layouts = {
            name: draw(st.sampled_from(OUTPUTS))
            for name in ("x", "weight", "base_out", "lora_a", "lora_b")
        }

        def op(**arguments):
            for name in layouts.keys() & arguments.keys():
                tensor = arguments[name]
                placed = Placed(tensor.detach(), layouts[name]).view
                # The graph leads to the oracle's leaf; the op sees the strides.
                arguments[name] = _Moved.apply(tensor, placed)
                assert arguments[name].data_ptr() == placed.data_ptr()
            return (lora_add if add else lora_linear)(**arguments)

        oracle.assert_accurate(case, op)

    check()


class _Moved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, placed):
        return placed

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


# ----------------------------------------------------------------------------------------- refusals


def misaligned(like: torch.Tensor) -> torch.Tensor:
    """The same tensor one byte off."""
    buffer = bytearray(like.numel() * like.element_size() + 1)
    return torch.frombuffer(buffer, dtype=like.dtype, offset=1).view(like.shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_what_is_read_may_start_anywhere(dtype, isa, p, monkeypatch, entering):
    """Forward, in place and backward: bit for bit as from tensors that start where they should."""
    entering(use_backend("native"))
    monkeypatch.setattr(blocked, "_multiplies", lambda dtype: True)
    monkeypatch.setattr(native, "best_isa", lambda: isa)
    monkeypatch.setattr(native, "are_few", lambda *a: False)
    generator = torch.Generator().manual_seed(3)
    shapes = {"x": (130, 24), "lora_a": (3, 24), "lora_b": (10, 3), "base_out": (130, 10)}
    given = {k: torch.randn(v, generator=generator).to(dtype) for k, v in shapes.items()}
    moved = {k: misaligned(v).copy_(v) for k, v in given.items()}
    options = {"scaling": 0.5, "dropout_p": p, "seed": 7}
    results = []
    for tensors in (given, moved):
        leaves = {k: v.detach().requires_grad_() for k, v in tensors.items()}
        assert all(leaves[k].data_ptr() == v.data_ptr() for k, v in tensors.items())
        y = lora_add(**leaves, **options)
        gradients = torch.autograd.grad(y, list(leaves.values()), misaligned(y).copy_(y.detach()))
        with torch.no_grad():
            results.append((y, *gradients, lora_add_(**tensors, **options)))
    for left, right in zip(*results, strict=True):
        assert torch.equal(left, right)


WRONG = {
    "must be a CPU tensor": lambda t: t.to("meta"),
    "must be dense": lambda t: t.to_sparse(),
    "dimension": lambda t: t[None],
    "must start at a multiple of its element size": misaligned,
    "float32": lambda t: t.to(torch.complex64),
}
SHRINK = {
    "rows": (4, 6), "matrix": (2, 6), "low": (4, 2), "scale": 1.0, "gradient_scale": 1.0,
    "threshold": 9, "seed": torch.tensor([3]), "isa": 0, "shrunk": (4, 2), "gradient": (2, 6),
}  # fmt: skip
EXPAND = {
    "low": (4, 2), "matrix": (2, 6), "bias": (6,), "scale": 1.0, "threshold": 9,
    "seed": torch.tensor([3]), "accumulate": False, "isa": 0, "out": (4, 6),
}  # fmt: skip


@pytest.mark.parametrize("words", WRONG)
@pytest.mark.parametrize(
    ("op", "defaults", "name"),
    [
        (op, defaults, name)
        for op, defaults in (("_shrink_cpu", SHRINK), ("_expand_cpu", EXPAND))
        for name, value in defaults.items()
        if isinstance(value, tuple) or name == "seed"
    ],
)
def test_each_argument_is_checked_by_name(op, defaults, name, words):
    given = {k: torch.ones(v) if isinstance(v, tuple) else v for k, v in defaults.items()}
    getattr(OPS, op)(*given.values())
    if name == "seed" and words == "dimension":
        return  # any number of dimensions will do
    if words.startswith("must start") and name not in ("shrunk", "gradient", "out"):
        return  # what is read may start anywhere
    given[name] = WRONG[words](given[name])
    with pytest.raises(RuntimeError) as caught:
        getattr(OPS, op)(*given.values())
    said = words if name != "seed" or words != "float32" else "must be a contiguous int64"
    assert f"{name}: " in str(caught.value)
    assert said in str(caught.value)
