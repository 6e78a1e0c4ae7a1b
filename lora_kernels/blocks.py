"""Blocks of a model computed as one in training: projections of one x, and gated MLPs.

What a block is follows from its structure: the layers that are called on one tensor, and the graph
of an MLP's forward. Everything that could change is asked in every call, and where the block is
more than its layers then (hooks, several or merged adapters, a base that trains) the model's own
code computes it.
"""

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, SupportsIndex

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import _has_any_global_hook

from lora_kernels import names, packed, targets
from lora_kernels.backends.gating import ACTIVATIONS
from lora_kernels.bases import is_convolution
from lora_kernels.mlp import lora_swiglu_mlp
from lora_kernels.nn import LoRAExpertProduct
from lora_kernels.packed import Projection
from lora_kernels.packs import Pack, Packable


@dataclass
class BlockReport:
    """What `fuse_blocks` found: names of the MLPs that are computed as one, of the layers that are
    packed where a forward calls them on one tensor, and of the MLPs left alone, with the reason."""

    mlps: list[str] = field(default_factory=list)
    packed: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [
            f"{len(self.mlps)} MLPs keep half: {targets.summary(self.mlps)}",
            f"{len(self.packed)} groups of projections: {targets.summary(self.packed)}",
        ]
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left.items():
            reasons.setdefault(reason, []).append(name)
        lines += [f"left alone {targets.summary(n)}: {why}" for why, n in reasons.items()]
        return "\n".join(lines)


def fuse_blocks(model: nn.Module) -> BlockReport:
    """Has the blocks of a model computed as one where that equals their layers, in training.

    Gated MLPs, down(act(gate(x)) * up(x)), keep gate(x) and up(x) alone for backward, half of what
    the separate layers do. Layers of one module with adapters that a forward calls on the same
    tensor (query, key and value) become one node of autograd, which reads x once. Modules,
    parameters and their names stay the same objects. Compiled graphs, and calls without gradients,
    are those of the model's own code.

    The layers are this library's or PEFT's after `fuse_peft`. `unfuse_blocks` undoes it; call it
    again for layers that came later.

    Raises:
        TypeError: not a module.
    """
    names.require_module(model)
    unfuse_blocks(model)
    report = BlockReport()
    for name, module in names.named_modules(model):
        linear = [child for child in module.children() if _is_linear(child)]
        adapted = [child for child in linear if isinstance(child, Packable)]
        if not adapted:
            continue
        if _may_be_mlp(module, linear):
            found = _mlp_of(module)
            if isinstance(found, _Mlp):
                _fuse(module, found)
                report.mlps.append(name)
            else:
                report.left[name] = found
        for group in [] if isinstance(module, _FusedMlp) else _by_width(adapted):
            Pack(group)
            own = {child: key for key, child in module.named_children()}
            report.packed.append(names.join(name, " + ".join(own[layer] for layer in group)))
    return report


def unfuse_blocks(model: nn.Module) -> None:
    """Undoes `fuse_blocks`. TypeError: not a module."""
    names.require_module(model)
    for module in model.modules():
        if isinstance(module, _FusedMlp):
            module.__class__ = module.plain_class  # type: ignore[assignment]  # its own again
            del module.__dict__[_BLOCK]
        if isinstance(module, Packable):
            module.leave_pack()


_Linear = nn.Module  # nn.Linear itself, or a layer with an adapter


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, LoRAExpertProduct) or is_convolution(module):
        return False
    return type(module) is nn.Linear or isinstance(module, Packable)


def _by_width(layers: list[Any]) -> Iterator[list[Any]]:
    """Those of two or more that have as many inputs."""
    widths = dict.fromkeys(layer.in_features for layer in layers)
    groups = ([layer for layer in layers if layer.in_features == width] for width in widths)
    return (group for group in groups if len(group) > 1)


# ------------------------------------------------------------------------------------- gated MLPs

_BLOCK = "_fused_block"
# Up to which relative difference an activation is one of torch's, in fp64.
_SAME = 1e-6


class _Mlp(NamedTuple):
    """The names of its layers, up None where gate is both, and the activation's."""

    gate: str
    up: str | None
    down: str
    act: str
    others: tuple[str, ...]  # of the modules that are the activation


