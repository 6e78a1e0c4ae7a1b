"""Tensor parallelism for LoRA layers: styles for `parallelize_module`.

    plan = {"mlp.up_proj": ColwiseParallelLoRA(), "mlp.down_proj": RowwiseParallelLoRA()}
    parallelize_module(model, mesh, plan)  # after apply_lora, before fully_shard

Torch's own ColwiseParallel and RowwiseParallel give the same results at the cost of gathering
lora_A (colwise) in every call. Dropout masks go by global rows and columns: where the ranks of the
mesh draw the same seeds (`torch.manual_seed`), the result is that of one process.
"""

from collections.abc import Iterator
from typing import ClassVar

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel
from torch.distributed.tensor.placement_types import Placement

from lora_kernels.nn import FusedLoRALinear

__all__ = ["ColwiseParallelLoRA", "RowwiseParallelLoRA"]


class _ParallelLoRA(ParallelStyle):
    # Of `LayerTensors.dimensions`: what is split.
    _letter: ClassVar[str]

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        style = type(self).__name__
        if not isinstance(module, FusedLoRALinear):
            raise TypeError(
                f"{style}: expected a FusedLoRALinear, got {type(module).__name__}; call"
                " apply_lora before parallelize_module"
            )
        for name, tensor, placement in self._tensors(module):
            expected = (placement,)
            if not isinstance(tensor, DTensor):
                continue
            if tensor.device_mesh != device_mesh or tensor.placements != expected:
                raise ValueError(
                    f"{style}: {name} is sharded already, {tensor.placements} on"
                    f" {tensor.device_mesh}; expected a plain tensor or {expected} on"
                    f" {device_mesh}: redistribute it, or parallelize before fully_shard"
                )
        return super()._apply(module, device_mesh)  # type: ignore[safe-super]  # of another base

    def _tensors(self, module: FusedLoRALinear) -> Iterator[tuple[str, Tensor, Placement]]:
        """(name, tensor, placement)."""
        for name, placement in self._layouts(module).items():
            tensor = getattr(module, name)
            if tensor is not None:
                yield name, tensor, placement

    @classmethod
    def _layouts(cls, module: FusedLoRALinear | type[FusedLoRALinear]) -> dict[str, Placement]:
        """The placement of every tensor that a layer may have."""
        return {
            name: Shard(dimensions.index(cls._letter)) if cls._letter in dimensions else Replicate()
            for name, dimensions in module.dimensions().items()
        }

    def _partition_linear_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        assert isinstance(module, FusedLoRALinear)  # `_apply` refuses others
        for key, tensor, placement in self._tensors(module):
            value: Tensor = distribute_tensor(
                tensor, device_mesh, [placement], src_data_rank=self.src_data_rank
            )
            if isinstance(tensor, nn.Parameter):
                value = nn.Parameter(value, requires_grad=tensor.requires_grad)
            setattr(module, key, value)


class ColwiseParallelLoRA(_ParallelLoRA, ColwiseParallel):
    """Splits a `FusedLoRALinear` by output features: weight, bias and lora_B Shard(0), lora_A on
    every rank.

    Arguments (`input_layouts`, `output_layouts`, `use_local_output`) as of `ColwiseParallel`.

    Raises:
        TypeError: another kind of module. ValueError: a parameter is sharded in another way
            already. The module is unchanged then.
    """

    _letter = "N"


class RowwiseParallelLoRA(_ParallelLoRA, RowwiseParallel):
    """Splits a `FusedLoRALinear` by input features: weight and lora_A Shard(1), bias and lora_B on
    every rank. The partial sums of base and branch are reduced at once; the bias is added once.

    Arguments (`input_layouts`, `output_layouts`, `use_local_output`) as of `RowwiseParallel`.

    Raises:
        TypeError: another kind of module. ValueError: a parameter is sharded in another way
            already. The module is unchanged then.
    """

    _letter = "K"
