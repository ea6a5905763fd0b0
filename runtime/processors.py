"""What a request's own parameters do to its logits and its text. Pure functions of the row and the token
history, so a rollback has nothing to undo; `TextState` is copied before it may see proposals.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from torch import Tensor

from llm42c.runtime.token_counts import TokenCounts

if TYPE_CHECKING:
    from llm42c.runtime.request import Request

_WINDOW = 12  # tokens that are decoded together, so that each is seen beside its neighbours
Decode = Callable[[list[int]], str]
FloatRow = npt.NDArray[np.float32]


def process_row(request: Request, row: Tensor, length: int) -> None:
    """Rewrite `row` ([V] fp32 on the CPU, contiguous) in place into the logits to sample from.

    `length`: of the history, prompt + outputs (committed, then pending) before this row's token. Order:
    repetition penalty, frequency and presence penalty, logit bias, the user's processors, min_tokens. Raises
    whatever a user's processor raises.
    """
    params = request.params
    values = row.numpy()
    if params.repetition_penalty != 1.0:
        apply_repetition_penalty(values, request.seen.at(request, length), params.repetition_penalty)
    if params.frequency_penalty or params.presence_penalty:
        output = request.emitted.at(request, length)
        apply_count_penalties(values, output, params.frequency_penalty, params.presence_penalty)
    if params.logit_bias:
        ids = np.array(list(params.logit_bias), dtype=np.int64)
        values[ids] += np.array(list(params.logit_bias.values()), dtype=np.float32)
    for processor in params.logits_processors:
        row.copy_(_checked(processor(request.token_slice(0, length), row.clone()), row.shape[0]))
    if length - request.prompt_len < params.min_tokens:
        values[list(request.stop_ids)] = -np.inf


def apply_repetition_penalty(row: FloatRow, history: TokenCounts, penalty: float) -> None:
    """In place on `row` [V]: positive logits of seen tokens are divided, others multiplied (CTRL, section
    4.1).
    """
    values = row[history.ids]
    row[history.ids] = np.where(values > 0, values / np.float32(penalty), values * np.float32(penalty))


def apply_count_penalties(row: FloatRow, output: TokenCounts, frequency: float, presence: float) -> None:
    """In place on `row` [V]: minus count * frequency, minus presence, for tokens in the output."""
    ids = output.ids
    row[ids] = row[ids] - output.times * np.float32(frequency) - np.float32(presence)


def _checked(row: Tensor, vocab_size: int) -> Tensor:
    if not isinstance(row, Tensor) or row.shape != (vocab_size,) or not row.dtype.is_floating_point:
        raise TypeError(f"a logits processor must return a float tensor of shape [{vocab_size}]")
    return row


class TextState:
    """Text of the outputs so far, decoded token by token, and the stop strings looked for in it.

    The text is a function of the sequence of tokens pushed, however they were grouped into steps. A token
    that ends inside a multi-byte character shows once the character is complete.

    A token costs one decoding of the last few tokens: what they show is remembered, and the window gives up
    its beginning only when it has grown to `_WINDOW` tokens.
    """

    __slots__ = ("_decode", "_hold", "_last", "_read", "_shown", "_stops", "_window", "cut", "text")

    def __init__(self, decode: Decode, stops: tuple[str, ...]) -> None:
        self._decode = decode
        self._stops = stops
        self._hold = max((len(s) for s in stops), default=1) - 1
        self._window: list[int] = []  # the last tokens whose text may still change
        self._read = 0  # how many of them the text already shows
        self._last = 0  # where in the window the newest piece of text begins
        self._shown = ""  # the text of what is read
        self.text = ""
        self.cut: tuple[int, int] | None = None  # where the last matched stop string begins and ends

    def push(self, token: int) -> str | None:
        """Take one more token; returns the stop string that it completes, if any."""
        self._window.append(token)
        text = self._decode(self._window)
        if len(text) <= len(self._shown) or text.endswith("\ufffd"):
            return None
        old = len(self.text)
        self.text += text[len(self._shown) :]
        self._last, self._read, self._shown = self._read, len(self._window), text
        if self._read >= _WINDOW:
            del self._window[: self._last]
            self._last, self._read = 0, len(self._window)
            self._shown = self._decode(self._window)
        return self._match(old)

    def _match(self, old: int) -> str | None:
        """The leftmost stop string that ends after position `old`."""
        found: tuple[int, str] | None = None
        for stop in self._stops:
            at = self.text.find(stop, max(0, old - len(stop) + 1))
            if at >= 0 and (found is None or at < found[0]):
                found = (at, stop)
        if found is None:
            return None
        self.cut = (found[0], found[0] + len(found[1]))
        return found[1]

    def safe_length(self) -> int:
        """Characters that no later stop string can take back."""
        return max(0, len(self.text) - self._hold)

    def finish(self, stopped: bool, include_stop: bool) -> None:
        """The request ended: cut at the stop string, or show what an incomplete character hides."""
        if stopped and self.cut is not None:
            self.text = self.text[: self.cut[1] if include_stop else self.cut[0]]
            return
        if len(self._window) > self._read:
            self.text += self._decode(self._window)[len(self._shown) :]

    def copy(self) -> TextState:
        twin = TextState(self._decode, self._stops)
        twin._window, twin._read = list(self._window), self._read
        twin._last, twin._shown = self._last, self._shown
        twin.text, twin.cut = self.text, self.cut
        return twin

    def restart(self, tokens: Sequence[int]) -> TextState:
        """A state that has seen exactly `tokens`."""
        fresh = TextState(self._decode, self._stops)
        for token in tokens:
            fresh.push(token)
        return fresh
