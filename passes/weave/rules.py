"""Which dimension of a value counts tokens, operator by operator.

A value of a graph is either *whole* (None: the same for both halves of the tokens), or its rows along one
dimension belong to tokens (:class:`Rows`), or it is what a rank keeps of such rows (:class:`Shard`), or such
rows sorted by expert (:class:`~llm42c.passes.weave.experts.Sorted`). A rule
says, for one call, in which state it needs its arguments and in which state its result is then; it raises
:class:`UnsplittableError` where a row of the result would need other rows of an argument. Nothing is assumed
of an operator that has no rule.

Sizes are numbers here: the number of tokens stands as a prime (``sizes.py``), so a dimension counts tokens
exactly if the prime divides its size, whatever views it went through. That makes most rules one rule
(:func:`_rows_alike`): every operand has at most one such dimension, the result has one, and the dimensions
that the operator mixes are not among them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from llm42c.codegen.operator import Tokens
from llm42c.passes import graph as g
from llm42c.passes.traits import tokens_of
from llm42c.passes.weave.experts import Sorted, SortedRowsError, sorted_rule

SLACK = 1 << 20  # what sizes add to a multiple of the number of tokens


@dataclass(frozen=True)
class Rows:
    """Dimension ``dim`` has ``outer * T * inner`` entries for T tokens, in row-major order."""

    dim: int
    outer: int = 1
    inner: int = 1


@dataclass(frozen=True)
class Shard:
    """The rank's chunk of rows: ``ceil(T / group size)`` of them, the last ones possibly padding."""


State = Rows | Shard | Sorted | None
States = State | tuple[Any, ...]


class UnsplittableError(Exception):
    """The call mixes tokens in a way that no rule covers; the message says how."""


class Call:
    """One call under a rule: its tensors, their states, and what the rule asks for.

    ``needs`` is filled by the rule: the state in which each argument is to be given to the halves.
    """

    def __init__(
        self, node: fx.Node, tokens: int, states: dict[fx.Node, States], divisible: dict[fx.Node, Rows]
    ) -> None:
        self.node, self.tokens = node, tokens
        self._divisible = divisible
        self.name = g.called(node)
        self.tensors = [n for n in node.all_input_nodes if g.tensor(n) is not None]
        self.needs: dict[fx.Node, State] = {}
        self._states = states

    def state(self, node: Any) -> State:
        found = self._states.get(node) if isinstance(node, fx.Node) else None
        return found if isinstance(found, (Rows, Shard, Sorted)) else None

    def rows(self, node: Any) -> Rows | None:
        """Where the tokens of a value stand; a whole value, too, may have one row a token."""
        state = self.state(node)
        return state if isinstance(state, Rows) else self._divisible.get(node)

    def need(self, node: fx.Node, state: State) -> None:
        if self.needs.setdefault(node, state) != state:
            raise UnsplittableError("one value is read by rows and as a whole")

    def token_dims(self, t: Tensor) -> list[int]:
        return [d for d, size in enumerate(t.shape) if size and size % self.tokens == 0]

    def argument(self, index: int, keyword: str, default: Any = None) -> Any:
        args = self.node.args
        return args[index] if len(args) > index else self.node.kwargs.get(keyword, default)

    def counts_tokens(self) -> bool:
        """A number that depends on the number of tokens is among the arguments."""
        return any(counts(n, self.tokens) for n in self.node.all_input_nodes)


Rule = Callable[[Call], States]


def counts(node: fx.Node, tokens: int) -> bool:
    """The node is a number, or a tuple of numbers, that depends on the number of tokens."""
    v = g.value(node)
    if isinstance(v, Tensor) or (isinstance(v, (tuple, list)) and any(isinstance(x, Tensor) for x in v)):
        return False
    numbers = v if isinstance(v, (tuple, list)) else (v,)
    if any(isinstance(n, int) and n >= tokens and n % tokens < SLACK for n in numbers):
        return True
    return any(counts(n, tokens) for n in node.all_input_nodes)


def _rows_alike(call: Call, mixed: Iterable[tuple[Any, int]] = (), sizes: bool = False) -> States:
    """Every operand has its tokens in at most one dimension, and so has every result.

    ``mixed`` are the (argument, dimension) pairs over which the operator reduces or reorders. ``sizes``: the
    operator may take the number of tokens as a size.
    """
    if call.counts_tokens() and not sizes:
        raise UnsplittableError("computes with the number of tokens")
    for arg, dim in mixed:
        t = g.tensor(arg)
        if t is not None and dim % max(t.dim(), 1) in call.token_dims(t):
            raise UnsplittableError("mixes rows of different tokens")
    factors = _factors(call)
    return _results(call, g.value(call.node), factors)


