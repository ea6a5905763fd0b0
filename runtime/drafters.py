"""Who guesses what a request says next. A guess changes no bit, so a drafter may be anything.

When drafters are asked, and how much of a guess is used, is speculate.py's."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np

from llm42c.errors import ConfigError

AS_ENGINE = "engine"  # for a request: who drafts for the engine
SELF_FORMATS = ("q4_0", "q8_0", "q4_1", "q5_0", "q5_1")  # the first one unless another is named
LONGEST, SHORTEST = 4, 2  # n-grams that are looked up, the longest first; in a corpus none of the shortest
_BREAK = -1  # between the texts of a corpus
_PRIME, _MASK = np.uint64(0x9E3779B97F4A7C15), 2**64 - 1


@runtime_checkable
class Drafter(Protocol):
    """Proposes tokens; stateless, or made anew for each request (a class, or any callable that makes one)."""

    def propose(self, tokens: Sequence[int], k: int) -> Sequence[int]:
        """At most `k` token ids that may follow `tokens`, prompt and committed outputs of one request."""
        ...


@dataclass(frozen=True)
class SelfDraft:
    """The engine's own model, its weights quantised in memory, as the drafter."""

    format: str = SELF_FORMATS[0]

    def __str__(self) -> str:
        return f"self:{self.format}"


@dataclass(frozen=True)
class DraftModel:
    """Another model of the same vocabulary as the drafter: MODEL as the command line takes it, or a loaded
    Hugging Face decoder."""

    model: object

    def __str__(self) -> str:
        named = self.model if isinstance(self.model, str | Path) else type(self.model).__name__
        return f"model:{named}"


ModelSpec: TypeAlias = SelfDraft | DraftModel


class DrafterSource:
    """What makes the drafter of each request, and how it behaved so far.

    `make` is None where only a model drafts. With both, whichever promises more is asked.
    """

    def __init__(self, make: Callable[[], Drafter] | None, model: ModelSpec | None = None) -> None:
        self.make = make
        self.model = model
        self.ours = make is NgramDrafter or (isinstance(make, partial) and make.func is NgramDrafter)
        self.failures = 0  # in a row
        self.late: threading.Thread | None = None  # that was asked and did not come back in time
        self.seconds = 0.0  # of the last guess
        self.pause, self.resume = 0, 0  # steps without a question, and the step after them


