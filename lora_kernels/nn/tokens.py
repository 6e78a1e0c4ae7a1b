"""Single rows of an embedding, and of the head that is tied to it, trained in full: PEFT's
`trainable_token_indices`."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_kernels.bases import HALVES

TOKENS, INDICES = "trainable_tokens", "token_indices"


class TrainableTokens(nn.Module):
    """A table `weight` [V, D], frozen, of which the rows `token_indices` [T], in ascending order,
    are those of the parameter `trainable_tokens` [T, D] instead; fp32 beside a table of 16 bits."""

    weight: Tensor
    trainable_tokens: nn.Parameter
    token_indices: Tensor

    @torch.no_grad()
    def put(self, indices: Tensor, tokens: nn.Parameter) -> None:
        """Gives a table that has just become one of this class its rows."""
        self.register_parameter(TOKENS, tokens)
        self.register_buffer(INDICES, indices.to(self.weight.device))
        self.weight.requires_grad_(False)

    @torch.no_grad()
    def move_out(self, keep: bool) -> None:
        """Makes it a plain layer again, with the trained rows in its weight or without them."""
        if keep:
            self.weight[self.token_indices] = self.trainable_tokens.to(self.weight.dtype)
        del self.trainable_tokens, self.token_indices
        self.__class__ = _PLAIN[type(self)]  # type: ignore[assignment]  # no class of ours any more

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """The whole table with the rows in it, a copy."""
        weight = self.weight.detach().clone()
        weight[self.token_indices] = self.trainable_tokens.detach().to(weight.dtype)
        return weight


class TrainableTokenEmbedding(TrainableTokens, nn.Embedding):
    """An `nn.Embedding` with rows that are trained. No table but the frozen one is ever formed."""

    def forward(self, input: Tensor) -> Tensor:
        """Indices [...] to [..., D]."""
        y = F.embedding(input, self.weight, self.padding_idx)
        last = self.token_indices.shape[0] - 1
        place = torch.searchsorted(self.token_indices, input).clamp(max=last)
        ours = self.token_indices[place] == input
        if self.padding_idx is not None:  # whose row gets no gradient
            ours = ours & (input != self.padding_idx)
        rows = F.embedding(place, self.trainable_tokens).to(y.dtype)
        return torch.where(ours.unsqueeze(-1), rows, y)


class TrainableTokenHead(TrainableTokens, nn.Linear):
    """An `nn.Linear` that shares the weight of such an embedding and its trained rows."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., D] to [..., V]."""
        y = F.linear(input, self.weight, self.bias)
        bias = None if self.bias is None else self.bias[self.token_indices]
        rows = F.linear(input, self.trainable_tokens.to(self.weight.dtype), bias)
        return y.index_copy(-1, self.token_indices, rows)


_WITH_TOKENS: dict[type[nn.Module], type[TrainableTokens]] = {
    nn.Embedding: TrainableTokenEmbedding, nn.Linear: TrainableTokenHead,
}  # fmt: skip
_PLAIN = {mine: plain for plain, mine in _WITH_TOKENS.items()}


class Tokens(NamedTuple):
    """Rows to be trained, [T] in ascending order, of a table that these modules share."""

    modules: list[nn.Module]
    indices: Tensor


def move_into(given: Tokens) -> None:
    """Makes the modules ones with these rows trained, which start as they are."""
    tokens: nn.Parameter | None = None
    indices = given.indices
    for module in given.modules:
        module.__class__ = _WITH_TOKENS[type(module)]
        assert isinstance(module, TrainableTokens)  # by the line above
        if tokens is None:
            rows = module.weight.detach()[indices.to(module.weight.device)]
            tokens = nn.Parameter(rows.float() if rows.dtype in HALVES else rows)
        module.put(indices, tokens)


def tokens_objection(module: nn.Module) -> str | None:
    """Why rows of a module cannot be trained; None if they can."""
    kind = type(module)
    if isinstance(module, TrainableTokens):
        return "has rows that are trained already"
    if kind not in _WITH_TOKENS:
        return f"is {kind.__name__}, expected torch.nn.Embedding or nn.Linear itself"
    if getattr(module, "max_norm", None) is not None:
        return "has max_norm, which changes its rows in every forward"
    weight = module._parameters.get("weight")
    if weight is None or type(weight) is not nn.Parameter or not weight.is_floating_point():
        return "has no plain weight (parametrized, quantised, sharded)"
    return None
