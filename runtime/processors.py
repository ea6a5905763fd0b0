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

INCOMPLETE = "\ufffd"  # what decoders show for bytes that are no character (yet)
MAX_BYTES = 4  # of a character
LONG_WINDOW, SHORT_WINDOW = 8, 3  # tokens at which a window is shortened, and to which
STUCK_WINDOW = 32  # tokens that a window never exceeds by much
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

    The text is a function of the sequence of tokens pushed, however they were grouped into steps. A character
    shows once its last byte is there. A token costs one decode of the last few tokens, and now and then
    another one that shortens them.
    """

    __slots__ = ("_decode", "_decoded", "_hold", "_shown", "_stops", "_window", "cut", "text")

    def __init__(self, decode: Decode, stops: tuple[str, ...]) -> None:
        self._decode = decode
        self._stops = stops
        self._hold = max((len(s) for s in stops), default=1) - 1
        self._window: list[int] = []  # the last tokens: what a next one's text may depend on
        self._decoded = ""  # the text of the window
        self._shown = 0  # how many characters of it `text` has
        self.text = ""
        self.cut: tuple[int, int] | None = None  # where the last matched stop string begins and ends

    @property
    def stops(self) -> bool:
        """Whether it looks for stop strings."""
        return bool(self._stops)

    def push(self, token: int) -> str | None:
        """Take one more token; returns the stop string that it completes, if any."""
        before = self._decoded
        self._window.append(token)
        self._decoded = self._decode(self._window)
        stuck = len(self._window) > STUCK_WINDOW
        if self._decoded == before and not before.endswith(INCOMPLETE):
            if before or stuck:
                self._window.pop()  # a token without text, such as a skipped special one
            return None
        whole = len(self._decoded.rstrip(INCOMPLETE))
        if whole <= self._shown and stuck:  # what so many tokens did not complete is no character
            whole = len(self._decoded) - MAX_BYTES + 1
        if whole <= self._shown:
            return None
        old = len(self.text)
        self.text += self._decoded[self._shown : whole]
        self._shown = whole
        if len(self._window) >= LONG_WINDOW:
            self._shorten()
        return self._match(old)

    def _shorten(self) -> None:
        """Drop leading tokens whose absence changes nothing in the text of the others."""
        unseen = len(self._decoded) - self._shown
        for keep in range(SHORT_WINDOW, len(self._window)):
            window = self._window[-keep:]
            decoded = self._decode(window)
            # It may begin inside a character. Some text must be left that is shown: whether a next token's
            # leading space counts depends on what stands before it.
            tail = decoded.lstrip(INCOMPLETE) or decoded
            if len(tail) > unseen and self._decoded.endswith(tail):
                self._window, self._decoded, self._shown = window, decoded, len(decoded) - unseen
                return

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
        self.text += self._decoded[self._shown :]
        self._shown = len(self._decoded)

    def copy(self) -> TextState:
        twin = TextState(self._decode, self._stops)
        twin._window, twin._decoded, twin._shown = list(self._window), self._decoded, self._shown
        twin.text, twin.cut = self.text, self.cut
        return twin

    def restart(self, tokens: Sequence[int]) -> TextState:
        """A state that has seen exactly `tokens`."""
        fresh = TextState(self._decode, self._stops)
        for token in tokens:
            fresh.push(token)
        return fresh
