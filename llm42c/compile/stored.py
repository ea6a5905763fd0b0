"""A rewritten graph as text, and back from the text: no code of the text is run, and no weight is in it.

A call's target stands as its name in torch, the operators or ``llm42c``; arguments and values as what they
are; parameters and buffers as the model's own names; packed weights as their recipes. What has no such
form is an :class:`UnstorableError`, and what the text says of something else is one of :data:`FAULTS`.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import importlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from llm42c.capture.dynamo import KVSpec, model_attributes
from llm42c.compile.clusters import find_clusters
from llm42c.passes import graph as g
from llm42c.passes.base import Event, PassReport, Report
from llm42c.passes.recipes import RECIPE, PackedWeight, Part, PositionTable, Recipe, StackedBias, recipes
from llm42c.passes.sizes import SYMBOLS

FAULTS = (ValueError, TypeError, KeyError, AttributeError, IndexError, ImportError, RuntimeError)
_LARGEST = 1 << 16  # bytes of a constant that is stored
_ROOTS = frozenset({"torch", "_operator", "math", "llm42c"})
_BUILTINS = {f.__name__: f for f in (getattr, abs, max, min, round, pow, len, int, float, bool)}
_PLAIN = (str, int, bool, type(None))
_SEQUENCES: dict[str, Callable[[list[Any]], Any]] = {"tuple": tuple, "list": list, "size": torch.Size}
_OF_TORCH = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}


@dataclasses.dataclass
class Rewritten:
    """A captured graph after the passes, its packed weights not made yet.

    ``inputs``, ``parameter_names`` and ``kv_spec`` are those of a
    :class:`~llm42c.capture.dynamo.CapturedGraph`; ``report`` is the passes'.
    """

    gm: fx.GraphModule
    inputs: list[str]
    parameter_names: dict[str, str]
    kv_spec: list[KVSpec]
    report: Report

    @property
    def weights(self) -> frozenset[str]:
        """Attributes of ``gm`` that are the model's: the digest of its weights has them."""
        return model_attributes(self.parameter_names)


class UnstorableError(Exception):
    """The graph holds what has no text; the message says what."""


def encode(rewritten: Rewritten) -> str:
    """The text of a graph after its passes, before its packed weights are made. Raises UnstorableError."""
    gm = rewritten.gm
    return json.dumps(
        {
            "nodes": [_node(n) for n in gm.graph.nodes],
            "symbols": _symbols(rewritten),
            "inputs": rewritten.inputs,
            "names": rewritten.parameter_names,
            "constants": {a: _constant(gm, a) for a in sorted(_attributes(gm.graph) - rewritten.weights)},
            "kv_spec": [dataclasses.astuple(s) for s in rewritten.kv_spec],
            "report": dataclasses.asdict(rewritten.report),
        },
        separators=(",", ":"),
    )


def decode(text: str, model: nn.Module) -> Rewritten:
    """The graph that ``text`` is of, on the parameters and buffers of ``model``. Raises one of FAULTS."""
    data = json.loads(text)
    graph = _graph(data["nodes"], None)
    if find_clusters(graph):  # Inductor computes with their values
        graph = _graph(data["nodes"], FakeTensorMode())
    names = dict(data["names"])
    tensors = {**dict(model.named_buffers()), **dict(model.named_parameters(remove_duplicate=False))}
    root = nn.Module()
    for attribute in _attributes(graph):
        constant = data["constants"].get(attribute)
        _register(root, attribute, tensors[names[attribute]] if constant is None else _tensor(constant))
    for label in recipes(graph):
        _register(root, label, torch.empty(0, device="meta"))
    gm = fx.GraphModule(root, graph)
    for attribute in _attributes(graph):
        if not hasattr(gm, attribute):  # read by a recipe alone
            _register(gm, attribute, getattr(root, attribute))
    graph.lint()
    rewritten = Rewritten(
        gm=gm,
        inputs=list(data["inputs"]),
        parameter_names=names,
        kv_spec=[KVSpec(*s) for s in data["kv_spec"]],
        report=_report(data["report"]),
    )
    if data["symbols"]:
        gm.meta[SYMBOLS] = _LateSymbols(data["symbols"])
    return rewritten


# -- nodes and their arguments -------------------------------------------------------------------------------


def _node(node: fx.Node, values: bool = True) -> dict[str, Any]:
    target = node.target if isinstance(node.target, str) else _name_of(node.target)
    found: dict[str, Any] = {"name": node.name, "op": node.op, "target": target}
    found["args"] = [_text(a) for a in node.args]
    found["kwargs"] = {k: _text(a) for k, a in node.kwargs.items()}
    if values:
        found["value"], found["where"] = _text(g.value(node)), g.where(node)
    if RECIPE in node.meta:
        found["recipe"] = _recipe(node.meta[RECIPE])
    return found


