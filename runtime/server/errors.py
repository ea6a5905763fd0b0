"""Errors as OpenAI's clients read them: a status, and an object that names the parameter."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from llm42c.errors import RequestError

_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    409: "contract_mismatch",
    413: "invalid_request_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """What a request is answered with instead of what it asked for."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        **more: Any,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers, self.more = dict(headers or {}), more

    def body(self) -> dict[str, Any]:
        kind = _KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code, **self.more}
        return {"error": error}


def refused(error: RequestError, fields: Collection[str], prompt: str = "prompt") -> ApiError:
    """A request that the engine refuses, whose message names the parameter. `prompt`: that of the prompt."""
    message = str(error)
    words = re.findall(r"[a-z_]+", message)
    named = next((word for word in words if word in fields and word != "prompt"), None)
    if "context of" in message or "KV pages" in message:
        return ApiError(400, message, prompt, "context_length_exceeded")
    about_prompt = "prompt" in words or message.startswith("token id")
    return ApiError(400, message, named or (prompt if about_prompt else None))


def invalid(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """What pydantic says of a body, as one line about the first thing that is wrong."""
    first = errors[0]
    place = _place(first["loc"])
    message = " ".join(str(first["msg"]).removeprefix("Value error, ").split())
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{place} is not a parameter here", place, "unknown_parameter")
    if first["type"] == "json_invalid" or not place:
        message = "the body must be a JSON object, sent as Content-Type: application/json"
        return ApiError(400, message)
    if first["type"] == "missing":
        return ApiError(400, f"{place} is missing", place, "missing_required_parameter")
    message = message if message.startswith(place) else f"{place}: {message}"
    return ApiError(400, message[:400], place)


def _place(loc: Sequence[Any]) -> str:
    """("body", "messages", 0, "content") as `messages[0].content`."""
    path = ""
    for part in loc[1:]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", str(part)):
            path += f".{part}" if path else str(part)
    return path[:120]
