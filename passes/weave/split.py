"""Write a graph for two halves of its tokens.

``split_tokens`` finds, operator by operator (``rules.py``, ``attention.py``), which dimension of
each value counts tokens, and writes every call on such values twice: once for the first ``tokens_0`` tokens,
an input of the new graph, and once for the rest. Weights, and whatever else does not depend on tokens, are
shared. Values in front of the first product with a weight (positions, masks, embeddings) are computed once
and cut. Behind the last collective, the first call that needs all tokens at once joins the halves.

Before and after (x: [T, H])::

    y = mm(x, w)              x0 = narrow(x, 0, 0, T0)      x1 = narrow(x, 0, T0, T - T0)
    s = all_reduce(y)         y0 = mm(x0, w)                y1 = mm(x1, w)
    r = wait_tensor(s)    →   s0 = all_reduce(y0)           s1 = all_reduce(y1)
    z = x + r                 r0 = wait_tensor(s0)          r1 = wait_tensor(s1)
    return z[-1:]             z0 = x0 + r0                  z1 = x1 + r1
                              return cat([z0, z1])[-1:]

Nothing computes differently: a half is the same graph with another number of tokens, except for attention.
The order of writes into paged KV, half 0 first, is given as explicit edges (``Split.ordered``).
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from llm42c.passes import graph as g
from llm42c.passes.sizes import NO_SYMBOLS, SYMBOLS, concretise
from llm42c.passes.weave import communication as comm
from llm42c.passes.weave.attention import Emit, attention_rule, is_attention
from llm42c.passes.weave.experts import Sorted, inverse_of, is_inverse
from llm42c.passes.weave.rules import (
    SLACK,
    Call,
    Rows,
    States,
    UnsplittableError,
    apply_rule,
    counts,
    divisible,
    is_heavy,
)

# Primes in place of the tokens of the two halves; all tokens are their sum.
HALF_SIZES = (217645177, 246399247)
ALL_TOKENS = sum(HALF_SIZES)
_DYNAMIC = (
    "no size of the graph is symbolic: compile with dynamic=True, or mark the tokens' dimension with "
    "torch._dynamo.mark_dynamic(input_ids, 1)"
)
HALF = "llm42_half"  # on a node's meta: 0, 1, or None for what is computed once


@dataclass
class Split:
    """A graph for two halves.

    ``gm``: its inputs are those of the original graph, then ``tokens_0``. ``ordered``: pairs of nodes of
    which the first must run before the second. ``tokens``: the placeholder of the number of all tokens.
    ``collectives``: how many were divided; ``joined``: where, and why, the halves were put together again.
    ``original``: the graph before, with the prime ``prime`` in place of the number of tokens.
    """

    gm: fx.GraphModule
    original: fx.GraphModule
    prime: int
    tokens: fx.Node
    tokens_0: fx.Node
    ordered: list[tuple[fx.Node, fx.Node]]
    collectives: int
    joined: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class _Propagation:
    """What is known of every node of the original graph."""

    states: dict[fx.Node, States] = field(default_factory=dict)
    needs: dict[fx.Node, dict[fx.Node, States]] = field(default_factory=dict)
    emits: dict[fx.Node, Emit] = field(default_factory=dict)
    joins: dict[fx.Node, str] = field(default_factory=dict)  # calls that need all tokens, and why
    late: set[fx.Node] = field(default_factory=set)  # behind a join
    divisible: dict[fx.Node, Rows] = field(default_factory=dict)

    def divided(self, node: fx.Node) -> bool:
        return self.states.get(node) is not None


def split_tokens(gm: fx.GraphModule, fixed: Mapping[str, int] | None = None) -> Split:
    """Divide the tokens of ``gm``, which is left as it is.

    The token dimension is a symbolic size of the graph. ``fixed``: other symbolic sizes, by name, that are to
    be taken as a number; the result is right for that number only. Raises UnsplittableError with the reason
    when the graph has none, or an operator in the way for which there is no rule.
    """
    original = copied(gm)
    if not any(comm.is_collective(n) for n in original.graph.nodes):
        raise UnsplittableError("no collective in the graph")
    if SYMBOLS not in original.meta and (why := concretise(original, fixed)) is not None:
        raise UnsplittableError(_DYNAMIC if why == NO_SYMBOLS else f"sizes cannot be followed: {why}")
    sizes = [n for n in original.graph.nodes if n.op == "placeholder" and _is_int(g.value(n))]
    inputs = {g.value(n): n for n in sizes}
    reasons = []
    for prime in _candidates(original):
        if prime not in inputs:
            continue
        try:
            return _write(original, _propagate(original.graph, prime), prime, inputs[prime])
        except UnsplittableError as reason:
            reasons.append(str(reason))
    raise UnsplittableError("; ".join(reasons) or "no collective on a value with a symbolic size")


def _is_int(v: Any) -> bool:
    return isinstance(v, int) and not isinstance(v, bool)


def copied(gm: fx.GraphModule) -> fx.GraphModule:
    """The same graph on the same tensors, with the same values."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    made = fx.GraphModule(gm, graph)
    made.meta.update(gm.meta)
    return made


