"""The weights of a plain model with the adapters in them, one layer at a time."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from lora_kernels import adapters, names, targets
from lora_kernels.convert import refuse, require_untied
from lora_kernels.nn import LoRAExpertProduct, LoRALayer, TrainableTokens
from lora_kernels.nn.experts import SUFFIX
from lora_kernels.nn.tokens import INDICES, TOKENS
from lora_kernels.offloading import present
from lora_kernels.sharding import whole


class _MergedStateDict(Mapping[str, Tensor]):
    def __init__(self, model: nn.Module) -> None:
        self._owners: dict[str, tuple[nn.Module, str]] = {}
        # The last one, whose parametrizations follow it.
        layer: LoRALayer | None = None
        prefix = ""
        for name, module in names.named_modules(model, remove_duplicate=False):
            if isinstance(module, LoRALayer):
                layer, prefix = module, names.join(name, "")
            for attribute in adapters.state_of(module):
                key = names.join(name, attribute)
                beside = (
                    layer is not None
                    and key.startswith(prefix)
                    and layer.is_beside_the_base(key.removeprefix(prefix))
                )
                of_tokens = isinstance(module, TrainableTokens) and attribute in (TOKENS, INDICES)
                if not beside and not of_tokens:
                    self._owners[key] = module, attribute

    def __len__(self) -> int:
        return len(self._owners)

    def __iter__(self) -> Iterator[str]:
        return iter(self._owners)

    @torch.no_grad()
    def __getitem__(self, name: str) -> Tensor:
        module, attribute = self._owners[name]
        if isinstance(module, LoRALayer) and attribute == "weight":
            return whole(module.merged_weight())
        if isinstance(module, TrainableTokens) and attribute == "weight":
            return whole(module.merged_weight())
        of_expert = module._modules.get(attribute + SUFFIX)
        if isinstance(of_expert, LoRAExpertProduct):
            return whole(of_expert.merged_weight())
        for saved in adapters.saved_of("", module):
            if saved.attribute == attribute:
                return whole(saved.trained)
        with present(module):
            return whole(getattr(module, attribute).detach())

    def __repr__(self) -> str:
        return f"merged_state_dict({targets.summary(self, limit=8)})"


def merged_state_dict(model: nn.Module) -> Mapping[str, Tensor]:
    """The state dict of the plain model after a merge, with the model left as it is.

    What a reinforcement-learning loop sends to its rollout engine:

        for name, tensor in merged_state_dict(model).items():
            engine.update(name, tensor)

    A mapping that computes a layer's merged weight, [out_features, in_features] (Conv1D
    [in_features, out_features]) in the base's dtype, when it is read and keeps none: iterating
    holds one layer at a time, `dict(...)` all of them. Bit-equal to `merge_lora` and the parameters
    then, whether the layers are merged, disabled or neither; other tensors are the model's own, not
    copies. `modules_to_save` have their trained values. Names are the plain model's, without the
    parts of wrappers. Of a sharded model the tensors are gathered as they are read: all ranks read
    them in the same order.

    Raises:
        ValueError: the model has no LoRA layer, has adapters of PEFT (`merge_and_unload()` of a
            copy gives their sum), or an adapter on a weight that is tied (it names the owners),
            offloaded, pruned, quantised, or on the meta device.
    """
    targets.require_no_peft(model)
    layers = {name: layer for name, layer in adapters.require_layers(model) if not layer.merged}
    refuse("merged_state_dict", {name: layer.why_unmergeable() for name, layer in layers.items()})
    require_untied(model, layers.values(), "merged_state_dict")
    return _MergedStateDict(model)
