"""Projections of one x in one call: query, key and value, gate and up.

One node of autograd, past the dispatcher, where nobody acts on it: what torch.compile, transforms
and tensor subclasses get are the calls of `lora_linear` that it equals.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_kernels import backends, functional
from lora_kernels._contract import DTYPES
from lora_kernels._dispatch import any_requires_grad, is_plain
from lora_kernels.backends import packed
from lora_kernels.branch import Asked, Branch, Dense, Layer, Pairs, Rows, Wanted
from lora_kernels.functional import flat_rows, lora_linear


class Projection(NamedTuple):
    """The arguments of one `lora_linear`; without lora_a and lora_b the frozen layer."""

    weight: Tensor
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None
    bias: Tensor | None = None
    scaling: float | Tensor = 1.0
    dropout_p: float = 0.0
    seed: int | Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.lora_a is None or self.lora_b is None:
            return F.linear(x, self.weight, self.bias)
        return lora_linear(
            x, self.weight, self.lora_a, self.lora_b, self.bias,
            scaling=self.scaling, dropout_p=self.dropout_p, seed=self.seed,
        )  # fmt: skip


def lora_linear_packed(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor | None],
    lora_bs: Sequence[Tensor | None],
    biases: Sequence[Tensor | None] | None = None,
    *,
    scalings: float | Tensor | Sequence[float | Tensor] = 1.0,
    dropout_p: float = 0.0,
    seeds: Sequence[int | Tensor | None] | None = None,
) -> tuple[Tensor, ...]:
    """Several linear layers of one x, each with a LoRA branch or without.

    Equal to a call of `lora_linear` each, in this order, up to the order of sums. x is read
    once for all branches, forward and backward (with dropout a block of its rows for one after the
    other), and its gradient is one sum.

    Args:
        x: [..., K], as in `lora_linear`.
        weights: [N_i, K] each.
        lora_as, lora_bs: [r_i, K] and [N_i, r_i] each; None for a layer without a branch.
        biases: [N_i] or None each; None for all without.
        scalings: one for all, or one of each.
        dropout_p: of all branches; each has a mask of its own.
        seeds: of the masks, one of each layer, None to draw it; None to draw all.

    Returns:
        [..., N_i] of each layer.

    Raises:
        ValueError: sequences of other lengths than the weights, or half a pair; what `lora_linear`
            raises, with the number of the layer. TypeError: likewise.
    """
    count = len(weights)
    given: dict[str, Sequence[Any]] = {
        "lora_as": lora_as, "lora_bs": lora_bs,
        "biases": [None] * count if biases is None else biases,
        "scalings": scalings if isinstance(scalings, (list, tuple)) else [scalings] * count,
        "seeds": [None] * count if seeds is None else seeds,
    }  # fmt: skip
    for name, values in given.items():
        if len(values) != count:
            raise ValueError(f"{name}: expected one of each of {count} weights, got {len(values)}")
    projections = []
    for i, (weight, a, b, bias, scaling, seed) in enumerate(
        zip(weights, *given.values(), strict=True)
    ):
        if (a is None) != (b is None):
            raise ValueError(f"lora_as[{i}], lora_bs[{i}]: expected both or none")
        projections.append(Projection(weight, a, b, bias, scaling, dropout_p, seed))
    return project(x, projections)


def project(
    x: Tensor, projections: Sequence[Projection], only_as_one: bool = False
) -> tuple[Tensor, ...]:
    """`lora_linear_packed` of what is put together already; nothing where that would be a call of
    each and it is wanted only as one."""
    rows = as_one(x, projections)
    if rows is None:
        return () if only_as_one else tuple(_numbered(i, p, x) for i, p in enumerate(projections))
    layers = [prepared(rows, p) for p in projections]
    ys = _packed(flat_rows(rows), layers, *tensors_of(layers))
    # Views are made out here, where autograd knows what may be changed in place.
    return ys if x.dim() == 2 else tuple(y.view(*x.shape[:-1], y.shape[1]) for y in ys)


_HOST_S = 256  # rows up to which the host's time counts


def packs_rows(x: Tensor) -> bool:
    """Whether x has so many rows that reading it once counts more than the host's time, of which a
    layer's own call takes less."""
    few = backends.few_rows() if isinstance(x, Tensor) and x.is_cpu else None
    rows = x.shape[:-1].numel() if x.dim() else 0
    return few is None or rows > min(few.most(x, trains=True), _HOST_S)


def _numbered(i: int, projection: Projection, x: Tensor) -> Tensor:
    try:
        return projection(x)
    except (TypeError, ValueError) as error:
        raise type(error)(f"layer {i}: {error}") from None


