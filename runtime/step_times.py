"""How long steps take, and whether drafts made them worth it: what decides about drafts is measured."""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass

GROWTH, LEAST_GROWTH = 0.08, 0.002  # of a step's time by a row, relative to the largest measured one
APART = 6  # rows between two sizes that show how time grows
SAMPLES, STALE = 5, 512  # steps of a size that are remembered, and for how many steps
TRIAL = 16  # steps before drafts are judged
TOLERANCE = 0.01  # of the time, that they may cost
FORGET = 0.97  # of what earlier steps showed, when the next one is seen
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
            return least + self._growth() * (num_tokens - below)
        share = (num_tokens - below) / (above - below)
        return least + share * max(0.0, self.of(above) - least)

    def _growth(self) -> float:
        """Seconds of a row beyond the largest measured size: as between it and the smallest, if these are far
        enough apart."""
        first, last = min(self._samples), max(self._samples)
        if last - first < APART:
            return GROWTH * self.of(last)
        return max(LEAST_GROWTH * self.of(last), (self.of(last) - self.of(first)) / (last - first))

    def settled(self, num_tokens: int) -> bool:
        """Whether one late step could no longer pass for a measurement."""
        return len(self._samples.get(num_tokens, ())) > SAMPLES // 2


@dataclass
class _Balance:
    saved: float = 0.0  # seconds, those of late weighing more
    spent: float = 0.0  # by the same steps
    steps: int = 0
    rest: int = 0
    until: int = 0  # no drafts before this step


class Ledger:
    """Whether drafts saved time, by how many requests shared a step.

    Predictions may be wrong; where drafts, and the questions for them, have cost more than they saved they
    rest, each time for longer.
    """

    def __init__(self) -> None:
        self._balances: dict[int, _Balance] = {}
        self._turn = 0

    def rests(self, requests: int) -> bool:
        """Whether a step of so many requests should have no drafts; to be asked once a step."""
        self._turn += 1
        return self._turn < self._of(requests).until

    def took(self, requests: int, saved: float, spent: float) -> None:
        """A step for which drafters were asked took `spent` seconds, and `saved` some; a question that no
        draft came of saves less than nothing."""
        balance = self._of(requests)
        balance.saved = balance.saved * FORGET + saved
        balance.spent = balance.spent * FORGET + spent
        balance.steps += 1
        if balance.steps < TRIAL or balance.saved >= 0:
            balance.rest = 0 if balance.saved > 0 else balance.rest
            return
        if balance.saved < -TOLERANCE * balance.spent:
            balance.rest = min(LONGEST_REST, max(FIRST_REST, 2 * balance.rest))
            balance.until = self._turn + balance.rest
            balance.saved, balance.spent, balance.steps = 0.0, 0.0, 0

    def _of(self, requests: int) -> _Balance:
        return self._balances.setdefault(requests.bit_length(), _Balance())