def _factors(call: Call) -> tuple[int, int]:
    """(outer, inner), common to all operands; asks for the operands by rows."""
    found = set()
    for x in call.tensors:
        dims, rows = call.token_dims(g.fake(x)), call.rows(x)
        if isinstance(call.state(x), Shard):
            raise UnsplittableError("reads a rank's shard of the rows")
        if len(dims) > 1:
            raise UnsplittableError("a value has the tokens in two dimensions")
        if dims and rows is None:
            raise UnsplittableError("counts tokens in a multiple that is not known to be row-major")
        call.need(x, rows if dims else None)
        if rows is not None and dims:
            found.add((rows.outer, rows.inner))
    if len(found) > 1:
        raise UnsplittableError("operands order their rows differently")
    return next(iter(found), (1, 1))


def _results(call: Call, value: Any, factors: tuple[int, int]) -> States:
    if isinstance(value, (tuple, list)):
        return tuple(_results(call, v, factors) for v in value)
    if not isinstance(value, Tensor):
        return None
    dims = call.token_dims(value)
    if len(dims) != 1 or value.shape[dims[0]] != factors[0] * factors[1] * call.tokens:
        raise UnsplittableError("the result does not have one row a token")
    return Rows(dims[0], *factors)


def _pointwise(call: Call) -> States:
    """Operands broadcast against the result; the tokens stand in the same place from the right."""
    state = _rows_alike(call)
    out = g.value(call.node)
    if isinstance(out, Tensor) and isinstance(state, Rows):
        for x, need in call.needs.items():
            if isinstance(need, Rows) and g.fake(x).dim() - need.dim != out.dim() - state.dim:
                raise UnsplittableError("broadcasts rows against columns")
    return state


def _alike(call: Call) -> States:
    return _rows_alike(call)


def _sized(call: Call) -> States:
    return _rows_alike(call, sizes=True)


def _row_operator(call: Call) -> States:
    """Operators that work along the last dimension of their first operand."""
    return _rows_alike(call, [(call.node.args[0], -1)])


def _along_dim(call: Call) -> States:
    """Operators with an argument ``dim`` in second place, which keep the size of that dimension."""
    default = -1 if call.name in ("sort", "argsort") else None
    dim = call.argument(1, "dim", default)
    if not isinstance(dim, int) or isinstance(dim, bool):
        dim = call.argument(2, "dim", default)  # sort.stable(x, stable, dim)
    if not isinstance(dim, int):
        raise UnsplittableError("the dimension it works along is not known")
    return _rows_alike(call, [(call.tensors[0], dim)])


def _matmul(first: int) -> Rule:
    """Products of arguments ``first`` and ``first + 1``: a is [..., M, K], b is [..., K, N] or [K]."""

    def rule(call: Call) -> States:
        a, b = call.node.args[first], call.node.args[first + 1]
        return _rows_alike(call, [(a, -1), (b, -2 if g.fake(b).dim() > 1 else -1)])

    return rule


def _linear(call: Call) -> States:
    """x [..., K] and a weight [N, K]."""
    return _rows_alike(call, [(call.node.args[0], -1), (call.node.args[1], -1)])


def _cat(call: Call) -> States:
    dim = call.argument(1, "dim", 0)
    return _rows_alike(call, [(x, dim) for x in call.tensors])


def _embedding(call: Call) -> States:
    table, dims = call.node.args[0], call.token_dims(g.fake(call.node.args[0]))
    return _rows_alike(call, [(table, d) for d in dims])


def _index_select(call: Call) -> States:
    return _rows_alike(call, [(call.node.args[0], call.argument(1, "dim"))])


def _indexing(call: Call) -> States:
    """``x[i, ...]`` by tensors: no dimension of x that is indexed counts tokens."""
    indices = call.node.args[1]
    indices = indices if isinstance(indices, (tuple, list)) else (indices,)
    if any(i is Ellipsis for i in indices):
        raise UnsplittableError("indexes from the right")
    tensors = [d for d, i in enumerate(indices) if g.tensor(i) is not None]
    if len(tensors) > 1 or len(indices) != 1:
        raise UnsplittableError("indexes several dimensions at once")
    return _rows_alike(call, [(call.node.args[0], d) for d in tensors])


def _getitem(call: Call) -> States:
    source, index = call.node.args
    states = call._states.get(source)  # type: ignore[arg-type]
    if isinstance(states, tuple):
        if not isinstance(index, int):
            raise UnsplittableError("takes a slice of a tuple")
        return states[index]
    parts = index if isinstance(index, (tuple, list)) else (index,)
    if any(g.tensor(i) is not None for i in parts):
        return _indexing(call)
    return _view(call)


