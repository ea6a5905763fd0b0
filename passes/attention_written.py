"""Attention that a model writes out itself becomes ``llm42::paged_attention`` (when a model is captured).

Models that do not go through Hugging Face's attention interface compute scores of all T tokens with each
other, for one sequence. The mask is not recognised by how it is spelled: it is evaluated for as many tokens
as the model has positions, and must then be exactly the causal one, or that of a sliding window.

Cases (q: [1, H, T, D], k: [1, Hkv, T, D], v: [1, Hkv, T, E], or without the leading 1):

1. ``softmax(q @ k.T) @ v`` with, in any order between product and softmax: factors and divisors (numbers
   or constants), casts, views, masks that are added or subtracted, ``where`` and ``masked_fill`` with a mask,
   a product with a mask of ones and zeros, a lower limit
2. ``baddbmm(bias, q, k.T, beta, alpha)`` as the product
3. ``F.scaled_dot_product_attention`` with such a mask, or ``is_causal``
4. linear biases (ALiBi): an addition that is ``slope[h] * (j - i)`` up to a constant a row. Keys get eight
   more elements, which hold their position, and the queries the slopes: the scores are ordinary products.
   In bf16 and fp16 positions are written as ``256 a + b`` and slopes as a sum of three numbers, so that
   neither is rounded.

What is not provably one of these is a reason to refuse the model, which is raised.

Before and after::

    s = q @ k.transpose(-1, -2) / sqrt(D)             # [1, H, T, T]
    p = softmax(where(tril[:T, :T], s, -inf), -1)  →  y = llm42.paged_attention(q [T, H, D], k, v, k_cache,
    y = p @ v                                                 v_cache, …, 1 / sqrt(D), 0, 0.0, None)
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from llm42c.passes import graph as g
from llm42c.passes.attention_sdpa import unrepeated
from llm42c.passes.base import PassReport
from llm42c.passes.head_dims import common_head_dim
from llm42c.passes.token_functions import TokenFunctions

PROVEN = 8192  # positions up to which a mask is evaluated
HIDDEN = -9984.0  # a mask adds at most this: -1e4, as bf16 rounds it
_MAX_ELEMENTS = 1 << 28
_SLOPE_PARTS, _POSITION_BASE = 3, 256
_EXTRA = 8  # elements of a key that hold its position


class NotProvenError(Exception):
    """Why the attention of a model cannot be replaced, in words that follow "its attention"."""


@dataclass(frozen=True)
class PackedBatch:
    """Placeholders of the batch, in the order of the operator's arguments."""

    positions: fx.Node
    k_cache: list[fx.Node]
    v_cache: list[fx.Node]
    metadata: tuple[fx.Node, ...]  # slot_mapping, cu_seqlens_q, kv_lens, block_table


@dataclass
class _Call:
    """One attention: the product's operands, and what happens to the scores."""

    out: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node
    scale: float
    causal: bool = False
    # (addition, factor) and (condition, hidden where it is true)
    added: list[tuple[Any, float]] = field(default_factory=list)
    masks: list[tuple[fx.Node, bool]] = field(default_factory=list)
    kept: list[fx.Node] = field(default_factory=list)  # factors, which must be one where nothing is hidden


def attention_written(
    graph: fx.Graph, values: TokenFunctions, batch: PackedBatch, limit: int, report: PassReport
) -> None:
    """Replace every such attention; the n-th in graph order uses the n-th cache. Raises NotProvenError.

    With fewer caches than attentions they are shared. ``limit``: the number of positions that the model has.
    """
    found = 0
    proven: dict[Any, tuple[int, Tensor | None]] = {}
    for node in list(graph.nodes):
        call = _sdpa(node, values) if g.name(node) == "sdpa" else _softmax(node, values)
        if call is None:
            continue
        key = (call.causal, *call.added, *call.masks, *call.kept)
        if key not in proven:
            proven[key] = _prove(call, values, limit)
        report.match(node)
        _rewrite(call, batch, found % len(batch.k_cache), limit, *proven[key])
        values._closed.clear()
        found += 1


def _softmax(node: fx.Node, values: TokenFunctions) -> _Call | None:
    """Cases 1 and 2; None for what is no softmax over the tokens."""
    if g.name(node) != "softmax":
        return None
    t = g.fake(node)
    square = t.dim() >= 3 and all(g.same(s, values.tokens) for s in t.shape[-2:])
    if not square or not g.last_dim(t, g.bind(node)["dim"]):
        return None
    out, v = _product_with_values(node)
    call = _Call(out, node, node, v, 1.0)
    _walk(node.args[0], 1.0, call, values)
    return call


