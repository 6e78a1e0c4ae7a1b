"""`FusedLoRAConv1d`, `FusedLoRAConv2d`, `FusedLoRAConv3d`: convolutions with an adapter.

lora_A is a convolution of the base's kernel, stride, padding, padding mode, dilation and groups,
lora_B one of kernel 1 and as many groups: their product has a place in the weight whatever these
are.
"""

from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_kernels.bases import Convolution
from lora_kernels.convolution import Geometry, add_branch, dropped_positions
from lora_kernels.functional import check_values, lora_linear
from lora_kernels.nn.layer import AdapterOptions, LoRALayer
from lora_kernels.nn.named import Acting
from lora_kernels.nn.tensors import Factors

_INITS = ("kaiming", "gaussian", "random")


def why_unfit(conv: Convolution, adapter: AdapterOptions) -> str | None:
    """Why a convolution cannot be given such an adapter; None if it can."""
    if adapter.rank % conv.groups:
        return (
            f"rank: expected a multiple of the convolution's groups, {conv.groups}, got"
            f" {adapter.rank}"
        )
    if adapter.init not in _INITS:
        legal = ", ".join(_INITS)
        return f"init: got {adapter.init!r}, legal values for convolutions are {legal}"
    return None


def to_peft(conv: Convolution, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """A and B as PEFT has them, whose A reads all channels: zero outside its group's."""
    if conv.groups == 1:
        return A, B
    rank, each = A.shape[:2]
    wide = A.new_zeros(conv.groups, rank // conv.groups, conv.groups, *A.shape[1:])
    for group, block in enumerate(A.view(conv.groups, rank // conv.groups, *A.shape[1:])):
        wide[group, :, group] = block
    return wide.view(rank, conv.groups * each, *A.shape[2:]), B


def from_peft(conv: Convolution, A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The inverse. ValueError, without the layer's name: other shapes, or an A that reads channels
    outside its group, of which no weight of the convolution holds the product."""
    groups, N, ones = conv.groups, conv.out_channels, (1,) * len(conv.kernel_size)
    shapes = {"A": (rank, conv.in_channels, *conv.kernel_size), "B": (N, rank // groups, *ones)}
    for (part, shape), tensor in zip(shapes.items(), (A, B), strict=True):
        if rank % groups or tensor.shape != shape:
            raise ValueError(
                f"lora_{part} has shape {tuple(tensor.shape)}, expected {shape} for rank {rank} and"
                f" {conv.out_channels} of {conv.in_channels} channels in {groups} groups"
            )
    if groups == 1:
        return A, B
    wide = A.view(groups, rank // groups, groups, -1, *conv.kernel_size)
    own = torch.stack([wide[group, :, group] for group in range(groups)])
    if own.count_nonzero() != A.count_nonzero():
        raise ValueError(
            f"lora_A reads channels outside its own of {groups} groups, as PEFT trains it; such an"
            " adapter is none of a convolution of groups and stays with PEFT"
        )
    return own.view(rank, -1, *conv.kernel_size), B


def why_not_in_peft(conv: Convolution) -> str | None:
    """What PEFT's adapter of a convolution leaves out of its base; None if nothing."""
    spread = any(d > 1 and k > 1 for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
    if spread:
        return f"dilation {conv.dilation}"
    around = any(conv._reversed_padding_repeated_twice)
    if conv.padding_mode != "zeros" and around:
        return f"padding_mode {conv.padding_mode!r}"
    return None


class _LoRAConv(LoRALayer):
    """y = conv(x, W) + bias + scaling conv1x1(conv(drop(x), A), B), with W and bias frozen.

    Mixed in before a convolution's class; made by `from_linear` or `apply_lora`. `weight`
    [N, C / groups, *kernel] and `bias` stay the same objects; it adds `lora_A`
    [rank, C / groups, *kernel] and `lora_B` [N, rank / groups, 1, ...]. The rank is a multiple of
    the groups. Dropout takes x as a matrix [samples C, positions].
    """

    rank_dim = 0
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str
    _reversed_padding_repeated_twice: list[int]

    def __init__(self, *args: object, **kwargs: object) -> None:
        kind = type(self)
        raise TypeError(
            f"{kind.__name__}: is made from a {kind.base_class.__name__}, by from_linear or"
            " apply_lora"
        )

    @classmethod
    def with_magnitude(cls) -> NoReturn:
        raise NotImplementedError(
            f"use_dora: {cls.__name__} has no DoRA; PEFT has it for convolutions"
        )

    @classmethod
    def _require_base(cls, linear: nn.Module) -> Any:
        if type(linear) is not cls.base_class:
            raise TypeError(
                f"linear: expected torch.nn.{cls.base_class.__name__} itself, got"
                f" {type(linear).__name__}"
            )
        return linear

    def _reset_base(self) -> None:
        conv: Any = self
        nn.modules.conv._ConvNd.reset_parameters(conv)

    @property
    def in_features(self) -> int:  # type: ignore[override]  # never set
        return self.in_channels

    @property
    def out_features(self) -> int:  # type: ignore[override]  # never set
        return self.out_channels

    def sizes(self, rank: int) -> dict[str, int]:
        kernel = zip("zyx"[-len(self.kernel_size) :], self.kernel_size, strict=True)
        groups = self.groups
        each = {"C": self.in_channels // groups, "q": rank // groups, "1": 1}
        return {**super().sizes(rank), **each, **dict(kernel)}

    @classmethod
    def dimensions(cls) -> dict[str, str]:
        weight = cls.adapter_parameters["lora_A"].replace("r", "N")
        return {**super().dimensions(), "weight": weight}

    def _fill(self, holder: Factors, adapter: AdapterOptions) -> None:
        conv: Any = self
        if (reason := why_unfit(conv, adapter)) is not None:
            raise ValueError(reason)
        super()._fill(holder, adapter)

    def forward(self, x: Tensor) -> Tensor:
        """[samples, C, *] to [samples, N, *]; samples may be missing."""
        conv: Any = self
        if self._disabled or self._merged or not self._active:
            gone = self._disabled and self._merged
            weight = self._required_base() if gone else self.weight
            y: Tensor = conv._conv_forward(x, weight, self.bias)
            return y
        if x.dim() == self.weight.dim() - 1:
            return self._acting_forward(x[None])[0]
        return self._acting_forward(x)

    def _acting_forward(self, x: Tensor) -> Tensor:
        acting = [self._in_forward(name) for name in self._active]
        if self._is_linear_on(x, acting):
            return self._linear_forward(x, acting[0])
        around = self._padded(x)
        geometry = Geometry(self.stride, self._zeros_around(), self.dilation, self.groups)
        y = geometry.convolve(around, self.weight, self.bias)
        for A, B, scaling, p in acting:
            _, p, seed = check_values(1.0, p, None, x.device)
            given, dropout = around, (p, seed)
            if seed is not None and around is not x:
                given, dropout = self._padded(dropped_positions(x, p, seed)), (0.0, None)
            y = add_branch(y, given, (A, B), geometry, scaling, dropout)
        return y

    def _zeros_around(self) -> tuple[int, ...]:
        """As many zeros as the convolution itself is to put before and after x."""
        if self.padding_mode != "zeros" or self.padding == "valid":
            return (0,) * len(self.kernel_size)
        if isinstance(self.padding, tuple):
            return self.padding
        before = self._reversed_padding_repeated_twice[::2][::-1]
        return (0,) * len(before) if self._is_lopsided() else tuple(before)

    def _is_lopsided(self) -> bool:
        """Whether padding "same" puts more behind x than before it."""
        around = self._reversed_padding_repeated_twice
        return self.padding == "same" and around[::2] != around[1::2]

    def _padded(self, x: Tensor) -> Tensor:
        """x with what is to be around it beside `_zeros_around`."""
        if self.padding_mode != "zeros":
            return F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
        return F.pad(x, self._reversed_padding_repeated_twice) if self._is_lopsided() else x

    def _is_linear_on(self, x: Tensor, acting: list[Acting]) -> bool:
        """Whether the layer is a linear one of the positions of x, which lie as its rows."""
        return (
            len(acting) == 1
            and not acting[0].dropout
            and self.groups == 1
            and {*self.kernel_size, *self.stride} == {1}
            and not any(self._zeros_around())
            and not x.is_contiguous()
            and x.movedim(1, -1).is_contiguous()
        )

    def _linear_forward(self, x: Tensor, adapter: Acting) -> Tensor:
        weight, A, B = (each.flatten(1) for each in (self.weight, adapter.A, adapter.B))
        y = lora_linear(x.movedim(1, -1), weight, A, B, self.bias, scaling=adapter.scaling)
        return y.movedim(-1, 1)

    def projection(self, x: Tensor) -> None:
        """None: it is no linear layer."""

    def acting(self) -> Iterator[Acting]:
        groups = self.groups
        for one in super().acting():
            A, B = (each.reshape(groups, each.shape[0] // groups, -1) for each in (one.A, one.B))
            yield one._replace(A=A, B=B)

    def _total(self, base: Tensor) -> Tensor:
        grouped = base.reshape(self.groups, self.out_channels // self.groups, -1)
        return super()._total(grouped).reshape(base.shape)

    def why_not_two(self) -> str | None:
        return "is a convolution, whose lora_A and lora_B are no matrices"

    def why_no_rows(self) -> str | None:
        return "is a convolution, which has one adapter for all of a batch"

    def _base_repr(self) -> str:
        conv: Any = self
        text: str = nn.modules.conv._ConvNd.extra_repr(conv)
        return text


class FusedLoRAConv1d(_LoRAConv, nn.Conv1d):  # type: ignore[misc]  # its bias may be None too
    """An nn.Conv1d with an adapter: `_LoRAConv` says what it computes."""

    base_class = nn.Conv1d
    adapter_parameters = {"lora_A": "rCx", "lora_B": "Nq1"}  # noqa: RUF012  # a ClassVar of the base


class FusedLoRAConv2d(_LoRAConv, nn.Conv2d):  # type: ignore[misc]  # its bias may be None too
    """An nn.Conv2d with an adapter: `_LoRAConv` says what it computes."""

    base_class = nn.Conv2d
    adapter_parameters = {"lora_A": "rCyx", "lora_B": "Nq11"}  # noqa: RUF012  # as above


class FusedLoRAConv3d(_LoRAConv, nn.Conv3d):  # type: ignore[misc]  # its bias may be None too
    """An nn.Conv3d with an adapter: `_LoRAConv` says what it computes."""

    base_class = nn.Conv3d
    adapter_parameters = {"lora_A": "rCzyx", "lora_B": "Nq111"}  # noqa: RUF012  # as above


OF_CONVOLUTION: dict[type[nn.Module], type[LoRALayer]] = {
    kind.base_class: kind for kind in (FusedLoRAConv1d, FusedLoRAConv2d, FusedLoRAConv3d)
}