def _view(call: Call) -> States:
    """A view that keeps each row together: transpose, expand, a slice of another dimension, …"""
    source = call.tensors[0]
    state, out = call.state(source), g.value(call.node)
    if not isinstance(out, (tuple, list)):
        return _rows_alike(call, sizes=True)
    dims = call.token_dims(g.fake(source))
    if isinstance(state, Rows) and dims == [0] and state.dim == 0 and state.outer == len(out):
        call.need(source, state)  # the gathered ranks, each with all tokens
        return tuple(_results(call, v, (1, state.inner)) for v in out)
    return _rows_alike(call, sizes=True)


def _reshape(call: Call) -> States:
    """Row-major order stays: what stands in front of the tokens and behind them is counted."""
    source = call.tensors[0]
    before, after, state = g.fake(source), g.fake(call.node), call.rows(source)
    dims, out = call.token_dims(before), call.token_dims(after)
    if state is None or len(dims) != 1 or len(out) != 1 or len(call.tensors) != 1:
        raise UnsplittableError("the result does not have one row a token")
    call.need(source, state)
    front = math.prod(before.shape[: state.dim]) * state.outer
    back = math.prod(before.shape[state.dim + 1 :]) * state.inner
    outer, rest = divmod(front, math.prod(after.shape[: out[0]]))
    inner, rest_ = divmod(back, math.prod(after.shape[out[0] + 1 :]))
    if rest or rest_ or outer * inner * call.tokens != after.shape[out[0]]:
        raise UnsplittableError("merges rows of different tokens")
    return Rows(out[0], outer, inner)


def _as_strided(call: Call) -> States:
    """A view by strides of a fresh result, if every row of it lies inside one row of its source."""
    source = call.node.args[0]
    state, before, after = call.state(source), g.fake(source), g.fake(call.node)
    dims = call.token_dims(after)
    if not isinstance(state, Rows) or (state.outer, state.inner) != (1, 1) or len(dims) != 1:
        raise UnsplittableError("the result does not have one row a token")
    if not isinstance(source, fx.Node) or any(g.storage_of(n) == g.storage_of(source) for n in source.args):  # type: ignore[arg-type]
        raise UnsplittableError("takes strides of a view")
    row, offset = before.stride()[state.dim], int(call.argument(3, "storage_offset") or 0)
    others = [
        (n - 1) * s for d, (n, s) in enumerate(zip(after.shape, after.stride(), strict=True)) if d != dims[0]
    ]
    if (
        any(n != 1 for n in before.shape[: state.dim])
        or after.stride()[dims[0]] != row
        or sum(others) + offset >= row
    ):
        raise UnsplittableError("merges rows of different tokens")
    call.need(source, state)
    return Rows(dims[0])


def _gather_first(call: Call) -> States:
    """``all_gather_into_tensor``: the ranks' tensors one after another along dimension 0."""
    source, ranks = call.node.args[0], call.node.args[1]
    state, dims = call.rows(source), call.token_dims(g.fake(source))
    if state is None or len(dims) != 1 or not isinstance(ranks, int):
        raise UnsplittableError("the result does not have one row a token")
    call.need(source, state)  # type: ignore[arg-type]
    return Rows(0, ranks * state.outer, state.inner) if state.dim == 0 else state


def _shard_rows(call: Call) -> States:
    _row_operand(call, call.node.args[0])
    return Shard()


def _gather_rows(call: Call) -> States:
    shard, like = call.node.args[:2]
    if not isinstance(call.state(shard), Shard):
        raise UnsplittableError("gathers what is no shard of the rows")
    call.need(shard, Shard())  # type: ignore[arg-type]
    return _row_operand(call, like)


def _sharded_norm(call: Call) -> States:
    """(x by rows, residual as a shard) → (normed by rows, total as a shard)."""
    x, residual = call.node.args[:2]
    if not isinstance(call.state(residual), Shard):
        raise UnsplittableError("the residual is no shard of the rows")
    call.need(residual, Shard())  # type: ignore[arg-type]
    for weight in call.tensors:
        if weight not in (x, residual):
            call.need(weight, None)
    return _row_operand(call, x), Shard()


def _row_operand(call: Call, x: Any) -> Rows:
    dims, state = call.token_dims(g.fake(x)), call.rows(x)
    if state is None or len(dims) != 1 or dims[0] == g.fake(x).dim() - 1:
        raise UnsplittableError("the result does not have one row a token")
    call.need(x, state)
    return state