def _candidates(gm: fx.GraphModule) -> list[int]:
    """Symbols by which collectives' messages are long: those furthest to the right first (not the batch)."""
    place: dict[int, int] = {}
    for node in gm.graph.nodes:
        if comm.is_collective(node):
            shape = g.fake(node.args[0]).shape
            for prime in gm.meta[SYMBOLS]:
                dims = [d - len(shape) for d, n in enumerate(shape) if n % prime == 0]
                if dims:
                    place[prime] = max(place.get(prime, -len(shape)), *dims)
    return sorted(place, key=lambda prime: place[prime], reverse=True)


def _propagate(graph: fx.Graph, tokens: int) -> _Propagation:
    """Apply the rules from top to bottom."""
    p = _Propagation()
    for node in graph.nodes:
        p.states[node] = None
        if node.op not in ("call_function", "call_method"):
            if (rows := divisible(node, tokens, p.divisible)) is not None:
                p.divisible[node] = rows
            continue
        above = node.all_input_nodes
        if any(n in p.late for n in above):
            p.late.add(node)
            _refuse_late(node, p)
        divided = any(p.divided(n) for n in above)
        if not divided and not (_begins(node, tokens) and node not in p.late):
            if (rows := divisible(node, tokens, p.divisible)) is not None:
                p.divisible[node] = rows
            continue
        if node in p.late:
            continue
        call = Call(node, tokens, p.states, p.divisible)
        try:
            if is_attention(node):
                p.states[node], p.emits[node] = attention_rule(call)
            elif (index := is_inverse(call.name, node, p.states)) is not None:
                p.states[node], p.emits[node] = _inverse_rule(index, call)
            else:
                p.states[node] = apply_rule(call)
            p.needs[node] = dict(call.needs)
        except UnsplittableError as reason:
            p.states[node] = None
            p.joins[node] = str(reason)
            p.late.add(node)
            _refuse_late(node, p)
    return p


def _inverse_rule(index: fx.Node, call: Call) -> tuple[States, Emit]:
    """A half's own sort is undone by the inverse of its own permutation."""
    of = call.state(index)
    if not isinstance(of, Sorted):
        raise TypeError(f"{index} is no permutation")
    return dataclasses.replace(of, what="inverse"), lambda b, half: b.call(inverse_of, (b.half(half, index),))


def _begins(node: fx.Node, tokens: int) -> bool:
    """A call with which the halves begin: a product, an attention or a collective on rows of tokens, or what
    gives each rank its rows."""
    shares = g.called(node) == "llm42::shard_rows"
    if not (shares or is_heavy(node) or is_attention(node) or comm.is_collective(node)):
        return False
    values = [t for n in node.all_input_nodes if (t := g.tensor(n)) is not None]
    return any(size and size % tokens == 0 for t in values for size in t.shape)


