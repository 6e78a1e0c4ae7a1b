"""What every layer with an adapter is: its parameters and its forward."""

import copy
import functools
from typing import TYPE_CHECKING, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from lora_kernels import direct, options
from lora_kernels.bases import HALVES, computed, foreign_forward, hooked, odd_type, refusal, stores
from lora_kernels.functional import lora_add, lora_linear
from lora_kernels.grouped import lora_add_grouped, lora_linear_grouped
from lora_kernels.nn.named import DEFAULT, NamedAdapter, Rows
from lora_kernels.nn.pissa import FROM_WEIGHT, INITS, Init
from lora_kernels.nn.state import LayerState
from lora_kernels.nn.tensors import MERGED, PISSA, Factors, note_frozen, shape_of, thaw
from lora_kernels.norms import HELD
from lora_kernels.packed import Projection
from lora_kernels.packs import Packable
from lora_kernels.weights import QuantizedTensor

if TYPE_CHECKING:
    from typing_extensions import Self

    from lora_kernels.bases import Linear

_Kind = TypeVar("_Kind", bound=nn.Module)
# torch.fx writes them into its graphs as one call each.
torch.fx.wrap("lora_linear")
torch.fx.wrap("lora_add")
# What is of the forwards of this process alone.
_PASSING = ("_rows", HELD)
# What a layer is given beside the adapter's tensors: a buffer, a submodule, attributes.
_ADDED = (
    MERGED, "adapters", "_base_weight_cpu", "alpha", "dropout", "use_rslora", "freeze_a", "_merged",
    "_disabled", "_first", "_active", "_rows", "_pack",
)  # fmt: skip


class AdapterOptions(NamedTuple):
    """What an adapter is made with: the options of `LoRALayer.from_linear`."""

    rank: int
    alpha: float | None = None
    dropout: float = 0.0
    use_rslora: bool = False
    adapter_dtype: torch.dtype | None = None
    init: Init = "kaiming"
    name: str = DEFAULT
    use_dora: bool = False
    freeze_a: bool = False


