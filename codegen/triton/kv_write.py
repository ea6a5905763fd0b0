"""Puts the keys and values of a call into their slots of the paged caches."""

from __future__ import annotations

import functools

from llm42c.codegen.triton.fold import fold
from llm42c.codegen.triton.source import module
from llm42c.codegen.triton.spec import AttentionSpec


@functools.cache
def emit(spec: AttentionSpec) -> str:
    """The file of one specialisation; its kernel is ``kv_write``."""
    return module(
        "Writes of paged keys and values", spec.subject(), spec.constants(), fold("kv_write", "kv_write")
    )
