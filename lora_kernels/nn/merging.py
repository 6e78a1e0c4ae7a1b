"""An adapter added to its weight, and taken out again."""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from lora_kernels.bases import computed
from lora_kernels.nn.named import Acting, Named
from lora_kernels.offloading import OFFLOADED
from lora_kernels.weights import QuantizedTensor, like

Into = Literal["dequantised", "requantise"]


class Merging(Named):
    """`LoRALayer`, merged and not.

    `merged_base` and `_base_weight_cpu` hold what `unmerge` restores, on the device or the host.
    """

    @torch.no_grad()
    def merge(self, keep_base: bool | Literal["cpu"] = True) -> None:
        """Adds scaling B A of the adapters in use to the weight, in place; the layer then costs a
        plain linear.

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
            self._take_up()
        except BaseException:
            if keep_base and (self.merged_base is not None or self._base_weight_cpu is not None):
                self.weight.copy_(self._kept_base())
            self.merged_base = self._base_weight_cpu = None
            raise
        if not keep_base:
            self._absorb()
            self.pissa_A = self.pissa_B = None
        self._merged = "kept" if keep_base else "final"

    @torch.no_grad()
    def merge_quantised(self, into: Into) -> float:
        """Merges a quantised layer for good: into a weight of the base's dtype, or one that is
        quantised anew as the base was. Returns how much of the update the new weight holds: its
        component along the update, 1 where nothing is lost to rounding.

        Raises:
            ValueError: `why_unmergeable`, or a layout that nothing here makes.
        """
        self._require_unmerged("merge")
        self._refuse("merge", self.why_unmergeable(False, into))
        weight = self.weight
        assert isinstance(weight, QuantizedTensor)  # of a layer that this is asked of
        base = weight.record.dequantize(torch.float32)
        total = self._total(base)
        update = total - base
        new: Tensor
        if into == "requantise":
            record = like(weight.record, total)
            new = QuantizedTensor(record, weight.dtype, weight.transposed)
            held = record.dequantize(torch.float32)
        else:
            new = self._oriented(total.to(weight.dtype)).contiguous()
            held = self._oriented(new).float()
        self.weight = nn.Parameter(new, requires_grad=False)
        self._absorb()
        self.merged_base = self.lora_A.new_empty(0)
        self._merged = "final"
        size = update.square().sum()
        return float(((held - base) * update).sum() / size) if size else 1.0

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """The weight as a merge leaves it, in its shape and dtype; the parameter's own if the layer
        is merged."""
        if self._merged:
            return self.weight.detach()
        total = self._total(self.matrix)
        return self._oriented(total).to(self.weight.dtype).contiguous()

    def _take_up(self) -> None:
        """Writes into the weight what it becomes."""
        self.matrix.copy_(self._total(self.matrix))

    def _total(self, base: Tensor) -> Tensor:
        """What a base [out_features, in_features] becomes with the adapters in use, in fp32 (fp64
        if it is)."""
        return _sum(base, self.acting())

    def _absorb(self) -> None:
        """Leaves an adapter, which is in the weight now, that adds nothing to it."""
        for name in self._active:
            self.adapter(name).lora_B.zero_()

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

    def _required_base(self) -> Tensor:
        """The base of a merged layer. RuntimeError: it was not kept."""
        if self._merged == "final":
            raise RuntimeError("merged with keep_base=False: the base of this layer is gone")
        return self._kept_base()

    def _kept_base(self) -> Tensor:
        base = self.merged_base if self.merged_base is not None else self._base_weight_cpu
        assert base is not None  # of a layer that is merged and kept it
        return base.to(device=self.weight.device, dtype=self.weight.dtype)

    def why_unmergeable(
        self, keep_base: bool | Literal["cpu"] = True, into: Into | None = None
    ) -> str | None:
        """Why the adapter cannot go into the weight, or that which a quantised one becomes; None if
        it can."""
        quantised = isinstance(self.weight, QuantizedTensor)
        if quantised and into is not None:
            reason = computed(self, ("weight",))
            if self.weight.is_meta:
                reason = "its weight is on the meta device, without values"
        else:
            reason = self.why_valueless("weight")
        if reason is not None and quantised and into is None:
            reason += (
                "; merge_lora(model, keep_base=False, into='dequantised') makes a weight of it that"
                " holds the sum, into='requantise' rounds the sum"
            )
        if reason is None and self.lora_A.is_meta:
            reason = f"its lora_A is on the meta device, without values, or {OFFLOADED}"
        if reason is None and self._rows is not None:
            reason = "computes rows of several adapters within adapter_rows"
        if reason is None and not keep_base:  # which zeroes lora_B
            reason = computed(self, ("lora_B",))
            others = [name for name in self.names if name not in self._active]
            if reason is None and others and self._active:
                reason = (
                    f"carries adapters that are not in use, {', '.join(map(repr, others))}, and"
                    " would lose the base that they are for; delete_adapter takes them out"
                )
        return reason


@torch.no_grad()
def add_product(weight: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """weight += scale * left @ right, formed in fp32 and rounded once."""
    weight.copy_(_sum(weight, [Acting(right, left, scale, 0.0)]))


def _sum(weight: Tensor, adapters: Iterable[Acting]) -> Tensor:
    """weight + scaling B A of each, in fp32 (fp64 if the weight is)."""
    total = weight.to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
    add = torch.addmm if weight.dim() == 2 else torch.baddbmm
    for one in adapters:
        total = add(total, one.B.to(total.dtype), one.A.to(total.dtype), alpha=one.scaling)
    return total
