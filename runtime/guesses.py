"""What drafters guessed for each request, and how often they were right. A drafter of a user is asked in a
thread of its own, within a budget, and what it says is checked."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from llm42c.runtime.drafters import LONGEST, Drafter, DrafterSource, NgramDrafter
from llm42c.runtime.intake import check_tokens
from llm42c.runtime.stats import Stats

if TYPE_CHECKING:
    from llm42c.runtime.request import Request

_log = logging.getLogger(__name__)

BUDGET_S = 0.05  # for one guess of a drafter that is not ours
MOST_FAILURES = 8  # in a row; then a drafter is not asked again
MEMORY, LONG_MEMORY = 0.9, 0.99  # of what a guess showed, when the next is seen: of a request, of all
PRIOR = 2.0  # guesses that a new request's expectation weighs as much as
FIRST_PAUSE, LONGEST_PAUSE = 32, 4096  # steps for which a drafter that did not pay is not asked


@dataclass
class Record:
    """Guesses of one kind for one request, and what became of them, by how long the match was that they
    rest on (0: on none)."""

    hits: list[float] = field(default_factory=lambda: [0.6 * PRIOR] * (LONGEST + 1))
    misses: list[float] = field(default_factory=lambda: [0.4 * PRIOR] * (LONGEST + 1))
    at: int = 0  # the position that the last guess begins at
    guess: list[int] = field(default_factory=list)
    match: int = 0

    @property
    def chance(self) -> float:
        """That a token guessed as the last one was is right if those before it are."""
        return self.hits[self.match] / (self.hits[self.match] + self.misses[self.match])

    @classmethod
    def like(cls, other: Record) -> Record:
        """A new one that expects what `other` has seen."""
        chances = [h / (h + m) for h, m in zip(other.hits, other.misses, strict=True)]
        return cls([PRIOR * c for c in chances], [PRIOR * (1 - c) for c in chances])

    def note(self, match: int, results: Sequence[bool], memory: float = MEMORY) -> None:
        for right in results:
            self.hits[match] = self.hits[match] * memory + right
            self.misses[match] = self.misses[match] * memory + (not right)

    def say(self, at: int, guess: Sequence[int], match: int = 0) -> list[int]:
        self.at, self.guess, self.match = at, list(guess), match
        return self.guess

    def compare(self, tokens: Sequence[int]) -> list[bool]:
        """Look what became of the last guess: which of its tokens were right, up to the first wrong one."""
        results = []
        for said, guessed in zip(tokens[self.at :], self.guess, strict=False):
            results.append(said == guessed)
            if said != guessed:
                break
        self.note(self.match, results)
        self.guess = []
        return results


@dataclass
class Guesses:
    """One request's drafter, and what became of its guesses."""

    source: DrafterSource
    drafter: Drafter | None = None  # not made yet
    record: Record = field(default_factory=Record)

    @property
    def ours(self) -> bool:
        """Whether its guesses need no check and take no time."""
        return type(self.drafter) is NgramDrafter


class Asker:
    """Asks the drafters of requests, each for its own request."""

    def __init__(self, vocab_size: int, stats: Stats) -> None:
        self._vocab_size = vocab_size
        self._stats = stats
        self._guesses: WeakKeyDictionary[Request, Guesses] = WeakKeyDictionary()
        self._all = Record()  # of our drafters' guesses for all requests

    def drafter_of(self, request: Request, turn: int) -> Guesses | None:
        """The request's drafter, if it has one that may be asked."""
        source = request.drafter_source
        if source is None or source.make is None:
            return None
        if source.failures >= MOST_FAILURES or source.resume > turn:
            return None
        guesses = self._guesses.get(request)
        if guesses is None:
            made = source.make() if source.ours else None
            record = Record.like(self._all) if source.ours else Record()
            guesses = self._guesses[request] = Guesses(source, made, record)
        return guesses

    def ask(self, request: Request, guesses: Guesses, k: int) -> list[int]:
        match = guesses.record.match
        results = guesses.record.compare(request.history.tokens)
        if guesses.ours:
            self._all.note(match, results, LONG_MEMORY)
        pending, known = request.proposal.tokens, request.history.tokens
        match = 0
        if isinstance(guesses.drafter, NgramDrafter) and guesses.ours:
            guess = guesses.drafter.propose([*known, *pending] if pending else known, k)
            match = guesses.drafter.match
        else:
            guess = self._in_time(guesses, [*known, *pending], k)
        return guesses.record.say(request.num_tokens, guess, match)

    def judge(self, guesses: Guesses, worth: float, turn: int) -> None:
        """A foreign drafter that takes more time than its guess is worth pauses, each time for longer."""
        source = guesses.source
        if guesses.ours or source.seconds <= worth:
            source.pause = 0
        else:
            source.pause = min(LONGEST_PAUSE, max(FIRST_PAUSE, 2 * source.pause))
            source.resume = turn + source.pause

    def _in_time(self, guesses: Guesses, tokens: list[int], k: int) -> list[int]:
        """A foreign drafter's guess, checked; the first time it is made too. What fails or comes late is no
        guess, and is counted."""
        source = guesses.source
        if source.late is not None and source.late.is_alive():
            return []
        box: list[list[int] | BaseException] = []

        def ask() -> None:
            try:
                if guesses.drafter is None:
                    assert source.make is not None
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
