"""Many adapters in one call: every row has a group, every group its own A and B and, for experts,
its own weight."""

from lora_kernels.grouped.functional import lora_add_grouped, lora_linear_grouped
from lora_kernels.grouped.groups import Groups

__all__ = ["Groups", "lora_add_grouped", "lora_linear_grouped"]
