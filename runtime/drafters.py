"""Who guesses what a request says next. A guess changes no bit, so a drafter may be anything.

When drafters are asked, and how much of a guess is used, is speculate.py's."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from llm42c.errors import ConfigError, RequestError

AS_ENGINE = "engine"  # for a request: who drafts for the engine
LONGEST, SHORTEST = 4, 2  # n-grams that are looked up, the longest first


@runtime_checkable
class Drafter(Protocol):
    """Proposes tokens; stateless, or made anew for each request (a class, or any callable that makes one)."""

    def propose(self, tokens: Sequence[int], k: int) -> Sequence[int]:
        """At most `k` token ids that may follow `tokens`, prompt and committed outputs of one request."""
        ...


Speculate = str | Drafter | Callable[[], Drafter] | None


class DrafterSource:
    """What makes the drafter of each request, and how it behaved so far."""

    def __init__(self, make: Callable[[], Drafter]) -> None:
        self.make = make
        self.failures = 0  # in a row
        self.late: threading.Thread | None = None  # that was asked and did not come back in time
        self.seconds = 0.0  # of the last guess
        self.pause, self.resume = 0, 0  # steps without a question, and the step after them


class NgramDrafter:
    """What followed the last time that the newest tokens stood in the request's own prompt or output.

    For one request: it indexes each token once. The longest match counts, of several the latest. Behind the
    end of the text a guess goes on with itself, so that a period is continued for as long as is asked.
    """

    def __init__(self, most: int | None = None) -> None:
        """`most`: guesses are never longer."""
        self._most = most
        self._after: dict[tuple[int, ...], int] = {}  # n-gram → where the token behind it stands
        self._indexed = 0

    def propose(self, tokens: Sequence[int], k: int) -> list[int]:
        if len(tokens) < self._indexed:  # outputs were taken back
            self._after, self._indexed = {}, 0
        for end in range(max(self._indexed, SHORTEST), len(tokens)):
            for n in range(SHORTEST, min(LONGEST, end) + 1):
                self._after[tuple(tokens[end - n : end])] = end
        self._indexed = len(tokens)
        for n in range(min(LONGEST, len(tokens)), SHORTEST - 1, -1):
            start = self._after.get(tuple(tokens[len(tokens) - n :]))
            if start is not None:
                period = len(tokens) - start
                k = k if self._most is None else min(k, self._most)
                return [tokens[start + i % period] for i in range(k)]
        return []


def drafter_source(speculate: Speculate) -> DrafterSource | None:
    """None: nobody drafts. Raises ConfigError."""
    if speculate is None:
        return None
    if isinstance(speculate, str):
        if speculate not in ("auto", "ngram"):
            raise ConfigError(f"speculate must be 'auto', 'ngram', None or a drafter, not {speculate!r}")
        return DrafterSource(NgramDrafter)
    if isinstance(speculate, Drafter) and not isinstance(speculate, type):
        return DrafterSource(lambda: speculate)
    if callable(speculate):
        return DrafterSource(speculate)
    raise ConfigError(f"a drafter has a method propose(tokens, k); a {type(speculate).__name__} has none")


def requested_source(speculate: Speculate) -> DrafterSource | None:
    """As `drafter_source`, for one request. Raises RequestError."""
    try:
        return drafter_source(speculate)
    except ConfigError as error:
        raise RequestError(str(error)) from None
