"""The demo's control: the same prompts through plain PyTorch in fp32, alone and in padded batches.

It shows that the comparison can fail: on most CPUs the bits of a log-prob depend on how many other prompts
share the batch, and now and then a greedy token follows.
"""

from __future__ import annotations

import inspect
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Backend = Literal["eager", "inductor"]
BATCH = 8


@dataclass(frozen=True)
class Control:
    """What differs between decoding alone and in batches of `BATCH`.

    Log-probs are compared up to the first token that differs, because after it the two texts are different.
    """

    backend: Backend
    requests: int
    new_tokens: int
    differ: list[str]  # prompts with any log-prob bit or token that differs
    tokens_differ: list[str]  # prompts with another text
    logprobs_compared: int
    logprobs_differ: int
    max_difference: float
    seconds: float


def run_control(
    model: Any,
    jobs: Sequence[tuple[str, list[int]]],
    new_tokens: int,
    *,
    backend: Backend = "eager",
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> Control:
    """Decode greedily with `model` (a Hugging Face decoder, ordinary cache), first alone, then in batches.

    `jobs` are (name, prompt ids). Prompts of like length share a batch, to waste little on padding.
    """
    start = time.perf_counter()
    step = _compiled(model, backend)
    total = 2 * len(jobs)
    alone = []
    for i, (_, ids) in enumerate(jobs):
        progress("control", i, total)
        alone += _decode(step, [ids], new_tokens, model.device)
    together: list[tuple[Tensor, Tensor]] = [alone[0]] * len(jobs)
    order = sorted(range(len(jobs)), key=lambda i: len(jobs[i][1]))
    for first in range(0, len(order), BATCH):
        progress("control", len(jobs) + first, total)
        group = order[first : first + BATCH]
        for i, answer in zip(
            group, _decode(step, [jobs[i][1] for i in group], new_tokens, model.device), strict=True
        ):
            together[i] = answer
    progress("control", total, total)
    return _compare(backend, [name for name, _ in jobs], new_tokens, alone, together, start)


def _compiled(model: Any, backend: Backend) -> Callable[..., Any]:
    if backend == "eager":
        return model
    return torch.compile(model, backend="inductor", dynamic=True)


def _cache_name(step: Any) -> str:
    """What a model calls its cache, as an input and in its output: releases of transformers differ."""
    model = getattr(step, "_orig_mod", step)
    parameters = inspect.signature(getattr(model, "forward", model)).parameters
    return "cache" if "cache" in parameters else "past_key_values"


@torch.no_grad()
def _decode(
    step: Callable[..., Any], prompts: list[list[int]], new_tokens: int, device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """Greedy tokens [N] and their fp32 log-probs [N] of each prompt, padded on the left to one length."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)  # [B, S]
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache_name = _cache_name(step)
    cache, tokens, logprobs = None, [], []
    for _ in range(new_tokens):
        out = step(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **{cache_name: cache},
        )
        cache = getattr(out, cache_name)
        scores = out.logits[:, -1].float().log_softmax(-1)  # [B, V]
        best, ids = scores.max(-1)[0], scores.argmax(-1, keepdim=True)
        tokens.append(ids[:, 0])
        logprobs.append(best)
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
        positions = positions[:, -1:] + 1
    return list(zip(torch.stack(tokens, 1).cpu(), torch.stack(logprobs, 1).cpu(), strict=True))


def _compare(
    backend: Backend,
    names: list[str],
    new_tokens: int,
    alone: list[tuple[Tensor, Tensor]],
    together: list[tuple[Tensor, Tensor]],
    start: float,
) -> Control:
    differ, tokens_differ, compared, unequal, largest = [], [], 0, 0, 0.0
    for name, (t1, p1), (t2, p2) in zip(names, alone, together, strict=True):
        split = int((t1 != t2).nonzero()[0]) if not torch.equal(t1, t2) else len(t1)
        if split < len(t1):
            tokens_differ.append(name)
        a, b = p1[:split].tolist(), p2[:split].tolist()
        here = sum(struct.pack("<f", x) != struct.pack("<f", y) for x, y in zip(a, b, strict=True))
        compared += split
        unequal += here
        largest = max([largest, *(abs(x - y) for x, y in zip(a, b, strict=True))])
        if here or split < len(t1):
            differ.append(name)
    return Control(
        backend=backend,
        requests=len(names),
        new_tokens=new_tokens,
        differ=differ,
        tokens_differ=tokens_differ,
        logprobs_compared=compared,
        logprobs_differ=unequal,
        max_difference=largest,
        seconds=round(time.perf_counter() - start, 3),
    )