def _may_be_mlp(module: nn.Module, linear: list[_Linear]) -> bool:
    """Whether its layers are as many and as wide as those of a gated MLP."""
    beside = [c for c in module.children() if c not in linear and any(True for _ in c.parameters())]
    if beside or len(linear) not in (2, 3):
        return False
    sizes: list[tuple[int, int]] = [
        (int(c.in_features), int(c.out_features))  # type: ignore[arg-type]  # of a linear layer
        for c in linear
    ]
    factor = 4 - len(linear)  # the outputs of a layer that is both gate and up
    ups = sum(out == factor * inner for _, out in sizes for inner, _ in sizes)
    return ups >= len(linear) - 1


_Node = Any  # of fx, whose arguments may be anything


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _mlp_of(module: nn.Module) -> _Mlp | str:
    """Its parts, or why it is no gated MLP."""
    try:
        graph = _Tracer().trace(module)
    except Exception as error:  # whatever a forward raises that is called with stand-ins
        return f"its forward cannot be traced ({type(error).__name__})"
    try:
        return _matched(module, graph)
    except _Unlike as unlike:
        return str(unlike)


class _Unlike(Exception):
    """What makes a graph another than a gated MLP's."""


def _matched(module: nn.Module, graph: fx.Graph) -> _Mlp:
    nodes: list[_Node] = list(graph.nodes)
    inputs: list[_Node] = [n for n in nodes if n.op == "placeholder"]
    if len(inputs) != 1:
        raise _Unlike("its forward takes more than one input")
    (x,), output = inputs, nodes[-1]
    down = _linear(module, output.args[0], "what it returns")
    product = down.args[0]
    if not _is_call(product, operator.mul, torch.mul, "mul"):
        raise _Unlike(f"its last layer gets {_what(product)}, not a product")
    sides = [side for side in product.args if isinstance(side, fx.Node)]
    if len(sides) != 2 or sides[0] is sides[1]:
        raise _Unlike("its last layer gets no product of two activations")
    last: _Unlike | None = None
    for act, up in (sides, sides[::-1]):
        try:
            return _sides(module, graph, (x, act, up, product, down, output))
        except _Unlike as unlike:
            last = last or unlike
    assert last is not None
    raise last


def _sides(module: nn.Module, graph: fx.Graph, known: tuple[_Node, ...]) -> _Mlp:
    """With `act` as the side that is activated."""
    x, act, up, *_ = known
    chain = _chain(act)
    gate = chain[0]
    if gate is up:
        raise _Unlike("its gate is its other side too")
    known = (*known, *chain)
    if _half(gate) == 0 and _half(up) == 1 and gate.args[0] is up.args[0]:
        both = gate.args[0].args[0]
        first, second = _linear(module, both, "its halves"), None
        known = (*known, gate.args[0], both)
    else:
        first = _linear(module, gate, "its gate")
        second = _linear(module, up, "its other side")
    for node in (first, second):
        if node is not None and node.args != (x,):
            raise _Unlike(f"{node.target} gets {_what(node.args[0])}, not the block's input")
    foreign = [node for node in graph.nodes if node not in known]
    if foreign:
        raise _Unlike(f"its forward does more: {_what(foreign[0])}")
    found = _activation(module, chain)
    others = tuple(str(n.target) for n in chain[1:] if n.op == "call_module")
    down = known[4]
    up_name = None if second is None else str(second.target)
    return _Mlp(str(first.target), up_name, str(down.target), found, others)


def _linear(module: nn.Module, node: _Node, what: str) -> _Node:
    """A call of a linear layer on one tensor."""
    called = isinstance(node, fx.Node) and node.op == "call_module" and len(node.args) == 1
    if not called or not isinstance(node, fx.Node) or node.kwargs:
        raise _Unlike(f"{what} is {_what(node)}, no linear layer's output")
    if not _is_linear(module.get_submodule(str(node.target))):
        raise _Unlike(f"{what} is {_what(node)}, no linear layer's output")
    return node


def _is_call(node: _Node, *targets: object) -> bool:
    called = isinstance(node, fx.Node) and node.op in ("call_function", "call_method")
    return called and node.target in targets


def _half(node: _Node) -> int | None:
    """Which half of the columns of something it is; None if it is none."""
    if not _is_call(node, operator.getitem) or not isinstance(node.args[0], fx.Node):
        return None
    cut, index = node.args
    if not _is_call(cut, torch.chunk, "chunk") or index not in (0, 1):
        return None
    given = dict(zip(("of", "chunks", "dim"), cut.args, strict=False)) | cut.kwargs
    return index if (given.get("chunks"), given.get("dim")) == (2, -1) else None


