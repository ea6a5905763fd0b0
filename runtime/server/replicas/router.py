"""The door in front of replicas: the routes, what it answers itself, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Iterable
from typing import Any

from fastapi import FastAPI, Request, Response
from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from starlette.types import Receive, Scope, Send

from llm42c.runtime.server.app import METRICS_TYPE, add_errors
from llm42c.runtime.server.errors import ApiError
from llm42c.runtime.server.guard import Guard, answer
from llm42c.runtime.server.replicas.call import Call, Head, LostError, Piece
from llm42c.runtime.server.replicas.places import Place, Places
from llm42c.runtime.server.replicas.relay import Relay
from llm42c.runtime.server.settings import Settings
from llm42c.runtime.server.stream import first_of, gone, write

SHUTTING_DOWN = "the server is shutting down"

_GENERATION = ("/v1/completions", "/v1/chat/completions")
_LATE_S = 5.0  # that a request may take longer than its replica grants, before the router ends it
_SCRAPE_S = 5.0


class Router:
    """Hands requests on to `places`. Everything here runs in the event loop that calls `start`."""

    def __init__(self, places: Places, settings: Settings, hedge_s: float | None = None) -> None:
        self.places, self.settings = places, settings
        self.draining = False
        self._began = time.monotonic()
        self._hedge_s = hedge_s
        self._relays: set[Relay] = set()
        self._registry = CollectorRegistry()
        self._resumed = self._counter("llm42_streams_resumed", "Streams that went on at another replica")
        self._hedged = self._counter("llm42_requests_hedged", "Asked of a second replica, the first was slow")

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, registry=self._registry)

    def start(self) -> None:
        self.places.start()

    async def close(self) -> None:
        await self.places.close()

    def drain(self) -> None:
        self.draining = True

    def hand_over(self) -> None:
        message = (
            "the server is shutting down; a deterministic stream goes on elsewhere with its Last-Event-ID"
        )
        for relay in self._relays:
            relay.end(ApiError(503, message, code="shutting_down"))

    async def relay(self, request: Request) -> Response:
        """Raises ApiError."""
        if self.draining:
            raise ApiError(503, SHUTTING_DOWN, code="shutting_down", headers={"Retry-After": "1"})
        call = Call(
            request.method,
            request.url.path,
            request.scope["query_string"],
            tuple(request.headers.raw),
            await request.body(),
        )
        relay = Relay(
            self.places,
            call,
            again=call.path in _GENERATION and self._deterministic(call.body),
            timeout_s=self.settings.timeout_s + _LATE_S,
            hedge_s=self._hedge_s,
        )
        return _Relayed(relay, self)

    def _deterministic(self, body: bytes) -> bool:
        try:
            asked = json.loads(body)
        except ValueError:
            return False
        given = asked.get("deterministic") if isinstance(asked, dict) else False
        return self.settings.deterministic if given is None else given is True

    @contextlib.contextmanager
    def counted(self, relay: Relay) -> Any:
        self._relays.add(relay)
        try:
            yield
        finally:
            self._relays.discard(relay)
            self._resumed.inc(relay.resumed)
            self._hedged.inc(relay.hedged)

    # -- what the router says itself -------------------------------------------------------------------------

    def ready(self) -> dict[str, Any]:
        """Raises ApiError while nobody takes requests."""
        if self.draining:
            raise ApiError(503, SHUTTING_DOWN, code="shutting_down")
        if not self.places.up:
            raise ApiError(503, "no replica is there", headers={"Retry-After": "1"})
        replicas = [
            {
                "name": place.name,
                "pid": None if place.state is None else place.state.pid,
                "requests": len(place.attempts),
                "losses": place.losses,
            }
            for place in self.places.all
        ]
        return {"status": "ready", "contract": self.places.contract.hash, "replicas": replicas}

    async def metrics(self) -> bytes:
        """The router's own, and those of each replica under the label `replica`."""
        up = self.places.up
        pages = await asyncio.gather(*map(_page, up))
        registry = CollectorRegistry()
        registry.register(_Merged([(p.name, page) for p, page in zip(up, pages, strict=True)], self.places))
        return generate_latest(self._registry) + generate_latest(registry)

    async def stats(self) -> dict[str, Any]:
        """What the page shows: the sums over all replicas."""
        pages = await asyncio.gather(*(_page(place, "/stats.json") for place in self.places.up))
        uptime_s = time.monotonic() - self._began
        summed = _sum([json.loads(page) for page in pages if page])
        return summed | {"uptime_s": uptime_s, "draining": self.draining}