def _product_with_values(softmax: fx.Node) -> tuple[fx.Node, fx.Node]:
    last, node = softmax, g.only_user(softmax)
    while node is not None and g.name(node) in ("to", "view", "reshape"):
        last, node = node, g.only_user(node)
    if node is None or g.name(node) not in ("matmul", "bmm") or node.args[0] is not last:
        raise NotProvenError("does something else with its probabilities than to weigh values")
    return node, node.args[1]  # type: ignore[return-value]


def _walk(node: Any, outer: float, call: _Call, values: TokenFunctions) -> None:
    """From the argument of the softmax down to the product; fills in ``call``."""
    name = g.called(node)
    args: Any = getattr(node, "args", ())
    if name in ("matmul", "bmm"):
        call.q, call.k, call.scale = args[0], args[1], outer
    elif name == "baddbmm":
        options = dict(zip(("input", "batch1", "batch2"), args, strict=False)) | node.kwargs
        beta, alpha = (float(options.get(k, 1)) for k in ("beta", "alpha"))
        if beta != 0 and not values.closed(options["input"]):
            raise NotProvenError("adds something to its scores that depends on the tokens")
        if beta != 0:
            call.added.append((options["input"], outer * beta))
        call.q, call.k, call.scale = options["batch1"], options["batch2"], outer * alpha
    elif name in ("to", "view", "reshape", "contiguous"):
        _walk(args[0], outer, call, values)
    elif name in ("mul", "div") and (number := _constant(args[1], values)) is not None:
        _walk(args[0], outer * number if name == "mul" else outer / number, call, values)
    elif name == "mul" and (number := _constant(args[0], values)) is not None:
        _walk(args[1], outer * number, call, values)
    elif name == "mul" and values.closed(args[1]):
        call.kept.append(args[1])
        _walk(args[0], outer, call, values)
    elif name == "add" and len(args) == 2 and not node.kwargs:
        inner, term = args if values.closed(args[1]) else args[::-1]
        if not values.closed(term):
            raise NotProvenError("adds something to its scores that depends on the tokens")
        call.added.append((term, outer))
        _walk(inner, outer, call, values)
    elif name == "sub" and len(args) == 2 and not node.kwargs and values.closed(args[1]):
        call.added.append((args[1], -outer))
        _walk(args[0], outer, call, values)
    elif name == "where" and values.closed(args[0]) and _is_hidden(args[2], values):
        call.masks.append((args[0], False))
        _walk(args[1], outer, call, values)
    elif name == "masked_fill" and values.closed(args[1]) and _is_hidden(args[2], values):
        call.masks.append((args[1], True))
        _walk(args[0], outer, call, values)
    elif name in ("maximum", "max", "clamp") and len(args) == 2 and _is_hidden(args[1], values):
        _walk(args[0], outer, call, values)
    else:
        raise NotProvenError(f"changes its scores by {name or node}, which llm42 does not know")


def _constant(node: Any, values: TokenFunctions) -> float | None:
    """The number that ``node`` is or holds, whatever the number of tokens."""
    number = g.number(node)
    if number is not None:
        return number
    t = g.tensor(node)
    if t is None or not values.closed(node) or any(not g.same(s, 1) for s in t.shape):
        return None
    found = [values.evaluate(node, tokens) for tokens in (3, 48)]
    return float(found[0]) if torch.equal(*found) else None


def _is_hidden(node: Any, values: TokenFunctions) -> bool:
    number = _constant(node, values)
    return number is not None and number <= HIDDEN


def _sdpa(node: fx.Node, values: TokenFunctions) -> _Call:
    """Case 3."""
    bound = g.bind(node)
    if g.number(bound["dropout_p"]) != 0.0:
        raise NotProvenError("drops some of its probabilities")
    q, mask, scale = bound["query"], bound["attn_mask"], g.number(bound["scale"])
    call = _Call(node, q, bound["key"], bound["value"], scale or int(g.fake(q).shape[-1]) ** -0.5)
    transposed = g.insert(node, g.FUNCTIONS["transpose"], (call.k, -1, -2))
    call.k, call.causal = transposed, bound["is_causal"] is True
    if mask is not None:
        if not values.closed(mask):
            raise NotProvenError("has a mask that depends on the tokens")
        if g.fake(mask).dtype is torch.bool:
            call.masks.append((mask, False))
        else:
            call.added.append((mask, 1.0))
    return call


# What the masks and additions are.


