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
from llm42c.codegen.triton.devices import device_of
from llm42c.codegen.triton.fold import fold
from llm42c.codegen.triton.source import module


@functools.cache
def emit() -> str:
    """The file; its kernel is ``sample``."""
    functions = (fold("sample", name) for name in ("gumbel", "sample"))
    return module("Gumbel-max sampling over sorted logits", "any row", {"BLOCK": 1024}, *functions)


@functools.cache
def emit_logprobs() -> str:
    """The file; its kernel is ``token_logprobs``."""
    constants = {"BLOCK": 1024, "COLUMNS": 32}
    return module("Log-probabilities of tokens", "any row", constants, fold("sample", "token_logprobs"))


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
        fn = kernel.load("token_logprobs", emit_logprobs(), device_of(logits.device))
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
        device = device_of(logits.device)
        fn = kernel.load("sample", emit(), device)
        fn[(rows,)](
            values, indices, token, *(kernel.aligned(c.contiguous()) for c in columns), size,
            num_warps=4, **kernel.OPTIONS, **kernel.registers_for(device, 4),
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
