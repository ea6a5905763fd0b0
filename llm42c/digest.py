"""Digests of a model's weights and of its graphs, and the weights' health."""

from __future__ import annotations

import concurrent.futures
import hashlib
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from llm42c.errors import WeightsError
from llm42c.memory import forget
from llm42c.passes import graph as g
from llm42c.passes.recipes import RECIPE, PackedWeight, Part, PositionTable, StackedBias

_READERS = 2  # weights that are read at once
_PIECE = 1 << 18  # elements that are tested at once: they stay in the cache
# Integers of the same size, and the bits of an exponent in them.
_EXPONENTS = {
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
    torch.float32: (torch.int32, 0x7F80_0000),
    torch.float64: (torch.int64, 0x7FF0_0000_0000_0000),
}


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all parameters and buffers, in name order.

    Tied tensors count under each of their names, so untying them changes the digest.
    """
    return _digest_of_state(model, _content)


def checked_digest(model: nn.Module) -> str:
    """The :func:`weights_digest` of weights that are sound; each is read once.

    Raises WeightsError naming the first parameter that holds NaN or infinity, or lies packed elsewhere.
    """
    parameters = {id(p) for p in model.parameters()}

    def content(tensor: Tensor) -> bytes | None:
        return _content(tensor) if id(tensor) not in parameters or _is_finite(tensor.detach()) else None

    try:
        return _digest_of_state(model, content)
    except _NotFiniteError:
        for name, parameter in model.named_parameters():
            _require_finite(name, parameter)
        raise


class _NotFiniteError(Exception):
    """Of some parameter."""


def _digest_of_state(model: nn.Module, content: Callable[[Tensor], bytes | None]) -> str:
    """``content`` gives the digest of a tensor's bytes; _NotFiniteError where it gives none."""
    state = {**dict(model.named_buffers()), **dict(model.named_parameters(remove_duplicate=False))}
    distinct = {id(tensor): tensor for tensor in state.values()}

    def read(tensor: Tensor) -> bytes:
        found = content(tensor)
        forget(tensor)
        if found is None:
            raise _NotFiniteError
        return found

    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        contents = dict(zip(distinct, pool.map(read, distinct.values()), strict=True))
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode() + contents[id(tensor)])
    return digest.hexdigest()


def _content(tensor: Tensor) -> bytes:
    return hashlib.sha256(_bytes_of(tensor)).digest()


def _require_finite(name: str, parameter: Tensor) -> None:
    finite = _is_finite(parameter.detach())
    forget(parameter)
    if finite:
        return
    if parameter.untyped_storage().nbytes() < parameter.nbytes:  # as WeightStore.release leaves it
        raise WeightsError(
            f"weights of {name!r} are packed in another engine of this model: close that one, or "
            "build this one with its compiler"
        )
    raise WeightsError(f"weights of {name!r} hold NaN or infinity: the checkpoint is damaged")


def _is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite: none has all bits of its exponent set."""
    if not tensor.is_floating_point():  # of quantised weights, which were looked at when they were packed
        return True
    known = _EXPONENTS.get(tensor.dtype)
    if known is None or tensor.device.type != "cpu" or not tensor.is_contiguous():
        return bool(torch.isfinite(tensor).all())
    bits = tensor.reshape(-1).view(known[0]).numpy()
    mask = bits.dtype.type(known[1])
    found = np.empty(min(_PIECE, bits.size), bits.dtype)
    for start in range(0, bits.size, _PIECE):
        piece = bits[start : start + _PIECE]
        if np.bitwise_and(piece, mask, out=found[: piece.size]).max() == mask:
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
