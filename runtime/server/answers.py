"""Flights as OpenAI's objects: whole, or in chunks that are a function of the position alone.

Each token of a choice is at most one chunk, whenever it came, so that a stream which goes on elsewhere has
the bytes that this one would have had.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from llm42c.runtime.outputs import RequestOutput, TopLogprobs
from llm42c.runtime.server.codec import Codec
from llm42c.runtime.server.flights import Flight
from llm42c.runtime.server.tools import ToolUse

BEGINNING = 256  # characters that tell whether an output may be a call
Choice = dict[str, Any]


@dataclass(frozen=True)
class Head:
    """What every chunk of an answer repeats."""

    id: str
    created: int  # Unix time, s
    model: str
    contract: str

    def fields(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.contract,
        }


@dataclass(frozen=True)
class Form:
    """What of an answer is shown."""

    logprobs: int | None = None  # how many of the likeliest
    token_ids: bool = False
    usage: bool = False  # in a stream
    single: int = 1  # choices a prompt
    echo: tuple[str, ...] = ()  # of each choice: the prompt's text
    echoed: tuple[Flight | None, ...] = field(default=(), compare=False)  # and the prompt's log-probs


class Answer:
    """One response over flights, one a choice. Subclasses say what a choice looks like."""

    whole: str
    chunk: str

    def __init__(self, head: Head, codec: Codec, form: Form) -> None:
        self.head, self.form = head, form
        self._codec = codec
        opened = json.dumps(head.fields(self.chunk), ensure_ascii=False)[:-1]
        self._before = f'{opened}, "choices": ['
        self._after = '], "usage": null}' if form.usage else "]}"

    def complete(self, flights: list[Flight]) -> dict[str, Any]:
        choices = [self._finished(i, flight) | self._extras(flight) for i, flight in enumerate(flights)]
        fields = self.head.fields(self.whole)
        return fields | {"choices": choices, "usage": self.usage(flights)}

    def usage(self, flights: list[Flight]) -> dict[str, int]:
        prompts = sum(len(flight.job.prompt) for flight in flights[:: self.form.single])
        tokens = sum(len(flight.tokens) for flight in flights)
        return {"prompt_tokens": prompts, "completion_tokens": tokens, "total_tokens": prompts + tokens}

    # -- chunks ----------------------------------------------------------------------------------------------

    def opening(self, index: int) -> str | None:
        """What comes before the first token."""
        choice = self._opened(index)
        return None if choice is None else self._written(choice)

    def token(self, index: int, flight: Flight, position: int) -> str | None:
        """The chunk of one token; None where it shows nothing."""
        before, behind = self._visible(flight, position), self._visible(flight, position + 1)
        text = flight.text[before : max(before, behind)]
        if not text and self.form.logprobs is None and not self.form.token_ids:
            return None
        choice = self._piece(index, text, self._logprobs(flight, position, position + 1))
        if self.form.token_ids:
            choice["token_ids"] = [flight.tokens[position]]
        return self._written(choice)

    def closing(self, index: int, flight: Flight) -> str:
        """The end of a choice, with what text is left."""
        rest = flight.text[self._visible(flight, flight.shown) :]
        choice = self._closed(index, flight, rest) | self._extras(flight)
        if self.form.token_ids:
            choice["token_ids"] = flight.tokens[flight.shown :]
        return self._written(choice)

    def last(self, flights: list[Flight]) -> str | None:
        """The chunk of the usage, if it was asked for."""
        if not self.form.usage:
            return None
        fields = self.head.fields(self.chunk)
        return json.dumps(fields | {"choices": [], "usage": self.usage(flights)}, ensure_ascii=False)

    def _written(self, choice: Choice) -> str:
        return f"{self._before}{json.dumps(choice, ensure_ascii=False)}{self._after}"

    # -- of subclasses ---------------------------------------------------------------------------------------

    def _opened(self, index: int) -> Choice | None:
        return None

    def _piece(self, index: int, text: str, logprobs: Any) -> Choice:
        raise NotImplementedError

    def _closed(self, index: int, flight: Flight, rest: str) -> Choice:
        raise NotImplementedError

    def _finished(self, index: int, flight: Flight) -> Choice:
        raise NotImplementedError

    def _logprobs(self, flight: Flight, start: int, end: int) -> Any:
        raise NotImplementedError

    def _visible(self, flight: Flight, position: int) -> int:
        """Characters of the text that are shown behind so many tokens."""
        return flight.characters(position)

    def _extras(self, flight: Flight) -> dict[str, Any]:
        output = _output(flight)
        extras: dict[str, Any] = {}
        if output.receipt is not None:
            extras["receipt"] = output.receipt.to_json()
        if self.form.token_ids:
            extras["token_ids"] = flight.tokens
        return extras


class CompletionAnswer(Answer):
    whole = chunk = "text_completion"

    def _opened(self, index: int) -> Choice | None:
        if not self.form.echo:
            return None
        return self._piece(index, self.form.echo[index], self._prompt_logprobs(index))

    def _piece(self, index: int, text: str, logprobs: Any) -> Choice:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": None}

    def _closed(self, index: int, flight: Flight, rest: str) -> Choice:
        return self._piece(index, rest, None) | {"finish_reason": _output(flight).finish_reason}

    def _finished(self, index: int, flight: Flight) -> Choice:
        logprobs = self._logprobs(flight, 0, flight.shown)
        text = flight.text
        if self.form.echo:
            text, before = self.form.echo[index] + text, self._prompt_logprobs(index)
            if before is not None:
                offset = len(self.form.echo[index])
                logprobs["text_offset"] = [offset + at for at in logprobs["text_offset"]]
                logprobs = {name: before[name] + logprobs[name] for name in before}
        return self._piece(index, text, logprobs) | {"finish_reason": _output(flight).finish_reason}

    def _logprobs(self, flight: Flight, start: int, end: int) -> Any:
        if self.form.logprobs is None:
            return None
        tops = [self._top(flight.tops[i]) for i in range(start, end)]
        return {
            "tokens": [self._codec.token_text(t) for t in flight.tokens[start:end]],
            "token_logprobs": flight.logprobs[start:end],
            "top_logprobs": tops,
            "text_offset": [flight.characters(i) for i in range(start, end)],
        }

    def _prompt_logprobs(self, index: int) -> Any:
        """Of a prompt that is echoed: its first token has none."""
        flight = self.form.echoed[index] if self.form.echoed else None
        if flight is None:
            return None
        tokens = [*flight.job.prompt, *flight.tokens]
        texts = [self._codec.token_text(t) for t in tokens]
        offsets = [0]
        for token in tokens[:-1]:
            offsets.append(offsets[-1] + len(self._codec.decode([token])))
        return {
            "tokens": texts,
            "token_logprobs": [None, *flight.logprobs],
            "top_logprobs": [None, *map(self._top, flight.tops)],
            "text_offset": offsets,
        }

    def _top(self, top: TopLogprobs) -> dict[str, float]:
        return {self._codec.token_text(token): logprob for token, logprob in top[: self.form.logprobs or 0]}


class ChatAnswer(Answer):
    whole, chunk = "chat.completion", "chat.completion.chunk"

    def __init__(self, head: Head, codec: Codec, form: Form, tools: ToolUse | None) -> None:
        super().__init__(head, codec, form)
        self._tools = tools

    def _opened(self, index: int) -> Choice:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _piece(self, index: int, text: str, logprobs: Any) -> Choice:
        return {"index": index, "delta": {"content": text}, "logprobs": logprobs, "finish_reason": None}

    def _closed(self, index: int, flight: Flight, rest: str) -> Choice:
        calls = self._calls(index, flight)
        delta: dict[str, Any] = {"content": rest} if rest else {}
        if calls:
            delta = {"tool_calls": [{"index": i} | call for i, call in enumerate(calls)]}
        reason = self._reason(flight, calls)
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}

    def _finished(self, index: int, flight: Flight) -> Choice:
        calls = self._calls(index, flight)
        message: dict[str, Any] = {"role": "assistant", "content": flight.text, "refusal": None}
        if calls:
            message |= {"content": None, "tool_calls": calls}
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(flight, 0, flight.shown),
            "finish_reason": self._reason(flight, calls),
        }

    def _calls(self, index: int, flight: Flight) -> list[dict[str, Any]]:
        if self._tools is None:
            return []
        name = f"call_{self.head.id.rpartition('-')[2]}{index}"
        return self._tools.calls(flight.text, name)

    def _reason(self, flight: Flight, calls: list[dict[str, Any]]) -> Any:
        return "tool_calls" if calls else _output(flight).finish_reason

    def _visible(self, flight: Flight, position: int) -> int:
        end = flight.characters(position)
        if self._tools is not None and self._tools.holds(flight.text[: min(end, BEGINNING)]):
            return 0
        return end

    def _logprobs(self, flight: Flight, start: int, end: int) -> Any:
        if self.form.logprobs is None:
            return None
        content = []
        for i in range(start, end):
            tops = [self._one(t, lp) for t, lp in flight.tops[i][: self.form.logprobs]]
            content.append(self._one(flight.tokens[i], flight.logprobs[i]) | {"top_logprobs": tops})
        return {"content": content, "refusal": None}

    def _one(self, token: int, logprob: float) -> dict[str, Any]:
        data = self._codec.token_bytes(token)
        return {"token": self._codec.token_text(token), "logprob": logprob, "bytes": list(data)}


def _output(flight: Flight) -> RequestOutput:
    assert flight.output is not None
    return flight.output