def _sum(values: list[Any]) -> Any:
    """Numbers added up, at each place of objects that are alike."""
    if values and isinstance(values[0], dict):
        return {name: _sum([value[name] for value in values]) for name in values[0]}
    return sum(values) if values else {}


async def _page(place: Place, path: str = "/metrics") -> str:
    """What the replica says there; nothing if it does not say it soon."""
    try:
        async with asyncio.timeout(_SCRAPE_S):
            call = Call("GET", path)
            found = [m.data async for m in place.replica.ask(call) if isinstance(m, Piece)]
    except (LostError, TimeoutError):
        return ""
    return b"".join(found).decode()


class _Merged:
    def __init__(self, pages: list[tuple[str, str]], places: Places) -> None:
        self._pages, self._places = pages, places

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Metric] = {}
        for name, page in self._pages:
            for family in text_string_to_metric_families(page):
                merged = families.setdefault(
                    family.name, Metric(family.name, family.documentation, family.type)
                )
                for sample in family.samples:
                    merged.samples.append(sample._replace(labels=sample.labels | {"replica": name}))
        yield from families.values()
        up = GaugeMetricFamily("llm42_replica_up", "Whether the replica is there", labels=["replica"])
        for place in self._places.all:
            up.add_metric([place.name], place.state is not None)
        yield up


class _Relayed(Response):
    """The answer of a relay as it comes. A client that is gone, or takes nothing for long, ends it."""

    def __init__(self, relay: Relay, router: Router) -> None:
        super().__init__()
        self._relay, self._router = relay, router

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._router.counted(self._relay):
            await first_of(asyncio.ensure_future(self._send(scope, receive, send)), gone(receive))

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun, timeout_s = False, self._router.settings.write_timeout_s
        with contextlib.suppress(OSError, TimeoutError):  # nobody reads
            try:
                async with contextlib.aclosing(self._relay.answer()) as messages:
                    async for message in messages:
                        if isinstance(message, Head):
                            headers = list(message.headers)
                            start = {"type": "http.response.start", "status": message.status}
                            await send(start | {"headers": headers})
                            begun = True
                        elif message:
                            await write(send, message, timeout_s)
            except ApiError as error:
                if not begun:
                    await answer(error)(scope, receive, send)
                    return
                await write(send, f"data: {json.dumps(error.body())}\n\n".encode(), timeout_s)
            await write(send, b"", timeout_s)


def make_router_app(router: Router) -> FastAPI:
    """An ASGI application; the replicas are watched while it lives."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        router.start()
        try:
            yield
        finally:
            await router.close()

    app = FastAPI(lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)
    app.add_middleware(Guard, settings=router.settings)
    add_errors(app)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """A replica that breaks is started anew: the router itself can always go on."""
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> dict[str, Any]:
        return router.ready()

    @app.get("/metrics", response_model=None)
    async def metrics() -> Response:
        return Response(await router.metrics(), media_type=METRICS_TYPE)

    @app.get("/stats.json")
    async def stats() -> dict[str, Any]:
        return await router.stats()

    @app.api_route("/{path:path}", methods=["GET", "HEAD", "POST"], response_model=None)
    async def relay(request: Request) -> Response:
        return await router.relay(request)

    return app
