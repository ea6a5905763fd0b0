"""The routes, and what every error looks like."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from llm42c.runtime.server import checks, page
from llm42c.runtime.server.errors import ApiError, invalid
from llm42c.runtime.server.guard import Guard, answer
from llm42c.runtime.server.schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ScoreRequest,
    TokenizeRequest,
    VerifyRequest,
)
from llm42c.runtime.server.service import Service

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_log = logging.getLogger(__name__)


def make_app(service: Service) -> FastAPI:
    """An ASGI application; its lifespan is that of the engine's thread."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            await service.close()

    app = FastAPI(
        title="llm42",
        version=importlib.metadata.version("llm42c"),
        lifespan=lifespan,
        redoc_url=None,
        docs_url=None,
    )
    app.add_middleware(Guard, settings=service.settings)
    add_errors(app)
    _generation(app, service)
    _checks(app, service)
    _state(app, service)
    page.add(app)
    return app


def _generation(app: FastAPI, service: Service) -> None:
    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await service.complete(body, request)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        return await service.chat(body, request)


def _checks(app: FastAPI, service: Service) -> None:
    @app.post("/v1/score", response_model=None)
    async def score(body: ScoreRequest, request: Request) -> Response:
        return await checks.score(service, body, request)

    @app.post("/v1/receipts/verify", response_model=None)
    async def verify(body: VerifyRequest, request: Request) -> Response:
        return await checks.verify(service, body, request)

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        return await checks.tokenize(service, body)

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        return await checks.detokenize(service, body)


def _state(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [service.model()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return service.model()

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """Whether the process can go on: 503 says that it must be started anew."""
        if service.flights.thread.broken is not None:
            raise ApiError(503, f"the engine is broken: {service.flights.thread.broken}")
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> dict[str, Any]:
        """Whether new requests are taken."""
        await health()
        if service.flights.draining:
            raise ApiError(503, "the server is shutting down", code="shutting_down")
        return {"status": "ready", "contract": service.contract.hash}

    @app.get("/metrics", response_model=None)
    async def metrics() -> Response:
        return Response(service.metrics.page(), media_type=METRICS_TYPE)

    @app.get("/stats.json")
    async def stats() -> dict[str, Any]:
        """What the page shows, as numbers."""
        return service.metrics.snapshot() | {"draining": service.flights.draining}


def add_errors(app: FastAPI) -> None:
    """Every error is OpenAI's object."""

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> JSONResponse:
        return answer(error)

    @app.exception_handler(RequestValidationError)
    async def invalid_body(request: Request, error: RequestValidationError) -> JSONResponse:
        return answer(invalid(error.errors()))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        if error.status_code == 400:  # of who reads bodies
            return answer(ApiError(400, "the body cannot be read as JSON"))
        return answer(
            ApiError(error.status_code, f"{error.detail}: {request.method} {request.url.path}"[:300])
        )

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        _log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return answer(ApiError(500, f"the server made a mistake: {type(error).__name__}"))
