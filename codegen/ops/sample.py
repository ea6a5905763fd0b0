"""``llm42::sample`` and the log-probabilities of tokens: rows of logits in, tokens out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llm42c.codegen import simulate
from llm42c.codegen.examples import ROWS, Numbers
from llm42c.codegen.operator import operator
from llm42c.codegen.order import DRAW, GPU_DRAW, LANES, TREE

_Words = npt.NDArray[np.uint32]


def philox4x32(counter: _Words, key: _Words) -> _Words:
    """Philox4x32-10 (Salmon et al., SC 2011, "Parallel random numbers: as easy as 1, 2, 3").

    Args:
        counter: ``[..., 4]`` uint32.
        key: ``[..., 2]`` uint32.

    Returns:
        ``[..., 4]`` uint32.
    """
    c0, c1, c2, c3 = (counter[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = (key[..., i].astype(np.uint64) for i in range(2))
    low = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        a, b = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1 = (b >> np.uint64(32)) ^ c1 ^ k0, b & low
        c2, c3 = (a >> np.uint64(32)) ^ c3 ^ k1, a & low
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    return np.stack([c0, c1, c2, c3], -1).astype(np.uint32)


def gumbel(seed: int, position: int, vocab: int) -> Tensor:
    """Noise of one row in fp64, ``[vocab]``: the specification of what ``sample`` adds to scaled logits.

    Entry ``v = 64 b + 16 w + lane`` takes word ``w`` of the Philox output for counter
    ``(16 b + lane, 0, position & 0xffffffff, position >> 32)`` under key ``(seed & 0xffffffff, seed >> 32)``;
    with ``u = min((word + 1/2) / 2**32, 1 - 2**-24)`` in fp32, the noise is ``-log(-log(1 - u))``.
    """
    u = _words(seed, position, vocab).astype(np.float32).astype(np.float64) * 2.0**-32 + 2.0**-33
    u = np.minimum(u.astype(np.float32), np.float32(1 - 2.0**-24)).astype(np.float64)
    return torch.from_numpy(-np.log(-np.log1p(-u)))


def _words(seed: int, position: int, vocab: int) -> _Words:
    """The random word of each entry, ``[vocab]``."""
    v = np.arange(vocab, dtype=np.uint64)
    block, word, lane = v // 64, v % 64 // 16, v % 16
    counter = np.zeros((vocab, 4), np.uint32)
    counter[:, 0] = (block * 16 + lane).astype(np.uint32)
    counter[:, 2:] = _halves(position)
    words = philox4x32(counter, np.broadcast_to(_halves(seed), (vocab, 2)))
    return np.take_along_axis(words, word[:, None].astype(np.int64), 1)[:, 0]


def _halves(x: int) -> _Words:
    return np.array([x & 0xFFFFFFFF, x >> 32 & 0xFFFFFFFF], np.uint32)


def keep_mask(x: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """The entries that may be drawn, ``[V]`` bool: Hugging Face's warpers in their order, in fp64.

    Temperature, then top-k (entries equal to the k-th stay), then top-p (the shortest prefix, in
    descending order with equal entries by ascending index, whose probability reaches ``top_p``; at least
    one), then min-p (entries with at least ``min_p`` times the greatest probability).
    """
    z = (x - x.max()) / temperature
    keep = torch.ones_like(x, dtype=torch.bool)
    if 0 < top_k < len(x):
        keep = x >= x.topk(top_k).values[-1]
    if top_p < 1:
        order = torch.sort(x.masked_fill(~keep, -torch.inf), descending=True, stable=True).indices
        p = z.masked_fill(~keep, -torch.inf).softmax(0)[order]
        before = p.cumsum(0) - p
        chosen = before < top_p
        chosen[0] = True
        keep = keep & torch.zeros_like(keep).scatter(0, order, chosen)
    return keep & (z.exp() >= min_p)


_VOCAB = 3001  # of examples


def _sample_examples(r: Numbers) -> Iterator[tuple[Any, ...]]:
    logits = r(ROWS, _VOCAB, scale=9.0)
    params = (
        torch.tensor([0.0, 1.0, 0.7, 1.3, 1.0, 0.9, 1.2]),
        torch.tensor([0, 0, 5, 0, 0, 40, 100], dtype=torch.int32),
        torch.tensor([1.0, 1.0, 1.0, 0.9, 1.0, 0.8, 0.9]),
        torch.tensor([0.0, 0.0, 0.0, 0.0, 0.1, 0.0, 0.01]),
    )
    for run in range(20):
        yield logits, *params, torch.arange(ROWS) + 2**40 * run, torch.arange(ROWS) * 7 + run


@operator(orders={"cpu": DRAW, "cuda": GPU_DRAW}, examples=_sample_examples)
def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
) -> tuple[Tensor, Tensor]:
    """Specification: draw one token a row by the Gumbel-max trick, with counter-based noise.

    Args:
        logits: ``[R, V]``, any float dtype.
        temperature: ``[R]`` float32, 0 takes the greatest logit.
        top_k: ``[R]`` int32, 0 switches it off.
        top_p: ``[R]`` float32, 1 switches it off.
        min_p: ``[R]`` float32, 0 switches it off.
        seed, position: ``[R]`` int64, counters of the noise.

    Returns:
        token: ``[R]`` int64; equal scores go to the lowest index. -1 if the row holds NaN or has no finite
            maximum, so that its request can fail alone.
        logprob: ``[R]`` fp64 here, float32 from the operator: ``log_softmax(logits)[token]`` of the raw
            logits, NaN where the token is -1.

    Raises:
        ValueError, TypeError: (the operator) a parameter has a wrong shape, dtype or range.
    """
    tokens, logprobs = [], []
    for r, row in enumerate(logits.double()):
        if not torch.isfinite(row.max()):
            tokens.append(-1)
            logprobs.append(torch.nan)
            continue
        t = float(temperature[r])
        score = row
        if t > 0:
            keep = keep_mask(row, t, int(top_k[r]), float(top_p[r]), float(min_p[r]))
            noise = gumbel(int(seed[r]), int(position[r]), len(row))
            score = ((row - row.max()) / t + noise).masked_fill(~keep, -torch.inf)
        tokens.append(int(score.argmax()))
        logprobs.append(float(row.log_softmax(0)[tokens[-1]]))
    return torch.tensor(tokens, dtype=torch.int64), torch.tensor(logprobs, dtype=torch.float64)


@sample.fake
def _fake(logits: Tensor, *per_row: Tensor) -> tuple[Tensor, Tensor]:
    rows = logits.shape[0]
    return logits.new_empty(rows, dtype=torch.int64), logits.new_empty(rows, dtype=torch.float32)


def _token_examples(r: Numbers) -> Iterator[tuple[Any, ...]]:
    yield r(ROWS, _VOCAB, scale=9.0), torch.arange(ROWS) * 400


@operator(orders={"cpu": LANES, "cuda": TREE}, examples=_token_examples)
def token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities of given tokens.

    Args:
        logits: ``[R, V]``, any float dtype.
        tokens: ``[R]`` or ``[R, K]`` int64.

    Returns:
        Like ``tokens``, fp64 here and float32 from the operator; NaN in rows that ``sample`` refuses. The
        bits are those that ``sample`` returns for the same token.
    """
    columns = tokens if tokens.dim() == 2 else tokens[:, None]
    return logits.double().log_softmax(-1).gather(1, columns).reshape(tokens.shape)


@token_logprobs.fake
def _token_logprobs_fake(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits.new_empty(tokens.shape, dtype=torch.float32)


def _top_examples(r: Numbers) -> Iterator[tuple[Any, ...]]:
    yield r(ROWS, _VOCAB, scale=9.0), 9


@operator(orders={"cpu": LANES, "cuda": TREE}, examples=_top_examples)
def top_logprobs(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` greatest log-probabilities of each row, descending; equal ones by ascending index.

    Args:
        logits: ``[R, V]``, any float dtype, ``1 <= k <= V``.

    Returns:
        values ``[R, k]`` (fp64 here, float32 from the operator), indices ``[R, k]`` int64. Rows that
        ``sample`` refuses hold NaN and -1.
    """
    values, indices = logits.double().log_softmax(-1).sort(dim=-1, descending=True, stable=True)
    bad = ~torch.isfinite(logits.double().amax(-1, keepdim=True))
    return values[:, :k].masked_fill(bad, torch.nan), indices[:, :k].masked_fill(bad, -1)


@top_logprobs.fake
def _top_logprobs_fake(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], k)
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int64)


class _Row:
    """One row of logits ``[V]`` in the order of the CPU: fp32, exponentials in sixteen lanes."""

    def __init__(self, logits: Tensor) -> None:
        self.x = logits.float()
        self.shifted = self.x - self.x.masked_fill(self.x.isnan(), -torch.inf).max()
        self.total = simulate.lane_sum(simulate.exp_nonpositive(self.shifted))
        self.usable = bool((self.total > 0) & (self.total < torch.inf))

    def logprobs(self) -> Tensor:
        if not self.usable:
            return torch.full_like(self.x, torch.nan)
        return self.shifted - simulate.log(self.total)

    def draw(
        self, temperature: Tensor, top_k: int, top_p: Tensor, min_p: Tensor, seed: int, position: int
    ) -> int:
        if temperature == 0:
            return _first_greatest(self.x)
        z = simulate.div(self.shifted, temperature)
        e = simulate.exp_nonpositive(z)
        keep = torch.ones_like(self.x, dtype=torch.bool)
        if 0 < top_k < len(self.x):
            keep = self.x >= self.x.topk(top_k).values[-1]
        if top_p < 1:
            keep = self._nucleus(keep, z, e, float(top_p))
        if min_p > 0:
            keep = keep & (e >= min_p)
        score = (z + _gumbel(seed, position, len(z))).masked_fill(~keep, -torch.inf)
        return _first_greatest(score if keep.any() else self.x)

    def _nucleus(self, keep: Tensor, z: Tensor, e: Tensor, top_p: float) -> Tensor:
        """The shortest prefix of what is kept that reaches ``top_p`` of its mass; sums in fp64."""
        wanted = top_p * float(simulate.lane_sum(torch.where(keep, e, 0.0)))
        buckets = torch.clamp(z * -32.0, max=_BUCKETS - 1.0).int()
        inside = [i for i, kept in enumerate(keep.tolist()) if kept]
        mass, exponentials, bucket_of = [0.0] * _BUCKETS, e.tolist(), buckets.tolist()
        for i in inside:
            mass[bucket_of[i]] += exponentials[i]
        before, bucket = 0.0, 0
        while bucket < _BUCKETS - 1 and before + mass[bucket] < wanted:
            before += mass[bucket]
            bucket += 1
        values = self.x.tolist()
        last = (-torch.inf, 0)
        for i in sorted((i for i in inside if bucket_of[i] == bucket), key=lambda i: (-values[i], i)):
            last = (values[i], i)
            before += exponentials[i]
            if before >= wanted:
                break
        return keep & ((self.x > last[0]) | ((self.x == last[0]) & (torch.arange(len(self.x)) <= last[1])))


_BUCKETS = 1024  # of 1/32 of the scaled logit each; the last takes the rest


def _first_greatest(x: Tensor) -> int:
    return int((x == x[~x.isnan()].max()).nonzero()[0])


def _gumbel(seed: int, position: int, vocab: int) -> Tensor:
    """The noise in fp32, ``[vocab]``."""
    words = torch.from_numpy(_words(seed, position, vocab).astype(np.float32))
    u = simulate.fma(words, 2.0**-32, 2.0**-33).clamp(max=1 - 2.0**-24)
    return 0.0 - simulate.log(simulate.neg_log1m(u))


@sample.simulator(DRAW)
def _sample_simulated(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
) -> tuple[Tensor, Tensor]:
    tokens, logprobs = [], []
    for r, row in enumerate(map(_Row, logits)):
        token = -1
        if row.usable:
            numbers = int(seed[r]), int(position[r])
            token = row.draw(temperature[r], int(top_k[r]), top_p[r], min_p[r], *numbers)
        tokens.append(token)
        logprobs.append(float(row.logprobs()[token]))
    return torch.tensor(tokens, dtype=torch.int64), torch.tensor(logprobs, dtype=torch.float32)


@token_logprobs.simulator(LANES)
def _token_logprobs_simulated(logits: Tensor, tokens: Tensor) -> Tensor:
    columns = tokens if tokens.dim() == 2 else tokens[:, None]
    rows = torch.stack([_Row(row).logprobs() for row in logits])
    return rows.gather(1, columns).reshape(tokens.shape)


@top_logprobs.simulator(LANES)
def _top_logprobs_simulated(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    rows = [_Row(row) for row in logits]
    indices = logits.float().sort(dim=-1, descending=True, stable=True).indices[:, :k]
    values = torch.stack([row.logprobs() for row in rows]).gather(1, indices)
    bad = torch.tensor([not row.usable for row in rows])[:, None]
    return values, indices.masked_fill(bad, -1)
