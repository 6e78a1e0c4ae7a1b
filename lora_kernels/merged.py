"""The weights of a plain model with the adapters in them, one layer at a time."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from lora_kernels import adapters, names, targets
from lora_kernels.convert import require_untied
from lora_kernels.layer import LoRALayer, whole
from lora_kernels.state import BESIDE_THE_BASE


class _MergedStateDict(Mapping[str, Tensor]):
    def __init__(self, model: nn.Module) -> None:
        self._owners = {
            names.join(name, attribute): (module, attribute)
            for name, module in names.named_modules(model, remove_duplicate=False)
            for attribute in adapters.state_of(module)
            if not (isinstance(module, LoRALayer) and attribute in BESIDE_THE_BASE)
        }

    def __len__(self) -> int:
        return len(self._owners)

    def __iter__(self) -> Iterator[str]:
        return iter(self._owners)

    @torch.no_grad()
    def __getitem__(self, name: str) -> Tensor:
        module, attribute = self._owners[name]
        if isinstance(module, LoRALayer) and attribute == "weight":
            return whole(module.merged_weight())
        for saved in adapters.saved_of("", module):
            if saved.attribute == attribute:
                return whole(saved.trained)
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
            copy gives their sum), or an adapter on a tied weight (it names the owners).
    """
    targets.require_no_peft(model)
    layers = [layer for _, layer in adapters.require_layers(model) if not layer.merged]
    require_untied(model, layers, "merged_state_dict")
    return _MergedStateDict(model)