def _refuse_late(node: fx.Node, p: _Propagation) -> None:
    """What belongs to a layer must not stand behind the place where the halves are joined."""
    if is_attention(node) or comm.is_sum(node):
        first = next(iter(p.joins))
        where = g.where(first)
        raise UnsplittableError(f"{p.joins[first]}{f' ({where})' if where else ''}")


class _Writer:
    """Builds the divided graph; the ``Builder`` of attention rules."""

    def __init__(self, original: fx.GraphModule, p: _Propagation, prime: int, tokens: fx.Node) -> None:
        self.graph = fx.Graph()
        self.memo: dict[Any, Any] = {}
        self.ordered: list[tuple[fx.Node, fx.Node]] = []
        self._p, self._prime, self._tokens_of = p, prime, tokens
        self._whole: dict[fx.Node, Any] = {}
        self._halves: dict[tuple[fx.Node, int], Any] = {}
        self._mode = g.fake_mode(original.graph)
        self._half: int | None = None
        self._like: fx.Node | None = None
        self._inputs = [n for n in original.graph.nodes if n.op == "placeholder"]
        for node in self._inputs:
            new = self.graph.placeholder(node.name)
            new.meta = {**node.meta, g.VALUE: self._rescaled(g.value(node)), HALF: None}
            self._whole[node] = new
        self.tokens = self._whole[tokens]
        self.tokens_0 = self.graph.placeholder("tokens_0")
        self.tokens_0.meta = {g.VALUE: HALF_SIZES[0], HALF: None}
        self.tokens_1 = self.call(operator.sub, (self.tokens, self.tokens_0))

    def _rescaled(self, v: Any) -> Any:
        """A value of the original graph, with as many tokens as both halves."""

        def size(n: int) -> int:
            whole, rest = divmod(n, self._prime)
            return whole * ALL_TOKENS + rest if n >= self._prime and rest < SLACK else n

        if _is_int(v):
            return size(v)
        if not isinstance(v, Tensor):
            return v
        sizes, strides = [size(n) for n in v.shape], [size(n) for n in v.stride()]
        if sizes == list(v.shape):
            return v
        with self._mode or torch.no_grad():
            return torch.empty_strided(sizes, strides, dtype=v.dtype, device=v.device)

    def size(self, which: int) -> fx.Node:
        return self.tokens_1 if which else self.tokens_0

    def call(self, target: Callable[..., Any] | str, args: tuple[Any, ...], **kwargs: Any) -> fx.Node:
        if isinstance(target, str):
            node = self.graph.call_method(target, args, kwargs)
        else:
            node = self.graph.call_function(target, args, kwargs)
        source = self._like
        for key in ("nn_module_stack", "stack_trace", "source_fn_stack"):
            if source is not None and key in source.meta:
                node.meta[key] = source.meta[key]
        node.meta[HALF] = self._half
        g.compute_value(node, self._mode)
        return node

    def whole(self, node: Any) -> Any:
        """A value of all tokens: computed once, or joined."""
        if not isinstance(node, fx.Node):
            return node
        if node not in self._whole:
            self._whole[node] = self._joined(node)
        return self._whole[node]

    def half(self, which: int, node: Any) -> Any:
        """A value of one half; a whole value is cut."""
        if not isinstance(node, fx.Node):
            return node
        key = (node, which)
        if key not in self._halves:
            before, self._half = self._half, which
            self._halves[key] = self._cut(node, which)
            self._half = before
        return self._halves[key]

    def _joined(self, node: fx.Node) -> Any:
        state = self._p.states[node]
        if not isinstance(state, Rows) or state.outer != 1:
            raise UnsplittableError(f"{node.name} cannot be joined")
        before, self._half = self._half, None
        made = self.call(torch.cat, ([self.half(0, node), self.half(1, node)], state.dim))
        self._half = before
        return made

    def _cut(self, node: fx.Node, which: int) -> Any:
        if counts(node, self._prime):
            return self.size(which) if node is self._tokens_of else self._copy(node, which)
        rows = self._p.divisible.get(node)
        if rows is None:
            raise UnsplittableError(f"{node.name} cannot be cut")
        if (rows.outer, rows.inner) != (1, 1):
            return self._copy(node, which)  # a reshape of something that can be cut
        start = self.tokens_0 if which else 0
        cut = self.call(torch.narrow, (self.whole(node), rows.dim, start, self.size(which)))
        # Rows of several sequences are apart after a cut, and views of the whole need them together.
        several = any(size != 1 for size in g.fake(node).shape[: rows.dim])
        return self.call("contiguous", (cut,)) if several and g.is_contiguous(g.fake(node)) else cut

    def _copy(self, node: fx.Node, which: int) -> Any:
        """The call on the values of a half; sizes are the half's."""
        needs = self._p.needs.get(node)

        def given(n: fx.Node) -> Any:
            if counts(n, self._prime):
                return self.half(which, n)
            divided = self._p.divided(n) or (n in self._p.divisible if needs is None else needs.get(n))
            return self.half(which, n) if divided else self.whole(n)

        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), given)
        if node.target is operator.getitem and isinstance(args[0], tuple):
            index: Any = args[1]
            return args[0][index]
        return self._called(node, args, kwargs)

    def _called(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        if comm.returns_when_done(node):
            return self.call(comm.wait, (self.call(comm.start, (node.target, *args, *kwargs.values())),))
        return self.call(node.target, args, **kwargs)

    def write(self, node: fx.Node) -> None:
        """One node of the original graph: twice, or once."""
        self._like = node
        if node.op == "get_attr":
            new = self.graph.get_attr(str(node.target))
            new.meta = {**node.meta, HALF: None}
            self._whole[node] = new
        elif self._p.divided(node):
            for which in (0, 1):
                self._half = which
                emit = self._p.emits.get(node)
                made = emit(self, which) if emit is not None else self._copy(node, which)
                self._halves[node, which] = made
                self._check(node, which, made)
            self._half = None
        else:
            args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), self.whole)
            self._whole[node] = self._called(node, args, kwargs)

    def _check(self, node: fx.Node, which: int, made: Any) -> None:
        """A half has the shape of the whole, with its own number of rows."""
        state, before = self._p.states[node], g.value(node)
        if not isinstance(state, Rows) or not isinstance(made, fx.Node):
            return
        wanted = list(before.shape)
        wanted[state.dim] = state.outer * state.inner * HALF_SIZES[which]
        if list(g.fake(made).shape) != wanted:
            raise UnsplittableError(f"{node.name} has the shape {tuple(g.fake(made).shape)}, not {wanted}")


