"""The op in compiled CPU kernels; arguments and results as in `reference`.

Few rows are one call (`few_rows`). Of more the base product stays with torch, and two kernels do
the rest: one reads wide rows once and leaves rank-sized results (s; ds and dB; dA), the other
writes a rank-sized product over a whole output. Calls that torch's own calls win are left to
`reference`; so are 16-bit products that a CPU without instructions for them forms in fp32: there
the branch is added before the one rounding. What is whose says `choice`.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_kernels.backends import blocked, forced, reference
from lora_kernels.backends.dropout import keep_scale, threshold
from lora_kernels.backends.native import choice, extension, few_rows
from lora_kernels.backends.native.extension import best_isa
from lora_kernels.backends.native.few_rows import FewRows, Rows, are_few, readable
from lora_kernels.backends.reference import Gradients
from lora_kernels.backends.scaling import split
from lora_kernels.branch import Base, Branch, Dense, Given, Need

_ops = torch.ops.lora_kernels


def lacks(device: torch.device) -> str | None:
    """Why the kernels can serve no call on a device."""
    if device.type != "cpu":
        return f"it has no kernels for {device.type} tensors"
    if not extension.available():
        return f"the compiled extension is not there: {extension.status()}"
    return None


def default(device: torch.device) -> tuple[bool, str]:
    """Wherever they are there."""
    return True, extension.status()


def refusal(rows: Tensor) -> str | None:
    """Why the kernels cannot serve a call with such rows, x or dy."""
    if rows.dtype not in extension.DTYPES:
        return f"its kernels compute in float32, bfloat16 and float16, got {rows.dtype}"
    return None


def leaves(base: Base, rows: Tensor, branch: Branch) -> str | None:
    """Why ATen's calls are the better ones for a call with these rows, x or dy."""
    if _are_few(base, rows) or _are_few(base, rows, backward=True):
        return None  # one of both is served here, and each asks again
    return _left(base, rows, branch)


def _are_few(base: Base, rows: Tensor, backward: bool = False) -> bool:
    """Whether a call has so few rows, x or dy, that one call of `few_rows` serves it."""
    if not isinstance(base, Dense) or rows.numel() == 0:
        return False
    few = are_few(rows.shape[0], base.weight, best_isa(), backward, rows.dtype)
    return few and few_rows.fits(base.weight)


def _left(base: Base, rows: Tensor, branch: Branch) -> str | None:
    if rows.numel() == 0:
        return "no rows"
    if isinstance(base, Dense) and blocked.is_wide(rows):
        return "16-bit products are formed in fp32 here, and rounded once"
    if branch.dropout_p or (forced.now is not None and forced.now.backend == "native"):
        return None
    found = choice.low_rank(rows.dtype, best_isa())
    if found is None:
        return "without dropout ATen's passes are the faster ones"
    if rows.shape[0] < found.rows:
        return f"fewer than {found.rows} rows without dropout"
    if branch.lora_a.shape[0] >= found.ranks and not (
        found.any_on_given and isinstance(base, Given)
    ):
        return f"a rank of {found.ranks} or more without dropout"
    return None


class Dropped(NamedTuple):
    """The dropout mask over rows, of a branch."""

    p: float
    seed: Tensor | None

    @property
    def scale(self) -> float:
        return keep_scale(self.p) if self.p else 1.0

    def after(self, rows: int) -> "Dropped":
        """The mask of what follows so many rows."""
        if self.seed is None or rows == 0:
            return self
        value, row, column = [*self.seed.reshape(-1).tolist(), 0, 0][:3]
        return Dropped(self.p, self.seed.new_tensor([value, row + rows, column]))


_WHOLE = Dropped(0.0, None)


