"""Builds the work list on the device: once a step, used by all layers."""

from __future__ import annotations

import functools

from llm42c.codegen.triton.fold import fold
from llm42c.codegen.triton.source import module
from llm42c.codegen.triton.spec import AttentionSpec


@functools.cache
def emit(spec: AttentionSpec) -> str:
    """The file of one specialisation; its kernel is ``attention_plan``."""
    constants = {**spec.constants(), "LANES": 64}
    text = fold("attention_plan", "attention_plan")
    return module("Work list of hybrid attention", spec.subject(), constants, text)
