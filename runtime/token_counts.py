"""Which tokens a request's history holds and how often, in time linear in what is new since the last row."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from llm42c.runtime.request import Request


class TokenCounts:
    """A multiset of tokens as arrays: `ids` [S] int64, each once, and `times` [S] float32. Unordered."""

    __slots__ = ("_ids", "_place", "_size", "_times")

    def __init__(self) -> None:
        self._ids = np.zeros(16, dtype=np.int64)
        self._times = np.zeros(16, dtype=np.float32)
        self._size = 0
        self._place: dict[int, int] = {}  # token → its index in the arrays

    @property
    def ids(self) -> npt.NDArray[np.int64]:
        return self._ids[: self._size]

    @property
    def times(self) -> npt.NDArray[np.float32]:
        return self._times[: self._size]

    def add(self, token: int) -> None:
        place = self._place.get(token)
        if place is not None:
            self._times[place] += 1
            return
        if self._size == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._times = np.concatenate([self._times, np.zeros_like(self._times)])
        self._ids[self._size], self._times[self._size] = token, 1
        self._place[token] = self._size
        self._size += 1

    def remove(self, token: int) -> None:
        """Take out one occurrence of a token that is there."""
        place = self._place[token]
        self._times[place] -= 1
        if self._times[place] == 0:
            del self._place[token]
            self._size -= 1
            last = int(self._ids[self._size])
            if last != token:
                self._ids[place], self._times[place] = last, self._times[self._size]
                self._place[last] = place


class RowCounts:
    """Counts of a request's tokens from position `start` on, as a row of any length sees them.

    Rows mostly see one token more than the row before. Proposals that were counted may have been replaced
    since: everything that was not committed when it was counted is taken out and counted anew.
    """

    __slots__ = ("_certain", "_counted", "_counts", "_start")

    def __init__(self, start: int) -> None:
        self._start = start
        self._counts = TokenCounts()
        self._counted: list[int] = []
        self._certain = 0  # leading counted tokens that were committed

    def at(self, request: Request, length: int) -> TokenCounts:
        """The counts of tokens [start, length) of committed + proposed; valid until the next call."""
        length = max(length, self._start)
        stable = min(self._certain, length - self._start)
        while len(self._counted) > stable:
            self._counts.remove(self._counted.pop())
        for token in request.token_slice(self._start + stable, length):
            self._counts.add(token)
            self._counted.append(token)
        self._certain = min(len(request.history.tokens), length) - self._start
        return self._counts

    def take_back(self, length: int) -> None:
        """Only the first `length` tokens of the request are still certain."""
        self._certain = min(self._certain, max(0, length - self._start))
