"""How an adapter starts; and what PiSSA and OLoRA, which start it as a part of the weight, took out
of that."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lora_kernels.nn.merging import add_product
from lora_kernels.nn.tensors import Factors, LayerTensors
from lora_kernels.offloading import present
from lora_kernels.sharding import copy_whole, is_sharded, whole
from lora_kernels.weights import QuantizedTensor

Init = Literal["kaiming", "pissa", "random", "gaussian", "orthogonal", "olora", "eva"]
INITS: tuple[Init, ...] = get_args(Init)
# Those that take the adapter's first product out of the weight.
FROM_WEIGHT = ("pissa", "olora")
# Above this size PiSSA takes the leading singular triplets from a randomised SVD.
_EXACT_SVD_ELEMENTS = 1 << 20


class Initialising(LayerTensors):
    """The starts of `LoRALayer`."""

    @torch.no_grad()
    def reset_lora_parameters(self) -> None:
        """A Kaiming-uniform, B zero, as in PEFT; the layer's output is then the base's.

        All ranks of a sharded layer make the call; they get the A of one process.
        What PiSSA or OLoRA took out of the base is added back.
        """
        self._require_unmerged("reset_lora_parameters")
        self._refuse("reset_lora_parameters", self.why_fixed())
        self._return_pissa()
        self._start(self, "kaiming")
        self._settle_start()

    def _start(self, adapter: Factors, init: Init) -> None:
        """The first values of lora_A and lora_B of an adapter of this layer."""
        reset_factors(adapter, init)

    def _settle_start(self) -> None:
        """What follows from the first values of lora_A and lora_B."""

    @torch.no_grad()
    def _init_from_weight(self, init: Init) -> None:
        """`FROM_WEIGHT`; `_take_pissa` changes the weight afterwards."""
        if isinstance(self.weight, QuantizedTensor):
            raise ValueError(
                f"init: {init!r} changes the weight, which is quantised; quantize_base starts an"
                " adapter with loftq=True"
            )
        weight = self.matrix if self.weight.dtype == torch.float64 else self.matrix.float()
        if weight.is_meta:
            raise ValueError(
                f"init: {init!r} needs the values of the weight, which is on the meta device"
            )
        if not weight.isfinite().all():
            raise ValueError(f"init: {init!r} needs a weight of finite values")
        if self.rank > min(weight.shape):
            raise ValueError(
                f"rank: {init!r} takes at most min(N, K) = {min(weight.shape)}, got {self.rank}"
            )
        if init == "pissa":
            self._principal(weight)
        else:
            Q, R = torch.linalg.qr(weight)
            self.lora_A.copy_(R[: self.rank])
            self.lora_B.copy_(Q[:, : self.rank])
        self.pissa_A, self.pissa_B = self.lora_A.detach().clone(), self.lora_B.detach().clone()

    def _principal(self, weight: Tensor) -> None:
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

    def _take_pissa(self) -> None:
        """Takes its part out of the weight, if the adapter starts as one."""
        if self.pissa_A is not None and self.pissa_B is not None:
            add_product(self.matrix, self.pissa_B, self.pissa_A, -self.scaling)

    def _return_pissa(self) -> None:
        """Adds back what PiSSA or OLoRA took out of the weight."""
        if self.pissa_A is not None and self.pissa_B is not None:
            add_product(self.matrix, self.pissa_B, self.pissa_A, self.scaling)
            self.pissa_A = self.pissa_B = None

    def delta_factors(self) -> tuple[Tensor, Tensor]:
        """(A, B) of the first adapter relative to the original base: rank r, with PiSSA or
        OLoRA rank 2r.

        They took scaling B0 A0 out of the weight, so on the original base the adapter is
        scaling (B A - B0 A0).
        """
        with present(self):
            lora_A, lora_B = self.factors()
            if self.pissa_A is None or self.pissa_B is None:
                return lora_A, lora_B
            A, B = (lora_A, self.pissa_A), (lora_B, -self.pissa_B)
            return torch.cat(list(map(whole, A))), torch.cat(list(map(whole, B)), dim=1)

    @torch.no_grad()
    def to_original_base(self) -> None:
        """Makes a layer started with PiSSA or OLoRA a plain one of rank 2r that computes the same.

        The weight gets back what was taken out of it (equal up to one rounding), the adapter
        becomes `delta_factors`. Other layers stay as they are. RuntimeError: the layer is merged.
        """
        self._require_unmerged("to_original_base")
        if self.pissa_A is None or self.pissa_B is None:
            return
        reason = self.why_fixed() or self.why_not_two() or self.why_valueless("weight")
        self._refuse("to_original_base", reason)
        factors = self.delta_factors()
        add_product(self.matrix, self.pissa_B, self.pissa_A, self.scaling)
        self.pissa_A = self.pissa_B = None
        self.set_factors(*factors)


@torch.no_grad()
def reset_factors(adapter: Factors, init: Init = "kaiming") -> None:
    """A Kaiming-uniform and B zero; "random" B likewise, "gaussian" A normal of deviation 1 / rank,
    "orthogonal" both from the two halves of an orthogonal matrix, whose product is zero, "eva" A
    zero too until `initialize_eva`."""
    if init == "orthogonal":
        return _orthogonal(adapter)
    if init == "gaussian":
        nn.init.normal_(adapter.lora_A, std=1 / adapter.rank)
    elif init == "eva":
        nn.init.zeros_(adapter.lora_A)
    else:
        draw(adapter.lora_A, adapter.rank_dim)
    if init == "random":
        draw(adapter.lora_B, adapter.rank_dim)
    else:
        nn.init.zeros_(adapter.lora_B)
    return None


def _orthogonal(adapter: Factors) -> None:
    """As PEFT's: https://datta0.github.io/posts/rethink-lora-init/#orthogonal-initialisation."""
    rank, (N, K) = adapter.rank, (adapter.lora_B.shape[0], adapter.lora_A.shape[1])
    if rank % 2:
        raise ValueError(f"rank: 'orthogonal' needs an even one, got {rank}")
    Q, _ = torch.linalg.qr(torch.randn(rank, rank))
    A, B = torch.randn(K, rank // 2) @ Q[0::2], torch.randn(N, rank // 2) @ Q[1::2]
    adapter.lora_A.copy_(A.t() / 10)
    adapter.lora_B.copy_(B / 10)


@torch.no_grad()
def draw(A: Tensor, rank_dim: int = -2) -> None:
    """Kaiming-uniform. Each rank drawing its own part would draw the same rows from equal seeds,
    and other copies from different ones, so the first rank's draw goes to all."""
    if not is_sharded(A) or A.is_meta:
        nn.init.kaiming_uniform_(A.flatten(0, rank_dim), a=math.sqrt(5))
        return
    mesh = A.device_mesh
    value = torch.empty(A.shape, dtype=A.dtype, device=mesh.device_type)
    nn.init.kaiming_uniform_(value, a=math.sqrt(5))
    for i in range(mesh.ndim):
        torch.distributed.broadcast(value, group=mesh.get_group(i), group_src=0)
    copy_whole(A, value)
