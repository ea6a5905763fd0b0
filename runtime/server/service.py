"""What the routes do: bodies to jobs, flights to answers."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from llm42c.errors import ReceiptError, RequestError
from llm42c.runtime import sealed
from llm42c.runtime.engine import Engine
from llm42c.runtime.outputs import RequestOutput
from llm42c.runtime.receipt import Receipt, compare, contract_result, signature_result
from llm42c.runtime.sampling import SamplingParams
from llm42c.runtime.scoring import scored, scoring_params
from llm42c.runtime.server import chat
from llm42c.runtime.server.answers import Answer, ChatAnswer, CompletionAnswer, Form, Head
from llm42c.runtime.server.codec import Codec
from llm42c.runtime.server.errors import ApiError
from llm42c.runtime.server.flights import Flight, Flights, Reading
from llm42c.runtime.server.jobs import Job, named_refusal, sampling_params
from llm42c.runtime.server.metrics import Metrics
from llm42c.runtime.server.schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Generation,
    Prompts,
    ScoreRequest,
    TokenizeRequest,
    VerifyRequest,
)
from llm42c.runtime.server.settings import Settings
from llm42c.runtime.server.stream import EventId, Events, EventStream, first_of, gone

CLIENT_GONE = 499  # nobody reads it


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
        prompts = await self.codec.run(self._prompts, body.prompt, "prompt")
        self._count(len(prompts) * body.n)
        jobs = await self._jobs(body, prompts, max(body.max_tokens, 1), body.logprobs, None)
        form = Form(body.logprobs, body.return_token_ids, _usage(body), body.n)
        reading = self.flights.reading(body.timeout)
        echoed: list[Flight | None] = []
        try:
            if body.echo and body.logprobs is not None:
                echoed = await self._echoed(reading, prompts, body)
            if body.max_tokens == 0:
                for job in jobs:
                    reading.hold(Flight.ended(job, self.codec.decode))
        except RequestError as error:
            reading.leave()
            raise named_refusal(error) from None
        except BaseException:
            reading.leave()
            raise
        if body.echo:
            texts = await self.codec.run(self._texts, body.prompt, prompts)
            form = Form(
                body.logprobs,
                body.return_token_ids,
                _usage(body),
                body.n,
                tuple(text for text in texts for _ in range(body.n)),
                tuple(flight for flight in echoed for _ in range(body.n)),
            )

        def answer(head: Head) -> Answer:
            return CompletionAnswer(head, self.codec, form)

        return await self._respond(
            body, request, reading, [] if body.max_tokens == 0 else jobs, jobs, answer, "cmpl", form
        )

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        self._check(body)
        self._count(body.n)
        made = await self.codec.run(chat.read, body, self.codec)
        if made.draft is not None and not self._deterministic(body):
            raise ApiError(400, "prediction is for deterministic requests", "prediction")
        body.draft = made.draft if body.draft is None else body.draft
        if made.json_schema is not None:
            if body.json_schema is not None:
                raise ApiError(
                    400, "json_schema and response_format or tool_choice exclude each other", "json_schema"
                )
            body.json_schema = made.json_schema
        jobs = await self._jobs(body, [made.prompt], made.max_tokens, made.logprobs, "messages")
        form = Form(made.logprobs, body.return_token_ids, _usage(body), body.n)

        def answer(head: Head) -> Answer:
            return ChatAnswer(head, self.codec, form, made.tools)

        reading = self.flights.reading(body.timeout)
        return await self._respond(body, request, reading, jobs, jobs, answer, "chatcmpl", form, "messages")

    async def _jobs(
        self,
        body: Generation,
        prompts: Sequence[list[int]],
        max_tokens: int | None,
        logprobs: int | None,
        prompt: str | None,
    ) -> list[Job]:
        """Of each prompt `n` jobs. Raises ApiError."""
        deterministic = self._deterministic(body)
        for name, given in (("receipt", body.receipt), ("draft", body.draft is not None)):
            if given and not deterministic:
                raise ApiError(400, f"{name} is for deterministic requests", name)

        def make() -> list[Job]:
            params = sampling_params(body, max_tokens=max_tokens, logprobs=logprobs)
            made = (self.jobs.copies(ids, params, body.n, body, deterministic) for ids in prompts)
            return [job for jobs in made for job in jobs]

        try:
            return await self.codec.run(make)
        except RequestError as error:
            raise named_refusal(error, prompt or "prompt") from None

    async def _respond(
        self,
        body: Generation,
        request: Request,
        reading: Reading,
        jobs: Sequence[Job],
        asked: Sequence[Job],
        answer: Callable[[Head], Answer],
        prefix: str,
        form: Form,
        prompt: str = "prompt",
    ) -> Response:
        """Run `jobs`, besides what `reading` holds, and answer; `asked` is what the answer hangs on."""
        try:
            key = _stream_key(asked, prefix, form, body)
            begun = request.headers.get("last-event-id") if body.stream else None
            start = EventId.fresh(key) if begun is None else EventId.parse(begun, key, len(asked))
            head = Head(f"{prefix}-{start.nonce}", start.created, body.model, self.contract.hash)
            await reading.join(jobs)
        except RequestError as error:
            reading.leave()
            raise named_refusal(error, prompt) from None
        except BaseException:
            reading.leave()
            raise
        if body.stream:
            events = Events(answer(head), reading, start)
            return EventStream(events, reading, self.settings.write_timeout_s)
        flights = list(reading.flights)
        if not await self._until_finished(reading, request):
            return Response(status_code=CLIENT_GONE)
        return json_response(answer(head).complete(flights))

    async def _until_finished(self, reading: Reading, request: Request) -> bool:
        """Whether the flights ended before the client went away. Leaves the reading."""
        try:
            return await first_of(asyncio.ensure_future(reading.finished()), gone(request.receive))
        finally:
            reading.leave()

    async def _echoed(
        self, reading: Reading, prompts: Sequence[list[int]], body: CompletionRequest
    ) -> list[Flight | None]:
        """The prompts themselves as forced outputs of their first tokens, for their log-probs."""
        flights: list[Flight | None] = []
        own = self.flights.reading(body.timeout)
        try:
            for ids in prompts:
                if len(ids) < 2:
                    flights.append(None)
                    continue
                params = SamplingParams(
                    max_tokens=len(ids) - 1, ignore_eos=True, detokenize=False, logprobs=body.logprobs
                )
                await own.join([self.jobs.job(ids[:1], params, draft=ids[1:], forced=True)])
                flights.append(own.flights[-1])
            await own.finished()
        finally:
            own.leave()
        return flights

    # -- the rest --------------------------------------------------------------------------------------------

    async def score(self, body: ScoreRequest, request: Request) -> Response:
        self.check_model(body.model)
        self.jobs.require(body.contract)
        prompts = await self.codec.run(self._prompts, body.prompt, "prompt")
        completions = await self.codec.run(self._prompts, body.completion, "completion", False)
        if len(prompts) != len(completions):
            message = f"{len(prompts)} prompts but {len(completions)} completions"
            raise ApiError(400, message, "completion")
        self._count(len(prompts))

        def make() -> list[Job]:
            return [
                self.jobs.job(ids, scoring_params(given), draft=given, forced=True)
                for ids, given in zip(prompts, completions, strict=True)
            ]

        try:
            outputs = await self._outputs(await self.codec.run(make), request, body.timeout)
        except RequestError as error:
            raise named_refusal(error) from None
        if outputs is None:
            return Response(status_code=CLIENT_GONE)
        data = []
        for i, (given, output) in enumerate(zip(completions, outputs, strict=True)):
            found = scored(output)
            data.append(
                {
                    "index": i,
                    "token_ids": given,
                    "logprobs": found.logprobs,
                    "total": found.total,
                    "greedy": all(found.greedy),
                }
            )
        tokens = sum(map(len, prompts)), sum(map(len, completions))
        usage = {
            "prompt_tokens": tokens[0],
            "completion_tokens": tokens[1],
            "total_tokens": sum(tokens),
        }
        return json_response(
            {
                "object": "list",
                "model": body.model,
                "system_fingerprint": self.contract.hash,
                "data": data,
                "usage": usage,
            }
        )

    async def verify(self, body: VerifyRequest, request: Request) -> Response:
        """Do again what a receipt says, its tokens as a draft, and compare."""
        result = None
        try:
            receipt = await self.codec.run(Receipt.from_json, body.receipt)
        except ReceiptError as error:
            return json_response({"verdict": "damaged", "detail": str(error), "position": None, "fields": []})
        if body.public_key is not None:
            result = signature_result(receipt, body.public_key)
        result = result or contract_result(receipt, self.contract)
        if result is None:
            try:
                job = self.jobs.job(receipt.prompt, receipt.params, draft=receipt.tokens)
                outputs = await self._outputs([job], request, body.timeout)
            except RequestError as error:
                raise named_refusal(error, "receipt") from None
            if outputs is None:
                return Response(status_code=CLIENT_GONE)
            result = compare(receipt, outputs[0])
        return json_response(
            {
                "verdict": result.verdict,
                "detail": result.detail,
                "position": result.position,
                "fields": list(result.fields),
            }
        )

    async def _outputs(
        self, jobs: Sequence[Job], request: Request, timeout_s: float | None
    ) -> list[RequestOutput] | None:
        """The ends of `jobs`; None if the client went away before. Raises ApiError and RequestError."""
        reading = self.flights.reading(timeout_s)
        await reading.join(jobs)
        flights = list(reading.flights)
        if not await self._until_finished(reading, request):
            return None
        return [flight.output for flight in flights if flight.output is not None]

    async def tokenize(self, body: TokenizeRequest) -> dict[str, Any]:
        if body.model is not None:
            self.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "give either prompt or messages", "prompt")
        tokens = await self.codec.run(chat.tokens_of, body, self.codec)
        return {"tokens": tokens, "count": len(tokens), "max_model_len": self.jobs.limits.max_model_len}

    async def detokenize(self, body: DetokenizeRequest) -> dict[str, Any]:
        if body.model is not None:
            self.check_model(body.model)
        if any(not 0 <= token < self.jobs.limits.vocab_size for token in body.tokens):
            message = f"tokens must be in [0, {self.jobs.limits.vocab_size})"
            raise ApiError(400, message, "tokens")
        return {"prompt": await self.codec.run(self.codec.decode, body.tokens)}

    def model(self) -> dict[str, Any]:
        return {
            "id": self.settings.model,
            "object": "model",
            "created": 0,
            "owned_by": "llm42",
            "max_model_len": self.jobs.limits.max_model_len,
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

    def _count(self, choices: int) -> None:
        if choices > self.settings.max_choices:
            message = f"{choices} choices in one request; at most {self.settings.max_choices}"
            raise ApiError(400, message, "n")

    def _deterministic(self, body: Generation) -> bool:
        return self.settings.deterministic if body.deterministic is None else body.deterministic

    # -- in the tokenizer's thread ---------------------------------------------------------------------------

    def _prompts(self, prompt: Prompts, name: str, special: bool = True) -> list[list[int]]:
        """Each prompt's token ids. Raises ApiError."""
        if not prompt:
            raise ApiError(400, f"{name} is empty", name)
        if isinstance(prompt, str):
            return [self.codec.encode(prompt, special, name)]
        if isinstance(prompt[0], int):
            return [list(prompt)]
        return [
            self.codec.encode(one, special, name) if isinstance(one, str) else list(one) for one in prompt
        ]

    def _texts(self, prompt: Prompts, ids: Sequence[list[int]]) -> list[str]:
        """The prompts as an echo shows them."""
        if isinstance(prompt, str):
            return [prompt]
        texts = [one for one in prompt if isinstance(one, str)]
        return texts or list(map(self.codec.decode, ids))


def _usage(body: Generation) -> bool:
    return body.stream_options is not None and body.stream_options.include_usage


def _stream_key(jobs: Sequence[Job], prefix: str, form: Form, body: Generation) -> str:
    """Of everything that the bytes of a stream hang on; empty if a job is no function of the request."""
    if not all(job.key for job in jobs):
        return ""
    asked: list[Any] = [prefix, form.logprobs, form.token_ids, form.usage, form.echo, body.model]
    tools = getattr(body, "tools", None) and [tool.model_dump() for tool in body.tools]  # type: ignore[attr-defined]
    asked = [*asked, tools, *(job.key for job in jobs)]
    return hashlib.blake2b(sealed.canonical({"asked": asked}).encode(), digest_size=8).hexdigest()


def json_response(values: dict[str, Any]) -> Response:
    return Response(json.dumps(values).encode(), media_type="application/json")