def _prove(call: _Call, values: TokenFunctions, limit: int) -> tuple[int, Tensor | None]:
    """(window, slopes [H] or None) of a call. Raises NotProvenError."""
    tokens = min(limit, PROVEN)
    row, column = torch.arange(tokens)[:, None], torch.arange(tokens)
    hidden = (column > row) if call.causal else torch.zeros(tokens, tokens, dtype=torch.bool)
    slopes = None
    for condition, hides in call.masks:
        mask = _evaluate(condition, values, tokens).bool()
        hidden = hidden | _one_mask(mask if hides else ~mask, tokens)
    for term, factor in call.added:
        addition = _evaluate(term, values, tokens)
        if addition.shape[-2:] == (tokens, tokens):
            below = addition * factor <= HIDDEN
            hidden = hidden | _one_mask(below, tokens)
            addition = addition.masked_fill(below, 0.0)
        if addition.count_nonzero():
            if slopes is not None:
                raise NotProvenError("adds more than one bias to its scores")
            slopes = _slopes(addition.float() * factor, hidden)
    for node in call.kept:
        mask = _evaluate(node, values, tokens)
        if not ((mask == 1) | ((mask == 0) & hidden)).all():
            raise NotProvenError("multiplies its scores by something else than a mask of ones and zeros")
    visible = int((~hidden[-1]).sum())
    window = 0 if visible == tokens else visible
    expected = column > row
    if window:
        expected = expected | (column <= row - window)
    if not torch.equal(hidden, expected):
        raise NotProvenError("has a mask that is neither causal nor a sliding window")
    if limit > PROVEN and not window and not call.causal:
        raise NotProvenError(
            f"has a mask of its own, which is evaluated for at most {PROVEN} positions; the model has {limit}"
        )
    return window, slopes


def _evaluate(node: Any, values: TokenFunctions, tokens: int) -> Tensor:
    """[..., T or 1, T] of a mask or an addition."""
    shape = g.fake(node).shape
    size = torch.tensor([tokens if g.same(s, values.tokens) else int(s) for s in shape]).prod()
    if size > _MAX_ELEMENTS:
        raise NotProvenError(f"has a mask of {int(size)} elements, too many to evaluate")
    found: Tensor = values.evaluate(node, tokens)
    return found


def _one_mask(hidden: Tensor, tokens: int) -> Tensor:
    """[T, T] of a mask that is the same for all heads."""
    each = hidden.expand(*hidden.shape[:-2], tokens, tokens).reshape(-1, tokens, tokens)
    if not all(torch.equal(other, each[0]) for other in each[1:]):
        raise NotProvenError("has another mask for each head")
    return each[0]


def _slopes(bias: Tensor, hidden: Tensor) -> Tensor:
    """[H] of a bias [..., H, T or 1, T] that is linear in the position of the key (case 4)."""
    tokens = bias.shape[-1]
    each = bias.reshape(-1, bias.shape[-2], tokens).double()  # [H, T or 1, T]
    last = each[:, -1]
    slopes = (last[:, -1] - last[:, 0]) / (tokens - 1)
    line = slopes[:, None, None] * torch.arange(tokens, dtype=torch.float64)
    rest = each - line
    rest = rest - rest[..., :1]
    if rest.shape[-2] == tokens:
        rest = rest.masked_fill(hidden, 0.0)
    # Additions of bf16 and fp16 are rounded; each is right to a part in 2^8.
    bound = each.abs().amax((-1, -2), keepdim=True) * 2.0**-7
    if not (rest.abs() <= bound).all():
        raise NotProvenError("adds a bias to its scores that is not linear in the position of the key")
    return slopes.float()


# The operator in their place.


def _rewrite(
    call: _Call, batch: PackedBatch, place: int, limit: int, window: int, slopes: Tensor | None
) -> None:
    out = call.out
    wanted = int(g.fake(out).shape[-1])
    k4 = g.insert(out, g.FUNCTIONS["transpose"], (call.k, -1, -2))
    k4, v4 = _keys_and_values(k4, call.v)
    dtype = g.fake(v4).dtype
    q, k, v = (_rows(out, x, dtype) for x in (call.q, k4, v4))
    head_dim = common_head_dim(q, k, v)
    extra = _EXTRA if slopes is not None else 0
    q, k = (_filled(out, x, head_dim) for x in (q, k))
    v = _filled(out, v, head_dim + extra)
    if slopes is not None:
        q, k = _with_bias(out, q, k, slopes / call.scale, batch.positions, limit)
    options = (call.scale, window, 0.0, None)
    args = (q, k, v, batch.k_cache[place], batch.v_cache[place], *batch.metadata, *options)
    y = g.insert(out, torch.ops.llm42.paged_attention.default, args, like=out)
    if int(g.fake(y).shape[-1]) != wanted:
        y = g.insert(out, g.FUNCTIONS["narrow"], (y, 2, 0, wanted))
    y = g.insert(out, g.FUNCTIONS["transpose"], (y, 0, 1))  # [H, T, E]
    if g.fake(out).dim() == 4:
        y = g.insert(out, g.FUNCTIONS["unsqueeze"], (y, 0))
    if g.fake(y).dtype != g.fake(out).dtype:
        y = g.insert(out, "to", (y, g.fake(out).dtype))
    g.replace(out, y)


