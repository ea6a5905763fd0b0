"""Requests under way. A deterministic one is computed once, however many ask for the same at a time.

A flight is what the engine has committed for one job, so far. Readers hold a position in it and keep nothing
themselves, so that a slow one costs no memory besides the output, and one that comes later starts at the
beginning. Everything here runs in the event loop; the engine's thread only leaves news.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Any

from llm42c.errors import RequestError
from llm42c.runtime.engine import Engine
from llm42c.runtime.outputs import RequestOutput, TopLogprobs
from llm42c.runtime.processors import Decode, TextState
from llm42c.runtime.server.cache import AnswerCache
from llm42c.runtime.server.errors import ApiError
from llm42c.runtime.server.jobs import Job, Jobs
from llm42c.runtime.server.metrics import Metrics
from llm42c.runtime.server.settings import Settings
from llm42c.runtime.server.thread import EngineThread


class Flight:
    """What the engine has committed for one job. Text is made as far as a reader looks: token by token for a
    stream, at once for those who wait for the end."""

    def __init__(self, request_id: str, job: Job, decode: Decode) -> None:
        self.request_id, self.job = request_id, job
        self.began = self.last = time.perf_counter()
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.tops: list[TopLogprobs] = []
        self.output: RequestOutput | None = None  # the last one
        self.error: ApiError | None = None
        self.entered = False  # the engine has it, or never will
        self.refusal: RequestError | None = None  # why it has not
        self.readers = 0
        self.listeners: set[asyncio.Event] = set()
        self._decode, self._state = decode, TextState(decode, job.params.stop)
        self._ends: list[int] = []  # how many characters are certain behind each token
        self._whole: str | None = None  # the text, once it has ended

    @staticmethod
    def ended(job: Job, decode: Decode, output: RequestOutput | None = None) -> Flight:
        """One that brings its whole output, or that has ended without a token."""
        flight = Flight("", job, decode)
        flight.entered = True
        flight.take(output or RequestOutput("", [], [], finished=True, finish_reason="length"))
        return flight

    @property
    def done(self) -> bool:
        return self.output is not None or self.error is not None

    @property
    def shown(self) -> int:
        """How many tokens are part of the answer: a token id that ended it is not."""
        ended = self.output is not None and isinstance(self.output.stop_reason, int)
        return len(self.tokens) - ended

    @property
    def text(self) -> str:
        """All of it when no more will come, else as far as it was looked at. Raises ApiError."""
        if self._whole is None and self.output is not None:
            if self._ends or self.job.params.stop:
                self._look(self.shown)
            else:
                with _decoding():
                    self._whole = self._decode(self.tokens[: self.shown])
        return self._state.text if self._whole is None else self._whole

    def characters(self, position: int) -> int:
        """How many characters are certain behind the first `position` tokens. Raises ApiError."""
        if position > len(self._ends):
            self._look(position)
        return self._ends[position - 1] if position else 0

    def take(self, output: RequestOutput) -> None:
        """Append what the engine has committed since."""
        self.tokens += output.new_token_ids
        self.logprobs += output.new_logprobs
        self.tops += output.new_top_logprobs or []
        if output.finished:
            self.output = output

    def _look(self, position: int) -> None:
        """Make the text of so many tokens; of all, and its end, if no more will come."""
        state, output = self._state, self.output
        with _decoding():
            for token in self.tokens[len(self._ends) : position if output is None else self.shown]:
                state.push(token)
                self._ends.append(state.safe_length())
            if output is not None:
                state.finish(isinstance(output.stop_reason, str), self.job.params.include_stop)
                self._whole = state.text
                self._ends = [min(end, len(state.text)) for end in self._ends]

    def tell(self) -> None:
        for event in self.listeners:
            event.set()


class Reading:
    """One answer's hold on its flights. Leaving it lets go of them."""

    def __init__(self, flights: Flights, timeout_s: float) -> None:
        self.flights: list[Flight] = []
        self._all, self._event = flights, asyncio.Event()
        self._timeout_s = timeout_s
        self._deadline = asyncio.get_running_loop().time() + timeout_s

    async def join(self, jobs: Iterable[Job]) -> None:
        """Raises ApiError or RequestError, and then holds nothing."""
        try:
            async with self._in_time():
                for job in jobs:
                    self.hold(await self._all.find(job) or self._all.join(job))
                while not all(flight.entered or flight.done for flight in self.flights):
                    await self._event.wait()
                    self._event.clear()
            for flight in self.flights:
                if flight.refusal is not None:
                    raise flight.refusal
            self.check()
        except BaseException:
            self.leave()
            raise

    def hold(self, flight: Flight) -> None:
        flight.readers += 1
        flight.listeners.add(self._event)
        self.flights.append(flight)

    async def news(self) -> None:
        """Wait until a flight has something new. Raises ApiError when the time is up."""
        async with self._in_time():
            await self._event.wait()
        self._event.clear()

    @contextlib.asynccontextmanager
    async def _in_time(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout_at(self._deadline):
                yield
        except TimeoutError:
            message = f"the request took longer than {self._timeout_s:g} s"
            raise ApiError(504, message, "timeout", "deadline_exceeded") from None

    async def finished(self) -> list[RequestOutput]:
        """Wait for the ends of all flights. Raises ApiError where one has failed."""
        while not all(flight.done for flight in self.flights):
            self.check()
            await self.news()
        self.check()
        return [flight.output for flight in self.flights if flight.output is not None]

    def check(self) -> None:
        for flight in self.flights:
            if flight.error is not None:
                raise flight.error

    def leave(self) -> None:
        for flight in self.flights:
            flight.listeners.discard(self._event)
            flight.readers -= 1
            self._all.left(flight)
        self.flights = []


class Flights:
    """The flights of one engine: entry, limits, news."""

    def __init__(self, engine: Engine, settings: Settings, decode: Decode, metrics: Metrics) -> None:
        self.jobs = Jobs(engine)
        self.thread = EngineThread(engine, self._deliver)
        self.metrics = metrics
        self.draining = False
        self._settings, self._decode = settings, decode
        self._limit = engine.config.max_num_seqs + settings.max_queue
        self._at_once = engine.config.max_num_seqs
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ids = itertools.count()
        self._flying: dict[str, Flight] = {}  # by request id
        self._by_key: dict[str, Flight] = {}
        self._remembered: OrderedDict[str, list[int]] = OrderedDict()
        self._num_remembered = 0
        path = settings.cache_path
        self._cache = None if path is None else AnswerCache(path, settings.cache_bytes)
        self._stats = engine.stats()
        self._revocations = self._stats.revocations
        self._mean_s = 1.0  # of the last requests, from arrival to end

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.thread.start()

    async def close(self) -> None:
        await asyncio.to_thread(self.thread.close)
        if self._cache is not None:
            await asyncio.to_thread(self._cache.close)

    def __len__(self) -> int:
        return len(self._flying)

    async def find(self, job: Job) -> Flight | None:
        """A flight that needs no engine: an empty one, or one from the cache."""
        if job.empty:
            return Flight.ended(job, self._decode)
        if self._cache is None or not job.key or job.fresh or job.key in self._by_key:
            return None
        output = await self._cache.get(job)
        if output is None:
            return None
        self.metrics.cached.inc()
        flight = Flight.ended(job, self._decode, output)
        await asyncio.to_thread(flight.characters, flight.shown)
        return flight

    def join(self, job: Job) -> Flight:
        """The flight of an equal job, or a new one. Raises ApiError where none more is taken."""
        flight = None if job.fresh else self._by_key.get(job.key)
        if flight is not None:
            self.metrics.shared.inc()
            return flight
        self._admit()
        flight = Flight(f"serve-{next(self._ids)}", job, self._decode)
        self._flying[flight.request_id] = flight
        if job.key:
            self._by_key.setdefault(job.key, flight)
        self._submit(flight)
        return flight

    def reading(self, timeout_s: float | None) -> Reading:
        most = self._settings.timeout_s
        return Reading(self, most if timeout_s is None else min(timeout_s, most))

    def hand_over(self) -> None:
        """The time for finishing is over: every flight ends, and says where to go on."""
        for flight in list(self._flying.values()):
            message = "the server is shutting down"
            if flight.job.deterministic:
                message += "; a stream goes on elsewhere with its Last-Event-ID"
            flight.error = ApiError(503, message, code="shutting_down")
            self._forget(flight)
            self.thread.abort(flight.request_id)
            flight.tell()

    def _admit(self) -> None:
        if self.draining:
            raise ApiError(
                503, "the server is shutting down", code="shutting_down", headers={"Retry-After": "1"}
            )
        if self.thread.broken is not None:
            raise ApiError(503, f"the engine is broken: {self.thread.broken}", code="engine_broken")
        if len(self._flying) >= self._limit:
            self.metrics.refused.inc()
            waiting = len(self._flying) - self._at_once
            seconds = max(1, min(60, round(self._mean_s * waiting / self._at_once)))
            raise ApiError(
                429,
                f"{waiting} requests are waiting already; come back in {seconds} s",
                code="queue_full",
                headers={"Retry-After": str(seconds)},
            )

    def _submit(self, flight: Flight) -> None:
        job = flight.job
        draft = job.draft
        if draft is None and job.key:
            draft = self._recall(job.key)
        future = self.thread.submit(
            flight.request_id,
            job.prompt,
            job.params,
            deterministic=job.deterministic,
            receipt=job.receipt,
            speculate=job.speculate,
            draft=draft,
            forced=job.forced,
        )
        future.add_done_callback(lambda done: self._soon(self._entered, flight, done.exception()))

    def _entered(self, flight: Flight, error: BaseException | None) -> None:
        flight.entered = True
        if error is not None:
            self._forget(flight)
            if isinstance(error, RequestError):
                flight.refusal = error
            else:
                flight.error = ApiError(500, f"the request broke the engine: {type(error).__name__}: {error}")
        flight.tell()

    def left(self, flight: Flight) -> None:
        """One reader less. Without any the request is aborted; what it has committed stays as a draft."""
        if flight.readers > 0 or flight.request_id not in self._flying:
            return
        self._forget(flight)
        self.thread.abort(flight.request_id)
        self.metrics.aborted.inc()
        if flight.job.key and flight.tokens:
            self._remember(flight.job.key, flight.tokens)

    def _forget(self, flight: Flight) -> None:
        self._flying.pop(flight.request_id, None)
        if self._by_key.get(flight.job.key) is flight:
            del self._by_key[flight.job.key]

    def _remember(self, key: str, tokens: list[int]) -> None:
        self._recall(key)
        self._remembered[key] = tokens
        self._num_remembered += len(tokens)
        while self._num_remembered > self._settings.remembered_tokens:
            _, oldest = self._remembered.popitem(last=False)
            self._num_remembered -= len(oldest)

    def _recall(self, key: str) -> list[int] | None:
        tokens = self._remembered.pop(key, None)
        self._num_remembered -= len(tokens or ())
        return tokens

    # -- news ------------------------------------------------------------------------------------------------

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        """In the engine's thread: one wake-up of the loop for a whole step."""
        self._soon(self._take, outputs)

    def _soon(self, action: Callable[..., None], *arguments: Any) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop has ended, and everybody with it
            self._loop.call_soon_threadsafe(action, *arguments)

    def _take(self, outputs: list[RequestOutput]) -> None:
        now = time.perf_counter()
        if self._cache is not None and self._revocations != self._stats.revocations:
            self._revocations = self._stats.revocations
            self._cache.clear()  # which of them rested on it is not known any more
        for output in outputs:
            flight = self._flying.get(output.request_id)
            if flight is None:
                continue
            self.metrics.tokens(flight.job.deterministic, len(flight.tokens), output, now - flight.last)
            flight.last = now
            flight.take(output)
            if output.error is not None:
                asked_too_much = "the grammar " in output.error  # and so do the other parameters
                status = 400 if asked_too_much else 500
                flight.error = ApiError(status, output.error, code="generation_failed")
            if flight.done:
                self._forget(flight)
                self._mean_s += 0.1 * (now - flight.began - self._mean_s)
                if self._cache is not None and flight.job.key and flight.error is None:
                    self._cache.put(flight.job, output)
            flight.tell()


@contextlib.contextmanager
def _decoding() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of a tokenizer
        message = f"the output cannot be decoded: {type(error).__name__}: {error}"
        raise ApiError(500, message, code="generation_failed") from None
