"""Rows of a `generate` call as requests of the engine, driven until each has ended."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llm42c.errors import RequestError
from llm42c.runtime.drafters import AS_ENGINE, Speculate
from llm42c.runtime.hf.processors import Recorder, RowProcessor, committed_scores
from llm42c.runtime.hf.stopping import Stopping
from llm42c.runtime.outputs import RequestOutput
from llm42c.runtime.pump import Pump
from llm42c.runtime.sampling import SamplingParams


@dataclass
class Row:
    """One prompt on its way: what it asks for, and the committed tokens so far."""

    index: int
    prompt: list[int]
    params: SamplingParams
    stopping: Stopping
    processor: RowProcessor | None = None
    recorder: Recorder | None = None
    score_processors: list[Any] | None = None  # Hugging Face's whole list, when scores are returned
    speculate: Speculate = AS_ENGINE
    request_id: str = ""
    tokens: list[int] = field(default_factory=list)  # committed outputs
    logprobs: list[float] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)  # [V] each
    scores: list[Tensor] = field(default_factory=list)  # [V] each
    end: int | None = None  # how many outputs there are once the row has ended
    error: Exception | None = None

    def __post_init__(self) -> None:
        self._ids = torch.empty(1, len(self.prompt) + self.stopping.max_new_tokens, dtype=torch.int64)
        self._ids[0, : len(self.prompt)] = torch.tensor(self.prompt)

    def take(self, output: RequestOutput, beyond_end: bool) -> None:
        """Append an output's news. `beyond_end`: keep tokens that come after the row's end."""
        if output.error is not None:
            self.error = self._cause(output.error)
            return
        try:
            for token, logprob in zip(output.new_token_ids, output.new_logprobs, strict=True):
                if self.end is not None and not beyond_end:
                    break
                self._append(token, logprob)
        except Exception as error:  # of a stopping criterion
            self.error = error
        if output.finished and self.end is None:
            self.end = len(self.tokens)

    def _append(self, token: int, logprob: float) -> None:
        length = len(self.prompt) + len(self.tokens)
        self._ids[0, length] = token
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if self.recorder is not None:
            self._record(length)
        if self.end is None and self.stopping.criteria:
            scores = tuple(s.unsqueeze(0) for s in self.scores) if self.score_processors is not None else None
            if self.stopping.met(self._ids[:, : length + 1].clone(), scores):
                self.end = len(self.tokens)

    def _record(self, length: int) -> None:
        assert self.recorder is not None
        history = self.prompt + self.tokens
        raw = self.recorder.logits(history, len(self.tokens) - 1)
        self.logits.append(raw)
        if self.score_processors is not None:
            self.scores.append(committed_scores(self.score_processors, history, length, raw))

    def _cause(self, message: str) -> Exception:
        """The exception of the row's own processor, if that is what failed."""
        own = self.processor.error if self.processor is not None else None
        if own is not None and message == f"{type(own).__name__}: {own}":
            return own
        return RequestError(f"row {self.index}: {message}")


class Run:
    """Drives rows to their ends.

    `together`: no token ends a row for good, so that rows which have met a criterion go on until the last one
    has, as in Hugging Face.
    """

    def __init__(self, pump: Pump, rows: Sequence[Row], *, stream: bool, together: bool) -> None:
        self.rows = list(rows)
        self._pump = pump
        self._stream = stream
        self._together = together
        self._active: dict[str, Row] = {}

    def __enter__(self) -> Run:
        try:
            for row in self.rows:
                row.request_id = self._pump.submit(
                    row.prompt, row.params, stream=self._stream, speculate=row.speculate
                )
                self._active[row.request_id] = row
        except BaseException:
            self._abort(self._active)
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._abort(self._active)

    def drive(self) -> Iterator[list[Row]]:
        """Yields the rows with news after each step, until all have ended."""
        while self._active:
            changed = self.advance()
            yield changed

    def advance(self) -> list[Row]:
        """Wait for news; returns the rows concerned. A row with an error has left."""
        outputs = self._pump.poll(list(self._active))
        changed = []
        for output in outputs:
            row = self._active[output.request_id]
            row.take(output, self._together)
            changed.append(row)
            if output.finished or row.error is not None:
                self._leave([row], finished=output.finished)
        stopping = self.rows[0].stopping
        if stopping.expired and all(r.tokens or r.error for r in self.rows):
            self._expire()
        if not self._together:
            self._leave([r for r in self._active.values() if r.end is not None])
        elif all(len(r.tokens) >= (self.length or 0) for r in self.rows) and self.length is not None:
            self._leave(list(self._active.values()))
        return changed

    @property
    def active(self) -> bool:
        return bool(self._active)

    @property
    def length(self) -> int | None:
        """Outputs of the longest row, once every row has ended."""
        ends = [r.end for r in self.rows if r.error is None]
        return max((e for e in ends if e is not None), default=0) if None not in ends else None

    def _expire(self) -> None:
        shortest = min(len(r.tokens) for r in self.rows if r.error is None)
        for row in self._active.values():
            if row.end is None:
                row.end = len(row.tokens)
        if self._together:
            for row in self.rows:
                row.end = shortest

    def _leave(self, rows: list[Row], *, finished: bool = False) -> None:
        for row in rows:
            self._active.pop(row.request_id, None)
        if not finished:
            self._abort({row.request_id: row for row in rows})

    def _abort(self, rows: dict[str, Row]) -> None:
        self._pump.abort(list(rows))
