"""Replicas on Ray Serve: each is a deployment of one engine, so that it can be addressed and avoided.

Serve starts what dies anew, on whatever machine has room. Which of them takes a request, and who goes on with
it, is the router's business (`relay.py`), because that hangs on what a client has already got.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
import torch
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from llm42c.errors import ConfigError, Llm42Error
from llm42c.runtime.opening import open_model
from llm42c.runtime.server.app import make_app
from llm42c.runtime.server.replicas.call import Call, Head, LostError, Piece, State, answered
from llm42c.runtime.server.replicas.places import Places, agree
from llm42c.runtime.server.replicas.router import Router, make_router_app
from llm42c.runtime.server.service import Service
from llm42c.runtime.server.settings import Settings

_BEAT_S = 1.0  # between two signs of life
_LOGGING = {"log_level": "WARNING", "enable_access_log": False}
_MANY = 10**6  # requests that Serve lets through to a replica: who waits and who is refused is its own matter


@dataclass(frozen=True)
class Blueprint:
    """How a replica is made. `options` are those of `open_model`; `threads` the cores that it gets."""

    model: str
    settings: Settings
    options: Mapping[str, Any] = field(default_factory=dict)
    threads: int = 1


class Engine:
    """What runs in a replica's process. A model that cannot be opened shows in its state, not in a crash,
    which Serve would only repeat."""

    def __init__(self, blueprint: Blueprint) -> None:
        torch.set_num_threads(blueprint.threads)
        self._service: Service | None = None
        self._state = State(os.getpid(), refused="it has not been opened")
        self._started = False
        # Keys are asked for at the router.
        settings = dataclasses.replace(blueprint.settings, api_keys=())
        try:
            built = open_model(blueprint.model, **blueprint.options)
            self._service = Service(built.engine, built.tokenizer, settings)
        except Llm42Error as error:
            self._state = State(os.getpid(), refused=str(error))
            return
        self._app: ASGIApp = make_app(self._service)
        self._state = State(os.getpid(), built.engine.contract.to_json())

    async def watch(self) -> AsyncGenerator[State]:
        if self._service is not None and not self._started:
            self._started = True
            self._service.start()
        while True:
            yield self._state
            await asyncio.sleep(_BEAT_S)

    async def ask(self, call: Call) -> AsyncGenerator[Head | Piece]:
        async with contextlib.aclosing(answered(self._app, call)) as messages:
            async for message in messages:
                yield message

    def check_health(self) -> None:
        """Raises RuntimeError for an engine that is broken: Serve starts another one."""
        if self._service is not None and self._service.flights.thread.broken is not None:
            raise RuntimeError(self._service.flights.thread.broken)


class OnRay:
    """A replica behind a deployment's handle."""

    def __init__(self, name: str, handle: DeploymentHandle) -> None:
        self.name, self._handle = name, handle.options(stream=True)

    def watch(self) -> AsyncGenerator[State]:
        return _streamed(self._handle.watch)

    def ask(self, call: Call) -> AsyncGenerator[Head | Piece]:
        return _streamed(self._handle.ask, call)

    def first_state(self) -> State:
        """Outside of an event loop: waits for the replica."""
        states: Any = self._handle.watch.remote()
        try:
            state: State = next(iter(states))
            return state
        finally:
            states.cancel()


async def _streamed(method: Any, *arguments: Any) -> AsyncGenerator[Any]:
    answers = method.remote(*arguments)
    try:
        async for answer in answers:
            yield answer
    except RayTaskError:
        raise  # a mistake in the replica's code, which goes on
    except (RayError, RayServeException) as error:
        raise LostError(type(error).__name__) from None
    finally:
        answers.cancel()


def deployments(count: int, blueprint: Blueprint) -> list[serve.Application]:
    """`count` replicas, to be bound to an ingress, or each an application of its own."""
    deployed = serve.deployment(
        num_replicas=1,
        max_ongoing_requests=_MANY,
        health_check_period_s=_BEAT_S,
        graceful_shutdown_timeout_s=blueprint.settings.drain_s,
        ray_actor_options={"num_cpus": blueprint.threads},
        logging_config=_LOGGING,
    )(Engine)
    return [deployed.options(name=_name(i)).bind(blueprint) for i in range(count)]


@contextlib.contextmanager
def cluster(count: int, blueprint: Blueprint) -> Iterator[list[OnRay]]:
    """`count` replicas on the cluster of RAY_ADDRESS, or on a local one that ends with the block, reached by
    handles, without Serve's own HTTP. Raises ConfigError."""
    local: dict[str, Any] = {} if "RAY_ADDRESS" in os.environ else {"num_cpus": count * blueprint.threads}
    try:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR, **local)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(f"Ray does not start: {_line(error)}") from None
    try:
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        serve.start(proxy_location="Disabled", logging_config=_LOGGING)
        targets = [
            serve.RunTarget(application, name=f"llm42-{_name(i)}", route_prefix=None)
            for i, application in enumerate(deployments(count, blueprint))
        ]
        try:
            handles = serve.run_many(targets)
        except (RuntimeError, RayError, RayServeException) as error:
            raise ConfigError(f"the replicas do not start: {_line(error)}") from None
        yield [OnRay(_name(i), handle) for i, handle in enumerate(handles)]
    finally:
        serve.shutdown()
        ray.shutdown()


class Door:
    """The router as an ingress, for `serve run`."""

    async def __init__(  # type: ignore[misc]  # Serve waits for it
        self, handles: Sequence[DeploymentHandle], settings: Settings, hedge_s: float | None
    ) -> None:
        """Raises ConfigError."""
        replicas = [OnRay(_name(i), handle) for i, handle in enumerate(handles)]
        states = await asyncio.gather(*(anext(replica.watch()) for replica in replicas))
        contract = agree([replica.name for replica in replicas], states)
        router = Router(Places(replicas, contract), settings, hedge_s)
        router.start()
        self._app = make_router_app(router)

    async def __call__(self, request: Request) -> Response:
        return _Through(self._app)


class _Through(Response):
    def __init__(self, app: ASGIApp) -> None:
        super().__init__()
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


def application(
    model: str,
    *,
    replicas: int = 2,
    threads: int = 1,
    hedge_ms: float | None = None,
    settings: Settings | None = None,
    **options: Any,
) -> serve.Application:
    """What `serve run` and `serve deploy` take: `replicas` engines of `threads` cores each, behind one door.
    `options` are those of `open_model`."""
    blueprint = Blueprint(model, settings or Settings(model), options, threads)
    door: Any = serve.deployment(
        Door,
        name="door",
        max_ongoing_requests=_MANY,
        ray_actor_options={"num_cpus": 0},
        logging_config=_LOGGING,
    )
    hedge_s = None if hedge_ms is None else hedge_ms / 1000
    bound: serve.Application = door.bind(deployments(replicas, blueprint), blueprint.settings, hedge_s)
    return bound


def _name(index: int) -> str:
    return f"replica-{index}"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
