"""Who asks a server for what and when: Poisson arrivals, log-normal lengths, all of it by a seed.

Lengths are given by their medians and 90th percentiles, those that Sarathi-Serve (OSDI '24) prints for its
two traces: conversations of ShareGPT, and summaries of arXiv's papers. Only lengths are like theirs: prompts
are random tokens, so that no two share a prefix.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from llm42c.errors import ConfigError
from llm42c.runtime.bench.contenders import spread

_VOCABULARY = (100, 49000)  # the range that token ids are drawn from
_P90 = 1.2815515655446004  # of the standard normal distribution


@dataclass(frozen=True)
class LogNormal:
    """Lengths in tokens."""

    median: float
    p90: float

    def draw(self, rng: random.Random, scale: float) -> int:
        sigma = math.log(self.p90 / self.median) / _P90
        return max(1, round(scale * rng.lognormvariate(math.log(self.median), sigma)))


@dataclass(frozen=True)
class Trace:
    prompt: LogNormal
    output: LogNormal


TRACES = {
    "sharegpt": Trace(LogNormal(1730, 5696), LogNormal(415, 834)),
    "arxiv": Trace(LogNormal(7059, 12985), LogNormal(208, 371)),
}


@dataclass(frozen=True)
class Arrival:
    """One request: `at_s` seconds after the first could come, `new_tokens` long whatever comes out."""

    at_s: float
    prompt: tuple[int, ...]
    new_tokens: int
    deterministic: bool


def arrivals(
    trace: str,
    count: int,
    qps: float,
    percent: int,
    *,
    seed: int = 0,
    contents: int = 0,
    scale: float = 1.0,
    max_model_len: int = 8192,
    vocabulary: tuple[int, int] = _VOCABULARY,
) -> list[Arrival]:
    """`count` requests, `percent` in a hundred of them deterministic; `qps` may be infinite: all at once.

    Times and lengths are functions of `seed` alone, and times of different `qps` are the same but for their
    unit. `contents`: other numbers give other tokens, so that a server that is asked again has none of them
    in its prefix cache. Lengths are multiplied by `scale`, then what exceeds `max_model_len` is cut, outputs
    at half of it. Raises ConfigError for an unknown trace.
    """
    lengths = _trace(trace)
    times, sizes = random.Random(f"{seed} times"), random.Random(f"{seed} {trace} lengths")
    tokens = random.Random(f"{seed} {contents} tokens")
    made, at_s = [], 0.0
    for i in range(count):
        gap = times.expovariate(1.0)
        at_s += 0.0 if math.isinf(qps) else gap / qps
        new_tokens = min(lengths.output.draw(sizes, scale), max_model_len // 2)
        size = min(lengths.prompt.draw(sizes, scale), max_model_len - new_tokens)
        prompt = tuple(tokens.choices(range(*vocabulary), k=size))
        made.append(Arrival(at_s, prompt, new_tokens, spread(i, percent)))
    return made


def check_traces(names: Sequence[str]) -> None:
    """Raises ConfigError for one that does not exist."""
    for name in names:
        _trace(name)


def _trace(name: str) -> Trace:
    if name not in TRACES:
        raise ConfigError(f"no trace {name!r}: there are {', '.join(TRACES)}")
    return TRACES[name]