class LoRALayer(Packable, LayerState):
    """A frozen base of `weight` and `bias`, and the adapter `lora_A` [rank, in_features], `lora_B`
    [out_features, rank]."""

    # The plain layer's class.
    base_class: type[nn.Module]
    # Of a class that has one, that with DoRA.
    _of_dora: ClassVar[type["LoRALayer"] | None] = None
    # Whether lora_A and lora_B as they are make the product that acts.
    _as_it_lies: ClassVar[bool]

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        cls._as_it_lies = all(
            getattr(cls, name) is getattr(LoRALayer, name)
            for name in ("low_rank", "matrix", "scaling")
        )

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        rank: int,
        *,
        alpha: float | None = None,
        dropout: float = 0.0,
        use_rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
        init: Init = "kaiming",
        use_dora: bool = False,
        freeze_a: bool = False,
    ) -> "Self":
        """A layer that shares `linear`'s weight and bias objects (now frozen), its buffers,
        submodules, attributes and train mode.

        `init` is "kaiming" (A uniform, B zero: the output is unchanged), "pissa" (Meng et al.,
        2024, arXiv:2404.02948: the adapter starts as the principal part of the weight, which is
        taken out of it), "gaussian" (A normal of deviation 1 / rank, B zero), "orthogonal" (both
        from halves of an orthogonal matrix, whose product is zero; of an even rank), "olora"
        (Büyükakyüz, 2024, arXiv:2406.01775: as PiSSA with the QR decomposition of the weight),
        "eva" (both zero: `initialize_eva` fills A) or "random" (B uniform too: the output changes
        at once, for tests).
        `use_dora` makes it a `FusedDoRALinear` (`nn.dora`). `freeze_a` leaves lora_A what it
        starts as (LoRA-FA; Zhang et al., 2023, arXiv:2308.03303): it is no parameter to train, and
        the layer keeps no x for the backward.

        Raises:
            TypeError: not exactly a layer of this kind. ValueError: hooks, parametrizations, or a
                weight that is pruned, sharded, quantised or of another dtype.
        """
        if options.check_flag(use_dora, "use_dora"):
            cls = cls.with_magnitude()
        names = reserved(cls)  # type: ignore[arg-type]  # mypy takes no class for hashable
        reason = refusal(cls._require_base(linear), names) or hooked(linear)
        if reason is not None:
            raise ValueError(f"linear: {reason}")
        trainable = {name for name, p in linear.named_parameters(recurse=False) if p.requires_grad}
        adapter = AdapterOptions(
            rank, alpha, dropout, use_rslora, adapter_dtype, init,
            use_dora=use_dora, freeze_a=freeze_a,
        )  # fmt: skip
        layer = cls._prepare(linear, adapter)
        note_frozen(layer, trainable)
        layer._take_pissa()
        return layer

    @classmethod
    def with_magnitude(cls) -> "type[Self]":
        """The class of such layers with DoRA; TypeError where there is none."""
        kind = vars(cls).get("_of_dora")
        if kind is None:
            raise TypeError(f"use_dora: {cls.__name__} has no class with DoRA")
        return kind  # type: ignore[no-any-return]  # as nn.dora sets it

    @classmethod
    def _prepare(cls, linear: nn.Module, adapter: AdapterOptions) -> "Self":
        """`from_linear`, of a layer that `refusal` has nothing against, without the step that
        changes the weight, `_take_pissa`."""
        if adapter.init not in INITS:
            raise ValueError(f"init: got {adapter.init!r}, legal values are {', '.join(INITS)}")
        layer = _twin(linear, cls)
        layer._add_adapter(adapter)
        layer.reset_lora_parameters()
        if adapter.init in FROM_WEIGHT:
            layer._init_from_weight(adapter.init)
        elif adapter.init != "kaiming":
            layer._start(layer, adapter.init)
            layer._settle_start()
        return layer

    def move_into(self, linear: nn.Module) -> None:
        """Makes `linear`, from which this layer was prepared, the layer with this adapter.

        It stays the same object: whoever holds it, its hooks and whatever else it has, go on.
        """
        linear.__class__ = type(self)
        for key in (*self.adapter_names(), *_ADDED):
            for mine, theirs in zip(stores(self), stores(linear), strict=True):
                if key in mine:
                    theirs[key] = mine[key]
        linear._non_persistent_buffers_set |= self._non_persistent_buffers_set

    @torch.no_grad()
    def move_out(self) -> None:
        """Undoes `move_into`: this object is a plain layer again, the base, or the sum after a
        final merge; what its adapter froze trains again. ValueError: the layer is not what it was
        made into, `why_stuck`."""
        self._refuse("remove", self.why_stuck())
        self._settle()
        added = (*self.adapter_names(), *_ADDED)
        self.__class__ = self.base_class  # type: ignore[assignment]  # no layer of ours any more
        for key in added:
            for store in stores(self):
                store.pop(key, None)
            self._non_persistent_buffers_set.discard(key)
        thaw(self)

    def __getstate__(self) -> dict[str, object]:
        """What copies and pickles get: an adapter that acts, within `disable_adapters` too, on all
        rows."""
        held = {key: value for key, value in vars(self).items() if key not in _PASSING}
        return {**held, "_disabled": False}

    def __deepcopy__(self, memo: dict[int, object]) -> "LoRALayer":
        # Parametrized classes, which torch derives from this one, refuse __getstate__.
        copied = memo[id(self)] = type(self).__new__(type(self))
        vars(copied).update(copy.deepcopy(LoRALayer.__getstate__(self), memo))
        return copied

    def _add_adapter(self, adapter: AdapterOptions) -> None:
        self._fill(self, adapter)
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        for buffer in (MERGED, *PISSA):
            self.register_buffer(buffer, None)
        self._base_weight_cpu = None
        self._merged = False
        self._disabled = False
        self._first, self._active = adapter.name, (adapter.name,)

    def prepare_other(self, adapter: AdapterOptions) -> NamedAdapter:
        """A further adapter, for `put_other`. ValueError: `why_no_other`, "pissa" and "olora",
        which would change the base of the others, "eva", which shares ranks between layers."""
        self._refuse(adapter.name, self.why_no_other(adapter.name))
        if adapter.use_dora:
            raise ValueError("use_dora: is of a layer's only adapter, this one carries another")
        alone = (*FROM_WEIGHT, "eva")
        if adapter.init not in INITS or adapter.init in alone:
            legal = ", ".join(init for init in INITS if init not in alone)
            raise ValueError(
                f"init: got {adapter.init!r}, legal values beside another adapter are {legal}"
            )
        other = NamedAdapter().train(self.training)
        other.rank_dim = self.rank_dim
        self._fill(other, adapter)
        with torch.no_grad():
            self._start(other, adapter.init)
        return other

    @torch.inference_mode(False)  # in which parameters would be made that cannot be trained
    def _fill(self, holder: Factors, adapter: AdapterOptions) -> None:
        """Gives a holder an adapter's numbers and its parameters, without values."""
        rank, alpha = options.check_rank(adapter.rank), options.check_alpha(adapter.alpha)
        dropout = options.check_dropout(adapter.dropout)
        use_rslora = options.check_flag(adapter.use_rslora, "use_rslora")
        if (odd := odd_type(self.weight, quantised=True)) is not None:
            raise TypeError(f"weight: is {odd}")
        half = self.weight.dtype in HALVES
        dtype = adapter.adapter_dtype or (torch.float32 if half else self.weight.dtype)
        if dtype != self.weight.dtype and not (half and dtype == torch.float32):
            legal = " or torch.float32" if half else ""
            raise TypeError(
                f"adapter_dtype: expected {self.weight.dtype} (the weight's){legal}, got {dtype!r}"
            )
        empty = functools.partial(torch.empty, device=self.weight.device, dtype=dtype)
        holder.alpha, holder.dropout, holder.use_rslora = alpha, dropout, use_rslora
        holder.freeze_a = options.check_flag(adapter.freeze_a, "freeze_a")
        for name in self.adapter_parameters:
            trains = not (holder.freeze_a and name == "lora_A")
            setattr(holder, name, nn.Parameter(empty(shape_of(self, name, rank)), trains))

    def reset_parameters(self) -> None:
        """Initialises base and adapter as a new layer does."""
        if "_merged" not in vars(self):  # nn.Linear's constructor calls this
            return self._reset_base()
        self._require_unmerged("reset_parameters")
        self._refuse(
            "reset_parameters", self.why_fixed(*self.base_tensors, *self.adapter_parameters)
        )
        self.pissa_A = self.pissa_B = None
        self._reset_base()
        self.reset_lora_parameters()

    @staticmethod
    def _require_base(linear: nn.Module) -> "Linear":
        """The layer; TypeError for one of another kind."""
        raise NotImplementedError

    def _reset_base(self) -> None:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        if self._pack is not None and (y := self._pack(self, x)) is not None:
            return y
        if not torch.compiler.is_compiling():
            y = self._directly(x)
            if y is not None:
                return y
        if self._disabled:
            return self._base_forward(x)
        rows = self.rows_now()
        if rows is not None:
            return self._mixed(x, rows)
        if self._merged:
            return nn.functional.linear(x, self.matrix, self.bias)
        if not self._active:
            return self._base_forward(x)
        return self._acting_forward(x)

    def _acting_forward(self, x: Tensor) -> Tensor:
        """With the adapters in use."""
        first, *others = map(self._in_forward, self._active)
        A, B, scaling, p = first
        y = lora_linear(x, self.matrix, A, B, self.bias, scaling=scaling, dropout_p=p)
        for A, B, scaling, p in others:
            y = lora_add(y, x, A, B, scaling=scaling, dropout_p=p)
        return y

    def projection(self, x: Tensor) -> Projection | None:
        parameters = self._parameters
        weight = parameters.get("weight")
        if weight is None or not self._as_it_lies or isinstance(weight, QuantizedTensor):
            return None
        if self._rows is not None or "bias" not in parameters:
            return None
        base = Projection(self._oriented(weight), bias=parameters["bias"])
        idle = self._disabled or not self._active
        if idle or self._merged:
            changed = self._merged or self._buffers["pissa_A"] is not None
            return None if idle and changed else base
        A, B = parameters.get("lora_A"), parameters.get("lora_B")
        if self._active != (self._first,) or A is None or B is None:
            return None
        dropout = self.dropout if self.training else 0.0
        return base._replace(lora_a=A, lora_b=B, scaling=self.scaling, dropout_p=dropout)

    def _mixed(self, x: Tensor, rows: Rows) -> Tensor:
        """A batch whose rows have adapters of their own."""
        names = rows.there(self)
        if not names:
            return nn.functional.linear(x, self.matrix, self.bias)
        A, B, scaling, dropout = zip(*map(self._in_forward, names), strict=True)
        if len(set(dropout)) > 1:
            each = ", ".join(f"{n!r} {p:g}" for n, p in zip(names, dropout, strict=True))
            raise ValueError(f"dropout: adapters of one batch differ ({each}); give them the same")
        given, groups = {"scaling": scaling, "dropout_p": dropout[0]}, rows.groups(x, names)
        if isinstance(self.weight, QuantizedTensor):
            y = nn.functional.linear(x, self.matrix, self.bias)
            return lora_add_grouped(y, x, A, B, groups, **given)
        return lora_linear_grouped(x, self.matrix, A, B, groups, self.bias, **given)

    def _directly(self, x: Tensor) -> Tensor | None:
        """The forward by `direct.linear`. Parameters are read where they lie: what a hook or a
        parametrization computes does not lie there."""
        parameters = self._parameters
        weight = parameters.get("weight")
        if weight is None or "bias" not in parameters or not self._as_it_lies:
            return None
        pair = direct.FROZEN
        idle = self._disabled or not self._active
        if self._rows is not None and not self._disabled:
            return None
        if idle or self._merged:
            if idle and (self._merged or self._buffers["pissa_A"] is not None):
                return None
        elif self._active != (self._first,):
            return None
        else:
            a, b, scaling = parameters.get("lora_A"), parameters.get("lora_B"), 1.0
            if a is None or b is None:
                return None
            if self.alpha is not None:
                scaling = self.alpha / self._divisor(a.shape[0])
            pair = (a, b, scaling, self.dropout if self.training else 0.0)
        if isinstance(weight, QuantizedTensor):
            if x.dtype != weight.dtype or weight.transposed != self.fan_in_fan_out:
                return None
            return direct.quantized(x, weight.record, parameters["bias"], pair)
        return direct.linear(x, self._oriented(weight), parameters["bias"], pair)

    def _base_forward(self, x: Tensor) -> Tensor:
        """The layer without its adapter, whatever state it is in."""
        if self._merged:
            return nn.functional.linear(x, self._oriented(self._required_base()), self.bias)
        if self.pissa_A is None or self.pissa_B is None:
            return nn.functional.linear(x, self.matrix, self.bias)
        return lora_linear(
            x, self.matrix, self.pissa_A, self.pissa_B, self.bias, scaling=self.scaling
        )

    def why_stuck(self) -> str | None:
        """Why the adapter cannot be taken out of the layer; None if it can."""
        reason = foreign_forward(self) or computed(
            self, (*self.base_tensors, *self.adapter_parameters)
        )
        if reason is None and (self._merged == "kept" or self.pissa_A is not None):
            reason = self.why_valueless("weight")
        return reason

    @property
    def holder(self) -> nn.Module:
        """The module whose weight it is, and which is left where the adapter is taken out."""
        return self

    @torch.no_grad()
    def to_linear(self) -> nn.Module:
        """A plain layer that shares weight and bias: the base, or the sum after a final merge.

        As with `remove_lora`, those of them that `from_linear` or `apply_lora` froze train again;
        being shared, in this layer too.

        ValueError: `why_stuck`.
        """
        self._refuse("to_linear", self.why_stuck())
        self._settle()
        linear = _twin(self, type(self))
        linear.move_out()
        return linear

    def _settle(self) -> None:
        """Leaves in the weight what the plain layer has."""
        if self._merged == "kept":
            self.unmerge()
        self._return_pissa()

    def extra_repr(self) -> str:
        parts = [self._base_repr()]
        if self.names != (DEFAULT,):
            parts.append(f"adapters={', '.join(self.names)}, active={', '.join(self._active)}")
        parts += [f"rank={self.rank}", f"scaling={self.scaling:g}"]
        if self.dropout:
            parts.append(f"dropout={self.dropout:g}")
        if self.freeze_a:
            parts.append("freeze_a=True")
        if self.lora_A.dtype != self.weight.dtype:
            parts.append(f"adapter_dtype={self.lora_A.dtype}")
        if self.merged:
            parts.append("merged=True")
        return ", ".join(parts)

    def _base_repr(self) -> str:
        base = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{base}, bias={self.bias is not None}"


@functools.cache
def reserved(kind: type[LoRALayer] = LoRALayer) -> frozenset[str]:
    """The names that a plain layer must not use otherwise, to be given an adapter."""
    return frozenset((*kind.adapter_names(), *_ADDED, *dir(kind))).difference(dir(nn.Module))


def _twin(module: nn.Module, kind: type[_Kind]) -> _Kind:
    """A module of this kind that shares everything `module` holds, but for its hooks."""
    twin = kind.__new__(kind)
    nn.Module.__init__(twin)
    held = vars(module).items()
    twin.__dict__.update({key: value for key, value in held if key not in vars(nn.Module())})
    for mine, theirs in zip(stores(twin)[:3], stores(module)[:3], strict=True):
        mine.update(theirs)
    twin._non_persistent_buffers_set |= module._non_persistent_buffers_set
    return twin.train(module.training)
