"""What every engine is compared on: lists of token ids, so that no tokenizer differs.

    mixed     32 prompts of 32, 64, 128 or 256 random tokens, 64 new tokens each
    decode    32 prompts of 16 random tokens, 128 new tokens each
    long      4 prompts of 1500 random tokens, 32 new tokens each

All greedy, end-of-sequence ignored. A workload of n requests is the first n of its list; the lists never
change, so that results stay comparable.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from llm42c.errors import ConfigError

_VOCABULARY = (100, 49000)  # the range that token ids are drawn from
_PROMPTS = 32


@dataclass(frozen=True)
class Workload:
    name: str
    new_tokens: int
    sizes: tuple[int, ...]  # numbers of requests that are measured
    length: Callable[[random.Random], int]

    def prompts(self, count: int) -> list[list[int]]:
        """The first `count` prompts. Raises ConfigError for more than there are."""
        if not 1 <= count <= _PROMPTS:
            raise ConfigError(f"a workload has 1 to {_PROMPTS} requests, not {count}")
        rng = random.Random(0)
        return [[rng.randrange(*_VOCABULARY) for _ in range(self.length(rng))] for _ in range(_PROMPTS)][
            :count
        ]


WORKLOADS = {
    w.name: w
    for w in (
        Workload("mixed", 64, (1, 8, 32), lambda rng: rng.choice([32, 64, 128, 256])),
        Workload("decode", 128, (1, 8, 32), lambda rng: 16),
        Workload("long", 32, (4,), lambda rng: 1500),
    )
}
