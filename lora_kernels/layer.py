"""What every layer with an adapter does: forward, merging, PiSSA; `nn` has them."""

import functools
import math
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
            TypeError: not exactly a layer of this kind. ValueError: hooks or parametrizations.
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
        final merge."""
        self._settle()
        self.__class__ = self.base_class
        for key in _ADDED:
            for store in _stores(self):
                store.pop(key, None)
            self._non_persistent_buffers_set.discard(key)

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
        if not self.weight.is_floating_point():
            raise TypeError(f"weight: expected a floating dtype, got {self.weight.dtype}")
        dtype = adapter_dtype or self.weight.dtype
        double = self.weight.dtype == torch.float64
        if dtype != self.weight.dtype and (dtype != torch.float32 or double):
            legal = "" if double else " or torch.float32"
            raise TypeError(
                f"adapter_dtype: expected {self.weight.dtype} (the weight's){legal}, got {dtype}"
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
        if "lora_A" not in self._parameters:  # nn.Linear's constructor calls this
            return self._reset_base()
        self._require_unmerged("reset_parameters")
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
        that.
        """
        if keep_base not in (True, False, "cpu"):
            raise ValueError(
                f"keep_base: got {keep_base!r}, legal values are True, False and 'cpu'"
            )
        self._require_unmerged("merge")
        if keep_base == "cpu":
            self._base_weight_cpu = self.weight.detach().to("cpu", copy=True)
        elif keep_base:
            self.merged_base = self.weight.detach().clone()
        else:
            self.merged_base = torch.empty(0, dtype=self.weight.dtype, device=self.weight.device)
        _add_product(self.matrix, self.lora_B, self.lora_A, self.scaling)
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
        total = _sum(self.matrix, self.lora_B, self.lora_A, self.scaling)
        return self._oriented(total).to(self.weight.dtype).contiguous()

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restores the base weight that `merge` kept, bit for bit."""
        if self._merged == "final":
            raise RuntimeError("unmerge: merged with keep_base=False, the base weight was not kept")
        if not self._merged:
            raise RuntimeError("unmerge: the layer is not merged")
        self.weight.copy_(self._kept_base())
        self.merged_base = self._base_weight_cpu = None
        self._merged = False

    def _kept_base(self) -> Tensor:
        base = self.merged_base if self.merged_base is not None else self._base_weight_cpu
        return base.to(device=self.weight.device, dtype=self.weight.dtype)

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
        if self.pissa_A is None:
            return self.lora_A, self.lora_B
        A, B = (self.lora_A, self.pissa_A), (self.lora_B, -self.pissa_B)
        return torch.cat(list(map(whole, A))), torch.cat(list(map(whole, B)), dim=1)

    @torch.no_grad()
    def set_adapter(self, A: Tensor, B: Tensor) -> None:
        """Replaces lora_A, lora_B by new parameters of any rank; `scaling` stays the same number.

        A [r, in_features] and B [out_features, r] are copied, in the adapter's own dtype and
        device. What PiSSA took out of the weight keeps its rank. An optimizer goes on holding the
        old parameters: `adjust_rank` exchanges them there.

        Raises:
            ValueError: shapes that do not fit, a sharded layer. RuntimeError: the layer is merged.
        """
        self._require_unmerged("set_adapter")
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
        factors = self.delta_factors()
        _add_product(self.matrix, self.pissa_B, self.pissa_A, self.scaling)
        self.pissa_A = self.pissa_B = None
        self.set_adapter(*factors)

    @torch.no_grad()
    def to_linear(self) -> nn.Module:
        """A plain layer that shares weight and bias: the base, or the sum after a final merge."""
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
    if is_sharded(linear.weight):
        return (
            f"its weight is sharded already, {linear.weight.placements}; give it an adapter before"
            " parallelize_module or fully_shard"
        )
    if hasattr(linear, "_hf_hook"):
        return "carries a hook of accelerate (_hf_hook), which calls the plain forward; remove it"
    if "forward" in vars(linear):
        return "has its forward overridden on the instance; remove that first"
    taken = sorted({name for store in _stores(linear) for name in store if name in _reserved()})
    if taken:
        return f"has attributes that a layer with an adapter needs: {', '.join(taken)}; rename them"
    return None


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