class Described(Tensor):
    """The value of a node, which has the sizes, strides, type and device of a tensor, and no elements.

    A FakeTensor is more, and making the first one imports Dynamo.
    """

    @staticmethod
    def __new__(
        cls, shape: list[int], stride: list[int], dtype: torch.dtype, device: torch.device
    ) -> Described:
        made: Any = Tensor._make_wrapper_subclass(cls, shape, strides=stride, dtype=dtype, device=device)
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Described({list(self.shape)}, {self.dtype}, {self.device})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise RuntimeError(f"{func} of a value that has no elements")


def _graph(nodes: list[Mapping[str, Any]], mode: FakeTensorMode | None) -> fx.Graph:
    """``mode``: of the values; without one they are :class:`Described`."""
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}
    for data in nodes:
        target = _resolved(data["target"]) if data["op"] == "call_function" else data["target"]
        args = tuple(_argument(a, made, mode) for a in data["args"])
        kwargs = {k: _argument(a, made, mode) for k, a in data["kwargs"].items()}
        node = graph.create_node(data["op"], target, args, kwargs, data["name"])
        made[data["name"]] = node
        if "value" in data:
            node.meta[g.VALUE] = _argument(data["value"], made, mode)
        if data.get("where"):
            node.meta["nn_module_stack"] = {"": (data["where"], None)}
        if "recipe" in data:
            node.meta[RECIPE] = _recipe_of(data["recipe"])
    return graph


def _text(x: Any) -> Any:
    """An argument or a value as JSON: plain values as they are, others as {kind: content}."""
    if isinstance(x, float):
        return {"float": x.hex()}
    if isinstance(x, _PLAIN):
        return x
    if isinstance(x, fx.Node):
        return {"node": x.name}
    if isinstance(x, torch.Size):
        return {"size": [_text(n) for n in x]}
    if isinstance(x, (tuple, list)) and type(x).__name__ in ("tuple", "list", "immutable_list"):
        return {"tuple" if isinstance(x, tuple) else "list": [_text(n) for n in x]}
    if isinstance(x, dict):
        return {"dict": [[_text(k), _text(v)] for k, v in x.items()]}
    if isinstance(x, slice):
        return {"slice": [_text(x.start), _text(x.stop), _text(x.step)]}
    if isinstance(x, Tensor) and x.layout is torch.strided:
        return {"tensor": [str(x.dtype), _numbers(x.shape), _numbers(x.stride()), str(x.device)]}
    if isinstance(x, torch.device):
        return {"device": str(x)}
    for kind, of in _OF_TORCH.items():
        if isinstance(x, of):
            return {kind: str(x)}
    if x is Ellipsis:
        return {"ellipsis": None}
    raise UnstorableError(f"{type(x).__name__} has no text")


def _numbers(sizes: Iterable[Any]) -> list[int]:
    numbers = list(sizes)
    if not all(type(n) is int for n in numbers):
        raise UnstorableError("a size is symbolic")
    return numbers


def _argument(x: Any, made: Mapping[str, fx.Node], mode: FakeTensorMode | None) -> Any:
    if not isinstance(x, dict):
        if not isinstance(x, _PLAIN):
            raise ValueError(f"{x!r} is no argument")
        return x
    ((kind, content),) = x.items()
    if kind in ("tuple", "list", "size", "slice"):
        parts = [_argument(part, made, mode) for part in content]
        return slice(*parts) if kind == "slice" else _SEQUENCES[kind](parts)
    if kind == "dict":
        return {_argument(k, made, mode): _argument(v, made, mode) for k, v in content}
    if kind == "node":
        return made[content]
    if kind == "float":
        return float.fromhex(content)
    if kind == "ellipsis":
        return Ellipsis
    if kind == "device":
        return torch.device(content)
    if kind == "tensor":
        name, shape, stride, device = content
        dtype = _torch(name, torch.dtype)
        if mode is None:
            return Described(shape, stride, dtype, torch.device(device))
        with mode:
            return torch.empty_strided(shape, stride, dtype=dtype, device=device)
    return _torch(content, _OF_TORCH[kind])


def _torch(name: str, kind: type) -> Any:
    """``torch.float32`` of its text."""
    found = getattr(torch, name.removeprefix("torch."))
    if not isinstance(found, kind):
        raise ValueError(f"{name} is no {kind}")
    return found


def _name_of(target: Any) -> str:
    name = torch.fx.node._get_qualified_name(target)
    try:
        found = _resolved(name)
    except FAULTS:
        found = None
    if found is not target:
        raise UnstorableError(f"{name} is not known by its name")
    return name


