"""What every request passes before it is read: its key, and the size of its body."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llm42c.runtime.server.errors import ApiError
from llm42c.runtime.server.page import PATHS
from llm42c.runtime.server.settings import Settings

# For probes and scrapers, and the page itself: they show no text of anybody.
OPEN = frozenset(("/health", "/ready", "/metrics", "/stats.json", *PATHS))

_LAST = {"Connection": "close"}  # what follows cannot be told from another request


class Guard:
    """ASGI middleware. Bodies are read whole here, so that nobody parses what is too long or never ends."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app, self._settings = app, settings
        self._keys = [key.encode() for key in settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            headers = Headers(scope=scope)
            if "content-length" in headers and "transfer-encoding" in headers:
                # A proxy may have read the other one: what follows would be another request to it.
                raise ApiError(400, "give Content-Length or Transfer-Encoding", headers=_LAST)
            if self._keys and scope["path"] not in OPEN:
                self._check_key(headers)
            body = await self._body(headers, receive)
        except ApiError as error:
            await answer(error)(scope, receive, send)
            return
        if body is not None:
            await self._app(scope, _Replayed(body, receive), send)

    def _check_key(self, headers: Headers) -> None:
        kind, _, given = headers.get("authorization", "").partition(" ")
        if not is_known(self._keys, given.strip().encode("utf-8", "replace")) or kind.lower() != "bearer":
            raise ApiError(
                401,
                "the API key is missing or wrong: Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _body(self, headers: Headers, receive: Receive) -> bytes | None:
        """None: the client went away before it had sent it. Raises ApiError."""
        most, body = self._settings.max_body_bytes, bytearray()
        length = headers.get("content-length", "0")
        try:
            async with asyncio.timeout(self._settings.write_timeout_s):
                while len(body) <= most and not (length.isdecimal() and int(length[:20]) > most):
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if not message.get("more_body", False):
                        break
                else:
                    raise _too_large(most)
        except TimeoutError:
            raise ApiError(408, "the body did not come in time", code="body_timeout", headers=_LAST) from None
        if len(body) > most:
            raise _too_large(most)
        return bytes(body)


class _Replayed:
    """A body that has been read, then what the connection says."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive

    async def __call__(self) -> Message:
        if self._body is None:
            return await self._receive()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}


def is_known(keys: Sequence[bytes], given: bytes) -> bool:
    """Whether `given` is one of `keys`, in a time that does not tell how near it comes to any."""
    found = False
    for key in keys:
        found |= hmac.compare_digest(key, given)
    return found


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the body is longer than {most} bytes", code="body_too_large")


def answer(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, error.headers)
