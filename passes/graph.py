"""What every pass needs to know of a Dynamo graph: names, values, insertion, replacement, aliasing.

The value of a node is the fake tensor (or number) that Dynamo recorded; a node that a pass inserts gets
its value by running the operator on the fakes of its arguments, so shapes and strides are never guessed.
"""

from __future__ import annotations

import contextlib
import functools
import heapq
import inspect
import operator
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from llm42c.codegen.operator import Operator
from llm42c.codegen.ops.registry import our_operator
from llm42c.passes.traits import renamed, signature

VALUE = "example_value"
STAND_INS = 1 << 28
"""Sizes from here on stand for a symbol (``sizes.py``); no dimension of a model is as large."""

# fmt: off
_TORCH = (
    "abs", "add", "addmm", "amax", "amin", "argmax", "baddbmm", "bmm", "cat", "chunk", "clamp", "clone",
    "concat", "cos", "cumprod", "cumsum", "diff", "div", "eq", "erf", "exp", "expm1", "flatten", "gather",
    "ge", "gt",
    "index_select", "le", "log", "log1p", "log_softmax", "logsumexp", "lt", "masked_fill", "matmul",
    "maximum", "mean", "minimum", "mm", "movedim", "mul", "narrow", "ne", "neg", "norm", "permute", "pow",
    "prod", "reciprocal", "relu", "repeat_interleave", "reshape", "rsqrt", "select", "sigmoid", "sin",
    "softmax", "split", "sqrt", "square", "squeeze", "std", "std_mean", "sub", "sum", "t", "tanh", "topk",
    "transpose", "tril", "triu", "unbind", "unflatten", "unsqueeze", "var", "var_mean", "where",
)
# fmt: on
# Canonical name of every function that a pass may ask for. `normalize` spells methods and operators
# as these functions; `view`, `expand`, `contiguous` and `to` exist as methods only.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{name: getattr(torch, name) for name in _TORCH},
    "getitem": operator.getitem,
    "linear": torch.nn.functional.linear,
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "softplus": torch.nn.functional.softplus,
    "layer_norm": torch.nn.functional.layer_norm,
    "rms_norm": torch.nn.functional.rms_norm,
    "group_norm": torch.nn.functional.group_norm,
    "normalize": torch.nn.functional.normalize,
    "linalg_norm": torch.linalg.norm,
    "linalg_vector_norm": torch.linalg.vector_norm,
    "dropout": torch.nn.functional.dropout,
    "embedding": torch.nn.functional.embedding,
    "sdpa": torch.nn.functional.scaled_dot_product_attention,
}
METHODS = frozenset({"view", "expand", "contiguous", "to"})
_NAME_OF: dict[Any, str] = {fn: name for name, fn in FUNCTIONS.items()}


def called(node: Any) -> str:
    """What a call computes, by one name for all its spellings; "" for what is no call.

    ``add`` for ``torch.add``, ``Tensor.add``, ``operator.add`` and ``aten.add.Tensor``, ``add_`` for what
    writes in place, and ``llm42::rms_norm``: other namespaces stay. Tables are asked by this name
    (``traits.py``), and people read it.
    """
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method"):
        return ""
    target = node.target
    packet = target.overloadpacket if isinstance(target, torch._ops.OpOverload) else target
    if isinstance(packet, torch._ops.OpOverloadPacket):
        return packet._qualified_op_name.removeprefix("aten::")
    if isinstance(target, str):
        return target
    # Dynamo runs `np.sqrt` of a number as `wrapped_sqrt`.
    return _NAME_OF.get(target) or str(getattr(target, "__name__", target)).removeprefix("wrapped_")


def name(node: Any) -> str:
    """:func:`called`, if passes know the arguments: of a method, of a function in ``FUNCTIONS`` and of an
    operator; "" of all others, such as ``operator.add`` of two sizes."""
    known = isinstance(node, fx.Node) and (isinstance(node.target, str) or _is_known(node.target))
    return called(node) if known else ""


def _is_known(target: Any) -> bool:
    of_torch = isinstance(target, torch._ops.OpOverload) and target.namespace == "aten"
    return not of_torch and (isinstance(target, torch._ops.OpOverload) or target in _NAME_OF)


