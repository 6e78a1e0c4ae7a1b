"""Which rows of which tables are to be trained in full: PEFT's `trainable_token_indices`."""

from collections.abc import Container, Iterable, Mapping

import torch
from torch import Tensor, nn

from lora_kernels.names import all_names, join, named_modules, unwrapped
from lora_kernels.nn import LoRALayer, TrainableTokens
from lora_kernels.nn.tokens import TOKENS, Tokens, tokens_objection
from lora_kernels.targets import ends_in, owners, summary

TokenIndices = Iterable[int] | Mapping[str, Iterable[int]] | None


def find_tokens(
    model: nn.Module, wanted: TokenIndices, taken: Container[nn.Module] = ()
) -> dict[str, Tokens]:
    """name of a table -> the rows of it to be trained, with all modules that share its weight.

    Raises:
        ValueError: a name that no table has, or several have; rows that are out of range or named
            twice; a table that is trained in full, carries an adapter (is `taken`) or that
            something else shares. TypeError: rows that are no integers.
    """
    what = "trainable_token_indices"
    if wanted is None:
        return {}
    places = all_names(model)
    by_name = {name: module for module, names in places.items() for name in names}
    if not isinstance(wanted, Mapping):
        find = getattr(unwrapped(model), "get_input_embeddings", lambda: None)
        table = find()
        if table is None:
            raise ValueError(
                f"{what}: the model does not say which its input embedding is; name it"
            )
        wanted = {places[table][0]: wanted}
    found: dict[str, Tokens] = {}
    for part, rows in wanted.items():
        fitting = {by_name[name] for name in by_name if ends_in(part)(name)}
        if len(fitting) != 1:
            many = f"is the end of {len(fitting)} names" if fitting else "matches no module"
            raise ValueError(f"{what}: {part!r} {many}; there are {summary(_tables(model))}")
        (table,) = fitting
        name = places[table][0]
        sharing = _sharing(model, table)
        for module in sharing:
            reason = tokens_objection(module)
            if module in taken or isinstance(module, LoRALayer):
                reason = "carries an adapter or is trained in full"
            if reason is not None:
                raise ValueError(f"{what}: {places[module][0]} {reason}")
        found[name] = Tokens(
            sharing, _rows(f"{what}[{part!r}]", rows, table.get_parameter("weight").shape[0])
        )
    return found


def _tables(model: nn.Module) -> list[str]:
    kinds = (nn.Embedding, nn.Linear)
    return [name for name, module in named_modules(model) if isinstance(module, kinds)]


def _sharing(model: nn.Module, table: nn.Module) -> list[nn.Module]:
    """The table and what else holds its weight, embeddings first: a head's gradient reaches rows
    that both have."""
    weight = table._parameters.get("weight")
    held = [module for module in model.modules() if module._parameters.get("weight") is weight]
    if weight is None or len(held) < len(owners(model, beside=True).get(weight, [])):
        return [table]  # of which `tokens_objection` or merging says what is wrong
    return sorted(held, key=lambda module: not isinstance(module, nn.Embedding))


def _rows(argument: str, rows: Iterable[int], count: int) -> Tensor:
    """[T], in ascending order."""
    given = rows.tolist() if isinstance(rows, Tensor) else list(rows)
    if not given or not all(isinstance(row, int) and not isinstance(row, bool) for row in given):
        raise TypeError(f"{argument}: expected row numbers, got {given!r}")
    ordered = torch.tensor(sorted(given))
    if ordered[0] < 0 or ordered[-1] >= count:
        raise ValueError(f"{argument}: expected rows of 0 to {count - 1}, got {given}")
    if len(set(given)) < len(given):
        raise ValueError(f"{argument}: names a row twice, {given}")
    return ordered


def token_rows(model: nn.Module) -> dict[str, list[int]]:
    """name of a table -> the rows of it that are trained; of tables that share them the first."""
    found: dict[nn.Parameter, tuple[str, list[int]]] = {}
    for name, module in named_modules(model):
        if isinstance(module, TrainableTokens):
            rows = name, module.token_indices.tolist()
            found.setdefault(module.trainable_tokens, rows)
    return dict(found.values())


def read_rows(
    model: nn.Module, entry: TokenIndices, tensors: Mapping[str, Tensor]
) -> tuple[list[Tokens], dict[str, Tensor]]:
    """Of the rows in a file, by their table, and what its config says of them: the tables that are
    yet to be given such rows, and parameter of the model -> its values.

    ValueError: rows that are not the config's, or not the model's.
    """
    modules = dict(named_modules(model))
    new: list[Tokens] = []
    values: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        what = f"{name}: trainable_tokens_delta"
        if name not in modules:
            raise ValueError(f"{what}: the model has no module of this name")
        by_name = entry if isinstance(entry, Mapping) else {name: entry or ()}
        rows = next((list(of) for part, of in by_name.items() if ends_in(part)(name)), [])
        table = modules[name]
        width = getattr(table, "weight", torch.empty(0, 0)).shape[-1]
        if tensor.shape != (len(rows), width) or not tensor.is_floating_point():
            raise ValueError(
                f"{what}: has {tensor.dtype} {tuple(tensor.shape)}, expected a floating dtype and"
                f" shape ({len(rows)}, {width}) of trainable_token_indices in the config"
            )
        if isinstance(table, TrainableTokens):
            if table.token_indices.tolist() != sorted(rows):
                raise ValueError(
                    f"{what}: is of the rows {sorted(rows)}, the model trains"
                    f" {table.token_indices.tolist()}; remove_lora(model) first"
                )
        else:
            new += find_tokens(model, {name: rows}).values()
        values[join(name, TOKENS)] = tensor[torch.tensor(rows).argsort()]
    return new, values
