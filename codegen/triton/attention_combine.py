"""Folds the partial results of the splits of each decoding sequence, in index order."""

from __future__ import annotations

import functools

from llm42c.codegen.triton import fragments
from llm42c.codegen.triton.fold import fold
from llm42c.codegen.triton.source import module
from llm42c.codegen.triton.spec import AttentionSpec


@functools.cache
def emit(spec: AttentionSpec) -> str:
    """The file of one specialisation; its kernel is ``attention_combine``."""
    return module(
        "Folds splits of decode attention from the left",
        spec.subject(),
        spec.constants(),
        *fragments.states(spec.sinks),
        fold("attention_combine", "attention_combine"),
    )
