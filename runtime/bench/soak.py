"""The soak: many requests of all kinds arriving at random, each compared with its solo run.

Deterministic requests of random lengths and sampling arrive at random times among ordinary ones; some are
aborted midway; KV pages are scarce, so that requests are preempted. What an aborted request delivered must
be a prefix of its solo run.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from llm42c.runtime.engine import Engine
from llm42c.runtime.sampling import SamplingParams

Progress = Callable[[str, int, int], None]
Answer = tuple[list[int], list[float]]  # tokens, log-probs


@dataclass(frozen=True)
class Request:
    prompt: list[int]
    params: SamplingParams
    deterministic: bool
    arrival: int  # step before which it is submitted
    abort_after: int | None  # tokens after which it is aborted


@dataclass
class SoakResult:
    """`differ`: indices of requests whose delivered tokens or log-prob bits are not those of the solo run."""

    deterministic: int
    ordinary: int
    aborted: int
    tokens: int
    differ: list[int]
    seconds_solo: float
    seconds_soak: float
    stats: dict[str, Any] = field(default_factory=dict)

    def as_row(self) -> dict[str, Any]:
        names = ("rollbacks", "preemptions", "prefix_hits", "audits", "revocations", "certified_share")
        return {
            "deterministic": self.deterministic,
            "ordinary": self.ordinary,
            "aborted": self.aborted,
            "tokens": self.tokens,
            "differ": len(self.differ),
            "seconds_solo": round(self.seconds_solo, 1),
            "seconds_soak": round(self.seconds_soak, 1),
            **{name: round(self.stats[name], 4) for name in names},
        }


def make_requests(
    count: int,
    new_tokens: int,
    *,
    vocab_size: int,
    seed: int = 0,
    longest_prompt: int = 400,
    ordinary: float = 0.3,
) -> list[Request]:
    """`count` deterministic requests and, among them, a share of `ordinary` ones.

    A third of the prompts share a prefix with an earlier one, a tenth of all requests are aborted, half are
    sampled.
    """
    rng = random.Random(seed)
    requests: list[Request] = []
    step = made = 0
    while made < count:
        step += rng.choice((0, 0, 1, 4, 16))
        deterministic = rng.random() >= ordinary
        made += deterministic
        prompt = [rng.randrange(vocab_size) for _ in range(rng.randint(1, longest_prompt))]
        if requests and rng.random() < 1 / 3:
            base = rng.choice(requests).prompt
            prompt = (base[: rng.randint(1, len(base))] + prompt)[:longest_prompt]
        abort_after = rng.randint(1, new_tokens) if rng.random() < 0.1 else None
        requests.append(Request(prompt, _params(rng, new_tokens), deterministic, step, abort_after))
    return requests


def _params(rng: random.Random, new_tokens: int) -> SamplingParams:
    sampling: dict[str, Any] = {}
    if rng.random() < 0.5:
        sampling = {"temperature": rng.choice((0.5, 0.8, 1.0, 1.5)), "seed": rng.randrange(2**62)}
        sampling |= rng.choice(
            ({}, {"top_k": 50}, {"top_p": 0.9}, {"min_p": 0.02}, {"top_k": 200, "top_p": 0.95})
        )
    if rng.random() < 0.25:
        sampling |= {"repetition_penalty": 1.2, "presence_penalty": 0.3}
    return SamplingParams(max_tokens=new_tokens, ignore_eos=True, detokenize=False, **sampling)


def run_soak(solo: Engine, engine: Engine, requests: Sequence[Request], progress: Progress) -> SoakResult:
    """Run the deterministic requests one by one on `solo`, then all of them on `engine`, and compare."""
    start = time.perf_counter()
    chosen = [i for i, r in enumerate(requests) if r.deterministic]
    expected: dict[int, Answer] = {}
    for n, i in enumerate(chosen):
        progress("solo", n, len(chosen))
        (output,) = solo.generate([requests[i].prompt], requests[i].params)
        expected[i] = (output.token_ids, output.logprobs)
    middle = time.perf_counter()
    got = _arrive(engine, requests, progress)
    end = time.perf_counter()
    differ = [i for i in chosen if not _agrees(requests[i], got[i], expected[i])]
    return SoakResult(
        deterministic=len(chosen),
        ordinary=len(requests) - len(chosen),
        aborted=sum(r.abort_after is not None for r in requests),
        tokens=sum(len(tokens) for tokens, _ in got.values()),
        differ=differ,
        seconds_solo=middle - start,
        seconds_soak=end - middle,
        stats=engine.stats().as_dict(),
    )


def _arrive(engine: Engine, requests: Sequence[Request], progress: Progress) -> dict[int, Answer]:
    """What each request delivered, as its stream said it."""
    delivered: dict[int, Answer] = {i: ([], []) for i in range(len(requests))}
    step = submitted = finished = 0
    while submitted < len(requests) or engine.has_unfinished():
        while submitted < len(requests) and requests[submitted].arrival <= step:
            request = requests[submitted]
            engine.submit(
                request.prompt, request.params, deterministic=request.deterministic, request_id=str(submitted)
            )
            submitted += 1
        for output in engine.step():
            i = int(output.request_id)
            delivered[i][0].extend(output.new_token_ids)
            delivered[i][1].extend(output.new_logprobs)
            limit = requests[i].abort_after
            if output.finished:
                finished += 1
            elif limit is not None and len(delivered[i][0]) >= limit:
                finished += engine.abort(output.request_id)
        step += 1
        progress("soak", finished, len(requests))
    return delivered


def _agrees(request: Request, got: Answer, expected: Answer) -> bool:
    """Equal as exact float32 values and tokens; an aborted request must hold a prefix."""
    count = len(got[0])
    complete = count == len(expected[0]) or (request.abort_after is not None and count >= request.abort_after)
    return complete and got[0] == expected[0][:count] and got[1] == expected[1][:count]