def _resolved(name: str) -> Any:
    if name in _BUILTINS:
        return _BUILTINS[name]
    root, *rest = name.split(".")
    if root not in _ROOTS:
        raise ValueError(f"{name} is nothing that a graph calls")
    found: Any = importlib.import_module(root)
    path = root
    for part in rest:
        path = f"{path}.{part}"
        found = getattr(found, part) if hasattr(found, part) else importlib.import_module(path)
    return found


# -- constants, recipes, symbols, reports --------------------------------------------------------------------


def _attributes(graph: fx.Graph) -> set[str]:
    """The tensors that a graph and its recipes read, but for those that are made of recipes."""
    made = recipes(graph)
    read = {str(n.target) for n in graph.nodes if n.op == "get_attr"} - made.keys()
    for recipe in made.values():
        if isinstance(recipe, PositionTable):
            read |= _attributes(recipe.graph)
        else:
            read |= {part.attribute for part in recipe.parts}
    return read


def _register(module: nn.Module, attribute: str, tensor: Tensor) -> None:
    if isinstance(tensor, nn.Parameter):
        module.register_parameter(attribute, tensor)
    else:
        module.register_buffer(attribute, tensor, persistent=False)


def _constant(gm: fx.GraphModule, attribute: str) -> list[Any]:
    value = getattr(gm, attribute, None)
    if type(value) is not Tensor or value.layout is not torch.strided or value.is_meta:
        raise UnstorableError(f"{attribute} is no plain tensor")
    if value.nbytes > _LARGEST:
        raise UnstorableError(f"{attribute} is a constant of {value.nbytes} bytes")
    flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    content = base64.b64encode(flat.numpy().tobytes()).decode()
    return [str(value.dtype), list(value.shape), str(value.device), content]


def _tensor(constant: list[Any]) -> Tensor:
    dtype, shape, device, content = constant
    flat = torch.frombuffer(bytearray(base64.b64decode(content)), dtype=torch.uint8)
    return flat.view(_torch(dtype, torch.dtype)).reshape(shape).to(device)


def _recipe(recipe: Recipe) -> dict[str, Any]:
    if isinstance(recipe, PositionTable):
        nodes = [_node(n, values=False) for n in recipe.graph.nodes]
        return {"kind": "table", "nodes": nodes, "name": recipe.name, "limit": recipe.limit}
    kind = "packed" if isinstance(recipe, PackedWeight) else "bias"
    return {"kind": kind, "parts": [dataclasses.astuple(p) for p in recipe.parts]}


def _recipe_of(data: Mapping[str, Any]) -> Recipe:
    if data["kind"] == "table":
        return PositionTable(_graph(data["nodes"], None), data["name"], data["limit"])
    parts = tuple(Part(*p) for p in data["parts"])
    return PackedWeight(parts) if data["kind"] == "packed" else StackedBias(parts)


def _symbols(rewritten: Rewritten) -> list[list[Any]]:
    """Each prime that stands for a symbol, with the size that the capture saw."""
    values = [g.value(n) for n in rewritten.gm.graph.nodes if n.op == "placeholder"]
    named = dict(zip(values, rewritten.inputs, strict=True)) if all(map(_hashable, values)) else {}
    found = []
    for prime, symbol in rewritten.gm.meta.get(SYMBOLS, {}).items():
        if prime not in named:
            raise UnstorableError("a symbolic size is no input")
        found.append([prime, int(symbol.node.hint)])
    return found


def _hashable(x: Any) -> bool:
    return x.__hash__ is not None


class _LateSymbols(Mapping[int, torch.SymInt]):
    """Prime → the symbolic size that it stands for. The sizes are made when one is asked for, which only a
    graph of which Inductor compiles something does: making them imports Dynamo."""

    def __init__(self, numbers: list[tuple[int, int]]) -> None:
        self._numbers = dict(numbers)

    def __getitem__(self, prime: int) -> torch.SymInt:
        return self._made[prime]

    def __iter__(self) -> Iterator[int]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    @functools.cached_property
    def _made(self) -> dict[int, torch.SymInt]:
        from torch._dynamo.source import ConstantSource
        from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

        env = ShapeEnv()
        found: dict[int, Any] = {}
        for prime, hint in self._numbers.items():
            source = ConstantSource(f"size_{prime}")
            symbol = env.create_symbol(hint, source, DimDynamic.DYNAMIC, None)
            found[prime] = env.create_symintnode(symbol, hint=hint, source=source)
        return found


def _report(data: Mapping[str, Any]) -> Report:
    passes = [
        PassReport(**{**p, "matches": _events(p["matches"]), "misses": _events(p["misses"])})
        for p in data["passes"]
    ]
    return Report(passes, _events(data["unplaced"]), list(data["notes"]))


def _events(data: list[Mapping[str, str]]) -> list[Event]:
    return [Event(**e) for e in data]