# Of calls that have a rule for themselves.
RULES: dict[str, Rule] = {
    "linear": _linear,
    "embedding": _embedding,
    "index": _indexing,
    "getitem": _getitem,
    "as_strided": _as_strided,
    "_c10d_functional::all_reduce": _pointwise,
    "_c10d_functional::wait_tensor": _pointwise,
    "_c10d_functional::all_gather_into_tensor": _gather_first,
    "llm42::shard_rows": _shard_rows,
    "llm42::gather_rows": _gather_rows,
    "llm42::all_reduce_add_rms_norm_sharded": _sharded_norm,
}
_BY_TRAIT: dict[Tokens, Rule] = {
    Tokens.POINTWISE: _pointwise,
    Tokens.ROWS: _row_operator,
    Tokens.REDUCED: _alike,
    Tokens.ALONG: _along_dim,
    Tokens.VIEW: _view,
    Tokens.PART: _view,
    Tokens.RESHAPE: _reshape,
    Tokens.SIZED: _sized,
    Tokens.JOINED: _cat,
    Tokens.PICKED: _index_select,
    Tokens.PRODUCT: _matmul(0),
    Tokens.ADDED_PRODUCT: _matmul(1),
}


def rule_of(name: str) -> Rule | None:
    """What is known of a function of torch, or of an operator of ours."""
    tokens = tokens_of(name)
    return RULES.get(name) or (_BY_TRAIT[tokens] if tokens else None)


def is_heavy(node: fx.Node) -> bool:
    """A product with a weight (sums over one element, as of positions and frequencies, are not meant)."""
    ours, tokens = g.ours(node), tokens_of(g.called(node))
    added = tokens is Tokens.ADDED_PRODUCT
    if not added and tokens is not Tokens.PRODUCT and (ours is None or ours.product is None):
        return False
    first = node.args[1 if added else 0]
    return g.tensor(first) is not None and int(g.fake(first).shape[-1]) > 1


def divisible(node: fx.Node, tokens: int, known: dict[fx.Node, Rows]) -> Rows | None:
    """Where a whole value has one row a token, so that it can be cut where a half is needed."""
    t = g.tensor(node)
    dims = [d for d, size in enumerate(t.shape) if size and size % tokens == 0] if t is not None else []
    if t is None or len(dims) != 1:
        return None
    if t.shape[dims[0]] == tokens:
        return Rows(dims[0])
    if tokens_of(g.called(node)) is not Tokens.RESHAPE:
        return None
    try:
        state = _reshape(Call(node, tokens, {}, known))
    except UnsplittableError:
        return None
    return state if isinstance(state, Rows) else None


def _is_own(call: Call, written: fx.Node) -> bool:
    """A value of each half's own, that only the call, and what it reads, see: writing is computing anew."""
    sources = {g.storage_of(n) for n in written.all_input_nodes}
    others = [u for u in written.users if u is not call.node]
    first = all(u in call.node.all_input_nodes and g.storage_of(u) != g.storage_of(written) for u in others)
    return first and call.state(written) is not None and g.storage_of(written) not in sources


def _sorted(call: Call) -> States:
    """What a sort of rows gives, and what is computed from that."""
    node, first = call.node, call.node.args[0] if call.node.args else None
    if call.name == "sort":
        rows = call.rows(first)
        if rows is None or rows.outer != 1 or g.fake(first).dim() != 1:
            raise UnsplittableError("mixes rows of different tokens")
        call.need(first, rows)  # type: ignore[arg-type]
        return Sorted(node, "keys", rows.inner), Sorted(node, "index", rows.inner)
    for x in call.tensors:
        if not isinstance(call.state(x), Sorted):
            if call.token_dims(g.fake(x)) and x is not first:
                raise UnsplittableError("reads sorted rows beside rows in order")
            call.need(x, call.rows(x))
    try:
        found = sorted_rule(call.name, node, {x: call.state(x) for x in call.tensors}, call.rows)
    except SortedRowsError as reason:
        raise UnsplittableError(str(reason)) from None
    return Rows(0, 1, found) if isinstance(found, int) else found


def _is_sorted(call: Call) -> bool:
    if any(isinstance(call.state(x), Sorted) for x in call.tensors):
        return True
    return call.name == "sort" and call.token_dims(g.fake(call.node.args[0])) == [0]


def apply_rule(call: Call) -> States:
    """The state of the call's result; raises UnsplittableError."""
    if not all(_is_own(call, written) for written in g.mutated_arguments(call.node)):
        raise UnsplittableError(f"{call.name} writes to its argument")
    rule = _sorted if _is_sorted(call) else rule_of(call.name)
    if rule is None:
        raise UnsplittableError(f"no rule for {call.name}")
    try:
        return rule(call)
    except UnsplittableError as reason:
        raise UnsplittableError(f"{call.name}: {reason}") from None