def _what(node: _Node) -> str:
    if not isinstance(node, fx.Node):
        return f"{node!r}"
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "?")
    return f"{node.op.replace('_', ' ')} {target}"


def _chain(act: _Node) -> list[_Node]:
    """What is computed from the gate alone, the gate first: a linear layer or one of two halves."""
    chain = [act]
    while True:
        node = chain[0]
        before = node.all_input_nodes
        if len(before) != 1 or _half(node) is not None:
            return chain
        if before[0].op == "placeholder":
            return chain
        chain.insert(0, before[0])


def _activation(module: nn.Module, chain: list[_Node]) -> str:
    """The name of what the chain computes of the gate, told by its values."""
    far = torch.logspace(1, 5, 33, dtype=torch.float64)  # beyond any limit that a model sets
    probe = torch.cat([-far, torch.linspace(-10, 10, 257, dtype=torch.float64), far])[None]
    values: dict[_Node, Tensor] = {chain[0]: probe}
    try:
        with torch.no_grad():
            for node in chain[1:]:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                if node.op == "call_module":
                    values[node] = module.get_submodule(str(node.target))(*args, **kwargs)
                elif node.op == "call_function":
                    values[node] = node.target(*args, **kwargs)
                else:
                    values[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        found = values[chain[-1]]
        for name, (function, _) in ACTIVATIONS.items():
            right = function(probe)
            if found.shape == right.shape and torch.allclose(found, right, _SAME, _SAME):
                return name
    except Exception as error:  # whatever an activation raises on such values
        raise _Unlike(f"its activation cannot be tried ({type(error).__name__})") from None
    raise _Unlike(f"its activation ({_what(chain[-1])}) is not one of {', '.join(ACTIVATIONS)}")


class _FusedMlp(nn.Module):
    """Mixed in before the class of an MLP."""

    plain_class: type[nn.Module]

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        state: Any = self.__getstate__()  # type: ignore[no-untyped-call]  # torch's own
        return _empty, (self.plain_class,), state

    def _get_name(self) -> str:
        return self.plain_class.__name__

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            y = self._as_one(args[0])
            if y is not None:
                return y
        return super().forward(*args, **kwargs)

    def _as_one(self, x: Tensor) -> Tensor | None:
        """None where the layers are better called one by one, as few rows are, or are more than
        projections now."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or _has_any_global_hook():
            return None
        if not packed.packs_rows(x):
            return None
        block: _Mlp = self.__dict__[_BLOCK]
        layers: dict[str, Any] = self._modules
        if any(not _is_plain(layers[name]) for name in block.others):
            return None
        parts = [
            None if name is None else _projection(layers[name], x)
            for name in (block.gate, block.up, block.down)
        ]
        gate, up, down = parts
        if gate is None or down is None or (up is None and block.up is not None):
            return None
        return lora_swiglu_mlp(x, gate, up, down, block.act)


def _empty(plain: type[nn.Module]) -> nn.Module:
    """What unpickling and copying fill."""
    fused = _class_of(plain)
    return fused.__new__(fused)


_classes: dict[type[nn.Module], type[nn.Module]] = {}


def _class_of(plain: type[nn.Module]) -> type[nn.Module]:
    if plain not in _classes:
        members = {"plain_class": plain, "__doc__": plain.__doc__, "__module__": __name__}
        _classes[plain] = type(f"Fused{plain.__name__}", (_FusedMlp, plain), members)
    return _classes[plain]


def _fuse(module: nn.Module, block: _Mlp) -> None:
    module.__dict__[_BLOCK] = block
    module.__class__ = _class_of(type(module))


_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip


def _is_plain(module: nn.Module) -> bool:
    """Whether a call of it is its class's forward and nothing else."""
    held = module.__dict__
    return not (any(held[name] for name in _HOOKS) or "_hf_hook" in held or "forward" in held)


def _projection(layer: nn.Module, x: Tensor) -> Projection | None:
    """What the layer computes now, where it is no more than that."""
    if not _is_plain(layer):
        return None
    if isinstance(layer, Packable):
        return layer.projection(x)
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    if type(layer) is not nn.Linear or weight is None or (bias is None and layer.bias is not None):
        return None
    return Projection(weight, bias=bias)