def shrink(
    rows: Tensor, matrix: Tensor, scale: float, drop: Dropped = _WHOLE,
    gradient: tuple[Tensor, Tensor, float] | None = None, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """scale * drop(rows) @ matrix^T, into `out` if that is given; of gradient = (low, to, factor),
    `to` is filled with factor * low^T @ drop(rows) from the same read."""
    shrunk = rows.new_empty(rows.shape[0], matrix.shape[0]) if out is None else out
    _read(rows, matrix, scale, drop, gradient, shrunk)
    return shrunk


def _read(
    rows: Tensor,
    matrix: Tensor | None,
    scale: float,
    drop: Dropped,
    gradient: tuple[Tensor, Tensor, float] | None,
    shrunk: Tensor | None,
) -> None:
    low, out, factor = gradient or (None, None, 1.0)
    _ops._shrink_cpu(
        rows, matrix, low, scale * drop.scale, factor * drop.scale, threshold(drop.p), drop.seed,
        best_isa(), shrunk, out,
    )  # fmt: skip


def expand(
    low: Tensor, matrix: Tensor, out: Tensor, scale: float = 1.0, bias: Tensor | None = None,
    drop: Dropped = _WHOLE, accumulate: bool = False,
) -> None:  # fmt: skip
    """out = scale * drop'(low @ matrix) + bias, added to what is there if `accumulate`."""
    _ops._expand_cpu(
        low, matrix, bias, scale * drop.scale, threshold(drop.p), drop.seed, accumulate,
        best_isa(), out,
    )  # fmt: skip


def outer(rows: Tensor, low: Tensor, out: Tensor, drop: Dropped = _WHOLE) -> None:
    """out = low^T @ drop(rows)."""
    _read(rows, None, 1.0, drop, (low, out, 1.0), None)


def has_many_rows(base: Base, rows: Tensor) -> bool:
    """Whether a call that is not left to ATen is made of the low-rank half and torch's product."""
    return not _are_few(base, rows) and not _are_few(base, rows, backward=True)


def drops(rows: Tensor) -> bool:
    """Whether `drop`, and other elementwise kernels, take these rows."""
    left = forced.now is not None and forced.now.backend != "native"
    return not left and rows.numel() > 0 and lacks(rows.device) is None and refusal(rows) is None


def drop(rows: Tensor, p: float, seed: Tensor) -> Tensor:
    """drop(rows) [M,K], those kept scaled: the mask without a matrix of it."""
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    _ops._drop_cpu(rows, keep_scale(p), threshold(p), seed, best_isa(), out)
    return out


def _to_fill(base: Base, rows: Tensor, columns: int) -> Tensor:
    """As many rows, where the caller wants them if it says so."""
    into = base.into if isinstance(base, Dense) else None
    return rows.new_empty(rows.shape[0], columns) if into is None else into


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None, into: Tensor | None) -> Tensor:
    """rows weight + bias, where the caller wants it if it says so."""
    if into is None:
        return F.linear(rows, weight.t(), bias)
    if bias is None:
        return torch.mm(rows, weight, out=into)
    return torch.addmm(bias, rows, weight, out=into)


def dropped(branch: Branch) -> Dropped:
    return Dropped(branch.dropout_p, branch.seed) if branch.dropout_p else _WHOLE


def forward(base: Base, x: Tensor, branch: Branch, save_s: bool) -> tuple[Tensor, Tensor | None]:
    if isinstance(base, Dense) and _are_few(base, x):
        return _few_forward(base, x, branch, save_s)
    if _left(base, x, branch) is not None:
        return reference.forward(base, x, branch, save_s)
    low, high = split(branch.scaling, x.dtype)
    s = shrink(x, branch.lora_a, low, dropped(branch))
    if isinstance(base, Dense):
        y = on_base(base, x, s, branch.lora_b.t(), high)
    else:
        assert base.out is not None  # of a forward
        y = base.out.clone(memory_format=torch.contiguous_format)
        expand(s, branch.lora_b.t(), y, high, accumulate=True)
    return y, s if save_s else None


def on_base(
    base: Dense, rows: Tensor, low: Tensor, matrix: Tensor, scale: float = 1.0,
    drop: Dropped = _WHOLE,
) -> Tensor:  # fmt: skip
    """rows W^T + bias + scale * drop'(low @ matrix). In bf16 the base comes first: torch's product
    into what is there takes up to a tenth longer, and either order rounds twice."""
    bias = None if base.bias is None else base.bias.to(rows.dtype)
    weight = base.weight.t().to(rows.dtype)
    if rows.dtype == torch.bfloat16:
        y = _product(rows, weight, bias, base.into)
        expand(low, matrix, y, scale, drop=drop, accumulate=True)
    else:
        y = _to_fill(base, rows, weight.shape[1])
        expand(low, matrix, y, scale, bias, drop)
        y.addmm_(rows, weight)
    return y


_calls = cache(FewRows)


def _few_forward(
    base: Dense, x: Tensor, branch: Branch, save_s: bool
) -> tuple[Tensor, Tensor | None]:
    bias = None if base.bias is None else readable(base.bias.to(x.dtype))
    given = base.weight, bias, _readable(branch), save_s, base.into
    return _calls(best_isa()).forward(readable(x), *given)


