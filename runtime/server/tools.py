"""Functions that a chat may call: what the output must be, and how a call is read out of it.

A call is a JSON object with `name` and `arguments`, alone or between `<tool_call>` and `</tool_call>`.
"""

from __future__ import annotations

import json
from typing import Any

from llm42c.runtime.server.errors import ApiError
from llm42c.runtime.server.schema import ChatRequest, NamedTool, Tool

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class ToolUse:
    """The tools of one request. `forced`: the output is a call, by a grammar."""

    def __init__(self, tools: list[Tool], forced: bool) -> None:
        self._tools, self.forced = tools, forced
        self._names = {tool.function.name for tool in tools}

    @staticmethod
    def of(body: ChatRequest) -> ToolUse | None:
        """None where no tool may be called. Raises ApiError."""
        choice, tools = body.tool_choice, body.tools or []
        names = [tool.function.name for tool in tools]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ApiError(400, f"tools: two functions are named {twice!r}", "tools")
        if choice == "none" or (choice is None and not tools):
            return None
        if not tools:
            raise ApiError(400, "tool_choice needs tools", "tool_choice")
        if isinstance(choice, NamedTool):
            tools = [tool for tool in tools if tool.function.name == choice.function.name]
            if not tools:
                raise ApiError(400, f"tool_choice: no tool is named {choice.function.name!r}", "tool_choice")
        return ToolUse(tools, choice not in (None, "auto"))

    @property
    def schema(self) -> dict[str, Any]:
        """What a forced output is."""
        calls = [_call_schema(tool) for tool in self._tools]
        return calls[0] if len(calls) == 1 else {"anyOf": calls}

    def described(self) -> list[dict[str, Any]]:
        """As chat templates take them."""
        return [tool.model_dump() for tool in self._tools]

    def holds(self, text: str) -> bool:
        """Whether what came out so far may be a call, so that it is not shown as text."""
        begun = text.lstrip()
        return self.forced or not begun or begun[0] == "{" or begun[: len(OPEN)] == OPEN[: len(begun)]

    def calls(self, text: str, call_id: str) -> list[dict[str, Any]]:
        """The call that a whole text is, if it is one."""
        text = text.strip()
        if text.startswith(OPEN):
            text = text.removeprefix(OPEN).removesuffix(CLOSE)
        try:
            call = json.loads(text)
        except (ValueError, RecursionError):
            return []
        if not isinstance(call, dict) or call.get("name") not in self._names:
            return []
        arguments = json.dumps(call.get("arguments", {}), ensure_ascii=False)
        function = {"name": call["name"], "arguments": arguments}
        return [{"id": call_id, "type": "function", "function": function}]


def _call_schema(tool: Tool) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"name": {"const": tool.function.name}, "arguments": tool.function.parameters},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }
