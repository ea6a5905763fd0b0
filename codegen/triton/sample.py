"""Sampling and log-probabilities on a GPU: one program a row.

``sample`` goes over a row's logits in descending order: top-k, top-p and min-p each keep a prefix of it, so
together they keep the shortest of the prefixes. A stable sort puts equal logits by ascending index.
``token_logprobs`` goes over a row as it stands; every log-probability, also a sampled token's, comes from
it. Sums run over blocks of the row in order, and inside a block in one fixed tree, so a row's results are
its own.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from llm42c.codegen.operator import implements
from llm42c.codegen.triton import kernel
from llm42c.codegen.triton.devices import target_of
from llm42c.codegen.triton.source import module

_GUMBEL = '''
@triton.jit
def gumbel(seed, position, index):
    """Noise of ``codegen/ops/sample.py``: Philox4x32-10 under the row's seed at the row's position."""
    block = index // 64
    word = index % 64 // 16
    lane = index % 16
    c0 = (block * 16 + lane).to(tl.uint32)
    zero = c0 * 0
    low = zero + (position & 0xFFFFFFFF).to(tl.uint32)
    high = zero + ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    r0, r1, r2, r3 = tl.philox(seed, c0, zero, low, high)
    bits = tl.where(word == 0, r0, tl.where(word == 1, r1, tl.where(word == 2, r2, r3)))
    u = bits.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    u = tl.minimum(u, 0.99999994)
    # -log(-log(1 - u)); for small u, -log(1 - u) by its series, where 1 - u would lose u's digits.
    near = u * (1.0 + u * (0.5 + u * (0.33333334 + u * 0.25)))
    return -tl.log(tl.where(u < 0.01, near, -tl.log(1.0 - u)))
'''

_KERNEL = '''
@triton.jit
def sample(
    sorted_ptr, index_ptr, token_ptr,
    temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, seed_ptr, position_ptr, size,
):
    """sorted, index: [R, V], descending. Program: row."""
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    min_p = tl.load(min_p_ptr + row)
    seed = tl.load(seed_ptr + row)
    position = tl.load(position_ptr + row)
    values = sorted_ptr + row * size
    indices = index_ptr + row * size
    lane = tl.arange(0, BLOCK)
    top = tl.load(values).to(tl.float32)
    last = tl.load(values + size - 1).to(tl.float32)
    drawn = temperature > 0.0
    scale = tl.where(drawn, temperature, 1.0)
    limited = drawn & (top_k > 0) & (top_k < size)
    least = tl.load(values + tl.where(limited, top_k, size) - 1).to(tl.float32)  # and its equals

    kept_sum = 0.0  # of exp((x - max) / temperature) over the top k
    for start in tl.range(0, size, BLOCK):
        there = start + lane < size
        x = tl.load(values + start + lane, mask=there, other=float("-inf")).to(tl.float32)
        kept_sum += tl.sum(tl.where(x >= least, tl.exp((x - top) / scale), 0.0), 0)

    # The first entry always stays; with top-p off, all do.
    limit = tl.where(top_p >= 1.0, float("inf"), tl.maximum(top_p * kept_sum, 1e-30))
    before = 0.0
    best = float("-inf")
    token = tl.load(indices)
    for start in tl.range(0, size, BLOCK):
        at = start + lane
        there = at < size
        x = tl.load(values + at, mask=there, other=float("-inf")).to(tl.float32)
        index = tl.load(indices + at, mask=there, other=0)
        z = (x - top) / scale
        p = tl.where(there & (x >= least), tl.exp(z), 0.0)
        ahead = before + tl.cumsum(p, 0) - p
        before += tl.sum(p, 0)
        keep = there & (x >= least) & (tl.exp(z) >= min_p)
        keep = keep & (ahead < limit)
        score = tl.where(keep, z + gumbel(seed, position, index), float("-inf"))
        highest = tl.max(score, 0)
        # Equal scores go to the lowest index.
        winner = tl.min(tl.where(score == highest, index, 0x7FFFFFFF), 0)
        better = drawn & ((highest > best) | ((highest == best) & (winner < token)))
        token = tl.where(better, winner, token)
        best = tl.maximum(best, highest)

    # NaN sorts above everything; a row that holds it, or has no finite maximum, fails alone.
    bad = (top != top) | (last != last) | (tl.abs(top) == float("inf"))
    tl.store(token_ptr + row, tl.where(bad, -1, token).to(tl.int64))
'''

_LOGPROBS = '''
@triton.jit(do_not_specialize=["columns"])
def token_logprobs(x_ptr, token_ptr, y_ptr, size, columns):
    """Log-softmax of x: [R, V] at token: [R, K] → y: [R, K]. Program: row.

    NaN in rows that ``sample`` refuses, and for tokens that are not in the vocabulary.
    """
    row = tl.program_id(0).to(tl.int64)
    values = x_ptr + row * size
    lane = tl.arange(0, BLOCK)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    unordered = tl.zeros([BLOCK], tl.int32)
    for start in tl.range(0, size, BLOCK):
        x = tl.load(values + start + lane, mask=start + lane < size, other=float("-inf")).to(tl.float32)
        largest = tl.maximum(largest, x)
        unordered = unordered | (x != x).to(tl.int32)
    top = tl.max(largest, 0)
    bad = (tl.max(unordered, 0) > 0) | (tl.abs(top) == float("inf"))
    total = 0.0
    for start in tl.range(0, size, BLOCK):
        x = tl.load(values + start + lane, mask=start + lane < size, other=float("-inf")).to(tl.float32)
        total += tl.sum(tl.exp(x - top), 0)
    for start in tl.range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        there = column < columns
        token = tl.load(token_ptr + row * columns + column, mask=there, other=-1)
        known = (token >= 0) & (token < size)
        x = tl.load(values + token, mask=known, other=0.0).to(tl.float32)
        y = tl.where(known & (not bad), x - top - tl.log(total), float("nan"))
        tl.store(y_ptr + row * columns + column, y, mask=there)
'''


@functools.cache
def emit() -> str:
    """The file; its kernel is ``sample``."""
    return module("Gumbel-max sampling over sorted logits", "any row", {"BLOCK": 1024}, _GUMBEL, _KERNEL)


@functools.cache
def emit_logprobs() -> str:
    """The file; its kernel is ``token_logprobs``."""
    return module("Log-probabilities of tokens", "any row", {"BLOCK": 1024, "COLUMNS": 32}, _LOGPROBS)


def _logits(name: str, x: Tensor) -> Tensor:
    """[R, V] as contiguous rows of a dtype that kernels read. Raises ValueError."""
    if x.dim() != 2 or x.shape[1] == 0:
        raise ValueError(f"{name}: expected logits [R, V] with V > 0, got {tuple(x.shape)}")
    rows: Tensor = kernel.aligned((x.float() if x.dtype == torch.float64 else x).contiguous())
    return rows


def _logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """logits: [R, V] from :func:`_logits`, tokens: [R, K] → [R, K] float32."""
    out = torch.empty(tokens.shape, dtype=torch.float32, device=logits.device)
    if out.numel():
        fn = kernel.load("token_logprobs", emit_logprobs(), target_of(logits.device))
        tokens = kernel.aligned(tokens.contiguous())
        fn[(len(logits),)](
            logits, tokens, out, *logits.shape[1:], tokens.shape[1], num_warps=4, **kernel.OPTIONS
        )
    return out


@implements("sample", "cuda")
def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
) -> tuple[Tensor, Tensor]:
    """``llm42::sample``. logits: [R, V] → token [R] int64, log-probability [R] float32."""
    logits = _logits("sample", logits)
    rows, size = logits.shape
    token = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows:
        values, indices = torch.sort(logits, dim=-1, descending=True, stable=True)
        columns = (temperature, top_k, top_p, min_p, seed, position)
        target = target_of(logits.device)
        fn = kernel.load("sample", emit(), target)
        fn[(rows,)](
            values, indices, token, *(kernel.aligned(c.contiguous()) for c in columns), size,
            num_warps=4, **kernel.OPTIONS, **kernel.registers_for(target, 4),
        )  # fmt: skip
    return token, _logprobs(logits, token[:, None])[:, 0]


@implements("token_logprobs", "cuda")
def token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """``llm42::token_logprobs``. tokens: [R] or [R, K]; one outside of the vocabulary gives NaN."""
    logits = _logits("token_logprobs", logits)
    if tokens.dtype != torch.int64 or tokens.dim() not in (1, 2) or len(tokens) != len(logits):
        raise ValueError(
            f"token_logprobs: expected tokens [{len(logits)}] or [{len(logits)}, K] of dtype int64, got "
            f"{tuple(tokens.shape)} {tokens.dtype}"
        )
    return _logprobs(logits, tokens.reshape(len(tokens), -1)).reshape(tokens.shape)


@implements("top_logprobs", "cuda")
def top_logprobs(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``llm42::top_logprobs``. logits: [R, V] → values [R, k] float32, indices [R, k] int64."""
    logits = _logits("top_logprobs", logits)
    if not 1 <= k <= logits.shape[1]:
        raise ValueError(f"top_logprobs: k = {k} is not in [1, {logits.shape[1]}]")
    # `topk` does not say which of equal entries it takes.
    indices = torch.sort(logits, dim=-1, descending=True, stable=True).indices[:, :k].contiguous()
    values = _logprobs(logits, indices)
    return values, indices.masked_fill(values.isnan(), -1)
