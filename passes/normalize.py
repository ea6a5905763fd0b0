"""One spelling for one meaning, so that later passes match dataflow and not style.

Cases:

1. operators and methods become the ``torch`` function of the same meaning:
   ``x.add(y)``, ``x + y`` → ``torch.add(x, y)``; ``torch.ops.llm42.op`` → its only overload
2. casts become ``x.to(dtype)``: ``x.float()``, ``x.bfloat16()``, ``x.type_as(y)``, ``x.to(y)``,
   ``x.to(device=same, dtype=d)``
3. ``x.pow(2)``, ``x ** 2``, ``x * x`` → ``torch.square(x)``;  powers of -0.5, 0.5 and -1 → ``rsqrt``,
   ``sqrt`` and ``reciprocal``, as ``torch.pow`` itself does;  ``1 / x`` → ``torch.reciprocal(x)``;  a product
   of matrices that sums over one element, ``[*, M, 1] @ [*, 1, N]`` → ``torch.mul`` (a zero keeps its sign)
4. things that do nothing go away: casts to the same dtype, ``dropout`` outside training or with p=0,
   ``x * 1.0``, ``x + 0`` on integers, ``detach``, ``contiguous()`` of a row-major tensor, slices and
   reshapes of everything, empty parts of a ``cat``, usage logging
5. writes to tensors that the graph made become values (``in_place.py``)

Before and after (fp32 model, x: [B, S, H])::

    to    = x.to(torch.float32)                square = torch.square(x)
    pow_1 = to.pow(2)                          mean   = torch.mean(square, -1, keepdim=True)
    mean  = pow_1.mean(-1, keepdim=True)   →   add    = torch.add(mean, 1e-5)
    add   = mean + 1e-5                        rsqrt  = torch.rsqrt(add)
    rsqrt = torch.rsqrt(add)
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from llm42c.passes import graph as g
from llm42c.passes.base import Context, PassReport
from llm42c.passes.in_place import filled_by_parts, written_in_place

_CAST_METHODS = {
    "float": torch.float32,
    "double": torch.float64,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
    "long": torch.int64,
    "int": torch.int32,
    "bool": torch.bool,
}
# What functions, methods and Python's operators are called → the function of the same meaning. Methods of a
# function's own name need no row, and those whose function has another parameter order stay methods.
_SAME = {
    **{name: name for name in ("add", "sub", "mul", "neg", "matmul", "pow")},
    **{name: name for name in ("softmax", "log_softmax", "sigmoid", "tanh", "relu", "rms_norm")},
    **dict.fromkeys(("multiply", "__mul__"), "mul"),
    **dict.fromkeys(("truediv", "true_divide", "divide"), "div"),
    **dict.fromkeys(("swapaxes", "swapdims"), "transpose"),
    "subtract": "sub",
    "negative": "neg",
    "__add__": "add",
    "__matmul__": "matmul",
    "special_expit": "sigmoid",
}
_POWERS: dict[float | None, str] = {2.0: "square", 0.5: "sqrt", -0.5: "rsqrt", -1.0: "reciprocal"}
_KEEP_METHODS = frozenset({"split", "where", "std", "clone", "embedding", "dropout", "linear"})


def _spell(node: fx.Node) -> None:
    """Case 1: the target becomes the canonical function; arguments keep their places."""
    if node.op == "call_method":
        target = _SAME.get(str(node.target), str(node.target))
        if (
            target in g.FUNCTIONS
            and target not in _KEEP_METHODS
            and isinstance(g.value(node.args[0]), Tensor)
        ):
            node.op, node.target = "call_function", g.FUNCTIONS[target]
            _pack_varargs(node, target)
    elif isinstance(node.target, torch._ops.OpOverloadPacket):
        if g.ours(node):
            node.target = node.target.default
    elif node.op == "call_function":
        spelled = _SAME.get(getattr(node.target, "__name__", ""))
        known = isinstance(node.target, torch._ops.OpOverload) or g.name(node)
        if known or not spelled or not any(g.tensor(a) is not None for a in node.args):
            return
        if spelled == "relu" and g.mutated_arguments(node):
            return
        if g.tensor(node.args[0]) is None:  # `2 * x`: the functions take the tensor first
            if spelled not in ("add", "mul"):
                return
            node.args = (node.args[1], node.args[0])
        if spelled == "relu":
            if node.kwargs.get("inplace") or g.arg(node, 1):
                return  # it writes to its argument
            node.args, node.kwargs = node.args[:1], {}
        if node.target in (torch.nn.functional.softmax, torch.nn.functional.log_softmax):
            _drop_stacklevel(node)
        node.target = g.FUNCTIONS[spelled]


def _pack_varargs(node: fx.Node, target: str) -> None:
    """``x.permute(0, 2, 1)`` and ``x.reshape(a, b)`` as methods take the list spread out."""
    spread = len(node.args) > 1 and not isinstance(g.value(node.args[1]), (tuple, list))
    if target in ("permute", "reshape") and spread:
        node.args = (node.args[0], tuple(node.args[1:]))


def _drop_stacklevel(node: fx.Node) -> None:
    """``F.softmax(x, dim, _stacklevel, dtype)`` has one argument more than ``torch.softmax``."""
    args, kwargs = list(node.args), dict(node.kwargs)
    kwargs.pop("_stacklevel", None)
    if len(args) > 3:
        kwargs["dtype"] = args[3]
    if len(args) > 2:
        del args[2:]
    node.args, node.kwargs = tuple(args), {k: v for k, v in kwargs.items() if v is not None}


def _cast_target(node: fx.Node) -> torch.dtype | None:
    """The dtype that a call casts to when casting is all it does, else None (case 2)."""
    if node.op != "call_method" or g.tensor(node) is None or g.tensor(node.args[0]) is None:
        return None
    before, after = g.fake(node.args[0]), g.fake(node)
    if before.device != after.device or node.kwargs.get("copy") or node.kwargs.get("memory_format"):
        return None
    if node.target in _CAST_METHODS:
        return _CAST_METHODS[str(node.target)]
    if node.target == "type_as":
        return after.dtype
    if node.target in ("to", "type") and not any(isinstance(a, bool) and a for a in node.args[1:]):
        return after.dtype
    return None


def _simplify(node: fx.Node) -> Any:
    """Case 3: (canonical name, arguments) of a shorter form, or None."""
    kind = g.name(node)
    if kind == "pow":
        exponent = g.number(node.args[1]) if len(node.args) > 1 else None
        if exponent in _POWERS and (t := g.tensor(node.args[0])) is not None and t.is_floating_point():
            return _POWERS[exponent], (node.args[0],)
    if node.target is operator.truediv and g.number(node.args[0]) == 1 and g.tensor(node.args[1]) is not None:
        return ("reciprocal", (node.args[1],)) if g.fake(node.args[1]).is_floating_point() else None
    if kind == "mul" and len(node.args) == 2:
        a, b = node.args
        if a is b and g.tensor(a) is not None:
            return "square", (a,)
    if kind in ("matmul", "bmm") and _sums_one_element(node):
        return "mul", tuple(node.args)
    return None


def _sums_one_element(node: fx.Node) -> bool:
    """``[*, M, 1] @ [*, 1, N]`` of one dtype: rotary angles as transformers used to write them."""
    if len(node.args) != 2 or node.kwargs:
        return False
    a, b = (g.tensor(arg) for arg in node.args)
    if a is None or b is None or a.dim() < 2 or b.dim() < 2:
        return False
    return a.dtype == b.dtype and g.same(a.shape[-1], 1) and g.same(b.shape[-2], 1)


def _is_nothing(node: fx.Node, copies_may_alias: bool) -> bool:
    """Case 4: the call returns its first argument unchanged.

    ``x * 1.0`` makes a copy; dropping it is only allowed where nobody can tell.
    """
    kind, result = g.name(node), g.tensor(node)
    if kind == "cat" and len(node.args[0]) == 1:  # type: ignore[arg-type]
        return copies_may_alias
    first = g.tensor(g.arg(node))
    if first is None or result is None or first.dtype != result.dtype or first.device != result.device:
        return False
    if kind == "dropout":
        bound = g.bind(node)
        return not bound["training"] or bound["p"] == 0
    if kind in ("mul", "add") and copies_may_alias:
        neutral = 1.0 if kind == "mul" else 0
        exact = kind == "mul" or not result.is_floating_point()  # -0.0 + 0 is another number
        return exact and g.number(node.args[1]) == neutral and g.same_shape(first, result)
    if kind == "detach":
        return not torch.is_grad_enabled()
    if kind == "contiguous":
        return not node.kwargs and g.is_contiguous(first)
    # A view of everything: ``x[..., :D]`` of a tensor that is D wide, ``reshape`` to its own shape.
    return kind in ("getitem", "reshape", "view", "expand") and g.same_view(first, result)


def _without_empty_parts(node: fx.Node) -> None:
    """``cat([a, empty], d)`` as ``cat([a], d)``."""
    bound = g.bind(node)
    parts = bound["tensors"]
    if not isinstance(parts, (tuple, list)):
        return
    full = [p for p in parts if not any(g.same(size, 0) for size in g.fake(p).shape)]
    if full and len(full) < len(parts):
        node.args, node.kwargs = (full, bound["dim"]), {}


def _storage_of_first(node: fx.Node) -> int | None:
    first = g.arg(node)
    first = first[0] if isinstance(first, (tuple, list)) and first else first
    return g.storage_of(first) if isinstance(first, fx.Node) else None


def _rewrite(node: fx.Node, copies_may_alias: bool) -> fx.Node | None:
    """Respell ``node``; returns the node that it equals when it does nothing."""
    _spell(node)
    dtype = _cast_target(node)
    if dtype is not None:
        source = g.arg(node)
        if g.fake(source).dtype == dtype:
            return source
        node.op, node.target, node.args, node.kwargs = "call_method", "to", (source, dtype), {}
    simpler = _simplify(node)
    if simpler is not None:
        node.target, node.args, node.kwargs = g.FUNCTIONS[simpler[0]], simpler[1], {}
    if g.name(node) == "cat":
        _without_empty_parts(node)
    if not _is_nothing(node, copies_may_alias):
        return None
    first = g.arg(node)
    return first[0] if isinstance(first, (tuple, list)) else first


def normalize(graph: fx.Graph, ctx: Context, report: PassReport) -> None:
    """Rewrite every node of ``graph`` to its canonical spelling."""
    written_in_place(graph)
    filled_by_parts(graph)
    functional = not any(g.mutated_arguments(node) for node in graph.nodes if not g.ours(node))
    inputs = {g.storage_of(n) for n in graph.nodes if n.op in ("placeholder", "get_attr")}
    for node in list(graph.nodes):
        if node.op not in ("call_function", "call_method"):
            continue
        if node.target is torch._C._log_api_usage_once:
            graph.erase_node(node)
            continue
        before = node.target
        same = _rewrite(node, functional and _storage_of_first(node) not in inputs)
        if same is not None:
            copied = g.storage_of(node) != g.storage_of(same)
            users = g.users(node)
            node.replace_all_uses_with(same)
            graph.erase_node(node)
            if copied:
                g.refresh(users)
        if same is not None or node.target is not before:
            report.match(node)
    for node in graph.nodes:
        if g.mutated_arguments(node) and not g.ours(node):
            report.miss(node, "a write that stays: to an input, or under a view that is read after it")
