"""The state dict of a layer with an adapter, merged or not.

Unmerged it is the parameters, those of further adapters as `adapters.<name>.lora_A`, and, after a
PiSSA start, `pissa_A`, `pissa_B`. While the layer is merged, `weight` is what the parameter holds,
the sum, and `merged_base` lies beside it: the base that was kept, or an empty tensor where none
was.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lora_kernels.nn.merging import Merging
from lora_kernels.nn.pissa import Initialising
from lora_kernels.nn.tensors import MERGED, PISSA, shape_of
from lora_kernels.sharding import is_sharded


class LayerState(Initialising, Merging):
    """Saving and loading of `LoRALayer`.

    A state dict with `merged_base` restores the merged layer that it was taken of, bit for bit. One
    without holds a base: a merged layer takes it as its new base and is merged again, a layer that
    kept no base is unmerged by it. Nothing of a state that does not fit is loaded.
    """

    def is_beside_the_base(self, key: str) -> bool:
        """Whether a key of the layer's state dict is one that a plain model has no place for: of
        the adapter, or of a parametrization of it."""
        beside = (*self.adapter_names(), MERGED, "adapters")
        first, *rest = key.split(".")
        if first == "parametrizations" and rest:
            return rest[0] in beside
        return first in beside or first.startswith(tuple(f"{n}_" for n in self.adapter_parameters))

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._base_weight_cpu is not None:  # no buffer, which would move with the layer
            destination[prefix + MERGED] = self._base_weight_cpu.to(self.weight.dtype)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        given = {
            name: state_dict[prefix + name]
            for name in ("weight", "bias", *self.adapter_names(), MERGED)
            if isinstance(state_dict.get(prefix + name), Tensor)
        }
        errors = list(self._misfits(given, prefix))
        if errors:
            error_msgs += errors
            return
        base = given.pop(MERGED, None)
        adapter = any(name in given for name in self.adapter_names())
        assigns = local_metadata.get("assign_to_params_buffers", False)
        kept = self._merged == "kept"
        again = base is None and kept and (adapter or "weight" in given)
        on_host = self._base_weight_cpu is not None
        if again:
            self.unmerge()
        elif base is not None or "weight" in given:
            self.merged_base = self._base_weight_cpu = None
            self._merged = False
        state = {key: value for key, value in state_dict.items() if key != prefix + MERGED}
        takes = self.pissa_A is not None and "weight" in given and not adapter
        if assigns and "weight" in given and (again or takes):  # it is changed below
            state[prefix + "weight"] = given["weight"].clone()
        if self.pissa_A is None and "pissa_A" in given and "pissa_B" in given:
            self.pissa_A = self.lora_A.new_empty(given["pissa_A"].shape)
            self.pissa_B = self.lora_B.new_empty(given["pissa_B"].shape)
        elif base is not None and "pissa_A" not in given:
            self.pissa_A = self.pissa_B = None
        super()._load_from_state_dict(
            state, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if not adapter:
            beside = {prefix + name for name in self.adapter_names()}
            missing_keys[:] = [key for key in missing_keys if key not in beside]
        if takes:
            self._take_pissa()
        if base is not None:
            if not kept:
                on_host = base.device.type == "cpu" and self.weight.device.type != "cpu"
            self._restore_merged(base, on_host, copy=not assigns)
        elif again:
            self.merge("cpu" if on_host else True)

    def _misfits(self, given: dict[str, Tensor], prefix: str) -> Iterator[str]:
        """Why the tensors cannot be loaded, as torch says it."""
        factors = [name for name in self.adapter_parameters if name in given]
        lost = self.why_fixed(*factors) if factors else None
        if lost is not None:
            yield f"{prefix.rstrip('.')}: cannot take {', '.join(factors)}: {lost}"
        shapes = {n: tuple(t.shape) for n, t in self.named_parameters(recurse=False)}
        merged = given.get(MERGED)
        if merged is not None:
            shapes[MERGED] = (0,) if merged.numel() == 0 else self.weight.shape
        if self.pissa_A is not None:
            shapes |= {name: getattr(self, name).shape for name in PISSA}
        elif "pissa_B" in given:  # of any rank, which may differ from the adapter's
            rank = (given["pissa_B"].shape or (0,))[-1]
            shapes |= {name: shape_of(self, name, rank) for name in PISSA}
        for name, tensor in given.items():
            if name in shapes and tuple(tensor.shape) != tuple(shapes[name]):
                yield (
                    f"size mismatch for {prefix}{name}: copying a param with shape {tensor.shape}"
                    f" from checkpoint, the shape in current model is {shapes[name]}."
                )
        alike = is_sharded(merged) == is_sharded(self.weight)
        if merged is not None and merged.numel() and not alike:
            yield (
                f"{prefix}{MERGED}: and the layer's weight are not sharded alike; merge the model"
                " as the other was before loading"
            )
        # They are loaded after the layer itself.
        kept = self._merged == "kept" and merged is None
        if kept and len(self.names) > 1 and (factors or "weight" in given):
            yield (
                f"{prefix.rstrip('.')}: is merged and carries several adapters; call unmerge_lora"
                " before loading"
            )
        if merged is not None and "weight" not in given:
            yield f"{prefix}{MERGED}: is of a merged layer, whose {prefix}weight is missing"
        adapter = next((name for name in self.adapter_names() if name in given), None)
        if self._merged == "final" and adapter and "weight" not in given:
            yield (
                f"{prefix}{adapter}: the layer is merged with keep_base=False and has no"
                f" base for it; load {prefix}weight too"
            )

    @torch.no_grad()
    def _restore_merged(self, base: Tensor, on_host: bool, copy: bool) -> None:
        self._merged = "kept" if base.numel() else "final"
        on_host = on_host and self._merged == "kept"
        device = "cpu" if on_host else self.weight.device
        base = base.detach().to(device=device, dtype=self.weight.dtype, copy=copy)
        setattr(self, "_base_weight_cpu" if on_host else MERGED, base)
