"""Attention of two halves of the tokens: the only operator in which rows read other rows.

Causal attention of the first half is the attention of a shorter sequence. The second half attends to the
keys of both: on ``[B, H, S, D]`` its rows get an explicit mask, because ``is_causal`` counts from the upper
left corner; over paged KV it reads what the first half has written, so the two calls keep that order.

Cases (T = T0 + T1 tokens, half 0 in front)::

    paged_attention(q, k, v, caches, slots, cu, lens, …)    # q: [T, H, D]
        0:  paged_attention(q[:T0], …, slots[:T0], min(cu, T0), lens - rows of each sequence in half 1)
        1:  paged_attention(q[T0:], …, slots[T0:], max(cu - T0, 0), lens)           # after call 0

    sdpa(q, k, v, is_causal=True)                           # q: [B, H, T, D]
        0:  sdpa(q0, k0, v0, is_causal=True)
        1:  sdpa(q1, cat(k0, k1), cat(v0, v1), mask=[T1, T] with row i seeing keys up to T0 + i)

    sdpa(q, k, v, mask)                                     # mask: [.., T, T], known to be causal
        0:  sdpa(q0, k0, v0, mask[.., :T0, :T0])
        1:  sdpa(q1, cat(k0, k1), cat(v0, v1), mask[.., T0:, :])

A sequence may be cut anywhere; what it reads of its own is in the cache or in half 0. (A sequence that shares
pages with another one must not read what that one writes in the same batch.)
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._subclasses.fake_tensor import unset_fake_temporarily

from llm42c.passes import graph as g
from llm42c.passes.traits import traits_of
from llm42c.passes.weave.rules import Call, Rows, State, UnsplittableError

_PAGED = "llm42::paged_attention"
_DENSE = "llm42::dense_attention"
_SDPA = frozenset(
    {
        "sdpa",
        "scaled_dot_product_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_fused_attention_overrideable",
    }
)
_SIZES = (1, 2, 5, 8)  # at which a mask that depends on nothing but sizes is looked at


class Builder(Protocol):
    """What writes the divided graph."""

    memo: dict[Any, Any]
    ordered: list[tuple[fx.Node, fx.Node]]

    def whole(self, node: Any) -> Any: ...
    def half(self, which: int, node: Any) -> Any: ...
    def size(self, which: int) -> Any: ...
    def call(self, target: Callable[..., Any], args: tuple[Any, ...], **kwargs: Any) -> fx.Node: ...


Emit = Callable[[Builder, int], Any]


def is_attention(node: fx.Node) -> bool:
    name = g.called(node)
    return name in (_PAGED, _DENSE) or name in _SDPA


def attention_rule(call: Call) -> tuple[State | tuple[Any, ...], Emit]:
    """The state of an attention call's result, and what writes the call for each half.

    Raises UnsplittableError where a row may see later tokens, or where the keys are not those of the queries.
    """
    if call.name == _PAGED:
        return _paged(call)
    if call.name == _DENSE:
        return _dense(call)
    return _sdpa(call)


def _need_rows(call: Call, x: fx.Node, dim: int) -> None:
    t = g.fake(x)
    if call.token_dims(t) != [dim] or t.shape[dim] != call.tokens or call.state(x) not in (None, Rows(dim)):
        raise UnsplittableError(f"{call.name}: queries, keys and values are not those of the same tokens")
    call.need(x, Rows(dim))


def cut_batch(cu_seqlens_q: Tensor, kv_lens: Tensor, tokens_0: int, half: int) -> tuple[Tensor, Tensor]:
    """``cu_seqlens_q [S + 1]`` and ``kv_lens [S]`` of the first or second part of a packed batch.

    A sequence of which a part has no row has query length 0 there. Keys of the first part end where its
    rows do.
    """
    first = cu_seqlens_q.clamp(max=tokens_0)
    if half:
        return cu_seqlens_q - first, kv_lens
    later = cu_seqlens_q - first
    return first, kv_lens - (later[1:] - later[:-1])


def causal_rows(tokens_0: int, tokens_1: int, like: Tensor) -> Tensor:
    """``[T1, T0 + T1]`` bool: row i, which stands at position T0 + i, sees the keys up to its own."""
    key = torch.arange(tokens_0 + tokens_1, device=like.device)
    return key <= key.narrow(0, tokens_0, tokens_1).unsqueeze(1)


def _paged(call: Call) -> tuple[State, Emit]:
    names = g.bind(call.node)
    rows = [names[n] for n in ("q", "k", "v", "slot_mapping")]
    for x in rows:
        _need_rows(call, x, 0)
    for x in call.tensors:
        if x not in rows:
            if call.token_dims(g.fake(x)) or call.state(x) is not None:
                raise UnsplittableError(f"{call.name}: its metadata depends on the tokens")
            call.need(x, None)

    def emit(b: Builder, half: int) -> fx.Node:
        key = ("cut_batch", half, names["cu_seqlens_q"], names["kv_lens"])
        if key not in b.memo:
            args = (b.whole(names["cu_seqlens_q"]), b.whole(names["kv_lens"]), b.size(0), half)
            both = b.call(cut_batch, args)
            b.memo[key] = tuple(b.call(operator.getitem, (both, i)) for i in range(2))
        cu, lens = b.memo[key]
        given = {n: b.half(half, x) if x in rows else b.whole(x) for n, x in names.items()} | {
            "cu_seqlens_q": cu,
            "kv_lens": lens,
        }
        new = b.call(call.node.target, tuple(given.values()))  # type: ignore[arg-type]
        if half:
            b.ordered.append((b.half(0, call.node), new))
        return new

    return Rows(0), emit


def _tokens_of(call: Call, q: fx.Node, k: fx.Node, v: fx.Node, mask: Any, causal: bool) -> None:
    for x in (q, k, v):
        _need_rows(call, x, g.fake(x).dim() - 2)
    if g.tensor(mask) is not None:
        t = g.fake(mask)
        if any(d < t.dim() - 2 or t.shape[d] != call.tokens for d in call.token_dims(t)):
            raise UnsplittableError(f"{call.name}: the mask has the tokens in another place")
        if call.state(mask) is not None:
            raise UnsplittableError(f"{call.name}: the mask is computed from the tokens")
        call.need(mask, None)
    if not causal and not is_causal_mask(mask, call.tokens):
        raise UnsplittableError(f"{call.name}: a token may see later ones")


def _keys_of_both(b: Builder, x: fx.Node) -> Any:
    dim = g.fake(x).dim() - 2
    return b.call(torch.cat, ([b.half(0, x), b.half(1, x)], dim))


def _mask_rows(b: Builder, call: Call, mask: Any, half: int) -> Any:
    """The part of a mask ``[.., T|1, T|1]`` that a half's rows, and the keys in front of them, need."""
    if g.tensor(mask) is None:
        return None
    key = ("mask", half, mask)
    if key not in b.memo:
        t, part = g.fake(mask), b.whole(mask)
        if t.shape[-2] == call.tokens:
            part = b.call(torch.narrow, (part, -2, b.size(0) if half else 0, b.size(half)))
        if t.shape[-1] == call.tokens and not half:
            part = b.call(torch.narrow, (part, -1, 0, b.size(0)))
        b.memo[key] = part
    return b.memo[key]


