"""The order ``splits256`` of attention, in plain torch.

Exponentials are not rounded to the dtype of the values before their products: in bf16 that would add up to
2^-9 · Σ p|v| / Σ p to an element's error, about as much again as the rounding of the result itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llm42c.codegen import simulate

SPLIT = 256  # absolute positions that are reduced together; splits are folded in ascending order


@dataclass(frozen=True)
class Heads:
    """How scores are made of products."""

    scale: float
    softcap: float = 0.0


@dataclass(frozen=True)
class _Partial:
    """What splits have given: m, l: [H, Sq, 1], o: [H, Sq, D], not normalised."""

    m: Tensor
    l: Tensor  # noqa: E741
    o: Tensor

    @property
    def nothing(self) -> Tensor:
        """Rows that have seen no key."""
        return (self.m == -torch.inf) & (self.l == 0)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    heads: Heads,
    *,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """q: [H, Sq, D], k, v: [H, Sk, D], visible: [H, Sq, Sk] bool, bias likewise, sinks: [H] → [H, Sq, D].

    The result has q's dtype. A row that sees no key is 0.
    """
    none = torch.zeros(*q.shape[:2], 1)
    whole = _Partial(none - torch.inf, none, torch.zeros(q.shape))
    for begin in range(0, k.shape[1], SPLIT):
        keys = slice(begin, begin + SPLIT)
        added = None if bias is None else bias[..., keys]
        whole = _fold(whole, _split(q, k[:, keys], v[:, keys], visible[..., keys], heads, added))
    return _finish(whole, sinks)


def _split(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, heads: Heads, bias: Tensor | None) -> _Partial:
    s = simulate.chain(q[:, :, None], k[:, None]) * simulate.fp32(heads.scale)
    if heads.softcap > 0:
        cap = simulate.fp32(heads.softcap)
        s = cap * simulate.tanh(simulate.div(s, cap))
    if bias is not None:
        s = s + bias.float()
    s = s.masked_fill(~visible, -torch.inf)
    m = s.masked_fill(s.isnan(), -torch.inf).amax(-1, keepdim=True)
    p = simulate.exp_nonpositive(s - torch.where(m == -torch.inf, 0.0, m))
    o = simulate.chain(p[:, :, None], v.float().mT[:, None], visible[:, :, None])  # hidden values may be NaN
    return _Partial(m, simulate.lane_sum(p), o)


def _fold(left: _Partial, right: _Partial) -> _Partial:
    m = torch.maximum(left.m, right.m)
    a, b = (simulate.exp_nonpositive(x.m - m) for x in (left, right))
    mixed = (m, left.l * a + right.l * b, simulate.fma(left.o, a, right.o * b))
    kept = [
        torch.where(right.nothing, x, torch.where(left.nothing, y, both))
        for x, y, both in zip((left.m, left.l, left.o), (right.m, right.l, right.o), mixed, strict=True)
    ]
    return _Partial(*kept)


def _finish(row: _Partial, sinks: Tensor | None) -> Tensor:
    total, factor = row.l, torch.ones_like(row.l)
    if sinks is not None:
        sink = sinks.float()[:, None, None]
        m = torch.maximum(row.m, sink)
        factor = simulate.exp_nonpositive(row.m - m)
        total = total * factor + simulate.exp_nonpositive(sink - m)
    y = simulate.fma(row.o, simulate.div(factor, total), 0.0)
    return torch.where(row.l == 0, 0.0, y)