def _write(original: fx.GraphModule, p: _Propagation, prime: int, tokens: fx.Node) -> Split:
    divided = sum(comm.is_collective(n) and p.divided(n) for n in original.graph.nodes)
    sums = [n for n in original.graph.nodes if comm.is_sum(n)]
    if not divided or (sums and not any(p.divided(n) for n in sums)):
        raise UnsplittableError("no all-reduce can be divided")
    w = _Writer(original, p, prime, tokens)
    for node in original.graph.nodes:
        if node.op == "output":
            w.graph.output(fx.node.map_arg(node.args[0], w.whole))
        elif node.op != "placeholder":
            w.write(node)
    w.graph.lint()
    _erase_unused(w.graph)
    gm = fx.GraphModule(original, w.graph)
    gm.meta[SYMBOLS] = dict(original.meta[SYMBOLS])
    joined = [(n.name, reason) for n, reason in p.joins.items()]
    return Split(gm, original, prime, w.tokens, w.tokens_0, w.ordered, divided, joined)


def _erase_unused(graph: fx.Graph) -> None:
    for node in reversed(list(graph.nodes)):
        pure = node.op == "get_attr" or (node.op == "call_function" and not g.mutated_arguments(node))
        if pure and not node.users and not comm.is_start(node):
            graph.erase_node(node)
