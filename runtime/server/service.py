"""What the routes do: bodies to jobs, flights to answers."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from llm42c.errors import RequestError
from llm42c.runtime import sealed
from llm42c.runtime.engine import Engine
from llm42c.runtime.intake import check_tokens
from llm42c.runtime.outputs import RequestOutput
from llm42c.runtime.sampling import SamplingParams
from llm42c.runtime.server import chat
from llm42c.runtime.server.answers import Answer, ChatAnswer, CompletionAnswer, Form, Head
from llm42c.runtime.server.codec import Codec
from llm42c.runtime.server.errors import ApiError
from llm42c.runtime.server.flights import Flight, Flights, Reading
from llm42c.runtime.server.jobs import Job, named_refusal, sampling_params
from llm42c.runtime.server.metrics import Metrics
from llm42c.runtime.server.relayed import RELAYED, Relayed
from llm42c.runtime.server.schema import (
    ChatRequest,
    CompletionRequest,
    Generation,
    Prompts,
)
from llm42c.runtime.server.settings import Settings
from llm42c.runtime.server.stream import EventId, Events, EventStream, first_of, gone

T = TypeVar("T")
CLIENT_GONE = 499  # nobody reads it


@dataclass(frozen=True)
class _Asked:
    """A request to generate, read: what is computed and how it is shown."""

    body: Generation
    jobs: list[Job]  # one a choice
    form: Form
    prefix: str  # of the answer's id
    prompt: str  # the parameter that has the prompt
    answer: Callable[[Head], Answer]


class Service:
    """One engine behind HTTP. Made outside the event loop, used in it."""

    def __init__(self, engine: Engine, tokenizer: Any, settings: Settings) -> None:
        """Raises ConfigError for a model without a tokenizer."""
        self.settings = settings
        self.codec = Codec(tokenizer, engine.limits.vocab_size)
        self.metrics = Metrics(engine)
        self.flights = Flights(engine, settings, self.codec.decode, self.metrics)
        self.jobs = self.flights.jobs
        self.contract = engine.contract

    def start(self) -> None:
        """In the event loop that will use it."""
        self.flights.start()

    def drain(self) -> None:
        """Take no more; what was accepted goes on until `hand_over`."""
        self.flights.draining = True

    def hand_over(self) -> None:
        self.flights.hand_over()

    async def close(self) -> None:
        await self.flights.close()
        self.codec.close()

    # -- generation ------------------------------------------------------------------------------------------

    async def complete(self, body: CompletionRequest, request: Request) -> Response:
        self._check(body)
        if body.best_of not in (None, body.n):
            raise ApiError(400, "best_of must be n: no choice is made among more", "best_of")
        if body.max_tokens == 0 and not body.echo:
            raise ApiError(400, "max_tokens must be at least 1 without echo", "max_tokens")
        prompts = await self.codec.run(self.prompts, body.prompt, "prompt")
        self.count(len(prompts) * body.n)
        jobs = await self._jobs(body, prompts, max(body.max_tokens, 1), body.logprobs, "prompt")
        if body.max_tokens == 0:
            jobs = [dataclasses.replace(job, empty=True) for job in jobs]
        form = Form(body.logprobs, body.return_token_ids, _usage(body), body.n)
        if body.echo:
            texts = await self.codec.run(self._texts, body.prompt, prompts)
            form = dataclasses.replace(form, echo=_each(texts, body.n))
            if body.logprobs is not None:
                echoed = await self._echoed(prompts, body)
                form = dataclasses.replace(form, echoed=_each(echoed, body.n))

        def answer(head: Head) -> Answer:
            return CompletionAnswer(head, self.codec, form)

        return await self._respond(request, _Asked(body, jobs, form, "cmpl", "prompt", answer))

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        self._check(body)
        self.count(body.n)
        made = await self.codec.run(chat.read, body, self.codec)
        if made.draft is not None and not self._deterministic(body):
            raise ApiError(400, "prediction is for deterministic requests", "prediction")
        if made.json_schema is not None and body.json_schema is not None:
            message = "json_schema and response_format or tool_choice exclude each other"
            raise ApiError(400, message, "json_schema")
        body = body.model_copy(
            update={
                "draft": made.draft if body.draft is None else body.draft,
                "json_schema": made.json_schema or body.json_schema,
            }
        )
        jobs = await self._jobs(body, [made.prompt], made.max_tokens, made.logprobs, "messages")
        form = Form(made.logprobs, body.return_token_ids, _usage(body), body.n)

        def answer(head: Head) -> Answer:
            return ChatAnswer(head, self.codec, form, made.tools)

        return await self._respond(request, _Asked(body, jobs, form, "chatcmpl", "messages", answer))

    async def _jobs(
        self,
        body: Generation,
        prompts: Sequence[list[int]],
        max_tokens: int | None,
        logprobs: int | None,
        prompt: str,
    ) -> list[Job]:
        """Of each prompt `n` jobs. Raises ApiError."""
        deterministic = self._deterministic(body)
        for name, given in (("receipt", body.receipt), ("draft", body.draft is not None)):
            if given and not deterministic:
                raise ApiError(400, f"{name} is for deterministic requests", name)
        if body.draft is not None:
            self._known(body.draft, "draft")

        def make() -> list[Job]:
            params = sampling_params(body, max_tokens=max_tokens, logprobs=logprobs)
            made = (self.jobs.copies(ids, params, body.n, body, deterministic) for ids in prompts)
            return [job for jobs in made for job in jobs]

        try:
            return await self.codec.run(make)
        except RequestError as error:
            raise named_refusal(error, prompt) from None

    async def _respond(self, request: Request, asked: _Asked) -> Response:
        body, key = asked.body, _stream_key(asked)
        begun = request.headers.get("last-event-id") if body.stream else None
        start = EventId.fresh(key) if begun is None else EventId.parse(begun, key, len(asked.jobs))
        answer = asked.answer(
            Head(f"{asked.prefix}-{start.nonce}", start.created, body.model, self.contract.hash)
        )
        reading = self.flights.reading(body.timeout)
        relayed: Relayed = request.scope.get(RELAYED) or Relayed()
        try:
            await reading.join(relayed.drafted(asked.jobs))
        except RequestError as error:
            raise named_refusal(error, asked.prompt) from None
        relayed.follow(reading.flights)
        if body.stream:
            return EventStream(Events(answer, reading, start), reading, self.settings.write_timeout_s)
        flights = list(reading.flights)
        if not await self._until_finished(reading, request):
            return Response(status_code=CLIENT_GONE)
        return json_response(answer.complete(flights))

    async def _echoed(self, prompts: Sequence[list[int]], body: CompletionRequest) -> list[Flight | None]:
        """The prompts themselves as forced outputs of their first tokens, for their log-probs. Raises
        ApiError."""
        reading = self.flights.reading(body.timeout)
        params = SamplingParams(ignore_eos=True, detokenize=False, logprobs=body.logprobs)
        jobs = [
            self.jobs.job(
                ids[:1], dataclasses.replace(params, max_tokens=len(ids) - 1), draft=ids[1:], forced=True
            )
            for ids in prompts
            if len(ids) > 1
        ]
        try:
            await reading.join(jobs)
            flights = iter(list(reading.flights))
            await reading.finished()
        except RequestError as error:
            raise named_refusal(error) from None
        finally:
            reading.leave()
        return [next(flights) if len(ids) > 1 else None for ids in prompts]

    async def outputs(
        self, jobs: Sequence[Job], request: Request, timeout_s: float | None
    ) -> list[RequestOutput] | None:
        """The ends of `jobs`; None if the client went away before. Raises ApiError and RequestError."""
        reading = self.flights.reading(timeout_s)
        await reading.join(jobs)
        flights = list(reading.flights)
        if not await self._until_finished(reading, request):
            return None
        return [flight.output for flight in flights if flight.output is not None]

    async def _until_finished(self, reading: Reading, request: Request) -> bool:
        """Whether the flights ended before the client went away. Leaves the reading."""
        try:
            return await first_of(asyncio.ensure_future(reading.finished()), gone(request.receive))
        finally:
            reading.leave()

    def model(self) -> dict[str, Any]:
        return {
            "id": self.settings.model,
            "object": "model",
            "created": 0,
            "owned_by": "llm42",
            "max_model_len": self.jobs.limits.max_model_len,
            "vocab_size": self.jobs.limits.vocab_size,
            "contract": self.contract.hash,
        }

    # -- checks ----------------------------------------------------------------------------------------------

    def _check(self, body: Generation) -> None:
        self.check_model(body.model)
        self.jobs.require(body.contract)
        if body.stream_options is not None and not body.stream:
            raise ApiError(400, "stream_options is for streams", "stream_options")

    def check_model(self, name: str) -> None:
        if name != self.settings.model:
            message = f"there is no model {name[:100]!r}: this server has {self.settings.model!r}"
            raise ApiError(404, message, "model", "model_not_found")

    def count(self, choices: int) -> None:
        if choices > self.settings.max_choices:
            message = f"{choices} choices in one request; at most {self.settings.max_choices}"
            raise ApiError(400, message, "n")

    def _deterministic(self, body: Generation) -> bool:
        return self.settings.deterministic if body.deterministic is None else body.deterministic

    # -- in the tokenizer's thread ---------------------------------------------------------------------------

    def prompts(self, prompt: Prompts, name: str, special: bool = True) -> list[list[int]]:
        """Each prompt's token ids. Raises ApiError."""
        if not prompt:
            raise ApiError(400, f"{name} is empty", name)
        if isinstance(prompt, str):
            return [self.codec.encode(prompt, special, name)]
        several: Sequence[Any] = [prompt] if isinstance(prompt[0], int) else prompt
        return [
            self.codec.encode(one, special, name) if isinstance(one, str) else self._known(one, name)
            for one in several
        ]

    def _known(self, ids: Sequence[int], name: str) -> list[int]:
        """`ids` if all are tokens. Raises ApiError."""
        try:
            return check_tokens(name, ids, self.jobs.limits.vocab_size)
        except RequestError as error:
            raise ApiError(400, str(error), name) from None

    def _texts(self, prompt: Prompts, ids: Sequence[list[int]]) -> list[str]:
        """The prompts as an echo shows them."""
        if isinstance(prompt, str):
            return [prompt]
        texts = [one for one in prompt if isinstance(one, str)]
        return texts or list(map(self.codec.decode, ids))


def _usage(body: Generation) -> bool:
    return body.stream_options is not None and body.stream_options.include_usage


def _each(values: Sequence[T], copies: int) -> tuple[T, ...]:
    return tuple(value for value in values for _ in range(copies))


def _stream_key(asked: _Asked) -> str:
    """Of everything that the bytes of a stream hang on; empty if a job is no function of the request."""
    if not all(job.key for job in asked.jobs):
        return ""
    form, body = asked.form, asked.body
    tools = body.model_dump(include={"tools", "tool_choice"}) if isinstance(body, ChatRequest) else {}
    shown: dict[str, Any] = {
        "answer": [asked.prefix, body.model, form.logprobs, form.token_ids, form.usage, form.echo],
        "tools": tools,
        "jobs": [(job.key, job.empty) for job in asked.jobs],
    }
    return hashlib.blake2b(sealed.canonical(shown).encode(), digest_size=8).hexdigest()


def json_response(values: dict[str, Any]) -> Response:
    return Response(json.dumps(values).encode(), media_type="application/json")