def _keys_and_values(k: fx.Node, v: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Without repetition for query heads, where both are repeated alike."""
    k_one, v_one = unrepeated(k), unrepeated(v)
    alike = g.same(g.fake(k_one).shape[-3], g.fake(v_one).shape[-3])
    return (k_one, v_one) if alike else (k, v)


def _rows(before: fx.Node, x: fx.Node, dtype: torch.dtype) -> fx.Node:
    """[1, H, T, D] or [H, T, D] → [T, H, D] of ``dtype``; a cast of what had this dtype is taken back."""
    while g.name(x) == "to" and g.fake(x.args[0]).dtype is dtype:
        x = x.args[0]  # type: ignore[assignment]
    if g.fake(x).dtype is not dtype:
        x = g.insert(before, "to", (x, dtype))
    if g.fake(x).dim() == 4:
        x = g.insert(before, g.FUNCTIONS["select"], (x, 0, 0))
    return g.insert(before, g.FUNCTIONS["transpose"], (x, 0, 1))


def _filled(before: fx.Node, x: fx.Node, head_dim: int) -> fx.Node:
    """x [T, H, D] with zeros behind, [T, H, head_dim]. (``F.pad`` would guard on the number of tokens.)"""
    missing = head_dim - int(g.fake(x).shape[-1])
    if not missing:
        return x
    one = g.insert(before, g.FUNCTIONS["narrow"], (x, 2, 0, 1))
    zero = g.insert(before, torch.zeros_like, (one,))
    zeros = g.insert(before, "expand", (zero, -1, -1, missing))
    return g.insert(before, g.FUNCTIONS["cat"], ([x, zeros], 2))


def _with_bias(
    before: fx.Node, q: fx.Node, k: fx.Node, slopes: Tensor, positions: fx.Node, limit: int
) -> tuple[fx.Node, fx.Node]:
    """q [T, H, D], k [T, Hkv, D] → [..., D + 8]: their products gain ``slopes[h] * position`` (case 4)."""
    heads, kv_heads = int(g.fake(q).shape[1]), int(g.fake(k).shape[1])
    dtype = g.fake(q).dtype
    parts, rest = [], slopes.double().expand(heads)
    for _ in range(_SLOPE_PARTS):
        parts.append(rest.to(dtype))
        rest = rest - parts[-1].double()
    zero = torch.zeros_like(parts[0])
    columns = [part for part in parts for _ in range(2)]
    columns += [zero] * (_EXTRA - len(columns))
    slope = _constant_node(before, torch.stack(columns, -1)[None].contiguous())  # [1, H, 8]
    some = g.insert(before, g.FUNCTIONS["narrow"], (q, 2, 0, _EXTRA))
    query = g.insert(before, "expand_as", (slope, some))  # [T, H, 8]
    place = torch.arange(limit)
    low = place % _POSITION_BASE
    pairs = torch.stack([place - low, low] * (_EXTRA // 2), -1).to(dtype)  # [limit, 8]
    table = _constant_node(before, pairs)
    index = g.insert(before, g.FUNCTIONS["reshape"], (positions, (-1,)))
    key = g.insert(before, g.FUNCTIONS["index_select"], (table, 0, index))
    key = g.insert(before, g.FUNCTIONS["unsqueeze"], (key, 1))
    key = g.insert(before, "expand", (key, -1, kv_heads, -1))
    cat = g.FUNCTIONS["cat"]
    return g.insert(before, cat, ([q, query], 2)), g.insert(before, cat, ([k, key], 2))


def _constant_node(before: fx.Node, value: Tensor) -> fx.Node:
    """A buffer of the graph's module that holds ``value``, named after it."""
    module: Any = before.graph.owning_module
    content = value.double().cpu().numpy().tobytes()
    name = f"alibi_{hashlib.sha256(content).hexdigest()[:16]}"  # the graph's digest covers what it holds
    if not hasattr(module, name):
        module.register_buffer(name, value)
    with before.graph.inserting_before(before):
        node = before.graph.get_attr(name)
    mode = g.fake_mode(before.graph)
    node.meta[g.VALUE] = mode.from_tensor(value, static_shapes=True) if mode is not None else value
    return node
