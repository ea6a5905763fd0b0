"""Mixtures of experts that sort their rows: which rows belong to which half when their order is lost.

A router gives each token K experts. To multiply the rows of one expert together, T·K (token, expert) pairs
are sorted by expert, multiplied in groups, and put back into order. Sorting mixes the tokens, but each sorted
row is still computed from its own token, expert and nothing else: so each half may sort its own pairs.

Cases (S = T·K pairs; by: the sort; all of one half)::

    keys, index = sort(experts)                  # experts: [S] → SORTED keys, and where each came from
    x[index // K], weights[index]                # rows of tokens, of pairs → SORTED rows
    offsets = cumsum(histc(keys, E))             # → where each expert's rows end
    grouped_mm(rows, W, offsets)                 # W: [E, K, N]; SORTED rows → SORTED rows
    grouped_linear(rows, W, bias, keys)          # likewise
    inverse = index_put(_, [index], arange(S))   # the permutation that undoes the sort
    rows[inverse]                                # SORTED rows → one row a pair, in order

Between them stand calls that work on each row. Anything else that is done with what a sort gives is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from llm42c.codegen.operator import Tokens
from llm42c.passes import graph as g
from llm42c.passes.traits import tokens_of, traits_of

What = Literal["keys", "index", "tokens", "rows", "counts", "offsets", "empty", "inverse"]


@dataclass(frozen=True)
class Sorted:
    """Comes of the sort ``by`` of ``inner`` rows a token; ``groups``: how many experts were counted."""

    by: fx.Node
    what: What
    inner: int
    groups: int = 0


_GROUPED = frozenset({"_grouped_mm", "grouped_mm", "transformers::grouped_mm_fallback"})
_PUT = frozenset({"index_put", "_unsafe_index_put"})


def inverse_of(index: Tensor) -> Tensor:
    """index: [S], a permutation → the permutation that undoes it."""
    return torch.empty_like(index).scatter_(0, index, torch.arange(index.shape[0], device=index.device))


class SortedRowsError(Exception):
    """The message says what is done with sorted rows that is not known to keep them apart."""


def sorted_rule(name: str, node: fx.Node, states: dict[fx.Node, Any], rows: Callable[[Any], Any]) -> Any:
    """The state of a call one of whose tensors has a :class:`Sorted` state in ``states``.

    ``rows(x)`` says where the rows of a value in order are (``token_rules.Rows``), or None. Returns a Sorted,
    a tuple of them, or a number: of a result in order, how many rows a token has. Raises SortedRowsError.
    """
    source = node.args[0] if node.args else None
    first = states.get(source) if isinstance(source, fx.Node) else None
    if name in ("index", "getitem") and (index := _index(node)) is not None:
        return _indexed(node.args[0], first, states.get(index), rows)
    if isinstance(first, Sorted) and first.what == "index" and _divides(name, node, first.inner):
        return Sorted(first.by, "tokens", first.inner)
    if isinstance(first, Sorted) and first.what == "index" and name in ("empty_like", "zeros_like"):
        return Sorted(first.by, "empty", first.inner)  # to be overwritten with the inverse
    if name == "histc" and isinstance(first, Sorted) and first.what == "keys":
        return _counted(node, first)
    if name == "cumsum" and isinstance(first, Sorted) and first.what == "counts":
        return Sorted(first.by, "offsets", first.inner, first.groups)
    if name in _GROUPED:
        return _multiplied(node, states)
    if name == "llm42::grouped_linear":
        keys: Any = states.get(node.args[3])  # type: ignore[arg-type]
        if isinstance(first, Sorted) and first.what == "rows" and _are(keys, "keys") and first.by is keys.by:
            return first
    if traits_of(name).same and isinstance(first, Sorted):
        return first
    return _each_row(name, node, states)


def _divides(name: str, node: fx.Node, number: int) -> bool:
    """``x // number``"""
    floor = name in ("floor_divide", "floordiv") or node.kwargs.get("rounding_mode") == "floor"
    return floor and name in ("floor_divide", "floordiv", "div") and bool(node.args[1] == number)


def _are(state: Any, what: What) -> bool:
    return isinstance(state, Sorted) and state.what == what


def _index(node: fx.Node) -> fx.Node | None:
    """The one tensor by which ``x[i]`` indexes the first dimension."""
    index = node.args[1]
    parts: list[Any] = list(index) if isinstance(index, (tuple, list)) else [index]
    return parts[0] if len(parts) == 1 and g.tensor(parts[0]) is not None else None


