"""Whether a row of a packed graph's logits can depend on the batch around it, by construction.

It cannot if every call has a fixed order and gives each row from that row alone. Cases:

1. an llm42 operator with an order on the target, an exact call, or a movement of data, under the rule that
   says how it divides over tokens (``weave/rules.py``): a row of the result reads one row of each operand
2. paged attention: it reads the row's own sequence, in an order that its position decides
3. the choice of the rows whose logits are wanted: each is one row, wherever it stood
4. what touches neither tokens nor their number is the same for every batch

Anything else is named: a call of no fixed order, one that mixes tokens or counts them, one that reads the
batch's own tables, one for which there is no rule. The graph is not changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx

from llm42c.passes import graph as g
from llm42c.passes.kinds import Kind, kind
from llm42c.passes.sizes import SYMBOLS
from llm42c.passes.weave.rules import Call, Rows, States, UnsplittableError, apply_rule, counts

_FIXED = frozenset({Kind.OPERATOR, Kind.EXACT, Kind.EXACT_REDUCTION, Kind.VIEW, Kind.MOVE, Kind.SIZE})
_ATTENTION = "llm42::paged_attention"
_TABLES = ("k_cache.", "v_cache.", "slot_mapping", "cu_seqlens_q", "kv_lens", "block_table")


def dependence(gm: fx.GraphModule, inputs: list[str], target: str) -> str | None:
    """Why a row might depend on its batch; None if it cannot. ``inputs``: what each placeholder is."""
    names = dict(zip((n for n in gm.graph.nodes if n.op == "placeholder"), inputs, strict=True))
    primes = {names[n]: g.value(n) for n in names if names[n].startswith("sym:")}
    if SYMBOLS not in gm.meta or set(primes) != {"sym:T", "sym:R"}:
        return "its sizes cannot be followed"
    found = _Rows(primes["sym:T"], primes["sym:R"], names, target)
    for node in gm.graph.nodes:
        if node.op not in ("placeholder", "get_attr", "output"):
            try:
                found.visit(node)
            except UnsplittableError as reason:
                place = g.where(node)
                return f"{g.called(node)}{f' ({place})' if place else ''}: {reason}"
    return None


class _Rows:
    """Which dimension of each value counts tokens (T), or rows whose logits are wanted (R)."""

    def __init__(self, tokens: int, wanted: int, names: Mapping[fx.Node, str], target: str) -> None:
        self._sizes = (tokens, wanted)
        self._names, self._target = names, target
        self._states: tuple[dict[fx.Node, States], dict[fx.Node, States]] = ({}, {})
        for node, name in names.items():
            t = g.tensor(node)
            if t is not None and name in ("input_ids", "positions"):
                self._states[0][node] = Rows(t.dim() - 1)

    def visit(self, node: fx.Node) -> None:
        """Find the state of a call's result. Raises UnsplittableError."""
        self._require_order(node)
        name = g.called(node)
        if name == _ATTENTION:
            self._states[0][node] = self._attention(node)
            return
        tables = [self._names[n] for n in node.all_input_nodes if n in self._names]
        if any(t.startswith(_TABLES) for t in tables):
            raise UnsplittableError("reads the batch's own tables")
        by_size = [[n for n in node.all_input_nodes if self._has(n, i)] for i in (0, 1)]
        if "logits_indices" in tables:
            self._states[1][node] = self._choice(node, name)
        elif by_size[0] and by_size[1]:
            raise UnsplittableError("reads rows of two kinds")
        elif name == "embedding":
            self._states[0][node] = self._looked_up(node)
        elif by_size[0] or by_size[1]:
            i = 0 if by_size[0] else 1
            self._states[i][node] = apply_rule(Call(node, self._sizes[i], self._states[i], {}))
        elif not isinstance(g.value(node), (int, float, bool)):
            self._whole(node)

    def _require_order(self, node: fx.Node) -> None:
        k = Kind.UNKNOWN if node.op == "call_module" else kind(node)
        ours = g.ours(node)
        if k not in _FIXED or (k is Kind.OPERATOR and (ours is None or self._target not in ours.orders)):
            raise UnsplittableError(f"no order of it is known ({k.value})")

    def _has(self, node: fx.Node, i: int) -> bool:
        """A tensor with rows of that kind."""
        return self._states[i].get(node) is not None

    def _state(self, x: Any) -> States:
        return self._states[0].get(x) if isinstance(x, fx.Node) else None

    def _attention(self, node: fx.Node) -> Rows:
        if any(self._state(x) != Rows(0) for x in node.args[:3]):
            raise UnsplittableError("its queries, keys or values are not one row a token")
        return Rows(0)

    def _looked_up(self, node: fx.Node) -> Rows:
        """A row of a table for each of the ids; functions and ATen name the two in another order."""
        ids = [n for n in node.all_input_nodes if self._has(n, 0)]
        state = self._state(ids[0]) if len(ids) == 1 else None
        if not isinstance(state, Rows) or g.fake(ids[0]).is_floating_point():
            raise UnsplittableError("it is not looked up by rows of tokens")
        return state

    def _choice(self, node: fx.Node, name: str) -> Rows:
        """``x[:, wanted]`` and ``index_select``: rows of x, moved and nothing else."""
        state, parts = self._state(node.args[0]), g.arg(node, 1)
        if name == "index_select":
            parts = (slice(None),) * int(parts) + (node.args[2],)
        elif name not in ("getitem", "index"):
            raise UnsplittableError("reads which rows are wanted")
        parts = list(parts) if isinstance(parts, (tuple, list)) else [parts]
        at = [i for i, p in enumerate(parts) if p not in (slice(None), None)]
        if not isinstance(state, Rows) or at != [state.dim] or (state.outer, state.inner) != (1, 1):
            raise UnsplittableError("what is chosen is not one row a token")
        if self._names.get(parts[at[0]]) != "logits_indices":
            raise UnsplittableError("computes with which rows are wanted")
        return Rows(state.dim)

    def _whole(self, node: fx.Node) -> None:
        """A value that is made of no row must not count them."""
        values: Any = g.value(node)
        values = values if isinstance(values, (tuple, list)) else (values,)
        sizes = [n for v in values if isinstance(v, Tensor) for n in v.shape]
        counted = any(counts(n, size) for n in node.all_input_nodes for size in self._sizes)
        if counted or any(n and n % size == 0 for n in sizes for size in self._sizes):
            raise UnsplittableError("counts the tokens of the batch")
