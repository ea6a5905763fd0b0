"""Digests of a model's weights and of its graphs, and the weights' health."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx, nn

from llm42c.errors import WeightsError
from llm42c.memory import forget
from llm42c.passes import graph as g
from llm42c.passes.recipes import RECIPE, PackedWeight, Part, PositionTable, StackedBias

_PIECE = 1 << 20  # elements that are tested at once, so that a large weight is never held twice


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all parameters and buffers, in name order.

    Tied tensors count under each of their names, so untying them changes the digest.
    """
    digest = hashlib.sha256()
    seen: dict[int, bytes] = {}
    state = {**dict(model.named_buffers()), **dict(model.named_parameters(remove_duplicate=False))}
    for name in sorted(state):
        tensor = state[name]
        if id(tensor) not in seen:
            seen[id(tensor)] = hashlib.sha256(_bytes_of(tensor)).digest()
            forget(tensor)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode() + seen[id(tensor)])
    return digest.hexdigest()


def require_finite(model: nn.Module) -> None:
    """Raise WeightsError naming the first parameter that holds NaN or infinity, or lies packed elsewhere."""
    for name, parameter in model.named_parameters():
        finite = _is_finite(parameter.detach())
        forget(parameter)
        if not finite:
            if parameter.untyped_storage().nbytes() < parameter.nbytes:  # as WeightStore.release leaves it
                raise WeightsError(
                    f"weights of {name!r} are packed in another engine of this model: close that one, or "
                    "build this one with its compiler"
                )
            raise WeightsError(f"weights of {name!r} hold NaN or infinity: the checkpoint is damaged")


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point():  # of quantised weights, which were looked at when they were packed
        return True
    rows = max(1, _PIECE // max(1, tensor[:1].numel())) if tensor.dim() else 1
    for piece in tensor.split(rows) if tensor.dim() else (tensor,):
        # A sum is NaN or infinite when an element is; the exact test runs only then.
        if not torch.isfinite(piece.float().sum()) and not torch.isfinite(piece).all():
            return False
    return True


def graph_digest(gm: fx.GraphModule, weights: Collection[str] = ()) -> str:
    """Hash of what ``gm`` computes: operators, constants and dataflow; not names, schedules or dead code.

    ``weights``: attributes whose contents another digest covers; they count by name. Packed weights count by
    their parts, tables and other constants by their contents. Independent calls may stand in any order,
    unless something outside of llm42's operators writes to a tensor.
    """
    return _digest(gm.graph, gm, weights)


def _digest(graph: fx.Graph, gm: nn.Module, weights: Collection[str]) -> str:
    """Of ``graph``, whose attributes are those of ``gm``."""
    digests: dict[fx.Node, str] = {}
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    written = []
    for node in graph.nodes:
        args, kwargs = fx.node.map_arg(_deciding(node), lambda n: _Reference(digests[n]))  # type: ignore
        if node.op == "placeholder":
            text = f"input {inputs.index(node)}"
        elif node.op == "get_attr":
            text = _constant(gm, node, weights)
        else:
            text = f"{node.op} {_target(node)} {args} {sorted(kwargs.items())}"
        digests[node] = hashlib.sha256(text.encode()).hexdigest()[:32]
        if g.mutated_arguments(node):
            written.append(node)
    output = next(n for n in graph.nodes if n.op == "output")
    foreign = any(not g.ours(n) for n in written)
    effects = [digests[n] for n in (graph.nodes if foreign else written)]
    return hashlib.sha256("\n".join([digests[output], *effects]).encode()).hexdigest()[:32]


class _Reference:
    """Stands for a node among arguments; its text is the digest of what the node computes."""

    def __init__(self, digest: str) -> None:
        self._digest = digest

    def __repr__(self) -> str:
        return f"%{self._digest}"


def _target(node: fx.Node) -> str:
    if isinstance(node.target, str):
        return "" if node.op == "output" else node.target
    return torch.fx.node._get_qualified_name(node.target)


def _deciding(node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments that what is computed depends on: not how this process calls a group of ranks."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.args, node.kwargs
    names = [argument.name for argument in node.target._schema.arguments]
    args = tuple(a for a, name in zip(node.args, names, strict=False) if name != "group_name")
    return args, {name: a for name, a in node.kwargs.items() if name != "group_name"}


def _constant(gm: nn.Module, node: fx.Node, weights: Collection[str]) -> str:
    recipe = node.meta.get(RECIPE)
    value = getattr(gm, str(node.target), None)
    if isinstance(recipe, PackedWeight | StackedBias):
        parts = " ".join(_part(gm, p, weights) for p in recipe.parts)
        return f"{type(recipe).__name__} {parts}"
    if isinstance(value, Tensor) and not value.is_meta and str(node.target) not in weights:
        return _contents(value)
    if isinstance(recipe, PositionTable):
        return f"table {recipe.limit} {_digest(recipe.graph, gm, weights)}"
    return f"weight {node.target}"


def _part(gm: nn.Module, part: Part, weights: Collection[str]) -> str:
    value = getattr(gm, part.attribute, None)  # gone once the weight is packed
    known = part.attribute in weights or not isinstance(value, Tensor)
    text = part.attribute if known or value is None else _contents(value)
    return f"{text}{' transposed' if part.transposed else ''}"


def _contents(tensor: Tensor) -> str:
    digest = hashlib.sha256(_bytes_of(tensor)).hexdigest()
    return f"constant {tensor.dtype} {tuple(tensor.shape)} {digest}"
