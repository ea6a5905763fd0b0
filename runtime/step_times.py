"""How long steps take, and whether drafts made them worth it: what decides about drafts is measured."""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass

GROWTH = 0.08  # of a step's time by a row, relative to the smallest measured one, until it is measured
SAMPLES, STALE = 5, 512  # steps of a size that are remembered, and for how many steps
TRIAL = 16  # steps with drafts before they are judged
FORGET = 0.95  # of what earlier steps showed, when the next one is seen
FIRST_REST, LONGEST_REST = 64, 4096  # steps without drafts where they were found to cost time


class StepTimes:
    """Seconds of steps by their number of tokens: measured, else estimated."""

    def __init__(self) -> None:
        self._samples: dict[int, deque[float]] = {}
        self._last: dict[int, int] = {}
        self._steps = 0

    def took(self, num_tokens: int, seconds: float) -> None:
        self._steps += 1
        self._samples.setdefault(num_tokens, deque(maxlen=SAMPLES)).append(seconds)
        self._last[num_tokens] = self._steps
        for size in [s for s, at in self._last.items() if self._steps - at > STALE]:
            del self._samples[size], self._last[size]

    def of(self, num_tokens: int) -> float:
        """Between two measured sizes a line; 0 if nothing is measured."""
        if num_tokens in self._samples:
            return statistics.median(self._samples[num_tokens])
        below = max((s for s in self._samples if s < num_tokens), default=None)
        above = min((s for s in self._samples if s > num_tokens), default=None)
        if below is None:
            return self.of(above) if above is not None else 0.0
        least = self.of(below)
        if above is None:
            return least * (1 + GROWTH * (num_tokens - below))
        share = (num_tokens - below) / (above - below)
        return least + share * max(0.0, self.of(above) - least)

    def settled(self, num_tokens: int) -> bool:
        """Whether one late step could no longer pass for a measurement."""
        return len(self._samples.get(num_tokens, ())) > SAMPLES // 2


@dataclass
class _Balance:
    saved: float = 0.0  # seconds, those of late weighing more
    steps: int = 0
    rest: int = 0
    until: int = 0  # no drafts before this step


class Ledger:
    """Whether steps with drafts took less time than as many tokens without, by how many requests shared them.

    Predictions may be wrong; where drafts have cost more than they saved they rest, each time for longer.
    """

    def __init__(self) -> None:
        self._balances: dict[int, _Balance] = {}
        self._turn = 0

    def rests(self, requests: int) -> bool:
        """Whether a step of so many requests should have no drafts; to be asked once a step."""
        self._turn += 1
        return self._turn < self._of(requests).until

    def took(self, requests: int, saved: float) -> None:
        """A step with drafts saved so many seconds."""
        balance = self._of(requests)
        balance.saved = balance.saved * FORGET + saved
        balance.steps += 1
        if balance.steps < TRIAL:
            return
        if balance.saved >= 0:
            balance.rest = 0
            return
        balance.rest = min(LONGEST_REST, max(FIRST_REST, 2 * balance.rest))
        balance.until = self._turn + balance.rest
        balance.saved, balance.steps = 0.0, 0

    def paid(self, requests: int, seconds: float) -> None:
        """A question that no draft came of took so long."""
        self._of(requests).saved -= seconds

    def _of(self, requests: int) -> _Balance:
        return self._balances.setdefault(requests.bit_length(), _Balance())
