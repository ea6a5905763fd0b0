"""When drafters are asked, and how many of their tokens a step takes.

A step of more rows takes longer. How much longer is measured; how often a request's drafter is right is seen
by comparing each guess with what was committed later, whether or not the guess was used. A step takes the
number of drafts that promises the most tokens a second, which is none where they do not pay.
"""

from __future__ import annotations

import logging
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from llm42c.parallel.ranks import ALONE, Ranks
from llm42c.runtime.drafters import Drafter, DrafterSource, NgramDrafter
from llm42c.runtime.intake import check_tokens
from llm42c.runtime.stats import Stats

if TYPE_CHECKING:
    from llm42c.runtime.request import Request

_log = logging.getLogger(__name__)

LONGEST_DRAFT = 24
BUDGET_S = 0.05  # for one guess of a drafter that is not ours
MOST_FAILURES = 8  # in a row; then a drafter is not asked again
MARGIN = 1.03  # by how much drafts must be faster than none
GROWTH = 0.06  # of a step's time by a row, relative to the smallest measured one, until it is measured
SAMPLES, STALE = 5, 512  # steps of a size that are remembered, and for how many steps
MEMORY = 0.9  # of what a guess showed, when the next one is seen
FIRST_PAUSE, LONGEST_PAUSE = 32, 4096  # steps for which a drafter that did not pay is not asked


class StepTimes:
    """Seconds of committing fast steps by their number of tokens: measured, else estimated."""

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


@dataclass
class _Guesses:
    """One request's drafter, and what became of its guesses."""

    source: DrafterSource
    drafter: Drafter | None = None  # not made yet
    hits: float = 1.0
    misses: float = 0.6
    at: int = 0  # the position that the last guess begins at
    guess: list[int] = field(default_factory=list)

    @property
    def ours(self) -> bool:
        """Whether its guesses need no check and take no time."""
        return type(self.drafter) is NgramDrafter

    @property
    def chance(self) -> float:
        """That a guessed token is right if those before it are."""
        return self.hits / (self.hits + self.misses)

    def compare(self, tokens: Sequence[int]) -> None:
        """Look what became of the last guess."""
        for said, guessed in zip(tokens[self.at :], self.guess, strict=False):
            right = said == guessed
            self.hits = self.hits * MEMORY + right
            self.misses = self.misses * MEMORY + (not right)
            if not right:
                break
        self.guess = []