def ours(node: Any) -> Operator | None:
    """The operator of llm42 that a node calls."""
    return our_operator(called(node))


def bind(node: fx.Node) -> dict[str, Any]:
    """Arguments of a node by name, defaults filled in; calls of methods, functions and operators alike.

    Names are those of :func:`~llm42c.passes.traits.signature`. Unknown keyword arguments keep their own.
    """
    function = node.target if isinstance(node.target, torch._ops.OpOverload) else FUNCTIONS[name(node)]
    parameters = signature(function)
    bound: dict[str, Any] = dict(parameters)
    for (key, _), arg in zip(parameters, node.args, strict=False):
        bound[key] = arg
    bound |= {renamed(key, called(node)): arg for key, arg in node.kwargs.items()}
    return bound


def arg(node: Any, index: int = 0) -> Any:
    """A positional argument; None for what is no node or has fewer."""
    return node.args[index] if isinstance(node, fx.Node) and len(node.args) > index else None


def value(node: Any) -> Any:
    """Fake tensor or number of a node; an argument that is no node is its own value."""
    return node.meta.get(VALUE, node.meta.get("val")) if isinstance(node, fx.Node) else node


def tensor(node: Any) -> Tensor | None:
    """Fake tensor of a node, or None for anything that is no tensor.

    A value inside a ``vmap`` counts as none: it has no storage, and its sizes are not those of the call.
    """
    v = value(node)
    if not isinstance(v, Tensor) or not isinstance(node, fx.Node):
        return None
    return None if torch._C._functorch.is_batchedtensor(v) else v


def fake(node: Any) -> Tensor:
    """Fake tensor of a node that is known to be one."""
    t = tensor(node)
    if t is None:
        raise TypeError(f"{node} is no tensor")
    return t


def number(arg: Any) -> float | None:
    """A Python number, or the value of a symbolic float (which is guarded on), else None.

    Under ``dynamic=True`` Dynamo turns attributes such as an epsilon into symbolic floats.
    """
    v = value(arg)
    if isinstance(v, bool):
        return None
    if isinstance(v, (int, float)):
        return float(v)
    return float(v) if isinstance(v, torch.SymFloat) else None


def users(node: fx.Node) -> list[fx.Node]:
    return list(node.users)


def only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def where(node: fx.Node) -> str:
    """Module path of a node, e.g. ``model.layers.0.self_attn``; "" when Dynamo recorded none."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = list(stack.values())[-1][0]
    return re.sub(r"^L\['\w+'\]\.?", "", str(path))


def same(a: Any, b: Any) -> bool:
    """Provably equal sizes (ints or symbols); never installs a guard."""
    same = a == b
    if isinstance(same, bool):
        return same
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # half a second of sympy

    return bool(statically_known_true(same))


def same_shape(a: Tensor, b: Tensor) -> bool:
    return a.dim() == b.dim() and all(same(x, y) for x, y in zip(a.shape, b.shape, strict=True))


def is_contiguous(t: Tensor) -> bool:
    """Provably row-major; dimensions of size 1 may have any stride."""
    expected: Any = 1
    for size, stride in zip(reversed(t.shape), reversed(t.stride()), strict=True):
        if not same(size, 1):
            if not same(stride, expected):
                return False
            expected = expected * size
    return True


def last_dim(t: Tensor, dim: Any) -> bool:
    """``dim`` (an int or a sequence of one) names the last dimension of ``t``."""
    if isinstance(dim, (list, tuple)):
        if len(dim) != 1:
            return False
        dim = dim[0]
    return isinstance(dim, int) and dim in (-1, t.dim() - 1)


def same_view(a: Tensor, b: Tensor) -> bool:
    """Both fakes provably name the same elements of the same storage in the same order."""
    if a.dtype != b.dtype or not same_shape(a, b):
        return False
    if storage(a) != storage(b) or not same(a.storage_offset(), b.storage_offset()):
        return False
    pairs = zip(a.shape, a.stride(), b.stride(), strict=True)
    return all(same(size, 1) or same(x, y) for size, x, y in pairs)


def storage(t: Tensor) -> int:
    """Identity of a fake's storage: two values with one identity alias each other."""
    return int(t.untyped_storage()._cdata)


