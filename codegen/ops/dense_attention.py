"""``llm42::dense_attention``: scaled dot-product attention in a fixed order, for plain models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from llm42c.codegen.examples import Numbers
from llm42c.codegen.operator import operator
from llm42c.codegen.ops.paged_attention import example_rows
from llm42c.codegen.order import GPU_SPLITS, SPLITS
from llm42c.codegen.simulate_attention import Heads, attend


def _hidden(mask: Tensor | None, q_len: int, kv_len: int, causal: bool, window: int, like: Tensor) -> Tensor:
    """Keys that a row does not see, bool, broadcastable to ``[B, Hq, Sq, Sk]``."""
    position = torch.arange(q_len, device=like.device)[:, None] + (0 if causal else kv_len - q_len)
    key = torch.arange(kv_len, device=like.device)
    hidden = torch.zeros(q_len, kv_len, dtype=torch.bool, device=like.device)
    if causal:
        hidden = hidden | (key > position)
    if window > 0:
        hidden = hidden | (key <= position - window)
    if mask is not None:
        hidden = hidden | (~mask if mask.dtype == torch.bool else mask == -torch.inf)
    return hidden


def _weights(
    q: Tensor, k: Tensor, mask: Tensor | None, scale: float, causal: bool, window: int, softcap: float
) -> tuple[Tensor, Tensor]:
    """Softmax weights ``[B, Hq, Sq, Sk]`` (0 in rows that see nothing) and the scores before the soft-cap."""
    raw = (q @ k.transpose(-1, -2)) * scale
    scores = softcap * torch.tanh(raw / softcap) if softcap > 0 else raw
    if mask is not None and mask.dtype != torch.bool:
        scores = scores + mask.to(q.dtype)
    hidden = _hidden(mask, q.shape[2], k.shape[2], causal, window, q)
    blind = hidden.all(-1, keepdim=True)
    scores = scores.masked_fill(hidden, -torch.inf).masked_fill(blind, 0.0)
    return scores.softmax(-1).masked_fill(blind, 0.0), raw


def _per_query_head(x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """``[B, Hkv, S, D]`` as ``[B, heads, S, D]``."""
    return x.to(dtype).repeat_interleave(heads // x.shape[1], 1)


def _sum_to_kv_heads(x: Tensor, like: Tensor) -> Tensor:
    return x.unflatten(1, (like.shape[1], -1)).sum(2).to(like.dtype)


def _examples(r: Numbers) -> Iterator[tuple[Any, ...]]:
    q, k, v = (x.transpose(0, 1)[None] for x in example_rows(r))
    yield q, k, v, None, 0.15, True, 0, 0.0


@operator(orders={"cpu": SPLITS, "cuda": GPU_SPLITS}, examples=_examples)
def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
) -> Tensor:
    """Specification, in fp64: ``softmax(scale * q k^T) v`` with what hides keys.

    Args:
        q: ``[B, Hq, Sq, D]``, ``D`` a multiple of 8.
        k, v: ``[B, Hkv, Sk, D]``; ``Hkv`` divides ``Hq``.
        mask: None, or broadcastable to ``[B, Hq, Sq, Sk]``: bool (True: visible) or float (added to the
            scores after the soft-cap; ``-inf`` hides a key).
        scale: multiplies the scores.
        causal: row ``i`` sees keys ``0..i``, also if ``Sq != Sk`` (the upper left corner, as SDPA's
            ``is_causal``).
        window: if positive, the row at position ``p`` sees keys after ``p - window`` only; ``p`` is ``i``
            if causal, else ``Sk - Sq + i``.
        softcap: if positive, scores become ``softcap * tanh(score / softcap)``.

    Returns:
        ``[B, Hq, Sq, D]`` in fp64; the operator returns the dtype of ``q``, laid out as ``[B, Sq, Hq, D]``
        so that the usual transpose back is free. A row that sees no key is 0, as SDPA gives on CPU.

    Raises:
        ValueError, TypeError: (the operator) shapes or dtypes that do not fit together.

    The bits of a row depend on its query and on the keys and values that it sees, each at its index: not on
    ``B``, ``Sq`` or ``Sk``, nor on hidden keys: on a CPU even if they hold NaN, on a GPU if they are finite
    where another row of the same tile sees them (docs/gpu.md). Indices count from the first key that the mask
    shows to any row of the sequence, so padding on either side changes nothing. (Therefore give a
    sliding window as ``window``: as a mask, it moves that first key, and a row's bits then depend on which
    rows share the call.) For equal indices the bits are those of ``paged_attention``.
    """
    heads, f64 = q.shape[1], torch.float64
    weights, _ = _weights(q.to(f64), _per_query_head(k, heads, f64), mask, scale, causal, window, softcap)
    return weights @ _per_query_head(v, heads, f64)


@dense_attention.fake
def _fake(q: Tensor, *_: Any) -> Tensor:
    batch, heads, q_len, dim = q.shape
    return q.new_empty(batch, q_len, heads, dim).transpose(1, 2)


def _first_key(mask: Tensor | None, batch: int) -> list[int]:
    """Of each sequence, the first key that the mask shows to any row: indices count from there."""
    if mask is None:
        return [0] * batch
    shown = mask if mask.dtype == torch.bool else mask != -torch.inf
    shown = shown.expand(torch.broadcast_shapes(shown.shape, (batch, 1, 1, 1)))
    seen = shown.flatten(1, 2).any(1)  # [B, Sk]
    return [int(row.nonzero()[0]) if row.any() else row.numel() for row in seen]


@dense_attention.simulator(SPLITS)
def simulated(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
) -> Tensor:
    heads = q.shape[1]
    shape = (*q.shape[:3], k.shape[2])
    visible = ~_hidden(mask, q.shape[2], k.shape[2], causal, window, q).expand(shape)
    added = None if mask is None or mask.dtype == torch.bool else mask.expand(shape)
    out = _fake(q)
    ks, vs = (_per_query_head(x, heads, x.dtype) for x in (k, v))
    for b, first in enumerate(_first_key(mask, q.shape[0])):
        bias = None if added is None else added[b, ..., first:]
        seen = visible[b, ..., first:]
        out[b] = attend(q[b], ks[b, :, first:], vs[b, :, first:], seen, Heads(scale, softcap), bias=bias)
    return out


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, mask, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, mask)


@dense_attention.gradient(_setup_context)
def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients from recomputed weights, in fp32, on ordinary torch operators (no promise about bits)."""
    q, k, v, mask = ctx.saved_tensors
    scale, causal, window, softcap = ctx.options
    heads, dtype = q.shape[1], torch.promote_types(q.dtype, torch.float32)
    qf, kf, vf = q.to(dtype), _per_query_head(k, heads, dtype), _per_query_head(v, heads, dtype)
    weights, raw = _weights(qf, kf, mask, scale, causal, window, softcap)
    grad = grad.to(dtype)
    grad_weights = grad @ vf.transpose(-1, -2)
    grad_scores = weights * (grad_weights - (grad_weights * weights).sum(-1, keepdim=True))
    grad_mask = None
    if mask is not None and ctx.needs_input_grad[3]:
        grad_mask = grad_scores.sum_to_size(mask.shape).to(mask.dtype)
    if softcap > 0:
        grad_scores = grad_scores * (1 - torch.tanh(raw / softcap) ** 2)
    grad_q = (grad_scores @ kf * scale).to(q.dtype)
    grad_k = _sum_to_kv_heads(grad_scores.transpose(-1, -2) @ qf * scale, k)
    grad_v = _sum_to_kv_heads(weights.transpose(-1, -2) @ grad, v)
    return grad_q, grad_k, grad_v, grad_mask, None, None, None, None