class Speculator:
    """The drafters of one engine's requests. Of several ranks the first decides."""

    def __init__(self, vocab_size: int, stats: Stats, ranks: Ranks = ALONE) -> None:
        self.times = StepTimes()
        self._vocab_size = vocab_size
        self._stats = stats
        self._ranks = ranks
        self._guesses: WeakKeyDictionary[Request, _Guesses] = WeakKeyDictionary()
        self._turn = 0

    def choose(
        self, requests: Sequence[Request], num_tokens: int, sizes: Sequence[int], room: int
    ) -> list[list[int]]:
        """Drafts for a committing step of `num_tokens` tokens without them, in one of the larger `sizes`.

        One for each of `requests`, which may be empty; `room` tokens together at most.
        """
        return self._decide(requests, room, lambda: self._choose(requests, num_tokens, sizes, room))

    def fill(self, requests: Sequence[Request], room: int) -> list[list[int]]:
        """Drafts for rows that are computed anyway: as many as there are, first come first served."""
        return self._decide(requests, room, lambda: self._fill(requests, room))

    def _decide(
        self, requests: Sequence[Request], room: int, decide: Callable[[], list[list[int]]]
    ) -> list[list[int]]:
        if room <= 0 or all(r.drafter_source is None for r in requests):
            return [[] for _ in requests]
        drafts: list[list[int]] = self._ranks.share(decide() if self._ranks.rank == 0 else None)
        return drafts

    def _fill(self, requests: Sequence[Request], room: int) -> list[list[int]]:
        drafts: list[list[int]] = [[] for _ in requests]
        for i, _, guess in self._ask(requests, room, BUDGET_S):
            drafts[i] = guess[:room]
            room -= len(drafts[i])
        return drafts

    def _choose(
        self, requests: Sequence[Request], num_tokens: int, sizes: Sequence[int], room: int
    ) -> list[list[int]]:
        drafts: list[list[int]] = [[] for _ in requests]
        base = self.times.of(sizes[0])
        if not base:
            return drafts  # nothing is measured yet
        found = {i: (g, guess) for i, g, guess in self._ask(requests, room, base)}
        steps = [(g.chance ** (j + 1), i) for i, (g, guess) in found.items() for j in range(len(guess))]
        steps.sort(key=lambda s: -s[0])
        del steps[room:]
        count = self._best_count(steps, num_tokens, sizes, base)
        gains = dict.fromkeys(found, 0.0)
        for chance, i in steps[:count]:
            drafts[i] = found[i][1][: len(drafts[i]) + 1]
            gains[i] += chance
        for i, (guesses, _) in found.items():
            self._judge(guesses, gains[i] * base / num_tokens)
        return drafts

    def _best_count(
        self, steps: list[tuple[float, int]], num_tokens: int, sizes: Sequence[int], base: float
    ) -> int:
        """How many of `steps`, best first, to take: those with which most tokens are committed a second."""
        best_rate, best = num_tokens / base * MARGIN, 0
        for size in sizes:
            count = min(len(steps), size - num_tokens)
            if count <= 0:
                continue
            gain = sum(chance for chance, _ in steps[:count])
            # Rows that would be padding cost nothing.
            rate = (num_tokens + gain) / self.times.of(size) * (MARGIN if size == sizes[0] else 1)
            if rate > best_rate:
                best_rate, best = rate, count
            if count == len(steps):
                break
        return best

    # -- drafters --------------------------------------------------------------------------------------------

    def _ask(
        self, requests: Sequence[Request], room: int, budget: float
    ) -> Iterator[tuple[int, _Guesses, list[int]]]:
        """Index, drafter and guess of each request that has a drafter, until `budget` seconds are spent."""
        self._turn += 1
        end = time.perf_counter() + budget
        for i, request in enumerate(requests):
            guesses = self._of(request)
            if guesses is not None and time.perf_counter() <= end:
                yield i, guesses, self._guess(request, guesses, min(LONGEST_DRAFT, room))

    def _of(self, request: Request) -> _Guesses | None:
        """The request's drafter, if it has one that may be asked."""
        source = request.drafter_source
        if source is None or source.failures >= MOST_FAILURES or source.resume > self._turn:
            return None
        guesses = self._guesses.get(request)
        if guesses is None:
            made = NgramDrafter() if source.make is NgramDrafter else None
            guesses = self._guesses[request] = _Guesses(source, made)
        return guesses

    def _guess(self, request: Request, guesses: _Guesses, k: int) -> list[int]:
        guesses.compare(request.history.tokens)
        pending, known = request.proposal.tokens, request.history.tokens
        if type(guesses.drafter) is NgramDrafter:
            guess = guesses.drafter.propose([*known, *pending] if pending else known, k)
        else:
            guess = self._in_time(guesses, [*known, *pending], k)
        guesses.at, guesses.guess = request.num_tokens, list(guess)
        return guesses.guess

    def _judge(self, guesses: _Guesses, worth: float) -> None:
        """A foreign drafter that takes more time than its guess is worth pauses, each time for longer."""
        source = guesses.source
        if guesses.ours or source.seconds <= worth:
            source.pause = 0
        else:
            source.pause = min(LONGEST_PAUSE, max(FIRST_PAUSE, 2 * source.pause))
            source.resume = self._turn + source.pause

    def _in_time(self, guesses: _Guesses, tokens: list[int], k: int) -> list[int]:
        """A foreign drafter's guess, checked; the first time it is made too. What fails or comes late is no
        guess, and is counted."""
        source = guesses.source
        if source.late is not None and source.late.is_alive():
            return []
        box: list[list[int] | BaseException] = []

        def ask() -> None:
            try:
                if guesses.drafter is None:
                    guesses.drafter = source.make()
                found = guesses.drafter.propose(tokens, k)
                box.append(check_tokens("a guess", found, self._vocab_size, k))
            except BaseException as error:  # even SystemExit: it is not this thread's to end anything
                box.append(error)

        thread = threading.Thread(target=ask, name="llm42-drafter", daemon=True)
        start = time.perf_counter()
        thread.start()
        thread.join(BUDGET_S)
        source.seconds = time.perf_counter() - start
        guess = box[0] if box else TimeoutError(f"no guess within {BUDGET_S} s")
        if isinstance(guess, BaseException):
            source.late = thread
            self._failed(source, guess)
            return []
        source.failures = 0
        return guess

    def _failed(self, source: DrafterSource, error: BaseException) -> None:
        self._stats.drafter_failures += 1
        source.failures += 1
        if source.failures == MOST_FAILURES:
            _log.warning(
                "a drafter failed %d times in a row and is not asked again: %s: %s",
                *(MOST_FAILURES, type(error).__name__, error),
            )