def storage_of(node: fx.Node) -> int | None:
    """Identity of a node's storage; None for what is no tensor."""
    t = tensor(node)
    return None if t is None else storage(t)


def fake_mode(graph: fx.Graph) -> FakeTensorMode | None:
    for node in graph.nodes:
        v = value(node)
        if isinstance(v, FakeTensor):
            return v.fake_mode
    return None


@contextlib.contextmanager
def fake_execution(graph: fx.Graph, mode: FakeTensorMode | None = None) -> Iterator[None]:
    """Operators called inside run on fakes: shapes and strides only."""
    mode = mode or fake_mode(graph)
    with mode or contextlib.nullcontext(), torch.no_grad():
        yield


def compute_value(node: fx.Node, mode: FakeTensorMode | None = None) -> None:
    """Set a node's value by running it on the values of its arguments."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)  # also within slices
    with fake_execution(node.graph, mode):
        if node.op == "call_function":
            node.meta[VALUE] = node.target(*args, **kwargs)  # type: ignore[operator]
        elif node.op == "call_method":
            node.meta[VALUE] = getattr(args[0], node.target)(*args[1:], **kwargs)  # type: ignore[arg-type]


def insert(
    before: fx.Node,
    target: Callable[..., Any] | str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    like: fx.Node | None = None,
) -> fx.Node:
    """A new call in front of ``before``; a string names a method. Module path is taken from ``like``."""
    graph = before.graph
    with graph.inserting_before(before):
        if isinstance(target, str):
            node = graph.call_method(target, args, kwargs or {})
        else:
            node = graph.call_function(target, args, kwargs or {})
    source = like or before
    for key in ("nn_module_stack", "stack_trace", "source_fn_stack"):
        if key in source.meta:
            node.meta[key] = source.meta[key]
    compute_value(node)
    return node


class IllegalRewriteError(RuntimeError):
    """A pass tried to replace a node by one of another shape, dtype or device: a fault of the pass."""


def replace(old: fx.Node, new: fx.Node) -> None:
    """Give ``old``'s users to ``new`` and delete ``old``; shapes, dtypes and devices must agree.

    Strides may differ; the values of everything downstream are then computed again.
    """
    a, b = value(old), value(new)
    if isinstance(a, Tensor) and not _interchangeable(a, b):
        raise IllegalRewriteError(f"{old.format_node()} → {new.format_node()}: {describe(a)} → {describe(b)}")
    followers = users(old)
    if isinstance(a, Tensor) and a.stride() != b.stride() and bakes_layout(old):
        raise IllegalRewriteError(f"{old.format_node()} is read by as_strided, which fixes its strides")
    fresh = not (_is_view(a, old) or _is_view(b, new)) if isinstance(a, Tensor) else False
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)
    if not isinstance(a, Tensor):
        return
    if fresh and a.stride() == b.stride():
        new.meta[VALUE] = a  # one fresh tensor for another: what refers to its storage stays right
    else:
        refresh(followers)


def bakes_layout(node: fx.Node) -> bool:
    """The node, or a view of it, is read by ``as_strided``: its strides are part of the program."""
    key = storage_of(node)
    return any(
        user.target in (torch.as_strided, "as_strided") or (storage_of(user) == key and bakes_layout(user))
        for user in node.users
    )


def _is_view(t: Tensor, node: fx.Node) -> bool:
    """``t``, the value of ``node``, aliases an input."""
    return any(storage_of(source) == storage(t) for source in node.all_input_nodes)


def _interchangeable(a: Tensor, b: Any) -> bool:
    return isinstance(b, Tensor) and a.dtype == b.dtype and a.device == b.device and same_shape(a, b)


def refresh(stale: list[fx.Node]) -> None:
    """Compute the values of ``stale`` again, and of what follows as long as layouts change."""
    queue = list(stale)
    heapq.heapify(queue)
    seen: set[fx.Node] = set()
    while queue:
        node = heapq.heappop(queue)
        if node in seen or node.op not in ("call_function", "call_method"):
            continue
        seen.add(node)
        before = value(node)
        compute_value(node)
        if _same_layout(before, value(node), node.all_input_nodes):
            node.meta[VALUE] = before  # keeps the storage identity that later nodes refer to
        else:
            for user in node.users:
                heapq.heappush(queue, user)


def _same_layout(before: Any, after: Any, inputs: list[fx.Node]) -> bool:
    if not isinstance(after, Tensor):
        return False
    aliased = storage(after) in {storage_of(n) for n in inputs}
    return not aliased and same_shape(before, after) and before.stride() == after.stride()


def erase_dead(nodes: list[fx.Node]) -> None:
    """Delete those of ``nodes`` (in graph order) that nobody uses any more."""
    for node in reversed(nodes):
        if not node.users:
            node.graph.erase_node(node)


def size(before: fx.Node, operand: fx.Node, dim: int) -> Any:
    """A size as a number, or as a node in front of ``before`` that asks for it.

    A number is a size of the model; those that differ from call to call are symbols or stand for one.
    """
    found = fake(operand).shape[dim]
    constant = isinstance(found, int) and found < STAND_INS
    return found if constant else insert(before, "size", (operand, dim))


def order(graph: fx.Graph) -> dict[fx.Node, int]:
    """Position of every node."""
    return {node: i for i, node in enumerate(graph.nodes)}


def describe(v: Any) -> str:
    """``bf16[1, s27, 576]`` for a tensor, its repr for anything else."""
    if isinstance(v, Tensor):
        kind = str(v.dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "f")
        return f"{kind}[{', '.join(str(s) for s in v.shape)}]"
    return repr(v)


def mutated_arguments(node: fx.Node) -> list[fx.Node]:
    """Nodes whose tensors this call writes to."""
    if node.op == "call_method":
        target = str(node.target)
        inplace = target.endswith("_") and not target.endswith("__")
        inplace |= target == "__setitem__" or target.strip("_") in _IOPS
        return [node.args[0]] if inplace else []  # type: ignore[list-item]
    if node.op != "call_function":
        return []
    if isinstance(node.target, torch._ops.OpOverload):
        found = []
        for i, argument in enumerate(node.target._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                arg = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
                found += [n for n in torch.utils._pytree.tree_leaves(arg) if isinstance(n, fx.Node)]
        return found
    if isinstance(node.kwargs.get("out"), fx.Node):
        return [node.kwargs["out"]]  # type: ignore[list-item]
    called = getattr(node.target, "__name__", "")
    inplace = node.target is operator.setitem or _asks_for_in_place(node)
    of_python = getattr(node.target, "__module__", "") == "_operator"  # `and_` is an operator, not a writer
    inplace |= called in _IOPS if of_python else called.endswith("_") and not called.endswith("__")
    written = node.args[0] if node.args else node.kwargs.get("input")
    leaves = torch.utils._pytree.tree_leaves(written) if inplace else ()  # `_foreach_add_` writes to a list
    return [n for n in leaves if isinstance(n, fx.Node)]


def _asks_for_in_place(node: fx.Node) -> bool:
    """``F.relu(x, inplace=True)``, or ``F.relu(x, True)``."""
    place = _place_of_inplace(node.target)
    by_place = place is not None and place < len(node.args) and node.args[place] is True
    return by_place or node.kwargs.get("inplace") is True


@functools.cache
def _place_of_inplace(function: Any) -> int | None:
    """Where ``function`` takes the flag ``inplace``, if it has one."""
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # of a function in C
        return None
    return names.index("inplace") if "inplace" in names else None


_IOPS = frozenset(
    f"i{name}" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")
) | {"ilshift", "irshift", "imatmul"}


class Effects:
    """Which storages are written where; says whether a read may move."""

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        self._scan()

    def _scan(self) -> None:
        self._order = order(self._graph)
        self._writes: list[tuple[int, int]] = [
            (at, storage(t))
            for node, at in self._order.items()
            for arg in mutated_arguments(node)
            if (t := tensor(arg)) is not None
        ]

    def unchanged(self, nodes: list[fx.Node], first: fx.Node, last: fx.Node) -> bool:
        """None of ``nodes``' storages is written after ``first`` and before ``last``."""
        if not self._writes:
            return True
        if first not in self._order or last not in self._order:
            self._scan()
        start, end = self._order[first], self._order[last]
        storages = {storage(t) for n in nodes if (t := tensor(n)) is not None}
        return not any(start < at < end and written in storages for at, written in self._writes)
