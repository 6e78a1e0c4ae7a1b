"""What every layer with an adapter does: forward, merging, PiSSA; `nn` has them."""

import contextlib
import functools
import math
from collections.abc import Iterable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lora_kernels import options
from lora_kernels.functional import lora_linear
from lora_kernels.state import LayerState

Init = Literal["kaiming", "pissa", "random"]
_INITS = ("kaiming", "pissa", "random")
# What an adapter adds to a layer: parameters, buffers, attributes.
_ADDED = (
    "lora_A", "lora_B", "pissa_A", "pissa_B", "merged_base", "_base_weight_cpu",
    "alpha", "dropout", "use_rslora", "_merged", "_disabled",
)  # fmt: skip
_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
    "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)  # fmt: skip
# What a base may hold; in the first two adapters are fp32 by default, or most steps round away.
_HALVES = (torch.float16, torch.bfloat16)
_DTYPES = (*_HALVES, torch.float32, torch.float64)
OFFLOADED = (
    "offloaded by accelerate; load the model without offloading, or bring it back with"
    " accelerate.hooks.remove_hook_from_module(model, recurse=True)"
)
# Above this size PiSSA takes the leading singular triplets from a randomised SVD.
_EXACT_SVD_ELEMENTS = 1 << 20


class LoRALayer(LayerState):
    """A frozen base of `weight` and `bias`, and the adapter `lora_A` [rank, in_features], `lora_B`
    [out_features, rank]."""

    # Whether `weight` is [in_features, out_features].
    fan_in_fan_out = False
    # The plain layer's class.
    base_class: type[nn.Module]
    in_features: int
    out_features: int

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
    ) -> "LoRALayer":
        """A layer that shares `linear`'s weight and bias objects (now frozen), its buffers,
        submodules, attributes and train mode.

        `init` is "kaiming" (A uniform, B zero: the output is unchanged), "pissa" (Meng et al.,
        2024, arXiv:2404.02948: the adapter starts as the principal part of the weight, which is
        taken out of it) or "random" (B uniform too: the output changes at once, for tests).

        Raises:
            TypeError: not exactly a layer of this kind. ValueError: hooks, parametrizations, or a
                weight that is pruned, sharded, quantised or of another dtype.
        """
        cls._require_base(linear)
        reason = refusal(linear) or _hooked(linear)
        if reason is not None:
            raise ValueError(f"linear: {reason}")
        layer = cls._prepare(linear, rank, alpha, dropout, use_rslora, adapter_dtype, init)
        layer._take_pissa()
        return layer

    @classmethod
    def _prepare(
        cls,
        linear: nn.Module,
        rank: int,
        alpha: float | None,
        dropout: float,
        use_rslora: bool,
        adapter_dtype: torch.dtype | None,
        init: Init,
    ) -> "LoRALayer":
        """`from_linear`, of a layer that `refusal` has nothing against, without the step that
        changes the weight, `_take_pissa`."""
        if init not in _INITS:
            raise ValueError(f"init: got {init!r}, legal values are {', '.join(_INITS)}")
        layer = _twin(linear, cls)
        layer._add_adapter(rank, alpha, dropout, use_rslora, adapter_dtype)
        layer.reset_lora_parameters()
        if init == "pissa":
            layer._init_pissa()
        elif init == "random":
            nn.init.kaiming_uniform_(layer.lora_B, a=math.sqrt(5))
        return layer

    def move_into(self, linear: nn.Module) -> None:
        """Makes `linear`, from which this layer was prepared, the layer with this adapter.

        It stays the same object: whoever holds it, its hooks and whatever else it has, go on.
        """
        linear.__class__ = type(self)
        for key in _ADDED:
            for mine, theirs in zip(_stores(self), _stores(linear), strict=True):
                if key in mine:
                    theirs[key] = mine[key]
        linear._non_persistent_buffers_set |= self._non_persistent_buffers_set

    @torch.no_grad()
    def move_out(self) -> None:
        """Undoes `move_into`: this object is a plain layer again, the base, or the sum after a
        final merge. ValueError: the layer is not what it was made into, `why_stuck`."""
        self._refuse("remove", self.why_stuck())
        self._settle()
        self.__class__ = self.base_class
        for key in _ADDED:
            for store in _stores(self):
                store.pop(key, None)
            self._non_persistent_buffers_set.discard(key)

    @torch.inference_mode(False)  # in which parameters would be made that cannot be trained
    def _add_adapter(
        self,
        rank: int,
        alpha: float | None,
        dropout: float,
        use_rslora: bool,
        adapter_dtype: torch.dtype | None,
    ) -> None:
        rank, alpha = options.check_rank(rank), options.check_alpha(alpha)
        dropout = options.check_dropout(dropout)
        use_rslora = options.check_flag(use_rslora, "use_rslora")
        if (odd := _odd_type(self.weight)) is not None:
            raise TypeError(f"weight: is {odd}")
        half = self.weight.dtype in _HALVES
        dtype = adapter_dtype or (torch.float32 if half else self.weight.dtype)
        if dtype != self.weight.dtype and not (half and dtype == torch.float32):
            legal = " or torch.float32" if half else ""
            raise TypeError(
                f"adapter_dtype: expected {self.weight.dtype} (the weight's){legal}, got {dtype!r}"
            )
        factory = {"device": self.weight.device, "dtype": dtype}
        self.alpha, self.dropout, self.use_rslora = alpha, dropout, use_rslora
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, **factory))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, rank, **factory))
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.register_buffer("merged_base", None)
        self.register_buffer("pissa_A", None)
        self.register_buffer("pissa_B", None)
        self._base_weight_cpu: Tensor | None = None
        self._merged: Literal[False, "kept", "final"] = False
        self._disabled = False

    @property
    def matrix(self) -> Tensor:
        """`weight` as [out_features, in_features], a view."""
        return self._oriented(self.weight)

    def _oriented(self, weight: Tensor) -> Tensor:
        return weight.t() if self.fan_in_fan_out else weight

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    @property
    def scaling(self) -> float:
        if self.alpha is None:
            return 1.0
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    @property
    def merged(self) -> bool:
        """Whether the weight holds base plus adapter."""
        return bool(self._merged)

    def reset_parameters(self) -> None:
        """Initialises base and adapter as a new layer does."""
        if "_merged" not in vars(self):  # nn.Linear's constructor calls this
            return self._reset_base()
        self._require_unmerged("reset_parameters")
        self._refuse("reset_parameters", self.why_fixed("weight", "bias", "lora_A", "lora_B"))
        self.pissa_A = self.pissa_B = None
        self._reset_base()
        self.reset_lora_parameters()

    @staticmethod
    def _require_base(linear: nn.Module) -> None:
        """TypeError for a layer of another kind."""
        raise NotImplementedError

    def _reset_base(self) -> None:
        raise NotImplementedError

    @torch.no_grad()
    def reset_lora_parameters(self) -> None:
        """A Kaiming-uniform, B zero, as in PEFT; the layer's output is then the base's.

        All ranks of a sharded layer make the call; they get the A of one process.
        What PiSSA took out of the base is added back.
        """
        self._require_unmerged("reset_lora_parameters")
        self._refuse("reset_lora_parameters", self.why_fixed())
        self._return_pissa()
        _draw(self.lora_A)
        nn.init.zeros_(self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        if self._disabled:
            return self._base_forward(x)
        if self._merged:
            return nn.functional.linear(x, self.matrix, self.bias)
        return lora_linear(
            x,
            self.matrix,
            self.lora_A,
            self.lora_B,
            self.bias,
            scaling=self.scaling,
            dropout_p=self.dropout if self.training else 0.0,
        )

    def _base_forward(self, x: Tensor) -> Tensor:
        """The layer without its adapter, whatever state it is in."""
        if self._merged == "final":
            raise RuntimeError("merged with keep_base=False: the base of this layer is gone")
        if self._merged:
            return nn.functional.linear(x, self._oriented(self._kept_base()), self.bias)
        if self.pissa_A is None:
            return nn.functional.linear(x, self.matrix, self.bias)
        return lora_linear(
            x, self.matrix, self.pissa_A, self.pissa_B, self.bias, scaling=self.scaling
        )

    # ------------------------------------------------------------------------------------ merging

    @torch.no_grad()
    def merge(self, keep_base: bool | Literal["cpu"] = True) -> None:
        """Adds scaling B A to the weight, in place; the layer then costs a plain linear.

        keep_base True or "cpu" keeps the base weight there or in host memory, so `unmerge` is
        bit-exact.
        False keeps nothing: the adapter is absorbed for good, `lora_B` becomes zero and `unmerge`
        raises.
        A weight tied to another module changes there too: `merge_lora` checks a whole model for
        that. An error midway leaves the layer as it was.

        Raises:
            ValueError: keep_base, or `why_unmergeable`. RuntimeError: the layer is merged.
        """
        if keep_base not in (True, False, "cpu"):
            raise ValueError(
                f"keep_base: got {keep_base!r}, legal values are True, False and 'cpu'"
            )
        self._require_unmerged("merge")
        self._refuse("merge", self.why_unmergeable(keep_base))
        try:
            if keep_base == "cpu":
                self._base_weight_cpu = self.weight.detach().to("cpu", copy=True)
            elif keep_base:
                self.merged_base = self.weight.detach().clone()
            else:
                self.merged_base = self.weight.new_empty(0)
            _add_product(self.matrix, self.factor("lora_B"), self.factor("lora_A"), self.scaling)
        except BaseException:
            if keep_base and (self.merged_base is not None or self._base_weight_cpu is not None):
                self.weight.copy_(self._kept_base())
            self.merged_base = self._base_weight_cpu = None
            raise
        if not keep_base:
            self.lora_B.zero_()
            self.pissa_A = self.pissa_B = None
        self._merged = "kept" if keep_base else "final"

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """The weight as a merge leaves it, in its shape and dtype; the parameter's own if the layer
        is merged."""
        if self._merged:
            return self.weight.detach()
        total = _sum(self.matrix, self.factor("lora_B"), self.factor("lora_A"), self.scaling)
        return self._oriented(total).to(self.weight.dtype).contiguous()

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restores the base weight that `merge` kept, bit for bit.

        RuntimeError: nothing is kept. ValueError: the weight holds no values (offloaded, meta).
        """
        if self._merged == "final":
            raise RuntimeError("unmerge: merged with keep_base=False, the base weight was not kept")
        if not self._merged:
            raise RuntimeError("unmerge: the layer is not merged")
        self._refuse("unmerge", self.why_valueless("weight"))
        self.weight.copy_(self._kept_base())
        self.merged_base = self._base_weight_cpu = None
        self._merged = False

    def _kept_base(self) -> Tensor:
        base = self.merged_base if self.merged_base is not None else self._base_weight_cpu
        return base.to(device=self.weight.device, dtype=self.weight.dtype)

    @staticmethod
    def _refuse(what: str, reason: str | None) -> None:
        if reason is not None:
            raise ValueError(f"{what}: {reason}")

    def why_valueless(self, *names: str) -> str | None:
        """Why these tensors cannot be computed with and changed; None if they can."""
        reason = _computed(self, names)
        if reason is not None:
            return reason
        for name in names:
            tensor = getattr(self, name)
            if tensor.is_meta:
                return f"its {name} is on the meta device, without values, or {OFFLOADED}"
            if (odd := _odd_type(tensor)) is not None:
                return f"its {name} is {odd}"
        return None

    def why_unmergeable(self, keep_base: bool | Literal["cpu"] = True) -> str | None:
        """Why the adapter cannot go into the weight; None if it can."""
        reason = self.why_valueless("weight")
        if reason is None and self.lora_A.is_meta:
            reason = f"its lora_A is on the meta device, without values, or {OFFLOADED}"
        if reason is None and not keep_base:  # which zeroes lora_B
            reason = _computed(self, ("lora_B",))
        return reason

    def why_stuck(self) -> str | None:
        """Why the adapter cannot be taken out of the layer; None if it can."""
        reason = _foreign_forward(self) or _computed(self, ("weight", "bias", "lora_A", "lora_B"))
        if reason is None and (self._merged == "kept" or self.pissa_A is not None):
            reason = self.why_valueless("weight")
        return reason

    def why_fixed(self, *names: str) -> str | None:
        """Why values written to these tensors (lora_A, lora_B) would be lost; None if not."""
        reason = _computed(self, names or ("lora_A", "lora_B"))
        if reason is None and is_offloaded(self):
            reason = f"is {OFFLOADED}"
        return reason

    def _require_unmerged(self, what: str) -> None:
        if self._merged:
            raise RuntimeError(f"{what}: the layer is merged; call unmerge() first")

    @torch.no_grad()
    def _init_pissa(self) -> None:
        weight = self.matrix if self.weight.dtype == torch.float64 else self.matrix.float()
        if weight.is_meta:
            raise ValueError(
                "init: 'pissa' needs the values of the weight, which is on the meta device"
            )
        if not weight.isfinite().all():
            raise ValueError("init: 'pissa' needs a weight of finite values")
        if self.rank > min(weight.shape):
            raise ValueError(
                f"rank: 'pissa' takes at most min(N, K) = {min(weight.shape)}, got {self.rank}"
            )
        if self.scaling <= 0:
            raise ValueError(f"alpha: 'pissa' needs a positive scaling, got {self.scaling}")
        if weight.numel() <= _EXACT_SVD_ELEMENTS:
            U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        else:
            U, S, V = torch.svd_lowrank(weight, q=min(self.rank + 16, *weight.shape), niter=4)
            Vh = V.t()
        root = (S[: self.rank] / self.scaling).sqrt()
        self.lora_A.copy_(root[:, None] * Vh[: self.rank])
        self.lora_B.copy_(U[:, : self.rank] * root)
        self.pissa_A, self.pissa_B = self.lora_A.detach().clone(), self.lora_B.detach().clone()

    def _take_pissa(self) -> None:
        """Takes the principal part out of the weight, if the adapter starts as that."""
        if self.pissa_A is not None:
            _add_product(self.matrix, self.pissa_B, self.pissa_A, -self.scaling)

    def _return_pissa(self) -> None:
        """Adds back what PiSSA took out of the weight."""
        if self.pissa_A is not None:
            _add_product(self.matrix, self.pissa_B, self.pissa_A, self.scaling)
            self.pissa_A = self.pissa_B = None

    def delta_factors(self) -> tuple[Tensor, Tensor]:
        """(A, B) of the adapter relative to the original base: rank r, with PiSSA rank 2r.

        PiSSA took scaling B0 A0 out of the weight, so on the original base the adapter is
        scaling (B A - B0 A0).
        """
        with present(self):
            lora_A, lora_B = self.factor("lora_A"), self.factor("lora_B")
            if self.pissa_A is None:
                return lora_A, lora_B
            A, B = (lora_A, self.pissa_A), (lora_B, -self.pissa_B)
            return torch.cat(list(map(whole, A))), torch.cat(list(map(whole, B)), dim=1)

    def factor(self, name: Literal["lora_A", "lora_B"]) -> Tensor:
        """lora_A or lora_B as the next forward has it: where pruning or weight norm compute it in a
        hook, the attribute is that of the last one."""
        for hook in self._forward_pre_hooks.values():
            if getattr(hook, "_tensor_name", None) == name:
                return hook.apply_mask(self)
            if getattr(hook, "name", None) == name and hasattr(hook, "compute_weight"):
                without_update = (False,) if hasattr(hook, "n_power_iterations") else ()
                return hook.compute_weight(self, *without_update)
        return getattr(self, name)

    def factor_parameters(self, *names: Literal["lora_A", "lora_B"]) -> list[nn.Parameter]:
        """These, or the parameters that they are computed from."""
        keys = [key for name in names for key in _sources(self, name)]
        return [self.get_parameter(key) for key in keys]

    @torch.no_grad()
    def set_adapter(self, A: Tensor, B: Tensor) -> None:
        """Replaces lora_A, lora_B by new parameters of any rank; `scaling` stays the same number.

        A [r, in_features] and B [out_features, r] are copied, in the adapter's own dtype and
        device. What PiSSA took out of the weight keeps its rank. An optimizer goes on holding the
        old parameters: `adjust_rank` exchanges them there.

        Raises:
            ValueError: shapes that do not fit, a layer that is sharded or offloaded, lora_A or
                lora_B pruned or parametrized. RuntimeError: the layer is merged.
        """
        self._require_unmerged("set_adapter")
        self._refuse("set_adapter", self.why_fixed())
        if is_sharded(self.lora_A):
            raise ValueError(
                f"lora_A: is sharded, {self.lora_A.placements}; change the rank before"
                " parallelize_module or fully_shard"
            )
        rank = A.shape[0] if A.dim() == 2 else 0
        for name, value, shape in (
            ("A", A, (rank, self.in_features)),
            ("B", B, (self.out_features, rank)),
        ):
            if value.shape != shape or rank == 0:
                raise ValueError(
                    f"{name}: expected A [r, {self.in_features}] and B [{self.out_features}, r]"
                    f" with r >= 1, got {tuple(value.shape)}"
                )
        scaling = self.scaling
        for name, value in (("lora_A", A), ("lora_B", B)):
            old = getattr(self, name)
            value = value.detach().to(old, copy=True).contiguous()
            setattr(self, name, nn.Parameter(value, requires_grad=old.requires_grad))
        if self.alpha is not None:
            divisor = math.sqrt(rank) if self.use_rslora else rank
            alpha = scaling * divisor
            # The product is rounded; a neighbour may give the quotient back exactly.
            nearby = (alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
            self.alpha = min(nearby, key=lambda value: abs(value / divisor - scaling))

    @torch.no_grad()
    def to_original_base(self) -> None:
        """Makes a layer started with PiSSA a plain one of rank 2r that computes the same.

        The weight gets back what PiSSA took out of it (equal up to one rounding), the adapter
        becomes `delta_factors`. Other layers stay as they are. RuntimeError: the layer is merged.
        """
        self._require_unmerged("to_original_base")
        if self.pissa_A is None:
            return
        self._refuse("to_original_base", self.why_fixed() or self.why_valueless("weight"))
        factors = self.delta_factors()
        _add_product(self.matrix, self.pissa_B, self.pissa_A, self.scaling)
        self.pissa_A = self.pissa_B = None
        self.set_adapter(*factors)

    @torch.no_grad()
    def to_linear(self) -> nn.Module:
        """A plain layer that shares weight and bias: the base, or the sum after a final merge.

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
        base = f"in_features={self.in_features}, out_features={self.out_features}"
        parts = [f"{base}, bias={self.bias is not None}"]
        parts += [f"rank={self.rank}", f"scaling={self.scaling:g}"]
        if self.dropout:
            parts.append(f"dropout={self.dropout:g}")
        if self.lora_A.dtype != self.weight.dtype:
            parts.append(f"adapter_dtype={self.lora_A.dtype}")
        if self.merged:
            parts.append("merged=True")
        return ", ".join(parts)


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is Transformers' Conv1D, a linear layer whose weight is [in, out]."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")


def features(module: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of a linear layer, with an adapter or without."""
    if is_conv1d(module):
        return module.nx, module.nf
    return module.in_features, module.out_features


def refusal(linear: nn.Module) -> str | None:
    """Why a linear layer cannot be replaced without changing what it does; None if it can."""
    if is_parametrized(linear):
        return f"has parametrizations on {', '.join(linear.parametrizations)}; remove them first"
    if (reason := _computed(linear, ("weight", "bias"))) is not None:
        return reason
    weight = linear.weight
    if is_sharded(weight):
        return (
            f"its weight is sharded already, {weight.placements}; give it an adapter before"
            " parallelize_module or fully_shard"
        )
    if (odd := _odd_type(weight)) is not None:
        return f"its weight is {odd}"
    K, N = features(linear)
    expected = (K, N) if is_conv1d(linear) else (N, K)
    if weight.shape != expected:
        return f"its weight has shape {tuple(weight.shape)}, expected {expected} of its features"
    if (reason := _foreign_forward(linear)) is not None:
        return reason
    taken = sorted({name for store in _stores(linear) for name in store if name in _reserved()})
    if taken:
        return f"has attributes that a layer with an adapter needs: {', '.join(taken)}; rename them"
    return None


def _foreign_forward(layer: nn.Module) -> str | None:
    """Why the forward of a layer's class is not what is called; None if it is."""
    if hasattr(layer, "_hf_hook"):
        return (
            "carries a hook of accelerate (_hf_hook), bound to the layer's forward; call"
            " accelerate.hooks.remove_hook_from_module(model, recurse=True) first"
        )
    if "forward" in vars(layer):
        return "has its forward overridden on the instance; remove that first"
    return None


def _sources(module: nn.Module, name: str) -> list[str]:
    """The parameter of this name, or those it is computed from."""
    if name in module._parameters:
        return [name]
    starts = (f"{name}_", f"parametrizations.{name}.")
    return [key for key, _ in module.named_parameters() if key.startswith(starts)]


def _computed(module: nn.Module, names: Iterable[str]) -> str | None:
    """Which of these tensors of a layer something makes anew for every forward, so that a change
    of it is lost; None if none is."""
    for name in names:
        if name in module._parameters or name in module._buffers:
            continue
        sources = _sources(module, name)
        if not sources:
            return f"its {name} is no parameter"
        return (
            f"its {name} is computed from {', '.join(sources)} (pruning, weight norm or another"
            " parametrization); make it a parameter again first, with torch.nn.utils.prune.remove,"
            " remove_weight_norm, parametrize.remove_parametrizations"
        )
    return None


def _odd_type(tensor: Tensor) -> str | None:
    """What a weight is that no adapter's kernel can read; None for ordinary tensors."""
    kind = type(tensor)
    decides = kind.__torch_dispatch__ is not Tensor.__torch_dispatch__
    if decides and not is_sharded(tensor) and not kind.__module__.startswith("torch._subclasses"):
        return (
            f"of type {kind.__name__}, a tensor subclass that decides itself what operations do, as"
            " torchao's quantised ones; dequantise it, or use PEFT's adapter and fuse_peft, which"
            " leave the base's own forward in place"
        )
    if tensor.dtype not in _DTYPES:
        legal = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        return f"{tensor.dtype}; an adapter stands beside a weight of {legal}"
    return None


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate holds a module's own parameters elsewhere between its calls."""
    held = module._parameters.values()
    return hasattr(module, "_hf_hook") and any(p is not None and p.is_meta for p in held)


@contextlib.contextmanager
def present(module: nn.Module) -> Iterator[None]:
    """Within it the parameters of a module that accelerate has offloaded can be read; what is
    written to them is lost."""
    hook = module._hf_hook if is_offloaded(module) else None
    if hook is not None:
        hook.pre_forward(module)
    try:
        yield
    finally:
        if hook is not None:
            hook.post_forward(module, None)


def _hooked(linear: nn.Module) -> str | None:
    """Why a second layer cannot share what a linear layer does."""
    hooks = [name for name in _HOOKS if getattr(linear, name, None)]
    if not hooks:
        return None
    return (
        f"carries hooks ({', '.join(hooks)}), which stay with it; remove them first, or let"
        " apply_lora give the layer itself an adapter"
    )


@functools.cache
def _reserved() -> frozenset[str]:
    """The names that a plain layer must not use otherwise."""
    return frozenset(_ADDED).union(dir(LoRALayer)).difference(dir(nn.Module))


def _stores(module: nn.Module) -> tuple[dict, dict, dict, dict]:
    """Where a module's attributes live."""
    return module._parameters, module._buffers, module._modules, module.__dict__


def _twin(module: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """A module of this kind that shares everything `module` holds, but for its hooks."""
    twin = kind.__new__(kind)
    nn.Module.__init__(twin)
    held = vars(module).items()
    twin.__dict__.update({key: value for key, value in held if key not in vars(nn.Module())})
    for mine, theirs in zip(_stores(twin)[:3], _stores(module)[:3], strict=True):
        mine.update(theirs)
    twin._non_persistent_buffers_set |= module._non_persistent_buffers_set
    return twin.train(module.training)


def _draw(A: Tensor) -> None:
    """Kaiming-uniform. Each rank drawing its own part would draw the same rows from equal seeds,
    and other copies from different ones, so the first rank's draw goes to all."""
    if not is_sharded(A) or A.is_meta:
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        return
    mesh = A.device_mesh
    value = torch.empty(A.shape, dtype=A.dtype, device=mesh.device_type)
    nn.init.kaiming_uniform_(value, a=math.sqrt(5))
    for i in range(mesh.ndim):
        torch.distributed.broadcast(value, group=mesh.get_group(i), group_src=0)
    copy_whole(A, value)


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, asked without importing what defines it."""
    return hasattr(tensor, "placements")


def whole(tensor: Tensor) -> Tensor:
    """A DTensor gathered on every rank, which all of them call for; another tensor as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


@torch.no_grad()
def copy_whole(target: Tensor, value: Tensor) -> None:
    """target.copy_(value) for a value that every rank has whole."""
    if is_sharded(target):
        from torch.distributed.tensor import DTensor, Replicate

        mesh = target.device_mesh
        value = value.to(target.device)
        value = DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
    target.copy_(value)


@torch.no_grad()
def _add_product(weight: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """weight += scale * left @ right, formed in fp32 and rounded once."""
    weight.copy_(_sum(weight, left, right, scale))


def _sum(weight: Tensor, left: Tensor, right: Tensor, scale: float) -> Tensor:
    """weight + scale * left @ right, in fp32 (fp64 if the weight is)."""
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return torch.addmm(weight.to(dtype), left.to(dtype), right.to(dtype), alpha=scale)
