"""Dynamo's limit of graphs for one function, past which it runs the function eagerly without an error."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import torch

from llm42c.errors import RecompileLimitError


def require_room() -> None:
    """To be called by a backend while Dynamo compiles a graph for it.

    Raises RecompileLimitError if this is the last graph that Dynamo compiles for the function: other sizes
    would silently run eagerly from then on, where the bits of a row depend on its batch.
    """
    size = _graphs_compiled(sys._getframe())
    limit = torch._dynamo.config.recompile_limit  # already that of torch.compile(recompile_limit=), if given
    if size is None or not size.will_compilation_exceed(limit - 1):
        return
    raise RecompileLimitError(
        f"torch.compile has reached its limit of {limit} graphs for one function, and would run other sizes "
        "eagerly, where a row's bits depend on its batch: compile with dynamic=True, so that one graph "
        "serves all sizes, or raise torch._dynamo.config.recompile_limit"
    )


def _graphs_compiled(frame: FrameType | None) -> Any:
    """Dynamo's own count of the graphs that it holds for the function being compiled; None outside of it.

    Backends are not told, so it is read where Dynamo keeps it while it calls one.
    """
    compile_code = torch._dynamo.convert_frame._compile.__code__
    while frame is not None and frame.f_code is not compile_code:
        frame = frame.f_back
    return None if frame is None else frame.f_locals["cache_size"]