def as_one(x: Tensor, projections: Sequence[Projection]) -> Tensor | None:
    """x as one call of all takes it; None where each is to be called: nothing trains, somebody
    watches, or they are other than ordinary frozen layers."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not projections:
        return None
    if not isinstance(x, Tensor) or x.dim() == 0 or x.is_meta:
        return None
    autocast = torch.is_autocast_enabled(x.device.type) and x.dtype in DTYPES[:3]
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    if not all(fits(x, p, dtype, autocast) for p in projections):
        return None
    if not any_requires_grad(x, *(t for p in projections for t in (p.lora_a, p.lora_b))):
        return None
    return x.to(dtype)


def fits(x: Tensor, p: Projection, dtype: torch.dtype, autocast: bool) -> bool:
    """Whether a projection is such as one call computes: an ordinary frozen layer, with a branch
    whose scaling is a number or without."""
    weight, a, b, bias = p.weight, p.lora_a, p.lora_b, p.bias
    if not isinstance(weight, Tensor) or not is_plain(x, weight, a, b, bias):
        return False
    base = (weight,) if bias is None else (weight, bias)
    legal = DTYPES[:3] if autocast else (dtype,)
    if any(t.dtype not in legal or t.requires_grad or t.device != x.device for t in base):
        return False
    if dtype not in DTYPES or weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        return False
    N, K = weight.shape
    if bias is not None and bias.shape != (N,):
        return False
    if a is None or b is None:
        return a is b
    low = (dtype,) if dtype == torch.float64 else (dtype, torch.float32)
    return (
        a.dtype in low
        and b.dtype in low
        and a.device == b.device == x.device
        and a.dim() == 2
        and a.shape[1] == K
        and a.shape[0] > 0
        and b.shape == (N, a.shape[0])
        and type(p.scaling) in (float, int)
        and type(p.dropout_p) in (float, int)
    )


def prepared(x: Tensor, p: Projection) -> Layer:
    """A projection that `fits` with the numbers checked and the seed drawn."""
    base = Dense(p.weight, p.bias)
    if p.lora_a is None or p.lora_b is None:
        return Layer(base, None)
    scaling, dropout_p, seed = functional.check_values(p.scaling, p.dropout_p, p.seed, x.device)
    assert not isinstance(scaling, Tensor)  # of what fits
    return Layer(base, Branch(p.lora_a, p.lora_b, scaling, dropout_p, seed))


def tensors_of(layers: Sequence[Layer]) -> list[Tensor]:
    """Those of which a gradient may be asked for: lora_a and lora_b of each that has them."""
    return [t for layer in layers if layer.branch is not None for t in layer.branch[:2]]


def wanted_of(layers: Sequence[Layer], needs: Sequence[bool]) -> list[Wanted]:
    """Which of `tensors_of` each layer is asked for."""
    rest = iter(needs)
    return [
        Wanted(False, False) if layer.branch is None else Wanted(next(rest), next(rest))
        for layer in layers
    ]


class Kept(NamedTuple):
    """What a node of autograd saves of layers: their tensors, and what is none beside."""

    tensors: list[Tensor | None]
    others: list[tuple[bool, float, float]]

    @classmethod
    def of(cls, layers: Sequence[Layer], kept: Sequence[Tensor | None]) -> "Kept":
        tensors: list[Tensor | None] = []
        others = []
        for (base, branch), s in zip(layers, kept, strict=True):
            if branch is None:
                tensors += [base.weight, None, None, None, None]
                others.append((False, 1.0, 0.0))
            else:
                tensors += [base.weight, branch.lora_a, branch.lora_b, branch.seed, s]
                others.append((True, branch.scaling, branch.dropout_p))
        return cls(tensors, others)

    def layers(self) -> tuple[list[Layer], list[Tensor | None]]:
        """The layers again, without biases, and s of each."""
        found, kept = [], []
        for i, (has_branch, scaling, p) in enumerate(self.others):
            weight, a, b, seed, s = self.tensors[5 * i : 5 * i + 5]
            assert weight is not None
            branch = None
            if has_branch and a is not None and b is not None:
                branch = Branch(a, b, scaling, p, seed)
            found.append(Layer(Dense(weight), branch))
            kept.append(s)
        return found, kept


class _Packed(torch.autograd.Function):
    """Of matrices."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: list[Layer], *tensors: Tensor) -> tuple[Tensor, ...]:
        _, _, *needs = ctx.needs_input_grad
        wanted = wanted_of(layers, needs)
        with without_autocast(x):
            ys, kept = packed.forward(x, layers, [b for _, b in wanted])
        held = Kept.of(layers, kept)
        ctx.set_materialize_grads(False)
        ctx.others = held.others
        ctx.save_for_backward(x if any(a for a, _ in wanted) else None, *held.tensors)
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Any, ...]:
        some = next((dy for dy in dys if dy is not None), None)
        if some is None:
            return (None,) * len(ctx.needs_input_grad)
        x, *saved = ctx.saved_tensors  # once: checkpoints give them one time
        refuse_double_backward([*dys, x, *saved])
        need_x, _, *needs = ctx.needs_input_grad
        layers, kept = Kept(saved, ctx.others).layers()
        asked = Asked(wanted_of(layers, needs), need_x)
        with without_autocast(some):
            dx, pairs = packed.backward(Rows(dys, x, kept), layers, asked)
        return dx, None, *flat(layers, pairs)


def without_autocast(like: Tensor) -> torch.autocast:
    """Dtypes are settled above: ATen's calls must not be cast again."""
    return torch.autocast(like.device.type, enabled=False)


def flat(layers: Sequence[Layer], pairs: Pairs) -> list[Tensor | None]:
    """The gradients of `tensors_of`."""
    return [
        g for layer, p in zip(layers, pairs, strict=True) if layer.branch is not None for g in p
    ]


def refuse_double_backward(read: Sequence[Tensor | None]) -> None:
    """Past the op nothing else would raise: what a backward has read would have no gradient."""
    if torch.is_grad_enabled() and any_requires_grad(*read):
        raise NotImplementedError("lora_kernels: double backward is not supported")


_packed: Callable[..., tuple[Tensor, ...]] = _Packed.apply