def _second_mask(b: Builder, call: Call, mask: Any, causal: bool, q: fx.Node) -> Any:
    """The explicit mask of half 1."""
    given = _mask_rows(b, call, mask, 1)
    if not causal:
        return given
    if ("causal", 1) not in b.memo:
        b.memo["causal", 1] = b.call(causal_rows, (b.size(0), b.size(1), b.half(1, q)))
    rows = b.memo["causal", 1]
    if given is None:
        return rows
    if g.fake(mask).dtype == torch.bool:
        return b.call(torch.logical_and, (given, rows))
    return b.call(torch.where, (rows, given, float("-inf")))


def _dense(call: Call) -> tuple[State, Emit]:
    names = g.bind(call.node)
    q, k, v, mask, causal = (names[n] for n in ("q", "k", "v", "mask", "causal"))
    _tokens_of(call, q, k, v, mask, causal)

    def emit(b: Builder, half: int) -> fx.Node:
        rest = (names["window"], names["softcap"])
        target: Any = call.node.target
        if not half:
            own = tuple(b.half(0, x) for x in (q, k, v))
            return b.call(target, (*own, _mask_rows(b, call, mask, 0), names["scale"], causal, *rest))
        rows = _second_mask(b, call, mask, causal, q)
        keys, values = _keys_of_both(b, k), _keys_of_both(b, v)
        return b.call(target, (b.half(1, q), keys, values, rows, names["scale"], False, *rest))

    return Rows(2), emit