class Corpus:
    """Texts that outputs may repeat, as token ids. Built once, for the drafters of any number of requests.

    It keeps 8 bytes a token, and 16 for each of two lengths of n-grams.
    """

    def __init__(self, texts: Iterable[Sequence[int]]) -> None:
        """Raises ConfigError for what are no token ids."""
        try:
            parts = [np.array([*text, _BREAK], dtype=np.int64) for text in texts]
        except (TypeError, ValueError, OverflowError):
            raise ConfigError("a corpus is texts, each a sequence of token ids") from None
        self._tokens = np.concatenate([np.array([_BREAK], dtype=np.int64), *parts])
        self._grams = {n: self._index(n) for n in range(LONGEST, SHORTEST, -1)}

    def _index(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Hashes of all n-grams, ascending, and where the token behind each stands."""
        count = max(0, len(self._tokens) - n)
        keys = np.zeros(count, dtype=np.uint64)
        for j in range(n):
            keys = keys * _PRIME + self._tokens[j : j + count].astype(np.uint64)
        order = np.argsort(keys, kind="stable")
        return keys[order], order + n

    def after(self, tokens: Sequence[int], k: int) -> tuple[list[int], int]:
        """At most `k` tokens that followed the last time that the newest of `tokens` stood in a text, and how
        many of them stood there."""
        for n, (keys, ends) in self._grams.items():
            newest = list(tokens[-n:])
            if len(newest) < n or k < 1:
                continue
            key = 0
            for token in newest:
                key = (key * int(_PRIME) + token) & _MASK
            at = int(np.searchsorted(keys, np.uint64(key), side="right")) - 1
            if at >= 0 and self._tokens[ends[at] - n : ends[at]].tolist() == newest:
                found = self._tokens[ends[at] : ends[at] + k].tolist()
                return found[: found.index(_BREAK)] if _BREAK in found else found, n
        return [], 0


class NgramDrafter:
    """What followed the last time that the newest tokens stood in the request's own prompt or output, else in
    a corpus.

    For one request: it indexes each token once. The longest match counts, of several the latest. Behind the
    end of the text a guess goes on with itself, so that a period is continued for as long as is asked.
    """

    def __init__(self, most: int | None = None, corpus: Corpus | None = None) -> None:
        """`most`: guesses are never longer."""
        self._most = most
        self._corpus = corpus
        self._after: dict[tuple[int, ...], int] = {}  # n-gram → where the token behind it stands
        self._indexed = 0
        self.match = 0  # tokens that the last guess rests on

    def propose(self, tokens: Sequence[int], k: int) -> list[int]:
        if len(tokens) < self._indexed:  # outputs were taken back
            self._after, self._indexed = {}, 0
        for end in range(max(self._indexed, SHORTEST), len(tokens)):
            for n in range(SHORTEST, min(LONGEST, end) + 1):
                self._after[tuple(tokens[end - n : end])] = end
        self._indexed = len(tokens)
        k = k if self._most is None else min(k, self._most)
        found, start = self._longest(tokens)
        if self._corpus is not None and found < LONGEST:
            guess, self.match = self._corpus.after(tokens, k)
            if guess and self.match > found:
                return guess
        self.match = found
        if not found:
            return []
        period = len(tokens) - start
        return [tokens[start + i % period] for i in range(k)]

    def _longest(self, tokens: Sequence[int]) -> tuple[int, int]:
        """How many of the newest tokens stood together before, and where the token behind them stands."""
        for n in range(min(LONGEST, len(tokens)), SHORTEST - 1, -1):
            start = self._after.get(tuple(tokens[len(tokens) - n :]))
            if start is not None:
                return n, start
        return 0, 0


Speculate = str | ModelSpec | Corpus | Drafter | Callable[[], Drafter] | None


def drafter_source(speculate: Speculate) -> DrafterSource | None:
    """None: nobody drafts. Raises ConfigError."""
    if speculate is None:
        return None
    if isinstance(speculate, str):
        return _named_source(speculate)
    if isinstance(speculate, Corpus):
        return DrafterSource(partial(NgramDrafter, corpus=speculate))
    if isinstance(speculate, ModelSpec):
        return DrafterSource(None, speculate)
    if isinstance(speculate, Drafter) and not isinstance(speculate, type):
        return DrafterSource(lambda: speculate)
    if callable(speculate):
        return DrafterSource(speculate)
    raise ConfigError(f"a drafter has a method propose(tokens, k); a {type(speculate).__name__} has none")


def _named_source(name: str) -> DrafterSource:
    kind, _, rest = name.partition(":")
    if kind == "auto" and rest.partition(":")[0] == "self":
        return DrafterSource(NgramDrafter, _self_draft(rest))
    if kind == "self":
        return DrafterSource(None, _self_draft(name))
    if kind == "model" and rest:
        return DrafterSource(None, DraftModel(rest))
    if name in ("auto", "ngram"):
        return DrafterSource(NgramDrafter)
    raise ConfigError(
        "speculate must be 'auto', 'ngram', 'self', 'auto:self', 'model:PATH', None or a drafter, "
        f"not {name!r}"
    )


def _self_draft(name: str) -> SelfDraft:
    """Of "self" or "self:FORMAT"."""
    _, colon, format = name.partition(":")
    if colon and format not in SELF_FORMATS:
        raise ConfigError(f"the format of {name!r} must be one of {', '.join(SELF_FORMATS)}")
    return SelfDraft(format or SELF_FORMATS[0])
