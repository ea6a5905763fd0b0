"""What the rules between logits and tokens give for fixed logits, parameters and seeds, as digests.

One digest for each rule that a contract lists, of an input made for it. As a program it prints them as JSON.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm42c.codegen.examples import Numbers
from llm42c.runtime.contract import RULES
from llm42c.runtime.packing import Span
from llm42c.runtime.request import Request
from llm42c.runtime.sampling import RowSampler, Sampler, SamplingParams, operator_sampler

PROMPT, OUTPUTS = 6, 24
VOCAB, SMALL_VOCAB = 1009, 61  # the latter where it matters which tokens came before


def _doubled(token_ids: list[int], logits: Tensor) -> Tensor:
    """A user's processor: of a row and its own history."""
    logits[token_ids[-1]] *= 2
    return logits


FILTERS: list[dict[str, Any]] = [
    {"top_k": 1}, {"top_k": 40}, {"top_p": 0.9}, {"top_p": 1e-6}, {"min_p": 0.05}, {"min_p": 1.0},
    {"top_k": 100, "top_p": 0.8, "min_p": 0.02},
]  # fmt: skip
PROCESSING: list[dict[str, Any]] = [
    {"repetition_penalty": 1.3}, {"repetition_penalty": 0.7}, {"frequency_penalty": 1.9},
    {"presence_penalty": -1.5}, {"logit_bias": {3: 4.0, 60: -2.5}}, {"min_tokens": 9},
    {"logits_processors": (_doubled,)},
    {
        "repetition_penalty": 1.1, "frequency_penalty": 0.8, "presence_penalty": 0.2, "min_tokens": 3,
        "logit_bias": {i: i % 7 - 3.0 for i in range(5, 29)}, "logits_processors": (_doubled,),
    },
]  # fmt: skip
CASES: dict[str, list[dict[str, Any]]] = {
    "noise": [{"temperature": 1.0, "seed": seed} for seed in (0, 1, 2**31, 2**32 + 5, 2**63 - 1)],
    "choice": [{}, *({"temperature": t, "seed": 7} for t in (1e-3, 0.3, 0.7, 1.6, 50.0))],
    "filters": [{"temperature": 1.3, "seed": 11, **f} for f in FILTERS],
    "logprobs": [{"logprobs": 0}, {"logprobs": 5}, {"logprobs": 3, "temperature": 1.0, "seed": 3}],
    "processing": [{"temperature": t, "seed": 5, **p} for p in PROCESSING for t in (0.0, 0.9)],
    "seed": [{}, {"temperature": 0.8}, *({"temperature": 0.8, **x} for x in (*FILTERS, *PROCESSING[:5]))],
}


def requests(rule: str, numbers: Numbers) -> Iterator[Request]:
    """Requests of the cases of ``rule``, each with a prompt of its own and some outputs."""
    for i, case in enumerate(CASES[rule]):
        params = SamplingParams(stop_token_ids=(2, 4), ignore_eos=True, **case)
        ids = ((numbers(PROMPT + OUTPUTS).float() + 1) * 12).long().tolist()  # some often
        prompt, outputs = ids[:PROMPT], [5 + token for token in ids[PROMPT:]]
        request = Request(
            *(f"{rule}-{i}", i, prompt, params),
            deterministic=True,
            stream=False,
            seed=params.derived_seed(prompt) if params.seed is None else params.seed,
            max_tokens=10 * OUTPUTS,
            eos_ids=frozenset(),
            max_pages=1,
            text=None,
        )
        for token in outputs:
            request.commit(token, 0.0, None, 0)
        yield request


def digest(rule: str, sampler: Sampler | None = None) -> str:
    """Of the seeds, tokens, log-probs and most likely tokens of every row, in fp32 and bf16."""
    found = hashlib.sha256()
    for dtype in (torch.float32, torch.bfloat16):
        numbers = Numbers(dtype)
        chunks: list[Any] = [
            Span(r, PROMPT - 1, r.num_tokens, PROMPT - 1) for r in requests(rule, Numbers(torch.float32))
        ]
        rows = sum(c.num_rows for c in chunks)
        logits = numbers(rows, SMALL_VOCAB if rule == "processing" else VOCAB, scale=6.0)
        logits[::2] = logits[::2].round()  # ties
        logits[1::4] -= 8  # all negative
        sampled = RowSampler(sampler or operator_sampler())(logits, chunks)
        assert not sampled.errors
        assert min(sampled.tokens) >= 0
        found.update(np.array([c.request.seed for c in chunks], "<i8").tobytes())
        found.update(np.array(sampled.tokens, "<i8").tobytes())
        found.update(np.array(sampled.logprobs, "<f4").tobytes())
        for row, tops in sorted(sampled.tops.items()):
            found.update(np.array([row, *(token for token, _ in tops)], "<i8").tobytes())
            found.update(np.array([logprob for _, logprob in tops], "<f4").tobytes())
    return found.hexdigest()[:32]


def digests() -> dict[str, str]:
    return {f"{rule}: {RULES[rule]}": digest(rule) for rule in CASES}


if __name__ == "__main__":
    print(json.dumps(digests(), indent=1))