def _sdpa(call: Call) -> tuple[State | tuple[Any, ...], Emit]:
    names = g.bind(call.node)
    q, k, v = (names[n] for n in ("query", "key", "value"))
    mask = names.get("attn_mask", names.get("attn_bias"))
    causal = bool(names["is_causal"])
    _tokens_of(call, q, k, v, mask, causal)
    if names.get("dropout_p"):
        raise UnsplittableError(f"{call.name}: drops weights at random")
    several = isinstance(g.value(call.node), (tuple, list))
    if several and any(
        u.target is not operator.getitem or u.args[1] != 0 for u in call.node.users if u.users
    ):
        raise UnsplittableError(f"{call.name}: more than its output is used")
    grouped = g.fake(q).shape[1] != g.fake(k).shape[1]

    def emit(b: Builder, half: int) -> Any:
        if half:
            rows = _second_mask(b, call, mask, causal, q)
            keys, values = _keys_of_both(b, k), _keys_of_both(b, v)
        else:
            rows, keys, values = _mask_rows(b, call, mask, 0), b.half(0, k), b.half(0, v)
        options = {"scale": names["scale"], "enable_gqa": grouped}
        args = (b.half(half, q), keys, values, rows, 0.0, causal and not half)
        out = b.call(F.scaled_dot_product_attention, args, **options)
        return (out, None) if several else out

    state = Rows(g.fake(q).dim() - 2)
    return (state,) * len(g.value(call.node)) if several else state, emit


_AND = frozenset({"and", "and_", "bitwise_and", "logical_and", "__and__"})


def is_causal_mask(mask: Any, tokens: int) -> bool:
    """No row of the mask shows a key after its own.

    Known of a mask that depends on sizes alone, by computing it at a few of them, and of a mask that is a
    conjunction with such a one.
    """
    if g.tensor(mask) is None:
        return False
    name = g.called(mask)
    if name in _AND and any(is_causal_mask(a, tokens) for a in mask.args):
        return True
    t = g.fake(mask)
    if t.dim() < 2 or t.shape[-1] != tokens or t.shape[-2] != tokens:
        return False
    passes_on = traits_of(name).same or name in ("expand", "slice", "getitem")
    if passes_on and _read_alike(mask.args[0], t) and is_causal_mask(mask.args[0], tokens):
        return True
    order = _closed(mask)
    with unset_fake_temporarily(), torch.no_grad():  # a compiler may be at work around us
        return order is not None and all(_shows_no_later(_evaluate(order, tokens, n)) for n in _SIZES)


def _read_alike(of: Any, mask: Tensor) -> bool:
    """Not one by truth and the other as addends."""
    t = g.tensor(of)
    return t is not None and (t.dtype == torch.bool) == (mask.dtype == torch.bool)


def _closed(node: fx.Node) -> list[fx.Node] | None:
    """What computes ``node``, in graph order, if no tensor goes in."""
    found: set[fx.Node] = set()
    stack = [node]
    while stack:
        top = stack.pop()
        if top in found:
            continue
        found.add(top)
        if top.op == "get_attr" or (top.op == "placeholder" and not isinstance(g.value(top), int)):
            return None
        if g.mutated_arguments(top):
            return None
        stack += top.all_input_nodes
    return sorted(found)


def _evaluate(order: list[fx.Node], tokens: int, size: int) -> Any:
    """The last of ``order`` with ``size`` tokens; other sizes are 2."""
    values: dict[fx.Node, Any] = {}
    for node in order:
        if node.op == "placeholder":
            values[node] = size if g.value(node) == tokens else 2
            continue
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
        if node.op == "call_method":
            values[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return values[order[-1]]


def _shows_no_later(mask: Tensor) -> bool:
    size = mask.shape[-1]
    later = torch.ones(size, size, dtype=torch.bool, device=mask.device).triu(1)
    if mask.dtype == torch.bool:
        return not bool((mask & later).any())
    hidden = mask <= torch.finfo(mask.dtype).min / 2
    return not bool((~hidden & later).any())