def frozen(base: Dense, x: Tensor) -> Tensor | None:
    """x W^T + bias by the kernels of few rows, into fp32 too; None where they are not the ones for
    it."""
    if not drops(x) or not _are_few(base, x):
        return None
    bias = None if base.bias is None else readable(base.bias.to(x.dtype))
    calls = _calls(best_isa())
    y: Tensor = calls.linear(
        readable(x), base.weight, None, None, bias, 1.0, 1.0, 0, None, calls.isa, None, base.into
    )
    return y if base.into is None else base.into


def _readable(branch: Branch) -> Branch:
    return branch._replace(lora_a=readable(branch.lora_a), lora_b=readable(branch.lora_b))


def add_(base_out: Tensor, x: Tensor, branch: Branch) -> Tensor:
    low, high = split(branch.scaling, x.dtype)
    s = shrink(x, branch.lora_a, low, dropped(branch))
    if base_out.stride(1) == 1 and base_out.data_ptr() % base_out.element_size() == 0:
        expand(s, branch.lora_b.t(), base_out, high, accumulate=True)
    else:
        y = base_out.clone(memory_format=torch.contiguous_format)
        expand(s, branch.lora_b.t(), y, high, accumulate=True)
        base_out.copy_(y)
    return s


def backward(
    base: Base, dy: Tensor, x: Tensor, s: Tensor, branch: Branch, need: Need,
    onto: Tensor | None = None,
) -> Gradients:  # fmt: skip
    """As in `reference`; dx may be `onto` [M,K], in fp32 too, with itself added."""
    few = _are_few(base, dy, backward=True)
    if not few and _left(base, dy, branch) is not None:
        return reference.backward(base, dy, x, s, branch, need)
    dweight = None
    if need.weight and isinstance(base, Dense):
        dweight = torch.mm(dy.t(), x).to(base.weight.dtype)
    if few:
        assert isinstance(base, Dense)
        rows = Rows(dy, readable(x) if need.a else None, readable(s) if need.b else None)
        into = base.into if onto is None else onto
        given = rows, _readable(branch), need, into, onto is not None
        results = _calls(best_isa()).backward(base.weight, *given)
    else:
        results = _low_rank_backward(base, Rows(dy, x, s), branch, need)
    dx, d_a, d_b = results
    return dx, dweight, d_a, d_b


def _low_rank_backward(
    base: Base, rows: Rows, branch: Branch, need: Need
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    dy, x, s = rows
    (N, r), K = branch.lora_b.shape, branch.lora_a.shape[1]
    drop = dropped(branch)
    dx = None
    d_a = branch.lora_a.new_empty(r, K) if need.a else None
    d_b = branch.lora_b.new_empty(N, r) if need.b else None
    of_b = None if d_b is None or s is None else (s, d_b.t(), split(branch.scaling, dy.dtype)[1])
    if need.x or need.a:
        ds = shrink(dy, branch.lora_b.t(), branch.scaling, gradient=of_b)
    elif need.b:
        _read(dy, None, 1.0, _WHOLE, of_b, None)
    if need.x and isinstance(base, Dense):
        turned = Dense(base.weight.t(), into=base.into)
        dx = on_base(turned, dy, ds, branch.lora_a, drop=drop)
    elif need.x:
        dx = _to_fill(base, dy, K)
        expand(ds, branch.lora_a, dx, drop=drop)
    if d_a is not None and x is not None:
        outer(x, ds, d_a, drop)
    return dx, d_a, d_b


class ManyRows:
    """The calls of `FewRows` for any number of rows, of arguments that have been checked."""

    def forward(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, branch: tuple[Any, ...], save_s: bool
    ) -> tuple[Tensor, Tensor | None]:
        """(y, s) of a `Branch`."""
        rows = x.reshape(-1, x.shape[-1])
        y, s = forward(Dense(weight, bias), rows, Branch(*branch), save_s)
        return y.view(*x.shape[:-1], weight.shape[0]), s

    def backward(
        self, weight: Tensor, rows: Rows, branch: tuple[Any, ...], need: Need
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(dx, dA, dB), None where not needed."""
        K, dy = weight.shape[1], rows.dy.reshape(-1, weight.shape[0])
        x = dy.new_empty(0) if rows.x is None else rows.x.reshape(-1, K)
        s = dy.new_empty(0) if rows.s is None else rows.s
        dx, _, d_a, d_b = backward(Dense(weight), dy, x, s, Branch(*branch), need)
        return None if dx is None else dx.view(*rows.dy.shape[:-1], K), d_a, d_b