def _indexed(x: Any, of: Any, index: Any, rows: Callable[[Any], Any]) -> Any:
    """``x[index]``."""
    given = rows(x)
    a_token = (given.outer, given.inner) if given is not None and given.dim == 0 else None
    if not isinstance(index, Sorted):
        raise SortedRowsError("sorted rows are picked by something else than the inverse of their sort")
    if index.what == "inverse" and _are(of, "rows") and of.by is index.by:
        return index.inner
    if of is None or not isinstance(of, Sorted):
        if index.what == "index" and a_token == (1, index.inner):
            return Sorted(index.by, "rows", index.inner)
        if index.what == "tokens" and a_token == (1, 1):
            return Sorted(index.by, "rows", index.inner)
        if index.what == "keys" and given is None:  # a row of an expert
            return Sorted(index.by, "rows", index.inner)
    raise SortedRowsError("picks rows by what a sort gives, in another way than to sort or restore them")


def _counted(node: fx.Node, keys: Sorted) -> Sorted:
    """``histc(keys, E, 0, E - 1)``: how many rows each expert has."""
    names = ("input", "bins", "min", "max")
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    bins = given.get("bins")
    if not isinstance(bins, int) or given.get("min") != 0 or given.get("max") != bins - 1:
        raise SortedRowsError("histc: does not count experts")
    return Sorted(keys.by, "counts", keys.inner, bins)


def _multiplied(node: fx.Node, states: dict[fx.Node, Any]) -> Sorted:
    """Each row with the matrix of its own expert."""
    x, weight = node.args[:2]
    offsets = node.args[2] if len(node.args) > 2 else node.kwargs.get("offs")
    rows: Any = states.get(x)  # type: ignore[arg-type]
    ends: Any = states.get(offsets)  # type: ignore[arg-type]
    theirs = _are(rows, "rows") and _are(ends, "offsets") and states.get(weight) is None  # type: ignore[arg-type]
    if not theirs or rows.by is not ends.by or g.fake(weight).shape[0] != ends.groups:
        raise SortedRowsError("grouped_mm: its groups are not those of its rows")
    return Sorted(rows.by, "rows", rows.inner)


def _each_row(name: str, node: fx.Node, states: dict[fx.Node, Any]) -> Any:
    """Calls on rows ``[S, ...]`` that keep the first dimension."""
    tensors = [n for n in node.all_input_nodes if g.tensor(n) is not None]
    of = [states[n] for n in tensors if isinstance(states.get(n), Sorted)]
    if len({s.by for s in of}) != 1 or any(s.what not in ("rows", "keys") for s in of):
        raise SortedRowsError("computes with the order of sorted rows")
    if any(states.get(n) is not None and not isinstance(states[n], Sorted) for n in tensors):
        raise SortedRowsError("reads sorted rows beside rows in order")
    size = g.fake(next(n for n in tensors if isinstance(states.get(n), Sorted))).shape[0]
    values = g.value(node)
    outs = [v for v in (values if isinstance(values, (tuple, list)) else (values,)) if isinstance(v, Tensor)]
    whole = [g.fake(n) for n in tensors if not isinstance(states.get(n), Sorted)]
    sorted_dims = {g.fake(n).dim() for n in tensors if isinstance(states.get(n), Sorted)}
    kept, tokens = all(v.dim() and v.shape[0] == size for v in outs), tokens_of(name)
    if name == "getitem" or tokens in (Tokens.PART, Tokens.RESHAPE):
        kept = kept and len(tensors) == 1
    elif tokens is Tokens.POINTWISE or (tokens is Tokens.ROWS and min(sorted_dims) > 1):
        # Aligned from the right: rows stay in front, and nothing else reaches as far.
        kept = kept and sorted_dims == {outs[0].dim()} and all(w.dim() < outs[0].dim() for w in whole)
    else:
        raise SortedRowsError("no rule for sorted rows")
    if not kept:
        raise SortedRowsError("sorted rows do not stay one row each")
    state = Sorted(of[0].by, "rows", of[0].inner)
    return (state,) * len(values) if isinstance(values, (tuple, list)) else state


def is_inverse(name: str, node: fx.Node, states: dict[fx.Node, Any]) -> fx.Node | None:
    """The permutation that ``index_put(_, [index], arange(S))`` inverts, or None."""
    if name not in _PUT or len(node.args) < 3:
        return None
    parts, put = node.args[1], node.args[2]
    index = parts[0] if isinstance(parts, (tuple, list)) and len(parts) == 1 else parts
    if not isinstance(index, fx.Node) or not _are(states.get(index), "index") or not isinstance(put, fx.Node):
        return None
    same = g.fake(put).shape == g.fake(index).shape == g.fake(node).shape
    return index if same and _counts_up(put) else None


def _counts_up(node: fx.Node) -> bool:
    """``arange`` from 0 in steps of 1."""
    if "arange" not in str(node.target):
        return False
    start, step = (node.args[0] if len(node.args) > 1 else 0), (node.args[2] if len(node.args) > 2 else 1)
    return (start, step) == (0, 1)
