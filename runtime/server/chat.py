"""A chat's body as a prompt, and what its output must be."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llm42c.runtime.server.codec import Codec
from llm42c.runtime.server.errors import ApiError
from llm42c.runtime.server.schema import (
    CalledFunction,
    ChatRequest,
    Message,
    ObjectFormat,
    SchemaFormat,
    TextPart,
    TokenizeRequest,
)
from llm42c.runtime.server.tools import ToolUse


@dataclass(frozen=True)
class Chat:
    prompt: list[int]
    max_tokens: int | None
    logprobs: int | None
    json_schema: dict[str, Any] | None
    draft: list[int] | None
    tools: ToolUse | None


def read(body: ChatRequest, codec: Codec) -> Chat:
    """In the tokenizer's thread. Raises ApiError."""
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise ApiError(400, "max_tokens and max_completion_tokens exclude each other", "max_tokens")
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs", "top_logprobs")
    tools, schema = ToolUse.of(body), _schema(body)
    if tools is not None and tools.forced:
        if schema is not None:
            raise ApiError(400, "response_format and a required tool exclude each other", "response_format")
        schema = tools.schema
    draft = None
    if body.prediction is not None:
        draft = codec.encode(_text(body.prediction.content), False, "prediction")
    return Chat(
        _prompt(body.messages, tools, codec),
        body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens,
        (body.top_logprobs or 0) if body.logprobs else None,
        schema,
        draft,
        tools,
    )


def tokens_of(body: TokenizeRequest, codec: Codec) -> list[int]:
    """In the tokenizer's thread. Raises ApiError."""
    if body.messages is None:
        return codec.encode(body.prompt or "", body.add_special_tokens)
    tools = [tool.model_dump() for tool in body.tools] if body.tools else None
    text = codec.render(rendered(body.messages), tools, body.add_generation_prompt)
    return codec.encode(text, False, "messages")


def rendered(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """As chat templates take them: contents are texts, and arguments of calls are objects."""
    out = []
    for message in messages:
        values: dict[str, Any] = {
            "role": "system" if message.role == "developer" else message.role,
            "content": _text(message.content),
        }
        if message.name is not None:
            values["name"] = message.name
        if message.tool_call_id is not None:
            values["tool_call_id"] = message.tool_call_id
        if message.tool_calls:
            values["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": _called(call.function),
                }
                for call in message.tool_calls
            ]
        out.append(values)
    return out


def _prompt(messages: Sequence[Message], tools: ToolUse | None, codec: Codec) -> list[int]:
    plain = rendered(messages)
    text = codec.render(plain, None if tools is None else tools.described())
    if tools is not None and not tools.forced and text == codec.render(plain):
        raise ApiError(
            400,
            "the model's chat template knows no tools: tool_choice must be 'required' or name a function",
            "tool_choice",
        )
    return codec.encode(text, False, "messages")


def _schema(body: ChatRequest) -> dict[str, Any] | None:
    if isinstance(body.response_format, SchemaFormat):
        return body.response_format.json_schema.schema_
    return {"type": "object"} if isinstance(body.response_format, ObjectFormat) else None


def _text(content: str | list[TextPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _called(function: CalledFunction) -> dict[str, Any]:
    name = function.name
    try:
        return {"name": name, "arguments": json.loads(function.arguments)}
    except (ValueError, RecursionError):
        raise ApiError(400, f"the arguments of a call of {name[:64]!r} are no JSON", "messages") from None
